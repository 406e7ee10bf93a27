# Copyright (c) mmscalablevit contributors. All rights reserved.
_base_ = [
    '../_base_/backbones/scalablevit-demo.py',
    '../_base_/models/upernet.py',
    '../_base_/datasets/shapes_128x128.py',
    '../_base_/default_runtime_seg.py',
    '../_base_/schedules/schedule_demo.py',
]
channels = 64
num_classes = 5
model = dict(
    data_preprocessor=dict(size=_base_.crop_size),
    backbone=_base_.backbone,
    decode_head=dict(in_channels=_base_.embed_dims, channels=channels, num_classes=num_classes),
    auxiliary_head=dict(
        in_channels=_base_.embed_dims[2], channels=channels, num_classes=num_classes
    ),
)

max_iters = 2000
train_cfg = dict(max_iters=max_iters, val_interval=500)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=50),
    dict(type='CosineAnnealingLR', eta_min=1e-6, by_epoch=False, begin=50, end=max_iters),
]
default_hooks = dict(
    logger=dict(interval=20), checkpoint=dict(by_epoch=False, interval=100, max_keep_ckpts=1)
)
log_processor = dict(by_epoch=False, window_size=20)
