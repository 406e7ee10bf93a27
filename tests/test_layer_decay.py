# Copyright (c) mmscalablevit contributors. All rights reserved.
"""Layer-wise learning-rate decay: the rate of every parameter."""

import argparse
import logging
import re
from pathlib import Path

import pytest
import torch
from mmengine.config import Config, DictAction
from mmengine.logging import MMLogger
from mmengine.model import BaseModel, MMDistributedDataParallel
from mmengine.optim import build_optim_wrapper
from mmengine.registry import (
    MODELS,
    PARAM_SCHEDULERS,
    init_default_scope,
)
from torch import nn

from mmscalablevit import ScalableViT, cli

CONFIGS = Path(__file__).parents[1] / 'configs'
DETECTION = 'detection/mask-rcnn_scalablevit-s_fpn_layer-decay-1x_coco.py'
SEGMENTATION = 'segmentation/scalablevit-s_upernet_8xb2-layer-decay-160k_ade20k-512x512.py'
CLASSIFICATION = 'classification/scalablevit-s_8xb128_in1k.py'
CONSTRUCTOR = 'LayerDecayOptimWrapperConstructor'
OPTIONS = [
    f'optim_wrapper.constructor={CONSTRUCTOR}',
    'optim_wrapper.paramwise_cfg.layer_decay_rate=0.9',
]
# Seven blocks: the stem is 8 layers below the head.
ARCH = dict(
    embed_dims=(8, 8, 16, 16),
    num_heads=(1, 1, 2, 2),
    depths=(2, 1, 3, 1),
    c_ratios=(1, 1, 1, 1),
    sr_ratios=(8, 4, 2, 1),
    window_sizes=(7, 7, 7, 7),
    mlp_ratios=(1, 1, 1, 1),
    ssa_kv='merged',
)
LAYERS_BELOW_HEAD = {
    'patch_embeds.0': 8,
    'pos_block.0': 7,
    'stages.0.0': 7,
    'stages.0.1': 6,
    'norm_list.0': 6,
    'patch_embeds.1': 5,
    'pos_block.1': 5,
    'stages.1.0': 5,
    'norm_list.1': 5,
    'patch_embeds.2': 4,
    'pos_block.2': 4,
    'stages.2.0': 4,
    'stages.2.1': 3,
    'stages.2.2': 2,
    'norm_list.2': 2,
    'patch_embeds.3': 1,
    'pos_block.3': 1,
    'stages.3.0': 1,
    'norm_list.3': 1,
    'norm': 1,
}
NORMS = (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._BatchNorm)


class Model(BaseModel):
    """A backbone and a head, as every toolbox's models have them."""

    def __init__(self, backbone=None):
        super().__init__()
        if backbone is not None:
            self.backbone = backbone
        self.head = nn.Linear(16, 2)

    def forward(self, inputs, data_samples=None, mode='loss'):
        x = self.backbone(inputs)[-1].mean((2, 3))
        return dict(loss=self.head(x).square().mean())


def tiny(**kwargs):
    return Model(ScalableViT(ARCH, **kwargs))


def wrapper_of(model, lr=1e-4, weight_decay=0.05, type='OptimWrapper', optimizer=None, **paramwise):
    return build_optim_wrapper(
        model,
        dict(
            type=type,
            optimizer=optimizer or dict(type='AdamW', lr=lr, weight_decay=weight_decay),
            constructor=CONSTRUCTOR,
            paramwise_cfg=paramwise,
        ),
    )


def settings(model, wrapper):
    """Learning rate and weight decay of each parameter in the optimizer, by name."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = wrapper.optimizer.param_groups
    found = [
        (names[id(parameter)], (group['lr'], group['weight_decay']))
        for group in groups
        for parameter in group['params']
    ]
    assert len(dict(found)) == len(found)
    return dict(found)


def layers_below_head(name):
    if not name.startswith('backbone.'):
        return 0
    name = name.removeprefix('backbone.')
    return next(n for part, n in LAYERS_BELOW_HEAD.items() if name.startswith(f'{part}.'))


def without_decay(model):
    norms = [name for name, module in model.named_modules() if isinstance(module, NORMS)]
    return {
        name
        for name, _ in model.named_parameters()
        if name.rpartition('.')[0] in norms or '.pos_block.' in name
    }


def needs_operators():
    pytest.importorskip('mmcv._ext', reason='mmdet and mmseg need the compiled operators of mmcv')


def model_of(cfg, widths):
    cfg.model.backbone.arch = ARCH
    cfg.merge_from_dict(widths)
    init_default_scope(cfg.default_scope)
    return MODELS.build(cfg.model)


@pytest.mark.parametrize(
    ('name', 'widths', 'lr', 'decay'),
    [
        (DETECTION, {'model.neck.in_channels': [8, 8, 16, 16]}, 1e-4, 0.05),
        (
            SEGMENTATION,
            {
                'model.decode_head.in_channels': [8, 8, 16, 16],
                'model.auxiliary_head.in_channels': 16,
                'model.decode_head.channels': 8,
                'model.auxiliary_head.channels': 8,
            },
            6e-5,
            0.01,
        ),
    ],
)
def test_configs(name, widths, lr, decay):
    needs_operators()
    cfg = Config.fromfile(CONFIGS / name)
    model = model_of(cfg, widths)
    found = settings(model, build_optim_wrapper(model, cfg.optim_wrapper))

    exempt = without_decay(model)
    wanted = {
        name: (lr * 0.9 ** layers_below_head(name), 0 if name in exempt else decay)
        for name, _ in model.named_parameters()
    }
    assert found.keys() == wanted.keys()
    for name, values in wanted.items():
        assert found[name] == pytest.approx(values, rel=1e-12), name
    assert {layers_below_head(name) for name in wanted} == set(range(9))
    stem = found['backbone.patch_embeds.0.proj.weight'][0]
    assert stem == pytest.approx({1e-4: 4.3046721e-05, 6e-5: 2.58280326e-05}[lr])


def test_classifier():
    pytest.importorskip('mmpretrain')
    cfg = Config.fromfile(CONFIGS / CLASSIFICATION)
    cfg.merge_from_dict(parse(OPTIONS))
    lr, decay = cfg.optim_wrapper.optimizer.lr, cfg.optim_wrapper.optimizer.weight_decay
    model = model_of(cfg, {'model.head.in_channels': 16})
    found = settings(model, build_optim_wrapper(model, cfg.optim_wrapper))

    assert 'backbone.norm.weight' in found
    assert found.keys() == dict(model.named_parameters()).keys()
    for name, (rate, _) in found.items():
        assert rate == pytest.approx(lr * 0.9 ** layers_below_head(name), rel=1e-12), name
    assert found['backbone.stages.2.1.mlp.fc1.weight'][1] == decay


def test_frozen_parameters_stay_out_of_the_optimizer():
    model = tiny(frozen_stages=2)
    found = settings(model, wrapper_of(model, layer_decay_rate=0.5))

    assert all(layers_below_head(name) < 5 for name in found)
    assert found['backbone.patch_embeds.2.proj.weight'][0] == 1e-4 / 16
    assert found['head.bias'][0] == 1e-4


@pytest.mark.parametrize(
    ('out_indices', 'below'),
    [
        ((0,), {'patch_embeds.0': 3, 'stages.0.0': 2, 'stages.0.1': 1, 'norm_list.0': 1}),
        ((0, 2), {'patch_embeds.0': 7, 'stages.1.0': 4, 'pos_block.2': 3, 'stages.2.2': 1}),
        ((1, 3), {'patch_embeds.0': 8, 'norm_list.1': 5, 'pos_block.3': 1, 'stages.3.0': 1}),
    ],
)
def test_only_built_stages_count(out_indices, below):
    model = tiny(out_indices=out_indices)
    found = settings(model, wrapper_of(model, layer_decay_rate=0.5))

    for part, layers in below.items():
        rates = {rate for name, (rate, _) in found.items() if name.startswith(f'backbone.{part}.')}
        assert rates == {1e-4 * 0.5**layers}, part
    assert found['head.weight'][0] == 1e-4


def test_norm_of_outputs_alone():
    model = tiny(stage_norm='output', out_indices=(1, 3))
    found = settings(model, wrapper_of(model, layer_decay_rate=0.5))

    assert found['backbone.norm_list.1.weight'][0] == 1e-4 * 0.5**5
    assert found['backbone.norm_list.3.weight'][0] == 1e-4 * 0.5
    assert 'backbone.norm_list.0.weight' not in found


@pytest.mark.parametrize(
    'paramwise',
    [
        dict(norm_decay_mult=0.0),
        dict(bias_decay_mult=0.0, bias_lr_mult=2.0),
        dict(custom_keys={'stages.2': dict(lr_mult=0.1), 'pos_block': dict(decay_mult=0.0)}),
        dict(custom_keys={'head': dict(lr_mult=10.0, decay_mult=2.0)}, norm_decay_mult=0.5),
    ],
)
def test_other_options_keep_their_meaning(paramwise):
    model = tiny()
    plain = build_optim_wrapper(
        model,
        dict(optimizer=dict(type='AdamW', lr=1e-4, weight_decay=0.05), paramwise_cfg=paramwise),
    )
    undecayed = settings(model, plain)
    found = settings(model, wrapper_of(model, layer_decay_rate=0.5, **paramwise))

    assert found.keys() == undecayed.keys()
    for name, (lr, weight_decay) in undecayed.items():
        wanted = (lr * 0.5 ** layers_below_head(name), weight_decay)
        assert found[name] == pytest.approx(wanted, rel=1e-12), name
    assert settings(model, wrapper_of(model, layer_decay_rate=1, **paramwise)) == undecayed


def test_duplicates_can_be_bypassed():
    model = tiny()
    model.twin = model.backbone.stages[3][0].mlp
    found = settings(model, wrapper_of(model, layer_decay_rate=0.5, bypass_duplicate=True))

    assert found.keys() == dict(model.named_parameters()).keys()
    assert found['backbone.stages.3.0.mlp.fc1.weight'][0] == 0.5e-4


def test_distributed_model(tmp_path):
    model = tiny()
    wanted = settings(model, wrapper_of(model, layer_decay_rate=0.7))
    torch.distributed.init_process_group(
        'gloo', init_method=f'file://{tmp_path}/store', rank=0, world_size=1
    )
    try:
        distributed = MMDistributedDataParallel(model)
        wrapper = wrapper_of(distributed, layer_decay_rate=0.7)
    finally:
        torch.distributed.destroy_process_group()

    assert settings(model, wrapper) == wanted


def test_same_rates_as_mmpretrain_gives_its_own_backbones():
    pytest.importorskip('mmpretrain.models')
    arch = dict(embed_dims=12, depths=[2, 1, 2, 1], num_heads=[1, 2, 2, 4])
    init_default_scope('mmpretrain')
    model = MODELS.build(
        dict(
            type='ImageClassifier',
            backbone=dict(type='SwinTransformer', arch=arch),
            neck=dict(type='GlobalAveragePooling'),
            head=dict(type='LinearClsHead', num_classes=3, in_channels=96),
        )
    )
    theirs = build_optim_wrapper(
        model,
        dict(
            optimizer=dict(type='AdamW', lr=1e-4, weight_decay=0.05),
            constructor='LearningRateDecayOptimWrapperConstructor',
            paramwise_cfg=dict(layer_decay_rate=0.8, norm_decay_mult=0.0),
        ),
    )
    ours = wrapper_of(model, layer_decay_rate=0.8, norm_decay_mult=0.0)

    found, wanted = settings(model, ours), settings(model, theirs)
    assert found.keys() == wanted.keys()
    for name in wanted:
        assert found[name] == pytest.approx(wanted[name], rel=1e-12), name
    assert min(rate for rate, _ in found.values()) == pytest.approx(1e-4 * 0.8**7)


def test_mixed_precision_trains():
    torch.manual_seed(0)
    model = tiny()
    wrapper = wrapper_of(model, lr=1.0, type='CPUAmpOptimWrapper', layer_decay_rate=0.5)
    before = {name: value.clone() for name, value in model.named_parameters()}
    with wrapper.optim_context(model):
        loss = model(torch.rand(1, 3, 64, 64))['loss']
    # Far above the epsilon of AdamW.
    wrapper.update_params(loss * 1e6)

    # Without its weight decay, the first step of AdamW moves a value by the learning rate.
    for name, moved in model.named_parameters():
        rate = 0.5 ** layers_below_head(name)
        step = (moved - before[name] * (1 - 0.05 * rate)).abs().max().item()
        assert step == pytest.approx(rate, rel=0.01), name


def test_schedulers_keep_the_ratios():
    model = tiny()
    wrapper = wrapper_of(model, layer_decay_rate=0.5)
    init_default_scope('mmengine')
    schedulers = [
        PARAM_SCHEDULERS.build(dict(cfg, optimizer=wrapper))
        for cfg in (
            dict(type='LinearLR', start_factor=0.001, by_epoch=False, begin=0, end=5),
            dict(type='MultiStepLR', by_epoch=False, milestones=[8, 11], gamma=0.1),
        )
    ]
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    wrapper.optimizer.step()
    seen = []
    for _ in range(13):
        base = wrapper.get_lr()['base_lr'][0]
        seen.append(base)
        for group in wrapper.optimizer.param_groups:
            name = names[id(group['params'][0])]
            assert group['lr'] == pytest.approx(base * 0.5 ** layers_below_head(name), rel=1e-9)
        for scheduler in schedulers:
            scheduler.step()

    assert seen[0] == pytest.approx(1e-7)
    assert [seen[i] for i in (7, 10, 12)] == pytest.approx([1e-4, 1e-5, 1e-6])


def parse(options):
    parser = argparse.ArgumentParser()
    parser.add_argument('--cfg-options', nargs='+', action=DictAction)
    return parser.parse_args(['--cfg-options', *options]).cfg_options


@pytest.mark.parametrize('name', [DETECTION, SEGMENTATION])
def test_cfg_options_turn_a_plain_config_into_this_one(name):
    needs_operators()
    args = argparse.Namespace(
        config=str(CONFIGS / re.sub(r'layer-decay-', '', name)),
        cfg_options=parse(OPTIONS),
        work_dir=None,
        launcher='none',
    )

    assert cli.load_config(args).optim_wrapper == Config.fromfile(CONFIGS / name).optim_wrapper


@pytest.mark.parametrize(
    'name',
    [
        'detection/retinanet_scalablevit-s_fpn_1x_coco.py',
        'segmentation/scalablevit-s_fpn_4xb4-80k_ade20k-512x512.py',
    ],
)
def test_cfg_options_suit_a_config_without_paramwise_cfg(name):
    cfg = Config.fromfile(CONFIGS / name)
    assert not cfg.optim_wrapper.get('paramwise_cfg')
    cfg.merge_from_dict(parse(OPTIONS))
    model = tiny()

    found = settings(model, build_optim_wrapper(model, cfg.optim_wrapper))
    for name, (lr, weight_decay) in found.items():
        assert lr == pytest.approx(1e-4 * 0.9 ** layers_below_head(name)), name
        assert weight_decay == 1e-4


@pytest.mark.parametrize('name', [DETECTION, SEGMENTATION])
def test_configs_differ_from_the_plain_recipe_by_the_decay_alone(name):
    plain = Config.fromfile(CONFIGS / re.sub(r'layer-decay-', '', name)).to_dict()
    cfg = Config.fromfile(CONFIGS / name).to_dict()
    wrapper = cfg['optim_wrapper']

    assert wrapper.pop('constructor') == CONSTRUCTOR
    assert wrapper['paramwise_cfg'].pop('layer_decay_rate') == 0.9
    assert cfg == plain


class Opaque(nn.Linear):
    """A backbone whose layers are unknown."""


@pytest.mark.parametrize(
    ('paramwise', 'error', 'message'),
    [
        ({}, TypeError, 'paramwise_cfg.layer_decay_rate must be a number .* got None'),
        (dict(layer_decay_rate=True), TypeError, 'layer_decay_rate .* got True'),
        (dict(layer_decay_rate=0), ValueError, 'layer_decay_rate must be .* above 0 .* got 0'),
        (dict(layer_decay_rate=1.01), ValueError, 'up to 1, got 1.01'),
        (dict(layer_decay_rate=float('nan')), ValueError, 'layer_decay_rate .* got nan'),
        (
            dict(layer_decay_rate=0.9, decay_rate=0.9, num_layers=12),
            ValueError,
            r"paramwise_cfg has unknown keys \['decay_rate', 'num_layers'\]; allowed are .*norm_",
        ),
    ],
)
def test_invalid_options(paramwise, error, message):
    with pytest.raises(error, match=message):
        wrapper_of(Model(Opaque(1, 1)), **paramwise)


def test_errors_name_backbone_and_learning_rate():
    with pytest.raises(TypeError, match=r'backbone Opaque has no method get_layer_depth'):
        wrapper_of(Model(Opaque(1, 1)), layer_decay_rate=0.9)
    with pytest.raises(TypeError, match=r'Model\.backbone'):
        wrapper_of(Model(), layer_decay_rate=0.9)
    with pytest.raises(ValueError, match=r'optim_wrapper\.optimizer\.lr'):
        wrapper_of(tiny(), optimizer=dict(type='AdamW'), layer_decay_rate=0.9)
    with pytest.raises(ValueError, match=r"param_name 'backbone\.fc\.weight' is no parameter"):
        tiny().backbone.get_layer_depth('backbone.fc.weight', 'backbone.')


def test_log_is_a_summary():
    messages = []
    handler = logging.Handler(logging.INFO)
    handler.emit = lambda record: messages.append(record.getMessage())
    logger = MMLogger.get_current_instance()
    logger.addHandler(handler)
    try:
        wrapper_of(tiny(), layer_decay_rate=0.5, norm_decay_mult=0.0)
        assert len(messages) == 1
        assert 'rate 0.5, 9 different learning rates' in messages[0]
        assert 'Model with ScalableViT, from 0.00391 to 1 of the base rate 0.0001' in messages[0]
        # The default constructor keeps its own log.
        build_optim_wrapper(
            Model(),
            dict(optimizer=dict(type='AdamW', lr=1e-4), paramwise_cfg=dict(bias_lr_mult=2.0)),
        )
        assert 'paramwise_options -- head.bias:lr=0.0002' in messages[1:]
    finally:
        logger.removeHandler(handler)
