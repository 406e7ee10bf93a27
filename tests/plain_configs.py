# Copyright (c) mmscalablevit contributors. All rights reserved.
"""Configs of runs are written without formatting, where this is imported.

A run formats its config for each log and checkpoint: that takes most of a short training.
"""

from yapf.yapflib import yapf_api

yapf_api.FormatCode = lambda text, **options: (text, True)
