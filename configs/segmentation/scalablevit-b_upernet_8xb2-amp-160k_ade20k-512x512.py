# Copyright (c) mmscalablevit contributors. All rights reserved.
_base_ = 'scalablevit-b_upernet_8xb2-160k_ade20k-512x512.py'

optim_wrapper = dict(type='AmpOptimWrapper')
