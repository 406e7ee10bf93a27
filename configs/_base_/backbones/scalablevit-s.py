# Copyright (c) mmscalablevit contributors. All rights reserved.
embed_dims = [64, 128, 256, 512]
backbone = dict(type='ScalableViT', arch='small-merged', drop_path_rate=0.2)
