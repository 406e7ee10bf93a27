# Copyright (c) mmscalablevit contributors. All rights reserved.
"""Imports and finds out what takes tools seconds, for the process that jobs are forked from."""

import contextlib
import importlib

from mmengine.utils.dl_utils import collect_env

for name in (
    'jobs',
    'plain_configs',
    'mmscalablevit.cli',
    'mmdet.apis',
    'mmseg.apis',
    'mmpretrain.apis',
):
    # What is not installed, or refuses a version, is for the tests to find.
    with contextlib.suppress(Exception):
        importlib.import_module(name)
collect_env()
