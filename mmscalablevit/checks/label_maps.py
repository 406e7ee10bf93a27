# Copyright (c) mmscalablevit contributors. All rights reserved.
"""What a label map may hold, and faults of the label maps of a data set."""

import os.path as osp
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from mmengine.config import Config
from mmengine.dataset import BaseDataset
from PIL import Image

from .files import all_exist, in_threads, sample, size_or_fault
from .findings import Findings

_NAMED = 5
_IGNORED = 255


class LabelRule(NamedTuple):
    """The values that the file of a label map may hold.

    Args:
        num_classes (int): Number of classes.
        ignore_index (int): The value that is ignored. Defaults to 255.
        reduce_zero_label (bool): Whether 0 is ignored, too, and the classes begin at 1. Defaults
            to False.

    Example:
        >>> LabelRule(num_classes=3, reduce_zero_label=True).wrong(np.array([0, 1, 3, 4, 255]))
        array([4])
    """

    num_classes: int
    ignore_index: int = 255
    reduce_zero_label: bool = False

    @property
    def first(self) -> int:
        """The value of the first class."""
        return int(self.reduce_zero_label)

    def wrong(self, values: np.ndarray) -> np.ndarray:
        """The values that are neither a class nor ignored."""
        classes = (values >= self.first) & (values < self.first + self.num_classes)
        ignored = (values == self.ignore_index) | (self.reduce_zero_label & (values == 0))
        return values[~(classes & (values % 1 == 0) | ignored)]

    def allowed(self) -> str:
        """The allowed values, for a message."""
        ignored = f'{self.ignore_index} and 0' if self.reduce_zero_label else self.ignore_index
        return (
            f'allowed are {self.first} to {self.first + self.num_classes - 1} for '
            f'{self.num_classes} classes with reduce_zero_label={bool(self.reduce_zero_label)}, '
            f'and {ignored} for what is ignored'
        )


def label_rule(dataset: BaseDataset) -> LabelRule:
    """The rule of a data set of mmseg; values that its ``label_map`` renames are of the file."""
    count = len(dataset.label_map or dataset.metainfo['classes'])
    return LabelRule(count, dataset.ignore_index, dataset.reduce_zero_label)


def label_fault(
    path: str, labels: np.ndarray, size: tuple[int, int], rule: LabelRule
) -> tuple[str, str] | None:
    """Say what is wrong with a label map as stored, for an image of a size, and what is allowed."""
    if labels.ndim != 2:
        return f'{path} is a color image', 'it must have one channel that holds class numbers'
    if labels.shape[::-1] != size:
        found = f'{path} is {labels.shape[1]}x{labels.shape[0]} and not {size[0]}x{size[1]}'
        return found, 'it must be of the size of its image'
    wrong = rule.wrong(np.unique(labels))[:_NAMED].tolist()
    return (f'{path} has {", ".join(map(str, wrong))}', rule.allowed()) if wrong else None


def check_segmentation(dataset: BaseDataset, full: bool, findings: Findings) -> str:
    """Check images and their label maps; return what there is, '' if it cannot be used."""
    images, masks = (dataset.data_prefix.get(key, '') for key in ('img_path', 'seg_map_path'))
    needed = [(osp.isdir, images), (osp.isdir, masks)]
    if dataset.ann_file:
        needed.append((osp.exists, dataset.ann_file))
    if not all_exist(needed, findings):
        return ''
    pairs = [(data['img_path'], data['seg_map_path']) for data in dataset.load_data_list()]
    if not pairs:
        findings.error(f'no image ends in img_suffix={dataset.img_suffix!r}', images)

    for image, mask in pairs:
        if not osp.isfile(image):
            findings.error(f'image of {dataset.ann_file} does not exist', image)
        elif not osp.isfile(mask):
            findings.error('mask does not exist', mask)

    there = [pair for pair in pairs if all(map(osp.isfile, pair))]
    classes, chosen = dataset.metainfo['classes'], sample(there, full)
    occurring, rule = set(), label_rule(dataset)
    sizes = in_threads(size_or_fault, [image for image, _ in chosen], 'images and label values')
    for (image, mask), size in zip(chosen, sizes, strict=True):
        if isinstance(size, str):
            findings.error('image cannot be read', f'{image} ({size})')
        else:
            occurring |= _check_label_map(mask, size, rule, findings)
    if chosen and len(chosen) == len(pairs) and dataset.label_map is None:
        for i, name in enumerate(classes):
            if i + rule.first not in occurring:
                findings.warn(f'class has no pixel in {masks}', repr(name))
    return f'{len(there)} images with masks, {len(classes)} classes'


def _check_label_map(path: str, size: tuple, rule: LabelRule, findings: Findings) -> set[int]:
    """Check one label map and return the values that occur in it."""
    try:
        with Image.open(path) as image:
            labels = np.array(image)
    # Damaged files raise errors of many types.
    except Exception as error:
        findings.error('mask cannot be read', f'{path} ({error})')
        return set()
    fault = label_fault(path, labels, size, rule)
    if fault:
        findings.error(f'label map: {fault[1]}', fault[0])
    return set(np.unique(labels).tolist())


def check_ignored(cfg: Config, loader: str, ignored: int, findings: Findings) -> None:
    """Compare the value that a data set ignores with that of heads, metric, crops and padding."""
    others = [f'{key}={value}' for key, value in _ignored(cfg, loader) if value != ignored]
    if others:
        findings.error(
            'all must ignore one value, best 255 '
            '(tools/dataset_converters/masks_to_labels.py --ignore)',
            f'{loader}.dataset.ignore_index={ignored}, but {", ".join(others)}',
        )


def _ignored(cfg: Config, loader: str) -> Iterator[tuple[str, int]]:
    """Every key that ignores a value of label maps, and the value."""
    model = cfg.get('model') or {}
    for key in ('decode_head', 'auxiliary_head'):
        heads = model.get(key) or []
        for head in heads if isinstance(heads, list | tuple) else [heads]:
            yield f'model.{key}.ignore_index', head.get('ignore_index', _IGNORED)
    if 'seg_pad_val' in (model.get('data_preprocessor') or {}):
        yield 'model.data_preprocessor.seg_pad_val', model['data_preprocessor']['seg_pad_val']
    evaluators = cfg.get(loader.replace('dataloader', 'evaluator')) or []
    for evaluator in evaluators if isinstance(evaluators, list | tuple) else [evaluators]:
        if evaluator.get('type') in ('IoUMetric', 'mmseg.IoUMetric') and loader[:5] != 'train':
            key = loader.replace('dataloader', 'evaluator')
            yield f'{key}.ignore_index', evaluator.get('ignore_index', _IGNORED)
    for step in ((cfg.get(loader) or {}).get('dataset') or {}).get('pipeline') or []:
        kind = step.get('type') if isinstance(step, dict) else None
        if kind == 'RandomCrop':
            yield 'ignore_index of RandomCrop', step.get('ignore_index', _IGNORED)
        elif kind in ('RandomRotate', 'RandomMosaic'):
            yield f'seg_pad_val of {kind}', step.get('seg_pad_val', _IGNORED)
        elif kind == 'Pad':
            pad = step.get('pad_val', dict(seg=_IGNORED))
            yield 'pad_val of Pad', pad.get('seg', _IGNORED) if isinstance(pad, dict) else _IGNORED
