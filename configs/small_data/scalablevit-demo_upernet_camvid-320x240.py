# Copyright (c) mmscalablevit contributors. All rights reserved.
_base_ = ['../_base_/backbones/scalablevit-demo.py', '_base_/upernet_camvid-320x240.py']
model = dict(
    backbone=_base_.backbone,
    decode_head=dict(in_channels=_base_.embed_dims),
    auxiliary_head=dict(in_channels=_base_.embed_dims[2]),
)
