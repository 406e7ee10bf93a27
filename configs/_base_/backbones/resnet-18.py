# Copyright (c) mmscalablevit contributors. All rights reserved.
# The class of mmdet or mmseg, whichever the config is for; trained from scratch.
embed_dims = [64, 128, 256, 512]
backbone = dict(type='ResNet', depth=18, norm_cfg=dict(type='BN'), norm_eval=False)
