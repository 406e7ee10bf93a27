# Copyright (c) mmscalablevit contributors. All rights reserved.
"""Checkpoints as hostile input: refused with the file and a reason, and never run or taken in part.

``fuzz`` is run in a process of its own, which a crash of PyTorch's reader would end.
"""

import contextlib
import io
import json
import os
import pickle
import random
import re
import resource
import runpy
import subprocess
import sys
import tarfile
import warnings
import zipfile
from collections import Counter, OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from jobs import draw_shapes
from mmengine.config import Config
from mmengine.logging import HistoryBuffer
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import CheckpointLoader
from safetensors.torch import save_file

from mmscalablevit import ScalableViT
from mmscalablevit.checkpoint.reading import (
    load_from_local,
    load_weights,
    read_checkpoint,
    use_safe_loader,
)
from mmscalablevit.checkpoint.released import load_backbone_checkpoint, read_weights
from mmscalablevit.errors import CheckpointError, one_line

ROOT = Path(__file__).parents[1]
SEGMENTOR = ROOT / 'tests' / 'data' / 'tiny_upernet.py'
ARCH = dict(
    embed_dims=(4, 4, 8, 8),
    num_heads=(1, 1, 2, 2),
    depths=(1, 2, 1, 1),
    c_ratios=(1, 1, 1, 1),
    sr_ratios=(4, 2, 2, 1),
    window_sizes=(3, 3, 3, 3),
    mlp_ratios=(1, 1, 1, 1),
    ssa_kv='separate',
)
LIM = 'stages.0.0.attn.lim_func.weight'
# A reader that believed a promise of terabytes would take more.
MEMORY_MIB = 300


def backbone(seed=0):
    torch.manual_seed(seed)
    model = ScalableViT(dict(ARCH))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    return model


def copied(state):
    return {name: tensor.clone() for name, tensor in state.items()}


def same(state, other):
    return all(torch.equal(tensor, other[name]) for name, tensor in state.items())


WEIGHTS = copied(backbone().state_dict())


def training_state():
    """What mmengine's runner writes, with all kinds of objects that are let through."""
    history = HistoryBuffer([0.5, 0.25], [1, 1])
    return dict(
        meta=dict(epoch=1, iter=4, dataset_meta=dict(classes=('circle', 'square'))),
        state_dict=OrderedDict(WEIGHTS),
        message_hub=dict(log_scalars=dict(loss=history), runtime_info=dict(best=np.float64(0.5))),
    )


def write(path, content, **kwargs):
    torch.save(content, path, **kwargs)
    return path.read_bytes()


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    """The bytes of a whole checkpoint."""
    return write(tmp_path_factory.mktemp('whole') / 'whole.pth', training_state())


@pytest.fixture
def model():
    """A model of other weights than the checkpoints."""
    return backbone(seed=1)


@pytest.fixture
def refuse(tmp_path, model):
    """Give a checkpoint to the backbone and return the reason for which it is refused."""
    before = copied(model.state_dict())

    def call(content, name='checkpoint.pth', **kwargs):
        path = tmp_path / name
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif content is not None:
            torch.save(content, path, **kwargs)
        with pytest.raises(CheckpointError) as error:
            load_backbone_checkpoint(model, str(path))
        assert same(model.state_dict(), before)
        beginning, reason = str(error.value).split(str(path), 1)
        assert beginning == 'checkpoint '
        assert reason.isprintable()
        assert len(reason) < 1500
        return reason

    return call


def rewritten(raw, change):
    """An archive with right checksums after ``change(records)`` of its records' bytes by name."""
    with zipfile.ZipFile(io.BytesIO(raw)) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    change(records)
    with zipfile.ZipFile(buffer := io.BytesIO(), 'w') as archive:
        for name, content in records.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def record_of(records, end):
    return next(name for name in records if name.endswith(end))


# Bytes and records


def test_the_whole_file_loads(whole, tmp_path, model):
    (tmp_path / 'whole.pth').write_bytes(whole)
    load_backbone_checkpoint(model, str(tmp_path / 'whole.pth'))
    assert same(model.state_dict(), WEIGHTS)


def test_every_truncation_is_refused(whole, refuse):
    offsets = [*range(0, len(whole), len(whole) // 150), *range(len(whole) - 60, len(whole))]
    for offset in offsets:
        assert 'is damaged' in refuse(whole[:offset])


def test_a_flipped_bit_in_any_record_is_refused_by_its_checksum(whole, refuse):
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        records = [record for record in archive.infolist() if record.file_size]
    assert sum('/data/' in record.filename for record in records) == len(WEIGHTS)
    for i, record in enumerate(records):
        raw = bytearray(whole)
        sizes = raw[record.header_offset + 26 : record.header_offset + 30]
        name, extra = (int.from_bytes(size, 'little') for size in (sizes[:2], sizes[2:]))
        offset = record.header_offset + 30 + name + extra + i % record.file_size
        raw[offset] ^= 1 << i % 8
        assert f'checksum of {record.filename} is wrong' in refuse(bytes(raw))


def test_torch_itself_takes_a_flipped_bit_for_a_weight(tmp_path):
    """The reason for comparing checksums; when torch does so, ours can go."""
    weights = dict(weight=torch.arange(1.0, 9.0))
    raw = write(tmp_path / 'a.pth', weights)
    (tmp_path / 'a.pth').write_bytes(raw.replace(weights['weight'].numpy().tobytes(), bytes(32)))
    assert torch.load(tmp_path / 'a.pth', weights_only=True)['weight'].eq(0).all()
    with pytest.raises(CheckpointError, match='checksum of a/data/0 is wrong'):
        read_checkpoint(str(tmp_path / 'a.pth'))


def test_a_file_without_checksums_is_refused(refuse, tmp_path):
    options = getattr(torch.serialization, 'set_crc32_options', None)
    if options is None:
        pytest.skip('this torch always writes checksums')
    options(False)
    try:
        assert 'checksum of' in refuse(WEIGHTS)
    finally:
        options(True)


RECORDS = {
    'removed': lambda r: r.pop(record_of(r, 'data/3')),
    'renamed': lambda r: r.update({'archive/other': r.pop(record_of(r, 'data/3'))}),
    'cut': lambda r: r.update({(n := record_of(r, 'data/3')): r[n][:-4]}),
    'emptied': lambda r: r.update({record_of(r, 'data/3'): b''}),
    'without pickle': lambda r: r.pop(record_of(r, 'data.pkl')),
    'unknown byte order': lambda r: r.update({record_of(r, 'byteorder'): b'middle'}),
}


@pytest.mark.parametrize('change', RECORDS.values(), ids=RECORDS)
def test_wrong_records_are_refused_in_spite_of_right_checksums(whole, refuse, change):
    assert 'is damaged or no checkpoint' in refuse(rewritten(whole, change))


def test_compressed_and_overlapping_archives_are_refused(whole, refuse):
    with zipfile.ZipFile(buffer := io.BytesIO(), 'w', zipfile.ZIP_DEFLATED) as archive:
        archive.writestr('archive/data.pkl', bytes(10**8))
    assert len(buffer.getvalue()) < 10**6
    assert 'compressed' in refuse(buffer.getvalue())

    with zipfile.ZipFile(buffer := io.BytesIO(), 'w') as archive:
        archive.writestr('archive/data.pkl', bytes(10**4))
        # Its central directory lists the same bytes a hundred times.
        archive.filelist *= 100
    assert 'overlap' in refuse(buffer.getvalue())


def test_records_marked_as_folders_are_refused(whole, refuse):
    """PyTorch would not read them, and show what was in memory as weights."""
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        name = record_of(archive.namelist(), 'data/3')
    raw = bytearray(whole)
    # Of the central directory's entry, whose name follows 46 bytes.
    raw[raw.rindex(name.encode()) - 46 + 38] |= 0x10
    assert 'records that are folders' in refuse(bytes(raw))


# What is no file


def test_what_is_no_file_is_named(refuse, tmp_path):
    os.mkfifo(tmp_path / 'fifo.pth')
    (tmp_path / 'folder.pth').mkdir()
    (tmp_path / 'device.pth').symlink_to('/dev/zero')
    for name in ('fifo.pth', 'folder.pth', 'device.pth'):
        assert 'is a directory or device, not a file' in refuse(None, name)

    (tmp_path / 'link.pth').symlink_to(tmp_path / 'nowhere')
    with pytest.raises(FileNotFoundError, match=r'link.pth does not exist'):
        read_checkpoint(str(tmp_path / 'link.pth'))


def test_a_file_that_may_not_be_read_is_named(whole, tmp_path, monkeypatch):
    path = tmp_path / 'secret.pth'
    path.write_bytes(whole)
    path.chmod(0)
    if os.access(path, os.R_OK):
        # A superuser may read everything.
        def forbid(name, *args, **kwargs):
            raise PermissionError(13, 'Permission denied', name)

        monkeypatch.setattr('mmscalablevit.checkpoint.reading.open', forbid, raising=False)
    with pytest.raises(CheckpointError, match=r'secret.pth cannot be read \(Permission denied\)'):
        read_checkpoint(str(path))


# Containers, names and kinds of tensors


def with_lim(value):
    return dict(WEIGHTS, **{LIM: value})


class Shadowed(OrderedDict):
    """Stands in while pickling for an OrderedDict with an attribute that hides a method."""

    def __reduce__(self):
        return OrderedDict, (), dict(items=5, get=5, keys=5), None, iter(dict.items(self))


with warnings.catch_warnings():
    warnings.simplefilter('ignore')
    ROWS = torch.eye(3).to_sparse_csr()
    QUANTIZED = torch.quantize_per_tensor(WEIGHTS[LIM], 0.1, 0, torch.qint8)
CONTENTS = {
    'list': ([WEIGHTS], 'holds a list and not a dict'),
    'tensor': (torch.ones(2), 'holds a Tensor and not a dict'),
    'text': ('weights', 'holds a str and not a dict'),
    'nothing': (None, 'holds a NoneType and not a dict'),
    'state_dict is a list': (dict(state_dict=[1]), r'no tensors \(state_dict\)'),
    'state_dict is empty': (dict(state_dict={}, meta={}), 'holds no weights'),
    'nested twice': (dict(state_dict=dict(state_dict=WEIGHTS)), r'no tensors \(state_dict\)'),
    'names are numbers': ({**WEIGHTS, 3: torch.ones(1)}, r'names are no strings \(3\)'),
    'names are tuples': ({('a', 'b'): torch.ones(1)}, 'names are no strings'),
    'values are lists': (with_lim([1.0]), rf'no tensors \({LIM}\)'),
    'values are numbers': (with_lim(1.0), rf'no tensors \({LIM}\)'),
    'values are missing': (with_lim(None), rf'no tensors \({LIM}\)'),
    'methods are hidden': (Shadowed(WEIGHTS), r'a dict with attributes \(items, get, keys\)'),
    'methods of the weights are hidden': (
        dict(model=Shadowed(WEIGHTS)),
        'holds a dict with attributes',
    ),
    'meta is a list': (dict(state_dict=WEIGHTS, meta=['x']), 'holds a list under meta'),
    'sparse': (with_lim(WEIGHTS[LIM].to_sparse()), f'{LIM} as a sparse tensor'),
    'sparse rows': (with_lim(ROWS), f'{LIM} as a sparse tensor'),
    'quantized': (
        with_lim(QUANTIZED),
        f'{LIM} as a quantized tensor',
    ),
    'meta': (with_lim(WEIGHTS[LIM].to('meta')), f'{LIM} as a meta tensor'),
    'two backbones': (
        {**{f'backbone.{k}': v for k, v in WEIGHTS.items()}, LIM: WEIGHTS[LIM]},
        rf"with the prefix 'backbone.' and without \({LIM}\)",
    ),
    'name without parts': (dict(WEIGHTS, stages=torch.ones(1)), r'1 unexpected \(stages\)'),
    'name with odd digits': (
        dict(WEIGHTS, **{'stages.².x': torch.ones(1)}),
        r'1 unexpected \(stages.².x\)',
    ),
    'long name': (dict(WEIGHTS, **{'w' * 10**6: torch.ones(1)}), r'1 unexpected \(w{96} ...\)'),
    'control codes': (
        dict(WEIGHTS, **{'a\n\x1b[2Jb': torch.ones(1)}),
        r'1 unexpected \(a \?\[2Jb\)',
    ),
    'stem of no channels': (
        dict(WEIGHTS, **{'patch_embeds.0.proj.weight': torch.ones(4, 0, 7, 7)}),
        'of another shape',
    ),
    'stem of one dimension': (
        dict(WEIGHTS, **{'patch_embeds.0.proj.weight': torch.ones(4)}),
        'of another shape',
    ),
    'stem of absurdly many channels': (
        dict(WEIGHTS, **{'patch_embeds.0.proj.weight': torch.ones(1).expand(4, 2**50, 7, 7)}),
        'of another shape',
    ),
    'infinite': (with_lim(WEIGHTS[LIM] / 0), f'NaN or infinite values in {LIM}'),
    'one NaN': (
        with_lim(torch.where(torch.arange(9).view(3, 3) == 4, torch.nan, WEIGHTS[LIM])),
        f'NaN or infinite values in {LIM}',
    ),
}


@pytest.mark.filterwarnings('ignore:TypedStorage')
@pytest.mark.parametrize(('content', 'reason'), CONTENTS.values(), ids=CONTENTS)
def test_what_holds_something_else_is_refused(tmp_path, refuse, content, reason):
    # Written at once, since None stands for a file that is there.
    torch.save(content, tmp_path / 'content.pth')
    said = refuse(None, 'content.pth')
    assert re.search(reason, said), said


@pytest.mark.parametrize(
    'dtype',
    [
        'float16',
        'bfloat16',
        'float64',
        'int8',
        'int64',
        'uint8',
        'bool',
        'complex64',
        'float8_e4m3fn',
        'uint16',
    ],
)
def test_other_types_are_refused_with_what_to_do(refuse, dtype):
    dtype = getattr(torch, dtype)
    said = refuse(with_lim(WEIGHTS[LIM].to(dtype)))
    assert said == (
        f' holds {LIM} as {dtype}, but the model has it as torch.float32; cast such weights to '
        'torch.float32 and save them again'
    )


def test_a_model_of_half_precision_takes_its_own(tmp_path):
    half = {name: tensor.half() for name, tensor in WEIGHTS.items()}
    torch.save(half, tmp_path / 'half.pth')
    model = backbone(seed=1).half()
    load_backbone_checkpoint(model, str(tmp_path / 'half.pth'))
    assert same(model.state_dict(), half)


def test_views_of_one_number_take_no_room(refuse, tmp_path):
    """A terabyte by its shape, in a file of a few kilobytes."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    huge = torch.full((1,), torch.nan).expand(2**20, 2**18)
    assert 'of another shape' in refuse(with_lim(huge))
    torch.save(dict(state_dict=dict(weight=huge)), tmp_path / 'huge.pth')
    model = torch.nn.Linear(2, 1)
    with pytest.raises(CheckpointError, match='NaN or infinite values in weight'):
        load_weights(model, str(tmp_path / 'huge.pth'), 'config.py')
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MEMORY_MIB * 1024


@pytest.mark.parametrize('numel', [2**20, 2**31, 2**40, 2**62])
@pytest.mark.parametrize('zipped', [True, False], ids=['zip', 'legacy'])
def test_a_promise_of_a_huge_tensor_takes_no_room(tmp_path, refuse, numel, zipped):
    # Of 1,234 numbers, which the pickle names as a storage of so many.
    raw = write(
        tmp_path / 'a.pth',
        dict(weight=torch.zeros(1234)),
        _use_new_zipfile_serialization=zipped,
    )
    long1 = pickle.LONG1 + bytes([9]) + numel.to_bytes(9, 'little')
    number = pickle.BININT2 + (1234).to_bytes(2, 'little')

    def promise(content):
        assert number in content
        return content.replace(number, long1)

    if zipped:
        raw = rewritten(raw, lambda r: r.update({(n := record_of(r, 'data.pkl')): promise(r[n])}))
    else:
        raw = promise(raw)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert 'is damaged or no checkpoint' in refuse(raw)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MEMORY_MIB * 1024


# Code


class Payload:
    """Writes a file where it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (Path(self.path),)


class Scripted(torch.nn.Module):
    def forward(self, x):
        return x


def write_tar(path, payload):
    """The format of torch before 0.1.12, whose parts are pickles of their own."""
    with tarfile.open(path, 'w') as archive:
        for name in ('storages', 'tensors', 'pickle'):
            content = pickle.dumps(payload)
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))


CODE = {
    'beside the weights': lambda path, p: torch.save(dict(state_dict=WEIGHTS, extra=p), path),
    'among the weights': lambda path, p: torch.save(with_lim(p), path),
    'as a name': lambda path, p: torch.save({p: WEIGHTS[LIM]}, path),
    'alone': lambda path, p: torch.save(p, path),
    'old format': lambda path, p: torch.save(
        dict(state_dict=WEIGHTS, extra=p), path, _use_new_zipfile_serialization=False
    ),
    'bare pickle': lambda path, p: path.write_bytes(pickle.dumps(p)),
    'bare pickle of protocol 2': lambda path, p: path.write_bytes(pickle.dumps(p, 2)),
    'tar archive': write_tar,
    'numpy file': lambda path, p: path.write_bytes(
        b'\x93NUMPY\x01\x00\x76\x00'
        + b"{'descr': '|O', 'fortran_order': False, 'shape': (), }".ljust(118)
        + pickle.dumps(p)
    ),
    'method of an allowed class': lambda path, p: torch.save(
        dict(state_dict=WEIGHTS, extra=np.array([p], dtype=object)), path
    ),
}


@pytest.mark.filterwarnings('ignore:Detected pickle protocol')
@pytest.mark.parametrize('save', CODE.values(), ids=CODE)
def test_code_is_not_run(tmp_path, refuse, save):
    touched = tmp_path / 'touched'
    save(tmp_path / 'code.pth', Payload(touched))
    refuse(None, 'code.pth')
    assert not touched.exists()


def test_the_payload_works(tmp_path):
    """Else the test above would show nothing."""
    pickle.loads(pickle.dumps(Payload(tmp_path / 'touched')))
    assert (tmp_path / 'touched').exists()


def test_compiled_programs_are_refused(tmp_path, refuse):
    torch.jit.script(Scripted()).save(tmp_path / 'script.pth')
    assert 'TorchScript' in refuse(None, 'script.pth')


@pytest.fixture
def safe_loader(monkeypatch):
    monkeypatch.setattr(CheckpointLoader, '_schemes', dict(CheckpointLoader._schemes))
    use_safe_loader()


def test_no_address_runs_code(tmp_path, monkeypatch, safe_loader):
    """Of mmengine's loaders, too, which unpickle without restriction where a safe read fails."""
    from mmengine.fileio import LocalBackend

    hub = tmp_path / 'hub'
    (hub / 'checkpoints').mkdir(parents=True)
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(hub))
    monkeypatch.setattr(
        'mmengine.runner.checkpoint.get_external_models',
        lambda: dict(swin='https://host/code.pth'),
    )
    monkeypatch.setattr('mmengine.runner.checkpoint.get_deprecated_model_names', lambda: {})
    touched = tmp_path / 'touched'
    torch.save(dict(state_dict={}, extra=Payload(touched)), hub / 'checkpoints' / 'code.pth')
    path = hub / 'checkpoints' / 'code.pth'

    class Backend(LocalBackend):
        def get(self, filepath):
            return path.read_bytes()

    monkeypatch.setattr(
        'mmengine.runner.checkpoint.get_file_backend', lambda *args, **kwargs: Backend()
    )
    for address in (
        str(path),
        'http://host/code.pth',
        'https://host/code.pth',
        'open-mmlab://swin',
        'openmmlab://swin',
        's3://bucket/code.pth',
    ):
        # From a buffer, mmengine's second try may find its end.
        reason = 'holds pickled Python code' + '|is damaged' * (address[:2] == 's3')
        with pytest.raises(CheckpointError, match=reason):
            CheckpointLoader.load_checkpoint(address, 'cpu')
        assert not touched.exists(), address
    assert 'TORCH_FORCE_WEIGHTS_ONLY_LOAD' not in os.environ


def test_safe_loader_stays_when_it_is_asked_for_twice(safe_loader):
    before = dict(CheckpointLoader._schemes)
    use_safe_loader()
    assert CheckpointLoader._schemes == before
    assert before[''] is load_from_local


# Every command line


@pytest.fixture(scope='module')
def room(tmp_path_factory):
    """Drawn shapes, an image, and a whole checkpoint of a segmentor."""
    pytest.importorskip('mmseg')
    folder = tmp_path_factory.mktemp('room')
    draw_shapes(folder / 'shapes', num_train=2, num_val=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('SHAPES_ROOT', str(folder / 'shapes'))
        cfg = Config.fromfile(SEGMENTOR)
        init_default_scope(cfg.default_scope)
        torch.manual_seed(0)
        state = MODELS.build(cfg.model).state_dict()
    classes = cfg.test_dataloader.dataset.metainfo.to_dict()
    torch.save(
        dict(
            meta=dict(epoch=0, iter=2, dataset_meta=classes),
            state_dict=state,
            message_hub=dict(log_scalars={}, runtime_info={}, resumed_keys={}),
        ),
        folder / 'whole.pth',
    )
    return folder


KEY = 'decode_head.conv_seg.weight'


def poisoned(state, **_):
    state[KEY].view(-1)[1] = torch.nan
    return dict(state_dict=state)


def halved(state, **_):
    state[KEY] = state[KEY].half()
    return dict(state_dict=state)


def flipped(raw):
    middle = bytearray(raw)
    middle[len(raw) // 2] ^= 16
    return bytes(middle)


BYTES = {
    'truncated': (lambda raw: raw[: len(raw) * 2 // 3], 'is damaged or no checkpoint'),
    'flipped': (flipped, 'checksum of whole/data/'),
    'empty': (lambda raw: b'', 'is damaged or no checkpoint'),
}
STATES = {
    'poisoned': (poisoned, 'NaN or infinite values in'),
    'halved': (halved, 'as torch.float16, but the model has it as torch.float32; cast'),
    'code': (
        lambda state, path: dict(state_dict=state, extra=Payload(path)),
        'holds pickled Python code',
    ),
    'other': (lambda state, **_: dict(state_dict=WEIGHTS), 'does not fit'),
    'listed': (lambda state, **_: dict(state_dict=[1]), 'no tensors (state_dict)'),
}


@pytest.fixture(scope='module')
def bad(room):
    """Bad checkpoints by kind, each with its reason."""
    raw = (room / 'whole.pth').read_bytes()
    reasons = {}
    for kind, (change, reason) in BYTES.items():
        (room / f'{kind}.pth').write_bytes(change(raw))
        reasons[kind] = reason
    for kind, (change, reason) in STATES.items():
        state = torch.load(room / 'whole.pth', weights_only=True)['state_dict']
        torch.save(change(state, path=room / 'touched'), room / f'{kind}.pth')
        reasons[kind] = reason
    return reasons


COMMANDS = {
    'test.py': lambda file: ['tools/test.py', SEGMENTOR, file, '--work-dir', 'out'],
    '--resume': lambda file: [
        'tools/train.py', SEGMENTOR, '--resume', file, '--work-dir', 'out',
    ],
    'load_from': lambda file: [
        'tools/train.py', SEGMENTOR, '--work-dir', 'out', '--cfg-options', f'load_from={file}',
    ],
    'image_demo.py': lambda file: [
        'demo/image_demo.py', 'shapes/images/validation', SEGMENTOR, file, '--out-dir', 'out',
    ],
    'export_onnx.py': lambda file: [
        'tools/deployment/export_onnx.py', SEGMENTOR, '--checkpoint', file, '--out', 'out.onnx',
    ],
    'publish_model.py': lambda file: [
        'tools/model_converters/publish_model.py', file, 'out/published.pth',
    ],
    'init_cfg': lambda file: [
        'tools/train.py', SEGMENTOR, '--work-dir', 'out', '--cfg-options',
        'model.backbone.init_cfg.type=Pretrained', f'model.backbone.init_cfg.checkpoint={file}',
    ],
    'visualize_backbone.py': lambda file: [
        'tools/analysis_tools/visualize_backbone.py', 'shapes/images/validation/000001.jpg',
        '--config', SEGMENTOR, '--checkpoint', file, '--out-dir', 'out',
    ],
    'scalablevit_to_mm.py': lambda file: [
        'tools/model_converters/scalablevit_to_mm.py', file, 'out/converted.pth',
    ],
    'mm_to_scalablevit.py': lambda file: [
        'tools/model_converters/mm_to_scalablevit.py', file, 'out/converted.pth',
    ],
}  # fmt: skip
# What these do not hold of a model: the head, or the arch's name.
KINDS = {key: [*BYTES, *STATES] for key in COMMANDS}
KINDS['publish_model.py'] = [*BYTES, 'poisoned', 'code', 'listed']
for name in ('init_cfg', 'visualize_backbone.py', 'scalablevit_to_mm.py', 'mm_to_scalablevit.py'):
    KINDS[name] = [*BYTES, 'code', 'other', 'listed']
# These build data sets and model each time.
FEW = {
    'test.py': ['truncated', 'poisoned', 'code', 'other'],
    '--resume': ['flipped', 'halved'],
    'load_from': ['code', 'poisoned'],
    'init_cfg': ['other'],
}


@pytest.mark.parametrize(
    ('command', 'kinds'),
    [
        *((command, FEW.get(command, kinds)) for command, kinds in KINDS.items()),
        *(pytest.param(command, KINDS[command], marks=pytest.mark.long) for command in FEW),
    ],
    ids=[*KINDS, *(f'{command}-all' for command in FEW)],
)
def test_every_command_line_refuses_in_one_sentence(room, bad, monkeypatch, command, kinds):
    monkeypatch.chdir(room)
    monkeypatch.setenv('SHAPES_ROOT', 'shapes')
    for kind in kinds:
        script, *options = COMMANDS[command](f'{kind}.pth')
        monkeypatch.setattr(sys, 'argv', [script, *map(str, options)])
        with pytest.raises(SystemExit) as exit_info:
            runpy.run_path(str(ROOT / script), run_name='__main__')
        said = exit_info.value.code
        assert isinstance(said, str), kind
        assert said.startswith(f'error: checkpoint {kind}.pth '), said
        assert said.isprintable()
        assert bad[kind] in said, said
    assert not (room / 'touched').exists()
    assert not list(room.glob('out/*.pth'))


def test_states_that_cannot_be_resumed_are_refused(room, monkeypatch):
    monkeypatch.chdir(room)
    monkeypatch.setenv('SHAPES_ROOT', 'shapes')
    whole = torch.load('whole.pth', weights_only=True)
    moments = dict(step=torch.tensor(2.0), exp_avg=torch.full((3,), torch.nan))
    states = {
        'bare': (dict(state_dict=whole['state_dict']), 'cannot be resumed from'),
        'no numbers': (dict(whole, meta=dict(epoch=0, iter='x', seed=[1])), 'cannot be resumed'),
        'foreign optimizer': (dict(whole, optimizer=dict(state={})), 'cannot be resumed from'),
        'diverged': (
            dict(whole, optimizer=dict(state={0: moments}, param_groups=[])),
            'NaN or infinite values in optimizer.state.0.exp_avg',
        ),
        'diverged below its average': (
            dict(whole, ema_state_dict=dict(weight=torch.full((3,), torch.inf))),
            'NaN or infinite values in ema_state_dict.weight',
        ),
    }
    for name, (content, reason) in states.items():
        torch.save(content, f'{name}.pth')
        script, *options = COMMANDS['--resume'](f'{name}.pth')
        monkeypatch.setattr(sys, 'argv', [script, *map(str, options)])
        with pytest.raises(SystemExit) as exit_info:
            runpy.run_path(str(ROOT / script), run_name='__main__')
        said = str(exit_info.value.code)
        assert said.startswith(f'error: checkpoint {name}.pth '), said
        assert reason in said, said


# Mutations


def place(rng, raw):
    """A random place, as often in the part of a file that is no weights as in all of it."""
    return rng.randrange(len(raw)) if rng.random() < 0.5 else -rng.randint(1, len(raw) // 3 or 1)


def span(rng, raw):
    start = place(rng, raw) % len(raw)
    return start, min(start + int(2 ** rng.uniform(0, 10)), len(raw))


def truncate(rng, raw):
    return raw[: rng.randrange(len(raw))]


def flip(rng, raw, times=1):
    raw = bytearray(raw)
    for _ in range(times):
        raw[place(rng, raw)] ^= 1 << rng.randrange(8)
    return bytes(raw)


def flip_many(rng, raw):
    return flip(rng, raw, rng.randrange(2, 40))


def zero(rng, raw):
    start, end = span(rng, raw)
    return raw[:start] + bytes(end - start) + raw[end:]


def overwrite(rng, raw):
    start, end = span(rng, raw)
    return raw[:start] + rng.randbytes(end - start) + raw[end:]


def duplicate(rng, raw):
    start, end = span(rng, raw)
    return raw[:end] + raw[start:end] + raw[end:]


def remove(rng, raw):
    start, end = span(rng, raw)
    return raw[:start] + raw[end:]


def swap(rng, raw):
    (a, b), (c, d) = sorted([span(rng, raw), span(rng, raw)])
    return raw[:a] + raw[max(c, b) : max(d, b)] + raw[b : max(c, b)] + raw[a:b] + raw[max(d, b) :]


def append(rng, raw):
    return raw + rng.randbytes(rng.randrange(1, 200))


DAMAGE = (truncate, flip, flip_many, zero, overwrite, duplicate, remove, swap, append)


def forge(rng, raw):
    """Change a record as somebody would who then writes right checksums."""

    def change(records):
        pickled = record_of(records, 'data.pkl')
        kind = rng.choice(['pickle'] * 6 + ['opcode'] * 6 + ['remove', 'rename', 'record', 'swap'])
        name = rng.choice(list(records))
        if kind == 'pickle':
            records[pickled] = rng.choice(DAMAGE)(rng, records[pickled])
        elif kind == 'opcode':
            content = bytearray(records[pickled])
            opcodes = b'.()tRQbdejlqruKMXhc}]N\x85\x86\x87\x88\x89\x8aG\x81'
            content[place(rng, content)] = rng.choice(opcodes)
            records[pickled] = bytes(content)
        elif kind == 'remove':
            del records[name]
        elif kind == 'rename':
            records[rng.choice(['x', name[:-1], name + '0', name.upper()])] = records.pop(name)
        elif kind == 'record' and records[name]:
            records[name] = rng.choice(DAMAGE)(rng, records[name])
        else:
            other = rng.choice(list(records))
            records[name], records[other] = records[other], records[name]

    return rewritten(raw, change)


def load_mutant(path, model, before):
    """Give a file to the backbone's and the command lines' loader, and say what became of it."""
    try:
        load_backbone_checkpoint(model, path)
    except CheckpointError as error:
        said = str(error)
        assert said.startswith(f'checkpoint {path} '), said
        assert len(said) > len(path) + 20, said
        assert said.isprintable(), said
        assert same(model.state_dict(), before), 'the model changed'
        outcome = 'refused'
    else:
        outcome = 'same' if same(model.state_dict(), WEIGHTS) else 'other'
        assert all(tensor.isfinite().all() for tensor in model.state_dict().values())
        model.load_state_dict(before)
    with contextlib.suppress(CheckpointError):
        load_weights(model, path, 'config.py')
    model.load_state_dict(before)
    return outcome


def fuzz(folder, what, seed, count):
    """Load mutated files and print a line for each before and after, then the peak of memory."""
    torch.set_num_threads(1)
    path = Path(folder) / f'{what}.{"safetensors" if what == "safetensors" else "pth"}'
    if what == 'safetensors':
        save_file(WEIGHTS, path)
    else:
        torch.save(training_state(), path, _use_new_zipfile_serialization=what != 'legacy')
    raw = path.read_bytes()
    model = backbone(seed=1)
    before = copied(model.state_dict())
    assert load_mutant(str(path), model, before) == 'same'
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    rng = random.Random(seed)
    for i in range(count):
        mutate = forge if what == 'forged' else DAMAGE[i % len(DAMAGE)]
        mutant = mutate(rng, raw)
        path.write_bytes(mutant)
        print(json.dumps([what, i, mutate.__name__]), flush=True)
        outcome = 'unchanged' if mutant == raw else load_mutant(str(path), model, before)
        print(json.dumps([what, i, mutate.__name__, outcome]), flush=True)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory) / 1024
    print(json.dumps([what, grown]), flush=True)


@pytest.fixture(
    scope='module',
    params=[
        (1, dict(damaged=720, forged=150, legacy=45, safetensors=45)),
        pytest.param(
            (2, dict(damaged=7200, forged=3000, legacy=1800, safetensors=1800)),
            marks=pytest.mark.long,
        ),
    ],
    ids=['960', '13800'],
)
def mutants(request, tmp_path_factory):
    """Load files that were changed at random, and count the outcomes.

    Returns, by the kind of file, how many there were, and how many of each mutation and outcome.
    """
    seed, counts = request.param
    folder = tmp_path_factory.mktemp('mutants')
    calls = [f't.fuzz({str(folder)!r}, {what!r}, {seed}, {n})' for what, n in counts.items()]
    process = subprocess.run(
        [sys.executable, '-W', 'ignore', '-c', f'import {__name__} as t; ' + '; '.join(calls)],
        cwd=folder,
        env=dict(os.environ, PYTHONPATH=f'{ROOT}:{ROOT / "tests"}', OMP_NUM_THREADS='1'),
        capture_output=True,
        text=True,
        timeout=3600,
    )
    lines = [json.loads(line) for line in process.stdout.splitlines() if line[:1] == '[']
    assert process.returncode == 0, (lines[-1:], process.stderr[-3000:])
    grown = dict(line for line in lines if len(line) == 2)
    assert max(grown.values()) < MEMORY_MIB
    # Nothing else was written.
    assert len(os.listdir(folder)) == len(counts)
    found = {}
    for what, count in counts.items():
        outcomes = Counter((line[2], line[3]) for line in lines if line[0] == what and line[3:])
        assert outcomes.total() == count
        found[what] = count, outcomes
    return found


def total(mutants, what):
    """Print and return how many of a kind of files had each outcome."""
    count, outcomes = mutants[what]
    found = Counter()
    for (_, outcome), number in outcomes.items():
        found[outcome] += number
    print(f'{what}: {count} mutated files, {dict(found)}')
    return found


def test_damaged_files_are_refused_or_harmless(mutants):
    """No mutation of bytes gives another value of any weight."""
    found = total(mutants, 'damaged')
    count, outcomes = mutants['damaged']
    assert found.keys() <= {'refused', 'same', 'unchanged'}
    # What carries no information is about a fifth: padding, dates, whatever follows the archive.
    assert found['refused'] > 0.7 * count
    assert outcomes['truncate', 'refused'] == count // len(DAMAGE)


def test_forged_files_are_refused_or_whole(mutants):
    """Right checksums on other records: what loads is finite and of the model's shapes."""
    assert total(mutants, 'forged')['refused'] > 0.3 * mutants['forged'][0]


@pytest.mark.parametrize('what', ['legacy', 'safetensors'])
def test_formats_without_checksums_are_refused_or_whole(mutants, what):
    """A changed number is not found in them; what breaks the structure is."""
    total(mutants, what)
    count, outcomes = mutants[what]
    assert outcomes['truncate', 'refused'] == count // len(DAMAGE)


def test_messages_show_no_control_codes():
    assert one_line('a\x1b[31m\n b\u202e', 50) == 'a?[31m b?'
    assert len(one_line('x' * 10**7, 50)) == 50


def test_weights_lose_attributes_that_hide_methods(tmp_path):
    weight = torch.ones(2)
    weight.isfinite = weight.to = 'hidden'
    torch.save(dict(weight=weight), tmp_path / 'a.pth')
    assert torch.load(tmp_path / 'a.pth', weights_only=True)['weight'].isfinite == 'hidden'
    assert read_weights(str(tmp_path / 'a.pth'))['weight'].isfinite().all()
