# Copyright (c) mmscalablevit contributors. All rights reserved.
# The released training script: no EMA, no repeated augmentation, mixed precision (--amp).
train_cfg = dict(by_epoch=True, max_epochs=300, val_interval=1)
val_cfg = dict()
test_cfg = dict()

param_scheduler = [
    # From 1e-6
    dict(
        type='LinearLR',
        start_factor=1e-3,
        by_epoch=True,
        begin=0,
        end=5,
        convert_to_iter_based=True,
    ),
    dict(type='CosineAnnealingLR', T_max=295, eta_min=1e-5, by_epoch=True, begin=5, end=300),
]
optim_wrapper = dict(
    type='OptimWrapper',
    # 5e-4 for each 512 images of the total batch
    optimizer=dict(type='AdamW', lr=5e-4 * 1024 / 512, betas=(0.9, 0.999), weight_decay=0.05),
    paramwise_cfg=dict(
        norm_decay_mult=0.0,
        bias_decay_mult=0.0,
        custom_keys={'pos_block': dict(decay_mult=0.0)},
    ),
    clip_grad=dict(max_norm=5.0),
)
# 8 GPUs x 128 images
auto_scale_lr = dict(enable=False, base_batch_size=1024)
