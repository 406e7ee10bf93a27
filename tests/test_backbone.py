# Copyright (c) mmscalablevit contributors. All rights reserved.
"""The backbone: golden values, gradients, sizes, arguments, freezing, initialization."""

import importlib
import json
import math

import pytest
import torch
from golden import TINY, golden_errors, golden_model, load_reference, read_json, reference_input
from mmengine.registry import MODELS
from torch import nn

from mmscalablevit import ScalableViT

CASES = [case for case in read_json('manifest.json')['cases'] if case['kind'] == 'dense']


def tiny(**kwargs):
    model = ScalableViT(dict(TINY), **kwargs)
    model.init_weights()
    return model


@pytest.mark.parametrize('case', CASES, ids=lambda case: case['case'])
def test_matches_the_authors_features(case):
    bounds = {torch.float32: 1e-5}
    if case['case'] == 'small_1x3x64x96_norm1':
        bounds[torch.float64] = 3e-7
    for dtype, bound in bounds.items():
        errors = golden_errors(golden_model(case), case, dtype)
        assert max(errors.values()) < bound, errors


@pytest.mark.parametrize('extra_norm', [True, False])
@pytest.mark.parametrize('loss_name', ['projection', 'mean_sq'])
def test_gradients_match_the_authors(extra_norm, loss_name):
    reference = read_json('grad_norms_small.json')
    (golden,) = (
        case
        for case in reference['cases']
        if (case['extra_norm'], case['loss']) == (extra_norm, loss_name)
    )
    model = load_reference(ScalableViT('small', stage_norm='chained' if extra_norm else None))
    images = reference_input(reference['input_seed'], reference['input_shape']).requires_grad_()
    outs = model(images)
    factors = outs
    if loss_name == 'projection':
        factors = [reference_input(9000 + k, out.shape) for k, out in enumerate(outs)]
    loss = sum((out * factor).mean() for out, factor in zip(outs, factors, strict=True))
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


def test_norm_epsilons():
    modules = ScalableViT(dict(TINY)).named_modules()
    norms = [(name, norm.eps) for name, norm in modules if isinstance(norm, nn.LayerNorm)]
    assert {('norm_act' in name, eps) for name, eps in norms} == {(True, 1e-5), (False, 1e-6)}


@pytest.mark.parametrize('out_indices', [(0,), [2, 3], (1, 3)])
@pytest.mark.parametrize('stage_norm', ['chained', 'output', None])
def test_out_indices_select_maps(out_indices, stage_norm):
    full = load_reference(ScalableViT(dict(TINY), stage_norm=stage_norm))
    part = load_reference(ScalableViT(dict(TINY), out_indices=out_indices, stage_norm=stage_norm))
    images = torch.rand(1, 3, 40, 56)
    for out, index in zip(part(images), out_indices, strict=True):
        assert torch.equal(out, full(images)[index])


def test_in_channels():
    assert tiny(in_channels=5)(torch.rand(1, 5, 33, 33))[0].shape == (1, 16, 9, 9)


@pytest.mark.parametrize('frozen_stages', range(-1, 5))
def test_frozen_stages_stay_frozen(frozen_stages):
    """No gradient, and no noise in training."""
    model = tiny(frozen_stages=frozen_stages, drop_rate=0.5, drop_path_rate=0.5).train()
    frozen = {'patch_embeds.0.'} if frozen_stages >= 0 else set()
    for i in range(frozen_stages):
        frozen |= {f'{part}.{i}.' for part in ('patch_embeds', 'pos_block', 'stages', 'norm_list')}
    images = torch.rand(2, 3, 64, 64)
    outs, again = model(images), model(images)
    for i, pair in enumerate(zip(outs, again, strict=True)):
        assert torch.equal(*pair) == (i < frozen_stages)
    if frozen_stages < 4:
        sum((out * torch.rand_like(out)).sum() for out in outs).backward()
    for name, parameter in model.named_parameters():
        is_frozen = name.startswith(tuple(frozen))
        assert parameter.requires_grad != is_frozen, name
        assert (parameter.grad is None) == is_frozen, name


def test_norm_eval_keeps_batch_norm_in_eval_mode():
    model = tiny(norm_eval=True)
    model.add_module('extra', nn.BatchNorm2d(4))
    assert model.train() is model
    assert model.training
    assert not model.extra.training


def test_drop_path_rates_grow_linearly():
    model = tiny(drop_path_rate=0.4)
    rates = [block.drop_path2.drop_prob for stage in model.stages for block in stage]
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
    results, calls = [], []
    for with_cp in (False, True):
        torch.manual_seed(0)
        model = tiny(with_cp=with_cp, drop_path_rate=0.3, drop_rate=0.1).train()
        for block in (block for stage in model.stages for block in stage if with_cp):
            block.register_forward_pre_hook(lambda module, _: calls.append(module))
        torch.manual_seed(1)
        outs = model(images)
        sum((out * (k + 1)).square().mean() for k, out in enumerate(outs)).backward()
        results.append([*outs, *(p.grad for p in model.parameters())])
    for value, expected in zip(*results, strict=True):
        torch.testing.assert_close(value, expected)
    assert len(calls) == 2 * len(set(calls)) == 2 * sum(TINY['depths'])


def test_initialization_from_scratch():
    model = ScalableViT('small', out_indices=(0, 1))
    before = {n: p.clone() for n, p in model.named_parameters()}
    torch.manual_seed(0)
    model.init_weights()
    for name, parameter in model.named_parameters():
        if name == 'patch_embeds.0.proj.bias':
            assert 0.05 < parameter.abs().max() <= 1 / math.sqrt(3 * 49), name
        elif name.endswith('bias'):
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


def test_padding_does_not_blow_up_the_gradients_of_a_model_from_scratch():
    torch.manual_seed(0)
    model, images = tiny(), torch.randn(1, 3, 64, 64)

    def norm(images):
        model.zero_grad()
        loss = sum((m * reference_input(k, m.shape)).mean() for k, m in enumerate(model(images)))
        loss.backward()
        return math.sqrt(sum(p.grad.square().sum().item() for p in model.parameters()))

    padded = images.clone()
    padded[..., 32:] = 0
    assert norm(padded) < 3 * norm(images)


def test_initialization_by_other_init_cfg():
    model = tiny(init_cfg=dict(type='Constant', layer='Linear', val=0.5, bias=0.25))
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
        model = registry.build(dict(type='ScalableViT', arch=TINY))
    assert type(model) is ScalableViT


def arch(**changes):
    return dict(arch=dict(TINY, **changes))


BAD_ARGUMENTS = [
    (dict(arch='smal'), ValueError, r"got 'smal'; did you mean 'small'\?"),
    (arch(window=7), ValueError, r"unknown: \['window'\]"),
    (arch(depths=(1,) * 5), ValueError, 'must be 4 positive integers, got .1, 1, 1'),
    (arch(depths=(True, 1, 1, 1)), ValueError, r"arch\['depths'\] .*got \(True"),
    (arch(num_heads=(0, 2, 4, 4)), ValueError, r"arch\['num_heads'\] must be 4 pos"),
    (arch(num_heads=(2, 3, 4, 4)), ValueError, r'\[1\]=3 does not divide arch.*\[1\]=16'),
    (arch(num_heads=(16, 2, 4, 4)), ValueError, r"\[0\]=16 does not divide SSA's width .* = 20"),
    (arch(c_ratios=(float('nan'), 1, 1, 1)), ValueError, r"'c_ratios'.*numbers"),
    (arch(c_ratios=(1, 1, 1, 2)), ValueError, r"arch\['c_ratios'\]\[3\] must be 1"),
    (arch(mlp_ratios=(0.01, 2, 2, 2)), ValueError, 'leaves the MLP no width'),
    (arch(ssa_kv=None), ValueError, "'separate' or 'merged', got None"),
    (dict(in_channels=True), TypeError, 'integer of at least 1, got True'),
    (dict(out_indices='0123'), TypeError, "out_indices .*got '0123'"),
    (dict(out_indices=(0, 4)), ValueError, 'out_indices .*0 to 3'),
    (dict(out_indices=(2, 0)), ValueError, 'ascending'),
    (dict(out_indices=()), ValueError, 'at least one'),
    (dict(final_norm='yes'), TypeError, 'final_norm must be True or False'),
    (dict(final_norm=True, out_indices=(0,)), ValueError, 'final_norm needs stage 3'),
    (dict(drop_rate=float('nan')), ValueError, r'drop_rate .*\[0, 1\), got nan'),
    (dict(frozen_stages=5), ValueError, 'frozen_stages must be .* -1 to 4'),
    (dict(frozen_stages=True), TypeError, 'frozen_stages'),
    (dict(droppath=0.1), TypeError, "argument 'droppath'"),
]


@pytest.mark.parametrize(('kwargs', 'error', 'text'), BAD_ARGUMENTS)
def test_bad_arguments_are_named(kwargs, error, text):
    with pytest.raises(error, match=text):
        ScalableViT(**dict(dict(arch=TINY), **kwargs))


BAD_IMAGES = [
    ((3, 32, 32), ValueError, r'\(B, 3, H, W\).*got \(3, 32, 32\)'),
    ((0, 3, 32, 32), ValueError, 'none of them empty'),
    ((1, 4, 32, 32), ValueError, 'in_channels=3'),
    ((1, 3, 32, 32), TypeError, 'got torch.uint8'),
]


@pytest.mark.parametrize(('shape', 'error', 'text'), BAD_IMAGES)
def test_bad_images_are_named(shape, error, text):
    dtype = torch.float32 if error is ValueError else torch.uint8
    with pytest.raises(error, match=text):
        ScalableViT(dict(TINY))(torch.zeros(shape, dtype=dtype))


def test_arch_zoo_serializes_to_json():
    """A name and the dict it stands for build the same model, as configs are dumped to text."""
    for name, arch in ScalableViT.arch_zoo.items():
        with torch.device('meta'):
            again = ScalableViT(json.loads(json.dumps(arch)))
            assert again.arch_settings == ScalableViT(name.title()).arch_settings
