# Copyright (c) mmscalablevit contributors. All rights reserved.
"""Random numbers that depend on iteration and sample alone, so that resuming repeats them."""

import itertools
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from mmengine.dist import get_rank, get_world_size
from mmengine.hooks import Hook
from mmengine.registry import DATA_SAMPLERS, DATASETS, HOOKS
from mmengine.runner import Runner
from torch.utils.data import Dataset, Sampler

from ..checks.pipeline import SampleChecks, explain_sample

_ITERATION, _SAMPLE = 0, 1


@HOOKS.register_module()
class IterSeedHook(Hook):
    """Seed random numbers by iteration and by sample, for a resumed training to draw the same.

    A checkpoint of mmengine holds no state of random number generators. With this hook and the data
    loaders of ``SafeRunner``, those of Python, numpy and torch are seeded

    - by the run's seed, iteration and rank before each iteration, for what the model draws
      (stochastic depth, dropout, sampling of boxes);
    - by the run's seed and the number of the sample in the sampler's stream before each sample is
      loaded, for its augmentation, whatever the number of workers and processes.

    With deterministic operators, a resumed training then ends with exactly the weights of one that
    never stopped, where

    - it is resumed from the end of an epoch or, in iteration-based training, from any iteration
      at which accumulated gradients were applied;
    - mmengine passes over the samples already seen (``onedl-mmengine`` 0.10.12 does; of the
      original 0.10.7 only the random numbers of the iterations are repeated);
    - indices of the sampler are integers, and neither transforms nor model remember anything
      between iterations outside of parameters and buffers (mosaic with a cache does).

    Example:
        >>> default_hooks = dict(iter_seed=dict(type='IterSeedHook'))
    """

    priority = 'VERY_HIGH'

    def before_train(self, runner: Runner) -> None:
        """Let the sampler count from the epoch at which the training begins."""
        sampler = getattr(runner.train_dataloader.batch_sampler, 'sampler', None)
        if isinstance(sampler, SeededSampler):
            sampler.begin(runner.epoch)

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        """Seed what the model draws."""
        seed = _derive(runner.seed, _ITERATION, runner.iter, get_rank())
        _seed_all(seed)
        if torch.cuda.is_available():
            torch.cuda.manual_seed_all(seed)


@DATA_SAMPLERS.register_module()
class SeededSampler(Sampler):
    """A sampler, of a config, whose indices carry a seed made of their number in the stream."""

    def __init__(self, sampler: dict, dataset: Dataset, seed: int | None = None) -> None:
        inner = dataset.dataset if isinstance(dataset, SeededDataset) else dataset
        self.sampler = DATA_SAMPLERS.build(sampler, default_args=dict(dataset=inner, seed=seed))
        self._entropy = seed or 0, _SAMPLE
        self._round = self._skipped = 0

    def begin(self, round_: int) -> None:
        """Number the samples as in this round over the data set, from 0."""
        self._round = round_

    def __iter__(self) -> Iterator[int]:
        """Yield the indices of this process."""
        start = self._skipped * get_world_size() + get_rank()
        entropy = *self._entropy, self._round
        self._round, self._skipped = self._round + 1, 0
        numbers = itertools.count(start, get_world_size())
        for index, number in zip(self.sampler, numbers):  # noqa: B905
            is_int = isinstance(index, (int, np.integer))
            yield _SeededIndex(index, _derive(*entropy, number)) if is_int else index

    def __len__(self) -> int:
        return len(self.sampler)

    def __getattr__(self, name: str) -> Any:
        # Batch samplers ask for the data set, hooks set the epoch, and mmengine looks for skip.
        if name.startswith('__'):
            raise AttributeError(name)
        found = getattr(self.sampler, name)
        return self._skip if name == 'skip' else found

    def _skip(self, num_samples: int) -> None:
        self.sampler.skip(num_samples)
        self._skipped = num_samples


@DATASETS.register_module()
class SeededDataset(Dataset):
    """A data set, or that of a config, with samples checked, and seeded by ``SeededSampler``.

    A damaged image or label map, or one that does not fit, is a ``DataError`` that names the file,
    where the data set has ``get_data_info``.
    """

    def __init__(self, dataset: dict | Dataset) -> None:
        dataset = DATASETS.build(dataset) if isinstance(dataset, dict) else dataset
        self.__dict__.update(dataset=dataset, _checks=SampleChecks(dataset))

    def __getitem__(self, index: int) -> Any:
        """Load a sample; its errors name the image."""
        if isinstance(index, _SeededIndex):
            _seed_all(index.seed)
            index = int(index)
        self._checks.check(index)
        try:
            return self.dataset[index]
        except Exception as error:
            explain_sample(error)
            raise

    def __len__(self) -> int:
        return len(self.dataset)

    def __getattr__(self, name: str) -> Any:
        # What pickle asks for before there is a data set; and samples come from here alone.
        if name.startswith('__'):
            raise AttributeError(name)
        return getattr(self.dataset, name)

    def __setattr__(self, name: str, value: Any) -> None:
        # Hooks replace pipelines.
        setattr(self.dataset, name, value)


class _SeededIndex(int):
    # The seed is a part of the state, which pickle puts in after it has made the bare index.
    def __new__(cls, index: int, seed: int = 0) -> '_SeededIndex':
        self = super().__new__(cls, index)
        self.seed = seed
        return self


def _derive(*entropy: int) -> int:
    return int(np.random.SeedSequence(entropy).generate_state(1)[0])


def _seed_all(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    # Of the CPU alone: torch.manual_seed asks every backend each time.
    torch.default_generator.manual_seed(seed)
