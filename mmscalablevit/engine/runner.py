# Copyright (c) mmscalablevit contributors. All rights reserved.
"""Checkpoints that a model, a data set and a training must fit."""

import atexit
import contextlib
import functools
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Iterator

import torch
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.dist import barrier, broadcast, is_distributed
from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.model import is_model_wrapper
from mmengine.registry import RUNNERS
from mmengine.runner import BaseLoop, Runner
from torch import nn
from torch.utils.data import DataLoader

from ..checkpoint.reading import check_values, find_weights, misfit
from ..errors import CheckpointError, UserError, config_errors, one_line
from .hosts import connect_cpus, watch_hosts


@RUNNERS.register_module()
class SafeRunner(Runner):
    """mmengine's ``Runner``, which ends what it has begun.

    Where it connects the processes of a distributed job, it also disconnects them once all have
    ended ``train``, ``val`` or ``test``; else threads of PyTorch outlive the interpreter and abort
    it. A process that fails waits for nobody: its launcher ends the others.

    Example:
        >>> cfg = Config.fromfile('my_config.py')  # doctest: +SKIP
        >>> cfg.runner_type = 'SafeRunner'  # doctest: +SKIP
        >>> RUNNERS.build(cfg).train()  # doctest: +SKIP
    """

    def setup_env(self, env_cfg: dict) -> None:
        """Set up the environment, and connect the processes of a distributed job.

        Args:
            env_cfg (dict): As of mmengine's ``Runner``. Without an accelerator, gloo connects the
                processes.
        """
        self._connects = self.distributed and not is_distributed()
        if self._connects and get_device() == 'cpu':
            connect_cpus(self.launcher)
        super().setup_env(env_cfg)
        if self._connects:
            watch_hosts()

    def train(self) -> nn.Module:
        """Train as mmengine's ``Runner``, to the end of all processes."""
        with self._end_together():
            return super().train()

    def val(self) -> dict:
        """Validate as mmengine's ``Runner``, to the end of all processes."""
        with self._end_together():
            return super().val()

    def test(self) -> dict:
        """Test as mmengine's ``Runner``, to the end of all processes."""
        with self._end_together():
            return super().test()

    @contextlib.contextmanager
    def _end_together(self) -> Iterator[None]:
        atexit.unregister(_disconnect)
        yield
        barrier()
        if self._connects:
            atexit.register(_disconnect)


def _disconnect() -> None:
    if is_distributed():
        torch.distributed.destroy_process_group()


def guard_loading(runner: Runner, strict: bool) -> None:
    """Make a runner refuse checkpoints that it cannot use; mmengine loads what fits, and warns.

    Args:
        runner (Runner): The runner, which then raises ``CheckpointError``.
        strict (bool): Whether a checkpoint must hold exactly the model's parameters, and be of the
            classes of the data in their order. Else layers of ``load_from`` that were trained for
            another number of classes start anew.

    Example:
        >>> guard_loading(runner, strict=True)  # doctest: +SKIP
        >>> runner.test()  # doctest: +SKIP
        Traceback (most recent call last):
        mmscalablevit.checkpoint.errors.CheckpointError: checkpoint other.pth does not fit ...
    """
    if strict or runner.cfg.get('load_from'):
        _load_strictly(runner)
    runner.register_hook(_SameClassesHook() if strict else _NewClassesHook())


def _load_strictly(runner: Runner) -> None:
    load_checkpoint, resume = runner.load_checkpoint, runner.resume
    check = _CheckWeightsHook()
    runner.register_hook(check, priority='HIGHEST')

    def load(filename: str, *args, **kwargs) -> dict:
        check.filename = filename
        try:
            return load_checkpoint(filename, *args, **{**kwargs, 'strict': True})
        except (CheckpointError, OSError):
            raise
        except Exception as error:
            raise misfit(filename, runner.cfg.filename, error) from error

    def resume_strictly(filename: str, *args, **kwargs) -> None:
        try:
            resume(filename, *args, **kwargs)
        except (CheckpointError, OSError, UserError):
            raise
        except Exception as error:
            raise CheckpointError(
                f'checkpoint {filename} cannot be resumed from, as its training state is missing '
                f'or does not fit {runner.cfg.filename} '
                f'({one_line(f"{type(error).__name__}: {error}", 200)})'
            ) from error

    runner.load_checkpoint, runner.resume = load, resume_strictly


class _CheckWeightsHook(Hook):
    """Checks what a checkpoint holds before the runner takes any of it."""

    filename = ''

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        weights = find_weights(checkpoint, self.filename)
        # Wrappers of a model put this before its names, in the checkpoint or in the model.
        parameters = {_unwrapped(k): v for k, v in runner.model.state_dict().items()}
        check_values({_unwrapped(k): v for k, v in weights.items()}, self.filename, parameters)
        if not runner.cfg.get('resume'):
            return
        # Of an EMAHook: the model's own weights, while state_dict holds the averaged ones.
        states = {'ema_state_dict': checkpoint.get('ema_state_dict') or {}}
        moments = (checkpoint.get('optimizer') or {}).get('state') or {}
        states.update({f'optimizer.state.{index}': state for index, state in moments.items()})
        for where, state in states.items():
            values = {f'{where}.{k}': v for k, v in state.items()}
            tensors = {k: v for k, v in values.items() if isinstance(v, torch.Tensor)}
            check_values(tensors, self.filename, tensors)


def _unwrapped(name: str) -> str:
    return name.removeprefix('module.')


class _SameClassesHook(Hook):
    """Refuses a checkpoint of the data set's classes in another order; warns of other classes."""

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        name = 'train_dataloader' if runner.cfg.get('resume') else 'test_dataloader'
        wanted = (getattr(runner, name).dataset.metainfo or {}).get('classes')
        meta = (checkpoint.get('meta') or {}).get('dataset_meta') or {}
        trained = meta.get('classes', meta.get('CLASSES'))
        if not wanted or not trained or len(wanted) != len(trained):
            return
        there, here = list(map(_plain, trained)), list(map(_plain, wanted))
        if there == here:
            return
        i = next(i for i, plain in enumerate(there) if plain != here[i])
        names = f'class {i} is {one_line(trained[i])!r} there and {wanted[i]!r} here'
        said = f'checkpoint {runner.cfg.load_from} was trained for'
        if sorted(there) == sorted(here):
            raise CheckpointError(f'{said} the classes of {name} in another order: {names}')
        print_log(
            f'{said} other classes than {name} has: {names}',
            logger='current',
            level=logging.WARNING,
        )


def _plain(name: str) -> str:
    """A class's name without what its spellings differ in: case, spaces, hyphens, underscores."""
    return re.sub(r'[\s_-]', '', str(name)).lower()


class _NewClassesHook(Hook):
    """Keeps the model's own weights where ``load_from`` has those of another number of classes."""

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        weights = checkpoint.get('state_dict', checkpoint)
        # The classes are the outputs of a layer, and no layer of the backbone depends on them.
        kept = {
            key: value
            for key, value in model.state_dict().items()
            if key in weights
            and not key.startswith('backbone.')
            and weights[key].shape != value.shape
            and weights[key].shape[1:] == value.shape[1:]
        }
        weights.update(kept)
        if kept:
            print_log(
                'Layers of another number of classes start anew: ' + ', '.join(kept),
                logger='current',
                level=logging.WARNING,
            )


def _explain_first_iteration(cfg: Config, loop: BaseLoop) -> None:
    # What of a config does not fit together, such as numbers of channels, shows there.
    run_iter = loop.run_iter

    def run_first(*args, **kwargs) -> None:
        loop.run_iter = run_iter
        with config_errors(cfg, 'fails in its first iteration'):
            run_iter(*args, **kwargs)

    loop.run_iter = run_first


def _end_workers_with_job(loader: DataLoader) -> None:
    """Make the workers of a data loader end with its process, also where that is killed.

    torch's workers notice it, but then wait to hand over what they loaded, which nobody takes.
    """
    loader.worker_init_fn = functools.partial(_start_worker, loader.worker_init_fn)


def _start_worker(init: Callable[[int], None] | None, worker_id: int) -> None:
    def end_with(parent: int) -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=end_with, args=[os.getppid()], daemon=True).start()
    if init is not None:
        init(worker_id)


class _SameBuffersHook(Hook):
    """Lets every rank validate the model that rank 0 saves.

    Without SyncBN each rank has its own statistics in the buffers of BN.
    """

    def before_val_epoch(self, runner: Runner) -> None:
        for buffer in runner.model.buffers():
            broadcast(buffer)
