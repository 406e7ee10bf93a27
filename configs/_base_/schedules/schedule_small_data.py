# Copyright (c) mmscalablevit contributors. All rights reserved.
# For one GPU and some hundred images, from scratch or from weights. Not yet trained with.
max_iters = 6000
train_cfg = dict(type='IterBasedTrainLoop', max_iters=max_iters, val_interval=500)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=500),
    dict(type='CosineAnnealingLR', eta_min=1e-6, by_epoch=False, begin=500, end=max_iters),
]
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=4e-4, betas=(0.9, 0.999), weight_decay=0.05),
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
