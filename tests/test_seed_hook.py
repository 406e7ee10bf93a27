# Copyright (c) mmscalablevit contributors. All rights reserved.
"""Random numbers and data of a training that goes on: those of one that never stopped."""

from types import SimpleNamespace

import pytest
import torch
from mmengine.hooks import Hook
from mmengine.runner import loops
from torch.utils.data import _utils
from toy import Interrupted, toy_runner


@pytest.fixture(autouse=True)
def short_wait(monkeypatch):
    # For each worker of a data loader that is garbage; by default five seconds.
    monkeypatch.setattr(_utils, 'MP_STATUS_CHECK_INTERVAL', 0.1)


@pytest.mark.parametrize(
    ('sampler', 'epochs', 'workers'),
    [
        ('InfiniteSampler', False, 0),
        ('InfiniteSampler', False, 2),
        ('DefaultSampler', True, 2),
        ('DefaultSampler', False, 0),
    ],
    ids=str,
)
def test_random_numbers_and_data_go_on(sampler, epochs, workers, tmp_path, monkeypatch):
    # It waits for two seconds before each round of data.
    monkeypatch.setattr(loops, 'time', SimpleNamespace(sleep=lambda seconds: None))
    args = dict(sampler=sampler, epochs=epochs)
    whole = toy_runner(tmp_path / 'whole', workers=workers, **args).train()
    # In another number of workers, which decides neither data nor augmentation.
    with pytest.raises(Interrupted):
        toy_runner(tmp_path / 'cut', workers=2 - workers, at=11, **args).train()
    resumed = toy_runner(tmp_path / 'cut', workers=workers, resume=True, **args)
    resumed.train()
    assert resumed.iter == 15
    for key, value in whole.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[key])


def test_augmentation_differs_between_samples_and_rounds(tmp_path):
    seen = []

    class Record(Hook):
        def after_train_iter(self, runner, data_batch=None, **kwargs):
            seen.extend(data_batch['inputs'])

    runner = toy_runner(tmp_path, sampler='DefaultSampler', epochs=True)
    runner.register_hook(Record())
    runner.train()

    samples = torch.stack(seen)
    assert samples[:10, 0].sort().values.tolist() == list(range(10))
    for generator in (1, 2, 3):
        assert samples[:, generator].unique().numel() == 30


def test_hooks_of_other_samplers_and_pipelines_reach_the_data_set(tmp_path):
    runner = toy_runner(tmp_path)
    dataset = runner.train_dataloader.dataset
    dataset.pipeline = 'new'
    assert dataset.dataset.pipeline == 'new'
    assert not hasattr(dataset, 'no_such_attribute')


@pytest.mark.parametrize('seed', [None, 1])
def test_seed_of_the_checkpoint(seed, tmp_path):
    toy_runner(tmp_path, randomness=dict(seed=7)).train()
    runner = toy_runner(tmp_path, resume=True, randomness=dict(seed=seed))
    assert runner.seed == (7 if seed is None else seed)
