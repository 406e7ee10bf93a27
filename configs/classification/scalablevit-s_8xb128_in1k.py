# Copyright (c) mmscalablevit contributors. All rights reserved.
_base_ = [
    '../_base_/models/classifier.py',
    '../_base_/datasets/imagenet_bs128.py',
    '../_base_/schedules/imagenet_300e.py',
    '../_base_/default_runtime_cls.py',
]
# The released code and checkpoint. The variant that the published tables count:
# --cfg-options model.backbone.arch=small-merged
model = dict(backbone=dict(arch='small', drop_path_rate=0.2), head=dict(in_channels=512))
