# Copyright (c) mmscalablevit contributors. All rights reserved.
"""Imports go down the layers of the code, and the drawing shows the code as it is."""

import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CODE = runpy.run_path(str(ROOT / 'docs' / 'architecture_drawing.py'))
LAYERS = {part: number for number, row in enumerate(reversed(CODE['ROWS'])) for part in row}
FILES = {
    path.relative_to(ROOT).as_posix(): (path, part)
    for part in LAYERS
    for path in CODE['files'](part)
}


def parts_of(path):
    """The parts of the package that a file imports."""
    names = {name for name in CODE['imports'](path) if name.startswith('mmscalablevit.')}
    return {name.split('.')[1] for name in names} & set(LAYERS)


def test_layers_are_those_of_the_rules():
    assert LAYERS['errors'] < LAYERS['checkpoint'] == LAYERS['checks'] < LAYERS['work_dirs']
    assert LAYERS['work_dirs'] < LAYERS['models'] == LAYERS['engine'] < LAYERS['cli']
    assert LAYERS['cli'] < LAYERS['tools'] == LAYERS['demo']
    parts = {
        path.stem
        for path in (ROOT / 'mmscalablevit').iterdir()
        if path.suffix == '.py' or (path / '__init__.py').exists()
    }
    assert parts - {'__init__', '_moved', 'compat', 'version'} == set(LAYERS) - {'tools', 'demo'}


@pytest.mark.parametrize('name', FILES)
def test_imports_go_down(name):
    path, part = FILES[name]
    found = parts_of(path) - {part}

    assert {other for other in found if LAYERS[other] >= LAYERS[part]} == set()


@pytest.mark.parametrize('name', [name for name in FILES if name.startswith('mmscalablevit/')])
def test_package_imports_no_toolbox(name):
    path = FILES[name][0]
    forbidden = {'tools', 'configs', 'demo', 'docs', 'tests', 'mmdet', 'mmseg', 'mmpretrain'}
    if path.name == 'cls_head.py':
        forbidden.remove('mmpretrain')

    assert not {name.split('.')[0] for name in CODE['imports'](path)} & forbidden


def test_compat_imports_nothing_of_the_package():
    # It says what is missing before anything that needs it is imported.
    assert parts_of(ROOT / 'mmscalablevit' / 'compat.py') == set()


def test_drawing_is_that_of_the_code():
    assert CODE['FILE'].read_text() == CODE['drawing'](), 'run python docs/architecture_drawing.py'
