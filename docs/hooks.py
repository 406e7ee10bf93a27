# Copyright (c) mmscalablevit contributors. All rights reserved.
"""MkDocs' view of the repository: pages lie in the site where their files lie here."""

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
# Pages, their pictures, and the files that pages link to.
PARTS = (
    '*.md',
    'LICENSE',
    'configs/**/*.*',
    'demo/*.*',
    'docs/*.css',
    'docs/*.md',
    'docs/images/*',
    'docs/results/*',
    'tools/**/*.*',
)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Replace MkDocs' own list, which knows the folder ``docs/`` alone."""
    for file in list(files):
        if file.src_dir == config.docs_dir:
            files.remove(file)
    for path in sorted({path for part in PARTS for path in ROOT.glob(part)}):
        if path.is_file() and '__pycache__' not in path.parts:
            name = path.relative_to(ROOT).as_posix()
            files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """List the modules of the package on the API page, those that a user meets first on top."""
    modules = [path.relative_to(ROOT) for path in (ROOT / 'mmscalablevit').rglob('*.py')]
    names = [
        '.'.join(path.with_suffix('').parts)
        for path in modules
        if '.mim' not in path.parts and path.name not in ('__init__.py', 'version.py')
    ]
    order = {'models': 0, 'engine': 1, 'checkpoint': 2, 'checks': 3}
    names.sort(key=lambda name: (order.get(name.split('.')[1], 4), name))
    sections = [f'## {name.split(".", 1)[1]}\n\n::: {name}' for name in names]
    return markdown.replace('<!-- modules -->', '\n\n'.join(sections))
