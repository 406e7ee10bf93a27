# Copyright (c) mmscalablevit contributors. All rights reserved.
_base_ = 'mask-rcnn_scalablevit-s_fpn_1x_coco.py'

optim_wrapper = dict(type='AmpOptimWrapper')
