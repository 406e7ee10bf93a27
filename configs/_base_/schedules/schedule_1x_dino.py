# Copyright (c) mmscalablevit contributors. All rights reserved.
_base_ = ['schedule_1x.py', 'adamw_coco.py']

param_scheduler = [dict(_base_.param_scheduler[1], milestones=[11])]
optim_wrapper = dict(
    optimizer=dict(weight_decay=1e-4),
    paramwise_cfg=dict(_delete_=True, custom_keys={'backbone': dict(lr_mult=0.1)}),
    clip_grad=dict(max_norm=0.1, norm_type=2),
)
