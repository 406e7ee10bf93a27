# Copyright (c) mmscalablevit contributors. All rights reserved.
tiny_arch = dict(
    embed_dims=[16, 16, 32, 32],
    num_heads=[1, 1, 2, 2],
    depths=[2, 2, 2, 1],
    c_ratios=[1, 1, 1, 1],
    sr_ratios=[8, 4, 2, 1],
    window_sizes=[7, 7, 7, 7],
    mlp_ratios=[2, 2, 2, 2],
)
