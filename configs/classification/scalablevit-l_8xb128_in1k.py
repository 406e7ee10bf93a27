# Copyright (c) mmscalablevit contributors. All rights reserved.
_base_ = [
    '../_base_/models/classifier.py',
    '../_base_/datasets/imagenet_bs128.py',
    '../_base_/schedules/imagenet_300e.py',
    '../_base_/default_runtime_cls.py',
]
model = dict(backbone=dict(arch='large', drop_path_rate=0.5), head=dict(in_channels=1024))
