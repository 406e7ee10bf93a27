# Copyright (c) mmscalablevit contributors. All rights reserved.
# The class of mmdet or mmseg, whichever the config is for. Its weights: in mmdet the file of Swin's
# authors with `convert_weights=True`, in mmseg the one that mmseg's Swin configs name.
embed_dims = [96, 192, 384, 768]
backbone = dict(
    type='SwinTransformer',
    embed_dims=96,
    depths=[2, 2, 6, 2],
    num_heads=[3, 6, 12, 24],
    window_size=7,
    mlp_ratio=4,
    qkv_bias=True,
    patch_norm=True,
    out_indices=(0, 1, 2, 3),
    drop_path_rate=0.2,
)
