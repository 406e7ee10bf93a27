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
    loaders of ``SafeRunner`` nothing depends on such states: the generators of Python, numpy and
    torch are seeded

    - at the start of each iteration, from the seed of the run, the iteration and the rank, for
      what is drawn in the model (stochastic depth, dropout, sampling of boxes);
    - before each sample is loaded, from the seed of the run and the number of the sample in the
      stream of the sampler, for its augmentation, whatever the number of workers and processes.

    With deterministic operators, a training that is resumed then ends with exactly the weights of
    one that never stopped, where

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
        """Let the sampler number its samples from the epoch at which the training begins."""
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
    """A sampler whose indices carry a seed made of their number in the global stream.

    Args:
        sampler (dict): Config of the sampler.
        dataset (Dataset): Its data set.
        seed (int, optional): Its seed, and that of the samples. Defaults to None, a seed of its own
            for the sampler, and 0 for the samples.

    Example:
        >>> sampler = SeededSampler(dict(type='DefaultSampler', shuffle=False), ['a', 'b'], seed=1)
        >>> [(index, index.seed) for index in sampler]
        [(0, 1189033389), (1, 13743408)]
    """

    def __init__(self, sampler: dict, dataset: Dataset, seed: int | None = None) -> None:
        inner = dataset.dataset if isinstance(dataset, SeededDataset) else dataset
        default_args = dict(dataset=inner, seed=seed)
        self.sampler = DATA_SAMPLERS.build(sampler, default_args=default_args)
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
    """A data set whose samples are checked, and seeded by what ``SeededSampler`` yields.

    Args:
        dataset (dict | Dataset): The data set or its config. Its attributes are those of this one.

    Raises:
        DataError: If the image or label map of a sample is damaged or does not fit, where the data
            set has ``get_data_info``; the message names the file.

    Example:
        >>> class Noise(list):
        ...     def __getitem__(self, index):
        ...         return random.random()
        >>> dataset = SeededDataset(Noise('abc'))
        >>> sampler = dict(type='DefaultSampler')
        >>> first, again = (
        ...     [dataset[i] for i in SeededSampler(sampler, dataset, seed=1)] for _ in range(2))
        >>> first == again
        True
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
    def __new__(cls, index: int, seed: int) -> '_SeededIndex':
        self = super().__new__(cls, index)
        self.seed = seed
        return self

    def __reduce__(self) -> tuple:
        return type(self), (int(self), self.seed)


def _derive(*entropy: int) -> int:
    return int(np.random.SeedSequence(entropy).generate_state(1)[0])


def _seed_all(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    # Of the CPU alone: torch.manual_seed asks every backend each time.
    torch.default_generator.manual_seed(seed)
