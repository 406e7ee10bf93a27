# Copyright (c) mmscalablevit contributors. All rights reserved.
"""Training that goes on where it was cut off: whole checkpoints and the same random numbers."""

import contextlib
import glob
import itertools
import logging
import os
import os.path as osp
import random
from collections import deque
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from mmengine.dist import get_rank, get_world_size, is_main_process
from mmengine.fileio import LocalBackend, register_backend
from mmengine.hooks import CheckpointHook, Hook
from mmengine.logging import print_log
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from mmengine.utils import mkdir_or_exist
from torch.utils.data import BatchSampler, Dataset, Sampler

from .checkpoint import CheckpointError, read_checkpoint

_ITERATION, _SAMPLE = 0, 1
# What mmengine needs to continue a training; a file of best weights lacks the optimizer.
_TRAINING_STATE = {'meta', 'message_hub', 'optimizer'}


class AtomicLocalBackend(LocalBackend):
    """mmengine's backend of local files, which writes a file as a whole or not at all.

    The content goes to a temporary file beside it, ``FILE.tmp``, is flushed to the disk, and then
    takes the name. Registered as ``atomic_local``.

    Example:
        >>> from mmengine.fileio import get_file_backend
        >>> backend = get_file_backend(backend_args=dict(backend='atomic_local'))
        >>> backend.put(b'weights', '/tmp/whole.pth')
        >>> backend.get('/tmp/whole.pth')
        b'weights'
    """

    def put(self, obj: bytes, filepath: str | os.PathLike) -> None:
        """Write bytes to a file.

        Args:
            obj (bytes): The content.
            filepath (str | os.PathLike): The file; its folder is made if there is none.

        Raises:
            OSError: If it cannot be written, on a full disk for example; the file is as it was,
                and the error names it.
        """
        path = os.fspath(filepath)
        temporary = f'{path}.tmp'
        try:
            mkdir_or_exist(osp.dirname(path))
            with open(temporary, 'wb') as file:
                file.write(obj)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            # An error in writing, unlike one in opening, comes without the name of the file.
            raise OSError(error.errno, error.strerror, path) from error

    def put_text(self, obj: str, filepath: str | os.PathLike, encoding: str = 'utf-8') -> None:
        """Write text to a file.

        Args:
            obj (str): The content.
            filepath (str | os.PathLike): The file; its folder is made if there is none.
            encoding (str): Encoding of the text. Defaults to 'utf-8'.

        Raises:
            OSError: As ``put``.
        """
        self.put(obj.encode(encoding), filepath)


register_backend('atomic_local', AtomicLocalBackend)


@HOOKS.register_module()
class AtomicCheckpointHook(CheckpointHook):
    """mmengine's ``CheckpointHook``, with a whole checkpoint on the disk at every moment.

    mmengine removes an outdated checkpoint before it writes the next one, and writes in place, so
    that a job killed in between, or a full disk, can leave no checkpoint at all. Here files are
    written by ``AtomicLocalBackend``, ``last_checkpoint`` included, and what they replace is
    removed after them. The disk must hold one checkpoint more than ``max_keep_ckpts``.

    Checkpoints on remote storage (``out_dir`` with '://') are written by its own backend. A
    validation that was cut off is not repeated by the resumed job; its result is missing in the
    logs and in the choice of the best checkpoint.

    Args:
        **kwargs: Arguments of ``CheckpointHook``.

    Example:
        >>> default_hooks = dict(
        ...     checkpoint=dict(type='AtomicCheckpointHook', interval=1, max_keep_ckpts=3))
    """

    def before_train(self, runner: Runner) -> None:
        """Choose the backend that writes the files.

        Args:
            runner (Runner): The runner of the training.
        """
        given = self.backend_args or self.file_client_args
        if not given and '://' not in str(self.out_dir or runner.work_dir):
            self.backend_args = dict(backend='atomic_local')
        super().before_train(runner)

    def _save_checkpoint_with_step(self, runner: Runner, step: int, meta: dict) -> None:
        outdated = []
        if self.max_keep_ckpts > 0:
            steps = [*(kept for kept in self.keep_ckpt_ids if kept != step), step]
            outdated = steps[: -self.max_keep_ckpts]
            self.keep_ckpt_ids = deque(steps, self.max_keep_ckpts)
            # With the outdated ones: a job killed before their removal removes them when resumed.
            runner.message_hub.update_info('keep_ckpt_ids', steps)

        filename = self.filename_tmpl.format(step)
        self.last_ckpt = self.file_backend.join_path(self.out_dir, filename)
        runner.message_hub.update_info('last_ckpt', self.last_ckpt)
        runner.save_checkpoint(
            self.out_dir,
            filename,
            self.file_client_args,
            save_optimizer=self.save_optimizer,
            save_param_scheduler=self.save_param_scheduler,
            meta=meta,
            by_epoch=self.by_epoch,
            backend_args=self.backend_args,
            **self.args,
        )
        if not is_main_process():
            return
        AtomicLocalBackend().put_text(self.last_ckpt, osp.join(runner.work_dir, 'last_checkpoint'))
        for old in outdated:
            name = self.filename_tmpl.format(old)
            self._remove(self.file_backend.join_path(self.out_dir, name), {self.last_ckpt})

    def _save_best_checkpoint(self, runner: Runner, metrics: dict) -> None:
        if not self.save_best:
            return
        previous = self._best()
        # Not knowing the previous one, mmengine does not remove it before it saves the next.
        self._set_best(dict.fromkeys(previous))
        super()._save_best_checkpoint(runner, metrics)
        current = {key: path or previous.get(key) for key, path in self._best().items()}
        self._set_best(current)
        if is_main_process():
            for path in previous.values():
                # A resumed checkpoint names it, perhaps in the folder of another training.
                if path and osp.dirname(path) == self.out_dir:
                    self._remove(path, set(current.values()))

    def _best(self) -> dict[str, str | None]:
        if len(self.key_indicators) == 1:
            return {'': self.best_ckpt_path}
        return dict(self.best_ckpt_path_dict)

    def _set_best(self, paths: dict[str, str | None]) -> None:
        if len(self.key_indicators) == 1:
            self.best_ckpt_path = paths['']
        else:
            self.best_ckpt_path_dict = dict(paths)

    def _remove(self, path: str | None, kept: set[str]) -> None:
        if path is None or path in kept:
            return
        if self.file_backend.isfile(path):
            self.file_backend.remove(path)
        # DeepSpeed saves folders.
        elif self.file_backend.isdir(path):
            self.file_backend.rmtree(path)


@HOOKS.register_module()
class IterSeedHook(Hook):
    """Seed random numbers by iteration and by sample, for a resumed training to draw the same.

    A checkpoint of mmengine holds no state of random number generators, and a generator in a
    worker of the data loader cannot be read at all. With this hook nothing depends on such states:
    the generators of Python, numpy and torch are seeded

    - at the start of each iteration, from the seed of the run, the iteration and the rank, for
      what is drawn in the model (stochastic depth, dropout, sampling of boxes);
    - before each sample of the training set is loaded, from the seed of the run and the number of
      the sample in the stream of the sampler, for its augmentation. The number of workers and of
      processes does not matter, as long as the global batch stays the same.

    On the same machine with deterministic operators (CPU, same number of threads), a training
    that is resumed then ends with exactly the weights of one that never stopped, where

    - it is resumed from the end of an epoch or, in iteration-based training, from any iteration
      at which accumulated gradients were applied;
    - its seed is that of the checkpoint: ``randomness.seed`` of the config, or what
      ``tools/train.py --resume`` reads from the checkpoint;
    - mmengine passes over the samples already seen (``onedl-mmengine`` 0.10.12 does; of the
      original 0.10.7 only the random numbers of the iterations are repeated);
    - indices of the sampler are integers, and neither transforms nor model remember anything
      between iterations outside of parameters and buffers (mosaic with a cache does).

    Example:
        >>> default_hooks = dict(iter_seed=dict(type='IterSeedHook'))
    """

    priority = 'VERY_HIGH'

    def before_train(self, runner: Runner) -> None:
        """Let the data loader seed each sample.

        Args:
            runner (Runner): The runner of the training.
        """
        loader = runner.train_dataloader
        batches = loader.batch_sampler
        if not isinstance(getattr(batches, 'sampler', None), Sampler):
            print_log(
                f'IterSeedHook: {type(batches).__name__} has no sampler whose samples could be '
                'seeded; augmentation will not be the same after resuming',
                logger='current',
                level=logging.WARNING,
            )
            return
        # mmengine winds on such a sampler, and goes through the samples of any other.
        skips = type(batches) is BatchSampler and hasattr(batches.sampler, 'skip')
        batches.sampler = _SeededSampler(
            batches.sampler,
            seed=runner.seed,
            rounds=runner.epoch,
            skipped=runner.iter * batches.batch_size if skips else 0,
        )
        # torch's data loader asks for it and then gives it a batch of indices.
        loader.dataset.__getitems__ = partial(_load_samples, loader.dataset)

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        """Seed what the model draws.

        Args:
            runner (Runner): The runner of the training.
            batch_idx (int): Index of the batch in the epoch.
            data_batch (Any): The batch.
        """
        seed = _derive(runner.seed, _ITERATION, runner.iter, get_rank())
        _seed_all(seed)
        if torch.cuda.is_available():
            torch.cuda.manual_seed_all(seed)


class _SeededSampler(Sampler):
    """A sampler whose indices carry a seed made of their number in the global stream."""

    def __init__(self, sampler: Sampler, seed: int, rounds: int, skipped: int) -> None:
        self.sampler = sampler
        self.seed = seed
        self.rounds = rounds
        self.skipped = skipped

    def __iter__(self) -> Iterator[int]:
        start = self.skipped * get_world_size() + get_rank()
        numbers = itertools.count(start, get_world_size())
        entropy = self.seed, _SAMPLE, self.rounds
        self.rounds, self.skipped = self.rounds + 1, 0
        for index, number in zip(self.sampler, numbers):  # noqa: B905
            yield _SeededIndex(index, _derive(*entropy, number)) if _is_int(index) else index

    def __len__(self) -> int:
        return len(self.sampler)

    def __getattr__(self, name: str) -> Any:
        # Batch samplers ask for the data set, hooks set the epoch.
        return getattr(self.__dict__['sampler'], name)


class _SeededIndex(int):
    def __new__(cls, index: int, seed: int) -> '_SeededIndex':
        self = super().__new__(cls, index)
        self.seed = seed
        return self

    def __reduce__(self) -> tuple:
        return type(self), (int(self), self.seed)


def _is_int(index: Any) -> bool:
    return isinstance(index, (int, np.integer))


def _load_samples(dataset: Dataset, indices: list) -> list:
    samples = []
    for index in indices:
        if isinstance(index, _SeededIndex):
            _seed_all(index.seed)
            index = int(index)
        samples.append(dataset[index])
    return samples


def _derive(*entropy: int) -> int:
    return int(np.random.SeedSequence(entropy).generate_state(1)[0])


def _seed_all(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    # Of the CPU alone: torch.manual_seed asks every backend each time.
    torch.default_generator.manual_seed(seed)


def use_resumable_hooks(cfg: Config) -> None:
    """Let a config's training be resumable to the same result: its hooks are replaced or added.

    Args:
        cfg (Config): The config; mmengine's ``CheckpointHook`` becomes ``AtomicCheckpointHook``,
            and ``IterSeedHook`` is added if it is not there.

    Example:
        >>> cfg = Config(dict(default_hooks=dict(checkpoint=dict(type='CheckpointHook'))))
        >>> use_resumable_hooks(cfg)
        >>> [hook.type for hook in cfg.default_hooks.values()]
        ['AtomicCheckpointHook', 'IterSeedHook']
    """
    if not cfg.get('default_hooks'):
        cfg.default_hooks = {}
    hooks = cfg.default_hooks
    # mmengine's own default.
    hooks.setdefault('checkpoint', dict(type='CheckpointHook', interval=1))
    names = ('CheckpointHook', 'mmengine.CheckpointHook', CheckpointHook)
    if hooks.checkpoint and hooks.checkpoint.get('type') in names:
        hooks.checkpoint.type = 'AtomicCheckpointHook'
    hooks.setdefault('iter_seed', dict(type='IterSeedHook'))


def find_checkpoint(work_dir: str) -> str | None:
    """Find the checkpoint to resume from: the one last written or, if damaged, the newest whole.

    Args:
        work_dir (str): Work directory of the training.

    Returns:
        str | None: The file, or None if no training wrote a checkpoint there. A damaged or
        missing latest checkpoint that was passed over is warned about.

    Raises:
        CheckpointError: If there are checkpoints of a training, and all of them are damaged.

    Example:
        >>> find_checkpoint('work_dirs/not_begun')
    """
    named = _last_checkpoint(work_dir)
    if named and '://' in named:
        return named
    folders = {work_dir, osp.dirname(named or '') or work_dir}
    files = [file for folder in folders for file in glob.glob(f'{glob.escape(folder)}/*.pth')]
    files.sort(key=osp.getmtime, reverse=True)
    # A work directory that was moved holds it under another path.
    latest = [named, osp.join(work_dir, osp.basename(named))] if named else []
    faults = []
    for file in dict.fromkeys([*latest, *files]):
        try:
            found = read_checkpoint(file, map_location='cpu')
        except FileNotFoundError:
            continue
        except CheckpointError as error:
            faults.append(str(error))
            continue
        if file not in latest and not found.keys() >= _TRAINING_STATE:
            continue
        if faults:
            print_log(f'{faults[0]}: resuming from {file}', 'current', logging.WARNING)
        return file
    if faults:
        raise CheckpointError(f'--resume: nothing to resume from in {work_dir}: {faults[0]}')
    if named:
        raise CheckpointError(
            f'--resume: {work_dir}/last_checkpoint names {named}, which does not exist'
        )
    return None


def use_checkpoint_seed(cfg: Config, checkpoint: str) -> None:
    """Give a config without a seed the one of a checkpoint, for its data to come in that order.

    Args:
        cfg (Config): The config.
        checkpoint (str): The checkpoint to resume from.

    Raises:
        CheckpointError: If the config has no seed and the checkpoint cannot be read.

    Example:
        >>> import torch
        >>> torch.save(dict(state_dict={}, meta=dict(seed=7)), '/tmp/seeded.pth')
        >>> cfg = Config()
        >>> use_checkpoint_seed(cfg, '/tmp/seeded.pth')
        >>> cfg.randomness
        {'seed': 7}
    """
    randomness = cfg.get('randomness') or {}
    # The checkpoint is large, and the runner reads it once more.
    if randomness.get('seed') is not None:
        return
    seed = (read_checkpoint(checkpoint, map_location='cpu').get('meta') or {}).get('seed')
    if seed is not None:
        cfg.randomness = dict(randomness, seed=seed)


def _last_checkpoint(work_dir: str) -> str | None:
    file = osp.join(work_dir, 'last_checkpoint')
    if not osp.isfile(file):
        return None
    with open(file, encoding='utf-8') as opened:
        return opened.read().strip() or None
