# Copyright (c) mmscalablevit contributors. All rights reserved.
"""The backbone: golden values, gradients, sizes, arguments, freezing, initialization."""

import importlib
import json
import math

import pytest
import torch
from golden import (
    golden_errors,
    golden_model,
    load_reference,
    read_json,
    reference_input,
    relative_error,
)
from mmengine.registry import MODELS
from plain import plain_forward
from torch import nn

from mmscalablevit import ScalableViT

TINY = dict(
    embed_dims=(8, 16, 24, 32),
    num_heads=(2, 2, 3, 4),
    depths=(2, 2, 3, 2),
    c_ratios=(1.25, 2, 0.5, 1),
    sr_ratios=(8, 4, 2, 1),
    window_sizes=(7, 5, 7, 3),
    mlp_ratios=(4, 2, 4, 4),
    ssa_kv='separate',
)
TINY_EVEN = dict(TINY, embed_dims=(16, 16, 32, 32), num_heads=(2, 2, 4, 4))
CASES = [case for case in read_json('manifest.json')['cases'] if case['kind'] == 'dense']


def tiny(**kwargs):
    model = ScalableViT(dict(TINY_EVEN), **kwargs)
    model.init_weights()
    return model


@pytest.mark.parametrize('case', CASES, ids=lambda case: case['case'])
def test_matches_the_authors_features(case):
    errors = golden_errors(golden_model(case), case, torch.float32)
    assert max(errors.values()) < 1e-5, errors


def test_matches_the_authors_features_in_float64():
    case = next(case for case in CASES if case['case'] == 'small_2x3x97x131_norm1')
    errors = golden_errors(golden_model(case), case, torch.float64)
    assert max(errors.values()) < 3e-7, errors


@pytest.mark.parametrize('extra_norm', [True, False])
@pytest.mark.parametrize('loss_name', ['projection', 'mean_sq'])
def test_gradients_match_the_authors(extra_norm, loss_name):
    reference = read_json('grad_norms_small.json')
    golden = next(
        case
        for case in reference['cases']
        if case['extra_norm'] == extra_norm and case['loss'] == loss_name
    )
    model = load_reference(ScalableViT('small', stage_norm='chained' if extra_norm else None))
    images = reference_input(reference['input_seed'], reference['input_shape']).requires_grad_()
    outs = model(images)
    if loss_name == 'mean_sq':
        loss = sum(out.square().mean() for out in outs)
    else:
        loss = sum(
            (out * reference_input(9000 + k, out.shape)).mean() for k, out in enumerate(outs)
        )
    loss.backward()

    assert loss.item() == pytest.approx(golden['loss_value'], rel=1e-5, abs=1e-6)
    norms = {name: p.grad.norm().item() for name, p in model.named_parameters()}
    assert norms.keys() == golden['grad_norms'].keys()
    zero = set(golden['fp32']['zero_grad_params'])
    largest = golden['fp32']['largest_norm']
    for name, norm in norms.items():
        if name in zero:
            assert norm < 1e-6 * largest, name
        else:
            assert norm == pytest.approx(golden['grad_norms'][name], rel=1e-4), name
    assert images.grad.norm().item() == pytest.approx(golden['input_grad_norm'], rel=1e-4)


@pytest.mark.parametrize('arch', ['small', 'base', 'large'])
def test_parameter_names_are_the_released_ones(arch):
    with torch.device('meta'):
        model = ScalableViT(arch, stage_norm=None, final_norm=True)
    released = read_json(f'state_dict_keys_{arch}.json')
    expected = {name: shape for name, shape in released.items() if not name.startswith('head.')}
    assert {name: list(t.shape) for name, t in model.state_dict().items()} == expected


@pytest.mark.parametrize(
    ('arch', 'millions'),
    [('small', 25_794_928), ('base', 74_627_952), ('large', 100_987_040)],
)
def test_parameter_counts(arch, millions):
    with torch.device('meta'):
        model = ScalableViT(arch)
    assert sum(p.numel() for p in model.parameters()) == millions


def test_norm_epsilons():
    eps = {
        name: module.eps
        for name, module in ScalableViT(dict(TINY_EVEN)).named_modules()
        if isinstance(module, nn.LayerNorm)
    }
    assert {value for name, value in eps.items() if 'norm_act' in name} == {1e-5}
    assert {value for name, value in eps.items() if 'norm_act' not in name} == {1e-6}


@pytest.mark.parametrize('alias', ['s', 'S', 'Small'])
def test_arch_aliases(alias):
    with torch.device('meta'):
        assert ScalableViT(alias).arch_settings == ScalableViT('small').arch_settings


SIZES = [(1, 1), (1, 200), (37, 2), (28, 28), (29, 31), (64, 64), (97, 131), (130, 33)]


@pytest.mark.parametrize('size', SIZES, ids=str)
@pytest.mark.parametrize('kv', ['separate', 'merged'])
def test_any_size_equals_the_plain_formulas(size, kv):
    arch = dict(TINY_EVEN, ssa_kv=kv)
    model = ScalableViT(arch).double()
    load_reference(model)
    images = reference_input(7, (2, 3, *size)).double()
    with torch.no_grad():
        outs = model(images)
        expected = plain_forward(model.state_dict(), arch, images)
    sides = [math.ceil(side / 4) for side in size]
    for out, want in zip(outs, expected, strict=True):
        assert out.shape[-2:] == torch.Size(sides)
        assert relative_error(out, want) < 1e-12
        sides = [math.ceil(side / 2) for side in sides]


@pytest.mark.parametrize('stage_norm', ['chained', 'output', None])
@pytest.mark.parametrize('final_norm', [False, True])
def test_norm_variants_equal_the_plain_formulas(stage_norm, final_norm):
    model = ScalableViT(dict(TINY_EVEN), stage_norm=stage_norm, final_norm=final_norm).double()
    load_reference(model)
    images = reference_input(8, (1, 3, 61, 75)).double()
    with torch.no_grad():
        outs = model(images)
        expected = plain_forward(model.state_dict(), TINY_EVEN, images, stage_norm, final_norm)
    for out, want in zip(outs, expected, strict=True):
        assert relative_error(out, want) < 1e-12


@pytest.mark.parametrize('out_indices', [(0,), (1,), (0, 2), [2, 3], (1, 3), (0, 1, 2, 3)])
@pytest.mark.parametrize('stage_norm', ['chained', 'output', None])
def test_out_indices_select_maps_and_use_every_parameter(out_indices, stage_norm):
    torch.manual_seed(0)
    full = tiny(stage_norm=stage_norm).eval()
    part = ScalableViT(dict(TINY_EVEN), out_indices=out_indices, stage_norm=stage_norm).eval()
    wanted = part.state_dict().keys()
    part.load_state_dict({k: v for k, v in full.state_dict().items() if k in wanted})
    images = torch.rand(1, 3, 40, 56)
    outs = part(images)
    for out, index in zip(outs, out_indices, strict=True):
        assert torch.equal(out, full(images)[index])
    sum((out * torch.rand_like(out)).sum() for out in outs).backward()
    assert [n for n, p in part.named_parameters() if p.grad is None] == []


def test_outputs_are_contiguous_nchw():
    images = torch.rand(2, 3, 50, 70)
    model = tiny().eval()
    outs = model(images)
    assert all(out.is_contiguous() for out in outs)
    for other in (images.contiguous(memory_format=torch.channels_last), images.mT.contiguous().mT):
        for out, again in zip(outs, model(other), strict=True):
            torch.testing.assert_close(again, out)


def test_in_channels():
    model = tiny(in_channels=5)
    assert model(torch.rand(1, 5, 33, 33))[0].shape == (1, 16, 9, 9)
    with pytest.raises(ValueError, match='in_channels=5'):
        model(torch.rand(1, 3, 33, 33))


@pytest.mark.parametrize('shape', [(3, 32, 32), (1, 4, 32, 32), (1, 3, 0, 32), (0, 3, 32, 32)])
def test_wrong_input_shape_is_refused(shape):
    with pytest.raises(ValueError, match=r'\(B, 3, H, W\)'):
        tiny()(torch.rand(shape))


@pytest.mark.parametrize('frozen_stages', range(-1, 5))
def test_frozen_stages_stay_frozen(frozen_stages):
    model = load_reference(tiny(frozen_stages=frozen_stages))
    model.train()
    frozen = {'patch_embeds.0.'} if frozen_stages >= 0 else set()
    for i in range(frozen_stages):
        frozen |= {f'{part}.{i}.' for part in ('patch_embeds', 'pos_block', 'stages', 'norm_list')}
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad != name.startswith(tuple(frozen)), name
    for name, module in model.named_modules():
        inside = f'{name}.'.startswith(tuple(frozen)) if frozen else False
        leaf = not list(module.children())
        if leaf:
            assert module.training != inside, name

    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters())
    loss = sum((out * torch.rand_like(out)).sum() for out in model(torch.rand(2, 3, 64, 64)))
    if frozen_stages < 4:
        loss.backward()
        optimizer.step()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == name.startswith(tuple(frozen)), name


def test_frozen_stages_are_deterministic_in_training():
    model = tiny(frozen_stages=2, drop_rate=0.5, drop_path_rate=0.5, out_indices=(0, 1)).train()
    images = torch.rand(1, 3, 64, 64)
    for first, second in zip(model(images), model(images), strict=True):
        assert torch.equal(first, second)


def test_norm_eval_keeps_batch_norm_in_eval_mode():
    model = tiny(norm_eval=True)
    model.add_module('extra', nn.BatchNorm2d(4))
    assert model.train() is model
    assert model.training
    assert not model.extra.training


def test_drop_path_rates_grow_linearly():
    model = tiny(drop_path_rate=0.4)
    rates = [block.drop_path.drop_prob for stage in model.stages for block in stage]
    assert rates == pytest.approx([0.4 * i / 8 for i in range(9)])


@pytest.mark.parametrize('rate', ['drop_rate', 'attn_drop_rate', 'drop_path_rate'])
def test_dropout_acts_in_training_only(rate):
    model = tiny(**{rate: 0.5})
    images = torch.rand(2, 3, 64, 64)
    torch.manual_seed(0)
    noisy = [model.train()(images)[-1] for _ in range(2)]
    quiet = [model.eval()(images)[-1] for _ in range(2)]
    assert not torch.equal(*noisy)
    assert torch.equal(*quiet)


def test_checkpointing_equals_plain():
    images = torch.rand(1, 3, 64, 96)
    results = []
    for with_cp in (False, True):
        torch.manual_seed(0)
        model = tiny(with_cp=with_cp, drop_path_rate=0.3, drop_rate=0.1).train()
        torch.manual_seed(1)
        outs = model(images)
        sum((out * (k + 1)).square().mean() for k, out in enumerate(outs)).backward()
        results.append((outs, [p.grad for p in model.parameters()]))
    (outs, grads), (outs_cp, grads_cp) = results
    for value, expected in zip((*outs_cp, *grads_cp), (*outs, *grads), strict=True):
        torch.testing.assert_close(value, expected)


def test_checkpointing_recomputes_every_block():
    model = tiny(with_cp=True).train()
    calls = []
    for stage in model.stages:
        for block in stage:
            block.register_forward_pre_hook(lambda module, _: calls.append(module))
    sum(out.sum() for out in model(torch.rand(1, 3, 32, 32))).backward()
    blocks = sum(len(stage) for stage in model.stages)
    assert len(calls) == 2 * blocks
    assert len(set(calls)) == blocks


def test_initialization_from_scratch():
    model = ScalableViT('small', out_indices=(0, 1))
    before = {n: p.clone() for n, p in model.named_parameters()}
    torch.manual_seed(0)
    model.init_weights()
    for name, parameter in model.named_parameters():
        if name.endswith('bias'):
            assert not parameter.any(), name
        elif parameter.ndim == 1:
            assert (parameter == 1).all(), name
        else:
            assert not torch.equal(parameter, before[name]), name
    std = {n: p.std().item() for n, p in model.named_parameters() if p.ndim > 1}
    assert std['stages.1.0.mlp.fc1.weight'] == pytest.approx(0.02, rel=0.05)
    assert std['patch_embeds.0.proj.weight'] == pytest.approx(math.sqrt(2 / (49 * 64)), rel=0.05)
    # Depthwise: every output channel has a fan out of the kernel's area alone.
    assert std['stages.0.1.attn.reduction.0.weight'] == pytest.approx(math.sqrt(2 / 64), rel=0.05)


def test_initialization_by_other_init_cfg():
    model = ScalableViT(
        dict(TINY_EVEN), init_cfg=dict(type='Constant', layer='Linear', val=0.5, bias=0.25)
    )
    model.init_weights()
    assert (model.stages[0][0].mlp.fc1.weight == 0.5).all()
    assert (model.norm_list[0].weight == 1).all()


@pytest.mark.parametrize('scope', ['mmengine', 'mmdet', 'mmseg', 'mmpretrain'])
def test_registered_under_every_default_scope(scope):
    registry = MODELS
    if scope != 'mmengine':
        # With mmcv-lite the models of mmdet and mmseg cannot be imported.
        pytest.importorskip(f'{scope}.models')
        registry = importlib.import_module(f'{scope}.registry').MODELS
    with MODELS.switch_scope_and_registry(scope):
        model = registry.build(dict(type='ScalableViT', arch=TINY_EVEN))
    assert type(model) is ScalableViT


BAD_ARGUMENTS = {
    'unknown arch': (dict(arch='tiny'), ValueError, "arch .*'small'.*'tiny'"),
    'arch of wrong type': (dict(arch=3), TypeError, 'arch must be a name or a dict, got int'),
    'missing arch key': (
        dict(arch={k: v for k, v in TINY.items() if k != 'sr_ratios'}),
        ValueError,
        r"missing: \['sr_ratios'\]",
    ),
    'unknown arch key': (dict(arch=dict(TINY, window=7)), ValueError, r"unknown: \['window'\]"),
    'three stages': (
        dict(arch=dict(TINY, depths=(2, 2, 2))),
        ValueError,
        r"arch\['depths'\] must be 4 positive integers",
    ),
    'zero depth': (dict(arch=dict(TINY, depths=(2, 0, 2, 2))), ValueError, r"arch\['depths'\]"),
    'float width': (
        dict(arch=dict(TINY, embed_dims=(8.5, 16, 24, 32))),
        ValueError,
        r"arch\['embed_dims'\]",
    ),
    'heads do not divide': (
        dict(arch=dict(TINY_EVEN, num_heads=(2, 3, 4, 4))),
        ValueError,
        r"arch\['num_heads'\]\[1\]=3 does not divide arch\['embed_dims'\]\[1\]=16",
    ),
    'heads do not divide the scaled width': (
        dict(arch=dict(TINY_EVEN, num_heads=(16, 2, 4, 4))),
        ValueError,
        r"arch\['num_heads'\]\[0\]=16 does not divide SSA's width .* = 20",
    ),
    'c_ratio without reduction': (
        dict(arch=dict(TINY_EVEN, c_ratios=(1, 1, 1, 2))),
        ValueError,
        r"arch\['c_ratios'\]\[3\] must be 1",
    ),
    'unknown ssa_kv': (dict(arch=dict(TINY, ssa_kv='both')), ValueError, r"arch\['ssa_kv'\]"),
    'out_indices out of range': (dict(out_indices=(0, 4)), ValueError, 'out_indices .*0 to 3'),
    'out_indices negative': (dict(out_indices=(-1,)), ValueError, 'out_indices'),
    'out_indices unordered': (dict(out_indices=(2, 0)), ValueError, 'ascending'),
    'out_indices twice': (dict(out_indices=(1, 1)), ValueError, 'out_indices'),
    'out_indices empty': (dict(out_indices=()), ValueError, 'at least one'),
    'out_indices number': (dict(out_indices=3), TypeError, 'out_indices must be a sequence'),
    'in_channels zero': (dict(in_channels=0), ValueError, 'in_channels'),
    'in_channels text': (dict(in_channels='3'), TypeError, 'in_channels'),
    'stage_norm': (dict(stage_norm='LN'), ValueError, "stage_norm .*'chained', 'output' or None"),
    'final_norm without stage 3': (
        dict(final_norm=True, out_indices=(0,)),
        ValueError,
        'final_norm needs stage 3',
    ),
    'drop_path_rate': (dict(drop_path_rate=1.0), ValueError, r'drop_path_rate must be in \[0, 1\)'),
    'drop_rate': (dict(drop_rate=-0.1), ValueError, 'drop_rate'),
    'attn_drop_rate': (dict(attn_drop_rate='0'), TypeError, 'attn_drop_rate'),
    'frozen_stages': (dict(frozen_stages=5), ValueError, 'frozen_stages must be .* -1 to 4'),
    'frozen_stages text': (dict(frozen_stages='1'), TypeError, 'frozen_stages'),
}


@pytest.mark.parametrize(('kwargs', 'error', 'text'), BAD_ARGUMENTS.values(), ids=BAD_ARGUMENTS)
def test_bad_arguments_are_named(kwargs, error, text):
    kwargs = dict(dict(arch=TINY_EVEN), **kwargs)
    with pytest.raises(error, match=text):
        ScalableViT(**kwargs)


def test_arch_zoo_serializes_to_json():
    """A name and the dict it stands for build the same model, as configs are dumped to text."""
    for name, arch in ScalableViT.arch_zoo.items():
        with torch.device('meta'):
            again = ScalableViT(json.loads(json.dumps(arch)))
            assert again.arch_settings == ScalableViT(name).arch_settings
