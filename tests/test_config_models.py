# Copyright (c) mmscalablevit contributors. All rights reserved.
"""The models of the configs train and predict; their pipelines give what the models take."""

import copy

import cv2
import numpy as np
import pytest
import torch
from config_cases import CONFIGS, SEGMENTATION, enter, load
from mmengine.dataset import Compose, pseudo_collate
from mmengine.registry import MODELS, TRANSFORMS

from mmscalablevit.models.arch import ARCH_ZOO


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


def num_classes(model):
    head = model.get('decode_head') or model.get('bbox_head') or model.roi_head.bbox_head
    return (head[0] if isinstance(head, list) else head).num_classes


def batch_of(cfg, size=64):
    classes = num_classes(cfg.model)
    if cfg.default_scope == 'mmdet':
        from mmdet.testing import demo_mm_inputs

        shape = (3, size, size + 16)
        return demo_mm_inputs(2, shape, num_items=[3, 2], num_classes=classes, with_mask=True)
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


def family(name):
    """What a model is made of: configs of one family differ in sizes, data and schedules."""
    model = load(name).model
    return model.type, model.get('decode_head', {}).get('type'), model.backbone.type


# The last of each, and the smallest come last.
FAMILIES = {family(name): name for name in sorted(CONFIGS, key=lambda x: 'scalablevit-s' in x)}


@pytest.mark.parametrize('name', FAMILIES.values())
def test_a_model_of_each_family_learns_and_predicts(name):
    cfg = shallow(load(name))
    model = build(cfg).train()
    data = model.data_preprocessor(batch_of(cfg), training=True)
    loss, log = model.parse_losses(model(**data, mode='loss'))
    loss.backward()
    assert all(torch.isfinite(value) for value in log.values())
    # A parameter without gradient ends distributed training with an error.
    assert [key for key, value in model.named_parameters() if value.grad is None] == []
    assert all(value.grad.isfinite().all() for value in model.parameters())

    with torch.no_grad():
        results = model.eval().test_step(batch_of(cfg))
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


def run_pipeline(cfg, pipeline, folder):
    enter(cfg.default_scope)
    files = dict(img_path=f'{folder}/image.jpg', seg_map_path=f'{folder}/labels.png')
    results = dict(files, seg_fields=[], label_map=None, reduce_zero_label=True)
    return Compose([TRANSFORMS.build(step) for step in pipeline])(results)


# Those of detection equal mmdet's: tests/test_configs.py.
def test_pipelines_of_segmentation(tmp_path):
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (480, 640, 3), dtype=np.uint8)
    cv2.imwrite(str(tmp_path / 'image.jpg'), image)
    cv2.imwrite(str(tmp_path / 'labels.png'), rng.integers(0, 151, (480, 640), dtype=np.uint8))
    cfg = load(SEGMENTATION[0])
    test = run_pipeline(cfg, cfg.test_dataloader.dataset.pipeline, tmp_path)
    assert test['inputs'].shape == (3, 512, 683)
    labels = test['data_samples'].gt_sem_seg.data
    assert labels.shape == (1, 480, 640)
    # Label 0 of ADE20K, unlabeled, is ignored; 1 to 150 become 0 to 149.
    assert set(labels.unique().tolist()) == {*range(150), 255}

    train = run_pipeline(cfg, cfg.train_dataloader.dataset.pipeline, tmp_path)
    assert max(train['inputs'].shape[1:]) <= 512
    assert train['data_samples'].gt_sem_seg.data.shape[1:] == train['inputs'].shape[1:]

    views = run_pipeline(cfg, cfg.tta_pipeline, tmp_path)['inputs']
    assert len(views) == 12
    assert {view.shape[1] for view in views} == {240, 360, 480, 600, 720, 840}
