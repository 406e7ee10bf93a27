# Copyright (c) mmscalablevit contributors. All rights reserved.
_base_ = 'schedule_160k.py'

train_cfg = dict(val_interval=5000)
param_scheduler = [dict(_base_.param_scheduler[1], power=0.9, begin=0)]
# The longest key that is part of a parameter's name counts, and then `norm_decay_mult` does not:
# hence the backbone's norms by name.
position_keys = list(_base_.optim_wrapper.paramwise_cfg.custom_keys)
norm_keys = ['norm_list', '.attn.norm_act']
norm_keys += [f'.norm{i}.{kind}' for i in ('', '1', '2') for kind in ('weight', 'bias')]
query_keys = ['query_embed', 'query_feat', 'level_embed']
optim_wrapper = dict(
    optimizer=dict(lr=1e-4, weight_decay=0.05),
    paramwise_cfg=dict(
        custom_keys={
            'backbone': dict(lr_mult=0.1),
            **{key: dict(lr_mult=0.1, decay_mult=0.0) for key in position_keys + norm_keys},
            **{key: dict(decay_mult=0.0) for key in query_keys},
        },
    ),
    clip_grad=dict(max_norm=0.01, norm_type=2),
)
