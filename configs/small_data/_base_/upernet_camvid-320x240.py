# Copyright (c) mmscalablevit contributors. All rights reserved.
_base_ = [
    '../../_base_/models/upernet.py',
    '../../_base_/datasets/camvid.py',
    '../../_base_/default_runtime_seg.py',
    '../../_base_/schedules/schedule_small_data_cpu.py',
]
channels = 64
# The square root of the median frequency over each class's own, in the training images.
class_weight = [0.53, 0.45, 2.19, 0.39, 1.0, 0.65, 1.96, 1.4, 0.89, 2.52, 2.98]
model = dict(
    data_preprocessor=dict(size=_base_.crop_size),
    decode_head=dict(
        channels=channels, num_classes=11, loss_decode=dict(class_weight=class_weight)
    ),
    auxiliary_head=dict(
        channels=channels, num_classes=11, loss_decode=dict(class_weight=class_weight)
    ),
)

max_iters = 3000
train_cfg = dict(max_iters=max_iters, val_interval=1000)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=100),
    dict(type='CosineAnnealingLR', eta_min=1e-6, by_epoch=False, begin=100, end=max_iters),
]
default_hooks = dict(
    logger=dict(interval=20), checkpoint=dict(by_epoch=False, interval=100, max_keep_ckpts=1)
)
log_processor = dict(by_epoch=False, window_size=20)
