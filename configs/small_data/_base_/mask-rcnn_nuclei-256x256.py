# Copyright (c) mmscalablevit contributors. All rights reserved.
_base_ = [
    '../../_base_/models/mask-rcnn_fpn.py',
    '../../_base_/datasets/nuclei.py',
    '../../_base_/default_runtime_det.py',
    '../../_base_/schedules/schedule_small_data_cpu.py',
]
channels = 64
# Anchors of 8 to 128 pixels; an image has up to 375 nuclei.
model = dict(
    neck=dict(out_channels=channels, num_outs=4, norm_cfg=dict(type='BN')),
    rpn_head=dict(
        in_channels=channels,
        feat_channels=channels,
        anchor_generator=dict(scales=[2, 3, 4], strides=[4, 8, 16, 32]),
    ),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=channels, finest_scale=28),
        bbox_head=dict(in_channels=channels, fc_out_channels=256, num_classes=1),
        mask_roi_extractor=dict(out_channels=channels, finest_scale=28),
        mask_head=dict(
            num_convs=2, in_channels=channels, conv_out_channels=channels, num_classes=1
        ),
    ),
    train_cfg=dict(
        rpn_proposal=dict(nms_pre=500, max_per_img=200),
        rcnn=dict(sampler=dict(num=48, pos_fraction=0.5)),
    ),
    # Boxes of nuclei that touch overlap.
    test_cfg=dict(
        rpn=dict(max_per_img=600),
        rcnn=dict(max_per_img=400, nms=dict(type='soft_nms', method='gaussian')),
    ),
)

max_iters = 1800
train_cfg = dict(max_iters=max_iters, val_interval=max_iters)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=100),
    dict(type='CosineAnnealingLR', eta_min=1e-6, by_epoch=False, begin=100, end=max_iters),
]
default_hooks = dict(
    logger=dict(interval=20), checkpoint=dict(by_epoch=False, interval=100, max_keep_ckpts=1)
)
log_processor = dict(by_epoch=False, window_size=20)
