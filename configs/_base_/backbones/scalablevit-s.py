# Copyright (c) mmscalablevit contributors. All rights reserved.
embed_dims = [64, 128, 256, 512]
# The published tables count 'small-merged'; weights of it, once trained, take
# --cfg-options model.backbone.arch=small-merged model.backbone.init_cfg.checkpoint=FILE
backbone = dict(
    type='ScalableViT',
    arch='small',
    drop_path_rate=0.2,
    # From scratch: --cfg-options model.backbone.init_cfg=None
    init_cfg=dict(type='Pretrained', checkpoint='scalablevit://small'),
)
