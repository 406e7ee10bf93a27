# Copyright (c) mmscalablevit contributors. All rights reserved.
"""Convert the txt files of YOLO to our layout of COCO.

A line is a class number and a box (center x, center y, width, height) or a polygon (x, y, x, y,
...), in shares of the image. ``data.yaml`` in DATA names the classes and the folders or lists of
images; without it they are ``classes.txt`` and ``images/{train,val}``. The txt files lie beside the
images, or under ``labels`` in place of ``images``.
"""

import argparse
from functools import partial
from pathlib import Path

import yaml
from coco_writer import SPLITS, Object, Source, convert, list_images, make_parser, polygon_box

from mmscalablevit import cli
from mmscalablevit.checks.findings import Findings
from mmscalablevit.errors import UserError


def read_objects(
    txt: Path, classes: list[str], size: tuple[int, int], findings: Findings
) -> list[Object]:
    """The objects of a txt file; none where there is no file, as YOLO has it."""
    objects = []
    for number, line in enumerate(txt.read_text().splitlines() if txt.exists() else (), start=1):
        place = f'{txt} line {number}'
        try:
            label, *values = map(float, line.split())
            if label % 1 or len(values) not in (4, *range(6, len(line), 2)):
                raise ValueError
        except ValueError:
            if line.strip():
                findings.error('line is no class number with a box or a polygon', place)
            continue
        if not 0 <= label < len(classes):
            findings.error(f'class number is not below {len(classes)}', f'{place} {label:g}')
            continue
        scaled = [value * size[i % 2] for i, value in enumerate(values)]
        if len(values) > 4:
            box, mask = polygon_box([scaled]), [scaled]
        else:
            x, y, width, height = scaled
            box, mask = (x - width / 2, y - height / 2, x + width / 2, y + height / 2), None
        objects.append(Object(classes[int(label)], place, box, mask))
    return objects


def read_yaml(args: argparse.Namespace) -> dict:
    """What ``data.yaml`` says, or the files that stand for it."""
    paths = args.data / 'data.yaml', args.data / 'data.yml'
    path = next((path for path in paths if path.exists()), None)
    names = args.data / 'classes.txt'
    if path is None and not names.exists():
        missing = 'neither data.yaml nor classes.txt with the class names'
        raise UserError(f'{args.data} contains {missing}')
    if path is None:
        classes = names.read_text().strip().split('\n')
        folders = {getattr(args, x): f'images/{getattr(args, x)}' for x in SPLITS}
        there = all((args.data / folder).is_dir() for folder in folders.values())
        return dict(names=classes, **(folders if there else {}))
    content = yaml.safe_load(path.read_text())
    if not isinstance(content, dict) or not isinstance(content.get('names'), list | dict):
        raise UserError(f'{path} has no names of the classes')
    if isinstance(content['names'], dict):
        content['names'] = [name for _, name in sorted(content['names'].items())]
    return content


def find_images(root: Path, named: str | list[str]) -> dict[str, Path]:
    """Images by their names in the converted set, from folders or lists of images."""
    images = {}
    for entry in [named] if isinstance(named, str) else named:
        # Exports of datasets name folders from where a training is started.
        paths = root / entry, root / entry.removeprefix('../')
        path = next((path for path in paths if path.exists()), None)
        if path is None:
            raise UserError(f'{root / entry} does not exist')
        if path.is_dir():
            images |= {image.as_posix(): path / image for image in list_images(path)}
        else:
            lines = (line.strip() for line in path.read_text().splitlines())
            images |= {Path(line).name: path.parent / line for line in lines if line}
    return images


def label_file(image: Path) -> Path:
    """The txt file of an image: beside it or under ``labels``."""
    beside = image.with_suffix('.txt')
    parts = list(beside.parts)
    if 'images' not in parts or beside.exists():
        return beside
    parts[len(parts) - 1 - parts[::-1].index('images')] = 'labels'
    return Path(*parts)


def find_sources(args: argparse.Namespace, content: dict) -> dict[str, list[Source]]:
    """The images of each split."""
    classes = list(map(str, content['names']))
    # `path` is where the set lies on the machine of who made it, or under this folder.
    root = args.data / str(content.get('path') or '.')
    root = root if root.is_dir() else args.data
    named = {split: content.get(getattr(args, split)) for split in SPLITS}
    if all(named.values()):
        images = {split: find_images(root, folders) for split, folders in named.items()}
    else:
        images = {'': find_images(root, 'images')}
    return {
        split: [
            Source(path, name, partial(read_objects, label_file(path), classes))
            for name, path in found.items()
        ]
        for split, found in images.items()
    }


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    return make_parser(
        'Convert the txt files of YOLO to the layout of COCO.',
        'data/my_yolo data/mine',
        'folder of data.yaml or classes.txt, images and labels',
    ).parse_args()


def main() -> None:
    """Convert."""
    args = parse_args()
    content = read_yaml(args)
    convert(args, find_sources(args, content), list(map(str, content['names'])))


if __name__ == '__main__':
    cli.run(main)
