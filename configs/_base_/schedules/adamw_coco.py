# Copyright (c) mmscalablevit contributors. All rights reserved.
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05),
    # The position encodings of ScalableViT, Twins and Swin.
    paramwise_cfg=dict(
        norm_decay_mult=0.0,
        custom_keys={
            'pos_block': dict(decay_mult=0.0),
            'position_encodings': dict(decay_mult=0.0),
            'relative_position_bias_table': dict(decay_mult=0.0),
        },
    ),
)
# 8 GPUs x 2 images
auto_scale_lr = dict(enable=False, base_batch_size=16)
