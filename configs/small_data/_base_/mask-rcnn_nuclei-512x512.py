# Copyright (c) mmscalablevit contributors. All rights reserved.
_base_ = [
    '../../_base_/models/mask-rcnn_fpn.py',
    '../../_base_/datasets/nuclei.py',
    '../../_base_/default_runtime_det.py',
    '../../_base_/schedules/schedule_small_data.py',
]
# Images, and crops of 256x256 of them, at twice their size.
model = dict(
    neck=dict(norm_cfg=dict(type='BN')),
    rpn_head=dict(anchor_generator=dict(scales=[4])),
    roi_head=dict(bbox_head=dict(num_classes=1), mask_head=dict(num_classes=1)),
    # Boxes of nuclei that touch overlap.
    test_cfg=dict(rcnn=dict(max_per_img=400, nms=dict(type='soft_nms', method='gaussian'))),
)
train_pipeline = [
    *_base_.train_pipeline[:3],
    dict(type='RandomResize', scale=(512, 512), ratio_range=(0.75, 1.25), keep_ratio=True),
    *_base_.train_pipeline[3:],
]
train_dataloader = dict(batch_size=16, num_workers=8, dataset=dict(pipeline=train_pipeline))


def twice_as_large(step):
    return dict(step, scale_factor=2.0) if step['type'] == 'Resize' else step


val_dataloader = dict(dataset=dict(pipeline=[twice_as_large(s) for s in _base_.test_pipeline]))
test_dataloader = val_dataloader
default_hooks = dict(checkpoint=dict(by_epoch=False, interval=500, max_keep_ckpts=1))
log_processor = dict(by_epoch=False)
