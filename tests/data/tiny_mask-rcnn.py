# Copyright (c) mmscalablevit contributors. All rights reserved.
_base_ = ['../../configs/detection/mask-rcnn_scalablevit-s_fpn_1x_coco.py', 'tiny_arch.py']

data_root = '{{$SHAPES_ROOT:data/shapes}}/'
metainfo = dict(classes=('circle', 'square', 'triangle', 'star'))
embed_dims = _base_.tiny_arch.embed_dims


def at_64_pixels(pipeline):
    return [dict(step, scale=(64, 64)) if step['type'] == 'Resize' else step for step in pipeline]


model = dict(
    backbone=dict(
        init_cfg=None,
        arch=dict(_base_.tiny_arch, _delete_=True, ssa_kv='merged'),
    ),
    neck=dict(in_channels=embed_dims, out_channels=16),
    rpn_head=dict(in_channels=16, feat_channels=16),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=16),
        bbox_head=dict(in_channels=16, fc_out_channels=32, num_classes=4),
        mask_roi_extractor=dict(out_channels=16),
        mask_head=dict(in_channels=16, conv_out_channels=16, num_classes=4),
    ),
    train_cfg=dict(rpn_proposal=dict(nms_pre=50, max_per_img=20), rcnn=dict(sampler=dict(num=16))),
    test_cfg=dict(rpn=dict(nms_pre=50, max_per_img=20), rcnn=dict(score_thr=0.0, max_per_img=10)),
)
train_pipeline = at_64_pixels(_base_.train_pipeline)
test_pipeline = at_64_pixels(_base_.test_pipeline)
train_dataloader = dict(
    num_workers=0,
    persistent_workers=False,
    dataset=dict(
        data_root=data_root,
        metainfo=metainfo,
        ann_file='annotations/instances_training.json',
        data_prefix=dict(img='images/training'),
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(
    num_workers=0,
    persistent_workers=False,
    dataset=dict(
        data_root=data_root,
        metainfo=metainfo,
        ann_file='annotations/instances_validation.json',
        data_prefix=dict(img='images/validation'),
        pipeline=test_pipeline,
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=data_root + 'annotations/instances_validation.json')
test_evaluator = val_evaluator
train_cfg = dict(max_epochs=1)
default_hooks = dict(logger=dict(interval=1))
randomness = dict(seed=0)
