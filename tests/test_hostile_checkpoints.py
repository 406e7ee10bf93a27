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
from jobs import draw_shapes, packaged
from mmengine.config import Config
from mmengine.logging import HistoryBuffer
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import CheckpointLoader
from safetensors.torch import save_file

from mmscalablevit import ScalableViT
from mmscalablevit.checkpoint.reading import load_weights, read_checkpoint
from mmscalablevit.checkpoint.released import load_backbone_checkpoint, read_weights
from mmscalablevit.checkpoint.weights import use_safe_loader
from mmscalablevit.errors import CheckpointError, one_line

ROOT = Path(__file__).parents[1]
SEGMENTOR = ROOT / 'tests' / 'data' / 'tiny_upernet.py'
ARCH = dict(
    embed_dims=(4, 4, 8, 8),
    num_heads=(1, 1, 2, 2),
    depths=(1, 2, 1, 1),
    sr_ratios=(4, 2, 2, 1),
    window_sizes=(3,) * 4,
    **dict.fromkeys(('c_ratios', 'mlp_ratios'), (1,) * 4),
    ssa_kv='separate',
)
LIM = 'stages.0.0.attn.lim_func.weight'
ZOOS = ('torchvision', 'modelzoo', 'open-mmlab', 'openmmlab')
PREFIXES = ['', 'http://', 'https://', *(f'{zoo}://' for zoo in ZOOS), 'mmcls://', 'pavi://']
PREFIXES += ['s3://', 'petrel://']
OURS = 'scalablevit://'
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
    for offset in [*range(0, len(whole), len(whole) // 150), *range(len(whole) - 60, len(whole))]:
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


@pytest.mark.skipif(
    not hasattr(torch.serialization, 'set_crc32_options'), reason='always with checksums'
)
def test_a_file_without_checksums_is_refused(refuse):
    torch.serialization.set_crc32_options(False)
    try:
        assert 'checksum of' in refuse(WEIGHTS)
    finally:
        torch.serialization.set_crc32_options(True)


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


def test_archives_that_are_no_plain_ones_are_refused(whole, refuse, tmp_path):
    with zipfile.ZipFile(compressed := io.BytesIO(), 'w', zipfile.ZIP_DEFLATED) as archive:
        archive.writestr('archive/data.pkl', bytes(10**8))
    assert len(compressed.getvalue()) < 10**6
    with zipfile.ZipFile(overlapping := io.BytesIO(), 'w') as archive:
        archive.writestr('archive/data.pkl', bytes(10**4))
        # Its central directory lists the same bytes a hundred times.
        archive.filelist *= 100
    # PyTorch would not read what is marked as a folder, and show what was in memory as weights.
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        name = record_of(archive.namelist(), 'data/3')
    folder = bytearray(whole)
    # Of the central directory's entry, whose name follows 46 bytes.
    folder[folder.rindex(name.encode()) - 46 + 38] |= 0x10
    torch.jit.script(torch.nn.Identity()).save(tmp_path / 'script.pth')
    script = (tmp_path / 'script.pth').read_bytes()
    for raw in (compressed.getvalue(), overlapping.getvalue(), bytes(folder), script):
        assert 'records that are compressed, overlap, or are folders' in refuse(raw)


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


# Containers, names and kinds of tensors


def with_(name, value):
    return {**WEIGHTS, name: value}


class Shadowed(OrderedDict):
    """Stands in while pickling for an OrderedDict with an attribute that hides a method."""

    def __reduce__(self):
        return OrderedDict, (), dict(items=5, get=5, keys=5), None, iter(dict.items(self))


with warnings.catch_warnings():
    warnings.simplefilter('ignore')
    ROWS = torch.eye(3).to_sparse_csr()
    QUANTIZED = torch.quantize_per_tensor(WEIGHTS[LIM], 0.1, 0, torch.qint8)
STEM = 'patch_embeds.0.proj.weight'
ONE = torch.ones(1)
NOT_DENSE = f'no dense tensors by name ({LIM})'
NOT_FINITE = f'NaN or infinite values in {LIM}'
# What a file holds, and the reason for refusing it.
CONTENTS = [
    ([WEIGHTS], 'holds a list and not a dict'),
    (ONE, 'holds a Tensor and not a dict'),
    (dict(state_dict=[1]), 'no dense tensors by name (state_dict)'),
    (dict(state_dict={}, meta={}), 'holds no weights'),
    ({**WEIGHTS, 3: ONE}, 'no dense tensors by name (3)'),
    (with_(LIM, [1.0]), NOT_DENSE),
    (Shadowed(WEIGHTS), 'a dict with attributes (items, get, keys)'),
    (dict(model=Shadowed(WEIGHTS)), 'holds a dict with attributes'),
    (dict(state_dict=WEIGHTS, meta=['x']), 'under meta that is no dict'),
    (with_(LIM, WEIGHTS[LIM].to_sparse()), NOT_DENSE),
    (with_(LIM, ROWS), NOT_DENSE),
    (with_(LIM, QUANTIZED), NOT_DENSE),
    (with_(LIM, WEIGHTS[LIM].to('meta')), NOT_DENSE),
    (with_(f'module.{LIM}', WEIGHTS[LIM]), 'holds some weights under two names'),
    (with_('n_averaged', torch.ones(2)), '1 unexpected (n_averaged)'),
    (with_('stages.².x', ONE), '1 unexpected (stages.².x)'),
    (with_('w' * 10**6, ONE), f'1 unexpected ({"w" * 96} ...)'),
    (with_('a\n\x1b[2Jb', ONE), '1 unexpected (a ?[2Jb)'),
    (with_(STEM, torch.ones(4, 0, 7, 7)), 'of another shape'),
    (with_(LIM, ONE.expand(2**20, 2**18)), NOT_DENSE),
    (with_(LIM, WEIGHTS[LIM] / 0), NOT_FINITE),
    # More than float16 can hold.
    (with_(LIM, (WEIGHTS[LIM].abs() + 1e6).half()), NOT_FINITE),
]


@pytest.mark.filterwarnings('ignore:TypedStorage')
@pytest.mark.parametrize(('content', 'reason'), CONTENTS, ids=map(str, range(len(CONTENTS))))
def test_what_holds_something_else_is_refused(tmp_path, refuse, content, reason):
    # Written at once, since None stands for a file that is there.
    torch.save(content, tmp_path / 'content.pth')
    assert reason in refuse(None, 'content.pth')


@pytest.mark.parametrize('dtype', ['float64', 'int64', 'complex64', 'float8_e5m2'])
def test_other_types_are_refused_with_what_to_do(refuse, dtype):
    dtype = getattr(torch, dtype)
    assert refuse(with_(LIM, WEIGHTS[LIM].to(dtype))) == (
        f' holds {LIM} as {dtype}, but the model has it as torch.float32; cast such weights to '
        'torch.float32 and save them again'
    )


def test_a_model_of_half_precision_takes_its_own_alone(tmp_path):
    path, model = tmp_path / 'a.pth', backbone(seed=1).half()
    half = {name: tensor.half() for name, tensor in WEIGHTS.items()}
    for dtype in (torch.bfloat16, torch.float32):
        torch.save({**half, LIM: WEIGHTS[LIM].to(dtype)}, path)
        with pytest.raises(CheckpointError, match=r'but the model has it as torch.float16'):
            load_backbone_checkpoint(model, str(path))
    torch.save(half, path)
    load_backbone_checkpoint(model, str(path))
    assert same(model.state_dict(), half)


@pytest.fixture
def little_memory():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MEMORY_MIB * 1024


@pytest.mark.parametrize('numel', [2**31, 2**62])
@pytest.mark.parametrize('zipped', [True, False], ids=['zip', 'legacy'])
def test_a_promise_of_a_huge_tensor_takes_no_room(tmp_path, refuse, numel, zipped, little_memory):
    # Of 1,234 numbers, which the pickle names as a storage of so many.
    weights = dict(weight=torch.zeros(1234))
    raw = write(tmp_path / 'a.pth', weights, _use_new_zipfile_serialization=zipped)
    long1 = pickle.LONG1 + bytes([9]) + numel.to_bytes(9, 'little')
    number = pickle.BININT2 + (1234).to_bytes(2, 'little')
    assert zipped or number in raw
    if zipped:
        replaced = lambda r, n: r.update({n: r[n].replace(number, long1)})  # noqa: E731
        raw = rewritten(raw, lambda r: replaced(r, record_of(r, 'data.pkl')))
    else:
        raw = raw.replace(number, long1)
    assert 'is damaged or no checkpoint' in refuse(raw)


# Code


class Payload:
    """Writes a file where it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (Path(self.path),)


def write_tar(path, payload):
    """The format of torch before 0.1.12, whose parts are pickles of their own."""
    content = pickle.dumps(payload)
    with tarfile.open(path, 'w') as archive:
        for name in ('storages', 'tensors', 'pickle'):
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))


CODE = {
    'beside the weights': lambda path, p: torch.save(dict(state_dict=WEIGHTS, extra=p), path),
    'among the weights': lambda path, p: torch.save(with_(LIM, p), path),
    'as a name': lambda path, p: torch.save({p: WEIGHTS[LIM]}, path),
    'alone': lambda path, p: torch.save(p, path),
    'old format': lambda path, p: torch.save(
        dict(state_dict=WEIGHTS, extra=p), path, _use_new_zipfile_serialization=False
    ),
    'bare pickle': lambda path, p: path.write_bytes(pickle.dumps(p)),
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


@pytest.fixture
def safe_loader(monkeypatch):
    monkeypatch.setattr(CheckpointLoader, '_schemes', dict(CheckpointLoader._schemes))
    use_safe_loader()


def test_no_address_runs_code(tmp_path, monkeypatch, safe_loader):
    """Of mmengine's loaders, too, which unpickle without restriction where a safe read fails."""
    path = tmp_path / 'checkpoints' / 'code.pth'
    path.parent.mkdir()
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path))
    urls = dict.fromkeys(ZOOS, lambda: dict(swin='https://host/code.pth'))
    monkeypatch.setattr('mmscalablevit.checkpoint.weights._ZOOS', urls)
    touched = tmp_path / 'touched'
    torch.save(dict(state_dict={}, extra=Payload(touched)), path)
    monkeypatch.setattr(
        'mmscalablevit.checkpoint.weights.get_local_path',
        lambda address: contextlib.nullcontext(path),
    )
    assert {p.replace(r'(\S+\:)?', '') for p in CheckpointLoader._schemes} == {*PREFIXES, OURS}
    for prefix in PREFIXES:
        name = {'': str(path), 'http://': 'host/code.pth', 'https://': 'host/code.pth'}
        with pytest.raises(CheckpointError, match='holds pickled Python code'):
            CheckpointLoader.load_checkpoint(prefix + name.get(prefix, 'swin'), 'cpu')
        assert not touched.exists(), prefix


def test_a_loader_of_somebody_else_stays(safe_loader):
    CheckpointLoader.register_scheme('theirs://', lambda name, device: name)
    use_safe_loader()
    assert CheckpointLoader.load_checkpoint('theirs://a') == 'theirs://a'


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
    (folder / 'pretrained.py').write_text(
        f'_base_ = {str(SEGMENTOR)!r}\n'
        "model = dict(backbone=dict(init_cfg=dict(_delete_=True, type='Pretrained')))\n"
    )
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
IMAGES = 'shapes/images/validation'


# What is said of each kind of file.
REASONS = {
    'truncated': 'is damaged or no checkpoint',
    'flipped': 'checksum of whole/data/',
    'poisoned': 'NaN or infinite values in',
    'doubled': 'as torch.float64, but the model has it as torch.float32; cast',
    'code': 'holds pickled Python code',
    'other': 'does not fit',
    'listed': 'no dense tensors by name (state_dict)',
}


@pytest.fixture(scope='module')
def bad(room):
    """A bad checkpoint of each kind."""
    raw = (room / 'whole.pth').read_bytes()
    middle = len(raw) // 2
    (room / 'truncated.pth').write_bytes(raw[:middle])
    flipped = raw[:middle] + bytes([raw[middle] ^ 16]) + raw[middle + 1 :]
    (room / 'flipped.pth').write_bytes(flipped)
    state = torch.load(room / 'whole.pth', weights_only=True)['state_dict']
    for kind, content in dict(
        poisoned=dict(state_dict={**state, KEY: state[KEY] / 0}),
        doubled=dict(state_dict={**state, KEY: state[KEY].double()}),
        code=dict(state_dict=state, extra=Payload(room / 'touched')),
        other=dict(state_dict=WEIGHTS),
        listed=dict(state_dict=[1]),
    ).items():
        torch.save(content, room / f'{kind}.pth')


# Those that train or test build data sets and model each time: few kinds each.
COMMANDS = {
    'tools/test.py CONFIG FILE --work-dir out': 'truncated poisoned code other',
    'tools/train.py CONFIG --resume FILE --work-dir out': 'flipped doubled',
    'tools/train.py CONFIG --work-dir out --cfg-options load_from=FILE': 'code poisoned',
    'tools/train.py pretrained.py --work-dir out --cfg-options '
    'model.backbone.init_cfg.checkpoint=FILE': 'other',
    f'demo/image_demo.py {IMAGES} CONFIG FILE --out-dir out': ' '.join(REASONS),
    f'tools/analysis_tools/visualize_backbone.py {IMAGES}/000001.jpg --config CONFIG '
    '--checkpoint FILE --out-dir out': 'truncated code other',
    'tools/deployment/export_onnx.py CONFIG --checkpoint FILE --out out.onnx': ' '.join(REASONS),
    'tools/model_converters/publish_model.py FILE out/a.pth': 'flipped poisoned code listed',
    'tools/model_converters/scalablevit_to_mm.py FILE out/a.pth': 'truncated code other',
    'tools/model_converters/mm_to_scalablevit.py FILE out/a.pth': 'code other listed',
}


RESUME = 'tools/train.py CONFIG --resume FILE --work-dir out'


def refusal(monkeypatch, room, command, file):
    """The sentence with which a command line ends."""
    monkeypatch.chdir(room)
    monkeypatch.setenv('SHAPES_ROOT', 'shapes')
    words = command.replace('CONFIG', str(SEGMENTOR)).replace('FILE', file).split()
    monkeypatch.setattr(sys, 'argv', words)
    with pytest.raises(SystemExit) as exit_info:
        runpy.run_path(str(ROOT / words[0]), run_name='__main__')
    said = exit_info.value.code
    assert isinstance(said, str)
    assert said.startswith(f'error: checkpoint {file} '), said
    assert said.isprintable()
    return said


@pytest.mark.parametrize(('command', 'kinds'), COMMANDS.items())
def test_every_command_line_refuses_in_one_sentence(room, bad, monkeypatch, command, kinds):
    for kind in kinds.split():
        assert REASONS[kind] in refusal(monkeypatch, room, command, f'{kind}.pth'), kind
    assert not (room / 'touched').exists()
    assert not list(room.glob('out/*.pth'))


@pytest.mark.parametrize('kind', ['truncated', 'poisoned', 'code'])
def test_train_py_of_mmseg_refuses(room, bad, monkeypatch, kind):
    """As its authors wrote it; test_tools.py has mmdet's."""
    monkeypatch.chdir(room)
    monkeypatch.setenv('SHAPES_ROOT', 'shapes')
    command = [str(packaged('mmseg', 'train.py')), str(SEGMENTOR), '--work-dir', 'out']
    monkeypatch.setattr(sys, 'argv', [*command, '--cfg-options', f'load_from={kind}.pth'])
    with pytest.raises(CheckpointError, match=f'^checkpoint {kind}.pth .*{REASONS[kind]}'):
        runpy.run_path(command[0], run_name='__main__')
    assert not (room / 'touched').exists()


def test_states_that_cannot_be_resumed_are_refused(room, monkeypatch):
    whole = torch.load(room / 'whole.pth', weights_only=True)
    moments = dict(step=torch.tensor(2.0), exp_avg=torch.full((3,), torch.nan))
    diverged = dict(whole, optimizer=dict(state={0: moments}, param_groups=[]))
    average = dict(whole, ema_state_dict=dict(weight=torch.full((3,), torch.inf)))
    for reason, content in {
        'cannot be resumed from': dict(state_dict=whole['state_dict']),
        'cannot be resumed': dict(whole, meta=dict(epoch=0, iter='x', seed=[1])),
        'cannot be resumed from, ': dict(whole, optimizer=dict(state={})),
        'NaN or infinite values in optimizer.state.0.exp_avg': diverged,
        'NaN or infinite values in ema_state_dict.weight': average,
    }.items():
        torch.save(content, room / 'state.pth')
        assert reason in refusal(monkeypatch, room, RESUME, 'state.pth')


# Mutations


def place(rng, raw):
    """A random place, as often in the part of a file that is no weights as in all of it."""
    return rng.randrange(len(raw)) if rng.random() < 0.5 else -rng.randint(1, len(raw) // 3 or 1)


def flip(rng, raw, times):
    raw = bytearray(raw)
    for _ in range(times):
        raw[place(rng, raw)] ^= 1 << rng.randrange(8)
    return bytes(raw)


# Each changes the bytes from a to b.
DAMAGE = {
    'truncate': lambda rng, raw, a, b: raw[: rng.randrange(len(raw))],
    'flip': lambda rng, raw, a, b: flip(rng, raw, 1),
    'flip many': lambda rng, raw, a, b: flip(rng, raw, rng.randrange(2, 40)),
    'zero': lambda rng, raw, a, b: raw[:a] + bytes(b - a) + raw[b:],
    'overwrite': lambda rng, raw, a, b: raw[:a] + rng.randbytes(b - a) + raw[b:],
    'duplicate': lambda rng, raw, a, b: raw[:b] + raw[a:],
    'remove': lambda rng, raw, a, b: raw[:a] + raw[b:],
    'swap': lambda rng, raw, a, b: raw[:a] + raw[b : 2 * b - a] + raw[a:b] + raw[2 * b - a :],
    'append': lambda rng, raw, a, b: raw + rng.randbytes(rng.randrange(1, 200)),
}


def damage(rng, raw, kind):
    start = place(rng, raw) % len(raw)
    return DAMAGE[kind](rng, raw, start, min(start + int(2 ** rng.uniform(0, 10)), len(raw)))


OPCODES = b'.()tRQbdejlqruKMXhc}]N\x85\x86\x87\x88\x89\x8aG\x81'


def forge(rng, records):
    """Change records as somebody would who then writes right checksums."""
    pickled, name = record_of(records, 'data.pkl'), rng.choice(list(records))
    kind = rng.choice(['pickle'] * 6 + ['opcode'] * 6 + ['remove', 'rename', 'record', 'swap'])
    if kind == 'opcode':
        content = bytearray(records[pickled])
        content[place(rng, content)] = rng.choice(OPCODES)
        records[pickled] = bytes(content)
    elif kind == 'remove':
        del records[name]
    elif kind == 'rename':
        records[rng.choice(['x', name[:-1], name + '0', name.upper()])] = records.pop(name)
    elif kind == 'swap' or not records[name]:
        other = rng.choice(list(records))
        records[name], records[other] = records[other], records[name]
    else:
        name = pickled if kind == 'pickle' else name
        records[name] = damage(rng, records[name], rng.choice(list(DAMAGE)))


def load_mutant(path, model, before):
    """Give a file to the backbone's and the command lines' loader, and say what became of it."""
    try:
        load_backbone_checkpoint(model, path)
    except CheckpointError as error:
        said = str(error)
        assert said.startswith(f'checkpoint {path} '), said
        assert said.isprintable(), said
        assert same(model.state_dict(), before), 'the model changed'
        outcome = 'refused'
    else:
        outcome = 'same' if same(model.state_dict(), WEIGHTS) else 'other'
        assert all(tensor.isfinite().all() for tensor in model.state_dict().values())
    with contextlib.suppress(CheckpointError):
        load_weights(model, path, 'config.py')
    model.load_state_dict(before)
    return outcome


def fuzz(folder, what, seed, count):
    """Load mutated files; print how often each mutation had which outcome, and peak memory."""
    torch.set_num_threads(1)
    path = Path(folder) / f'a.{"safetensors" if what == "safetensors" else "pth"}'
    if what == 'safetensors':
        save_file(WEIGHTS, path)
    else:
        torch.save(training_state(), path, _use_new_zipfile_serialization=what != 'legacy')
    raw = path.read_bytes()
    model = backbone(seed=1)
    before = copied(model.state_dict())
    assert load_mutant(str(path), model, before) == 'same'
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    rng, found = random.Random(seed), Counter()
    for i in range(count):
        kind = list(DAMAGE)[i % len(DAMAGE)]
        if what == 'forged':
            mutant = rewritten(raw, lambda records: forge(rng, records))
        else:
            mutant = damage(rng, raw, kind)
        path.write_bytes(mutant)
        # What a crash of the reader leaves to be seen.
        print(what, i, kind, file=sys.stderr, flush=True)
        outcome = 'unchanged' if mutant == raw else load_mutant(str(path), model, before)
        found[f'{kind} {outcome}'] += 1
    path.unlink()
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory) / 1024
    print(json.dumps({what: dict(count=count, found=found, grown=grown)}))


@pytest.fixture(
    scope='module',
    params=[1, pytest.param(10, marks=pytest.mark.long)],
    ids=['960', '9600'],
)
def mutants(request, tmp_path_factory):
    """Load files that were changed at random; the outcomes by the kind of file."""
    counts = dict(damaged=720, forged=150, legacy=45, safetensors=45)
    folder, times = tmp_path_factory.mktemp('mutants'), request.param
    calls = [f't.fuzz({str(folder)!r}, {k!r}, {times}, {times * n})' for k, n in counts.items()]
    process = subprocess.run(
        [sys.executable, '-W', 'ignore', '-c', f'import {__name__} as t; ' + '; '.join(calls)],
        cwd=folder,
        env=dict(os.environ, PYTHONPATH=f'{ROOT}:{ROOT / "tests"}', OMP_NUM_THREADS='1'),
        capture_output=True,
        text=True,
        timeout=3600,
    )
    assert process.returncode == 0, process.stderr[-3000:]
    # Nothing else was written.
    assert not os.listdir(folder)
    lines = [line for line in process.stdout.splitlines() if line.startswith('{')]
    return {what: found for line in lines for what, found in json.loads(line).items()}


# What carries no information is about a fifth: padding, dates, whatever follows the archive.
REFUSED = dict(damaged=0.7, forged=0.3, legacy=0, safetensors=0)


@pytest.mark.parametrize('what', REFUSED)
def test_mutated_files_are_refused_or_whole(mutants, what):
    """With checksums no other value of any weight passes; without, a broken structure is found."""
    count, found, grown = mutants[what].values()
    outcomes = Counter()
    for kind, number in found.items():
        outcomes[kind.split()[-1]] += number
    print(f'{what}: {count} mutated files, {dict(outcomes)}')
    assert outcomes.total() == count
    assert outcomes['refused'] > REFUSED[what] * count
    assert grown < MEMORY_MIB
    if what == 'damaged':
        assert outcomes.keys() <= {'refused', 'same', 'unchanged'}
    if what != 'forged':
        assert found['truncate refused'] == count // len(DAMAGE)


def test_messages_show_no_control_codes():
    assert one_line('a\x1b[31m\n b\u202e', 50) == 'a?[31m b?'
    assert len(one_line('x' * 10**7, 50)) == 50


def test_weights_lose_attributes_that_hide_methods(tmp_path):
    weight = torch.ones(2)
    weight.isfinite = weight.to = 'hidden'
    torch.save(dict(weight=weight), tmp_path / 'a.pth')
    assert torch.load(tmp_path / 'a.pth', weights_only=True)['weight'].isfinite == 'hidden'
    assert read_weights(str(tmp_path / 'a.pth'))['weight'].isfinite().all()
