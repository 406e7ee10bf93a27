# Copyright (c) mmscalablevit contributors. All rights reserved.
_base_ = [
    '../../_base_/models/upernet.py',
    '../../_base_/datasets/camvid.py',
    '../../_base_/default_runtime_seg.py',
    '../../_base_/schedules/schedule_small_data.py',
]
crop_size = (352, 480)
model = dict(
    data_preprocessor=dict(size=crop_size),
    decode_head=dict(num_classes=11),
    auxiliary_head=dict(num_classes=11),
)


def at_full_size(step):
    return dict(step, crop_size=crop_size) if step['type'] == 'RandomCrop' else step


train_dataloader = dict(
    batch_size=16,
    num_workers=4,
    dataset=dict(pipeline=[at_full_size(step) for step in _base_.train_pipeline]),
)
default_hooks = dict(checkpoint=dict(by_epoch=False, interval=500, max_keep_ckpts=1))
log_processor = dict(by_epoch=False)
