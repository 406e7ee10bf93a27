# Copyright (c) mmscalablevit contributors. All rights reserved.
_base_ = [
    '../_base_/backbones/scalablevit-s.py',
    '../_base_/models/mask2former.py',
    '../_base_/datasets/ade20k_512x512.py',
    '../_base_/schedules/schedule_160k_mask2former.py',
    '../_base_/default_runtime_seg.py',
]
custom_imports = dict(imports=['mmscalablevit', 'mmdet.models'])
model = dict(
    data_preprocessor=dict(size=_base_.crop_size),
    backbone=_base_.backbone,
    decode_head=dict(in_channels=_base_.embed_dims),
)

load, annotations, _, *others = _base_.train_pipeline
resize = dict(
    type='RandomChoiceResize',
    scales=[int(512 * x * 0.1) for x in range(5, 21)],
    resize_type='ResizeShortestEdge',
    max_size=2048,
)
train_pipeline = [load, annotations, resize, *others]
train_dataloader = dict(batch_size=2, dataset=dict(pipeline=train_pipeline))
default_hooks = dict(checkpoint=dict(interval=5000))
