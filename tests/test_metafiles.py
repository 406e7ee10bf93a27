# Copyright (c) mmscalablevit contributors. All rights reserved.
"""The metadata of the models: every config is in it, with the published results."""

import functools
import re
from pathlib import Path

import pytest
import torch
import yaml
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope

import mmscalablevit  # noqa: F401

ROOT = Path(__file__).parents[1]
FOLDERS = ('classification', 'detection', 'segmentation')
CONFIGS = sorted(
    str(path.relative_to(ROOT))
    for folder in FOLDERS
    for path in (ROOT / 'configs' / folder).glob('*.py')
)
AUTHORS = 'published by the authors (arXiv:2203.10790), not reproduced here'
NONE = 'none published'
TASKS = {
    'box AP': ('Object Detection', 'COCO'),
    'mask AP': ('Instance Segmentation', 'COCO'),
    'mIoU': ('Semantic Segmentation', 'ADE20K'),
    'mIoU(ms+flip)': ('Semantic Segmentation', 'ADE20K'),
    'Top 1 Accuracy': ('Image Classification', 'ImageNet-1k'),
}

# The tables of the paper and of the authors' README.
COCO = """
retinanet  s 1x 45.2
retinanet  s 3x 47.8
retinanet  b 1x 45.8
retinanet  b 3x 48.0
retinanet  l 1x 46.8
mask-rcnn  s 1x 45.8 41.7
mask-rcnn  s 3x 48.7 43.6
mask-rcnn  b 1x 46.6 42.1
mask-rcnn  b 3x 48.9 43.6
mask-rcnn  l 1x 47.6 42.9
"""
ADE20K = """
fpn      s 44.9
fpn      b 48.4
fpn      l 49.4
upernet  s 48.5 49.4
upernet  b 49.5 50.4
upernet  l 49.7 50.7
"""
IMAGENET = dict(s=83.1, b=84.1, l=84.4)
# The toolboxes' model zoos; for Twins with Mask R-CNN its paper.
BASELINES = {
    'mask-rcnn_swin-t_fpn_1x_coco': ({'box AP': 42.7, 'mask AP': 39.3}, 'mmdetection'),
    'mask-rcnn_twins-svt-s_fpn_1x_coco': ({'box AP': 43.4, 'mask AP': 40.3}, 'arXiv:2104.13840'),
    'swin-t_upernet_8xb2-160k_ade20k-512x512': (
        {'mIoU': 44.41, 'mIoU(ms+flip)': 45.79},
        'mmsegmentation',
    ),
    'twins-svt-s_upernet_8xb2-160k_ade20k-512x512': (
        {'mIoU': 46.08, 'mIoU(ms+flip)': 46.96},
        'mmsegmentation',
    ),
}


def published():
    """Metrics of the authors' models by the name of the config."""
    results = {}
    for line in COCO.split('\n')[1:-1]:
        head, size, schedule, *values = line.split()
        schedule = {'1x': '1x', '3x': 'ms-crop-3x'}[schedule]
        name = f'{head}_scalablevit-{size}_fpn_{schedule}_coco'
        results[name] = dict(zip(('box AP', 'mask AP'), map(float, values), strict=False))
    for line in ADE20K.split('\n')[1:-1]:
        head, size, *values = line.split()
        schedule = dict(fpn='4xb4-80k', upernet='8xb2-160k')[head]
        name = f'scalablevit-{size}_{head}_{schedule}_ade20k-512x512'
        results[name] = dict(zip(('mIoU', 'mIoU(ms+flip)'), map(float, values), strict=False))
    for size, accuracy in IMAGENET.items():
        results[f'scalablevit-{size}_8xb128_in1k'] = {'Top 1 Accuracy': accuracy}
    return results


@functools.cache
def metafiles():
    index = yaml.safe_load((ROOT / 'model-index.yml').read_text())
    assert list(index) == ['Import']
    return {name: yaml.safe_load((ROOT / name).read_text()) for name in index['Import']}


def models():
    return [model for metafile in metafiles().values() for model in metafile['Models']]


def metrics(model):
    found = {}
    for result in model.get('Results', []):
        for metric, value in result['Metrics'].items():
            assert (result['Task'], result['Dataset']) == TASKS[metric]
            assert metric not in found
            found[metric] = value
    return found


MODEL_NAMES = [model['Name'] for model in models()]


def test_index_imports_every_metafile():
    found = [str(path.relative_to(ROOT)) for path in (ROOT / 'configs').rglob('metafile.y*ml')]

    assert sorted(metafiles()) == sorted(found)
    assert sorted(found) == [f'configs/{folder}/metafile.yml' for folder in FOLDERS]


def test_every_config_has_one_entry():
    assert sorted(model['Config'] for model in models()) == CONFIGS
    assert len(set(MODEL_NAMES)) == len(MODEL_NAMES)
    for path, metafile in metafiles().items():
        folder = Path(path).parent
        assert {str(Path(model['Config']).parent) for model in metafile['Models']} == {str(folder)}


def test_published_results_are_those_of_the_tables():
    wanted = published()
    found = {}
    for model in models():
        if model['Metadata']['Results Source'] == AUTHORS:
            found[model['Name']] = metrics(model)

    assert len(wanted) == 19
    assert found == wanted


def test_baselines_name_their_own_source():
    found = {
        model['Name']: (metrics(model), model['Metadata']['Results Source'])
        for model in models()
        if 'scalablevit' not in model['Name']
    }

    assert found.keys() == BASELINES.keys()
    for name, (values, source) in BASELINES.items():
        assert found[name][0] == values, name
        assert source in found[name][1]
        assert found[name][1].endswith('not reproduced here')


def test_no_other_results():
    named = {*published(), *BASELINES}
    for model in models():
        if model['Name'] not in named:
            assert model['Metadata']['Results Source'] == NONE
            assert 'Results' not in model


@pytest.mark.parametrize('model', models(), ids=MODEL_NAMES)
def test_entry_is_complete_and_agrees_with_its_config(model):
    assert set(model) <= {'Name', 'In Collection', 'Config', 'Metadata', 'Results'}
    assert model['Name'] == Path(model['Config']).stem
    collections = [
        entry for metafile in metafiles().values() for entry in metafile.get('Collections', [])
    ]
    (collection,) = [entry for entry in collections if entry['Name'] == model['In Collection']]
    assert re.fullmatch(r'https://arxiv\.org/abs/\d{4}\.\d{5}', collection['Paper']['URL'])

    cfg = Config.fromfile(ROOT / model['Config'])
    metadata = model['Metadata']
    data = dict(mmdet='COCO', mmseg='ADE20K', mmpretrain='ImageNet-1k')
    assert metadata['Training Data'] == data[cfg.default_scope]
    assert metadata['Batch Size'] == cfg.auto_scale_lr.base_batch_size
    gpus, images = re.fullmatch(
        r'(\d+) GPUs x (\d+) images', metadata['Training Resources']
    ).groups()
    assert int(images) == cfg.train_dataloader.batch_size
    assert int(gpus) * int(images) == metadata['Batch Size']
    if 'Epochs' in metadata:
        assert metadata['Epochs'] == cfg.train_cfg.max_epochs
    else:
        assert metadata['Iterations'] == cfg.train_cfg.max_iters
    backbone = cfg.model.backbone.type.rpartition('.')[2]
    wanted = dict(ScalableViT='ScalableViT', SwinTransformer='Swin Transformer', SVT='Twins')
    assert model['In Collection'] == wanted[backbone]
    if backbone == 'ScalableViT':
        size = re.search(r'scalablevit-([sbl])_', model['Name'])[1]
        assert metadata['Architecture'][0] == f'ScalableViT-{size.upper()}'


def test_variants_name_the_recipe_they_vary():
    variants = {
        model['Name']: model['Metadata'].get('Variant Of')
        for model in models()
        if 'layer-decay-' in model['Name']
    }

    assert variants
    assert variants == {name: name.replace('layer-decay-', '') for name in variants}
    assert set(variants.values()) <= set(MODEL_NAMES)
    assert not [m for m in models() if 'Variant Of' in m['Metadata'] and m['Name'] not in variants]


def count(path):
    cfg = Config.fromfile(ROOT / path)
    cfg.model.pop('init_cfg', None)
    init_default_scope(cfg.default_scope)
    # Swin and Twins compute while they are built.
    device = 'meta' if cfg.model.backbone.type == 'ScalableViT' else 'cpu'
    with torch.device(device):
        model = MODELS.build(cfg.model)
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize('model', models(), ids=MODEL_NAMES)
def test_parameters_are_the_computed_ones(model):
    for toolbox in ('mmdet', 'mmseg', 'mmpretrain'):
        pytest.importorskip(f'{toolbox}.models')

    assert model['Metadata']['Parameters'] == round(count(model['Config']), -4)


def test_modelindex_reads_it():
    modelindex = pytest.importorskip('modelindex', reason='the reader of MIM is not installed')
    index = modelindex.load(str(ROOT / 'model-index.yml'))
    assert index.check(silent=True) == []
    found = {model.name: model for model in index.models}

    assert sorted(found) == sorted(MODEL_NAMES)
    model = found['mask-rcnn_scalablevit-s_fpn_1x_coco']
    assert model.config == 'configs/detection/mask-rcnn_scalablevit-s_fpn_1x_coco.py'
    values = {}
    for result in model.results:
        values.update(result.metrics)
    assert values == {'box AP': 45.8, 'mask AP': 41.7}
