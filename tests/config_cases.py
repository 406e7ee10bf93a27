# Copyright (c) mmscalablevit contributors. All rights reserved.
"""The configs by name: what their file names say, each parsed once."""

import functools
import importlib.util
from pathlib import Path

import pytest
from jobs import ROOT
from mmengine.config import Config
from mmengine.registry import init_default_scope

import mmscalablevit  # noqa: F401

# mmcv-lite comes without them, and even importing the models of mmdet and mmseg needs them.
OPERATORS = importlib.util.find_spec('mmcv._ext') is not None


def names_in(folder):
    return sorted(f'{folder}/{path.name}' for path in (ROOT / 'configs' / folder).glob('*.py'))


DETECTION, SEGMENTATION, DEMO = map(names_in, ('detection', 'segmentation', 'demo'))
CONFIGS = DETECTION + SEGMENTATION
OURS = [name for name in CONFIGS if 'scalablevit' in name]


@functools.cache
def load(name):
    """The config, parsed once: a test that changes it takes a copy."""
    return Config.fromfile(ROOT / 'configs' / name, import_custom_modules=OPERATORS)


def enter(scope):
    if not OPERATORS:
        pytest.skip(f'the models of {scope} need the compiled operators of mmcv')
    init_default_scope(scope)


def parse(name):
    """Head, backbone, tags and schedule by a file name in the manner of mmdet or mmseg."""
    parts = Path(name).stem.split('_')
    if name.startswith('detection'):
        head, backbone, tags = parts[0], parts[1], parts[-2]
    else:
        backbone, head, tags = parts[:3]
    *tags, schedule = tags.split('-')
    return head, backbone, tags, schedule
