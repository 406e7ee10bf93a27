# Copyright (c) mmscalablevit contributors. All rights reserved.
_base_ = 'mask-rcnn_scalablevit-l_fpn_ms-crop-3x_coco.py'

optim_wrapper = dict(type='AmpOptimWrapper')
