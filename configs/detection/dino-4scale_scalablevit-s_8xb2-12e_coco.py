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

flip, choice, pack = _base_.ms_crop
resize, crop = choice.transforms
# No limit to the long side before the crop, and images without objects too.
whole = dict(crop[0], scales=[(400, 4200), (500, 4200), (600, 4200)])
train_pipeline = [
    *_base_.train_pipeline[:2],
    flip,
    dict(choice, transforms=[resize, [whole, *crop[1:]]]),
    pack,
]
train_dataloader = dict(
    dataset=dict(filter_cfg=dict(filter_empty_gt=False), pipeline=train_pipeline)
)
