# Copyright (c) mmscalablevit contributors. All rights reserved.
"""Every parameter has a gradient, or DistributedDataParallel ends the training."""

import copy
import itertools

import pytest
import torch
from config_cases import CONFIGS, DEMO, load, names_in
from golden import TINY
from jobs import long
from mmengine.model import MMDistributedDataParallel
from mmengine.optim import build_optim_wrapper
from test_config_models import batch_of, build, shallow
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from mmscalablevit import ScalableViT

CLASSIFICATION = names_in('classification')
SUBSETS = [subset for length in range(1, 5) for subset in itertools.combinations(range(4), length)]


@pytest.fixture
def group():
    """A process group of this process alone."""
    store = distributed.HashStore()
    distributed.init_process_group('gloo', store=store, rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


class WithNeck(nn.Module):
    """A backbone with a layer on each of its maps, as heads have, which is never frozen."""

    def __init__(self, **kwargs):
        super().__init__()
        self.backbone = ScalableViT(TINY, drop_path_rate=0.3, **kwargs)
        dims = [TINY['embed_dims'][i] for i in self.backbone.out_indices]
        self.neck = nn.ModuleList(nn.Conv2d(dim, 4, 1) for dim in dims)

    def forward(self, images):
        maps = self.backbone(images)
        return sum(conv(x).square().mean() for conv, x in zip(self.neck, maps, strict=True))


def step_twice(model):
    """Train as DistributedDataParallel does by default: the second forward finds what is unused."""
    wrapped = DistributedDataParallel(model.train())
    for _ in range(2):
        wrapped(torch.rand(1, 3, 32, 32)).backward()


@pytest.mark.parametrize('with_cp', [False, True])
@pytest.mark.parametrize('frozen_stages', range(-1, 5))
@pytest.mark.parametrize('stage_norm', ['chained', long('output'), long(None)])
def test_every_parameter_is_used(stage_norm, frozen_stages, with_cp, group):
    for out_indices in SUBSETS:
        model = WithNeck(
            out_indices=out_indices,
            frozen_stages=frozen_stages,
            with_cp=with_cp,
            stage_norm=stage_norm,
            final_norm=stage_norm is None and 3 in out_indices,
        )
        step_twice(model)
        without = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
        assert (out_indices, without) == (out_indices, [])


def batches_of(cfg):
    """With objects, without, and with again: the empty one must leave no parameter out, too."""
    if cfg.default_scope == 'mmpretrain':
        from mmpretrain.structures import DataSample

        images = [torch.randint(256, (3, 64, 64), dtype=torch.uint8) for _ in range(4)]
        samples = [DataSample().set_gt_label(i) for i in range(4)]
        return [dict(inputs=images, data_samples=samples)] * 2
    first, empty = batch_of(cfg), batch_of(cfg)
    for sample in empty['data_samples']:
        if cfg.default_scope == 'mmdet':
            sample.gt_instances = sample.gt_instances[:0]
        else:
            sample.gt_sem_seg.data = torch.full_like(sample.gt_sem_seg.data, 255)
    return [first, empty, copy.deepcopy(first)]


def train_distributed(cfg):
    """Train a shallow copy of a config's model on a few batches; how many parameters it has."""
    cfg = shallow(cfg)
    model = build(cfg).train()
    options = copy.deepcopy(cfg.optim_wrapper)
    if options.type == 'AmpOptimWrapper':
        options.type = 'CPUAmpOptimWrapper'
    wrapper = build_optim_wrapper(model, options)
    # The arguments with which mmengine's runner wraps a model.
    arguments = dict(device_ids=None, broadcast_buffers=False, find_unused_parameters=False)
    wrapped = MMDistributedDataParallel(model, **arguments)
    for data in batches_of(cfg):
        log = wrapped.train_step(data, wrapper)
        assert all(value.isfinite() for value in log.values()), log
    return sum(parameter.requires_grad for parameter in model.parameters())


ONE_OF_EACH_TASK = [
    'detection/mask-rcnn_scalablevit-s_fpn_1x_coco.py',
    'segmentation/scalablevit-s_upernet_8xb2-160k_ade20k-512x512.py',
    'classification/scalablevit-s_8xb128_in1k.py',
]
MANY = [*itertools.product([*CONFIGS, *CLASSIFICATION], [-1])]
MANY += itertools.product(ONE_OF_EACH_TASK, range(5))


@pytest.mark.parametrize(
    ('name', 'frozen_stages'), [*((name, -1) for name in DEMO), *(long(*case) for case in MANY)]
)
def test_configs_use_every_parameter(name, frozen_stages, group):
    cfg = copy.deepcopy(load(name))
    # What hides an unused parameter at the price of a search in each iteration.
    assert not cfg.get('find_unused_parameters')
    if frozen_stages >= 0:
        cfg.model.backbone.frozen_stages = frozen_stages
    parameters = train_distributed(cfg)
    assert parameters > 10
    print(f'{name}, frozen_stages={frozen_stages}: {parameters} parameters, none unused')
