# Copyright (c) mmscalablevit contributors. All rights reserved.
"""The blocks of code of the pages: what marks say of them, and how they are run.

A mark is the comment in the line above a block: ``<!-- tested: KIND -->`` or
``<!-- not tested: REASON -->``. Kinds: ``commands`` (python and its arguments, line by line),
``python`` (a script), ``shell`` (variables for the commands) and ``file NAME``.
"""

import os
import re
import sys
from pathlib import Path
from typing import NamedTuple

from jobs import ROOT, run_tool

BLOCK = re.compile(
    r'(?:<!-- (tested|not tested): *(.*?) *-->\n)?^```(\w+)\n(.*?)^```', re.DOTALL | re.MULTILINE
)
# For speed: no processes for the data.
LOADERS = [
    f'{loader}_dataloader.{setting}'
    for loader in ('train', 'val', 'test')
    for setting in ('num_workers=0', 'persistent_workers=False')
]


class Block(NamedTuple):
    """A block of a page: 'tested', 'not tested' or no mark, and what the mark says."""

    mark: str
    note: str
    language: str
    text: str

    @property
    def kind(self):
        return self.note.split()[0] if self.mark == 'tested' and self.note else ''


def read_blocks(page):
    """All blocks of code of a page."""
    return [Block(*found) for found in BLOCK.findall(page.read_text())]


def environment():
    """Where the commands find this package and this Python, and no GPU."""
    return {
        **os.environ,
        'PATH': os.pathsep.join([str(Path(sys.executable).parent), os.environ['PATH']]),
        'PYTHONPATH': str(ROOT),
        'CUDA_VISIBLE_DEVICES': '',
        'OMP_NUM_THREADS': '1',
    }


def run_commands(commands, folder):
    """Run Python commands, lists of arguments, one after the other; each, and what it printed."""
    return [f'{" ".join(words)}\n{run_tool(words, folder, environment())}' for words in commands]
