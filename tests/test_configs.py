# Copyright (c) mmscalablevit contributors. All rights reserved.
"""Every config: what it says, builds and trains."""

import ast
import copy
import functools
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config, ConfigDict
from mmengine.dataset import pseudo_collate
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, PARAM_SCHEDULERS, TRANSFORMS, init_default_scope
from torch import nn

import mmscalablevit  # noqa: F401
from mmscalablevit.models.scalablevit import ARCH_ZOO

ROOT = Path(__file__).parents[1]
FOLDERS = ('detection', 'segmentation')
CONFIGS = sorted(
    str(path.relative_to(ROOT / 'configs'))
    for folder in FOLDERS
    for path in (ROOT / 'configs' / folder).glob('*.py')
)
DEMO = sorted(f'demo/{path.name}' for path in (ROOT / 'configs' / 'demo').glob('*.py'))
DETECTION = [name for name in CONFIGS if name.startswith('detection')]
SEGMENTATION = [name for name in CONFIGS if name.startswith('segmentation')]

ARCHS = dict(s='small-merged', b='base', l='large')
EMBED_DIMS = dict(s=[64, 128, 256, 512], b=[96, 192, 384, 768], l=[128, 256, 512, 1024])
HEADS = {'mask-rcnn': 'MaskRCNN', 'retinanet': 'RetinaNet', 'fpn': 'FPNHead', 'upernet': 'UPerHead'}
# Millions of parameters in the paper's tables and the authors' README.
PUBLISHED = {
    'retinanet': dict(s='36.4', b='85.6', l='112.6'),
    'mask-rcnn': dict(s='46.3', b='94.9', l='121.4'),
    'fpn': dict(s='30.4', b='79.0', l='105.5'),
    'upernet': dict(s='56.5', b='107.0', l='135.5'),
}
# Learning rate, weight decay, and whether norms and position encodings are exempt from it.
RECIPES = {
    ('retinanet', '1x'): (1e-4, 1e-4, False),
    ('retinanet', '3x'): (1e-4, 0.05, True),
    ('mask-rcnn', '1x'): (1e-4, 0.05, True),
    ('mask-rcnn', '3x'): (1e-4, 0.05, True),
    ('fpn', '80k'): (1e-4, 1e-4, False),
    ('upernet', '160k'): (6e-5, 0.01, True),
}


def load(name):
    return Config.fromfile(ROOT / 'configs' / name)


def parse(name):
    """Head, size and schedule as a file name of mmdet or mmseg says them."""
    stem = Path(name).stem
    size = re.search(r'scalablevit-([sbl])_', stem)[1]
    if name.startswith('detection'):
        return stem.split('_')[0], size, re.search(r'([13]x)_coco', stem)[1]
    return stem.split('_')[1], size, re.search(r'-(\d+k)_', stem)[1]


def shallow(cfg):
    """The config with two blocks a stage and small segmentation crops: the same parts, faster."""
    cfg = copy.deepcopy(cfg)
    backbone = cfg.model.backbone
    if backbone.type == 'ScalableViT' and isinstance(backbone.arch, str):
        backbone.arch = dict(ARCH_ZOO[backbone.arch], depths=(2, 2, 2, 2))
    if 'size' in cfg.model.data_preprocessor:
        cfg.model.data_preprocessor.size = (64, 64)
    return cfg


def build(cfg, seed=0):
    torch.manual_seed(seed)
    init_default_scope(cfg.default_scope)
    model = MODELS.build(cfg.model)
    model.init_weights()
    return model


def num_classes(model_cfg):
    head = (
        model_cfg.get('decode_head') or model_cfg.get('bbox_head') or model_cfg.roi_head.bbox_head
    )
    return head.num_classes


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


@functools.cache
def trained(name):
    """A shallow model after a loss, a backward pass and an optimizer step."""
    cfg = shallow(load(name))
    model = build(cfg).train()
    wrapper = build_optim_wrapper(model, copy.deepcopy(cfg.optim_wrapper))
    data = model.data_preprocessor(batch_of(cfg), training=True)
    before = {key: value.clone() for key, value in model.named_parameters()}
    losses = model(**data, mode='loss')
    loss, log = model.parse_losses(losses)
    wrapper.backward(loss)
    gradients = {key: value.grad for key, value in model.named_parameters()}
    wrapper.step()
    return model, wrapper, log, before, gradients


@pytest.mark.parametrize('name', [*CONFIGS, *DEMO])
def test_loss_and_step(name):
    model, _, log, before, gradients = trained(name)

    assert log['loss'] > 0
    assert all(torch.isfinite(value) for value in log.values())
    # A parameter without gradient ends distributed training with an error.
    assert [key for key, gradient in gradients.items() if gradient is None] == []
    assert all(torch.isfinite(gradient).all() for gradient in gradients.values())
    moved = [key for key, value in model.named_parameters() if not torch.equal(value, before[key])]
    assert any(key.startswith('backbone.') for key in moved)
    assert any(not key.startswith('backbone.') for key in moved)


@pytest.mark.parametrize('name', [*CONFIGS, *DEMO])
def test_predicts(name):
    cfg = shallow(load(name))
    model = trained(name)[0].eval()
    data = batch_of(cfg)
    with torch.no_grad():
        results = model.test_step(data)

    assert len(results) == 2
    for result in results:
        if cfg.default_scope == 'mmdet':
            width = result.ori_shape[1]
            boxes = result.pred_instances.bboxes
            assert boxes.shape[1:] == (4,)
            assert (boxes[:, 2] <= width).all()
            assert ('masks' in result.pred_instances) == ('mask-rcnn' in name)
        else:
            assert result.pred_sem_seg.data.shape == (1, 64, 64)
            assert result.seg_logits.data.shape == (num_classes(cfg.model), 64, 64)


@pytest.mark.parametrize('name', CONFIGS)
def test_weight_decay_of_each_parameter(name):
    head, _, schedule = parse(name)
    lr, decay, exempt = RECIPES[head, schedule]
    model, wrapper = trained(name)[:2]
    norms = (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._BatchNorm)
    exempted = {
        id(parameter)
        for key, module in model.named_modules()
        if isinstance(module, norms) or re.search(r'(^|\.)pos_block\.', key)
        for parameter in module.parameters()
    }
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
        assert (key, group['lr'], group['weight_decay']) == (key, lr, wanted)
        assert group['betas'] == (0.9, 0.999)
    names = {key for key, parameter in model.named_parameters() if id(parameter) in exempted}
    assert names >= {
        'backbone.norm_list.0.weight',
        'backbone.norm_list.3.bias',
        'backbone.patch_embeds.0.norm.weight',
        'backbone.stages.0.0.norm1.weight',
        'backbone.stages.0.1.attn.norm_act.0.weight',
        'backbone.pos_block.0.proj.0.weight',
    }


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


@functools.cache
def rates_of(name):
    cfg = load(name)
    lr = cfg.optim_wrapper.optimizer.lr
    if 'max_iters' in cfg.train_cfg:
        return Schedule(cfg, lr, None).rates(cfg.train_cfg.max_iters)
    return Schedule(cfg, lr, 1500).rates(1500 * cfg.train_cfg.max_epochs)


@pytest.mark.parametrize('name', DETECTION)
def test_learning_rates_of_detection(name):
    head, _, schedule = parse(name)
    warmup = 500 if (head, schedule) == ('retinanet', '1x') else 1000
    epochs, first, second = {'1x': (12, 8, 11), '3x': (36, 27, 33)}[schedule]
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


@pytest.mark.parametrize('name', CONFIGS)
def test_published_parameter_count(name):
    head, size, _ = parse(name)
    cfg = load(name)
    init_default_scope(cfg.default_scope)
    model = MODELS.build(cfg.model)
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6

    assert f'{millions:.1f}' == PUBLISHED[head][size]


@pytest.mark.parametrize('name', CONFIGS)
def test_name_says_what_the_config_holds(name):
    head, size, schedule = parse(name)
    cfg = load(name)
    model = cfg.model

    assert (model.backbone.type, model.backbone.arch) == ('ScalableViT', ARCHS[size])
    assert 'init_cfg' not in model.backbone
    assert HEADS[head] in (model.type, model.get('decode_head', {}).get('type'))
    widths = model.neck if 'neck' in model else model.decode_head
    assert widths.in_channels == EMBED_DIMS[size]
    assert cfg.auto_scale_lr.base_batch_size == 16
    assert not cfg.auto_scale_lr.enable
    assert cfg.optim_wrapper.type == ('AmpOptimWrapper' if '_amp-' in name else 'OptimWrapper')
    if size == 's':
        assert model.backbone.drop_path_rate == 0.2
    if name in DETECTION:
        assert cfg.train_cfg.max_epochs == {'1x': 12, '3x': 36}[schedule]
        assert cfg.train_dataloader.batch_size == 2
        return
    gpus, batch = re.search(r'_(\d+)xb(\d+)-', name).groups()
    assert cfg.train_dataloader.batch_size == int(batch)
    assert int(gpus) * int(batch) == cfg.auto_scale_lr.base_batch_size
    assert cfg.train_cfg.max_iters == int(schedule[:-1]) * 1000
    assert model.data_preprocessor.size == (512, 512)
    if head == 'upernet':
        assert model.auxiliary_head.in_channels == EMBED_DIMS[size][2]
        assert model.auxiliary_head.in_index == 2


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


@pytest.fixture(scope='module')
def picture(tmp_path_factory):
    """A picture of 480x640 and its label map, on disk."""
    import cv2

    folder = tmp_path_factory.mktemp('picture')
    rng = np.random.default_rng(0)
    cv2.imwrite(str(folder / 'image.jpg'), rng.integers(0, 256, (480, 640, 3), dtype=np.uint8))
    cv2.imwrite(str(folder / 'labels.png'), rng.integers(0, 151, (480, 640), dtype=np.uint8))
    return folder


def run_pipeline(cfg, pipeline, picture):
    from mmengine.dataset import Compose

    init_default_scope(cfg.default_scope)
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
    if '1x' in name:
        assert train['inputs'].shape == (3, 800, 1067)
        width = truth.bboxes.tensor[0, 2] - truth.bboxes.tensor[0, 0]
        assert width == pytest.approx(200 * 1067 / 640, abs=1e-3)


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
    arch = dict(
        ARCH_ZOO['small-merged'],
        embed_dims=(16, 16, 16, 16),
        num_heads=(2, 2, 2, 2),
        depths=(1,) * 4,
    )
    init_default_scope('mmengine')
    released = MODELS.build(dict(type='ScalableViT', arch=arch))
    released.init_weights()
    torch.save(dict(state_dict=released.state_dict()), tmp_path / 'released.pth')

    cfg = load(name)
    cfg.merge_from_dict(
        {
            'model.backbone.init_cfg.type': 'Pretrained',
            'model.backbone.init_cfg.checkpoint': str(tmp_path / 'released.pth'),
        }
    )
    init_default_scope(cfg.default_scope)
    backbone = MODELS.build(ConfigDict(cfg.model.backbone, arch=arch))
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

    assert cfg.custom_imports == dict(imports=['mmscalablevit'], allow_failed_imports=False)
    assert cfg.default_scope == ('mmdet' if name in DETECTION else 'mmseg')
    assert cfg.load_from is None
    assert cfg.resume is False
    assert [backend.type for backend in cfg.vis_backends] == ['LocalVisBackend']
    assert cfg.default_hooks.checkpoint.max_keep_ckpts > 0
    # One process trains with plain BN; the runner makes it SyncBN where there are several.
    assert cfg.get('sync_bn') == (None if name in DETECTION else 'torch')
    assert 'SyncBN' not in cfg.pretty_text
