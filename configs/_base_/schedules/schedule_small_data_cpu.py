# Copyright (c) mmscalablevit contributors. All rights reserved.
# From scratch in minutes on a CPU: a high learning rate and small batches. The config on top sets
# the length.
train_cfg = dict(type='IterBasedTrainLoop')
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=1e-3, betas=(0.9, 0.999), weight_decay=0.05, fused=True),
    # The position encodings of ScalableViT, Twins and Swin.
    paramwise_cfg=dict(
        norm_decay_mult=0.0,
        custom_keys={
            'pos_block': dict(decay_mult=0.0),
            'position_encodings': dict(decay_mult=0.0),
            'relative_position_bias_table': dict(decay_mult=0.0),
        },
    ),
    clip_grad=dict(max_norm=1.0),
)
randomness = dict(seed=0)
