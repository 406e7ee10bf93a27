# Copyright (c) mmscalablevit contributors. All rights reserved.
"""The download of public data from a server on this machine, which breaks off and lies."""

import hashlib
import io
import json
import os
import subprocess
import sys
import threading
import time
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from jobs import ROOT, load_tool, write_image, write_map
from PIL import Image

from mmscalablevit.errors import UserError

TOOL = ROOT / 'tools' / 'dataset_converters' / 'download_data.py'
CHILD = f"""
import json, sys
sys.path.insert(0, {str(TOOL.parent)!r})
import download_data
download_data.ARCHIVES.update(json.loads(sys.argv.pop(1)))
download_data.main()
"""


@pytest.fixture
def tool(monkeypatch):
    monkeypatch.syspath_prepend(str(TOOL.parent))
    module = load_tool('tools/dataset_converters/download_data.py')
    monkeypatch.setattr(module, 'WAIT', 0)
    return module


class Server(ThreadingHTTPServer):
    """Serves ``files``; ``sent`` are the answers: status, first byte and number of bytes."""

    def __init__(self):
        super().__init__(('127.0.0.1', 0), Handler)
        self.files, self.sent = {}, []
        self.break_after, self.ranges, self.pause = None, True, 0

    def address(self, name):
        return f'http://127.0.0.1:{self.server_port}/{name}'


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        server = self.server
        content = server.files.get(self.path[1:])
        if content is None:
            return self.send_error(404)
        start = 0
        if server.ranges and (asked := self.headers.get('Range')):
            start = int(asked.removeprefix('bytes=').removesuffix('-'))
        self.send_response(206 if start else 200)
        self.send_header('Content-Length', str(len(content) - start))
        self.end_headers()
        end = len(content)
        if server.break_after:
            end = min(end, start + server.break_after)
        server.sent.append((206 if start else 200, start, end - start))
        for i in range(start, end, 2**16):
            self.wfile.write(content[i : min(i + 2**16, end)])
            time.sleep(server.pause)
        self.close_connection = True
        return None

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    server = Server()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def archive(files):
    content = io.BytesIO()
    with zipfile.ZipFile(content, 'w') as file:
        for name, data in files.items():
            file.writestr(name, data)
    return content.getvalue()


def random_bytes(size):
    return np.random.default_rng(0).bytes(size)


def published(server, **contents):
    """The archives of the tool, served from here."""
    archives = {}
    for name, content in contents.items():
        server.files[f'{name}.zip'] = content
        digest = hashlib.sha256(content).hexdigest()
        archives[server.address(f'{name}.zip')] = (len(content), digest)
    return archives


def label_maps(tmp_path):
    """ADE20K's layout of two images a split."""
    for split in ('training', 'validation'):
        for i in (1, 2):
            write_image(tmp_path / f'images/{split}/{i}.jpg')
            labels = np.resize(np.uint8([0, 1, 150]), (30, 40))
            write_map(tmp_path / f'annotations/{split}/{i}.png', labels)
    files = [path for path in tmp_path.rglob('*') if path.is_file()]
    return {f'ADEChallengeData2016/{x.relative_to(tmp_path)}': x.read_bytes() for x in files}


def test_download_unpack_and_check(tool, server, tmp_path, monkeypatch, capfd):
    files = label_maps(tmp_path / 'drawn')
    archives = published(server, ADEChallengeData2016=archive(files))
    monkeypatch.setitem(tool.ARCHIVES, 'ade20k', archives)
    monkeypatch.setattr(sys, 'argv', ['download_data.py', 'ade20k', '--dir', str(tmp_path / 'ade')])
    monkeypatch.setenv('PYTHONPATH', str(ROOT))
    with pytest.raises(SystemExit) as ended:
        tool.main()

    said = capfd.readouterr().out
    assert ended.value.code == 0, said
    assert '2 images with masks, 150 classes' in said
    assert all((tmp_path / 'ade' / name).read_bytes() == x for name, x in files.items())
    assert not list((tmp_path / 'ade').glob('ADE*.zip*'))
    # A second call downloads nothing.
    monkeypatch.setattr(tool.subprocess, 'call', lambda command: 0)
    with pytest.raises(SystemExit):
        tool.main()
    assert len(server.sent) == 1


def test_killed_half_way_and_continued(tool, server, tmp_path, monkeypatch):
    content = archive({'images/a.bin': random_bytes(2**23)})
    archives = published(server, train=content)
    server.pause = 0.02
    arguments = ['download_data.py', 'coco', '--dir', str(tmp_path)]
    child = subprocess.Popen(
        [sys.executable, '-c', CHILD, json.dumps(dict(coco=archives)), *arguments[1:]],
        env={**os.environ, 'PYTHONPATH': str(ROOT)},
        stderr=subprocess.PIPE,
    )
    part = tmp_path / 'train.zip.part'
    while not (part.exists() and part.stat().st_size > 2**20):
        assert child.poll() is None, child.stderr.read().decode()
        time.sleep(0.01)
    child.kill()
    child.communicate()
    there = part.stat().st_size
    assert there < len(content)

    server.pause = 0
    monkeypatch.setitem(tool.ARCHIVES, 'coco', archives)
    monkeypatch.setattr(tool.subprocess, 'call', lambda command: 0)
    monkeypatch.setattr(sys, 'argv', arguments)
    with pytest.raises(SystemExit):
        tool.main()
    assert server.sent[-1] == (206, there, len(content) - there)
    assert (tmp_path / 'images/a.bin').read_bytes() == random_bytes(2**23)


def test_broken_connections_are_tried_again(tool, server, tmp_path):
    content = random_bytes(2**21)
    server.files['x.zip'] = content
    server.break_after = 2**20
    tool.download(server.address('x.zip'), tmp_path / 'x.zip', len(content))

    assert (tmp_path / 'x.zip').read_bytes() == content
    assert [start for _, start, _ in server.sent] == [0, 2**20]

    server.break_after = 2**16
    with pytest.raises(UserError, match='the same command continues it'):
        tool.download(server.address('x.zip'), tmp_path / 'y.zip', len(content))
    assert (tmp_path / 'y.zip.part').stat().st_size == tool.TRIES * 2**16


def test_server_without_ranges(tool, server, tmp_path):
    content = random_bytes(2**20)
    server.files['x.zip'], server.ranges = content, False
    (tmp_path / 'x.zip.part').write_bytes(b'something else')
    tool.download(server.address('x.zip'), tmp_path / 'x.zip', len(content))

    assert (tmp_path / 'x.zip').read_bytes() == content


def test_wrong_content(tool, server, tmp_path):
    server.files['x.zip'] = b'another file'
    with pytest.raises(UserError, match='has 12 bytes and not the published 99'):
        tool.download(server.address('x.zip'), tmp_path / 'x.zip', 99)
    with pytest.raises(UserError, match='404'):
        tool.download(server.address('none.zip'), tmp_path / 'x.zip', 99)
    tool.download(server.address('x.zip'), tmp_path / 'x.zip', 12)
    with pytest.raises(UserError, match='is damaged: its checksum is'):
        tool.verify(tmp_path / 'x.zip', hashlib.sha1(b'the file').hexdigest())
    assert not (tmp_path / 'x.zip').exists()


@pytest.mark.parametrize('damage', ['cut', 'byte'])
def test_damaged_archive(damage, tool, tmp_path):
    content = bytearray(archive({'a.bin': random_bytes(5000)}))
    if damage == 'cut':
        content = content[:3000]
    else:
        content[1000] ^= 1
    (tmp_path / 'x.zip').write_bytes(content)
    with pytest.raises(UserError, match='is damaged'):
        tool.unpack(tmp_path / 'x.zip', tmp_path / 'out')
    assert not (tmp_path / 'x.zip').exists()


def test_an_interrupted_unpacking_is_completed(tool, tmp_path):
    files = {f'{x}.bin': random_bytes(5000) for x in 'abc'}
    (tmp_path / 'x.zip').write_bytes(archive(files))
    (tmp_path / 'a.bin').write_bytes(files['a.bin'])
    (tmp_path / 'b.bin').write_bytes(files['b.bin'][:100])
    written = (tmp_path / 'a.bin').stat().st_mtime_ns
    tool.unpack(tmp_path / 'x.zip', tmp_path)

    assert all((tmp_path / name).read_bytes() == data for name, data in files.items())
    assert (tmp_path / 'a.bin').stat().st_mtime_ns == written


def test_a_disk_that_is_too_small_is_refused(tool, server, tmp_path, monkeypatch):
    server.files['x.zip'] = random_bytes(1000)
    usage = type('Usage', (), dict(free=1500))
    monkeypatch.setattr(tool.shutil, 'disk_usage', lambda folder: usage)
    with pytest.raises(UserError, match='GB free'):
        tool.download(server.address('x.zip'), tmp_path / 'x.zip', 1000)


def png(pixels):
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, 'PNG')
    return content.getvalue()


def test_small_sets_are_laid_out_for_train_all(tool, server, tmp_path, monkeypatch):
    layouts = tool.small_data
    photograph, (first, second) = np.full((4, 6, 3), 99, np.uint8), np.eye(2, 24, dtype=np.uint8)
    files = dict(camvid={}, nuclei={}, bccd={'BCCD/ImageSets/Main/val.txt': b'a'})
    for folder in ('JPEGImages', 'Annotations'):
        files['bccd'][f'BCCD/{folder}/a'] = b'x'
    for split in ('train', 'val', 'test'):
        files['camvid'][f'CamVid/{split}/a.png'] = png(photograph)
        files['camvid'][f'CamVid/{split}annot/a.png'] = png(photograph[..., 0])
    names = (layouts.NUCLEI_VAL.split()[0], layouts.NUCLEI_TEST.split()[0], 'another')
    for name in names:
        files['nuclei'][f'stage1_train/{name}/images/{name}.png'] = png(photograph)
        for i, mask in enumerate((first, second)):
            mask = png(255 * mask.reshape(4, 6))
            files['nuclei'][f'stage1_train/{name}/masks/{i}.png'] = mask
    for name, content in files.items():
        server.files[name] = archive({f'main/{path}': data for path, data in content.items()})
        monkeypatch.setitem(tool.ARCHIVES, name, {server.address(name): (0, '')})
        monkeypatch.setattr(sys, 'argv', ['download_data.py', name, '--dir', str(tmp_path / name)])
        tool.main()

    assert (tmp_path / 'bccd/ImageSets/Main/val.txt').read_bytes() == b'a'
    assert Image.open(tmp_path / 'camvid/val/a.jpg').size == (6, 4)
    assert not (tmp_path / 'camvid/test').exists()
    for split, name in (('val', names[0]), ('train', names[2])):
        labels = np.array(Image.open(tmp_path / f'nuclei/instances/{split}/{name}.png'))
        np.testing.assert_array_equal(labels, (first + 2 * second).reshape(4, 6))
        assert (tmp_path / f'nuclei/images/{split}/{name}.png').is_file()
    assert not list(tmp_path.glob(f'nuclei/*/*/{names[1]}*'))
    assert not list(tmp_path.glob('*/archive'))
