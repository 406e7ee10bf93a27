# Copyright (c) mmscalablevit contributors. All rights reserved.
"""Small checkpoints, and what changes them as damage and attackers do.

``fuzz`` is run in a process of its own, which a crash of PyTorch's reader would end.
"""

import contextlib
import io
import json
import random
import resource
import sys
import zipfile
from collections import Counter, OrderedDict
from functools import partial
from pathlib import Path

import numpy as np
import torch
from mmengine.logging import HistoryBuffer
from safetensors.torch import save_file

from mmscalablevit import ScalableViT
from mmscalablevit.checkpoint.reading import load_weights
from mmscalablevit.checkpoint.released import load_backbone_checkpoint
from mmscalablevit.errors import CheckpointError

ARCH = dict(
    embed_dims=(4, 4, 8, 8),
    num_heads=(1, 1, 2, 2),
    depths=(1, 2, 1, 1),
    sr_ratios=(4, 2, 2, 1),
    window_sizes=(3,) * 4,
    **dict.fromkeys(('c_ratios', 'mlp_ratios'), (1,) * 4),
    ssa_kv='separate',
)


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


class Payload:
    """Writes a file where it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (Path(self.path),)


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
    'overwrite': lambda rng, raw, a, b: raw[:a] + rng.randbytes(b - a) + raw[b:],
    'duplicate': lambda rng, raw, a, b: raw[:b] + raw[a:],
    'remove': lambda rng, raw, a, b: raw[:a] + raw[b:],
    'swap': lambda rng, raw, a, b: raw[:a] + raw[b : 2 * b - a] + raw[a:b] + raw[2 * b - a :],
    'append': lambda rng, raw, a, b: raw + rng.randbytes(rng.randrange(1, 200)),
}
OPCODES = b'.()tRQbdejlqruKMXhc}]N\x85\x86\x87\x88\x89\x8aG\x81'


def damage(rng, raw, kind):
    start = place(rng, raw) % len(raw)
    return DAMAGE[kind](rng, raw, start, min(start + int(2 ** rng.uniform(0, 10)), len(raw)))


def forge(rng, records):
    """Change records as somebody would who then writes right checksums."""
    pickled, name, other = record_of(records, 'data.pkl'), *rng.choices(list(records), k=2)
    kind = rng.choice(['pickle'] * 6 + ['opcode'] * 6 + ['rename', 'swap'])
    if kind == 'opcode':
        content = bytearray(records[pickled])
        content[place(rng, content)] = rng.choice(OPCODES)
        records[pickled] = bytes(content)
    elif kind == 'pickle':
        records[pickled] = damage(rng, records[pickled], rng.choice(list(DAMAGE)))
    elif kind == 'rename':
        records[rng.choice(['x', name[:-1], name.upper()])] = records.pop(name)
    else:
        records[name], records[other] = records[other], records[name]


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


def memory_mib():
    """The most memory that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def fuzz(seed, counts):
    """Load mutated files; print how often which outcome was, and by how much memory grew."""
    torch.set_num_threads(1)
    model, rng, found, memory = backbone(seed=1), random.Random(seed), {}, None
    before, forged = copied(model.state_dict()), partial(forge, rng)
    for what, count in counts.items():
        path = Path(f'a.{"safetensors" if what == "safetensors" else "pth"}')
        if what == 'safetensors':
            save_file(WEIGHTS, path)
        else:
            torch.save(training_state(), path, _use_new_zipfile_serialization=what != 'legacy')
        raw, found[what] = path.read_bytes(), Counter()
        assert load_mutant(str(path), model, before) == 'same'
        memory = memory or memory_mib()
        for i in range(count):
            kind = list(DAMAGE)[i % len(DAMAGE)]
            mutant = rewritten(raw, forged) if what == 'forged' else damage(rng, raw, kind)
            path.write_bytes(mutant)
            # What a crash of the reader leaves to be seen.
            print(what, i, kind, file=sys.stderr, flush=True)
            outcome = 'unchanged' if mutant == raw else load_mutant(str(path), model, before)
            assert what == 'forged' or kind != 'truncate' or outcome == 'refused'
            found[what][outcome] += 1
        path.unlink()
    print(json.dumps([found, memory_mib() - memory]))
