# Copyright (c) mmscalablevit contributors. All rights reserved.
"""Faults of images and label maps, found while they are loaded and named with their file."""

import logging
import os
import os.path as osp
import traceback
from functools import partial

import numpy as np
from mmengine.logging import print_log
from PIL import Image, UnidentifiedImageError
from torch.utils.data import Dataset

from ..errors import DataError, add_note
from .files import read_size
from .label_maps import label_fault, label_rule

# What a whole file begins and ends with; OpenCV fills the missing part of an image with gray.
_FORMATS = {b'\xff\xd8': b'\xff\xd9', b'\x89PNG': b'IEND\xaeB`\x82'}


def data_sets(dataset: object) -> list:
    """The data sets inside wrappers such as RepeatDataset and ConcatDataset."""
    get = dataset.get if isinstance(dataset, dict) else partial(getattr, dataset)
    inner = [get('dataset', None), *(get('datasets', None) or [])]
    leaves = [leaf for nested in inner if nested is not None for leaf in data_sets(nested)]
    return leaves or [dataset]


class SampleChecks:
    """Checks of the local files of a data set with ``get_data_info``, each sample once."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset
        self.seen = np.zeros(len(dataset) if hasattr(dataset, 'get_data_info') else 0, bool)
        self.warned = False

    def check(self, index: int) -> None:
        """Raise a ``DataError`` if the image or label map of a sample is damaged or wrong."""
        if not 0 <= index < len(self.seen) or self.seen[index]:
            return
        self.seen[index] = True
        sample = self.dataset.get_data_info(index)
        path, mask = sample.get('img_path'), sample.get('seg_map_path')
        # What is missing is named by the error of loading it.
        if not isinstance(path, str) or not osp.isfile(path):
            return
        try:
            size = read_size(path, decode=not _ends_whole(path))
        # Another decoder may read it.
        except (UnidentifiedImageError, Image.DecompressionBombError):
            return
        # Damaged files raise errors of many types.
        except Exception as error:
            raise DataError(f'image {path} is damaged: {error}') from error
        self._check_size(path, size, (sample.get('width'), sample.get('height')))
        # Those of mmdet are of other kinds.
        if mask and osp.isfile(mask) and 'reduce_zero_label' in sample:
            self._check_label_map(mask, size)

    def _check_size(self, path: str, size: tuple[int, int], annotated: tuple) -> None:
        if None in annotated or annotated == size:
            return
        fault = (
            f'image {path} is {size[0]}x{size[1]} (EXIF rotation applied) and not '
            f'{annotated[0]}x{annotated[1]} as annotated, so that boxes and masks would lie '
            'elsewhere'
        )
        if annotated != size[::-1]:
            raise DataError(fault)
        if not self.warned:
            self.warned = True
            print_log(
                f'{fault}, unless they were drawn on the rotated photograph; if they were drawn on '
                "it as stored, set color_type='color_ignore_orientation' in LoadImageFromFile "
                '(tools/check_data.py lists all such images)',
                'current',
                logging.WARNING,
            )

    def _check_label_map(self, path: str, size: tuple[int, int]) -> None:
        try:
            with Image.open(path) as image:
                labels = np.array(image)
        # It is named, if the pipeline cannot load it either.
        except Exception:
            return
        fault = label_fault(path, labels, size, label_rule(data_sets(self.dataset)[0]))
        if fault:
            raise DataError(f'label map {fault[0]}; {fault[1]}')


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


def _ends_whole(path: str) -> bool:
    """Whether a file ends as its format does; cut files do not, nor do some with trailing bytes."""
    with open(path, 'rb') as file:
        start = file.read(4)
        file.seek(max(osp.getsize(path) - 8, 0), os.SEEK_SET)
        end = file.read()
    return all(end.endswith(last) for first, last in _FORMATS.items() if start.startswith(first))
