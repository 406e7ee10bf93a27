# Copyright (c) mmscalablevit contributors. All rights reserved.
"""Released weights by name, from a local server that plays Google Drive behind a proxy."""

import hashlib
import http.server
import io
import shutil
import ssl
import subprocess
import sys
import threading
from pathlib import Path
from urllib.parse import parse_qs, urlparse

import pytest
import torch
from golden import read_json, reference_state
from jobs import ROOT, draw_shapes, job_environment, run, run_tool
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import CheckpointLoader
from PIL import Image

from mmscalablevit import ScalableViT
from mmscalablevit.checkpoint import weights
from mmscalablevit.checkpoint.weights import RELEASED, fetch_released
from mmscalablevit.errors import CheckpointError

pytest.importorskip('gdown')
pytestmark = pytest.mark.skipif(not shutil.which('openssl'), reason='needs openssl')

HOSTS = ('drive.google.com', 'docs.google.com', 'drive.usercontent.google.com')
PAGES = {
    'quota': b"""<html><body><p class="uc-error-caption">Quota exceeded</p>
<p class="uc-error-subcaption">Too many users have viewed or downloaded this file recently.</p>
</body></html>""",
    'wrong content': b'<html>not weights</html>',
}


class Drive(http.server.BaseHTTPRequestHandler):
    """A proxy that answers for Drive's hosts itself; ``server.behavior`` says how."""

    def log_message(self, *args):
        pass

    def do_CONNECT(self):
        assert self.path.split(':')[0] in HOSTS, self.path
        self.send_response(200)
        self.end_headers()
        self.connection = self.server.tls.wrap_socket(self.connection, server_side=True)
        self.rfile, self.wfile = self.connection.makefile('rb'), self.connection.makefile('wb')
        self.handle_one_request()
        self.wfile.flush()
        self.close_connection = True

    def do_GET(self):
        self.server.requests.append(self.path)
        file = parse_qs(urlparse(self.path).query)['id'][0]
        behavior = self.server.behavior
        content = PAGES.get(behavior, self.server.files[file])
        if behavior == 'error':
            self.send_error(503)
            return
        self.send_response(200)
        missing = 1000 if behavior == 'interrupted' else 0
        self.send_header('Content-Length', str(len(content) + missing))
        if behavior == 'quota':
            self.send_header('Content-Type', 'text/html')
        else:
            self.send_header('Content-Type', 'application/octet-stream')
            self.send_header('Content-Disposition', 'attachment; filename="best.pth"')
        self.end_headers()
        self.wfile.write(content)


@pytest.fixture(scope='module')
def certificate(tmp_path_factory):
    """A certificate of Drive's hosts, which this test alone trusts."""
    folder = tmp_path_factory.mktemp('certificate')
    names = ','.join(f'DNS:{host}' for host in HOSTS)
    command = 'openssl req -x509 -newkey rsa:2048 -nodes -days 2 -keyout key.pem -out cert.pem'
    command = [*command.split(), '-subj', '/CN=drive', '-addext', f'subjectAltName={names}']
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    return folder


@pytest.fixture(scope='module')
def released():
    """The bytes of a classifier in the released layout, of every size."""
    files = {}
    for size in ('small', 'base', 'large'):
        state = wanted_state() if size == 'small' else {}
        torch.save(dict(model=state), buffer := io.BytesIO())
        files[RELEASED[size].weights] = buffer.getvalue()
    return files


@pytest.fixture
def drive(tmp_path, monkeypatch, certificate, released):
    """Drive at a local port, and an empty cache."""
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'hub'))
    monkeypatch.setattr(torch.hub, '_hub_dir', None)
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), Drive) as server:
        server.tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        server.tls.load_cert_chain(certificate / 'cert.pem', certificate / 'key.pem')
        server.behavior, server.requests, server.files = 'plain', [], dict(released)
        for name in ('https_proxy', 'HTTPS_PROXY'):
            monkeypatch.setenv(name, f'http://127.0.0.1:{server.server_port}')
        for name in ('no_proxy', 'NO_PROXY', 'all_proxy', 'ALL_PROXY', 'CURL_CA_BUNDLE'):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv('REQUESTS_CA_BUNDLE', str(certificate / 'cert.pem'))
        monkeypatch.setattr(weights, '_RETRIES', 0)
        server.cache = tmp_path / 'hub' / 'hub' / 'checkpoints'
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def wanted_state():
    return reference_state(read_json('state_dict_keys_small.json'))


def cached_files(drive):
    return {path.name for path in drive.cache.iterdir() if path.suffix != '.lock'}


def test_released_weights_are_downloaded_once(drive, released):
    path = Path(fetch_released('scalablevit://small'))
    assert path == drive.cache / 'scalablevit-small_in1k.pth'
    assert path.read_bytes() == released[RELEASED['small'].weights]
    assert fetch_released('scalablevit://small') == str(path)
    assert len(drive.requests) == 1
    assert cached_files(drive) == {path.name}


REFUSALS = {
    'quota': 'Too many users have viewed',
    'interrupted': 'is incomplete',
    'wrong content': 'is damaged or no checkpoint',
    'error': 'Cannot retrieve the public link',
}


@pytest.mark.parametrize('behavior', REFUSALS)
def test_a_failed_download_says_what_to_do_by_hand(drive, released, behavior):
    drive.behavior = behavior
    with pytest.raises(CheckpointError) as error:
        fetch_released('scalablevit://small')
    said = str(error.value)
    assert REFUSALS[behavior] in said
    path = drive.cache / 'scalablevit-small_in1k.pth'
    assert said.endswith(
        f'; open https://drive.google.com/file/d/{RELEASED["small"].weights}/view in a browser '
        f'and save the file as {path}'
    )
    assert said.isprintable()
    assert cached_files(drive) == set()
    path.write_bytes(released[RELEASED['small'].weights])
    assert fetch_released('scalablevit://small') == str(path)


def test_no_network_and_no_gdown_say_what_to_do_by_hand(drive, monkeypatch):
    drive.shutdown()
    drive.server_close()
    by_hand = r'cannot be downloaded .*; open https.* save the file as'
    with pytest.raises(CheckpointError, match=by_hand):
        fetch_released('scalablevit://base')
    monkeypatch.setitem(sys.modules, 'gdown', None)
    with pytest.raises(CheckpointError, match=r'pip install gdown\), or open https'):
        fetch_released('scalablevit://base')


def test_the_hash_can_be_pinned(drive, released):
    digest = hashlib.sha256(released[RELEASED['small'].weights]).hexdigest()
    for pinned in (digest, digest[:8], digest.upper()):
        fetch_released(f'scalablevit://small?sha256={pinned}')
    with pytest.raises(CheckpointError, match=f'SHA-256 of .* is {digest}; remove the file'):
        fetch_released('scalablevit://small?sha256=0123456789abcdef')


@pytest.mark.parametrize('end', ['', 'tiny', 'small?md5=1', 'small?sha256=xyz', 'small/x'])
def test_other_addresses_are_refused(end):
    with pytest.raises(CheckpointError, match='released weights are scalablevit://small, scalab'):
        fetch_released(f'scalablevit://{end}')


def test_the_backbone_starts_from_them(drive):
    model = ScalableViT(init_cfg=dict(type='Pretrained', checkpoint='scalablevit://small'))
    model.init_weights()
    wanted = wanted_state()
    for name, tensor in model.state_dict().items():
        assert name.startswith('norm_list.') or torch.equal(tensor, wanted[name])


def test_mmengines_loader_gives_an_mmpretrain_classifier(drive):
    content = CheckpointLoader.load_checkpoint('scalablevit://small', 'cpu')
    wanted = wanted_state()
    assert content['meta'] == dict(arch='small')
    assert len(content['state_dict']) == len(wanted)
    for name, tensor in content['state_dict'].items():
        released_name = name.removeprefix('backbone.').replace('head.fc.', 'head.')
        assert torch.equal(tensor, wanted[released_name])


def test_the_train_py_of_a_toolbox_starts_from_them(drive, tmp_path):
    """In two processes, one of which downloads."""
    train = Path(pytest.importorskip('mmseg').__path__[0]) / '.mim' / 'tools' / 'train.py'
    draw_shapes(tmp_path / 'shapes', num_train=2, num_val=1)
    path = tmp_path / 'my.py'
    path.write_text(
        f"_base_ = '{ROOT}/tests/data/tiny_upernet.py'\n"
        "custom_imports = dict(imports=['mmscalablevit', 'rank_hooks'])\n"
        "init_cfg = dict(_delete_=True, type='Pretrained', checkpoint='scalablevit://small')\n"
        'model = dict(backbone=dict(init_cfg=init_cfg))\n'
    )
    arch = Config.fromfile(path).model.backbone.arch
    classifier = ScalableViT(arch.to_dict(), stage_norm=None, final_norm=True)
    head = {'head.weight': torch.ones(2, 32), 'head.bias': torch.ones(2)}
    torch.save(dict(model={**classifier.state_dict(), **head}), buffer := io.BytesIO())
    drive.files[RELEASED['small'].weights] = buffer.getvalue()
    launch = ['-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2']
    command = [sys.executable, *launch, train, path, '--work-dir', tmp_path / 'out']
    output = run([*command, '--launcher=pytorch'], tmp_path, job_environment(tmp_path))
    assert output.count('gloo has 0 threads at the end') == 2
    assert len(drive.requests) == 1
    loaded = 'Loaded scalablevit://small into ScalableViT; left out: norm, head; norm_list is'
    (log,) = (tmp_path / 'out').glob('*/*.log')
    assert loaded in log.read_text()
    assert hashlib.sha256(buffer.getvalue()).hexdigest() in log.read_text()


def test_one_command_gives_the_top_1_of_a_size(drive, released, tmp_path):
    """On a folder in ImageNet's layout, three of whose four labels are what the file predicts."""
    pytest.importorskip('mmpretrain')
    config = ROOT / 'configs' / 'classification' / 'scalablevit-s_8xb128_in1k.py'
    init_default_scope('mmpretrain')
    model = MODELS.build(Config.fromfile(config).model).eval()
    state = torch.load(io.BytesIO(released[RELEASED['small'].weights]))['model']
    names = (f'backbone.{k}'.replace('backbone.head.', 'head.fc.') for k in state)
    model.load_state_dict(dict(zip(names, state.values(), strict=True)))
    (tmp_path / 'data/val').mkdir(parents=True)
    (tmp_path / 'data/meta').mkdir()
    lines = []
    for i in range(4):
        # Of the size that the pipeline crops, and one color, so that resizing changes nothing.
        color = (60 * i, 200 - 50 * i, 90)
        Image.new('RGB', (256, 256), color).save(tmp_path / f'data/val/{i}.png')
        image = torch.tensor(color).float()[:, None, None].expand(3, 224, 224)
        batch = model.data_preprocessor(dict(inputs=[image.flip(0)], data_samples=None), False)
        label = model(batch['inputs']).argmax().item()
        lines.append(f'{i}.png {(label + (i == 0)) % 1000}')
    (tmp_path / 'data/meta/val.txt').write_text('\n'.join(lines))
    options = [
        f'dataset.data_root={tmp_path}/data',
        *('dataset.ann_file=meta/val.txt', 'num_workers=0', 'persistent_workers=False'),
    ]
    command = [ROOT / 'tools/test.py', config, 'scalablevit://small', '--cfg-options']
    command += [f'test_dataloader.{option}' for option in options]
    assert 'accuracy/top1: 75.0' in run_tool(command, tmp_path)
    said = run_tool([*command, 'model.backbone.arch=small-merged'], tmp_path, expect=1)
    last = said.splitlines()[-1]
    assert "holds arch='small', use --cfg-options model.backbone.arch=small" in last
    assert len(drive.requests) == 1


def test_the_tool_downloads_and_lists(drive, released, call):
    tool = 'tools/model_converters/get_weights.py'
    code, said = call(tool, 'small')
    assert code == 0
    digest = hashlib.sha256(released[RELEASED['small'].weights]).hexdigest()
    assert str(drive.cache / 'scalablevit-small_in1k.pth') in said
    assert digest in said
    assert "arch 'small'" in said
    code, said = call(tool, '--list')
    assert code == 0
    assert all(part in said for entry in RELEASED.values() for part in (entry.link, entry.log))
