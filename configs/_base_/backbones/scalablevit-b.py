# Copyright (c) mmscalablevit contributors. All rights reserved.
embed_dims = [96, 192, 384, 768]
# The drop path is inferred: for dense prediction only that of S, 0.2, is known, and recipes of the
# kind raise it with the size.
backbone = dict(
    type='ScalableViT',
    arch='base',
    drop_path_rate=0.3,
    # From scratch: --cfg-options model.backbone.init_cfg=None
    init_cfg=dict(type='Pretrained', checkpoint='scalablevit://base'),
)
