# Copyright (c) mmscalablevit contributors. All rights reserved.
"""Faults of annotation files in COCO's format, which mmdet ignores or reports without the file."""

import json
import math
import os.path as osp
from collections import Counter
from pathlib import Path

from mmengine.dataset import BaseDataset

from .files import all_exist, check_images, warn_of_huge
from .findings import Findings

NUMBER = (int, float)
_SHORT = 'polygon is not of at least 3 points x, y'
REQUIRED_KEYS = dict(
    images=dict(id=(int, str), file_name=str, height=NUMBER, width=NUMBER),
    annotations=dict(id=int, image_id=(int, str), category_id=int, bbox=list, area=NUMBER),
    categories=dict(id=int, name=str),
)


def check_coco_file(
    dataset: BaseDataset, with_masks: bool, evaluated: bool, findings: Findings
) -> dict | None:
    """Check an annotation file; return its sound entries, or None if it cannot be used."""
    entries = _read_coco(dataset.ann_file, findings)
    if entries is not None:
        _check_categories(dataset.ann_file, entries, dataset.metainfo['classes'], findings)
        classes = dataset.metainfo['classes']
        for image in entries['images']:
            warn_of_huge(image['width'], image['height'], image['file_name'], findings)
        _check_annotations(dataset.ann_file, entries, classes, with_masks, evaluated, findings)
    return entries


def check_coco(
    dataset: BaseDataset, with_masks: bool, evaluated: bool, full: bool, findings: Findings
) -> dict | None:
    """Check a data set of COCO's format with its images."""
    path, folder = dataset.ann_file, dataset.data_prefix.get('img', '')
    if not all_exist([(osp.isfile, path), (osp.isdir, folder)], findings):
        return None
    entries = check_coco_file(dataset, with_masks, evaluated, findings)
    if entries is not None:
        images = [
            (osp.join(folder, image['file_name']), (image['width'], image['height']))
            for image in entries['images']
        ]
        check_images(images, path, full, findings)
    return entries


def check_boxes(dataset: BaseDataset, full: bool, findings: Findings) -> str:
    """Check a data set of boxes in another format, such as PASCAL VOC, as it reads itself."""
    try:
        samples = dataset.load_data_list()
    except FileNotFoundError as error:
        findings.error('file does not exist', error.filename)
        return ''
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


def warn_of_crowded(cfg: dict, entries: dict, path: str, findings: Findings) -> None:
    """Warn of images that hold more objects than the model returns."""
    test_cfg = cfg.get('test_cfg') or {}
    parts = [(f'model.test_cfg.{key}', test_cfg.get(key)) for key in ('rcnn', 'panoptic')]
    parts = [('model.test_cfg', test_cfg), *parts]
    limits = [
        (p['max_per_img'], f'{key}.max_per_img') for key, p in parts if p and 'max_per_img' in p
    ]
    if cfg.get('num_queries'):
        limits.append((cfg['num_queries'], 'model.num_queries'))
    if not limits:
        return
    limit, key = min(limits)
    counts = Counter(annotation['image_id'] for annotation in entries['annotations'])
    for image in entries['images']:
        if counts[image['id']] > limit:
            findings.warn(
                f'image of {path} has more objects than {key}={limit} returns',
                f'{image["file_name"]} ({counts[image["id"]]})',
            )


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
    missing = [
        key
        for key in REQUIRED_KEYS
        if not isinstance(content, dict) or not isinstance(content.get(key), list)
    ]
    if missing:
        findings.error(f'has no list of {" and no list of ".join(missing)}', path)
        return None

    entries = {}
    for part, keys in REQUIRED_KEYS.items():
        entries[part] = []
        for i, entry in enumerate(content[part]):
            values = entry if isinstance(entry, dict) else {}
            lacking = [key for key in keys if not isinstance(values.get(key), keys[key])]
            if lacking:
                findings.error(f'{path}: entry has no valid {", ".join(lacking)}', f'{part}[{i}]')
            else:
                entries[part].append(entry)
        ids = Counter(entry['id'] for entry in entries[part])
        for id_ in (id_ for id_, count in ids.items() if count > 1):
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
        findings.warn(
            f'category of {path} is no class of the config; its objects are ignored', repr(name)
        )
    used = [name for name in names if name in classes]
    if len(used) != len(set(used)):
        findings.error(f'{path} has two categories of one name', Counter(used).most_common(1)[0][0])
    elif len(used) == len(classes) and used != list(classes):
        # mmdet numbers the classes in the file's order, and names them in the config's.
        findings.error(f'classes must stand in the order of the categories of {path}', used)

    labeled = {annotation['category_id'] for annotation in entries['annotations']}
    for category in entries['categories']:
        if category['name'] in classes and category['id'] not in labeled:
            findings.warn(f'class has no object in {path}', repr(category['name']))


def _mask_fault(mask: object, image: dict) -> str | None:
    """What is wrong with a segmentation of COCO."""
    if not mask:
        return 'annotation has no segmentation, and the config trains on masks'
    if isinstance(mask, dict):
        if list(mask.get('size') or []) != [image['height'], image['width']]:
            return 'run-length encoding is not of the size of its image'
        counts = mask.get('counts')
        # pycocotools reads beyond its memory where the lengths do not add up.
        if isinstance(counts, list) and not _adds_up(counts, image['height'] * image['width']):
            return 'run-length encoding does not add up to the size of its image'
        return None if counts else 'run-length encoding has no counts'
    if not isinstance(mask, list) or not all(isinstance(polygon, list) for polygon in mask):
        return 'segmentation is neither a list of polygons nor a run-length encoding'
    if all(map(_is_short, mask)):
        return _SHORT
    return None


def _is_short(polygon: list) -> bool:
    return len(polygon) < 6 or len(polygon) % 2 == 1


def _adds_up(counts: list, pixels: int) -> bool:
    return all(isinstance(x, int) and x >= 0 for x in counts) and sum(counts) == pixels


def _check_annotations(
    path: str,
    entries: dict,
    classes: list[str],
    with_masks: bool,
    evaluated: bool,
    findings: Findings,
) -> None:
    """Check every object of an annotation file."""
    images = {image['id']: image for image in entries['images']}
    categories = {category['id'] for category in entries['categories']}
    used = {category['id'] for category in entries['categories'] if category['name'] in classes}
    for annotation in entries['annotations']:
        id_, box = f'id {annotation["id"]}', annotation['bbox']
        image = images.get(annotation['image_id'])
        if image is None:
            findings.error(f'{path}: annotation of an image_id that is not listed', id_)
            continue
        if annotation['category_id'] not in categories:
            findings.error(f'{path}: annotation of a category_id that is not listed', id_)
        if evaluated and annotation['id'] == 0:
            findings.error(f'{path}: pycocotools counts a match with this id as none', id_)
        if evaluated and 'iscrowd' not in annotation:
            findings.error(f'{path}: annotation has no iscrowd, which the evaluation reads', id_)
        numbers = all(isinstance(x, NUMBER) and math.isfinite(x) for x in box)
        if not numbers or len(box) != 4:
            findings.error(f'{path}: bbox is not four numbers x, y, width, height', id_)
            continue
        x, y, width, height = box
        inside = x < image['width'] and y < image['height'] and x + width > 0 and y + height > 0
        empty = width < 1 or height < 1 or annotation['area'] <= 0 or not inside
        if empty:
            findings.warn(f'{path}: object is ignored, its bbox is empty or off the image', id_)
        # The evaluation reads the objects, too, that training ignores.
        ignored = empty or annotation.get('ignore') or annotation['category_id'] not in used
        if with_masks and (evaluated or not ignored):
            _check_mask(path, annotation, image, evaluated, findings)


def _check_mask(
    path: str, annotation: dict, image: dict, evaluated: bool, findings: Findings
) -> None:
    mask, id_ = annotation.get('segmentation'), f'id {annotation["id"]}'
    fault = _mask_fault(mask, image)
    if fault:
        findings.error(f'{path}: {fault}', id_)
    elif isinstance(mask, list) and any(map(_is_short, mask)):
        # mmdet leaves it out where it trains; pycocotools takes it for a box or fails.
        add = findings.error if evaluated else findings.warn
        add(f'{path}: {_SHORT}', id_)
