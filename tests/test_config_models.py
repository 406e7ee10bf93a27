# Copyright (c) mmscalablevit contributors. All rights reserved.
"""The models of the configs train and predict; their pipelines give what the models take."""

import copy
from typing import NamedTuple

import cv2
import numpy as np
import pytest
import torch
from config_cases import (
    CONFIGS,
    DEMO,
    DETECTION,
    OURS,
    SEGMENTATION,
    enter,
    load,
    one_of_each,
    parse,
)
from mmengine.config import Config, ConfigDict
from mmengine.dataset import Compose, pseudo_collate
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, TRANSFORMS
from torch import nn

import mmscalablevit  # noqa: F401
from mmscalablevit.models.arch import ARCH_ZOO

# The smallest of each family first.
FAMILIES = [*sorted(CONFIGS, key=lambda name: 'scalablevit-s' not in name), *DEMO]


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
    boxes = model.get('roi_head', {}).get('bbox_head', [])
    for head in boxes if isinstance(boxes, list) else [boxes]:
        head.fc_out_channels = 64
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
    # The weights are on the network.
    cfg.model.backbone.init_cfg = None
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
    log: dict
    moved: set
    without_gradient: list


def family(name):
    """What a model is made of: configs of one family differ in sizes, data and schedules."""
    model = load(name).model
    return [model.type, model.get('decode_head', {}).get('type'), model.backbone.type, name in DEMO]


# One at a time: all of them would fill the memory. pytest runs its tests together.
@pytest.fixture(scope='module', params=one_of_each(FAMILIES, family))
def trained(request):
    cfg = shallow(load(request.param))
    model = build(cfg).train()
    wrapper = build_optim_wrapper(model, copy.deepcopy(cfg.optim_wrapper))
    data = model.data_preprocessor(batch_of(cfg), training=True)
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
    return Trained(request.param, cfg, model, log, moved, without)


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


def test_predicts_with_test_time_augmentation(trained, tmp_path):
    cfg = trained.cfg
    if 'tta_model' not in cfg:
        assert 'mask-rcnn' in trained.name or trained.name in DEMO
        return
    model = MODELS.build(ConfigDict(cfg.tta_model, module=trained.model)).eval()
    pipeline = copy.deepcopy(cfg.tta_pipeline)
    picture = draw(tmp_path, 72, 96)
    if cfg.default_scope == 'mmdet':
        for resize in pipeline[1].transforms[0]:
            resize.scale = (96, 64)
    with torch.no_grad():
        (result,) = model.test_step(pseudo_collate([run_pipeline(cfg, pipeline, picture)]))

    if cfg.default_scope == 'mmdet':
        assert result.pred_instances.bboxes.shape[1:] == (4,)
        return
    # The original size, as that of the labels with which it is compared.
    assert result.pred_sem_seg.data.shape[-2:] == (72, 96)
    assert result.gt_sem_seg.data.shape[-2:] == (72, 96)


def draw(folder, height, width):
    """Write a picture and its label map into a folder."""
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    cv2.imwrite(str(folder / 'image.jpg'), image)
    cv2.imwrite(str(folder / 'labels.png'), rng.integers(0, 151, (height, width), dtype=np.uint8))
    return folder


@pytest.fixture(scope='module')
def picture(tmp_path_factory):
    return draw(tmp_path_factory.mktemp('picture'), 480, 640)


def run_pipeline(cfg, pipeline, picture):
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


def pipelines_of(name):
    cfg = load(name)
    loaders = cfg.train_dataloader, cfg.test_dataloader
    return [parse(name).schedule, 'mask-rcnn' in name, loaders, cfg.get('tta_pipeline')]


@pytest.mark.parametrize('name', one_of_each(DETECTION, pipelines_of))
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


@pytest.mark.parametrize(
    'name', one_of_each([n for n in DETECTION if 'crop' in n or 'dino' in n], pipelines_of)
)
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


@pytest.mark.parametrize('name', one_of_each(SEGMENTATION, pipelines_of))
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


@pytest.mark.parametrize('name', one_of_each(CONFIGS, lambda name: load(name).model.backbone))
def test_pretrained_backbone_by_cfg_options(name, tmp_path):
    cfg = copy.deepcopy(load(name))
    tiny = dict(depths=[1] * 4)
    if name in OURS:
        widths = dict(embed_dims=(16,) * 4, num_heads=(2,) * 4, depths=(1,) * 4)
        tiny = dict(arch=dict(ARCH_ZOO[cfg.model.backbone.arch], **widths))
    enter(cfg.default_scope)
    released = MODELS.build(ConfigDict(cfg.model.backbone, **tiny, init_cfg=None))
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
