# Copyright (c) mmscalablevit contributors. All rights reserved.
"""The lower bound of a GPU, from operators that are counted by hand and by autocast of CUDA."""

from collections import Counter

import pytest
import torch
from golden import TINY
from jobs import load_tool
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from mmscalablevit import ScalableViT

TOOL = 'tools/analysis_tools/roofline.py'
roofline = load_tool(TOOL)


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(64, 32, bias=False)
        self.depthwise = nn.Conv2d(32, 32, 3, padding=1, groups=32, bias=False)

    def forward(self, images):
        x = self.linear(images.reshape(2, -1, 64))
        return [self.depthwise(x.transpose(1, 2).unflatten(2, (8, 6)))]


def test_bytes_and_operations_of_a_linear_layer_and_a_depthwise_convolution():
    rows, weights, kernel = 2 * 48, 64 * 32, 32 * 9
    found = {}
    for mode in ('inference', 'train'):
        calls = roofline.trace(Small(), roofline.benchmark.Case(mode, 'bfloat16', 32, 32, 2))
        found[mode] = Counter()
        for call in calls:
            found[mode][call.module, call.operator] += call.flops
    product, convolution = 2 * rows * weights, 2 * rows * kernel
    assert found['inference']['linear', 'mm'] == product
    assert found['inference']['depthwise', 'convolution'] == convolution
    # The weight's gradient alone, as images need none.
    assert found['train']['linear', 'mm'] == 2 * product
    assert found['train']['depthwise', 'convolution_backward'] == 2 * convolution
    # Rows, weights and results, two bytes each.
    (call,) = (c for c in calls if c.operator == 'mm' and c.flops == product and c is calls[2])
    assert call.bytes == 2 * (rows * 64 + weights + rows * 32)


def test_bound_is_the_slower_of_bytes_and_operations():
    call = roofline.Call('', 'mm', bytes=2 * 10**9, flops=3 * 10**12)
    assert call.ms((1, 100)) == pytest.approx(30)
    assert call.ms((0.05, 100)) == pytest.approx(40)


class Types(TorchDispatchMode):
    """Operators and the types that they return."""

    def __init__(self):
        super().__init__()
        self.seen = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in ('addmm', 'convolution', 'native_layer_norm', 'gelu', 'add'):
            first = out[0] if isinstance(out, tuple) else out
            self.seen[name, first.dtype] += 1
        return out


def test_types_are_those_of_autocast_on_cuda():
    images = (2, 3, 61, 75)
    with torch.device('meta'), Types() as ours, roofline.Autocast():
        ScalableViT(dict(TINY))(torch.empty(images))
    # Tensors that say they are on CUDA and hold nothing.
    torch.set_autocast_enabled('cuda', True)
    torch.set_autocast_dtype('cuda', torch.bfloat16)
    try:
        with FakeTensorMode(), torch.device('cuda'), Types() as cuda:
            ScalableViT(dict(TINY))(torch.empty(images))
    finally:
        torch.set_autocast_enabled('cuda', False)
        torch.clear_autocast_cache()
    assert ours.seen == cuda.seen
    assert len(ours.seen) > 4


def test_tables_compare_models_and_write(call, tmp_path):
    options = ['--models', 'small', 'swin-t', '--sizes', '1x64x64', '--modes', 'inference']
    call(TOOL, *options, '--gpus', 'h100', 'half:1.675:494.7', '--out', 'new/bound.md')
    text = (tmp_path / 'new' / 'bound.md').read_text()
    small, swin = (
        next(line for line in text.splitlines() if line.startswith(f'| {name} ')).split('|')
        for name in ('small', 'swin-t')
    )
    assert float(small[7]) == pytest.approx(2 * float(small[5]), rel=0.02)
    assert float(swin[6]) == pytest.approx(float(swin[5]) / float(small[5]), rel=0.02)
    assert 'stages.mlp.fc1' in text


def test_measures_the_operators(call):
    options = ['--models', 'small', '--sizes', '1x32x32', '--modes', 'inference']
    _, said = call(TOOL, *options, '--measure', 'cpu', '--top', '40')
    lines = [line.split('|') for line in said.splitlines()]
    rows = [line for line in lines if len(line) == 9 and line[2].strip().isdigit()]
    took = {row[1].strip(): float(row[6]) for row in rows}
    assert took['addmm'] > 0
    assert took['attention'] > 0
