# Copyright (c) mmscalablevit contributors. All rights reserved.
_base_ = ['../_base_/backbones/swin-t.py', '_base_/retinanet_bccd-640x480.py']
model = dict(backbone=_base_.backbone, neck=dict(in_channels=_base_.embed_dims))
