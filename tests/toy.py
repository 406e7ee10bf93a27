# Copyright (c) mmscalablevit contributors. All rights reserved.
"""A training of milliseconds by the runner that the package registers."""

import random
import time

import numpy as np
import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.registry import DATASETS, HOOKS, MODELS
from torch import nn
from torch.utils.data import Dataset

from mmscalablevit.engine.runner import SafeRunner


class Interrupted(Exception):
    pass


@HOOKS.register_module()
class _InterruptHook(Hook):
    def __init__(self, at):
        self.at = at

    def after_train_iter(self, runner, **kwargs):
        if runner.iter + 1 == self.at:
            raise Interrupted


@MODELS.register_module()
class _Toy(BaseModel):
    """A model that draws random numbers, too."""

    def __init__(self, width=4):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, width), nn.Dropout(0.5), nn.Linear(width, 1))

    def forward(self, inputs, mode='tensor'):
        return dict(loss=self.layers(inputs).square().mean())


@DATASETS.register_module()
class _Noise(Dataset):
    """Augmentation with every generator that transforms use, beside the number of the sample."""

    def __len__(self):
        return 10

    def __getitem__(self, index):
        assert type(index) is int
        noise = [index, random.random(), np.random.rand(), torch.rand(()).item()]
        return dict(inputs=torch.tensor(noise))


def toy_runner(work_dir, sampler='InfiniteSampler', epochs=False, workers=0, at=0, **kwargs):
    loop = dict(by_epoch=True, max_epochs=3) if epochs else dict(by_epoch=False, max_iters=15)
    cfg = Config(
        dict(
            model=dict(type='_Toy', width=kwargs.pop('width', 4)),
            work_dir=str(work_dir),
            train_dataloader=dict(
                dataset=dict(type='_Noise'),
                sampler=dict(type=sampler, shuffle=True),
                batch_size=2,
                num_workers=workers,
                persistent_workers=workers > 0,
                collate_fn=dict(type='default_collate'),
            ),
            train_cfg=loop,
            optim_wrapper=dict(optimizer=dict(type='AdamW', lr=0.1)),
            default_hooks=dict(
                checkpoint=dict(type='CheckpointHook', by_epoch=epochs, interval=1 if epochs else 4)
            ),
            custom_hooks=[dict(type='_InterruptHook', at=at)],
            randomness=dict(seed=5),
            experiment_name=f'toy_{time.monotonic_ns()}',
            log_level='ERROR',
        )
    )
    cfg.merge_from_dict(kwargs)
    return SafeRunner.from_cfg(cfg)
