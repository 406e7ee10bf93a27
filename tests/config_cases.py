# Copyright (c) mmscalablevit contributors. All rights reserved.
"""The configs by name: what their file names say, each parsed once."""

import functools
import importlib.util
import json
from pathlib import Path
from typing import NamedTuple

import pytest
from mmengine.config import Config
from mmengine.registry import init_default_scope

import mmscalablevit  # noqa: F401

ROOT = Path(__file__).parents[1]
# mmcv-lite comes without them, and even importing the models of mmdet and mmseg needs them.
OPERATORS = importlib.util.find_spec('mmcv._ext') is not None
CONFIGS = sorted(
    str(path.relative_to(ROOT / 'configs'))
    for folder in ('detection', 'segmentation')
    for path in (ROOT / 'configs' / folder).glob('*.py')
)
DEMO = sorted(f'demo/{path.name}' for path in (ROOT / 'configs' / 'demo').glob('*.py'))
DETECTION = [name for name in CONFIGS if name.startswith('detection')]
SEGMENTATION = [name for name in CONFIGS if name.startswith('segmentation')]
OURS = [name for name in CONFIGS if 'scalablevit' in name]


class Experiment(NamedTuple):
    """What a file name says, in the manner of mmdet or mmseg."""

    head: str
    backbone: str
    tags: list[str]
    schedule: str


@functools.cache
def load(name):
    """The config, parsed once: a test that changes it takes a copy."""
    return Config.fromfile(ROOT / 'configs' / name, import_custom_modules=OPERATORS)


def one_of_each(names, key):
    """The first config of each value of ``key``: what configs share is tested once."""
    found = {}
    for name in names:
        found.setdefault(json.dumps(key(name), sort_keys=True, default=str), name)
    return list(found.values())


def enter(scope):
    if not OPERATORS:
        pytest.skip(f'the models of {scope} need the compiled operators of mmcv')
    init_default_scope(scope)


def parse(name):
    parts = Path(name).stem.split('_')
    if name.startswith('detection'):
        head, backbone, tags = parts[0], parts[1], parts[-2]
    else:
        backbone, head, tags = parts[:3]
    *tags, schedule = tags.split('-')
    return Experiment(head, backbone, tags, schedule)
