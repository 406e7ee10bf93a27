# Copyright (c) mmscalablevit contributors. All rights reserved.
_base_ = ['../../configs/detection/retinanet_scalablevit-s_fpn_1x_coco.py', 'tiny_arch.py']

data_root = '{{$SHAPES_ROOT:data/shapes}}/'
embed_dims = _base_.tiny_arch.embed_dims
model = dict(
    backbone=dict(
        init_cfg=None,
        arch=dict(_base_.tiny_arch, _delete_=True, ssa_kv='merged', depths=[1, 1, 1, 1]),
    ),
    neck=dict(in_channels=embed_dims, out_channels=16),
    bbox_head=dict(in_channels=16, feat_channels=16, num_classes=4),
    # Low enough for the faint scores of a model that never trained.
    test_cfg=dict(score_thr=0.0, nms_pre=50, max_per_img=10),
)
val_dataloader = dict(
    num_workers=0,
    persistent_workers=False,
    dataset=dict(
        data_root=data_root,
        metainfo=dict(classes=('circle', 'square', 'triangle', 'star')),
        ann_file='annotations/instances_validation.json',
        data_prefix=dict(img='images/validation'),
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=data_root + 'annotations/instances_validation.json')
test_evaluator = val_evaluator

load, views = _base_.tta_pipeline
scales, *others = views['transforms']
tta_pipeline = [
    load,
    dict(views, transforms=[[dict(scales[0], scale=(side, side)) for side in (64, 96)], *others]),
]
