# Copyright (c) mmscalablevit contributors. All rights reserved.
# On the bases and not on the config without AMP, which is three levels deep already.
_base_ = [
    '../_base_/backbones/scalablevit-s.py',
    '../_base_/models/retinanet_fpn.py',
    '../_base_/datasets/coco_detection.py',
    '../_base_/schedules/schedule_1x_retinanet.py',
    '../_base_/default_runtime_det.py',
]
model = dict(backbone=_base_.backbone, neck=dict(in_channels=_base_.embed_dims))
optim_wrapper = dict(type='AmpOptimWrapper')
