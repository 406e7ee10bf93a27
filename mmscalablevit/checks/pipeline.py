# Copyright (c) mmscalablevit contributors. All rights reserved.
"""Faults of images and label maps, found while they are loaded and named with their file."""

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np
import torch
from mmengine.dataset import BaseDataset, Compose
from mmengine.logging import print_log
from PIL import Image

from ..errors import DataError

# What a whole file begins and ends with; OpenCV fills the missing part of an image with gray.
_FORMATS = {b'\xff\xd8': b'\xff\xd9', b'\x89PNG': b'IEND\xaeB`\x82'}
_NAMED = 5


class CheckedPipeline(Compose):
    """A data pipeline whose errors name the image.

    Args:
        transforms (Sequence[Callable]): The transforms.
        checks (dict[str, Callable[[dict], None]]): Called with the sample once, after the transform
            that adds this key to it.
        source (str): Where the image is listed, for the message. Defaults to ''.

    Example:
        >>> pipeline = CheckedPipeline([lambda sample: sample['no such key']], {})
        >>> pipeline(dict(img_path='1.jpg'))
        Traceback (most recent call last):
        mmscalablevit.errors.DataError: image 1.jpg: function fails: KeyError: 'no such key'
    """

    def __init__(
        self,
        transforms: Sequence[Callable],
        checks: dict[str, Callable[[dict], None]],
        source: str = '',
    ) -> None:
        super().__init__(transforms)
        self.checks = checks
        self.source = source

    def __call__(self, data: dict) -> dict | None:
        """Apply the transforms in turn.

        Raises:
            DataError: If a transform or a check fails. What is missing or forbidden stays the
                ``OSError`` that names it.
        """
        place = _place(data, self.source)
        pending = dict(self.checks)
        for transform in self.transforms:
            try:
                data = transform(data)
            except DataError:
                raise
            except Exception as error:
                if isinstance(error, OSError) and error.filename:
                    raise
                name = type(transform).__name__
                reason = ' '.join(f'{type(error).__name__}: {error}'.split())
                raise DataError(f'{place}: {name} fails: {reason}') from error
            if data is None:
                return None
            for key in [key for key in pending if key in data]:
                pending.pop(key)(data)
        return data


def check_pipelines(dataset: object) -> None:
    """Make the pipelines of a data set name the file of every fault.

    Truncated images, images of another size than annotated, and label maps of another size or with
    values that are no class, which OpenCV and the toolboxes let pass, are errors from then on; an
    image that only lies on its side is warned of once.

    Args:
        dataset (object): A data set of a toolbox, or a wrapper of some.

    Example:
        >>> check_pipelines(runner.train_dataloader.dataset)  # doctest: +SKIP
    """
    for leaf in data_sets(dataset):
        if not isinstance(getattr(leaf, 'pipeline', None), Compose):
            continue
        source = leaf.ann_file if isinstance(leaf.ann_file, str) else ''
        checks = dict(ori_shape=_ImageCheck(source))
        if hasattr(leaf, 'reduce_zero_label') and leaf.metainfo.get('classes'):
            checks['gt_seg_map'] = _LabelCheck(leaf)
        leaf.pipeline = _checked(leaf.pipeline, checks, source)


def data_sets(dataset: object) -> Iterator[object]:
    """The data sets inside wrappers such as RepeatDataset and ConcatDataset.

    Args:
        dataset (object): A data set or a wrapper, or the config of one.

    Yields:
        object: The data sets that have no other inside.

    Example:
        >>> from mmengine.dataset import RepeatDataset
        >>> dataset = BaseDataset(lazy_init=True, metainfo=dict(classes=('cat',)))
        >>> wrapper = RepeatDataset(dataset, 2, lazy_init=True)
        >>> [leaf.metainfo['classes'] for leaf in data_sets(wrapper)]
        [('cat',)]
    """
    get = dataset.get if isinstance(dataset, dict) else partial(getattr, dataset)
    inner = [get('dataset', None), *(get('datasets', None) or [])]
    inner = [nested for nested in inner if nested is not None]
    if not inner:
        yield dataset
    for nested in inner:
        yield from data_sets(nested)


def _checked(pipeline: Compose, checks: dict, source: str) -> CheckedPipeline:
    for transform in pipeline.transforms:
        # Test-time augmentation loads the label map once for each view of the image.
        if hasattr(transform, 'subroutines'):
            inner = {key: check for key, check in checks.items() if key != 'ori_shape'}
            transform.subroutines = [
                _checked(views, inner, source) for views in transform.subroutines
            ]
    return CheckedPipeline(pipeline.transforms, checks, source)


def _place(data: dict, source: str) -> str:
    place = f'image {data.get("img_path")}'
    if data.get('seg_map_path'):
        place += f' with label map {data["seg_map_path"]}'
    return f'{place} of {source}' if source else place


class _ImageCheck:
    def __init__(self, source: str) -> None:
        self.source = source
        # Shared with the workers of a data loader, for one warning in all.
        self.warned = torch.zeros(1, dtype=torch.bool).share_memory_()

    def __call__(self, data: dict) -> None:
        path = data.get('img_path')
        if not isinstance(path, str):
            return
        if not _ends_whole(path):
            _load(path)
        annotated = (data.get('height'), data.get('width'))
        found = tuple(data['ori_shape'][:2])
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


class _LabelCheck:
    """Checks a label map as it was loaded, with the zero label reduced already."""

    def __init__(self, dataset: BaseDataset) -> None:
        self.num_classes = len(dataset.metainfo['classes'])
        self.ignored = dataset.ignore_index
        self.reduced = dataset.reduce_zero_label

    def __call__(self, data: dict) -> None:
        path, labels = data['seg_map_path'], data['gt_seg_map']
        if labels.ndim != 2:
            raise DataError(
                f'label map {path} is a color image; it must have one channel that holds class '
                'numbers'
            )
        size = tuple(data['ori_shape'][:2]) if 'ori_shape' in data else labels.shape
        if labels.shape != size:
            raise DataError(
                f'label map {path} is {labels.shape[1]}x{labels.shape[0]} and not '
                f'{size[1]}x{size[0]} as image {data["img_path"]}'
            )
        if ((labels >= self.num_classes) & (labels != self.ignored)).any():
            values = np.unique(labels)
            wrong = values[(values >= self.num_classes) & (values != self.ignored)]
            raise DataError(self._message(path, wrong + self.reduced))
        wrong = _wide_values(path)
        if wrong.size:
            raise DataError(self._message(path, wrong))

    def _message(self, path: str, wrong: np.ndarray) -> str:
        first, last = int(self.reduced), self.num_classes - 1 + int(self.reduced)
        ignored = f'{self.ignored} and 0' if self.reduced else f'{self.ignored}'
        return (
            f'label map {path} has {", ".join(map(str, wrong[:_NAMED].tolist()))}; allowed are '
            f'{first} to {last} for {self.num_classes} classes with '
            f'reduce_zero_label={self.reduced}, and {ignored} for what is ignored'
        )


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
