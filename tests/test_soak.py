# Copyright (c) mmscalablevit contributors. All rights reserved.
"""Long trainings: memory stays, and no process of the data loader outlives its job."""

import contextlib
import ctypes
import json
import os
import signal
import time

import numpy as np
import psutil
import pytest
from jobs import ROOT, finish, job_environment, long, start_tool
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

LIBC = ctypes.CDLL(None)
TRAIN = ROOT / 'tools' / 'train.py'
# Another size for each image, down to the pixel, in two workers.
CONFIG = """
_base_ = '{base}'
custom_imports = dict(imports=['mmscalablevit', 'test_soak'], allow_failed_imports=False)
model = dict(data_preprocessor=dict(pad_size_divisor=1))
resize = dict(type='RandomResize', scale=[(48, 48), (112, 112)], keep_ratio=False)
train_dataloader = dict(
    num_workers=2,
    persistent_workers=True,
    batch_sampler=None,
    sampler=dict(_delete_=True, type='InfiniteSampler'),
    dataset=dict(pipeline=[*_base_.train_pipeline[:2], resize, *_base_.train_pipeline[3:]]),
)
train_cfg = dict(_delete_=True, type='IterBasedTrainLoop', max_iters={max_iters})
param_scheduler = []
val_cfg = val_dataloader = val_evaluator = None
default_hooks = dict(
    logger=dict(interval=100), checkpoint=dict(by_epoch=False, interval=10**6, save_best=None)
)
log_processor = dict(by_epoch=False)
custom_hooks = [dict(type='_WatchHook', file='{file}', fail_at={fail_at})]
"""


@HOOKS.register_module(force=True)
class _WatchHook(Hook):
    """Writes resident memory and image sizes of each iteration, and fails where it is told."""

    priority = 'LOWEST'

    def __init__(self, file, fail_at):
        self.file, self.fail_at = file, fail_at

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        # What was freed and is kept for later by the C library would count as growth: with images
        # of many sizes it comes in pieces of many sizes.
        if (runner.iter + 1) % 20 == 0 and hasattr(LIBC, 'malloc_trim'):
            LIBC.malloc_trim(0)
        memory = psutil.Process().memory_info().rss
        sizes = [tuple(image.shape[-2:]) for image in data_batch['inputs']]
        with open(self.file, 'a') as file:
            print(json.dumps([memory, sizes]), file=file)
        if runner.iter + 1 == self.fail_at:
            raise ZeroDivisionError('the training failed')


def start(folder, name, max_iters, threads=1, fail_at=0):
    """A training, and the file that it writes a line to in each iteration."""
    file = folder / f'{name}.jsonl'
    config = folder / f'{name}.py'
    base = ROOT / 'tests' / 'data' / 'tiny_mask-rcnn.py'
    config.write_text(CONFIG.format(base=base, max_iters=max_iters, file=file, fail_at=fail_at))
    log, environment = folder / f'{name}.txt', job_environment(folder, threads)
    return start_tool([TRAIN, config, '--work-dir', folder / name], folder, log, environment), file


def soak(folder, iterations, threads):
    """Resident memory after each 20th iteration, in MiB, and the number of image sizes."""
    job, file = start(folder, f'soak_{iterations}_{threads}', iterations, threads)
    assert finish(job) == 0, file.with_suffix('.txt').read_text()[-4000:]
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(lines) == iterations
    sizes = {tuple(size) for _, images in lines for size in images}
    return np.array([memory for memory, _ in lines[19::20]]) / 2**20, len(sizes)


@pytest.mark.long
@pytest.mark.parametrize('threads', [1, 2])
def test_memory_does_not_grow(threads, folder):
    memory, sizes = soak(folder, 1000, threads)

    # oneDNN keeps the kernels of the latest 1024 shapes: until it has them, memory grows.
    before, after = np.median(memory[15:20]), np.median(memory[-5:])
    growth = after / before - 1
    print(
        f'1000 iterations, {sizes} image sizes, {threads} threads: resident memory '
        f'{before:.1f} MiB in iterations 301 to 400, {after:.1f} MiB in the last 100: '
        f'{growth:+.2%}'
    )
    assert sizes > 1000
    assert growth < 0.02


def test_memory_settles(folder):
    memory, sizes = soak(folder, 60, threads=1)
    assert sizes > 60
    assert memory[-1] / memory[0] < 1.1


@pytest.mark.parametrize(
    ('how', 'code'),
    [
        *(long('ends', 0), long('fails', 1)),
        *(long(number, -number) for number in (signal.SIGINT, signal.SIGTERM)),
        (signal.SIGKILL, -signal.SIGKILL),
    ],
    ids=str,
)
def test_no_worker_outlives_its_job(how, code, folder):
    max_iters = 3 if how in ('ends', 'fails') else 10**6
    fail_at = 3 if how == 'fails' else 0
    job, file = start(folder, f'workers_{how}', max_iters, fail_at=fail_at)
    process, seen = psutil.Process(job.pid), {}
    try:
        while job.is_alive():
            with contextlib.suppress(psutil.NoSuchProcess):
                seen.update({child.pid: child for child in process.children(recursive=True)})
            if isinstance(how, int) and file.exists() and file.read_text().count('\n') >= 3:
                # The process alone, and not its workers, which hold loaded images by now.
                os.kill(job.pid, how)
                break
            time.sleep(0.01)
        assert finish(job) == code, file.with_suffix('.txt').read_text()[-4000:]
        assert len(seen) >= 2
        _, left = psutil.wait_procs(seen.values(), timeout=300)
        assert not left
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(job.pid, signal.SIGKILL)
