# Copyright (c) mmscalablevit contributors. All rights reserved.
"""Convert instance maps to our layout of COCO.

An instance map is a png of 8 or 16 bits of its image's size: 0 is background, k the k-th object.
"""

import argparse
from functools import partial
from pathlib import Path

import numpy as np
from coco_writer import Object, Source, convert, list_images, make_parser, split_folders
from PIL import Image
from pycocotools import mask as coco_mask

from mmscalablevit import cli
from mmscalablevit.checks.findings import Findings


def read_objects(
    path: Path, name: str, size: tuple[int, int], findings: Findings
) -> list[Object] | None:
    """The objects of an instance map."""
    try:
        with Image.open(path) as image:
            labels = np.array(image)
    # Damaged files raise errors of many types.
    except Exception as error:
        findings.error('instance map cannot be read', f'{path} ({error})')
        return None
    if labels.ndim != 2:
        findings.error('instance map has several channels', path)
        return None
    if labels.shape != size[::-1]:
        findings.error(
            'instance map does not have the size of its image',
            f'{path} is {labels.shape[1]}x{labels.shape[0]} and not {size[0]}x{size[1]}',
        )
        return None
    objects = []
    for value in np.unique(labels[labels > 0]):
        rle = coco_mask.encode(np.asfortranarray(labels == value, np.uint8))
        left, top, width, height = coco_mask.toBbox(rle).tolist()
        rle = dict(size=rle['size'], counts=rle['counts'].decode('ascii'))
        box = (left, top, left + width, top + height)
        objects.append(Object(name, f'{path} value {value}', box, rle))
    return objects


def find_sources(args: argparse.Namespace, name: str) -> dict[str, list[Source]]:
    """The images of each split."""
    maps = split_folders(args, args.maps)
    return {
        split: [
            Source(
                folder / image,
                image.as_posix(),
                partial(read_objects, maps[split] / image.with_suffix('.png'), name),
            )
            for image in list_images(folder)
        ]
        for split, folder in split_folders(args, args.images).items()
    }


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = make_parser(
        'Convert instance maps, one for each image, to the layout of COCO.',
        'data/nuclei data/cells --classes nucleus',
        'folder of the images and the maps',
    )
    help_ = 'folder of the images in DATA; default: %(default)s'
    parser.add_argument('--images', default='images/{split}', help=help_)
    help_ = 'folder of the maps, of the same names, in DATA; default: %(default)s'
    parser.add_argument('--maps', default='instances/{split}', help=help_)
    return parser.parse_args()


def main() -> None:
    """Convert."""
    args = parse_args()
    args.classes = args.classes or 'object'
    if ',' in args.classes:
        raise cli.UserError('--classes must be one name: an instance map holds no classes')
    if ('{split}' in args.images) != ('{split}' in args.maps):
        raise cli.UserError('--images and --maps must both hold {split}, or neither')
    convert(args, find_sources(args, args.classes))


if __name__ == '__main__':
    cli.run(main)
