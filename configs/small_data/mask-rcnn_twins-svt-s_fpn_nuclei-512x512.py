# Copyright (c) mmscalablevit contributors. All rights reserved.
_base_ = ['../_base_/backbones/twins-svt-s.py', '_base_/mask-rcnn_nuclei-512x512.py']
custom_imports = dict(imports=['mmscalablevit', 'mmseg.models'])
model = dict(backbone=_base_.backbone, neck=dict(in_channels=_base_.embed_dims))
