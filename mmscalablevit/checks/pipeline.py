# Copyright (c) mmscalablevit contributors. All rights reserved.
"""Faults of images and label maps, found while they are loaded and named with their file."""

import copy
import logging
import os
import os.path as osp
import traceback
from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np
import torch
from mmcv.transforms import BaseTransform
from mmengine.logging import print_log
from mmengine.registry import DATASETS, TRANSFORMS
from PIL import Image

from ..errors import DataError, add_note
from .label_maps import LabelRule

# What a whole file begins and ends with; OpenCV fills the missing part of an image with gray.
_FORMATS = {b'\xff\xd8': b'\xff\xd9', b'\x89PNG': b'IEND\xaeB`\x82'}


def with_checks(dataset: dict) -> dict:
    """Add checks of images and label maps to the pipelines of a data set."""
    dataset = copy.copy(dataset)
    if isinstance(dataset.get('dataset'), dict):
        dataset['dataset'] = with_checks(dataset['dataset'])
    elif dataset.get('datasets'):
        inner = [with_checks(x) if isinstance(x, dict) else x for x in dataset['datasets']]
        dataset['datasets'] = inner
    elif dataset.get('pipeline'):
        file = dataset.get('ann_file')
        source = osp.join(dataset.get('data_root') or '', file) if isinstance(file, str) else ''
        checks = dict(LoadImageFromFile=dict(type='CheckImage', source=source))
        checks.update(_label_check(dataset))
        dataset['pipeline'] = list(_checked(dataset['pipeline'], checks))
    return dataset


def explain_sample(error: Exception) -> None:
    """Name the image in an error of a data pipeline."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    samples = [frame.f_locals.get(name) for frame in frames for name in ('data', 'results')]
    places = [x for x in samples if isinstance(x, dict) and x.get('img_path')]
    # What is missing or forbidden is named by its error.
    if not places or isinstance(error, DataError) or getattr(error, 'filename', None):
        return
    place = f'image {places[0]["img_path"]}'
    if places[0].get('seg_map_path'):
        place += f' with label map {places[0]["seg_map_path"]}'
    if any(osp.basename(frame.f_code.co_filename) == 'loading.py' for frame in frames):
        reason = ' '.join(f'{type(error).__name__}: {error}'.split())
        raise DataError(f'{place} cannot be loaded: {reason}') from error
    add_note(error, place)


def data_sets(dataset: object) -> Iterator[object]:
    """The data sets inside wrappers such as RepeatDataset and ConcatDataset."""
    get = dataset.get if isinstance(dataset, dict) else partial(getattr, dataset)
    inner = [get('dataset', None), *(get('datasets', None) or [])]
    inner = [nested for nested in inner if nested is not None]
    if not inner:
        yield dataset
    for nested in inner:
        yield from data_sets(nested)


@TRANSFORMS.register_module()
class CheckImage(BaseTransform):
    """Refuse an image that is damaged, or of another size than annotated.

    Args:
        source (str): Where the image is listed, for the message. Defaults to ''.

    Example:
        >>> pipeline = [dict(type='LoadImageFromFile'), dict(type='CheckImage')]
    """

    def __init__(self, source: str = '') -> None:
        self.source = source
        # Shared with the workers of a data loader, for one warning in all.
        self.warned = torch.zeros(1, dtype=torch.bool).share_memory_()

    def transform(self, results: dict) -> dict:
        """Check a sample.

        Raises:
            DataError: If it has a fault.
        """
        path = results.get('img_path')
        if isinstance(path, str):
            if not _ends_whole(path):
                _load(path)
            self._check_size(path, results)
        return results

    def _check_size(self, path: str, results: dict) -> None:
        annotated = (results.get('height'), results.get('width'))
        found = tuple(results['ori_shape'][:2])
        if None in annotated or annotated == found:
            return
        fault = (
            f'image {path} is {found[1]}x{found[0]} (EXIF rotation applied) and not '
            f'{annotated[1]}x{annotated[0]} as in {self.source or "its annotation"}, so that '
            'boxes and masks would lie elsewhere'
        )
        if annotated != found[::-1]:
            raise DataError(fault)
        if not self.warned:
            self.warned.fill_(True)
            print_log(
                f'{fault}, unless they were drawn on the turned photograph; if they were drawn on '
                "it as stored, set color_type='color_ignore_orientation' in LoadImageFromFile "
                '(said once; tools/check_data.py lists all such images)',
                logger='current',
                level=logging.WARNING,
            )


@TRANSFORMS.register_module()
class CheckLabelMap(BaseTransform):
    """Refuse a label map of another size than its image, or with values that are no class.

    Args:
        num_classes (int): Number of classes.
        ignore_index (int): The value of pixels without a class.
        reduce_zero_label (bool): Whether 0 in the file is ignored, and 1 the first class.

    Example:
        >>> pipeline = [
        ...     dict(type='LoadImageFromFile'), dict(type='LoadAnnotations'),
        ...     dict(type='CheckLabelMap', num_classes=150, ignore_index=255,
        ...          reduce_zero_label=True)]
    """

    def __init__(self, num_classes: int, ignore_index: int, reduce_zero_label: bool) -> None:
        self.rule = LabelRule(num_classes, ignore_index, bool(reduce_zero_label))

    def transform(self, results: dict) -> dict:
        """Check a sample, with the zero label reduced already.

        Raises:
            DataError: If it has a fault.
        """
        path, labels = results['seg_map_path'], results['gt_seg_map']
        if labels.ndim != 2:
            raise DataError(
                f'label map {path} is a color image; it must have one channel that holds class '
                'numbers'
            )
        # In test-time augmentation the image was resized before.
        size = tuple(results['ori_shape'][:2])
        if labels.shape != size:
            raise DataError(
                f'label map {path} is {labels.shape[1]}x{labels.shape[0]} and not '
                f'{size[1]}x{size[0]} as image {results["img_path"]}'
            )
        count, ignored, first = self.rule.num_classes, self.rule.ignore_index, self.rule.first
        wrong = labels[(labels >= count) & (labels != ignored)]
        # The first class is 0 by now, whatever it is in the file.
        wrong = np.unique(wrong) + first if wrong.size else _wide_values(path)
        if wrong.size:
            raise DataError(f'label map {path} has {self.rule.fault(wrong)}; {self.rule.allowed()}')
        return results


def _label_check(dataset: dict) -> dict[str, dict]:
    """The check of the label maps of a data set of mmseg."""
    kind = dataset.get('type')
    with DATASETS.switch_scope_and_registry(dataset.get('_scope_')) as registry:
        kind = registry.get(kind) if isinstance(kind, str) else kind
        if 'BaseSegDataset' not in (base.__name__ for base in getattr(kind, '__mro__', ())):
            return {}
        built = registry.build(dict(dataset, pipeline=[], lazy_init=True))
    if not built.metainfo.get('classes'):
        return {}
    check = dict(type='CheckLabelMap', num_classes=len(built.metainfo['classes']))
    check.update(ignore_index=built.ignore_index, reduce_zero_label=built.reduce_zero_label)
    return dict(LoadAnnotations=check)


def _checked(steps: Sequence, checks: dict[str, dict]) -> Iterator:
    for step in steps:
        # Test-time augmentation: lists of alternatives.
        names = [_name(x) for x in (step if isinstance(step, (list, tuple)) else [step])]
        if isinstance(step, dict) and isinstance(step.get('transforms'), (list, tuple)):
            step = dict(step, transforms=list(_checked(step['transforms'], checks)))
        yield step
        for name, check in checks.items():
            if name in names:
                yield [check] if isinstance(step, (list, tuple)) else check


def _name(step: object) -> str:
    kind = step.get('type') if isinstance(step, dict) else None
    return str(getattr(kind, '__name__', kind)).split('.')[-1]


def _wide_values(path: str) -> np.ndarray:
    """Values of a label map of more than 8 bits that mmseg would wrap to other classes."""
    try:
        with Image.open(path) as image:
            if image.mode in ('1', 'L', 'P'):
                return np.empty(0)
            values = np.unique(np.array(image))
    # A path of a storage back end, or a format of another decoder.
    except OSError:
        return np.empty(0)
    return values[(values < 0) | (values > 255) | (values % 1 != 0)]


def _ends_whole(path: str) -> bool:
    try:
        with open(path, 'rb') as file:
            start = file.read(4)
            file.seek(-8, os.SEEK_END)
            end = file.read()
    # A path of a storage back end, whose bytes OpenCV has decoded.
    except OSError:
        return True
    return all(end.endswith(last) for first, last in _FORMATS.items() if start.startswith(first))


def _load(path: str) -> None:
    """Decode an image of unusual end with Pillow, which tells a cut from trailing bytes."""
    try:
        with Image.open(path) as image:
            image.load()
    # Damaged files raise errors of many types.
    except Exception as error:
        raise DataError(f'image {path} is damaged: {error}') from error
