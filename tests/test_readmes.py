# Copyright (c) mmscalablevit contributors. All rights reserved.
"""The pages: links resolve, every config is listed, figures are those of the metafiles."""

import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
FOLDERS = ('detection', 'segmentation', 'classification', 'demo')
PAGES = sorted(
    path.relative_to(ROOT)
    for pattern in ('*.md', 'configs/**/*.md', 'docs/**/*.md')
    for path in ROOT.glob(pattern)
)
LINK = re.compile(r'\[[^]]*\]\(([^)\s]+)\)')
# Columns of the READMEs: metrics of the metafiles.
METRICS = {
    'box AP': 'box AP',
    'mask AP': 'mask AP',
    'mIoU': 'mIoU',
    'mIoU ms+flip': 'mIoU(ms+flip)',
    'Top 1 Accuracy': 'Top 1 Accuracy',
}


def without_code(text):
    return re.sub(r'```.*?```', '', text, flags=re.DOTALL)


def anchors(path):
    """The anchors that GitHub gives to headings."""
    headings = re.findall(r'^#+ (.+)$', without_code(path.read_text()), flags=re.MULTILINE)
    return {re.sub(r'[^\w\- ]', '', heading.lower()).replace(' ', '-') for heading in headings}


def rows(path):
    """The rows of every table that name a config: its path and its cells by column."""
    header = None
    for line in path.read_text().splitlines():
        if not line.startswith('|'):
            header = None
            continue
        cells = [cell.strip() for cell in line.strip('|').split('|')]
        if header is None:
            header = cells
        elif LINK.search(cells[0]) and LINK.search(cells[0])[1].endswith('.py'):
            yield LINK.search(cells[0])[1], dict(zip(header, cells, strict=True))


ROWS = [
    (folder, config, cells)
    for folder in FOLDERS
    for config, cells in rows(ROOT / 'configs' / folder / 'README.md')
]


@pytest.fixture(scope='module')
def published():
    """Metadata and metrics of every config that a metafile lists."""
    models = {}
    for path in (ROOT / 'configs').glob('*/metafile.yml'):
        for model in yaml.safe_load(path.read_text())['Models']:
            metrics = [result['Metrics'] for result in model.get('Results') or []]
            merged = {key: value for part in metrics for key, value in part.items()}
            models[model['Config']] = (model['Metadata'], merged)
    return models


@pytest.mark.parametrize('page', PAGES, ids=str)
def test_relative_links_resolve(page):
    for target in LINK.findall(without_code((ROOT / page).read_text())):
        if '://' in target:
            continue
        name, _, anchor = target.partition('#')
        path = (ROOT / page).parent / name if name else ROOT / page
        assert path.exists(), target
        if anchor:
            assert anchor in anchors(path), target


@pytest.mark.parametrize('folder', FOLDERS)
def test_every_config_is_linked(folder):
    linked = LINK.findall((ROOT / 'configs' / folder / 'README.md').read_text())
    configs = {path.name for path in (ROOT / 'configs' / folder).glob('*.py')}

    assert configs
    assert configs - set(linked) == set()


@pytest.mark.parametrize(
    ('folder', 'config', 'cells'), ROWS, ids=[f'{folder}/{config}' for folder, config, _ in ROWS]
)
def test_figures_are_those_of_the_metafile(folder, config, cells, published):
    metadata, metrics = published[f'configs/{folder}/{config}']
    said = {
        METRICS[column]: float(cell)
        for column, cell in cells.items()
        if column in METRICS and cell != '-'
    }

    assert said == metrics
    if 'Params' in cells:
        assert float(cells['Params']) == pytest.approx(metadata['Parameters'] / 1e6, abs=0.06)
    if cells.get('GFLOPs') and 'FLOPs' in metadata:
        assert float(cells['GFLOPs']) == pytest.approx(metadata['FLOPs'] / 1e9, rel=0.01)


@pytest.mark.parametrize('folder', ['detection', 'segmentation', 'classification'])
def test_published_results_are_marked(folder):
    text = (ROOT / 'configs' / folder / 'README.md').read_text()

    assert '**published by the authors, not reproduced here**' in text
    assert '**inferred**' in text.lower()


def test_citation_is_of_this_version():
    cited = yaml.safe_load((ROOT / 'CITATION.cff').read_text())

    assert f"'{cited['version']}'" in (ROOT / 'mmscalablevit' / 'version.py').read_text()
    title = cited['preferred-citation']['title']
    assert f'title={{{title}}}' in (ROOT / 'README.md').read_text()


def test_no_page_names_a_file_of_this_machine():
    pages = ' '.join((ROOT / page).read_text() for page in PAGES)

    assert not re.search(r'/(tmp|root|home)/', pages)
