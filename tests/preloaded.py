# Copyright (c) mmscalablevit contributors. All rights reserved.
"""Imports what tools import in seconds, for the process that jobs are forked from."""

import contextlib
import importlib

for name in ('jobs', 'mmscalablevit.cli', 'mmdet.apis', 'mmseg.apis', 'mmpretrain.apis'):
    # What is not installed, or refuses a version, is for the tests to find.
    with contextlib.suppress(Exception):
        importlib.import_module(name)
