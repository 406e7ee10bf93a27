# Copyright (c) mmscalablevit contributors. All rights reserved.
# Small enough to train from scratch on a laptop's CPU.
embed_dims = [32, 64, 128, 160]
backbone = dict(
    type='ScalableViT',
    arch=dict(
        embed_dims=embed_dims,
        num_heads=[1, 2, 4, 5],
        depths=[2, 2, 4, 2],
        c_ratios=[1.25, 1.25, 1.25, 1],
        sr_ratios=[8, 4, 2, 1],
        window_sizes=[7, 7, 7, 7],
        mlp_ratios=[4, 4, 4, 4],
        ssa_kv='separate',
    ),
)
