# Copyright (c) mmscalablevit contributors. All rights reserved.
"""The set-up scripts: which wheel of mmcv and which PyTorch they take, what they say at the end."""

import functools
import http.server
import os
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
TAG = f'cp{sys.version_info.major}{sys.version_info.minor}'
WORKS, BROKEN = '', 'raise ImportError("undefined symbol")\n'


def bash(code, **environment):
    """Run a piece of the set-up with this Python; its exit code and what it printed."""
    script = f'python={sys.executable}; . tools/misc/mmcv_wheel.sh; {code}'
    done = subprocess.run(
        ['bash', '-c', script],
        cwd=ROOT,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        text=True,
        timeout=120,
    )
    return done.returncode, done.stdout.strip()


def publish(index, folder, extension=WORKS, tag=TAG):
    """Put a wheel of mmcv into a folder of an index, laid out as the maintainers' is."""
    page = index / folder / 'simple' / 'onedl-mmcv'
    page.mkdir(parents=True)
    name = f'onedl_mmcv-2.3.6-{tag}-{tag}-linux_x86_64.whl'
    info = 'onedl_mmcv-2.3.6.dist-info'
    with zipfile.ZipFile(page / name, 'w') as wheel:
        wheel.writestr('mmcv/__init__.py', '__version__ = "2.3.6"\n')
        wheel.writestr('mmcv/_ext.py', extension)
        wheel.writestr(
            f'{info}/METADATA', 'Metadata-Version: 2.1\nName: onedl-mmcv\nVersion: 2.3.6\n'
        )
        wheel.writestr(f'{info}/WHEEL', f'Wheel-Version: 1.0\nTag: {tag}-{tag}-linux_x86_64\n')
        wheel.writestr(f'{info}/RECORD', '')
    (page / 'index.html').write_text(f'<a href="{name}">{name}</a>')


@pytest.fixture
def index(tmp_path):
    """A folder that plays the index, and its address."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    handler.log_message = lambda *args: None
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield tmp_path, f'http://127.0.0.1:{server.server_port}'
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(('extension', 'loads'), [(WORKS, True), (BROKEN, False)])
def test_wheel_of_the_index_is_installed(index, tmp_path, extension, loads):
    folder, address = index
    publish(folder, 'cpu-torch2120', extension)
    target = tmp_path / 'site-packages'
    code, _ = bash(
        f'mmcv_wheel install cpu-torch2120 --target {target}', MMCV_WHEELS=address, no_proxy='*'
    )
    done = subprocess.run(
        [sys.executable, '-c', 'import mmcv._ext; print(mmcv.__file__)'],
        env={**os.environ, 'PYTHONPATH': str(target)},
        capture_output=True,
        text=True,
    )

    assert code == 0
    # `make env` compiles if it does not load.
    assert (done.returncode == 0) == loads
    assert not loads or done.stdout.strip() == str(target / 'mmcv' / '__init__.py')


@pytest.mark.parametrize('there', ['other Python', 'no server'])
def test_set_up_goes_on_without_a_wheel(index, there):
    folder, address = index
    publish(folder, 'cpu-torch2120', tag='cp39')
    if there == 'no server':
        address = 'http://127.0.0.1:1'
    code, printed = bash(
        f'mmcv_wheel download cpu-torch2120 --dest {folder}', MMCV_WHEELS=address, no_proxy='*'
    )

    assert (code == 0, printed) == (False, '')
    assert bash('torch_with_wheel', MMCV_WHEELS=address, no_proxy='*') == (0, '')


@pytest.mark.parametrize(
    ('folders', 'wanted'),
    [
        (['cu130-torch2120', 'cu128-torch280'], 'torch==2.12.0 torchvision==0.27.0'),
        (['cu128-torch280'], 'torch==2.8.0 torchvision==0.23.0'),
    ],
)
def test_newcomer_gets_the_newest_torch_that_has_a_wheel(index, folders, wanted):
    folder, address = index
    for name in folders:
        publish(folder, name)

    assert bash('torch_with_wheel', MMCV_WHEELS=address, no_proxy='*') == (0, wanted)


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
