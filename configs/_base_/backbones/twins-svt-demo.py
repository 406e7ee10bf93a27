# Copyright (c) mmscalablevit contributors. All rights reserved.
# mmseg's class at the size of scalablevit-demo.py.
embed_dims = [32, 64, 128, 160]
backbone = dict(
    type='mmseg.SVT',
    embed_dims=embed_dims,
    depths=[2, 2, 4, 2],
    num_heads=[1, 2, 4, 5],
    mlp_ratios=[4, 4, 4, 4],
    sr_ratios=[8, 4, 2, 1],
    # The argument's name is spelled so.
    windiow_sizes=[7, 7, 7, 7],
    qkv_bias=True,
    norm_after_stage=True,
    drop_path_rate=0.0,
)
