# Copyright (c) mmscalablevit contributors. All rights reserved.
_base_ = [
    '../_base_/backbones/scalablevit-s.py',
    '../_base_/models/mask-rcnn_fpn.py',
    '../_base_/datasets/coco_instance.py',
    '../_base_/datasets/coco_ms-crop.py',
    '../_base_/schedules/schedule_3x.py',
    '../_base_/schedules/adamw_coco.py',
    '../_base_/default_runtime_det.py',
]
model = dict(backbone=_base_.backbone, neck=dict(in_channels=_base_.embed_dims))

train_pipeline = [*_base_.loading, *_base_.ms_crop]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
