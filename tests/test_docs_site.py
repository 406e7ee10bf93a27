# Copyright (c) mmscalablevit contributors. All rights reserved.
"""The site: it builds cleanly and is read from files, on a wide screen and on a phone."""

import html
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from urllib.parse import quote

import pytest
from doc_blocks import ROOT, environment
from jobs import run

PAGES = sorted((ROOT / 'docs').glob('*.md'))
CHROMIUM = shutil.which('chromium') or shutil.which('google-chrome')
OPTIONS = (
    '--headless --no-sandbox --disable-gpu --no-first-run --disable-dev-shm-usage '
    '--disable-background-networking --disable-component-update --disable-sync --hide-scrollbars '
    '--allow-file-access-from-files --virtual-time-budget=6000000 --dump-dom'
)
# Shows pages in frames as wide as a window and as a phone. Of each: by how much it is wider than
# its frame, words in code that are broken though they fit into a line, pictures that were not
# found, the page's title and its name in the navigation. Of each search, where it leads.
LOOK = """<body><script>
async function show(url, width) {
  const frame = document.createElement('iframe');
  frame.style = `width: ${width}px; height: 900px; border: 0`;
  frame.src = url;
  document.body.append(frame);
  await new Promise(done => frame.onload = done);
  return frame.contentDocument;
}
function look(page) {
  const broken = [], root = page.documentElement;
  for (const code of page.querySelectorAll('.md-content :not(pre) > code')) {
    for (const node of [...code.childNodes].filter(node => node.nodeType === Node.TEXT_NODE)) {
      for (const word of node.data.matchAll(/[A-Za-z0-9_]+/g)) {
        const range = page.createRange();
        range.setStart(node, word.index);
        range.setEnd(node, word.index + word[0].length);
        const lines = new Set([...range.getClientRects()].map(box => Math.round(box.top)));
        if (lines.size > 1 && word[0].length < 30) broken.push(word[0]);
      }
    }
  }
  const link = page.querySelector('.md-nav--primary .md-nav__link--active[href]') || {};
  return {
    overflow: root.scrollWidth - root.clientWidth,
    broken,
    missing: [...page.images].filter(image => !image.naturalWidth).map(image => image.src),
    name: (link.textContent || '').trim(),
    title: page.querySelector('h1').firstChild.textContent.trim(),
    footer: page.querySelectorAll('.md-footer__link').length,
  };
}
async function search(url) {
  const page = await show(url, 1400);
  for (let tries = 0; tries < 600; tries++) {
    const links = [...page.querySelectorAll('.md-search-result__item a')];
    if (links.length) return links.map(link => link.href);
    await new Promise(done => setTimeout(done, 100));
  }
}
onload = async () => {
  const seen = [];
  for (const url of PAGES) for (const width of [1400, 400])
    seen.push([url, width, look(await show(url, width))]);
  const found = [];
  for (const url of SEARCHES) found.push(await search(url));
  document.body.textContent = JSON.stringify([seen, found]);
};
</script>"""
SEARCHES = {
    'VOC': 'custom_dataset',
    'TensorRT': 'deployment',
    'batch size': 'troubleshooting',
    'pretrained': 'pretrained_weights',
}


@pytest.fixture(scope='module')
def site(tmp_path_factory):
    """The built site, and what its building said."""
    pytest.importorskip('mkdocs', reason='the site is built with the extra "docs"')
    folder = tmp_path_factory.mktemp('site')
    variables = {'NO_MKDOCS_2_WARNING': '1', 'REPO_URL': 'https://example.org/code'}
    command = [sys.executable, '-m', 'mkdocs', 'build', '--strict', '--site-dir', folder]
    return folder, run(command, ROOT, {**environment(), **variables})


@pytest.fixture(scope='module')
def seen(site, tmp_path_factory):
    """What a headless browser saw of the pages, and found."""
    if not CHROMIUM:
        pytest.skip('no Chromium is installed')
    folder = tmp_path_factory.mktemp('look')
    urls = [page.as_uri() for page in pages(site) if page.parent.name != 'api']
    urls.append((site[0] / 'docs' / 'api' / 'models.attention.html').as_uri())
    searches = [f'{(site[0] / "index.html").as_uri()}?q={quote(words)}' for words in SEARCHES]
    look = LOOK.replace('PAGES', json.dumps(urls)).replace('SEARCHES', json.dumps(searches))
    (folder / 'look.html').write_text(look)
    command = [CHROMIUM, *OPTIONS.split(), f'--user-data-dir={folder}', folder / 'look.html']
    dumped = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout
    return json.loads(html.unescape(re.search('<body>(.*)</body>', dumped, re.DOTALL)[1]))


def pages(site):
    return [page for page in sorted(site[0].rglob('*.html')) if page.name != '404.html']


def test_site_builds_without_a_warning(site):
    assert 'WARNING' not in site[1]
    for page in PAGES:
        assert (site[0] / 'docs' / f'{page.stem}.html').is_file()
    assert 'https://example.org/code' in (site[0] / 'index.html').read_text()


def test_site_needs_no_network(site):
    for page in site[0].rglob('*.html'):
        tags = re.findall(r'<(?:script|img|link|iframe)[^>]*>', page.read_text())
        loaded = [tag for tag in tags if re.search(r'(?:src|href)="?(?://|https?:)', tag)]
        assert not loaded, page


def test_links_of_the_site_resolve(site):
    """Links to files that are no pages, which MkDocs does not check."""
    for page in pages(site):
        for target in re.findall(r'(?:href|src)="([^"#?]+)[^"]*"', page.read_text()):
            if not re.match(r'\w+:', target):
                assert (page.parent / target).resolve().exists(), (page, target)


def test_api_shows_the_docstrings_of_every_module(site):
    for path in (ROOT / 'mmscalablevit').glob('*/[a-z]*.py'):
        name = f'{path.parent.name}.{path.stem}'
        text = (site[0] / 'docs' / 'api' / f'{name}.html').read_text()
        assert f'id="mmscalablevit.{name}' in text
        assert ':class:' not in text
        # An example that was taken for prose would be quotations.
        assert '<blockquote>' not in text
    network = site[0] / 'docs' / 'api' / 'models.scalablevit.html'
    assert 'Channels of the input image.' in network.read_text()


def test_pages_in_a_browser(seen):
    assert len(seen[0]) > 2 * len(PAGES)
    for url, width, page in seen[0]:
        assert page['overflow'] == 0, (url, width)
        assert not page['broken'], (url, width, page['broken'])
        assert not page['missing'], url
        assert page['footer'] in (1, 2), url
        assert page['name'] == page['title'], url


def test_search_without_a_server(seen):
    for page, links in zip(SEARCHES.values(), seen[1], strict=True):
        assert page in [Path(link.split('?')[0]).stem for link in links[:5]], links
