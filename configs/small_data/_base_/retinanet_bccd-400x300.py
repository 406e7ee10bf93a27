# Copyright (c) mmscalablevit contributors. All rights reserved.
_base_ = [
    '../../_base_/models/retinanet_fpn.py',
    '../../_base_/datasets/bccd.py',
    '../../_base_/default_runtime_det.py',
    '../../_base_/schedules/schedule_small_data_cpu.py',
]
channels = 64
# Anchors from 16 pixels up: platelets measure 25, red cells 62, white cells 125 at this size.
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

max_epochs = 48
train_cfg = dict(_delete_=True, type='EpochBasedTrainLoop', max_epochs=max_epochs, val_interval=8)
train_dataloader = dict(sampler=dict(_delete_=True, type='DefaultSampler', shuffle=True))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=100),
    dict(
        type='CosineAnnealingLR',
        eta_min=1e-6,
        begin=0,
        end=max_epochs,
        T_max=max_epochs,
        convert_to_iter_based=True,
    ),
]
# With sizes varied from the first epoch on, the loss does not fall: what a cell looks like is
# learned at one size.
varied_pipeline = [
    dict(type='RandomResize', scale=_base_.image_scale, ratio_range=(0.75, 1.33), keep_ratio=True)
    if step['type'] == 'Resize'
    else step
    for step in _base_.train_pipeline
]
custom_hooks = [
    dict(type='EMAHook', momentum=0.005),
    dict(type='PipelineSwitchHook', switch_epoch=12, switch_pipeline=varied_pipeline),
]
default_hooks = dict(
    logger=dict(interval=20), checkpoint=dict(by_epoch=True, interval=4, max_keep_ckpts=1)
)
log_processor = dict(by_epoch=True, window_size=20)
