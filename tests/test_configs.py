# Copyright (c) mmscalablevit contributors. All rights reserved.
"""Every config: what it says, its size, its schedule, which parameters decay."""

import copy
import functools
import importlib.util
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from config_cases import CONFIGS, DETECTION, OPERATORS, OURS, ROOT, enter, load, parse
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, PARAM_SCHEDULERS, init_default_scope
from torch import nn

METADATA = {
    model['Name']: model['Metadata']
    for path in (ROOT / 'configs').glob('*/metafile.yml')
    for model in yaml.safe_load(path.read_text())['Models']
}
# Class, arch, drop path rate and channels of the stages.
BACKBONES = {
    'scalablevit-s': ('ScalableViT', 'small', 0.2, [64, 128, 256, 512]),
    'scalablevit-b': ('ScalableViT', 'base', 0.3, [96, 192, 384, 768]),
    'scalablevit-l': ('ScalableViT', 'large', 0.3, [128, 256, 512, 1024]),
    'swin-t': ('SwinTransformer', None, 0.2, [96, 192, 384, 768]),
    'twins-svt-s': ('mmseg.SVT', None, 0.2, [64, 128, 256, 512]),
}
HEADS = {
    'mask-rcnn': 'MaskRCNN',
    'cascade-mask-rcnn': 'CascadeRCNN',
    'retinanet': 'RetinaNet',
    'dino-4scale': 'DINO',
    'fpn': 'FPNHead',
    'upernet': 'UPerHead',
    'mask2former': 'Mask2FormerHead',
}
# Millions of parameters in the paper's tables and the authors' README; Swin's in its repository.
# In the order of the backbones.
PUBLISHED = {
    'retinanet': ('36.4', '85.6', '112.6'),
    'mask-rcnn': ('46.3', '94.9', '121.4', '47.8'),
    'fpn': ('30.4', '79.0', '105.5'),
    'upernet': ('56.5', '107.0', '135.5', '59.9'),
}
# Learning rate, weight decay, and whether norms and position encodings are exempt from it.
RECIPES = {
    ('retinanet', '1x'): (1e-4, 1e-4, False),
    ('retinanet', '3x'): (1e-4, 0.05, True),
    ('mask-rcnn', '1x'): (1e-4, 0.05, True),
    ('mask-rcnn', '3x'): (1e-4, 0.05, True),
    ('cascade-mask-rcnn', '3x'): (1e-4, 0.05, True),
    ('dino-4scale', '12e'): (1e-4, 1e-4, False),
    ('fpn', '80k'): (1e-4, 1e-4, False),
    ('upernet', '160k'): (6e-5, 0.01, True),
    ('mask2former', '160k'): (1e-4, 0.05, True),
}
# Their backbones learn at a tenth of the rate.
SLOW_BACKBONE = ('dino-4scale', 'mask2former')
POSITIONS = re.compile(
    r'(^|\.)(pos_block|position_encodings|relative_position_bias_table'
    r'|query_embed|query_feat|level_embed)(\.|$)'
)
# Some parameters that must be among the exempt, found by reading each class.
EXEMPT = {
    'ScalableViT': 'norm_list.0.weight patch_embeds.0.norm.weight stages.0.0.norm1.weight '
    'stages.0.1.attn.norm_act.0.weight pos_block.0.proj.0.weight',
    'SwinTransformer': 'norm0.weight patch_embed.norm.bias stages.0.downsample.norm.weight '
    'stages.0.blocks.1.attn.w_msa.relative_position_bias_table',
    'mmseg.SVT': 'norm_list.0.weight layers.0.1.attn.norm.weight layers.1.0.norm2.bias '
    'position_encodings.0.proj.weight',
}
# Configs of the toolboxes that ours must equal but for backbone and input channels, and in what.
THEIRS = """
mask-rcnn_swin-t_fpn_1x_coco
    mmdet/configs/swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco
    model param_scheduler train_pipeline test_pipeline
mask-rcnn_scalablevit-s_fpn_ms-crop-3x_coco
    mmdet/configs/swin/mask-rcnn_swin-t-p4-w7_fpn_ms-crop-3x_coco
    model param_scheduler train_cfg train_pipeline
retinanet_scalablevit-s_fpn_1x_coco
    mmdet/configs/retinanet/retinanet_r50_fpn_1x_coco
    model param_scheduler train_pipeline test_pipeline tta_pipeline
cascade-mask-rcnn_scalablevit-s_fpn_ms-crop-3x_coco
    mmdet/configs/cascade_rcnn/cascade-mask-rcnn_r50_fpn_1x_coco
    model
dino-4scale_scalablevit-s_8xb2-12e_coco
    mmdet/configs/dino/dino-4scale_r50_8xb2-12e_coco
    model param_scheduler train_cfg train_pipeline clip_grad
scalablevit-s_mask2former_8xb2-160k_ade20k-512x512
    mmseg/configs/mask2former/mask2former_r50_8xb2-160k_ade20k-512x512
    model param_scheduler train_cfg train_pipeline clip_grad
swin-t_upernet_8xb2-160k_ade20k-512x512
    mmseg/configs/swin/swin-tiny-patch4-window7-in1k-pre_upernet_8xb2-160k_ade20k-512x512
    model param_scheduler train_cfg train_pipeline test_pipeline
"""


@functools.cache
def whole(name, **backbone):
    """The model of a config: without memory for its weights, but where building computes."""
    cfg = load(name)
    enter(cfg.default_scope)
    # A detector changes its config while it is built.
    model = copy.deepcopy(cfg.model)
    model.backbone.update(backbone)
    with torch.device('meta' if name in OURS else 'cpu'):
        return MODELS.build(model)


@pytest.mark.parametrize('name', CONFIGS)
def test_parameter_count(name):
    head, backbone, _, _ = parse(name)
    # The published figures count this variant of S, and so do those that the metafiles record.
    arch = dict(arch='small-merged') if backbone == 'scalablevit-s' else {}
    parameters = sum(parameter.numel() for parameter in whole(name, **arch).parameters())
    assert METADATA[Path(name).stem]['Parameters'] == round(parameters, -4)
    published = dict(zip(BACKBONES, PUBLISHED.get(head, ()), strict=False))
    if backbone in published:
        assert f'{parameters / 1e6:.1f}' == published[backbone]


@pytest.mark.parametrize('name', CONFIGS)
def test_weight_decay_of_each_parameter(name):
    head, _, tags, schedule = parse(name)
    lr, decay, exempt = RECIPES[head, schedule]
    model = whole(name)
    optimizer = build_optim_wrapper(model, copy.deepcopy(load(name).optim_wrapper)).optimizer
    norms = (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._BatchNorm)
    modules = [module for module in model.modules() if isinstance(module, norms)]
    exempted = {id(parameter) for module in modules for parameter in module.parameters()}
    exempted |= {id(value) for key, value in model.named_parameters() if POSITIONS.search(key)}
    groups = {id(value): group for group in optimizer.param_groups for value in group['params']}

    assert optimizer.__class__ is torch.optim.AdamW
    assert len(groups) == len(list(model.parameters()))
    for key, parameter in model.named_parameters():
        group = groups[id(parameter)]
        wanted = 0 if exempt and id(parameter) in exempted else decay
        assert (key, group['weight_decay']) == (key, wanted)
        assert group['betas'] == (0.9, 0.999)
        slow = head in SLOW_BACKBONE and key.startswith('backbone.')
        if 'decay' not in tags:
            assert (key, group['lr']) == (key, pytest.approx(lr / 10 if slow else lr))
    for key in EXEMPT[load(name).model.backbone.type].split():
        assert id(model.get_parameter(f'backbone.{key}')) in exempted, key


def test_learning_rates_of_semantic_fpn():
    """As the runner's schedulers give them; the other schedules equal those of the toolboxes."""
    cfg = load('segmentation/scalablevit-s_fpn_4xb4-80k_ade20k-512x512.py')
    init_default_scope('mmengine')
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=cfg.optim_wrapper.optimizer.lr)
    (settings,) = cfg.param_scheduler
    scheduler = PARAM_SCHEDULERS.build(dict(settings, optimizer=optimizer))
    rates = []
    for _ in range(cfg.train_cfg.max_iters):
        rates.append(optimizer.param_groups[0]['lr'])
        scheduler.step()

    wanted = 1e-6 + (1e-4 - 1e-6) * (1 - np.arange(80000) / 79999) ** 0.9
    np.testing.assert_allclose(rates, wanted, rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize('name', CONFIGS)
def test_name_says_what_the_config_holds(name):
    head, backbone, tags, schedule = parse(name)
    cfg = load(name)
    model = cfg.model
    found = model.backbone.type, model.backbone.get('arch'), model.backbone.drop_path_rate
    *wanted, widths = BACKBONES[backbone]

    assert list(found) == wanted
    weights = dict(type='Pretrained', checkpoint=f'scalablevit://{model.backbone.get("arch")}')
    assert model.backbone.get('init_cfg') == (weights if name in OURS else None)
    assert HEADS[head] in (model.type, model.get('decode_head', {}).get('type'))
    found = model.neck if 'neck' in model else model.decode_head
    assert found.in_channels == (widths[1:] if head == 'dino-4scale' else widths)
    assert cfg.auto_scale_lr.base_batch_size == 16
    assert not cfg.auto_scale_lr.enable
    assert cfg.optim_wrapper.type == 'OptimWrapper'
    constructor = cfg.optim_wrapper.get('constructor')
    assert constructor == ('LayerDecayOptimWrapperConstructor' if 'decay' in tags else None)
    if name in DETECTION:
        epochs, *steps = {'1x': (12, 8, 11), '3x': (36, 27, 33), '12e': (12, 11)}[schedule]
        assert cfg.train_cfg.max_epochs == epochs
        assert cfg.param_scheduler[-1].milestones == steps
        assert cfg.train_dataloader.batch_size == 2
        assert (schedule == '3x') == ('crop' in tags)
        return
    gpus, batch = re.fullmatch(r'(\d+)xb(\d+)', tags[0]).groups()
    assert cfg.train_dataloader.batch_size == int(batch)
    assert int(gpus) * int(batch) == cfg.auto_scale_lr.base_batch_size
    assert cfg.train_cfg.max_iters == int(schedule[:-1]) * 1000
    assert model.data_preprocessor.size == (512, 512)
    if head == 'upernet':
        assert model.auxiliary_head.in_channels == widths[2]
        assert model.auxiliary_head.in_index == 2


def parts_of(cfg):
    """The config as plain values, without what belongs to the backbone."""
    parts = cfg.to_dict()
    for key in ('backbone', 'embed_dims'):
        parts.pop(key)
    for key in ('type', 'arch', 'drop_path_rate', 'init_cfg'):
        parts['model']['backbone'].pop(key, None)
    for part in ('neck', 'decode_head', 'auxiliary_head'):
        parts['model'].get(part, {}).pop('in_channels', None)
    return parts


@pytest.mark.parametrize('name', [name for name in CONFIGS if name.count('scalablevit-s') == 0])
def test_only_the_backbone_differs_from_size_s(name):
    _, backbone, _, _ = parse(name)
    ours = parts_of(load(name.replace(backbone, 'scalablevit-s')))
    parts = parts_of(load(name))
    if backbone in ('swin-t', 'twins-svt-s'):
        parts['model'].pop('backbone')
        assert ours['model'].pop('backbone') == {}
    if backbone == 'twins-svt-s' and name in DETECTION:
        assert parts['custom_imports']['imports'].pop() == 'mmseg.models'
    assert parts == ours


def comparable(cfg, key):
    """A part of a config, with what may differ from the toolbox's taken out."""
    if key == 'clip_grad':
        return cfg.optim_wrapper.clip_grad
    if key in ('train_pipeline', 'test_pipeline'):
        steps = cfg[key.replace('pipeline', 'dataloader')].dataset.pipeline
        return [step for step in steps if step.type != 'LoadAnnotations']
    part = copy.deepcopy(cfg[key])
    if key == 'param_scheduler':
        # The order of the keys of a scheduler does not matter.
        return [dict(step) for step in part]
    if key == 'model':
        for name in ('backbone', 'pretrained'):
            part.pop(name, None)
        for name in ('neck', 'decode_head', 'auxiliary_head'):
            module = part.get(name, {})
            module.pop('in_channels', None)
            # BN and SyncBN: see the runtime's `sync_bn`.
            if 'BN' in module.get('norm_cfg', {}).get('type', ''):
                module.pop('norm_cfg')
    return part


@pytest.mark.parametrize(('ours', 'theirs', 'keys'), re.findall('(.+)\n +(.+)\n +(.+)', THEIRS))
def test_equals_the_config_of_the_toolbox(ours, theirs, keys):
    (ours,) = [name for name in CONFIGS if Path(name).stem == ours]
    toolbox, path = theirs.split('/', 1)
    file = Path(importlib.import_module(toolbox).__file__).parent / '.mim' / f'{path}.py'
    if not file.exists():
        pytest.skip(f'this installation of {toolbox} comes without its configs')
    theirs = Config.fromfile(file, import_custom_modules=OPERATORS)
    for key in keys.split():
        assert comparable(load(ours), key) == comparable(theirs, key), key


@pytest.mark.parametrize('name', CONFIGS)
def test_data_is_in_the_standard_places(name):
    cfg = load(name)
    train, val = cfg.train_dataloader.dataset, cfg.val_dataloader.dataset

    assert cfg.test_dataloader == cfg.val_dataloader
    coco = 'annotations/instances_{}2017.json'
    ade = dict(img_path='images', seg_map_path='annotations')
    if name in DETECTION:
        for dataset, part in ((train, 'train'), (val, 'val')):
            assert dataset.data_root == 'data/coco/'
            assert dataset.ann_file == coco.format(part)
            assert dataset.data_prefix.img == f'{part}2017/'
        assert cfg.val_evaluator.ann_file == 'data/coco/' + coco.format('val')
        assert cfg.val_evaluator.metric == (['bbox', 'segm'] if 'mask-rcnn' in name else 'bbox')
        return
    for dataset, part in ((train, 'training'), (val, 'validation')):
        assert dataset.data_root == 'data/ade/ADEChallengeData2016'
        assert dataset.data_prefix == {key: f'{folder}/{part}' for key, folder in ade.items()}
    assert cfg.val_evaluator == dict(type='IoUMetric', iou_metrics=['mIoU'])


def bases_of(path):
    return Config._get_base_files(str(path))


def depth(path):
    return 1 + max((depth(path.parent / base) for base in bases_of(path)), default=0)


@pytest.mark.parametrize('name', CONFIGS)
def test_runtime(name):
    cfg, path = load(name), ROOT / 'configs' / name

    # The other toolbox that a config needs, after the package, which must come first.
    head, backbone, _, _ = parse(name)
    others = ['mmdet.models'] if head == 'mask2former' else []
    if name in DETECTION and backbone == 'twins-svt-s':
        others = ['mmseg.models']
    assert cfg.custom_imports.imports == ['mmscalablevit', *others]
    assert cfg.custom_imports.allow_failed_imports is False
    assert cfg.default_scope == ('mmdet' if name in DETECTION else 'mmseg')
    assert cfg.load_from is None
    assert cfg.resume is False
    assert [backend.type for backend in cfg.vis_backends] == ['LocalVisBackend']
    assert cfg.default_hooks.checkpoint.max_keep_ckpts > 0
    assert depth(path) <= 3
    assert all('::' not in base for base in bases_of(path))
    assert len(path.read_text().splitlines()) <= 40
    # One process trains with plain BN; the runner makes it SyncBN where there are several.
    assert cfg.get('sync_bn') == (None if name in DETECTION else 'torch')
    assert 'SyncBN' not in str(cfg.to_dict())
