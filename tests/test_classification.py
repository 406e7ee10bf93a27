# Copyright (c) mmscalablevit contributors. All rights reserved.
"""Classification with mmpretrain: golden logits, head, recipe, training on a folder of images."""

import re
import sys

import numpy as np
import pytest
import torch
import yaml
from golden import REFERENCE, TINY, read_json, reference_input, reference_state, relative_error
from jobs import ROOT, packaged, run_tool, scalars, write_map
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import init_default_scope
from safetensors.torch import load_file

mmpretrain = pytest.importorskip('mmpretrain')
from mmpretrain.registry import MODELS  # noqa: E402

from mmscalablevit.checkpoint.reading import read_checkpoint  # noqa: E402
from mmscalablevit.errors import CheckpointError  # noqa: E402
from mmscalablevit.models.cls_head import ScalableViTClsHead  # noqa: E402

CONFIGS = ROOT / 'configs' / 'classification'
METAFILE = yaml.safe_load((CONFIGS / 'metafile.yml').read_text())
SEEDS = dict(small=401, base=402, large=403)
TINY_CONFIG = """
_base_ = ['{base}']
data = dict(_delete_=True, type='CustomDataset', data_root='{data}')
train_pipeline = _base_.train_pipeline
test_pipeline = _base_.test_pipeline
train_pipeline[1].scale = 64
test_pipeline[1].scale = 72
test_pipeline[2].crop_size = 64
loader = dict(batch_size=8, num_workers=0, persistent_workers=False)
train_dataloader = dict(
    dataset=dict(data_prefix='train', pipeline=train_pipeline, **data), **loader)
val_dataloader = dict(dataset=dict(data_prefix='val', pipeline=test_pipeline, **data), **loader)
test_dataloader = val_dataloader
val_evaluator = dict(topk=(1,))
test_evaluator = val_evaluator
train_cfg = dict(max_epochs=8, val_interval=8)
param_scheduler = [dict(type='ConstantLR', factor=1.0)]
randomness = dict(seed=0)
default_hooks = dict(checkpoint=dict(interval=8), logger=dict(interval=6))
model = dict(
    data_preprocessor=dict(num_classes=3),
    backbone=dict(
        _delete_=True, type='ScalableViT', arch={arch},
        out_indices=[3], stage_norm=None, final_norm=True),
    head=dict(num_classes=3, in_channels=32, hidden_channels=64))
"""


@pytest.fixture(autouse=True)
def scope():
    init_default_scope('mmpretrain')


def config_path(variant):
    return CONFIGS / f'scalablevit-{variant[0]}_8xb128_in1k.py'


def config_of(variant):
    return Config.fromfile(config_path(variant))


@pytest.mark.parametrize('variant', SEEDS)
def test_golden_logits(variant):
    """Each config's classifier, holding the authors' tensors, gives the authors' numbers."""
    with torch.device('meta'):
        model = MODELS.build(config_of(variant).model)
    (entry,) = (model for model in METAFILE['Models'] if model['Name'] == config_path(variant).stem)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert entry['Metadata']['Parameters'] == round(count, -4)
    official = reference_state(read_json(f'state_dict_keys_{variant}.json'))
    state = {
        name.replace('head.', 'head.fc.', 1) if name.startswith('head.') else f'backbone.{name}': t
        for name, t in official.items()
    }
    model.load_state_dict(state, strict=True, assign=True)
    golden = load_file(REFERENCE / f'logits_{variant}.safetensors')
    with torch.no_grad():
        features = model.eval().extract_feat(reference_input(SEEDS[variant], (2, 3, 224, 224)))
        logits = model.head(features)
    assert relative_error(features[-1], golden['pooled']) < 1e-5
    assert relative_error(logits, golden['logits']) < 1e-5


def test_head_initialization_is_the_released_one():
    torch.manual_seed(0)
    head = ScalableViTClsHead(num_classes=100, in_channels=64)
    head.init_weights()
    for layer in (head.fc[0], head.fc[3]):
        assert layer.weight.std().item() == pytest.approx(0.02, rel=0.02)
        assert layer.bias.eq(0).all()
    assert head.fc[1].weight.eq(1).all()


def test_features_before_the_classifier():
    features = (torch.rand(2, 8), torch.rand(2, 32))
    head = ScalableViTClsHead(num_classes=3, in_channels=32, hidden_channels=64)
    assert head.pre_logits(features).shape == (2, 64)
    assert torch.equal(head.fc[3](head.pre_logits(features)), head(features))
    plain = ScalableViTClsHead(num_classes=3, in_channels=32, hidden_channels=None)
    assert plain.state_dict().keys() == {'fc.weight', 'fc.bias'}
    assert torch.equal(plain.pre_logits(features), features[-1])
    assert torch.equal(plain(features), features[-1] @ plain.fc.weight.T + plain.fc.bias)


def test_bad_numbers_are_named():
    for name, value in dict(num_classes=0, in_channels=2.0, hidden_channels='3').items():
        with pytest.raises(ValueError, match=f'{name} must be a positive integer, got'):
            ScalableViTClsHead(**{'num_classes': 3, 'in_channels': 32, name: value})


def test_missing_mmpretrain_says_what_to_install(monkeypatch):
    monkeypatch.delitem(sys.modules, 'mmscalablevit.models.cls_head')
    monkeypatch.setitem(sys.modules, 'mmpretrain.models', None)
    with pytest.raises(RuntimeError, match=r'needs mmpretrain.*install onedl-mmpretrain'):
        config_of('small')


@pytest.mark.parametrize('variant', SEEDS)
def test_recipe_is_the_authors(variant):
    """What the released training script sets, read from the built optimizer and schedule."""
    cfg = config_of(variant)
    assert cfg.model.backbone.drop_path_rate == {'small': 0.2}.get(variant, 0.5)
    batch = 8 * cfg.train_dataloader.batch_size
    assert cfg.optim_wrapper.optimizer.lr == pytest.approx(5e-4 * batch / 512)
    assert cfg.auto_scale_lr.base_batch_size == batch
    warmup, cosine = cfg.param_scheduler
    assert warmup.start_factor * cfg.optim_wrapper.optimizer.lr == pytest.approx(1e-6)
    assert (warmup.end, cosine.begin, cosine.end) == (5, 5, cfg.train_cfg.max_epochs)
    assert cosine.T_max == cosine.end - cosine.begin
    assert cfg.optim_wrapper.clip_grad.max_norm == 5


def test_no_weight_decay_on_norms_biases_and_position_encoding():
    cfg = config_of('small')
    with torch.device('meta'):
        model = MODELS.build(cfg.model)
    wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    groups = [group for group in wrapper.optimizer.param_groups if group['weight_decay']]
    decayed = {id(parameter) for group in groups for parameter in group['params']}
    for name, parameter in model.named_parameters():
        assert (id(parameter) in decayed) == (parameter.ndim > 1 and 'pos_block' not in name), name


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """A tiny classifier of the S config, trained on a folder of flat colors with noise."""
    folder = tmp_path_factory.mktemp('classification')
    rng = np.random.default_rng(0)
    for split, count in (('train', 16), ('val', 6)):
        for i, name in enumerate(('red', 'green', 'blue')):
            for j in range(count):
                image = rng.integers(0, 90, (48, 64, 3), dtype=np.uint8)
                image[..., i] += 140
                write_map(folder / 'data' / split / name / f'{j}.png', image)
    config = folder / 'tiny.py'
    base = config_path('small')
    config.write_text(TINY_CONFIG.format(base=base, data=folder / 'data', arch=TINY))
    run_tool([ROOT / 'tools' / 'train.py', config, '--work-dir', folder / 'work'], ROOT)
    return folder


def test_training_learns_and_tests_as_it_validated(trained):
    steps, validations = scalars(trained / 'work')
    validated = validations[-1]['accuracy/top1']
    assert validated > 90
    assert steps[-1]['loss'] < steps[0]['loss']
    command = [ROOT / 'tools' / 'test.py', 'tiny.py', 'work/epoch_8.pth', '--work-dir', 'test']
    (accuracy,) = re.findall(r'accuracy/top1: ([\d.]+)', run_tool(command, trained))
    assert float(accuracy) == pytest.approx(validated, abs=0.01)


def test_mmpretrains_own_tool_trains_the_config(trained):
    arguments = ['train_cfg.max_epochs=1', 'train_cfg.val_interval=1']
    options = ['--no-persistent-workers', '--cfg-options', *arguments]
    command = [packaged('mmpretrain', 'train.py'), 'tiny.py', '--work-dir', 'own', *options]
    run_tool(command, trained)
    assert 'accuracy/top1' in scalars(trained / 'own')[1][-1]


def test_mmpretrains_own_tools_refuse_what_does_not_fit(trained, call, monkeypatch):
    state = read_checkpoint(str(trained / 'work' / 'epoch_8.pth'))
    state['state_dict'].pop('head.fc.3.bias')
    torch.save(state, trained / 'less.pth')
    monkeypatch.chdir(trained)
    for tool, options in (('test.py', ['less.pth']), ('train.py', ['--resume', 'less.pth'])):
        with pytest.raises(CheckpointError, match=r'less\.pth does not fit .*head\.fc\.3\.bias'):
            call(packaged('mmpretrain', tool), 'tiny.py', *options, '--work-dir', 'own')
