# Copyright (c) mmscalablevit contributors. All rights reserved.
_base_ = [
    '../_base_/backbones/scalablevit-s.py',
    '../_base_/models/dino-4scale.py',
    '../_base_/datasets/coco_detection.py',
    '../_base_/datasets/coco_ms-crop.py',
    '../_base_/schedules/schedule_1x_dino.py',
    '../_base_/default_runtime_det.py',
]
model = dict(backbone=_base_.backbone, neck=dict(in_channels=_base_.embed_dims[1:]))

resize, crop = _base_.resize, _base_.crop
# No limit to the long side before the crop, and images without objects too.
resize_to_crop = dict(_base_.resize_to_crop, scales=[(400, 4200), (500, 4200), (600, 4200)])
train_pipeline = [
    *_base_.loading,
    _base_.flip,
    dict(type='RandomChoice', transforms=[[resize], [resize_to_crop, crop, resize]]),
    _base_.pack,
]
train_dataloader = dict(
    dataset=dict(filter_cfg=dict(filter_empty_gt=False), pipeline=train_pipeline)
)
