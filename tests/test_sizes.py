# Copyright (c) mmscalablevit contributors. All rights reserved.
"""Any image size, batch, memory layout and arch gives what the plain formulas give.

Each property is tried on drawn cases: a few in the normal suite, many more in the long one.
"""

import functools
import math

import pytest
import torch
from golden import load_reference, relative_error
from hypothesis import HealthCheck, assume, given, seed, settings
from hypothesis import strategies as st
from plain import plain_forward

from mmscalablevit import ScalableViT
from mmscalablevit.models.arch import ARCH_ZOO

PRESETS = {
    name: dict(ARCH_ZOO[name], depths=(2, 2, 2, 2))
    for name in ('small', 'base', 'large', 'small-merged')
}
LARGEST_SIDE, LARGEST_RATIO = 260, 40
# hypothesis varies the cases of a run, where parts of them stay the same; new runs draw anew.
ROUND = 10
# Rounding counts for more in drawn archs, whose norms have as few as 4 channels.
TOLERANCES = {torch.float32: 1e-3, torch.float64: 1e-11}


@pytest.fixture(scope='module', autouse=True)
def two_threads():
    """Of one thread, the network leaves out a faster way of its linear layers."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


def number_of_cases(few, many):
    """How many to draw, in the normal suite and in the long one."""
    return pytest.mark.parametrize('number', [few, pytest.param(many, marks=pytest.mark.long)])


def check_cases(number, check, start=0, **strategies):
    """Call ``check`` with drawn arguments, the same ones in every run; print what was tried."""
    tried = []
    for first in range(0, number, ROUND):

        @seed(start + first)
        @settings(
            max_examples=min(ROUND, number - first),
            database=None,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        )
        @given(st.fixed_dictionaries(strategies))
        def run(case):
            tried.append(case)
            check(**case)

        run()
    sizes = {case['size'] for case in tried}
    archs = {str(case['arch']) for case in tried}
    ratio = max(max(size) / min(size) for size in sizes)
    print(f'{len(tried)} cases, {len(sizes)} sizes up to {ratio:.1f}:1, {len(archs)} archs')


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


SIZES, ARCHS = _sizes(), _archs()
BATCHES, PIXELS = st.integers(1, 3), st.integers(0, 2**32 - 1)


def model(arch, **kwargs):
    return load_reference(ScalableViT(arch, **kwargs))


@functools.lru_cache(maxsize=1)
def preset_model(name):
    return model(PRESETS[name])


def images(batch, size, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 3, *size, generator=generator)


def assert_plain(net, arch, x, tolerance, **norms):
    outs = net(x)
    with torch.no_grad():
        expected = plain_forward(net.state_dict(), arch, x, **norms)
    sides = [math.ceil(side / 4) for side in x.shape[-2:]]
    for out, want, dims in zip(outs, expected, arch['embed_dims'], strict=True):
        assert out.shape == (len(x), dims, *sides)
        assert out.dtype == x.dtype
        assert out.isfinite().all()
        assert relative_error(out, want) < tolerance
        sides = [math.ceil(side / 2) for side in sides]


@number_of_cases(3, 20)
@pytest.mark.parametrize('name', PRESETS)
def test_presets_equal_the_plain_formulas(name, number):
    def check(arch, size, batch, pixels, training):
        net = preset_model(arch).train(training)
        with torch.set_grad_enabled(training):
            assert_plain(net, PRESETS[arch], images(batch, size, pixels), 1e-5)

    check_cases(
        number,
        check,
        start=list(PRESETS).index(name),
        arch=st.just(name),
        size=SIZES,
        batch=BATCHES,
        pixels=PIXELS,
        training=st.booleans(),
    )


@number_of_cases(10, 200)
def test_drawn_archs_equal_the_plain_formulas(number):
    def check(arch, size, batch, pixels, training, dtype, stage_norm, final_norm):
        norms = dict(stage_norm=stage_norm, final_norm=final_norm)
        net = model(arch, **norms).to(dtype).train(training)
        with torch.set_grad_enabled(training):
            x = images(batch, size, pixels).to(dtype)
            assert_plain(net, arch, x, TOLERANCES[dtype], **norms)

    check_cases(
        number,
        check,
        arch=ARCHS,
        size=SIZES,
        batch=BATCHES,
        pixels=PIXELS,
        training=st.booleans(),
        dtype=st.sampled_from(list(TOLERANCES)),
        stage_norm=st.sampled_from(['chained', 'output', None]),
        final_norm=st.booleans(),
    )


@number_of_cases(5, 50)
def test_an_image_does_not_depend_on_its_batch_mates(number):
    def check(arch, size, batch, pixels, place):
        net = model(arch)
        x = images(batch + 1, size, pixels)
        place %= len(x)
        others = torch.full_like(x, math.nan)
        others[place] = x[place]
        with torch.no_grad():
            outs, among_others, alone = net(x), net(others), net(x[place : place + 1])
        for out, other, single in zip(outs, among_others, alone, strict=True):
            assert torch.equal(other[place], out[place])
            assert relative_error(single[0], out[place]) < TOLERANCES[x.dtype]

    check_cases(
        number, check, arch=ARCHS, size=SIZES, batch=st.integers(1, 2), pixels=PIXELS, place=BATCHES
    )


LAYOUTS = {
    'channels last': lambda x: x.contiguous(memory_format=torch.channels_last),
    'transposed': lambda x: x.mT.contiguous().mT,
    'batch innermost': lambda x: x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
    'every other pixel': lambda x: x.repeat_interleave(2, 2).repeat_interleave(3, 3)[..., ::2, ::3],
    'crop': lambda x: torch.nn.functional.pad(x, (2, 3, 1, 4))[..., 1:-4, 2:-3],
    'some of the channels': lambda x: torch.cat([x, x], 1)[:, 3:],
}


@number_of_cases(5, 50)
def test_memory_layout_makes_no_difference(number):
    def check(arch, size, batch, pixels, layout):
        net = model(arch)
        x = images(batch, size, pixels)
        other = LAYOUTS[layout](x)
        assert torch.equal(other, x)
        with torch.no_grad():
            for out, again in zip(net(x), net(other), strict=True):
                assert out.is_contiguous()
                assert again.is_contiguous()
                assert relative_error(again, out) < TOLERANCES[x.dtype]

    check_cases(
        number,
        check,
        arch=ARCHS,
        size=SIZES,
        batch=BATCHES,
        pixels=PIXELS,
        layout=st.sampled_from(list(LAYOUTS)),
    )


def test_one_image_repeated_without_copies():
    net = model(PRESETS['small'])
    x = images(1, (61, 75), 0)
    with torch.no_grad():
        for once, repeated in zip(net(x), net(x.expand(3, -1, -1, -1)), strict=True):
            assert relative_error(repeated, once.expand_as(repeated)) < 1e-5
