# Copyright (c) mmscalablevit contributors. All rights reserved.
"""Every config: what it says, builds and trains."""

import ast
import copy
import functools
import importlib.util
import json
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from mmengine.config import Config, ConfigDict
from mmengine.dataset import pseudo_collate
from mmengine.optim import OptimWrapper, build_optim_wrapper
from mmengine.registry import MODELS, PARAM_SCHEDULERS, TRANSFORMS, init_default_scope
from torch import nn

import mmscalablevit  # noqa: F401
from mmscalablevit.models.arch import ARCH_ZOO

ROOT = Path(__file__).parents[1]
# mmcv-lite comes without them, and even importing the models of mmdet and mmseg needs them.
OPERATORS = importlib.util.find_spec('mmcv._ext') is not None
FOLDERS = ('detection', 'segmentation')
CONFIGS = sorted(
    str(path.relative_to(ROOT / 'configs'))
    for folder in FOLDERS
    for path in (ROOT / 'configs' / folder).glob('*.py')
)
DEMO = sorted(f'demo/{path.name}' for path in (ROOT / 'configs' / 'demo').glob('*.py'))
DETECTION = [name for name in CONFIGS if name.startswith('detection')]
SEGMENTATION = [name for name in CONFIGS if name.startswith('segmentation')]

OURS = [name for name in CONFIGS if 'scalablevit' in name]

ARCHS = {'scalablevit-s': 'small-merged', 'scalablevit-b': 'base', 'scalablevit-l': 'large'}
CLASSES = {
    **dict.fromkeys(ARCHS, 'ScalableViT'),
    'swin-t': 'SwinTransformer',
    'twins-svt-s': 'mmseg.SVT',
}
DROP_PATHS = {**dict.fromkeys(CLASSES, 0.2), 'scalablevit-b': 0.3, 'scalablevit-l': 0.3}
EMBED_DIMS = {
    'scalablevit-s': [64, 128, 256, 512],
    'scalablevit-b': [96, 192, 384, 768],
    'scalablevit-l': [128, 256, 512, 1024],
    'swin-t': [96, 192, 384, 768],
    'twins-svt-s': [64, 128, 256, 512],
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
PUBLISHED = {
    'retinanet': {'scalablevit-s': '36.4', 'scalablevit-b': '85.6', 'scalablevit-l': '112.6'},
    'mask-rcnn': {
        'scalablevit-s': '46.3',
        'scalablevit-b': '94.9',
        'scalablevit-l': '121.4',
        'swin-t': '47.8',
    },
    'fpn': {'scalablevit-s': '30.4', 'scalablevit-b': '79.0', 'scalablevit-l': '105.5'},
    'upernet': {
        'scalablevit-s': '56.5',
        'scalablevit-b': '107.0',
        'scalablevit-l': '135.5',
        'swin-t': '59.9',
    },
}
BEYOND_THE_PAPER = [
    ('cascade-mask-rcnn', 'scalablevit-s'),
    ('dino-4scale', 'scalablevit-s'),
    ('mask2former', 'scalablevit-s'),
]
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
    'ScalableViT': {
        'backbone.norm_list.0.weight',
        'backbone.norm_list.3.bias',
        'backbone.patch_embeds.0.norm.weight',
        'backbone.stages.0.0.norm1.weight',
        'backbone.stages.0.1.attn.norm_act.0.weight',
        'backbone.pos_block.0.proj.0.weight',
    },
    'SwinTransformer': {
        'backbone.norm0.weight',
        'backbone.patch_embed.norm.bias',
        'backbone.stages.0.downsample.norm.weight',
        'backbone.stages.0.blocks.1.attn.w_msa.relative_position_bias_table',
    },
    'mmseg.SVT': {
        'backbone.norm_list.0.weight',
        'backbone.layers.0.1.attn.norm.weight',
        'backbone.layers.1.0.norm2.bias',
        'backbone.position_encodings.0.proj.weight',
    },
}
MMDET_SWIN = 'mmdet/configs/swin/mask-rcnn_swin-t-p4-w7_fpn'
# Configs of the toolboxes that ours must equal but for backbone and input channels, and in what.
THEIRS = [
    (f'detection/{ours}', f'{theirs}.py', keys)
    for ours, theirs, keys in [
        ('mask-rcnn_swin-t_fpn_1x_coco.py', f'{MMDET_SWIN}_1x_coco', 'model param_scheduler'),
        (
            'mask-rcnn_scalablevit-s_fpn_ms-crop-3x_coco.py',
            f'{MMDET_SWIN}_ms-crop-3x_coco',
            'model param_scheduler train_cfg train_pipeline',
        ),
        (
            'retinanet_scalablevit-s_fpn_1x_coco.py',
            'mmdet/configs/retinanet/retinanet_r50_fpn_1x_coco',
            'model param_scheduler',
        ),
        (
            'cascade-mask-rcnn_scalablevit-s_fpn_ms-crop-3x_coco.py',
            'mmdet/configs/cascade_rcnn/cascade-mask-rcnn_r50_fpn_1x_coco',
            'model',
        ),
        (
            'dino-4scale_scalablevit-s_8xb2-12e_coco.py',
            'mmdet/configs/dino/dino-4scale_r50_8xb2-12e_coco',
            'model param_scheduler train_cfg train_pipeline clip_grad',
        ),
    ]
] + [
    (
        'segmentation/scalablevit-s_mask2former_8xb2-160k_ade20k-512x512.py',
        'mmseg/configs/mask2former/mask2former_r50_8xb2-160k_ade20k-512x512.py',
        'model param_scheduler train_cfg train_pipeline clip_grad',
    ),
    (
        'segmentation/swin-t_upernet_8xb2-160k_ade20k-512x512.py',
        'mmseg/configs/swin/swin-tiny-patch4-window7-in1k-pre_upernet_8xb2-160k_ade20k-512x512.py',
        'model param_scheduler train_cfg train_pipeline',
    ),
]


class Experiment(NamedTuple):
    """What a file name says, in the manner of mmdet or mmseg."""

    head: str
    backbone: str
    tags: list[str]
    schedule: str


def load(name):
    return Config.fromfile(ROOT / 'configs' / name, import_custom_modules=OPERATORS)


def enter(scope):
    if not OPERATORS:
        pytest.skip(f'the models of {scope} need the compiled operators of mmcv')
    init_default_scope(scope)


def parse(name):
    parts = Path(name).stem.split('_')
    if name.startswith('detection'):
        head, backbone, tags = parts[0], parts[1], parts[-2]
    else:
        backbone, head, tags = parts[:3]
    *tags, schedule = tags.split('-')
    return Experiment(head, backbone, tags, schedule)


def shallow(cfg):
    """The config with few layers, queries and points and small crops: the same parts, faster."""
    cfg = copy.deepcopy(cfg)
    model = cfg.model
    backbone = model.backbone
    if backbone.type != 'ScalableViT':
        backbone.depths = [2, 2, 2, 2]
    elif isinstance(backbone.arch, str):
        backbone.arch = dict(ARCH_ZOO[backbone.arch], depths=(2, 2, 2, 2))
    if 'size' in model.data_preprocessor:
        model.data_preprocessor.size = (64, 64)
    if model.type == 'DINO':
        # A small image has fewer positions than 900.
        model.num_queries = 50
        model.encoder.num_layers = model.decoder.num_layers = 2
    if model.get('decode_head', {}).get('type') == 'Mask2FormerHead':
        head = model.decode_head
        head.pixel_decoder.encoder.num_layers = head.transformer_decoder.num_layers = 2
        head.train_cfg.num_points = 256
    return cfg


def build(cfg, seed=0):
    torch.manual_seed(seed)
    enter(cfg.default_scope)
    model = MODELS.build(cfg.model)
    model.init_weights()
    return model


def num_classes(model_cfg):
    head = (
        model_cfg.get('decode_head') or model_cfg.get('bbox_head') or model_cfg.roi_head.bbox_head
    )
    return (head[0] if isinstance(head, list) else head).num_classes


def batch_of(cfg, size=64):
    classes = num_classes(cfg.model)
    if cfg.default_scope == 'mmdet':
        from mmdet.testing import demo_mm_inputs

        return demo_mm_inputs(
            2, (3, size, size + 16), num_items=[3, 2], num_classes=classes, with_mask=True
        )
    from mmengine.structures import PixelData
    from mmseg.structures import SegDataSample

    rng = np.random.default_rng(0)
    samples = []
    for _ in range(2):
        labels = torch.from_numpy(rng.integers(0, classes, (1, size, size)))
        sample = SegDataSample(
            gt_sem_seg=PixelData(data=labels),
            metainfo=dict(img_shape=(size, size), ori_shape=(size, size)),
        )
        image = torch.from_numpy(rng.integers(0, 256, (3, size, size), dtype=np.uint8))
        samples.append(dict(inputs=image, data_samples=sample))
    return pseudo_collate(samples)


class Trained(NamedTuple):
    """A shallow model after a loss, a backward pass and an optimizer step."""

    name: str
    cfg: Config
    model: nn.Module
    wrapper: OptimWrapper
    log: dict
    moved: set
    without_gradient: list


# One at a time: all of them would fill the memory. pytest runs its tests together.
@pytest.fixture(scope='module', params=[*CONFIGS, *DEMO])
def trained(request):
    cfg = shallow(load(request.param))
    model = build(cfg).train()
    options = copy.deepcopy(cfg.optim_wrapper)
    if options.type == 'AmpOptimWrapper':
        # As the tools do where there is no accelerator.
        options.type = 'CPUAmpOptimWrapper'
    wrapper = build_optim_wrapper(model, options)
    data = model.data_preprocessor(batch_of(cfg), training=True)
    with wrapper.optim_context(model):
        loss, log = model.parse_losses(model(**data, mode='loss'))
    wrapper.backward(loss)
    # Where the gradient is: most others move by their decay alone.
    gradients = {key: value.grad for key, value in model.named_parameters()}
    without = [key for key, value in gradients.items() if value is None]
    assert all(value.isfinite().all() for value in gradients.values() if value is not None)
    before = {key: sample(value) for key, value in model.named_parameters()}
    wrapper.step()
    moved = {
        key
        for key, value in model.named_parameters()
        if not torch.equal(sample(value), before[key])
    }
    wrapper.zero_grad()
    return Trained(request.param, cfg, model, wrapper, log, moved, without)


def sample(parameter):
    return parameter.detach().flatten()[:1000].clone()


def test_loss_and_step(trained):
    assert trained.log['loss'] > 0
    assert all(torch.isfinite(value) for value in trained.log.values())
    # A parameter without gradient ends distributed training with an error.
    assert trained.without_gradient == []
    assert any(key.startswith('backbone.') for key in trained.moved)
    assert any(not key.startswith('backbone.') for key in trained.moved)


def test_predicts(trained):
    cfg = trained.cfg
    data = batch_of(cfg)
    with torch.no_grad():
        results = trained.model.eval().test_step(data)

    assert len(results) == 2
    for result in results:
        if cfg.default_scope == 'mmdet':
            width = result.ori_shape[1]
            boxes = result.pred_instances.bboxes
            assert boxes.shape[1:] == (4,)
            assert (boxes[:, 2] <= width).all()
            assert ('masks' in result.pred_instances) == ('mask-rcnn' in trained.name)
        else:
            assert result.pred_sem_seg.data.shape == (1, 64, 64)
            assert result.seg_logits.data.shape == (num_classes(cfg.model), 64, 64)


def test_predicts_with_test_time_augmentation(trained, small_picture):
    cfg = trained.cfg
    if 'tta_model' not in cfg:
        assert 'mask-rcnn' in trained.name or trained.name in DEMO
        return
    model = MODELS.build(ConfigDict(cfg.tta_model, module=trained.model)).eval()
    pipeline = copy.deepcopy(cfg.tta_pipeline)
    if cfg.default_scope == 'mmdet':
        for resize in pipeline[1].transforms[0]:
            resize.scale = (96, 64)
    with torch.no_grad():
        (result,) = model.test_step(pseudo_collate([run_pipeline(cfg, pipeline, small_picture)]))

    if cfg.default_scope == 'mmdet':
        assert result.pred_instances.bboxes.shape[1:] == (4,)
        return
    # The original size, as that of the labels with which it is compared.
    assert result.pred_sem_seg.data.shape[-2:] == (72, 96)
    assert result.gt_sem_seg.data.shape[-2:] == (72, 96)


def test_weight_decay_of_each_parameter(trained):
    if trained.name in DEMO:
        return
    head, _, tags, schedule = parse(trained.name)
    lr, decay, exempt = RECIPES[head, schedule]
    model, wrapper = trained.model, trained.wrapper
    norms = (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._BatchNorm)
    exempted = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, norms)
        for parameter in module.parameters()
    }
    exempted |= {id(value) for key, value in model.named_parameters() if POSITIONS.search(key)}
    groups = {
        id(parameter): group
        for group in wrapper.optimizer.param_groups
        for parameter in group['params']
    }

    assert wrapper.optimizer.__class__ is torch.optim.AdamW
    assert len(groups) == len(list(model.parameters()))
    for key, parameter in model.named_parameters():
        group = groups[id(parameter)]
        wanted = 0 if exempt and id(parameter) in exempted else decay
        assert (key, group['weight_decay']) == (key, wanted)
        assert group['betas'] == (0.9, 0.999)
        slow = head in SLOW_BACKBONE and key.startswith('backbone.')
        if 'decay' not in tags:
            assert (key, group['lr']) == (key, pytest.approx(lr / 10 if slow else lr))
    names = {key for key, parameter in model.named_parameters() if id(parameter) in exempted}
    assert names >= EXEMPT[trained.cfg.model.backbone.type]


class Schedule:
    """Learning rates as the runner's schedulers give them, one per iteration."""

    def __init__(self, cfg, lr, epoch_length):
        init_default_scope('mmengine')
        weight = nn.Parameter(torch.zeros(1))
        self.optimizer = torch.optim.AdamW([weight], lr=lr)
        self.optimizer.step()
        self.schedulers = [
            PARAM_SCHEDULERS.build(dict(scheduler, optimizer=self.optimizer))
            for scheduler in cfg.param_scheduler
        ]
        self.epoch_length = epoch_length

    def rates(self, iterations):
        rates = []
        for i in range(iterations):
            rates.append(self.optimizer.param_groups[0]['lr'])
            for scheduler in self.schedulers:
                if not scheduler.by_epoch or (i + 1) % self.epoch_length == 0:
                    scheduler.step()
        return np.array(rates)


def rates_of(name):
    cfg = load(name)
    return _rates(
        json.dumps(cfg.param_scheduler), json.dumps(cfg.train_cfg), cfg.optim_wrapper.optimizer.lr
    )


@functools.cache
def _rates(schedulers, loop, lr):
    cfg = Config(dict(param_scheduler=json.loads(schedulers)))
    loop = json.loads(loop)
    if 'max_iters' in loop:
        return Schedule(cfg, lr, None).rates(loop['max_iters'])
    return Schedule(cfg, lr, 1500).rates(1500 * loop['max_epochs'])


@pytest.mark.parametrize('name', DETECTION)
def test_learning_rates_of_detection(name):
    head, _, _, schedule = parse(name)
    warmup = 500 if (head, schedule) == ('retinanet', '1x') else 1000
    warmup = 0 if head == 'dino-4scale' else warmup
    epochs, first, second = {'1x': (12, 8, 11), '3x': (36, 27, 33), '12e': (12, 11, 12)}[schedule]
    rates = rates_of(name)

    assert len(rates) == 1500 * epochs
    # A straight line from a thousandth of the rate, whose end is the warm-up's last iteration.
    line = 1e-4 * np.linspace(0.001, 1, warmup)
    np.testing.assert_allclose(rates[:warmup], line, rtol=1e-9)
    np.testing.assert_allclose(rates[warmup : first * 1500], 1e-4, rtol=1e-9)
    np.testing.assert_allclose(rates[first * 1500 : second * 1500], 1e-5, rtol=1e-9)
    np.testing.assert_allclose(rates[second * 1500 :], 1e-6, rtol=1e-9)


@pytest.mark.parametrize('name', [name for name in SEGMENTATION if '_fpn_' in name])
def test_learning_rates_of_semantic_fpn(name):
    rates = rates_of(name)

    assert len(rates) == 80000
    left = 1 - np.arange(80000) / 79999
    np.testing.assert_allclose(rates, 1e-6 + (1e-4 - 1e-6) * left**0.9, rtol=1e-6)
    assert rates[-1] == pytest.approx(1e-6)


@pytest.mark.parametrize('name', [name for name in SEGMENTATION if '_upernet_' in name])
def test_learning_rates_of_upernet(name):
    rates = rates_of(name)

    assert len(rates) == 160000
    np.testing.assert_allclose(rates[:1500], 6e-5 * np.linspace(1e-6, 1, 1500), rtol=1e-6)
    np.testing.assert_allclose(rates[1500:], np.linspace(6e-5, 0, 158500), rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize('name', [name for name in SEGMENTATION if '_mask2former_' in name])
def test_learning_rates_of_mask2former(name):
    rates = rates_of(name)

    assert len(rates) == 160000
    left = 1 - np.arange(160000) / 159999
    np.testing.assert_allclose(rates, 1e-4 * left**0.9, rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize('name', CONFIGS)
def test_published_parameter_count(name):
    head, backbone, _, _ = parse(name)
    if backbone not in PUBLISHED.get(head, ()):
        assert backbone == 'twins-svt-s' or (head, backbone) in BEYOND_THE_PAPER
        return
    cfg = load(name)
    enter(cfg.default_scope)
    # No memory for the weights; the others read values of tensors while they are built.
    with torch.device('meta' if name in OURS else 'cpu'):
        model = MODELS.build(cfg.model)
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6

    assert f'{millions:.1f}' == PUBLISHED[head][backbone]


@pytest.mark.parametrize('name', CONFIGS)
def test_name_says_what_the_config_holds(name):
    head, backbone, tags, schedule = parse(name)
    cfg = load(name)
    model = cfg.model
    widths = EMBED_DIMS[backbone]

    assert model.backbone.type == CLASSES[backbone]
    assert model.backbone.get('arch') == ARCHS.get(backbone)
    assert model.backbone.drop_path_rate == DROP_PATHS[backbone]
    assert 'init_cfg' not in model.backbone
    assert HEADS[head] in (model.type, model.get('decode_head', {}).get('type'))
    found = model.neck if 'neck' in model else model.decode_head
    assert found.in_channels == (widths[1:] if head == 'dino-4scale' else widths)
    assert cfg.auto_scale_lr.base_batch_size == 16
    assert not cfg.auto_scale_lr.enable
    assert cfg.optim_wrapper.type == 'OptimWrapper'
    constructor = cfg.optim_wrapper.get('constructor')
    assert constructor == ('LayerDecayOptimWrapperConstructor' if 'decay' in tags else None)
    if name in DETECTION:
        assert cfg.train_cfg.max_epochs == {'1x': 12, '3x': 36, '12e': 12}[schedule]
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
    for key in ('type', 'arch', 'drop_path_rate'):
        parts['model']['backbone'].pop(key, None)
    for part in ('neck', 'decode_head', 'auxiliary_head'):
        parts['model'].get(part, {}).pop('in_channels', None)
    return parts


@pytest.mark.parametrize('name', [name for name in CONFIGS if name.count('scalablevit-s') == 0])
def test_only_the_backbone_differs_from_size_s(name):
    backbone = parse(name).backbone
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
    if key == 'train_pipeline':
        steps = cfg.train_dataloader.dataset.pipeline
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


@pytest.mark.parametrize(('ours', 'theirs', 'keys'), THEIRS)
def test_equals_the_config_of_the_toolbox(ours, theirs, keys):
    toolbox, path = theirs.split('/', 1)
    file = Path(importlib.import_module(toolbox).__file__).parent / '.mim' / path
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
    if name in DETECTION:
        found = [
            dataset.data_root + part
            for dataset in (train, val)
            for part in (dataset.ann_file, dataset.data_prefix.img)
        ]
        assert found == [
            'data/coco/annotations/instances_train2017.json',
            'data/coco/train2017/',
            'data/coco/annotations/instances_val2017.json',
            'data/coco/val2017/',
        ]
        assert cfg.val_evaluator.ann_file == found[2]
        wanted = ['bbox', 'segm'] if 'mask-rcnn' in name else 'bbox'
        assert cfg.val_evaluator.metric == wanted
        return
    assert {train.data_root, val.data_root} == {'data/ade/ADEChallengeData2016'}
    assert train.data_prefix == dict(
        img_path='images/training', seg_map_path='annotations/training'
    )
    assert val.data_prefix == dict(
        img_path='images/validation', seg_map_path='annotations/validation'
    )
    assert cfg.val_evaluator == dict(type='IoUMetric', iou_metrics=['mIoU'])


@pytest.fixture(scope='session')
def picture(tmp_path_factory):
    """A picture of 480x640 and its label map, on disk."""
    return draw(tmp_path_factory.mktemp('picture'), 480, 640)


@pytest.fixture(scope='session')
def small_picture(tmp_path_factory):
    return draw(tmp_path_factory.mktemp('small_picture'), 72, 96)


def draw(folder, height, width):
    import cv2

    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    cv2.imwrite(str(folder / 'image.jpg'), image)
    labels = rng.integers(0, 151, (height, width), dtype=np.uint8)
    cv2.imwrite(str(folder / 'labels.png'), labels)
    return folder


def run_pipeline(cfg, pipeline, picture):
    from mmengine.dataset import Compose

    enter(cfg.default_scope)
    results = dict(img_path=str(picture / 'image.jpg'), img_id=0)
    if cfg.default_scope == 'mmdet':
        polygon = [[100.0, 100.0, 300.0, 100.0, 300.0, 200.0]]
        results['instances'] = [
            dict(bbox=[100, 100, 300, 200], bbox_label=3, mask=polygon, ignore_flag=0)
        ]
    else:
        results.update(
            seg_map_path=str(picture / 'labels.png'),
            seg_fields=[],
            label_map=None,
            reduce_zero_label=True,
        )
    return Compose([TRANSFORMS.build(step) for step in pipeline])(results)


@pytest.mark.parametrize('name', DETECTION)
def test_pipelines_of_detection(name, picture):
    cfg = load(name)
    test = run_pipeline(cfg, cfg.test_dataloader.dataset.pipeline, picture)
    # 480x640 to a short side of 800.
    assert test['inputs'].shape == (3, 800, 1067)
    assert test['data_samples'].scale_factor == pytest.approx((1067 / 640, 800 / 480))
    # The truth of the test set stays at the original size, where the metric compares.
    assert test['data_samples'].gt_instances.bboxes.tensor.tolist() == [[100, 100, 300, 200]]

    train = run_pipeline(cfg, cfg.train_dataloader.dataset.pipeline, picture)
    truth = train['data_samples'].gt_instances
    assert ('masks' in truth) == ('mask-rcnn' in name)
    if parse(name).schedule == '1x':
        assert train['inputs'].shape == (3, 800, 1067)
        width = truth.bboxes.tensor[0, 2] - truth.bboxes.tensor[0, 0]
        assert width == pytest.approx(200 * 1067 / 640, abs=1e-3)


@pytest.mark.parametrize('name', [name for name in DETECTION if parse(name).schedule != '1x'])
def test_multi_scale_and_crop(name, picture):
    cfg = load(name)
    np.random.seed(0)
    ratios, sides = set(), set()
    for _ in range(16):
        train = run_pipeline(cfg, cfg.train_dataloader.dataset.pipeline, picture)
        height, width = train['inputs'].shape[1:]
        assert min(height, width) <= 800
        assert max(height, width) <= 1333
        ratios.add(round(width / height, 2))
        sides.add(min(height, width))
    # An image that is not cropped keeps its ratio.
    assert 1.33 in ratios
    assert len(ratios) > 2
    assert len(sides & set(range(480, 801, 32))) > 4


@pytest.mark.parametrize('name', SEGMENTATION)
def test_pipelines_of_segmentation(name, picture):
    cfg = load(name)
    test = run_pipeline(cfg, cfg.test_dataloader.dataset.pipeline, picture)
    assert test['inputs'].shape == (3, 512, 683)
    labels = test['data_samples'].gt_sem_seg.data
    assert labels.shape == (1, 480, 640)
    # Label 0 of ADE20K, unlabeled, is ignored; 1 to 150 become 0 to 149.
    assert set(labels.unique().tolist()) == {*range(150), 255}

    train = run_pipeline(cfg, cfg.train_dataloader.dataset.pipeline, picture)
    assert max(train['inputs'].shape[1:]) <= 512
    assert train['data_samples'].gt_sem_seg.data.shape[1:] == train['inputs'].shape[1:]

    views = run_pipeline(cfg, cfg.tta_pipeline, picture)['inputs']
    assert len(views) == 12
    assert {view.shape[1] for view in views} == {240, 360, 480, 600, 720, 840}


@pytest.mark.parametrize('name', CONFIGS)
def test_pretrained_backbone_by_cfg_options(name, tmp_path):
    cfg = load(name)
    tiny = dict(depths=[1] * 4)
    if name in OURS:
        widths = dict(embed_dims=(16,) * 4, num_heads=(2,) * 4, depths=(1,) * 4)
        tiny = dict(arch=dict(ARCH_ZOO[cfg.model.backbone.arch], **widths))
    enter(cfg.default_scope)
    released = MODELS.build(ConfigDict(cfg.model.backbone, **tiny))
    torch.manual_seed(0)
    released.init_weights()
    # mmdet's Swin reads what its converter writes.
    prefix = 'backbone.' if 'swin' in name else ''
    weights = {prefix + key: value for key, value in released.state_dict().items()}
    torch.save(dict(state_dict=weights), tmp_path / 'released.pth')

    cfg.merge_from_dict(
        {
            'model.backbone.init_cfg.type': 'Pretrained',
            'model.backbone.init_cfg.checkpoint': str(tmp_path / 'released.pth'),
        }
    )
    backbone = MODELS.build(ConfigDict(cfg.model.backbone, **tiny))
    backbone.init_weights()

    for key, value in released.state_dict().items():
        assert torch.equal(backbone.state_dict()[key], value), key


def bases_of(path):
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Assign) and node.targets[0].id == '_base_':
            bases = ast.literal_eval(node.value)
            return [bases] if isinstance(bases, str) else bases
    return []


def depth(path):
    return 1 + max((depth(path.parent / base) for base in bases_of(path)), default=0)


@pytest.mark.parametrize('name', CONFIGS)
def test_inheritance_is_shallow_and_our_own(name):
    path = ROOT / 'configs' / name

    assert depth(path) <= 3
    assert all('::' not in base for base in bases_of(path))
    assert len(path.read_text().splitlines()) <= 40


@pytest.mark.parametrize('name', CONFIGS)
def test_runtime(name):
    cfg = load(name)

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
    # One process trains with plain BN; the runner makes it SyncBN where there are several.
    assert cfg.get('sync_bn') == (None if name in DETECTION else 'torch')
    assert 'SyncBN' not in cfg.pretty_text
