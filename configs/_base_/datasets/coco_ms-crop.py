# Copyright (c) mmscalablevit contributors. All rights reserved.
# DETR's augmentation, in place of what follows `loading`: another short side each time, and for
# half of the images a crop before it.
flip = dict(type='RandomFlip', prob=0.5)
resize = dict(
    type='RandomChoiceResize',
    scales=[(side, 1333) for side in range(480, 801, 32)],
    keep_ratio=True,
)
resize_to_crop = dict(
    type='RandomChoiceResize', scales=[(400, 1333), (500, 1333), (600, 1333)], keep_ratio=True
)
crop = dict(
    type='RandomCrop',
    crop_type='absolute_range',
    crop_size=(384, 600),
    allow_negative_crop=True,
)
pack = dict(type='PackDetInputs')
ms_crop = [
    flip,
    dict(type='RandomChoice', transforms=[[resize], [resize_to_crop, crop, resize]]),
    pack,
]
