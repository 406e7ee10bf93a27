# Copyright (c) mmscalablevit contributors. All rights reserved.
"""Deterministic weights and inputs behind the golden outputs in ``tests/data/reference``."""

import json
import math
import zlib
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from mmscalablevit import ScalableViT

REFERENCE = Path(__file__).parent / 'data' / 'reference'
# All kinds of attention: values narrower than keys, and wider.
TINY = dict(
    embed_dims=(16, 16, 32, 32),
    num_heads=(2, 2, 4, 4),
    depths=(2, 2, 3, 2),
    c_ratios=(1.25, 2, 0.5, 1),
    sr_ratios=(8, 4, 2, 1),
    window_sizes=(7, 5, 7, 3),
    mlp_ratios=(4, 2, 4, 4),
    ssa_kv='separate',
)


def reference_tensor(name, shape):
    """Weight of an official name: a function of the name and the shape alone."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    z = rng.standard_normal(tuple(shape)).astype(np.float32)
    if len(shape) >= 2:
        return z * np.float32((1.0 / math.prod(shape[1:])) ** 0.5)
    if name.endswith('.weight'):
        return np.float32(1) + np.float32(0.02) * z
    return np.float32(0.02) * z


def reference_state(shapes):
    """State dict of ``{name: shape}``."""
    return {name: torch.from_numpy(reference_tensor(name, shape)) for name, shape in shapes.items()}


def reference_input(seed, shape):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))


def load_reference(model):
    """Fill a model with its deterministic weights."""
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    model.load_state_dict(reference_state(shapes), strict=True)
    return model.eval()


def read_json(name):
    return json.loads((REFERENCE / name).read_text())


def relative_error(value, golden):
    golden = golden.double()
    return ((value.double() - golden).abs().max() / golden.abs().max()).item()


def in_old_names(state):
    """A state dict in the naming of the authors' detection code."""

    def old(name):
        parts = ['lepe_func' if part == 'lim_func' else part for part in name.split('.')]
        return '.'.join(['blocks', *parts[1:]] if parts[0] == 'stages' else parts)

    return {old(name): tensor for name, tensor in state.items()}


def golden_model(case):
    arch = case['variant'] if 'kvmerged' not in case['case'] else 'small-merged'
    model = ScalableViT(arch, stage_norm='chained' if case['extra_norm'] else None)
    return load_reference(model)


def golden_errors(model, case, dtype, device='cpu'):
    """Relative error of every stored piece of every stage."""
    stored = load_file(REFERENCE / case['file'])
    images = reference_input(case['input_seed'], case['input_shape']).to(device, dtype)
    with torch.no_grad():
        outs = [out.cpu() for out in model.to(device, dtype)(images)]
    errors = {}
    for out, stage in zip(outs, case['stages'], strict=True):
        assert list(out.shape) == stage['shape']
        pieces = {
            'full': out,
            'sub': out[:, ::4, ::3, ::3],
            'last_row': out[:, ::4, -1, :],
            'last_col': out[:, ::4, :, -1],
        }
        for key in stage['stored']:
            piece = pieces.get(key.rsplit('.')[-1], out)
            errors[key] = (piece.double() - stored[key]).abs().max().item() / stage['absmax']
    assert errors
    return errors
