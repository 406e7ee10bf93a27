# Copyright (c) mmscalablevit contributors. All rights reserved.
"""Convert COCO files as people have them to our layout of COCO.

DATA holds a json file a split, with the split's name in its path, or one for all, which is split at
random. Images are found anywhere in DATA by the end of their ``file_name``. Categories are counted
from 1, areas computed, run-length encodings compressed.
"""

import argparse
import json
from functools import partial
from pathlib import Path, PureWindowsPath

import coco_writer as writer
from pycocotools import mask as coco_mask

from mmscalablevit import cli
from mmscalablevit.checks.coco import mask_fault
from mmscalablevit.checks.findings import Findings
from mmscalablevit.errors import UserError


def find_files(args: argparse.Namespace) -> dict[str, Path]:
    """The json file of each split, or the one that is to be split."""
    found = sorted(args.data.rglob('*.json'))
    # COCO's own files of captions and keypoints lie beside those.
    found = [path for path in found if 'instances' in path.name] or found
    if len(found) == 1:
        return {'': found[0]}
    files = {}
    for split, name in ((split, getattr(args, split)) for split in writer.SPLITS):
        files[split], *more = [x for x in found if name in str(x.relative_to(args.data))] or [None]
        if more or not files[split]:
            named = ', '.join(map(str, [files[split], *more]))
            raise UserError(
                f'--{split} {name} must be in the path of one json file, not of {named}'
            )
    return files


def read_objects(
    path: Path, image: dict, names: dict, size: tuple[int, int], findings: Findings
) -> list[writer.Object] | None:
    """The objects of an image."""
    annotated, objects = (image.get('width'), image.get('height')), []
    if not writer.same_size(size, annotated, f'{path} image {image["id"]}', findings):
        return None
    for entry in image['objects']:
        place, mask = f'{path} annotation {entry.get("id")}', entry.get('segmentation') or None
        if isinstance(mask, list):
            # Polygons of less than three points, beside sound ones, are leftovers of tools.
            mask = [x for x in mask if isinstance(x, list) and len(x) >= 6] or mask
        fault = mask and mask_fault(mask, dict(width=size[0], height=size[1]))
        if entry.get('category_id') not in names:
            fault = 'category_id is of no category'
        elif len(entry.get('bbox') or ()) != 4:
            fault = 'bbox is not x, y, width, height'
        if fault:
            findings.error(fault, place)
            continue
        if isinstance(mask, dict) and isinstance(mask['counts'], list):
            mask = coco_mask.frPyObjects(mask, *mask['size'])
            mask['counts'] = mask['counts'].decode('ascii')
        left, top, width, height = entry['bbox']
        box, crowd = (left, top, left + width, top + height), bool(entry.get('iscrowd'))
        objects.append(writer.Object(names[entry['category_id']], place, box, mask, crowd))
    return objects


def find_image(name: PureWindowsPath, split: str, images: list[Path]) -> list[Path]:
    """The paths that share most of the end of a file name; of these, those of the split."""
    for start in range(-len(name.parts), 0):
        found = [path for path in images if path.parts[start:] == name.parts[start:]]
        if found:
            return [path for path in found if split in str(path)] or found
    return [Path(name.as_posix())]


def read_file(path: Path, findings: Findings) -> tuple[dict[int, str], list[dict]]:
    """The names of the categories by id, and the images with their annotations."""
    try:
        content = json.loads(path.read_text())
        names = {category['id']: str(category['name']) for category in content['categories']}
        images = {image['id']: dict(image, objects=[]) for image in content['images']}
        for entry in content['annotations']:
            if entry['image_id'] in images:
                images[entry['image_id']]['objects'].append(entry)
            else:
                place = f'{path} annotation {entry.get("id")}'
                findings.error('annotation belongs to no image', place)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f'{path} is no COCO file of annotated images ({error!r})') from error
    return dict(sorted(names.items())), list(images.values())


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    return writer.make_parser(
        'Convert COCO annotations of any folders and ids to the layout of our configs.',
        'data/my_coco data/mine --val valid',
        'folder of the json files and the images',
    ).parse_args()


def main() -> None:
    """Convert."""
    args, findings = parse_args(), Findings()
    by_name, sources, classes = {}, {}, {}
    for image in writer.list_images(args.data):
        by_name.setdefault(image.name, []).append(image)
    for split, path in find_files(args).items():
        names, images = read_file(path, findings)
        classes |= dict.fromkeys(names.values())
        sources[split] = []
        for image in images:
            name = PureWindowsPath(image['file_name'])
            found = find_image(name, getattr(args, split, ''), by_name.get(name.name, []))
            if len(found) > 1:
                findings.error('image is in several folders', f'{path} {name.as_posix()}')
                continue
            file = found[0].as_posix()
            read = partial(read_objects, path, image, names)
            sources[split].append(writer.Source(args.data / file, file, read))
    writer.convert(args, sources, list(classes), findings)


if __name__ == '__main__':
    cli.run(main)
