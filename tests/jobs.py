# Copyright (c) mmscalablevit contributors. All rights reserved.
"""What tests need that start the tools as jobs: drawn data, and an environment."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

TESTS = Path(__file__).parent
ROOT = TESTS.parent


def draw_shapes(folder: Path, num_train: int = 8, num_val: int = 4, size: int = 64) -> None:
    """Write the demo's data set into a new folder."""
    tool = ROOT / 'demo' / 'shapes.py'
    sizes = ['--num-train', str(num_train), '--num-val', str(num_val), '--size', str(size)]
    command = [sys.executable, str(tool), str(folder), *sizes, '--workers', '1']
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def load_tool(path: str) -> ModuleType:
    """Import a script such as 'tools/train.py', as other code could if it were a module."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[Path(path).stem] = module
    spec.loader.exec_module(module)
    return module


def job_environment(room: Path, threads: int = 1) -> dict[str, str]:
    """Variables of a job on the CPU that takes its data from ``room/shapes``."""
    return {
        **os.environ,
        'PATH': os.pathsep.join([str(Path(sys.executable).parent), os.environ['PATH']]),
        # The tests, too, as configs import hooks of theirs.
        'PYTHONPATH': os.pathsep.join([str(ROOT), str(TESTS)]),
        'SHAPES_ROOT': str(room / 'shapes'),
        'CUDA_VISIBLE_DEVICES': '',
        'OMP_NUM_THREADS': str(threads),
        # Where cores are shared, threads that wait by spinning take them from each other.
        'OMP_WAIT_POLICY': 'passive',
    }


def packaged(toolbox: str, tool: str) -> Path:
    """A tool that a toolbox installs, as its authors wrote it."""
    return Path(importlib.util.find_spec(toolbox).origin).parent / '.mim' / 'tools' / tool
