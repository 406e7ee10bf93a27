# Copyright (c) mmscalablevit contributors. All rights reserved.
_base_ = ['../_base_/backbones/swin-demo.py', '_base_/retinanet_bccd-400x300.py']
model = dict(
    backbone=dict(_base_.backbone, out_indices=(1, 2, 3), drop_path_rate=0.1),
    neck=dict(in_channels=_base_.embed_dims[1:]),
)
