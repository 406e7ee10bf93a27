# Copyright (c) mmscalablevit contributors. All rights reserved.
"""Layer-wise learning-rate decay: the rate of every parameter."""

from pathlib import Path

import pytest
from golden import TINY
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, init_default_scope
from torch import nn

from mmscalablevit import ScalableViT

CONFIGS = Path(__file__).parents[1] / 'configs'
DETECTION = 'detection/mask-rcnn_scalablevit-s_fpn_layer-decay-1x_coco.py'
SEGMENTATION = 'segmentation/scalablevit-s_upernet_8xb2-layer-decay-160k_ade20k-512x512.py'
CLASSIFICATION = 'classification/scalablevit-s_8xb128_in1k.py'
CONSTRUCTOR = 'LayerDecayOptimWrapperConstructor'
ADAMW = dict(type='AdamW', lr=1e-4, weight_decay=0.05)
OPTIONS = {
    'optim_wrapper.constructor': CONSTRUCTOR,
    'optim_wrapper.paramwise_cfg.layer_decay_rate': 0.9,
}
RATE = dict(layer_decay_rate=0.9)
# Seven blocks: the stem is 8 layers below the head.
ARCH = dict(TINY, depths=(2, 1, 3, 1))
WIDTHS = list(TINY['embed_dims'])
UPERNET = {
    'model.decode_head.in_channels': WIDTHS,
    'model.auxiliary_head.in_channels': WIDTHS[2],
    'model.decode_head.channels': 8,
    'model.auxiliary_head.channels': 8,
}
# Of the parts of stages 0 to 3, and of their blocks.
LAYERS_BELOW_HEAD = dict(
    patch_embeds=(8, 5, 4, 1),
    pos_block=(7, 5, 4, 1),
    stages=((7, 6), (5,), (4, 3, 2), (1,)),
    norm_list=(6, 5, 2, 1),
)


class Model(nn.Module):
    """A backbone and a head, as every toolbox's models have them."""

    def __init__(self, backbone=None):
        super().__init__()
        if backbone is not None:
            self.backbone = backbone
        self.head = nn.Linear(32, 2)


def tiny(**kwargs):
    return Model(ScalableViT(ARCH, **kwargs))


def wrapper_of(model, constructor=CONSTRUCTOR, optimizer=ADAMW, **paramwise):
    cfg = dict(optimizer=optimizer, constructor=constructor, paramwise_cfg=paramwise)
    return build_optim_wrapper(model, cfg)


def settings(model, wrapper):
    """Learning rate and weight decay of each parameter in the optimizer, by name."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        # Each once.
        names.pop(id(parameter)): (group['lr'], group['weight_decay'])
        for group in wrapper.optimizer.param_groups
        for parameter in group['params']
    }


def layers_below_head(name):
    part, *place = name.removeprefix('backbone.').split('.')
    if not name.startswith('backbone.') or part == 'norm':
        return int(name.startswith('backbone.'))
    layers = LAYERS_BELOW_HEAD[part][int(place[0])]
    return layers[int(place[1])] if part == 'stages' else layers


# Of their weight decay: tests/test_configs.py and test_classification.py.
@pytest.mark.parametrize(
    ('name', 'options', 'stem'),
    [
        (DETECTION, {'model.neck.in_channels': WIDTHS}, 4.3046721e-05),
        (SEGMENTATION, UPERNET, 2.58280326e-05),
        (CLASSIFICATION, {**OPTIONS, 'model.head.in_channels': WIDTHS[3]}, 4.3046721e-04),
    ],
)
def test_rates_of_configs(name, options, stem):
    cfg = Config.fromfile(CONFIGS / name)
    if name == CLASSIFICATION:
        pytest.importorskip('mmpretrain')
    else:
        pytest.importorskip('mmcv._ext', reason='mmdet and mmseg need the operators of mmcv')
    cfg.model.backbone.arch = ARCH
    cfg.merge_from_dict(options)
    init_default_scope(cfg.default_scope)
    model = MODELS.build(cfg.model)
    found = settings(model, build_optim_wrapper(model, cfg.optim_wrapper))

    assert found.keys() == dict(model.named_parameters()).keys()
    lr = cfg.optim_wrapper.optimizer.lr
    for name, (rate, _) in found.items():
        assert rate == pytest.approx(lr * 0.9 ** layers_below_head(name), rel=1e-12), name
    assert {layers_below_head(name) for name in found} == set(range(9))
    assert found['backbone.patch_embeds.0.proj.weight'][0] == pytest.approx(stem)


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
        ((1, 3), {'patch_embeds.0': 8, 'norm_list.1': 5, 'norm_list.3': 1, 'stages.3.0': 1}),
    ],
)
@pytest.mark.parametrize('stage_norm', ['chained', 'output'])
def test_only_what_is_built_counts(out_indices, below, stage_norm):
    model = tiny(out_indices=out_indices, stage_norm=stage_norm)
    found = settings(model, wrapper_of(model, layer_decay_rate=0.5))

    for part, layers in below.items():
        rates = {rate for name, (rate, _) in found.items() if name.startswith(f'backbone.{part}.')}
        assert rates == {1e-4 * 0.5**layers}, part
    assert found['head.weight'][0] == 1e-4


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
    plain = wrapper_of(model, 'DefaultOptimWrapperConstructor', **paramwise)
    undecayed = settings(model, plain)
    found = settings(model, wrapper_of(model, layer_decay_rate=0.5, **paramwise))

    assert found.keys() == undecayed.keys()
    for name, (lr, weight_decay) in undecayed.items():
        wanted = (lr * 0.5 ** layers_below_head(name), weight_decay)
        assert found[name] == pytest.approx(wanted, rel=1e-12), name
    assert settings(model, wrapper_of(model, layer_decay_rate=1, **paramwise)) == undecayed


def test_distributed_model():
    model = tiny()
    # As what wraps it in a job of several processes, this has the model as its ``module``.
    wrapped = nn.DataParallel(model)
    assert settings(model, wrapper_of(wrapped, **RATE)) == settings(
        model, wrapper_of(model, **RATE)
    )


def test_same_rates_as_mmpretrain_gives_its_own_backbones():
    pytest.importorskip('mmpretrain.models')
    arch = dict(embed_dims=12, depths=[2, 1, 2, 1], num_heads=[1, 2, 2, 4])
    init_default_scope('mmpretrain')
    backbone = dict(type='SwinTransformer', arch=arch)
    head = dict(type='LinearClsHead', num_classes=3, in_channels=96)
    model = MODELS.build(dict(type='ImageClassifier', backbone=backbone, head=head))
    paramwise = dict(layer_decay_rate=0.8, norm_decay_mult=0.0)
    theirs = wrapper_of(model, 'LearningRateDecayOptimWrapperConstructor', **paramwise)
    ours = wrapper_of(model, **paramwise)

    found, wanted = settings(model, ours), settings(model, theirs)
    assert found.keys() == wanted.keys()
    for name in wanted:
        assert found[name] == pytest.approx(wanted[name], rel=1e-12), name
    assert min(rate for rate, _ in found.values()) == pytest.approx(1e-4 * 0.8**7)


@pytest.mark.parametrize('name', [DETECTION, SEGMENTATION])
def test_cfg_options_turn_a_plain_config_into_this_one(name):
    cfg = Config.fromfile(CONFIGS / name.replace('layer-decay-', ''))
    cfg.merge_from_dict(OPTIONS)

    assert cfg.to_dict() == Config.fromfile(CONFIGS / name).to_dict()


class Opaque(nn.Linear):
    """A backbone whose layers are unknown."""


INVALID = [
    ({}, TypeError, 'paramwise_cfg.layer_decay_rate must be a number .* got None'),
    (dict(layer_decay_rate=True), TypeError, 'layer_decay_rate .* got True'),
    (dict(layer_decay_rate=0), ValueError, 'layer_decay_rate must be .* above 0 .* got 0'),
    (dict(layer_decay_rate=1.01), ValueError, 'up to 1, got 1.01'),
    (dict(layer_decay_rate=float('nan')), ValueError, 'layer_decay_rate .* got nan'),
    (dict(RATE, num_layers=12), ValueError, r"unknown keys \['num_layers'\]; allowed .*norm_"),
    (RATE, TypeError, 'backbone Opaque has no method get_layer_depth'),
]


@pytest.mark.parametrize(('paramwise', 'error', 'message'), INVALID)
def test_invalid_options(paramwise, error, message):
    with pytest.raises(error, match=message):
        wrapper_of(Model(Opaque(1, 1)), **paramwise)


def test_errors_name_backbone_and_learning_rate():
    with pytest.raises(TypeError, match=r'Model\.backbone'):
        wrapper_of(Model(), **RATE)
    with pytest.raises(ValueError, match=r'optim_wrapper\.optimizer\.lr'):
        wrapper_of(tiny(), optimizer=dict(type='AdamW'), **RATE)
    with pytest.raises(ValueError, match=r"param_name 'backbone\.fc\.weight' is no parameter"):
        tiny().backbone.get_layer_depth('backbone.fc.weight', 'backbone.')


def test_log_is_a_summary(capsys):
    MMLogger.get_instance('summary', log_level='INFO')
    wrapper_of(tiny(), layer_decay_rate=0.5, norm_decay_mult=0.0)

    (message,) = capsys.readouterr().out.splitlines()
    assert 'rate 0.5, 9 different learning rates' in message
    assert 'Model with ScalableViT, from 0.00391 to 1 of the base rate 0.0001' in message
