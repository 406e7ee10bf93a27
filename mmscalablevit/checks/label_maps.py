# Copyright (c) mmscalablevit contributors. All rights reserved.
"""What a label map may hold, and faults of the label maps of a data set."""

import os.path as osp
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from mmengine.config import Config
from mmengine.dataset import BaseDataset
from PIL import Image

from .files import all_exist, read_sizes, sample
from .findings import Findings

_NAMED = 5
_IGNORED = 255
_METRICS = ('IoUMetric', 'mmseg.IoUMetric')
# Transforms that ignore a value, by the key that sets it.
_STEPS = dict(RandomCrop='ignore_index', RandomRotate='seg_pad_val', RandomMosaic='seg_pad_val')


class LabelRule(NamedTuple):
    """The values that the file of a label map may hold; ``reduce_zero_label`` ignores 0, too."""

    num_classes: int
    ignore_index: int = 255
    reduce_zero_label: bool = False

    @property
    def classes(self) -> range:
        """The values of the classes."""
        first = int(self.reduce_zero_label)
        return range(first, first + self.num_classes)

    def wrong(self, values: np.ndarray) -> np.ndarray:
        """The values that are neither a class nor ignored."""
        ignored = [self.ignore_index, 0] if self.reduce_zero_label else [self.ignore_index]
        return values[~np.isin(values, [*self.classes, *ignored])]

    def allowed(self) -> str:
        """The allowed values, for a message."""
        ignored = f'{self.ignore_index} and 0' if self.reduce_zero_label else self.ignore_index
        return (
            f'allowed are {self.classes.start} to {self.classes.stop - 1} for {self.num_classes} '
            f'classes with reduce_zero_label={bool(self.reduce_zero_label)}, and {ignored} for '
            'what is ignored'
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
    for _, mask, size in read_sizes(chosen, 'images and label values', findings):
        try:
            with Image.open(mask) as image:
                labels = np.array(image)
        # Damaged files raise errors of many types.
        except Exception as error:
            findings.error('mask cannot be read', f'{mask} ({error})')
            continue
        fault = label_fault(mask, labels, size, rule)
        if fault:
            findings.error(f'label map: {fault[1]}', fault[0])
        occurring.update(np.unique(labels).tolist())
    if chosen and len(chosen) == len(pairs) and dataset.label_map is None:
        for value, name in zip(rule.classes, classes, strict=True):
            if value not in occurring:
                findings.warn(f'class has no pixel in {masks}', repr(name))
    return f'{len(there)} images with masks, {len(classes)} classes'


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
    model, evaluator = cfg.get('model') or {}, loader.replace('dataloader', 'evaluator')
    parts = {f'model.{key}': model.get(key) for key in ('decode_head', 'auxiliary_head')}
    parts[evaluator] = cfg.get(evaluator)
    for name, part in parts.items():
        for item in part if isinstance(part, list | tuple) else [part]:
            if item and (name != evaluator or item.get('type') in _METRICS):
                yield f'{name}.ignore_index', item.get('ignore_index', _IGNORED)
    if 'seg_pad_val' in (model.get('data_preprocessor') or {}):
        yield 'model.data_preprocessor.seg_pad_val', model['data_preprocessor']['seg_pad_val']
    for step in ((cfg.get(loader) or {}).get('dataset') or {}).get('pipeline') or []:
        kind = step.get('type') if isinstance(step, dict) else None
        if kind in _STEPS:
            yield f'{_STEPS[kind]} of {kind}', step.get(_STEPS[kind], _IGNORED)
        elif kind == 'Pad':
            pad = step.get('pad_val')
            yield 'pad_val of Pad', pad.get('seg', _IGNORED) if isinstance(pad, dict) else _IGNORED
