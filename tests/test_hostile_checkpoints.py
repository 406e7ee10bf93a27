# Copyright (c) mmscalablevit contributors. All rights reserved.
"""Checkpoints as hostile input: refused with the file and a reason, never run or taken in part."""

import contextlib
import io
import json
import os
import pickle
import tarfile
import warnings
import zipfile
from collections import OrderedDict
from functools import partial

import numpy as np
import pytest
import torch
from hostile import (
    WEIGHTS,
    Payload,
    backbone,
    copied,
    memory_mib,
    record_of,
    rewritten,
    same,
    training_state,
    write,
)
from jobs import run_tool
from mmengine.runner import CheckpointLoader

from mmscalablevit.checkpoint.reading import read_checkpoint
from mmscalablevit.checkpoint.released import load_backbone_checkpoint, read_weights
from mmscalablevit.checkpoint.weights import use_safe_loader
from mmscalablevit.errors import CheckpointError

LIM = 'stages.0.0.attn.lim_func.weight'
# A reader that believed a promise of terabytes would take more.
MEMORY_MIB = 300
ZOOS = ('torchvision', 'modelzoo', 'open-mmlab', 'openmmlab')
PREFIXES = ['', 'http://', 'https://', *(f'{zoo}://' for zoo in ZOOS), 'mmcls://', 'pavi://']
PREFIXES += ['s3://', 'petrel://']
OURS = 'scalablevit://'


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


def test_every_truncation_is_refused(whole, refuse):
    for offset in [*range(0, len(whole), len(whole) // 50), *range(len(whole) - 30, len(whole))]:
        assert 'is damaged' in refuse(whole[:offset])


def test_a_flipped_bit_in_any_record_is_refused_by_its_checksum(whole, refuse):
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        records = [(record, archive.read(record)) for record in archive.infolist()]
    for i, (record, content) in enumerate(records):
        raw = bytearray(whole)
        # Behind its name and padding.
        start = raw.index(content, record.header_offset + 30 + len(record.filename))
        raw[start + i % len(content)] ^= 1 << i % 8
        assert f'checksum of {record.filename} is wrong' in refuse(bytes(raw))
    assert sum('/data/' in record.filename for record, _ in records) == len(WEIGHTS)


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


def test_what_is_no_file_is_named(refuse, tmp_path):
    os.mkfifo(tmp_path / 'fifo.pth')
    (tmp_path / 'folder.pth').mkdir()
    (tmp_path / 'device.pth').symlink_to('/dev/zero')
    for name in ('fifo.pth', 'folder.pth', 'device.pth'):
        assert 'is a directory or device, not a file' in refuse(None, name)

    (tmp_path / 'link.pth').symlink_to(tmp_path / 'nowhere')
    with pytest.raises(FileNotFoundError, match=r'link.pth does not exist'):
        read_checkpoint(str(tmp_path / 'link.pth'))


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
NOT_DENSE = f'other than named dense tensors ({LIM})'
NOT_FINITE = f'NaN or infinite values in {LIM}'
# What a file holds, and the reason for refusing it.
CONTENTS = [
    ([WEIGHTS], 'holds a list and not a dict'),
    (ONE, 'holds a Tensor and not a dict'),
    (dict(state_dict=[1]), 'other than named dense tensors (state_dict)'),
    (dict(state_dict={}, meta={}), 'holds no weights'),
    ({**WEIGHTS, 3: ONE}, 'other than named dense tensors (3)'),
    (with_(LIM, [1.0]), NOT_DENSE),
    (Shadowed(WEIGHTS), 'a dict with attributes (items, get, keys)'),
    (dict(model=Shadowed(WEIGHTS)), 'holds a dict with attributes'),
    (dict(state_dict=WEIGHTS, meta=['x']), 'has a meta that is not a dict'),
    (with_(LIM, WEIGHTS[LIM].to_sparse()), NOT_DENSE),
    (with_(LIM, ROWS), NOT_DENSE),
    (with_(LIM, QUANTIZED), NOT_DENSE),
    (with_(LIM, WEIGHTS[LIM].to('meta')), NOT_DENSE),
    (with_(f'module.{LIM}', WEIGHTS[LIM]), 'holds some weights under two names'),
    (with_('n_averaged', torch.ones(2)), '1 unexpected (n_averaged)'),
    (with_('stages.².x', ONE), '1 unexpected (stages.².x)'),
    (with_('w' * 10**6, ONE), f'1 unexpected ({"w" * 96} ...)'),
    (with_('a\n\x1b[2J\u202eb', ONE), '1 unexpected (a ?[2J?b)'),
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


@pytest.mark.parametrize('numel', [2**31, 2**62])
@pytest.mark.parametrize('zipped', [True, False], ids=['zip', 'legacy'])
def test_a_promise_of_a_huge_tensor_takes_no_room(tmp_path, refuse, numel, zipped):
    # Of 1,234 numbers, which the pickle names as a storage of so many.
    weights = dict(weight=torch.zeros(1234))
    raw = write(tmp_path / 'a.pth', weights, _use_new_zipfile_serialization=zipped)
    long1 = pickle.LONG1 + bytes([9]) + numel.to_bytes(9, 'little')
    number = pickle.BININT2 + (1234).to_bytes(2, 'little')

    def promised(raw):
        assert number in raw
        return raw.replace(number, long1)

    if zipped:
        name = 'a/data.pkl'
        raw = rewritten(raw, lambda records: records.update({name: promised(records[name])}))
    else:
        raw = promised(raw)
    before = memory_mib()
    assert 'is damaged or no checkpoint' in refuse(raw)
    assert memory_mib() - before < MEMORY_MIB


def write_tar(path, payload):
    """The format of torch before 0.1.12, whose parts are pickles of their own."""
    content = pickle.dumps(payload)
    with tarfile.open(path, 'w') as archive:
        for name in ('storages', 'tensors', 'pickle'):
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))


def beside_the_weights(path, payload, **kwargs):
    torch.save(dict(state_dict=WEIGHTS, extra=payload), path, **kwargs)


def write_numpy(path, payload):
    with open(path, 'wb') as file:
        np.save(file, np.array(payload, dtype=object))


CODE = {
    'beside the weights': beside_the_weights,
    'among the weights': lambda path, p: torch.save(with_(LIM, p), path),
    'as a name': lambda path, p: torch.save({p: WEIGHTS[LIM]}, path),
    'alone': lambda path, p: torch.save(p, path),
    'old format': partial(beside_the_weights, _use_new_zipfile_serialization=False),
    'bare pickle': lambda path, p: path.write_bytes(pickle.dumps(p)),
    'tar archive': write_tar,
    'numpy file': write_numpy,
    'method of an allowed class': lambda path, p: beside_the_weights(path, np.array([p], object)),
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


# How many files are changed, and which share is refused at least: what carries no information is
# about a fifth, padding, dates, whatever follows the archive.
MUTANTS = dict(damaged=(320, 0.7), forged=(100, 0.3), legacy=(40, 0), safetensors=(40, 0))


@pytest.mark.parametrize('times', [1, pytest.param(20, marks=pytest.mark.long)])
def test_mutated_files_are_refused_or_whole(times, tmp_path):
    """With checksums no other value of any weight passes; without, a broken structure is found."""
    counts = {what: count * times for what, (count, _) in MUTANTS.items()}
    said = run_tool(['-c', f'import hostile; hostile.fuzz({times}, {counts})'], tmp_path)
    # Nothing else was written.
    assert not os.listdir(tmp_path)
    outcomes, grown = json.loads(said.splitlines()[-1])
    print(f'{counts} mutated files: {outcomes}')
    for what, (_, refused) in MUTANTS.items():
        assert outcomes[what]['refused'] > refused * counts[what]
    assert grown < MEMORY_MIB
    assert outcomes['damaged'].keys() <= {'refused', 'same', 'unchanged'}


def test_weights_lose_attributes_that_hide_methods(tmp_path):
    weight = torch.ones(2)
    weight.isfinite = weight.to = 'hidden'
    torch.save(dict(weight=weight), tmp_path / 'a.pth')
    assert torch.load(tmp_path / 'a.pth', weights_only=True)['weight'].isfinite == 'hidden'
    assert read_weights(str(tmp_path / 'a.pth'))['weight'].isfinite().all()
