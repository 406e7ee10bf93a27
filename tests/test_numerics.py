# Copyright (c) mmscalablevit contributors. All rights reserved.
"""Logits that half precision cannot hold, mixed-precision trainings, and bit-equal trainings."""

import math

import pytest
import torch
from golden import TINY, load_reference, reference_input, relative_error
from jobs import ROOT, draw_shapes, job_environment, long, run_tool, scalars
from plain import plain_forward, softmax_attention

from mmscalablevit import ScalableViT
from mmscalablevit.checkpoint.reading import read_checkpoint
from mmscalablevit.models.attention import fused_attention

# About ten roundings.
TOLERANCES = {torch.float16: 0.01, torch.bfloat16: 0.05}
# A query and a key that hold this twice have a product of more than 65504, float16's largest.
LARGE = 256


def all_finite(tensors):
    return all(tensor.isfinite().all() for tensor in tensors)


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
    assert softmax_attention(*(part.half() for part in parts), scale).isnan().all()

    tokens = (part.transpose(1, 2).flatten(2) for part in parts)
    out = fused_attention(*tokens, 2, scale, dropout)
    wanted = softmax_attention(*exact, scale)
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


# The linear layers of queries and keys: name, number of its parts, which of them.
LAYERS = [('qkv', 3, 0), ('qkv', 3, 1), ('q', 1, 0), ('kv', 2, 0), ('k', 1, 0)]


@torch.no_grad()
def raise_logits(model):
    """Give all products of queries and keys a common summand, which softmax takes out again.

    Large values in LIM and PEG, too.
    """
    for module in model.modules():
        for name, parts, index in LAYERS:
            if layer := getattr(module, name, None):
                for parameter, value in ((layer.weight, 0), (layer.bias, LARGE)):
                    part = parameter.chunk(parts)[index]
                    part.unflatten(0, (module.num_heads, -1))[:, :2] = value
    for name, parameter in model.named_parameters():
        if 'lim_func' in name or 'pos_block' in name:
            parameter *= 32


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
    arch = dict(TINY, ssa_kv=kv)
    model = load_reference(ScalableViT(arch))
    raise_logits(model)
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


@pytest.mark.parametrize(
    ('config', 'amp'),
    [('tiny_upernet.py', True), long('tiny_mask-rcnn.py', False), long('tiny_mask-rcnn.py', True)],
)
def test_deterministic_trainings_are_bit_equal(config, amp, tmp_path):
    draw_shapes(tmp_path / 'shapes', num_train=8, num_val=1)
    options = ['--cfg-options', 'randomness.deterministic=True', 'log_processor.window_size=1']
    runs = []
    for folder in ('first', 'second'):
        command = [ROOT / 'tools/train.py', ROOT / 'tests/data' / config, '--work-dir', folder]
        command += [*['--amp'] * amp, *options]
        run_tool(command, tmp_path, job_environment(tmp_path, threads=2))
        losses = [step['loss'] for step in scalars(tmp_path / folder)[0]]
        (file,) = (tmp_path / folder).glob('[ei]*_*.pth')
        runs.append((losses, read_checkpoint(str(file))))
    (losses, checkpoint), (losses_again, checkpoint_again) = runs
    assert len(losses) == 4
    assert math.isfinite(sum(losses))
    assert losses == losses_again
    for key in ('state_dict', 'optimizer'):
        torch.testing.assert_close(checkpoint_again[key], checkpoint[key], rtol=0, atol=0)
