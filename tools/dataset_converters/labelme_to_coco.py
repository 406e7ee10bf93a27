# Copyright (c) mmscalablevit contributors. All rights reserved.
"""Convert the json files of labelme to our layout of COCO.

DATA holds ``{train,val}/*.json``, or the files of one folder are split at random. Rectangles,
polygons and circles become masks; shapes of one label and one ``group_id`` are one object.
"""

import argparse
import json
import math
from functools import partial
from pathlib import Path

from coco_writer import Object, Source, convert, make_parser, polygon_box, same_size

from mmscalablevit import cli
from mmscalablevit.checks.findings import Findings
from mmscalablevit.errors import UserError

CIRCLE_POINTS = 64


def to_polygon(kind: str, points: list[list[float]]) -> list[float] | None:
    """A shape's outline as x, y, x, y, ...; None for shapes without an area."""
    if kind == 'rectangle' and len(points) == 2:
        (x1, y1), (x2, y2) = points
        points = [(x1, y1), (x2, y1), (x2, y2), (x1, y2)]
    elif kind == 'circle' and len(points) == 2:
        (x, y), edge = points
        radius = math.dist((x, y), edge)
        angles = [2 * math.pi * i / CIRCLE_POINTS for i in range(CIRCLE_POINTS)]
        points = [(x + radius * math.cos(a), y + radius * math.sin(a)) for a in angles]
    elif kind not in ('polygon', 'rectangle') or len(points) < 3:
        return None
    return [float(value) for point in points for value in point]


def read_objects(path: Path, size: tuple[int, int], findings: Findings) -> list[Object] | None:
    """The objects of a json file."""
    content = json.loads(path.read_text())
    annotated = (content.get('imageWidth'), content.get('imageHeight'))
    if not same_size(size, annotated, path, findings):
        return None
    groups = {}
    for i, shape in enumerate(content['shapes'], start=1):
        kind, label = shape.get('shape_type') or 'polygon', str(shape['label'])
        polygon = to_polygon(kind, shape['points'])
        if polygon is None:
            fault = f'{kind} of {len(shape["points"])} points has no area'
            findings.error(fault, f'{path} shape {i} {label}')
            continue
        group = shape.get('group_id')
        groups.setdefault((label, i if group is None else f'group {group}'), []).append(polygon)
    return [
        Object(label, f'{path} shape {i}', polygon_box(polygons), polygons)
        for (label, i), polygons in groups.items()
    ]


def find_sources(args: argparse.Namespace, findings: Findings) -> dict[str, list[Source]]:
    """The images of each split."""
    folders = {split: args.data / getattr(args, split) for split in ('train', 'val')}
    if not any(folder.is_dir() for folder in folders.values()):
        folders = {'': args.data}
    return {split: _of_folder(folder, findings) for split, folder in folders.items()}


def _of_folder(folder: Path, findings: Findings) -> list[Source]:
    sources = []
    for path in sorted(folder.rglob('*.json')):
        try:
            content = json.loads(path.read_text())
            image = path.parent / str(content['imagePath']).replace('\\', '/')
            sound = all({'label', 'points'} <= shape.keys() for shape in content['shapes'])
        except (AttributeError, KeyError, TypeError, ValueError):
            sound = False
        if not sound:
            wanted = 'with imagePath and shapes of label and points'
            findings.error(f"json is not labelme's, {wanted}", path)
            continue
        # An image that was moved since lies beside its json.
        image = image if image.is_file() else path.parent / image.name
        name = path.relative_to(folder).with_suffix(image.suffix).as_posix()
        sources.append(Source(image, name, partial(read_objects, path)))
    if not sources:
        raise UserError(f'{folder} contains no json file of labelme')
    return sources


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    return make_parser(
        'Convert the json files of labelme to the layout of COCO.',
        'data/my_labelme data/mine',
        'folder of the json files and images',
    ).parse_args()


def main() -> None:
    """Convert."""
    args, findings = parse_args(), Findings()
    convert(args, find_sources(args, findings), findings=findings)


if __name__ == '__main__':
    cli.run(main)
