# Copyright (c) mmscalablevit contributors. All rights reserved.
"""The package as it is installed: configs and tools go with it, where MIM looks for them."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import yaml
from mmengine.config import Config

ROOT = Path(__file__).parents[1]
PARTS = (
    'mmscalablevit',
    'configs',
    'tools',
    'setup.py',
    'pyproject.toml',
    'MANIFEST.in',
    'README.md',
    'CHANGELOG.md',
    'LICENSE',
    'model-index.yml',
)
CONFIGS = sorted(
    str(path.relative_to(ROOT))
    for path in (ROOT / 'configs').glob('*/*.py')
    if path.parent.name != '_base_'
)


def is_litter(name):
    return '__pycache__' in name or 'work_dirs' in name or name.endswith('.pyc')


def shipped():
    """Names of all files of configs and tools."""
    return {
        str(path.relative_to(ROOT))
        for part in ('configs', 'tools')
        for path in (ROOT / part).rglob('*')
        if path.is_file() and not is_litter(str(path))
    }


def build(source, what):
    """Call the build backend as pip does; the name of what it made."""
    code = f"import setuptools.build_meta as b; print(b.build_{what}('dist'))"
    process = subprocess.run(
        [sys.executable, '-c', code], cwd=source, capture_output=True, text=True, check=False
    )
    assert process.returncode == 0, process.stderr[-4000:]
    return source / 'dist' / process.stdout.split()[-1]


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


def test_wheel_holds_configs_tools_and_metadata(installed):
    mim = installed / '.mim'
    found = {str(path.relative_to(mim)) for path in mim.rglob('*') if path.is_file()}

    assert found == {*shipped(), 'model-index.yml'}
    for name in found:
        assert (mim / name).read_bytes() == (ROOT / name).read_bytes()
    for metafile in yaml.safe_load((mim / 'model-index.yml').read_text())['Import']:
        for model in yaml.safe_load((mim / metafile).read_text())['Models']:
            assert (mim / model['Config']).is_file()


def test_wheel_holds_the_package_and_nothing_else(installed):
    package = {str(path.relative_to(ROOT)) for path in (ROOT / 'mmscalablevit').glob('**/*.py')}
    root = installed.parent
    found = {str(path.relative_to(root)) for path in root.rglob('*') if path.is_file()}
    rest = {name for name in found if '.dist-info/' not in name and '/.mim/' not in name}

    assert rest == {name for name in package if '/.mim/' not in name}


def test_source_distribution_can_make_the_same_wheel(source):
    with tarfile.open(build(source, 'sdist')) as archive:
        names = {name.partition('/')[2] for name in archive.getnames() if '.' in Path(name).name}

    assert names >= {*shipped(), 'model-index.yml', 'setup.py', 'pyproject.toml', 'README.md'}
    assert not [name for name in names if is_litter(name)]


def test_editable_install_links_to_the_source(source):
    build(source, 'editable')
    mim = source / 'mmscalablevit' / '.mim'

    assert sorted(path.name for path in mim.iterdir()) == ['configs', 'model-index.yml', 'tools']
    for path in mim.iterdir():
        assert path.resolve() == source / path.name
        assert not path.readlink().is_absolute()
    # Once more, on what is there.
    build(source, 'editable')


@pytest.mark.parametrize('name', CONFIGS)
def test_config_parses_out_of_an_installed_wheel(name, installed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    assert Config.fromfile(installed / '.mim' / name).model == Config.fromfile(ROOT / name).model


def run(command, installed, folder):
    environment = {
        **os.environ,
        'PYTHONPATH': str(installed.parent),
        'CUDA_VISIBLE_DEVICES': '',
        'OMP_NUM_THREADS': '1',
    }
    process = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        timeout=600,
    )
    assert process.returncode == 0, process.stdout[-4000:]
    return process.stdout


@pytest.mark.parametrize('trainer', ['mmscalablevit', 'mmdet'])
def test_trains_out_of_an_installed_wheel(trainer, installed, tmp_path):
    mim = installed / '.mim'
    where = run(['-c', 'import mmscalablevit as m; print(m.__file__)'], installed, tmp_path)
    assert where.split()[-1] == str(installed / '__init__.py')
    if trainer != 'mmscalablevit':
        package = pytest.importorskip(trainer)
        tool = Path(package.__file__).parent / '.mim' / 'tools' / 'train.py'
        if not tool.is_file():
            pytest.skip(f'{trainer} is installed without its tools')
    else:
        tool = mim / 'tools' / 'train.py'

    shapes = mim / 'tools' / 'dataset_converters' / 'shapes.py'
    sizes = ['--num-train', '4', '--num-val', '2', '--workers', '1']
    run([shapes, 'data/shapes', *sizes], installed, tmp_path)
    config = mim / 'configs' / 'demo' / 'mask-rcnn_scalablevit-demo_fpn_shapes.py'
    loaders = [
        f'{loader}_dataloader.{key}'
        for loader in ('train', 'val')
        for key in ('num_workers=0', 'persistent_workers=False')
    ]
    options = [
        'train_cfg.max_iters=2',
        'train_cfg.val_interval=2',
        'train_dataloader.batch_size=2',
        'default_hooks.logger.interval=1',
        *loaders,
    ]
    output = run(
        [tool, config, '--work-dir', 'out', '--cfg-options', *options], installed, tmp_path
    )

    assert 'Iter(train) [2/2]' in output
    assert 'coco/segm_mAP' in output
    assert (tmp_path / 'out' / 'iter_2.pth').is_file()
