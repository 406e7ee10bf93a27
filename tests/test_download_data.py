# Copyright (c) mmscalablevit contributors. All rights reserved.
"""The download of public data from a server on this machine, which breaks off and lies."""

import hashlib
import io
import sys
import threading
import time
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from jobs import ROOT, load_tool, start_tool, write_image, write_map
from PIL import Image

from mmscalablevit.errors import UserError

TOOL = ROOT / 'tools' / 'dataset_converters' / 'download_data.py'


@pytest.fixture
def tool(monkeypatch):
    monkeypatch.syspath_prepend(str(TOOL.parent))
    module = load_tool(TOOL)
    monkeypatch.setattr(module, 'WAIT', 0)
    return module


@pytest.fixture
def main(tool, monkeypatch):
    """The tool's command line, where a data set is these archives; the exit code."""

    def main(name, archives, folder):
        monkeypatch.setitem(tool.ARCHIVES, name, archives)
        monkeypatch.setattr(sys, 'argv', ['download_data.py', name, '--dir', str(folder)])
        try:
            tool.main()
        except SystemExit as ended:
            return ended.code

    return main


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


def published(server, name, content):
    """The archive of a data set, served from here."""
    server.files[name] = content
    return {server.address(name): (len(content), hashlib.sha256(content).hexdigest())}


def files_of(folder, prefix):
    """What an archive of a folder holds."""
    files = [path for path in folder.rglob('*') if path.is_file()]
    return {f'{prefix}/{path.relative_to(folder)}': path.read_bytes() for path in files}


def test_download_unpack_and_check(tool, main, server, tmp_path, monkeypatch, capfd):
    drawn = tmp_path / 'drawn'
    for name in ('training/1', 'training/2', 'validation/1', 'validation/2'):
        write_image(drawn / f'images/{name}.jpg')
        write_map(drawn / f'annotations/{name}.png', np.resize(np.uint8([0, 1, 150]), (30, 40)))
    files = files_of(drawn, 'ADEChallengeData2016')
    archives = published(server, 'ADEChallengeData2016.zip', archive(files))
    monkeypatch.setenv('PYTHONPATH', str(ROOT))
    code = main('ade20k', archives, tmp_path / 'ade')

    said = capfd.readouterr().out
    assert code == 0, said
    for split, count in (('train', 20210), ('val', 2000)):
        wanted = f'the official set has {count} images: 2 images with masks, 150 classes'
        assert f'warning: {wanted}' in said.split(f'{split}_dataloader', 1)[1]
    assert all((tmp_path / 'ade' / name).read_bytes() == x for name, x in files.items())
    assert not list((tmp_path / 'ade').glob('ADE*.zip*'))
    # A second call downloads nothing.
    monkeypatch.setattr(tool.subprocess, 'call', lambda command: 0)
    assert main('ade20k', archives, tmp_path / 'ade') == 0
    assert len(server.sent) == 1


def test_killed_half_way_and_continued(tool, main, server, tmp_path, monkeypatch):
    content = archive({'images/a.bin': random_bytes(2**23)})
    archives = published(server, 'train.zip', content)
    server.pause = 0.02
    code = f'import download_data as tool; tool.ARCHIVES["coco"] = {archives}; tool.main()'
    start = f'import sys; sys.argv[1:] = ["coco"]; sys.path.insert(0, {str(TOOL.parent)!r}); '
    child = start_tool(['-c', start + code], tmp_path, tmp_path / 'log')
    part = tmp_path / 'data' / 'coco' / 'train.zip.part'
    while not (part.exists() and part.stat().st_size > 2**20):
        assert child.is_alive(), (tmp_path / 'log').read_text()
        time.sleep(0.01)
    child.kill()
    child.join()
    there = part.stat().st_size
    assert there < len(content)

    server.pause = 0
    monkeypatch.setattr(tool.subprocess, 'call', lambda command: 0)
    assert main('coco', archives, part.parent) == 0
    assert server.sent[-1] == (206, there, len(content) - there)
    assert (part.parent / 'images/a.bin').read_bytes() == random_bytes(2**23)


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

    # A server that sends no parts.
    server.break_after, server.ranges = None, False
    (tmp_path / 'z.zip.part').write_bytes(b'something else')
    tool.download(server.address('x.zip'), tmp_path / 'z.zip', len(content))
    assert (tmp_path / 'z.zip').read_bytes() == content


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


def test_damaged_archive(tool, tmp_path):
    whole = archive({'a.bin': random_bytes(5000)})
    changed = bytearray(whole)
    changed[1000] ^= 1
    for content in (whole[:3000], changed):
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


def test_small_sets_are_laid_out_for_train_all(tool, main, server, tmp_path):
    drawn, layouts = tmp_path / 'drawn', tool.small_data
    photograph, (first, second) = np.full((4, 6, 3), 99, np.uint8), np.eye(2, 24, dtype=np.uint8)
    for path in ('ImageSets/Main/val.txt', 'JPEGImages/a', 'Annotations/a'):
        (drawn / 'bccd/BCCD' / path).parent.mkdir(parents=True)
        (drawn / 'bccd/BCCD' / path).write_bytes(b'a')
    for split in ('train', 'val', 'test'):
        write_map(drawn / f'camvid/CamVid/{split}/a.png', photograph)
        write_map(drawn / f'camvid/CamVid/{split}annot/a.png', photograph[..., 0])
    names = (layouts.NUCLEI_VAL.split()[0], layouts.NUCLEI_TEST.split()[0], 'another')
    for folder in (drawn / 'nuclei/stage1_train' / name for name in names):
        write_map(folder / f'images/{folder.name}.png', photograph)
        for i, mask in enumerate((first, second)):
            write_map(folder / f'masks/{i}.png', 255 * mask.reshape(4, 6))
    for name in ('bccd', 'camvid', 'nuclei'):
        server.files[name] = archive(files_of(drawn / name, 'main'))
        main(name, {server.address(name): (0, '')}, tmp_path / name)

    assert (tmp_path / 'bccd/ImageSets/Main/val.txt').read_bytes() == b'a'
    assert Image.open(tmp_path / 'camvid/val/a.jpg').size == (6, 4)
    assert not (tmp_path / 'camvid/test').exists()
    for split, name in (('val', names[0]), ('train', names[2])):
        labels = np.array(Image.open(tmp_path / f'nuclei/instances/{split}/{name}.png'))
        np.testing.assert_array_equal(labels, (first + 2 * second).reshape(4, 6))
        assert (tmp_path / f'nuclei/images/{split}/{name}.png').is_file()
    assert not list(tmp_path.glob(f'nuclei/*/*/{names[1]}*'))
    assert not list(tmp_path.glob('*/archive'))
