# Copyright (c) mmscalablevit contributors. All rights reserved.
"""Logits that half precision cannot hold, mixed-precision trainings, and bit-equal trainings."""

import json
import math
import statistics
from pathlib import Path

import pytest
import torch
from golden import load_reference, reference_input, relative_error
from jobs import draw_shapes, job_environment, run_tool
from plain import plain_forward

from mmscalablevit import ScalableViT
from mmscalablevit.models.attention import (
    InteractiveWindowSelfAttention,
    ScalableSelfAttention,
    fused_attention,
)

ROOT = Path(__file__).parents[1]
DEMOS = {
    'detector': 'mask-rcnn_scalablevit-demo_fpn_shapes.py',
    'segmentor': 'scalablevit-demo_upernet_shapes-128x128.py',
}
ARCH = dict(
    embed_dims=(16, 32, 32, 64),
    num_heads=(2, 2, 4, 4),
    depths=(2, 2, 2, 2),
    # Values narrower than keys, as wide, wider, and no reduction.
    c_ratios=(1.25, 1, 0.75, 1),
    sr_ratios=(8, 4, 2, 1),
    window_sizes=(7, 5, 7, 3),
    mlp_ratios=(4, 2, 4, 4),
    ssa_kv='separate',
)
# About ten roundings.
TOLERANCES = {torch.float16: 0.01, torch.bfloat16: 0.05}
# A query and a key that hold this twice have a product of more than 65504, float16's largest.
LARGE = 256


def naive_attention(query, key, value, scale):
    return torch.softmax(scale * (query @ key.transpose(-2, -1)), dim=-1) @ value


def all_finite(tensors):
    return all(tensor.isfinite().all() for tensor in tensors)


def attentions(model):
    kinds = (InteractiveWindowSelfAttention, ScalableSelfAttention)
    return [module for module in model.modules() if isinstance(module, kinds)]


@pytest.mark.parametrize('dtype', TOLERANCES, ids=str)
@pytest.mark.parametrize('widths', [(32, 32), (40, 32), (24, 32)], ids=str)
@pytest.mark.parametrize('dropout', [0, 1e-9])
def test_attention_whose_products_overflow_float16(dtype, widths, dropout):
    torch.manual_seed(0)
    key_width, value_width = widths
    scale = key_width**-0.5
    query, key, value = (
        torch.randn(2, 2, rows, width)
        for rows, width in ((300, key_width), (49, key_width), (49, value_width))
    )
    # The same summand for all keys, which softmax takes out again.
    query[..., :2] = key[..., :2] = LARGE
    parts = [part.to(dtype).requires_grad_() for part in (query, key, value)]
    exact = [part.detach().double().requires_grad_() for part in parts]
    assert naive_attention(*(part.half() for part in parts), scale).isnan().all()

    tokens = (part.transpose(1, 2).flatten(2) for part in parts)
    out = fused_attention(*tokens, 2, scale, dropout).unflatten(2, (2, -1)).transpose(1, 2)
    wanted = naive_attention(*exact, scale)
    weights = torch.randn_like(wanted)
    (out * weights).sum().backward()
    (wanted * weights).sum().backward()

    assert out.dtype == dtype
    assert relative_error(out, wanted) < TOLERANCES[dtype]
    assert all_finite(part.grad for part in parts)
    for part, want in zip(parts, exact, strict=True):
        # The summand has no gradient but rounding errors.
        used = slice(2, None) if part is parts[0] else slice(None)
        assert relative_error(part.grad[..., used], want.grad[..., used]) < TOLERANCES[dtype]


def query_and_key_layers(attention):
    """The linear layers of queries and keys: layer, number of its parts, which part of it."""
    if isinstance(attention, InteractiveWindowSelfAttention):
        return [(attention.qkv, 3, 0), (attention.qkv, 3, 1)]
    if hasattr(attention, 'kv'):
        return [(attention.q, 1, 0), (attention.kv, 2, 0)]
    return [(attention.q, 1, 0), (attention.k, 1, 0)]


@torch.no_grad()
def raise_logits(model):
    """Give all products of queries and keys a common summand, which softmax takes out again.

    Large values in LIM and PEG, too.
    """
    for module in attentions(model):
        for layer, parts, index in query_and_key_layers(module):
            for parameter, value in ((layer.weight, 0), (layer.bias, LARGE)):
                part = parameter.chunk(parts)[index]
                part.unflatten(0, (module.num_heads, -1))[:, :2] = value
    for name, parameter in model.named_parameters():
        if 'lim_func' in name or 'pos_block' in name:
            parameter *= 32


def network(kv, change, **kwargs):
    arch = dict(ARCH, ssa_kv=kv)
    model = load_reference(ScalableViT(arch, **kwargs))
    change(model)
    return model, arch


def gradients(model, images, **autocast):
    """Of a loss that is scaled meanwhile, as in trainings in float16."""
    model.train().zero_grad()
    with torch.autocast('cpu', **autocast):
        outs = model(images)
    generator = torch.Generator().manual_seed(0)
    loss = sum((out * torch.randn(out.shape, generator=generator)).mean() for out in outs)
    (1024 * loss).backward()
    return torch.cat([parameter.grad.flatten() / 1024 for parameter in model.parameters()])


@pytest.mark.parametrize('dtype', TOLERANCES, ids=str)
@pytest.mark.parametrize('kv', ['separate', 'merged'])
def test_network_with_large_logits_is_close_to_float32(dtype, kv):
    model, arch = network(kv, raise_logits)
    images = 1000 * reference_input(0, (2, 3, 97, 131))
    with torch.no_grad():
        exact = model(images)
        with torch.autocast('cpu', dtype):
            outs = model(images)
            naive = plain_forward(model.state_dict(), arch, images)
    exact_gradient = gradients(model, images, enabled=False)
    gradient = gradients(model, images, dtype=dtype)

    # bfloat16 holds such products, though not in the same fineness.
    assert all_finite(naive) == (dtype == torch.bfloat16)
    errors = [relative_error(out, want) for out, want in zip(outs, exact, strict=True)]
    error = ((gradient - exact_gradient).norm() / exact_gradient.norm()).item()
    print(f'{dtype}, {kv}: outputs differ by {max(errors):.2%}, gradients by {error:.2%}')
    assert max(errors) < TOLERANCES[dtype]
    assert error < TOLERANCES[dtype]


@pytest.fixture(scope='module')
def few_shapes(tmp_path_factory):
    return folder_of_shapes(tmp_path_factory, 24, 4)


@pytest.fixture(scope='module')
def shapes(tmp_path_factory):
    return folder_of_shapes(tmp_path_factory, 2000, 100)


def folder_of_shapes(tmp_path_factory, num_train, num_val):
    """A folder with the demo's data set where its configs look for it."""
    folder = tmp_path_factory.mktemp('folder')
    draw_shapes(folder / 'data' / 'shapes', num_train, num_val, size=128)
    return folder


def train(folder, name, demo, iterations, *options, amp=False, threads=1):
    """Train a demo model: the losses of every iteration, the metrics, the last checkpoint."""
    settings = {
        'train_cfg.max_iters': iterations,
        'train_cfg.val_interval': iterations,
        'default_hooks.checkpoint.interval': iterations,
        'default_hooks.logger.interval': 1,
        'log_processor.window_size': 1,
    }
    tool, config = ROOT / 'tools' / 'train.py', ROOT / 'configs' / 'demo' / DEMOS[demo]
    options = [*options, *(f'{key}={value}' for key, value in settings.items())]
    command = [tool, config, '--work-dir', name, *['--amp'] * amp, '--cfg-options', *options]
    run_tool(command, folder, job_environment(folder, threads))

    log = next((folder / name).glob('*/vis_data/scalars.json'))
    *steps, metrics = [json.loads(line) for line in log.read_text().splitlines()]
    assert [step['step'] for step in steps] == list(range(1, iterations + 1))
    losses = [[v for k, v in step.items() if 'loss' in k or k == 'grad_norm'] for step in steps]
    state = torch.load(folder / name / f'iter_{iterations}.pth', weights_only=False)
    return losses, metrics, state


@pytest.mark.parametrize(
    ('demo', 'amp'),
    [
        ('segmentor', False),
        pytest.param('segmentor', True, marks=pytest.mark.long),
        pytest.param('detector', False, marks=pytest.mark.long),
        pytest.param('detector', True, marks=pytest.mark.long),
    ],
)
def test_deterministic_trainings_are_bit_equal(few_shapes, demo, amp):
    runs = [
        train(few_shapes, name, demo, 3, 'randomness.deterministic=True', amp=amp, threads=2)
        for name in (f'{demo} {amp}', f'{demo} {amp} again')
    ]
    (losses, _, checkpoint), (losses_again, _, checkpoint_again) = runs
    assert math.isfinite(sum(map(sum, losses)))
    assert losses == losses_again
    for key in ('state_dict', 'optimizer'):
        torch.testing.assert_close(checkpoint_again[key], checkpoint[key], rtol=0, atol=0)


METRICS = {'detector': ['coco/bbox_mAP', 'coco/segm_mAP'], 'segmentor': ['mIoU']}
NUM_SEEDS = 3
# Of Student's distribution with the four degrees of freedom that two times three runs leave: a
# difference beyond this many standard errors would be chance once in a hundred times.
T_VALUE = 4.6


@pytest.mark.long
@pytest.mark.parametrize('demo', DEMOS)
def test_mixed_precision_reaches_the_same(shapes, demo):
    def metrics_of(seed, amp):
        name = f'{demo} {"amp" if amp else "float32"} {seed}'
        options = ['param_scheduler.1.end=500', f'randomness.seed={seed}']
        losses, metrics, _ = train(shapes, name, demo, 500, *options, amp=amp)
        assert math.isfinite(sum(map(sum, losses)))
        return metrics

    runs = {amp: [metrics_of(seed, amp) for seed in range(NUM_SEEDS)] for amp in (False, True)}
    for metric in METRICS[demo]:
        full, mixed = ([run[metric] for run in runs[amp]] for amp in (False, True))
        difference = statistics.mean(mixed) - statistics.mean(full)
        error = math.sqrt((statistics.variance(full) + statistics.variance(mixed)) / NUM_SEEDS)
        print(
            f'{metric} of {NUM_SEEDS} seeds: {full} in float32, {mixed} with --amp; the means '
            f'differ by {difference:.4g} with a standard error of {error:.4g}'
        )
        assert abs(difference) < T_VALUE * error
