# Copyright (c) mmscalablevit contributors. All rights reserved.
_base_ = [
    '../_base_/backbones/scalablevit-demo.py',
    '../_base_/models/mask-rcnn_fpn.py',
    '../_base_/datasets/shapes_instance.py',
    '../_base_/default_runtime_det.py',
    '../_base_/schedules/schedule_demo.py',
]
channels = 64
num_classes = 4
# Levels and anchors for objects of 30 to 60 pixels; fewer and more balanced samples, as each costs.
model = dict(
    backbone=_base_.backbone,
    neck=dict(in_channels=_base_.embed_dims, out_channels=channels, num_outs=4),
    rpn_head=dict(
        in_channels=channels,
        feat_channels=channels,
        anchor_generator=dict(scales=[4], strides=[4, 8, 16, 32]),
    ),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=channels, finest_scale=28),
        bbox_head=dict(in_channels=channels, fc_out_channels=256, num_classes=num_classes),
        mask_roi_extractor=dict(out_channels=channels, finest_scale=28),
        mask_head=dict(
            num_convs=2,
            in_channels=channels,
            conv_out_channels=channels,
            num_classes=num_classes,
        ),
    ),
    train_cfg=dict(
        rpn=dict(sampler=dict(num=128)),
        rpn_proposal=dict(nms_pre=300, max_per_img=100),
        rcnn=dict(sampler=dict(num=24, pos_fraction=0.5)),
    ),
    # An image holds six shapes at most, and they overlap.
    test_cfg=dict(rpn=dict(nms_pre=300, max_per_img=30), rcnn=dict(nms=dict(type='soft_nms'))),
)

max_iters = 1700
train_cfg = dict(max_iters=max_iters, val_interval=850)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=50),
    dict(type='CosineAnnealingLR', eta_min=1e-6, by_epoch=False, begin=50, end=max_iters),
]
default_hooks = dict(
    logger=dict(interval=20), checkpoint=dict(by_epoch=False, interval=100, max_keep_ckpts=1)
)
log_processor = dict(by_epoch=False, window_size=20)
