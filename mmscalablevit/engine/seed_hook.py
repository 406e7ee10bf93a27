# Copyright (c) mmscalablevit contributors. All rights reserved.
"""Random numbers that depend on iteration and sample alone, so that resuming repeats them."""

import itertools
import logging
import random
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from mmengine.dist import get_rank, get_world_size
from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from torch.utils.data import BatchSampler, Dataset, Sampler

_ITERATION, _SAMPLE = 0, 1


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
