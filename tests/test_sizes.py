# Copyright (c) mmscalablevit contributors. All rights reserved.
"""Any image size, batch, memory layout and arch gives what the plain formulas give."""

import math

import pytest
import torch
from golden import load_reference, relative_error
from hypothesis import HealthCheck, assume, given, seed, settings
from hypothesis import strategies as st
from jobs import long
from plain import plain_forward

from mmscalablevit import ScalableViT
from mmscalablevit.models.arch import ARCH_ZOO

PRESETS = [dict(arch, depths=(2, 2, 2, 2)) for arch in ARCH_ZOO.values()]
LARGEST_SIDE, LARGEST_RATIO = 260, 40
# Rounding counts for more in drawn archs, whose norms have as few as 4 channels.
TOLERANCES = {torch.float32: 1e-3, torch.float64: 1e-11}


def drawn(few, many, **strategies):
    """A test of so many cases in the normal suite and in the long one, the same in every run."""
    options = dict(database=None, deadline=None, suppress_health_check=list(HealthCheck))

    def decorate(check):
        @pytest.mark.parametrize('number', [few, long(many)])
        def test(number):
            seed(0)(settings(max_examples=number, **options)(given(**strategies)(check)))()

        return test

    return decorate


@st.composite
def _sizes(draw):
    short = draw(st.integers(1, 8) | st.integers(1, LARGEST_SIDE))
    long = draw(st.integers(short, min(LARGEST_SIDE, LARGEST_RATIO * short)))
    return tuple(draw(st.permutations((short, long))))


@st.composite
def _stages(draw):
    heads, head_dims = draw(st.integers(1, 4)), draw(st.integers(4, 12))
    dims = heads * head_dims
    sr_ratio = draw(st.integers(1, 9))
    # SSA's width is rounded down to the integer, here one that the heads divide.
    rest = draw(st.sampled_from([0, 0.3]))
    c_ratio = (heads * draw(st.integers(2, 2 * head_dims)) + rest) / dims if sr_ratio > 1 else 1
    assume(int(dims * c_ratio) % heads == 0)
    return dict(
        embed_dims=dims,
        num_heads=heads,
        depths=draw(st.integers(1, 3)),
        c_ratios=c_ratio,
        sr_ratios=sr_ratio,
        window_sizes=draw(st.integers(1, 9)),
        mlp_ratios=draw(st.integers(1, 4) | st.floats(0.5, 4)),
    )


@st.composite
def _archs(draw):
    drawn = [draw(_stages()) for _ in range(4)]
    arch = {key: [stage[key] for stage in drawn] for key in drawn[0]}
    return dict(arch, ssa_kv=draw(st.sampled_from(['separate', 'merged'])))


# One row, one column, less than a kernel of the reduction, windows that fit.
SIZES = st.sampled_from([(1, 1), (1, 200), (37, 2), (28, 28)]) | _sizes()
ARCHS = _archs()
BATCHES, PIXELS = st.integers(1, 3), st.integers(0, 2**32 - 1)


def model(arch, **kwargs):
    return load_reference(ScalableViT(arch, **kwargs))


def images(batch, size, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 3, *size, generator=generator)


@drawn(
    10,
    280,
    arch=st.sampled_from(PRESETS) | ARCHS,
    size=SIZES,
    batch=BATCHES,
    pixels=PIXELS,
    training=st.booleans(),
    dtype=st.sampled_from(list(TOLERANCES)),
    stage_norm=st.sampled_from(['chained', 'output', None]),
    final_norm=st.booleans(),
)
def test_presets_and_drawn_archs_equal_the_plain_formulas(
    arch, size, batch, pixels, training, dtype, **norms
):
    net = model(arch, **norms).to(dtype).train(training)
    x = images(batch, size, pixels).to(dtype)
    with torch.set_grad_enabled(training):
        outs = net(x)
    with torch.no_grad():
        expected = plain_forward(net.state_dict(), arch, x, **norms)
    sides = [math.ceil(side / 4) for side in size]
    for out, want, dims in zip(outs, expected, arch['embed_dims'], strict=True):
        assert out.shape == (batch, dims, *sides)
        assert out.dtype == dtype
        assert out.isfinite().all()
        assert relative_error(out, want) < TOLERANCES[dtype]
        sides = [math.ceil(side / 2) for side in sides]


LAYOUTS = {
    'channels last': lambda x: x.contiguous(memory_format=torch.channels_last),
    'transposed': lambda x: x.mT.contiguous().mT,
    'batch innermost': lambda x: x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
    'every other pixel': lambda x: x.repeat_interleave(2, 2).repeat_interleave(3, 3)[..., ::2, ::3],
    'crop': lambda x: torch.nn.functional.pad(x, (2, 3, 1, 4))[..., 1:-4, 2:-3],
    'some of the channels': lambda x: torch.cat([x, x], 1)[:, 3:],
}


@drawn(
    6,
    60,
    arch=ARCHS,
    size=SIZES,
    batch=st.integers(2, 3),
    pixels=PIXELS,
    place=BATCHES,
    layout=st.sampled_from(list(LAYOUTS)),
)
def test_batch_mates_and_memory_layout_make_no_difference(arch, size, batch, pixels, place, layout):
    net = model(arch)
    x = images(batch, size, pixels)
    place %= len(x)
    others = torch.full_like(x, math.nan)
    others[place] = x[place]
    with torch.no_grad():
        cases = net(x), net(others), net(x[place : place + 1]), net(LAYOUTS[layout](x))
    for out, among_others, alone, laid_out in zip(*cases, strict=True):
        assert out.is_contiguous()
        assert laid_out.is_contiguous()
        assert torch.equal(among_others[place], out[place])
        assert relative_error(alone[0], out[place]) < TOLERANCES[x.dtype]
        assert relative_error(laid_out, out) < TOLERANCES[x.dtype]
