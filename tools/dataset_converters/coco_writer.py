# Copyright (c) mmscalablevit contributors. All rights reserved.
"""What the converters share: their arguments, and the writer of our COCO layout.

::

    OUT
    ├── annotations/{train,val}.json
    └── {train,val}/          the images, hard links where the disk allows them
"""

import argparse
import json
import os
import random
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from mmengine.utils import scandir
from PIL import Image
from pycocotools import mask as coco_mask
from rich.console import Console
from rich.progress import track

from mmscalablevit import cli
from mmscalablevit.checks.findings import Findings
from mmscalablevit.errors import UserError

IMAGES = ('.jpg', '.jpeg', '.png', '.bmp', '.tif', '.tiff', '.webp')
SPLITS = ('train', 'val')


class Object(NamedTuple):
    """An annotated object."""

    name: str
    place: str
    box: tuple[float, ...]
    mask: list | dict | None = None
    crowd: bool = False


class Source(NamedTuple):
    """An image and what reads its objects."""

    image: Path
    name: str
    read: Callable[[tuple[int, int], Findings], list[Object] | None]


def make_parser(description: str, example: str, data: str) -> argparse.ArgumentParser:
    """A parser with the arguments of every converter."""
    name = Path(sys.argv[0]).name
    parser = argparse.ArgumentParser(
        formatter_class=cli.HelpFormatter,
        description=description,
        epilog=f'example: python tools/dataset_converters/{name} {example}',
    )
    parser.add_argument('data', type=Path, metavar='DATA', help=data)
    parser.add_argument('out', type=Path, metavar='OUT', help='folder to write')
    for split in SPLITS:
        help_ = f'split of DATA that becomes {split}'
        parser.add_argument(f'--{split}', default=split, metavar='NAME', help=help_)
    help_ = 'share of the images for validation where DATA has no splits; default: 0.2'
    parser.add_argument('--val-share', type=float, default=0.2, help=help_)
    help_ = 'classes in their order; default: as in DATA'
    parser.add_argument('--classes', metavar='A,B,...', help=help_)
    help_ = 'leave out faulty images and objects'
    parser.add_argument('--leave-out', action='store_true', help=help_)
    parser.add_argument('--copy', action='store_true', help='copy images instead of linking')
    return parser


def progress(items: Iterable, total: int, what: str) -> Iterable:
    """A progress bar on stderr, where that is a terminal."""
    console = Console(stderr=True)
    return track(items, what, total, console=console, disable=not console.is_terminal)


def list_images(folder: Path) -> list[Path]:
    """The images under a folder, as paths relative to it, in order."""
    if not folder.is_dir():
        raise UserError(f'folder {folder} does not exist')
    found = sorted(map(Path, scandir(folder, IMAGES, recursive=True, case_sensitive=False)))
    if not found:
        raise UserError(f'{folder} holds no image ({", ".join(IMAGES)})')
    return found


def split_folders(args: argparse.Namespace, pattern: str) -> dict[str, Path]:
    """The folders of the splits."""
    if '{split}' not in pattern:
        return {'': args.data / pattern}
    return {x: args.data / pattern.format(split=getattr(args, x)) for x in SPLITS}


def split_at_random(args: argparse.Namespace, items: list) -> dict[str, list]:
    """The items for training and for validation, the same in every call."""
    count = round(len(items) * args.val_share)
    if not 0 < count < len(items):
        raise UserError(f'--val-share {args.val_share} of {len(items)} images leaves a split empty')
    chosen = set(random.Random(0).sample(range(len(items)), count))
    return {
        split: [item for i, item in enumerate(items) if (i in chosen) == (split == 'val')]
        for split in SPLITS
    }


def image_size(path: Path) -> tuple[int, int]:
    """Width and height as the toolboxes load the image, turned by its EXIF tag."""
    with Image.open(path) as image:
        turned = image.getexif().get(0x0112, 1) >= 5
        return image.size[::-1] if turned else image.size


def same_size(size: tuple, annotated: tuple, place: object, findings: Findings) -> bool:
    """Whether an image has the size that its annotations give, if they do."""
    if annotated in (size, (None, None), (0, 0)):
        return True
    findings.error(
        'image has another size (EXIF rotation applied) than its annotations say',
        f'{place} ({size[0]}x{size[1]} and not {annotated[0]}x{annotated[1]})',
    )
    return False


def polygon_box(polygons: list[list[float]]) -> tuple[float, ...]:
    """The box around polygons of x, y, x, y, ..."""
    xs, ys = ([v for polygon in polygons for v in polygon[i::2]] for i in (0, 1))
    return min(xs), min(ys), max(xs), max(ys)


def convert(
    args: argparse.Namespace,
    splits: dict[str, list[Source]],
    classes: list[str] | None = None,
    findings: Findings | None = None,
) -> None:
    """Read every source, and write the data set if nothing is at fault or faults are left out."""
    # Of data without splits of its own.
    if '' in splits:
        splits = split_at_random(args, splits[''])
    check_out(args, *(args.out / 'annotations' / f'{split}.json' for split in splits))
    findings = findings or Findings()
    read = {
        split: [
            (source, size, objects)
            for source in progress(sources, len(sources), f'annotations of {split}')
            for size, objects in _read(source, findings)
        ]
        for split, sources in splits.items()
    }
    names = {obj.name for samples in read.values() for *_, objects in samples for obj in objects}
    classes = args.classes.split(',') if args.classes else classes or sorted(names)
    content = {split: _to_coco(samples, classes, findings) for split, samples in read.items()}
    refuse_faults(args, findings)
    for split, coco in content.items():
        if not coco['annotations']:
            raise UserError(f'{split} has no object to write')
    for split, samples in read.items():
        for source, *_ in progress(samples, len(samples), f'images of {split}'):
            place_image(source.image, args.out / split / source.name, args.copy)
    # Last: a file of annotations says that its images are there.
    (args.out / 'annotations').mkdir(exist_ok=True)
    for split, coco in content.items():
        path = args.out / 'annotations' / f'{split}.json'
        path.write_text(json.dumps(coco))
        counts = Counter(annotation['category_id'] for annotation in coco['annotations'])
        named = ', '.join(f'{name} {counts[i]}' for i, name in enumerate(classes, start=1))
        total = len(coco['annotations'])
        print(f'{path}: {len(coco["images"])} images, {total} objects ({named})')


def check_out(args: argparse.Namespace, *written: Path) -> None:
    """Refuse to write over a data set, or to read from no folder."""
    if not args.data.is_dir():
        raise UserError(f'folder {args.data} does not exist')
    for path in written:
        if path.exists():
            raise UserError(f'{path} exists; name a new folder for OUT')


def refuse_faults(args: argparse.Namespace, findings: Findings) -> None:
    """Print what was found."""
    word = 'left out: ' if args.leave_out else 'error: '
    for line in findings.lines():
        print(line.replace('error: ', word, 1), file=sys.stderr)
    if findings.errors and not args.leave_out:
        remedy = 'fix these faults, or leave out the faulty parts with --leave-out'
        raise UserError(f'nothing was written; {remedy}')


def place_image(source: Path, target: Path, copy: bool) -> None:
    """Link or copy an image to its place."""
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    # Another disk, or one without links.
    with suppress(OSError):
        if not copy:
            return os.link(source.resolve(), target)
    shutil.copyfile(source, target)


def _read(source: Source, findings: Findings) -> Iterable[tuple[tuple[int, int], list[Object]]]:
    """Size and objects of an image; nothing if it is at fault."""
    if not source.image.is_file():
        findings.error('image does not exist', source.image)
        return
    try:
        size = image_size(source.image)
    # Damaged files raise errors of many types.
    except Exception as error:
        findings.error('image cannot be read', f'{source.image} ({error})')
        return
    objects = source.read(size, findings)
    if objects is None:
        return
    if not objects:
        findings.warn('image has no object', source.image)
    yield size, objects


def _to_coco(samples: list, classes: list[str], findings: Findings) -> dict:
    images, annotations = [], []
    for image_id, (source, size, objects) in enumerate(samples, start=1):
        images.append(dict(id=image_id, file_name=source.name, width=size[0], height=size[1]))
        for obj in objects:
            box = _sound_box(obj, size, classes, findings)
            if box is None:
                continue
            area = (box[2] - box[0]) * (box[3] - box[1])
            if obj.mask:
                rle = obj.mask
                if isinstance(rle, list):
                    rle = coco_mask.merge(coco_mask.frPyObjects(rle, size[1], size[0]))
                area = int(coco_mask.area(rle))
                if not area:
                    findings.error('mask has no area in the image', f'{obj.place} {obj.name}')
                    continue
            annotation = dict(
                id=len(annotations) + 1,
                image_id=image_id,
                category_id=classes.index(obj.name) + 1,
                bbox=[box[0], box[1], box[2] - box[0], box[3] - box[1]],
                area=area,
                iscrowd=int(obj.crowd),
                segmentation=obj.mask or [],
            )
            annotations.append(annotation)
    categories = [dict(id=i, name=name) for i, name in enumerate(classes, start=1)]
    return dict(images=images, annotations=annotations, categories=categories)


def _sound_box(
    obj: Object, size: tuple[int, int], classes: list[str], findings: Findings
) -> list[float] | None:
    """The part of a box inside the image; None if the object is at fault."""
    if obj.name not in classes:
        findings.error(f'{obj.name!r} is not among the classes', obj.place)
        return None
    left, top, right, bottom = obj.box
    # Not true of NaN either.
    if not (left < right and top < bottom):
        findings.error('box has no area', f'{obj.place} {obj.name}')
        return None
    box = [max(left, 0), max(top, 0), min(right, size[0]), min(bottom, size[1])]
    if box[2] <= box[0] or box[3] <= box[1]:
        findings.error('box is outside the image', f'{obj.place} {obj.name}')
        return None
    if max(abs(a - b) for a, b in zip(box, obj.box, strict=True)) > 1:
        findings.warn('box reaches beyond the image and is cut at its edge', obj.place)
    return box
