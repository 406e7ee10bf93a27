# Copyright (c) mmscalablevit contributors. All rights reserved.
_base_ = [
    '../../_base_/models/retinanet_fpn.py',
    '../../_base_/datasets/bccd.py',
    '../../_base_/default_runtime_det.py',
    '../../_base_/schedules/schedule_small_data_cpu.py',
]
channels = 64
# Anchors from 16 pixels up: platelets measure 20, red cells 50, white cells 100 at this size.
model = dict(
    # Without norms, training from scratch stayed with predictions that are the same for all images.
    neck=dict(start_level=0, out_channels=channels, num_outs=4, norm_cfg=dict(type='BN')),
    bbox_head=dict(
        num_classes=3,
        in_channels=channels,
        feat_channels=channels,
        norm_cfg=dict(type='GN', num_groups=8),
        anchor_generator=dict(octave_base_scale=2, strides=[8, 16, 32, 64]),
        reg_decoded_bbox=True,
        loss_bbox=dict(_delete_=True, type='GIoULoss', loss_weight=2.0),
    ),
    # Red cells overlap.
    test_cfg=dict(nms=dict(type='soft_nms', method='gaussian')),
)

max_iters = 1200
train_cfg = dict(max_iters=max_iters, val_interval=400)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=100),
    dict(type='CosineAnnealingLR', eta_min=1e-6, by_epoch=False, begin=100, end=max_iters),
]
default_hooks = dict(
    logger=dict(interval=20), checkpoint=dict(by_epoch=False, interval=100, max_keep_ckpts=1)
)
log_processor = dict(by_epoch=False, window_size=20)
