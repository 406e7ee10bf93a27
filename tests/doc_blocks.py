# Copyright (c) mmscalablevit contributors. All rights reserved.
"""The blocks of code of the pages: what marks say of them, and how they are run.

A mark is the comment in the line above a block: ``<!-- tested: KIND -->`` or
``<!-- not tested: REASON -->``. Kinds: ``commands`` (python and its arguments, line by line),
``python`` (a script), ``shell`` (variables for the commands) and ``file NAME``.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(
    r'(?:<!-- (tested|not tested): *(.*?) *-->\n)?^```(\w+)\n(.*?)^```', re.DOTALL | re.MULTILINE
)
# One process imports the toolboxes; each command is a fork of it.
DRIVER = """
import json, os, runpy, sys
import mmscalablevit, mmdet.apis, mmseg.apis
for command in json.load(sys.stdin):
    sys.stdout.flush()
    pid = os.fork()
    if not pid:
        sys.argv = command
        print('>>>', *command, flush=True)
        if command[0] == '-c':
            exec(command[1])
        else:
            # As Python does: tools import what lies beside them.
            sys.path[0] = os.path.dirname(os.path.abspath(command[0]))
            runpy.run_path(command[0], run_name='__main__')
        sys.exit()
    if os.waitpid(pid, 0)[1]:
        sys.exit(f'{command} failed')
"""
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
    """Run Python commands, lists of arguments, one after the other; what each printed."""
    process = subprocess.run(
        [sys.executable, '-c', DRIVER],
        input=json.dumps(commands),
        cwd=folder,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=900,
    )
    assert process.returncode == 0, process.stdout[-4000:]
    return re.split(r'^>>> ', process.stdout, flags=re.MULTILINE)[1:]
