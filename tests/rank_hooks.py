# Copyright (c) mmscalablevit contributors. All rights reserved.
"""What tests put into the processes that they start, through their configs."""

import atexit
import contextlib
import json
import os
import signal
import time
from pathlib import Path

import plain_configs  # noqa: F401
from mmengine.dist import get_rank
from mmengine.hooks import Hook
from mmengine.registry import HOOKS, TASK_UTILS


@atexit.register
def say_which_threads_are_left():
    """Said after what the runner does at the end, as it is registered before."""
    names = [path.read_text() for path in Path('/proc/self/task').glob('*/comm')]
    print(f'gloo has {sum("gloo" in name for name in names)} threads at the end')


@HOOKS.register_module()
class RecordLosses(Hook):
    """Writes each rank's losses and images: mmengine logs those of rank 0 alone."""

    priority = 'LOWEST'

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        images = [Path(sample.img_path).name for sample in data_batch['data_samples']]
        losses = {key: value.item() for key, value in outputs.items()}
        with open(Path(runner.work_dir) / f'rank{get_rank()}.jsonl', 'a') as file:
            file.write(json.dumps(dict(iter=runner.iter, images=images, losses=losses)) + '\n')


@HOOKS.register_module()
class EndRank(Hook):
    """Ends one rank in the second iteration of a loop, as the kernel does or by an error."""

    def __init__(self, rank, stage, raises=False):
        self.place = rank, stage, 1
        self.raises = raises

    def _before_iter(self, runner, batch_idx, data_batch=None, mode='train'):
        if (get_rank(), mode, batch_idx) == self.place:
            (Path(runner.work_dir) / 'ended').touch()
            if self.raises:
                raise ZeroDivisionError(f'of rank {get_rank()}')
            os.kill(os.getpid(), signal.SIGKILL)


@HOOKS.register_module()
class Pause(Hook):
    """Stops the first job of a work directory before an iteration, until there is ``go_on``."""

    def __init__(self, at):
        self.at = at

    def before_train(self, runner):
        folder = Path(runner.work_dir)
        self.paused, self.go_on = folder / 'paused', folder / 'go_on'
        self.is_first = not self.paused.exists()

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if runner.iter == self.at and self.is_first:
            self.paused.touch()
            while not self.go_on.exists():
                time.sleep(0.1)


with contextlib.suppress(ImportError):
    from mmdet.models.task_modules import RandomSampler

    @TASK_UTILS.register_module()
    class FirstSampler(RandomSampler):
        """Takes the first of its candidates instead of random ones."""

        def random_choice(self, gallery, num):
            return gallery[:num]
