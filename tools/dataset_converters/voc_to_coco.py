# Copyright (c) mmscalablevit contributors. All rights reserved.
"""Convert boxes in PASCAL VOC's layout to ours of COCO.

DATA holds ``JPEGImages/``, ``Annotations/*.xml`` and ``ImageSets/Main/{train,val}.txt``; without
such lists the images are split at random. Objects marked difficult become crowds, which training
and evaluation ignore.
"""

import argparse
import xml.etree.ElementTree as ET
from functools import partial
from pathlib import Path

from coco_writer import SPLITS, Object, Source, convert, make_parser, same_size

from mmscalablevit import cli
from mmscalablevit.checks.findings import Findings
from mmscalablevit.errors import UserError


def read_objects(xml: Path, size: tuple[int, int], findings: Findings) -> list[Object] | None:
    """The objects of an xml file."""
    try:
        root = ET.parse(xml).getroot()
        annotated = tuple(int(root.findtext(f'size/{x}', '0')) for x in ('width', 'height'))
        if not same_size(size, annotated, xml, findings):
            return None
        return [
            _read_object(obj, f'{xml} object {i}') for i, obj in enumerate(root.iter('object'), 1)
        ]
    except (ET.ParseError, OSError, TypeError, ValueError) as error:
        findings.error('xml cannot be read', f'{xml} ({error})')
        return None


def _read_object(obj: ET.Element, place: str) -> Object:
    edges = ('xmin', 'ymin', 'xmax', 'ymax')
    left, top, right, bottom = (float(obj.findtext(f'bndbox/{edge}')) for edge in edges)
    # Pixels count from 1, and the last one belongs to the box.
    area = right > left and bottom > top
    box = (left - 1, top - 1, right, bottom) if area else (left, top, right, bottom)
    crowd = obj.findtext('difficult') == '1'
    return Object(obj.findtext('name', '').strip(), place, box, crowd=crowd)


def find_sources(args: argparse.Namespace) -> dict[str, list[Source]]:
    """The images of each split."""
    xmls = sorted((args.data / 'Annotations').glob('*.xml'))
    if not xmls:
        raise UserError(f'{args.data / "Annotations"} contains no xml file')
    lists = {x: args.data / 'ImageSets' / 'Main' / f'{getattr(args, x)}.txt' for x in SPLITS}
    if not any(path.exists() for path in lists.values()):
        names = {'': [xml.stem for xml in xmls]}
    else:
        # The lists of a single class hold a second column.
        names = {
            split: [line.split()[0] for line in path.read_text().splitlines() if line.strip()]
            for split, path in lists.items()
        }
    files = {path.stem: path for path in (args.data / 'JPEGImages').iterdir()}
    return {
        split: [
            Source(
                image := files.get(stem, args.data / 'JPEGImages' / f'{stem}.jpg'),
                image.name,
                partial(read_objects, args.data / 'Annotations' / f'{stem}.xml'),
            )
            for stem in stems
        ]
        for split, stems in names.items()
    }


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    return make_parser(
        'Convert boxes in the layout of PASCAL VOC to that of COCO.',
        'data/bccd data/cells --leave-out',
        'folder of JPEGImages, Annotations and ImageSets',
    ).parse_args()


def main() -> None:
    """Convert."""
    args = parse_args()
    convert(args, find_sources(args))


if __name__ == '__main__':
    cli.run(main)
