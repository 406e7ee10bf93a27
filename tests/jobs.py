# Copyright (c) mmscalablevit contributors. All rights reserved.
"""What tests need that start the tools as jobs: drawn data, an environment, processes."""

import functools
import importlib.util
import json
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from multiprocessing import forkserver
from pathlib import Path
from types import ModuleType
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image

TESTS = Path(__file__).parent
ROOT = TESTS.parent


def long(*case):
    """A case of a parametrized test that `make test-long` runs."""
    return pytest.param(*case, marks=pytest.mark.long)


def draw_shapes(folder: Path, num_train: int = 8, num_val: int = 4, size: int = 64) -> None:
    """Write the demo's data set into a new folder."""
    tool = runpy.run_path(str(ROOT / 'demo' / 'shapes.py'))
    tool['write_shapes'](folder, num_train, num_val, size)


def write_image(path: Path, size: tuple[int, int] = (40, 30), **options) -> None:
    """Save random pixels, of a width and height, into a folder that is made."""
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    write_map(path, pixels, **options)


def write_map(path: Path, labels: np.ndarray, **options) -> None:
    """Save a label map, or another array, into a folder that is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(labels).save(path, **options)


def load_tool(path: str) -> ModuleType:
    """Import a script such as 'tools/train.py', as other code could if it were a module."""
    # Where Python looks for what a script imports, and worker processes for the script.
    folder = str((ROOT / path).parent)
    if folder not in sys.path:
        sys.path.append(folder)
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[Path(path).stem] = module
    spec.loader.exec_module(module)
    return module


def job_environment(folder: Path, threads: int = 1) -> dict[str, str]:
    """Variables of a job on the CPU that takes its data from ``folder/shapes``."""
    return {
        **os.environ,
        'PATH': os.pathsep.join([str(Path(sys.executable).parent), os.environ['PATH']]),
        # The tests, too, as configs import hooks of theirs.
        'PYTHONPATH': os.pathsep.join([str(ROOT), str(TESTS)]),
        'SHAPES_ROOT': str(folder / 'shapes'),
        'CUDA_VISIBLE_DEVICES': '',
        'OMP_NUM_THREADS': str(threads),
        # Where cores are shared, threads that wait by spinning take them from each other.
        'OMP_WAIT_POLICY': 'passive',
    }


@functools.cache
def fork_server() -> multiprocessing.context.ForkServerContext:
    """What makes processes as forks of one that has imported the toolboxes, without threads."""
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(['preloaded'])
    with mock.patch.dict(os.environ, job_environment(Path())):
        forkserver.ensure_running()
    return context


def start_tool(command, folder, log, environment=None) -> multiprocessing.Process:
    """Start a Python tool in a session of its own; what it says is appended to a file.

    A fork, as the seconds that a new process would import for are most of what a short job takes.
    """
    arguments = [str(part) for part in command], str(folder), str(log)
    environment = environment or job_environment(Path(folder))
    job = fork_server().Process(target=_run, args=(*arguments, environment))
    job.start()
    return job


def _run(command, folder, log, environment):
    os.setsid()
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    # A job in the background of a shell would ignore it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # All forks have the state of their server.
    np.random.seed()
    # Read from the environment when torch was imported.
    torch.set_num_threads(int(environment['OMP_NUM_THREADS']))
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, sys.stdout.fileno())
    os.dup2(output, sys.stderr.fileno())
    sys.argv = command
    # As Python does: tools import what lies beside them.
    sys.path.insert(0, str(Path(command[0]).absolute().parent))
    if command[0] == '-c':
        exec(command[1], {'__name__': '__main__'})
    else:
        runpy.run_path(command[0], run_name='__main__')


def finish(job: multiprocessing.Process) -> int:
    """Wait for the end of a tool that was started, within pytest's time limit; its exit code."""
    try:
        job.join()
    except BaseException:
        os.killpg(job.pid, signal.SIGKILL)
        raise
    return job.exitcode


def run_tool(command, folder, environment=None, expect=0) -> str:
    """What a Python tool said until its end."""
    with tempfile.NamedTemporaryFile('r') as log:
        code = finish(start_tool(command, folder, log.name, environment))
        output = log.read()
    assert code == expect, output[-4000:]
    return output


def run(command, folder, environment, expect=0) -> str:
    """What a command said until its end."""
    process = subprocess.Popen(
        [str(part) for part in command],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output = process.communicate()[0]
    except BaseException:
        # With what the tool has started itself, such as the workers of torchrun.
        os.killpg(process.pid, signal.SIGKILL)
        raise
    assert process.returncode == expect, output[-4000:]
    return output


def scalars(work_dir: Path) -> tuple[list[dict], list[dict]]:
    """What the latest run in a work directory logged: training steps and validations."""
    newest = sorted(Path(work_dir).glob('*/vis_data/scalars.json'))[-1]
    lines = [json.loads(line) for line in newest.read_text().splitlines()]
    return [x for x in lines if 'loss' in x], [x for x in lines if 'loss' not in x]


def packaged(toolbox: str, tool: str) -> Path:
    """A tool that a toolbox installs, as its authors wrote it."""
    return Path(importlib.util.find_spec(toolbox).origin).parent / '.mim' / 'tools' / tool
