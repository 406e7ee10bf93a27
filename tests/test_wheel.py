# Copyright (c) mmscalablevit contributors. All rights reserved.
"""The package as it is installed: configs and tools go with it, where MIM looks for them."""

import shutil
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from doc_blocks import LOADERS, environment
from jobs import ROOT, draw_shapes, run

WITH_MIM = ('configs', 'demo', 'tools')
PARTS = (
    *WITH_MIM,
    *('mmscalablevit', 'setup.py', 'pyproject.toml', 'MANIFEST.in', 'model-index.yml'),
    *('README.md', 'CHANGELOG.md', 'LICENSE'),
)


def is_litter(name):
    return '__pycache__' in name or 'work_dirs/' in name or name.endswith('.pyc')


def files_in(folder, *parts):
    """Names of all files in a folder, or in some folders of it."""
    paths = [path for part in parts or '.' for path in (folder / part).rglob('*')]
    return {str(path.relative_to(folder)) for path in paths if path.is_file()}


def shipped():
    return {name for name in files_in(ROOT, *WITH_MIM) if not is_litter(name)}


def build(source, what):
    """Call the build backend as pip does; the name of what it made."""
    code = f"import setuptools.build_meta as b; print(b.build_{what}('dist'))"
    output = run([sys.executable, '-c', code], source, None)
    return source / 'dist' / output.split()[-1]


@pytest.fixture(scope='module')
def source(tmp_path_factory):
    """A copy of the source tree in which tools have been used."""
    folder = tmp_path_factory.mktemp('source')
    ignore = shutil.ignore_patterns('__pycache__', '.mim', 'work_dirs')
    for part in PARTS:
        if (ROOT / part).is_dir():
            shutil.copytree(ROOT / part, folder / part, ignore=ignore)
        else:
            shutil.copy2(ROOT / part, folder / part)
    for litter in ('configs/demo/__pycache__/a.cpython-311.pyc', 'tools/work_dirs/run/epoch_1.pth'):
        path = folder / litter
        path.parent.mkdir(parents=True)
        path.write_bytes(b'litter')
    (folder / 'dist').mkdir()
    return folder


@pytest.fixture(scope='module')
def installed(source, tmp_path_factory):
    """The wheel, unpacked as an installer would."""
    folder = tmp_path_factory.mktemp('site-packages')
    with zipfile.ZipFile(build(source, 'wheel')) as wheel:
        wheel.extractall(folder)
    return folder / 'mmscalablevit'


def test_wheel_holds_the_package_and_what_mim_looks_for(installed):
    mim = installed / '.mim'
    found = files_in(mim)
    package = {name for name in files_in(ROOT, 'mmscalablevit') if name.endswith('.py')}
    assert found == {*shipped(), 'model-index.yml'}
    for name in found:
        assert (mim / name).read_bytes() == (ROOT / name).read_bytes()
    every = files_in(installed.parent)
    rest = {name for name in every if '.dist-info/' not in name and '/.mim/' not in name}
    assert rest == {name for name in package if '/.mim/' not in name}


def test_source_distribution_can_make_the_same_wheel(source):
    with tarfile.open(build(source, 'sdist')) as archive:
        names = {name.partition('/')[2] for name in archive.getnames() if '.' in Path(name).name}
    assert names >= {*shipped(), 'model-index.yml', 'setup.py', 'pyproject.toml', 'README.md'}
    assert not [name for name in names if is_litter(name)]


def test_editable_install_links_to_the_source(source):
    # The second time, on what is there.
    for _ in range(2):
        build(source, 'editable')
    mim = source / 'mmscalablevit' / '.mim'

    names = sorted(path.name for path in mim.iterdir())
    assert names == ['configs', 'demo', 'model-index.yml', 'tools']
    for path in mim.iterdir():
        assert path.resolve() == source / path.name
        assert not path.readlink().is_absolute()


def test_trains_out_of_an_installed_wheel(installed, tmp_path):
    draw_shapes(tmp_path / 'data' / 'shapes', num_train=4, num_val=2)
    env = {**environment(), 'PYTHONPATH': str(installed.parent)}
    where = [sys.executable, '-c', 'import mmscalablevit as m; print(m.__file__)']
    assert run(where, tmp_path, env).split()[-1] == str(installed / '__init__.py')
    mim = installed / '.mim'
    config = mim / 'configs' / 'demo' / 'mask-rcnn_scalablevit-demo_fpn_shapes.py'
    options = ['train_cfg.max_iters=2', 'train_cfg.val_interval=2', *LOADERS]
    options += ['train_dataloader.batch_size=2', 'default_hooks.logger.interval=1']
    command = [sys.executable, mim / 'tools' / 'train.py', config, '--work-dir', 'out']
    output = run([*command, '--cfg-options', *options], tmp_path, env)
    assert 'coco/segm_mAP' in output
    assert (tmp_path / 'out' / 'iter_2.pth').is_file()
