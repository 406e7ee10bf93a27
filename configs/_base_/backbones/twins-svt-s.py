# Copyright (c) mmscalablevit contributors. All rights reserved.
# mmseg's class, for mmdet too, which has none. Its weights: what mmseg's Twins configs name.
embed_dims = [64, 128, 256, 512]
backbone = dict(
    type='mmseg.SVT',
    embed_dims=embed_dims,
    depths=[2, 2, 10, 4],
    num_heads=[2, 4, 8, 16],
    mlp_ratios=[4, 4, 4, 4],
    sr_ratios=[8, 4, 2, 1],
    # The argument's name is spelled so.
    windiow_sizes=[7, 7, 7, 7],
    qkv_bias=True,
    norm_after_stage=True,
    drop_path_rate=0.2,
)
