# Copyright (c) mmscalablevit contributors. All rights reserved.
"""The set-up scripts: which wheel of mmcv and which PyTorch they take, what they say at the end."""

import os
import subprocess
import sys
import zipfile

import pytest
import torch
from jobs import ROOT

TAG = f'cp{sys.version_info.major}{sys.version_info.minor}'
WORKS, BROKEN = '', 'raise ImportError("undefined symbol")\n'


def bash(code, index=''):
    """Run a piece of the set-up with this Python; its exit code and what it printed."""
    script = f'python={sys.executable}; . tools/misc/mmcv_wheel.sh; {code}'
    variables = {**os.environ, 'MMCV_WHEELS': str(index), 'no_proxy': '*'}
    options = dict(cwd=ROOT, env=variables, stdout=subprocess.PIPE, text=True, timeout=120)
    done = subprocess.run(['bash', '-c', script], **options)
    return done.returncode, done.stdout.strip()


def publish(index, folder, extension=WORKS, tag=TAG):
    """Put a wheel of mmcv into a folder of an index, laid out as the maintainers' is."""
    page = index / folder / 'simple' / 'onedl-mmcv'
    page.mkdir(parents=True)
    name = f'onedl_mmcv-2.3.6-{tag}-{tag}-linux_x86_64.whl'
    info = 'onedl_mmcv-2.3.6.dist-info'
    files = {
        'mmcv/__init__.py': '__version__ = "2.3.6"\n',
        'mmcv/_ext.py': extension,
        f'{info}/METADATA': 'Metadata-Version: 2.1\nName: onedl-mmcv\nVersion: 2.3.6\n',
        f'{info}/WHEEL': f'Wheel-Version: 1.0\nTag: {tag}-{tag}-linux_x86_64\n',
        f'{info}/RECORD': '',
    }
    with zipfile.ZipFile(page / name, 'w') as wheel:
        for file, content in files.items():
            wheel.writestr(file, content)
    (page / 'index.html').write_text(f'<a href="{name}">{name}</a>')


@pytest.mark.parametrize(('extension', 'loads'), [(WORKS, True), (BROKEN, False)])
def test_wheel_of_the_index_is_installed(tmp_path, extension, loads):
    publish(tmp_path, 'cpu-torch2120', extension)
    target = tmp_path / 'site-packages'
    code, _ = bash(f'mmcv_wheel install cpu-torch2120 --target {target}', tmp_path)
    command = [sys.executable, '-c', 'import mmcv._ext; print(mmcv.__file__)']
    variables = {**os.environ, 'PYTHONPATH': str(target)}
    done = subprocess.run(command, env=variables, capture_output=True, text=True)
    assert code == 0
    # `make env` compiles if it does not load.
    assert (done.returncode == 0) == loads
    assert not loads or done.stdout.strip() == str(target / 'mmcv' / '__init__.py')


@pytest.mark.parametrize('there', ['other Python', 'no server'])
def test_set_up_goes_on_without_a_wheel(tmp_path, there):
    publish(tmp_path, 'cpu-torch2120', tag='cp39')
    index = 'http://127.0.0.1:1' if there == 'no server' else tmp_path
    code, printed = bash(f'mmcv_wheel download cpu-torch2120 --dest {tmp_path}', index)
    assert (code == 0, printed) == (False, '')
    assert bash('torch_with_wheel', index) == (0, '')


@pytest.mark.parametrize(
    ('folders', 'wanted'),
    [
        (['cu130-torch2120', 'cu128-torch280'], 'torch==2.12.0 torchvision==0.27.0'),
        (['cu128-torch280'], 'torch==2.8.0 torchvision==0.23.0'),
    ],
)
def test_newcomer_gets_the_newest_torch_that_has_a_wheel(tmp_path, folders, wanted):
    for name in folders:
        publish(tmp_path, name)
    assert bash('torch_with_wheel', tmp_path) == (0, wanted)


def test_folder_is_that_of_the_installed_torch():
    device = f'cu{torch.version.cuda}'.replace('.', '') if torch.version.cuda else 'cpu'
    major, minor = torch.__version__.split('.')[:2]
    assert bash('wheel_folder') == (0, f'{device}-torch{major}{minor}0')


@pytest.mark.parametrize(
    ('module', 'code', 'said'),
    [
        ('mmcv.cnn', 0, 'Ready: mmscalablevit '),
        ('no_such_module', 1, 'no_such_module does not import: ModuleNotFoundError: '),
    ],
)
def test_set_up_ends_with_a_look_at_what_is_installed(module, code, said):
    pytest.importorskip('torchvision')
    script = f'set -- {sys.prefix}; usage=; . tools/misc/environment.sh; look {module}'
    done = subprocess.run(
        ['bash', '-c', script, 'tools/misc/setup_env.sh'], cwd=ROOT, capture_output=True, text=True
    )
    assert (done.returncode, said in done.stdout + done.stderr) == (code, True), done
