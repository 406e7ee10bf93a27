# Copyright (c) mmscalablevit contributors. All rights reserved.
# Layer-wise learning-rate decay. The same on any other config: --cfg-options
# optim_wrapper.constructor=LayerDecayOptimWrapperConstructor
# optim_wrapper.paramwise_cfg.layer_decay_rate=0.9
_base_ = './scalablevit-s_upernet_8xb2-160k_ade20k-512x512.py'
optim_wrapper = dict(
    constructor='LayerDecayOptimWrapperConstructor', paramwise_cfg=dict(layer_decay_rate=0.9)
)
