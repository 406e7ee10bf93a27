# Copyright (c) mmscalablevit contributors. All rights reserved.
"""MkDocs' view of the repository: each file's page has the path that the file has here."""

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
# Pages, their pictures, and the files that pages link to.
PARTS = (
    '*.md',
    'CITATION.cff',
    'LICENSE',
    'configs/**/*.*',
    'demo/*.*',
    'docs/*.css',
    'docs/*.js',
    'docs/*.md',
    'docs/images/*',
    'docs/results/*',
    'tools/**/*.*',
)
# Code in a line of text: in a block, it follows a span.
INLINE = re.compile(r'(?<!</span><code>)(?<=<code>)[^<>]+(?=</code>)')
# Images from the network, which the site does without.
BADGE = re.compile(r'^\[!\[.*\]\(https://img\.shields\.io/.*\)\n', re.MULTILINE)
# Parts of the package in the order in which a user meets them.
ORDER = ('models', 'engine', 'checkpoint', 'checks')


def modules() -> dict[str, Path]:
    """Names of the package's modules, without the package's own name, and their files."""
    paths = [
        path.relative_to(ROOT / 'mmscalablevit')
        for path in (ROOT / 'mmscalablevit').rglob('*.py')
        if '.mim' not in path.parts and path.name not in ('__init__.py', 'version.py', '_moved.py')
    ]
    paths.sort(key=lambda path: (ORDER.index(path.parts[0]) if path.parts[0] in ORDER else 4, path))
    return {'.'.join(path.with_suffix('').parts): path for path in paths}


def on_config(config: MkDocsConfig) -> None:
    """Add a page for each module to the navigation."""
    api = next(section['API'] for section in config.nav if 'API' in section)
    api += [f'docs/api/{name}.md' for name in modules() if f'docs/api/{name}.md' not in api]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Replace MkDocs' own list, which knows the folder ``docs/`` alone."""
    for file in list(files):
        if file.src_dir == config.docs_dir:
            files.remove(file)
    for path in sorted({path for part in PARTS for path in ROOT.glob(part)}):
        if path.is_file() and '__pycache__' not in path.parts:
            name = path.relative_to(ROOT).as_posix()
            files.append(File.generated(config, name, abs_src_path=str(path)))
    for name in modules():
        # Found after the other pages.
        boost = '---\nsearch:\n  boost: 0.5\n---\n\n'
        text = f'{boost}# {name}\n\n::: mmscalablevit.{name}\n'
        files.append(File.generated(config, f'docs/api/{name}.md', content=text))
    notebook = '\n\n'.join(read_notebook(ROOT / 'demo' / 'tutorial.ipynb'))
    files.append(File.generated(config, 'demo/tutorial.md', content=notebook))
    return files


def read_notebook(path: Path) -> Iterator[str]:
    """The cells of a notebook and what they printed and drew, as Markdown."""
    for cell in json.loads(path.read_text())['cells']:
        source = ''.join(cell['source'])
        yield source if cell['cell_type'] == 'markdown' else f'```python\n{source}\n```'
        for output in cell.get('outputs', []):
            if 'text' in output:
                yield f'```text\n{"".join(output["text"])}```'
            elif 'image/png' in output.get('data', {}):
                picture = ''.join(output['data']['image/png']).replace('\n', '')
                yield f'![What the cell above draws](data:image/png;base64,{picture})'


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """List the modules on the API page; drop badges; let links to the notebook lead to its page."""
    rows = [
        f'| [{name}](api/{name}.md) | {first_line(ROOT / "mmscalablevit" / path)} |'
        for name, path in modules().items()
    ]
    table = '\n'.join(['| Module | Purpose |', '|---|---|', *rows])
    markdown = BADGE.sub('', markdown.replace('<!-- modules -->', table))
    return markdown.replace('/tutorial.ipynb)', '/tutorial.md)')


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """In a line of text, let paths break after a slash, colon or dot, and no option in itself."""

    def breaks(code: re.Match) -> str:
        text = re.sub(r'([/:]|(?<=\w)\.(?=\w{4}))(?=\w)', r'\1<wbr>', code[0])
        return re.sub(r'--[\w-]+', r'<span class="option">\g<0></span>', text)

    return INLINE.sub(breaks, html)


def first_line(path: Path) -> str:
    """The first line of a module's docstring."""
    return ast.get_docstring(ast.parse(path.read_text())).splitlines()[0]
