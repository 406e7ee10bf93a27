# Copyright (c) mmscalablevit contributors. All rights reserved.
_base_ = [
    '../../configs/segmentation/scalablevit-s_upernet_8xb2-160k_ade20k-512x512.py',
    'tiny_arch.py',
]

embed_dims = _base_.tiny_arch.embed_dims
dataset = dict(
    type='BaseSegDataset',
    data_root='{{$SHAPES_ROOT:data/shapes}}',
    reduce_zero_label=True,
    img_suffix='.jpg',
    seg_map_suffix='.png',
    metainfo=dict(
        classes=('background', 'circle', 'square', 'triangle', 'star'),
        palette=[[90, 90, 90], [230, 80, 70], [70, 150, 240], [250, 200, 60], [120, 210, 110]],
    ),
)


def at_64_pixels(pipeline):
    sizes = dict(scale=(64, 64), crop_size=(64, 64))
    return [
        dict(step, **{key: size for key, size in sizes.items() if key in step}) for step in pipeline
    ]


model = dict(
    data_preprocessor=dict(size=(64, 64)),
    backbone=dict(
        init_cfg=None,
        arch=dict(_base_.tiny_arch, _delete_=True, ssa_kv='separate'),
    ),
    decode_head=dict(in_channels=embed_dims, channels=16, num_classes=5),
    auxiliary_head=dict(in_channels=embed_dims[2], channels=16, num_classes=5),
)
train_dataloader = dict(
    num_workers=0,
    persistent_workers=False,
    dataset=dict(dataset, pipeline=at_64_pixels(_base_.train_pipeline)),
)
val_dataloader = dict(
    num_workers=0,
    persistent_workers=False,
    dataset=dict(dataset, pipeline=at_64_pixels(_base_.test_pipeline)),
)
test_dataloader = val_dataloader
train_cfg = dict(max_iters=4, val_interval=4)
default_hooks = dict(logger=dict(interval=1), checkpoint=dict(interval=4))
randomness = dict(seed=0)
