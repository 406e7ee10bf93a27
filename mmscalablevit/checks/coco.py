# Copyright (c) mmscalablevit contributors. All rights reserved.
"""Faults of annotations of boxes and masks, which mmdet ignores or reports without the file."""

import json
import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from mmengine.dataset import BaseDataset

from .files import check_images
from .findings import Findings

_NUMBER = (int, float)
_SHORT = 'polygon is not of at least 3 points x, y'
_EMPTY = 'object is ignored, its bbox is empty or off the image'
_REQUIRED_KEYS = dict(
    images=dict(id=(int, str), file_name=str, height=_NUMBER, width=_NUMBER),
    annotations=dict(id=int, image_id=(int, str), category_id=int, bbox=list, area=_NUMBER),
    categories=dict(id=int, name=str),
)


def check_coco(
    path: str, classes: list[str], with_masks: bool, evaluated: bool, findings: Findings
) -> dict | None:
    """Check an annotation file; return its sound entries, or None if it cannot be used."""
    entries = _read_coco(path, findings)
    if entries is None:
        return None
    _check_categories(path, entries, classes, findings)
    images = {image['id']: image for image in entries['images']}
    categories = {category['id']: category['name'] for category in entries['categories']}
    for annotation in entries['annotations']:
        image, mask = images.get(annotation['image_id']), annotation.get('segmentation')
        faults = [*_faults(annotation, image, categories, evaluated)]
        # The evaluation reads the objects, too, that training ignores.
        ignored = _EMPTY in faults or annotation.get('ignore')
        ignored = ignored or categories.get(annotation['category_id']) not in classes
        if with_masks and image and (evaluated or not ignored):
            faults += filter(None, [mask_fault(mask, image)])
        for fault in faults:
            # mmdet leaves a short one out where it trains; pycocotools takes it for a box or fails.
            left_out = fault == _SHORT and not evaluated and not all(map(_is_short, mask))
            report = findings.warn if left_out or fault == _EMPTY else findings.error
            report(f'{path}: {fault}', f'id {annotation["id"]}')
    return entries


def check_boxes(dataset: BaseDataset, full: bool, findings: Findings) -> str:
    """Check a data set of boxes in another format, such as PASCAL VOC, as it reads itself."""
    samples = dataset.load_data_list()
    classes, counts = dataset.metainfo['classes'], Counter()
    for data in samples:
        for instance in data.get('instances', ()):
            counts[instance['bbox_label']] += 1
            x1, y1, x2, y2 = instance['bbox']
            if x2 - x1 < 1 or y2 - y1 < 1 or x1 >= data['width'] or y1 >= data['height']:
                findings.error('box has no area or is off the image', data['img_path'])
    for i, name in enumerate(classes):
        if not counts[i]:
            findings.warn(f'class has no object in {dataset.ann_file}', repr(name))
    images = [(data['img_path'], (data['width'], data['height'])) for data in samples]
    check_images(images, dataset.ann_file, full, findings)
    return f'{len(samples)} images, {counts.total()} objects, {len(classes)} classes'


def is_plain_coco(dataset: type) -> bool:
    """Whether a data set class reads annotations as mmdet's ``CocoDataset`` does."""
    base = next((base for base in dataset.__mro__ if base.__name__ == 'CocoDataset'), None)
    readers = ('load_data_list', 'parse_data_info')
    return base is not None and all(getattr(dataset, x) is getattr(base, x) for x in readers)


def _read_coco(path: str, findings: Findings) -> dict | None:
    """The entries of an annotation file that have all keys; None if there is no using it."""
    try:
        content = json.loads(Path(path).read_bytes())
    except ValueError as error:
        findings.error('is not JSON', f'{path}: {error}')
        return None
    lists = content if isinstance(content, dict) else {}
    missing = [part for part in _REQUIRED_KEYS if not isinstance(lists.get(part), list)]
    if missing:
        findings.error(f'has no list of {" and no list of ".join(missing)}', path)
        return None
    entries = {part: [] for part in _REQUIRED_KEYS}
    for part, keys in _REQUIRED_KEYS.items():
        for i, entry in enumerate(lists[part]):
            values = entry if isinstance(entry, dict) else {}
            lacking = [key for key in keys if not isinstance(values.get(key), keys[key])]
            if lacking:
                findings.error(f'{path}: entry has no valid {", ".join(lacking)}', f'{part}[{i}]')
            else:
                entries[part].append(entry)
        for id_, count in Counter(entry['id'] for entry in entries[part]).items():
            if count > 1:
                findings.error(f'{path}: id is given to several {part}', id_)
        if not entries[part]:
            findings.error(f'{path} has no usable entry in', part)
    return entries


def _check_categories(path: str, entries: dict, classes: list[str], findings: Findings) -> None:
    """Compare the categories of an annotation file with the classes of the config."""
    names = [category['name'] for category in entries['categories']]
    for name in (name for name in classes if name not in names):
        findings.error(f'class of the config is not among the categories of {path}', repr(name))
    for name in (name for name in names if name not in classes):
        fault = f'category of {path} is no class of the config; its objects are ignored'
        findings.warn(fault, repr(name))
    used = [name for name in names if name in classes]
    # mmdet numbers the classes in the file's order, and names them in the config's.
    if sorted(used) == sorted(classes) and used != list(classes):
        findings.error(f'classes must be in the order of the categories of {path}', used)
    elif len(used) != len(set(used)):
        findings.error(f'{path} has two categories of one name', Counter(used).most_common(1)[0][0])

    labeled = {annotation['category_id'] for annotation in entries['annotations']}
    for category in entries['categories']:
        if category['name'] in classes and category['id'] not in labeled:
            findings.warn(f'class has no object in {path}', repr(category['name']))


def _faults(
    annotation: dict, image: dict | None, categories: dict, evaluated: bool
) -> Iterator[str]:
    """What is wrong with an object but for its mask."""
    box = annotation['bbox']
    is_box = len(box) == 4 and all(isinstance(x, _NUMBER) and math.isfinite(x) for x in box)
    if not image:
        yield 'annotation of an image_id that is not listed'
    if annotation['category_id'] not in categories:
        yield 'annotation of a category_id that is not listed'
    if evaluated and annotation['id'] == 0:
        yield 'pycocotools counts a match with this id as none'
    if evaluated and 'iscrowd' not in annotation:
        yield 'annotation has no iscrowd, which the evaluation reads'
    if not is_box:
        yield 'bbox is not four numbers x, y, width, height'
    elif image:
        x, y, width, height = box
        inside = x < image['width'] and y < image['height'] and x + width > 0 and y + height > 0
        if not (inside and width >= 1 and height >= 1 and annotation['area'] > 0):
            yield _EMPTY


def mask_fault(mask: object, image: dict) -> str | None:
    """What is wrong with a segmentation of COCO."""
    if not mask or not isinstance(mask, list | dict):
        return 'annotation has no segmentation, and the config trains on masks'
    if isinstance(mask, list):
        return _SHORT if any(map(_is_short, mask)) else None
    counts = mask.get('counts')
    if list(mask.get('size') or []) != [image['height'], image['width']]:
        return 'run-length encoding is not of the size of its image'
    # pycocotools reads beyond its memory where the lengths do not add up.
    if isinstance(counts, list):
        lengths = all(isinstance(x, int) and x >= 0 for x in counts)
        if not lengths or sum(counts) != image['height'] * image['width']:
            return 'run-length encoding does not add up to the size of its image'
    return None if counts else 'run-length encoding has no counts'


def _is_short(polygon: list) -> bool:
    return not isinstance(polygon, list) or len(polygon) < 6 or len(polygon) % 2 == 1
