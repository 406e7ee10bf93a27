# Copyright (c) mmscalablevit contributors. All rights reserved.
"""The site: it builds cleanly and is read from files, on a wide screen and on a phone."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from browser import CHROMIUM, Browser
from doc_blocks import ROOT, environment

PAGES = sorted((ROOT / 'docs').glob('*.md'))
# Of a page: by how much it is wider than the window, words in code that are broken though they fit
# into a line, pictures that were not found, the page's title and its name in the navigation.
LOOK = """(() => {
  const page = document.documentElement, broken = [];
  for (const code of document.querySelectorAll('.md-content :not(pre) > code')) {
    for (const node of [...code.childNodes].filter(node => node.nodeType === Node.TEXT_NODE)) {
      for (const word of node.data.matchAll(/[A-Za-z0-9_]+/g)) {
        const range = document.createRange();
        range.setStart(node, word.index);
        range.setEnd(node, word.index + word[0].length);
        const lines = new Set([...range.getClientRects()].map(box => Math.round(box.top)));
        if (lines.size > 1 && word[0].length < 30) broken.push(word[0]);
      }
    }
  }
  const link = document.querySelector('.md-nav--primary .md-nav__link--active[href]') || {};
  return {
    overflow: page.scrollWidth - page.clientWidth,
    broken,
    missing: [...document.images].filter(image => !image.naturalWidth).map(image => image.src),
    name: (link.textContent || '').trim(),
    title: document.querySelector('h1').firstChild.textContent.trim(),
    footer: document.querySelectorAll('.md-footer__link').length,
  };
})()"""


@pytest.fixture(scope='module')
def site(tmp_path_factory):
    """The built site, and what its building said."""
    pytest.importorskip('mkdocs', reason='the site is built with the extra "docs"')
    folder = tmp_path_factory.mktemp('site')
    process = subprocess.run(
        [sys.executable, '-m', 'mkdocs', 'build', '--strict', '--site-dir', str(folder)],
        cwd=ROOT,
        env={**environment(), 'NO_MKDOCS_2_WARNING': '1', 'REPO_URL': 'https://example.org/code'},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.returncode == 0, process.stdout
    return folder, process.stdout


@pytest.fixture(scope='module')
def browser(tmp_path_factory):
    if not CHROMIUM:
        pytest.skip('no Chromium is installed')
    browser = Browser(tmp_path_factory.mktemp('profile'))
    yield browser
    browser.close()


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


def test_pages_in_a_browser(site, browser, tmp_path):
    """``pytest --basetemp FOLDER`` keeps the pictures of the pages, to be looked at."""
    for page in pages(site):
        name = page.relative_to(site[0]).with_suffix('')
        if name.parent.name == 'api' and name.name != 'models.attention':
            continue
        for width in (1400, 400):
            browser.resize(width)
            if width == 1400:
                browser.open(page.as_uri())
            seen = browser.run(LOOK)
            assert seen['overflow'] == 0, (page, width)
            assert not seen['broken'], (page, width, seen['broken'])
            assert not seen['missing'], page
            assert seen['footer'] in (1, 2), page
            assert seen['name'] == seen['title'], page
            browser.screenshot(tmp_path / f'{"_".join(name.parts)}_{width}.png')


@pytest.mark.parametrize(
    ('words', 'page'),
    [
        ('VOC', 'custom_dataset'),
        ('TensorRT', 'deployment'),
        ('batch size', 'troubleshooting'),
        ('pretrained', 'pretrained_weights'),
    ],
)
def test_search_without_a_server(site, browser, words, page):
    browser.open(f'{(site[0] / "index.html").as_uri()}?q={words.replace(" ", "%20")}')
    browser.wait("document.querySelector('.md-search-result__item a')")
    found = browser.run(
        "[...document.querySelectorAll('.md-search-result__item a')].map(link => link.href)"
    )

    assert any(Path(link.split('?')[0]).stem == page for link in found[:5]), found
