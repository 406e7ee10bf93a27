# Copyright (c) mmscalablevit contributors. All rights reserved.
_base_ = 'scalablevit-s_fpn_4xb4-80k_ade20k-512x512.py'

optim_wrapper = dict(type='AmpOptimWrapper')
