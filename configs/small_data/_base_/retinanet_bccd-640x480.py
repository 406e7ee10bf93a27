# Copyright (c) mmscalablevit contributors. All rights reserved.
_base_ = [
    '../../_base_/models/retinanet_fpn.py',
    '../../_base_/datasets/bccd.py',
    '../../_base_/default_runtime_det.py',
    '../../_base_/schedules/schedule_small_data.py',
]
# Norms as in the smaller size, which did not learn from scratch without them.
model = dict(
    neck=dict(start_level=0, norm_cfg=dict(type='BN')),
    bbox_head=dict(
        num_classes=3,
        norm_cfg=dict(type='GN', num_groups=32),
        reg_decoded_bbox=True,
        loss_bbox=dict(_delete_=True, type='GIoULoss', loss_weight=2.0),
    ),
    test_cfg=dict(nms=dict(type='soft_nms', method='gaussian')),
)


def at_full_size(step):
    return dict(step, scale=(640, 480)) if step['type'] == 'Resize' else step


train_dataloader = dict(
    batch_size=16,
    num_workers=4,
    dataset=dict(pipeline=[at_full_size(step) for step in _base_.train_pipeline]),
)
val_dataloader = dict(dataset=dict(pipeline=[at_full_size(s) for s in _base_.test_pipeline]))
test_dataloader = val_dataloader
default_hooks = dict(checkpoint=dict(by_epoch=False, interval=500, max_keep_ckpts=1))
log_processor = dict(by_epoch=False)
