# Copyright (c) mmscalablevit contributors. All rights reserved.
_base_ = ['schedule_1x.py', 'adamw_coco.py']

param_scheduler = [dict(_base_.param_scheduler[0], end=500), _base_.param_scheduler[1]]
optim_wrapper = dict(optimizer=dict(weight_decay=1e-4), paramwise_cfg=dict(_delete_=True))
