# Copyright (c) mmscalablevit contributors. All rights reserved.
"""Importing the package: what it needs, what it leaves alone, what it says if something is off."""

import importlib.metadata
import subprocess
import sys

import mmcv
import mmengine
import pytest

from mmscalablevit import compat


def python(code):
    """Run code in a fresh interpreter and return its last line of output."""
    done = subprocess.run(
        [sys.executable, '-W', 'ignore', '-c', code],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
    )
    return done.stdout.strip().splitlines()[-1]


def test_import_registers_and_loads_no_toolbox():
    loaded = python(
        'import sys, mmscalablevit\n'
        'from mmengine.registry import MODELS\n'
        "assert MODELS.get('ScalableViT') is mmscalablevit.ScalableViT\n"
        "heavy = {'mmdet', 'mmseg', 'mmpretrain', 'mmcv.ops', 'mmcv._ext', 'torchvision'}\n"
        'print(sorted(heavy & set(sys.modules)))'
    )
    assert loaded == '[]'


@pytest.mark.parametrize('name', ['mmengine', 'mmcv'])
def test_missing_dependency_is_one_sentence_that_says_what_to_install(name):
    message = python(f'import sys; sys.modules[{name!r}] = None; import mmscalablevit')
    assert message.startswith(f'ImportError: mmscalablevit needs {name}>=')
    assert f'onedl-{name}' in message


@pytest.mark.parametrize(
    ('module', 'version', 'wanted'),
    [(mmengine, '0.7.4', '0.8.3'), (mmengine, '0.8.3rc1', None), (mmcv, '1.7.2', '2.0.0')],
)
def test_old_dependency_is_named_with_both_versions(monkeypatch, module, version, wanted):
    monkeypatch.setattr(module, '__version__', version)
    if wanted is None:
        compat.check_dependencies()
        return
    with pytest.raises(ImportError, match=f'{module.__name__}>={wanted}, found {version}'):
        compat.check_dependencies()


def test_two_families_in_one_environment_are_named(monkeypatch, recwarn):
    versions = {'onedl-mmcv': '2.3.6', 'mmcv': '2.1.0'}

    def version(name):
        if name not in versions:
            raise importlib.metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(importlib.metadata, 'version', version)
    with pytest.warns(UserWarning, match=r'^onedl-mmcv 2\.3\.6 and mmcv 2\.1\.0 lie over each'):
        compat.check_dependencies()
    del versions['mmcv']
    compat.check_dependencies()
    assert not recwarn.list


FAKE_TORCHVISION = """
import sys, pathlib, torch
folder = pathlib.Path({folder!r}) / 'torchvision'
folder.mkdir()
# What torchvision does at import, with a compiled library that does not load.
(folder / '__init__.py').write_text('''
import torch
@torch.library.register_fake("torchvision::nms")
def nms(dets, scores, iou_threshold): ...
''')
if {library!r}:
    (folder / {library!r}).write_text('no library')
sys.path.insert(0, {folder!r})
{setup}
import torchvision
print('imported')
"""


@pytest.mark.parametrize('library', ['', '_C.so'])
def test_torchvision_without_compiled_half_becomes_importable(tmp_path, library):
    def run(name, setup):
        folder = tmp_path / name
        folder.mkdir()
        return python(FAKE_TORCHVISION.format(folder=str(folder), library=library, setup=setup))

    assert 'torchvision::nms does not exist' in run('bare', '')
    assert run('package', 'import mmscalablevit') == 'imported'
