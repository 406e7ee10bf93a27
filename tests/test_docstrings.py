# Copyright (c) mmscalablevit contributors. All rights reserved.
"""The docstrings of the package: their examples give what they show."""

import doctest
import importlib
from pathlib import Path

import pytest
from mmengine.logging import MMLogger

from mmscalablevit import engine, models

PACKAGE = Path(__file__).parents[1] / 'mmscalablevit'
MODULES = [
    '.'.join(path.relative_to(PACKAGE.parent).with_suffix('').parts)
    for path in sorted(PACKAGE.glob('**/[a-z]*.py'))
    if '.mim' not in path.parts and '>>> ' in path.read_text()
]


@pytest.mark.parametrize('name', MODULES)
def test_examples_give_what_they_show(name, tmp_path, monkeypatch):
    if name.endswith('.cls_head'):
        pytest.importorskip('mmpretrain')
    monkeypatch.chdir(tmp_path)
    # Before doctest replaces stdout: what is logged is no part of an example's output.
    MMLogger.get_current_instance()

    assert not doctest.testmod(importlib.import_module(name)).failed


@pytest.mark.parametrize('package', [engine, models], ids=lambda package: package.__name__)
def test_what_a_config_names_has_an_example(package):
    assert [name for name in package.__all__ if '>>> ' not in getattr(package, name).__doc__] == []
