# Copyright (c) mmscalablevit contributors. All rights reserved.
_base_ = ['../_base_/backbones/scalablevit-s.py', '_base_/mask-rcnn_nuclei-512x512.py']
model = dict(backbone=_base_.backbone, neck=dict(in_channels=_base_.embed_dims))
