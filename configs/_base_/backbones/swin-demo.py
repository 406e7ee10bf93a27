# Copyright (c) mmscalablevit contributors. All rights reserved.
# The size of scalablevit-demo.py in FLOPs; each stage doubles the channels of the last.
embed_dims = [32, 64, 128, 256]
backbone = dict(
    type='SwinTransformer',
    embed_dims=32,
    depths=[2, 2, 4, 2],
    num_heads=[1, 2, 4, 8],
    window_size=7,
    mlp_ratio=4,
    qkv_bias=True,
    patch_norm=True,
    out_indices=(0, 1, 2, 3),
    drop_path_rate=0.0,
)
