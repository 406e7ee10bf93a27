# Copyright (c) mmscalablevit contributors. All rights reserved.
"""The metadata of the models: every config is in it, with the published results."""

import re
from pathlib import Path

import pytest
import yaml
from mmengine.config import Config

import mmscalablevit  # noqa: F401

ROOT = Path(__file__).parents[1]
FOLDERS = ('classification', 'detection', 'segmentation')
AUTHORS = 'published by the authors (arXiv:2203.10790), not reproduced here'
NONE = 'none published'
TASKS = {
    'box AP': ('Object Detection', 'COCO'),
    'mask AP': ('Instance Segmentation', 'COCO'),
    'mIoU': ('Semantic Segmentation', 'ADE20K'),
    'mIoU(ms+flip)': ('Semantic Segmentation', 'ADE20K'),
    'Top 1 Accuracy': ('Image Classification', 'ImageNet-1k'),
}

# The tables of the paper and of the authors' README, in the order of the task's metrics.
PAPER = """
retinanet_scalablevit-s_fpn_1x_coco 45.2
retinanet_scalablevit-s_fpn_ms-crop-3x_coco 47.8
retinanet_scalablevit-b_fpn_1x_coco 45.8
retinanet_scalablevit-b_fpn_ms-crop-3x_coco 48.0
retinanet_scalablevit-l_fpn_1x_coco 46.8
mask-rcnn_scalablevit-s_fpn_1x_coco 45.8 41.7
mask-rcnn_scalablevit-s_fpn_ms-crop-3x_coco 48.7 43.6
mask-rcnn_scalablevit-b_fpn_1x_coco 46.6 42.1
mask-rcnn_scalablevit-b_fpn_ms-crop-3x_coco 48.9 43.6
mask-rcnn_scalablevit-l_fpn_1x_coco 47.6 42.9
scalablevit-s_fpn_4xb4-80k_ade20k-512x512 44.9
scalablevit-b_fpn_4xb4-80k_ade20k-512x512 48.4
scalablevit-l_fpn_4xb4-80k_ade20k-512x512 49.4
scalablevit-s_upernet_8xb2-160k_ade20k-512x512 48.5 49.4
scalablevit-b_upernet_8xb2-160k_ade20k-512x512 49.5 50.4
scalablevit-l_upernet_8xb2-160k_ade20k-512x512 49.7 50.7
scalablevit-s_8xb128_in1k 83.1
scalablevit-b_8xb128_in1k 84.1
scalablevit-l_8xb128_in1k 84.4
"""
# The toolboxes' model zoos; for Twins with Mask R-CNN its paper.
BASELINES = """
mask-rcnn_swin-t_fpn_1x_coco 42.7 39.3 mmdetection
mask-rcnn_twins-svt-s_fpn_1x_coco 43.4 40.3 arXiv:2104.13840
swin-t_upernet_8xb2-160k_ade20k-512x512 44.41 45.79 mmsegmentation
twins-svt-s_upernet_8xb2-160k_ade20k-512x512 46.08 46.96 mmsegmentation
"""
SOURCES = {line.split()[0]: line.split()[-1] for line in BASELINES.strip().splitlines()}


def published():
    """Metrics by the name of the config."""
    results = {}
    for name, *values in (line.split() for line in (PAPER + BASELINES).split('\n') if line):
        task = {'coco': 'COCO', 'in1k': 'ImageNet-1k'}.get(name.split('_')[-1], 'ADE20K')
        columns = [metric for metric, (_, dataset) in TASKS.items() if dataset == task]
        values = [float(value) for value in values if re.fullmatch(r'[\d.]+', value)]
        results[name] = dict(zip(columns, values, strict=False))
    return results


INDEX = yaml.safe_load((ROOT / 'model-index.yml').read_text())
METAFILES = {name: yaml.safe_load((ROOT / name).read_text()) for name in INDEX['Import']}
MODEL_ENTRIES = [model for metafile in METAFILES.values() for model in metafile['Models']]
COLLECTIONS = {
    entry['Name']: entry
    for metafile in METAFILES.values()
    for entry in metafile.get('Collections', [])
}
MODEL_NAMES = [model['Name'] for model in MODEL_ENTRIES]


def metrics(model):
    found = {}
    for result in model.get('Results', []):
        for metric, value in result['Metrics'].items():
            assert (result['Task'], result['Dataset']) == TASKS[metric]
            assert metric not in found
            found[metric] = value
    return found


def test_every_config_has_one_entry_in_the_metafile_of_its_folder():
    assert list(INDEX) == ['Import']
    assert list(METAFILES) == [f'configs/{folder}/metafile.yml' for folder in FOLDERS]
    assert len(set(MODEL_NAMES)) == len(MODEL_NAMES)
    for path, metafile in METAFILES.items():
        configs = [str(x.relative_to(ROOT)) for x in (ROOT / path).parent.glob('*.py')]
        assert sorted(model['Config'] for model in metafile['Models']) == sorted(configs)


def test_results_are_those_of_the_tables_and_name_their_source():
    wanted = published()
    assert len(wanted) == 23
    assert set(wanted) < set(MODEL_NAMES)
    for model in MODEL_ENTRIES:
        name, source = model['Name'], model['Metadata']['Results Source']
        assert metrics(model) == wanted.get(name, {}), name
        if name in SOURCES:
            assert re.search(f'{SOURCES[name]}.*not reproduced here$', source)
        else:
            assert source == (AUTHORS if name in wanted else NONE)


@pytest.mark.parametrize('model', MODEL_ENTRIES, ids=MODEL_NAMES)
def test_entry_is_complete_and_agrees_with_its_config(model):
    assert set(model) <= {'Name', 'In Collection', 'Config', 'Metadata', 'Results'}
    assert model['Name'] == Path(model['Config']).stem
    collection = COLLECTIONS[model['In Collection']]
    assert re.fullmatch(r'https://arxiv\.org/abs/\d{4}\.\d{5}', collection['Paper']['URL'])

    cfg = Config.fromfile(ROOT / model['Config'])
    metadata = model['Metadata']
    data = dict(mmdet='COCO', mmseg='ADE20K', mmpretrain='ImageNet-1k')
    assert metadata['Training Data'] == data[cfg.default_scope]
    assert metadata['Batch Size'] == cfg.auto_scale_lr.base_batch_size
    images = cfg.train_dataloader.batch_size
    gpus = metadata['Batch Size'] // images
    assert metadata['Training Resources'] == f'{gpus} GPUs x {images} images'
    assert gpus * images == metadata['Batch Size']
    assert metadata.get('Epochs') == cfg.train_cfg.get('max_epochs')
    assert metadata.get('Iterations') == cfg.train_cfg.get('max_iters')
    backbone = cfg.model.backbone.type.rpartition('.')[2]
    wanted = dict(ScalableViT='ScalableViT', SwinTransformer='Swin Transformer', SVT='Twins')
    assert model['In Collection'] == wanted[backbone]
    if backbone == 'ScalableViT':
        size = re.search(r'scalablevit-([sbl])_', model['Name'])[1]
        assert metadata['Architecture'][0] == f'ScalableViT-{size.upper()}'


def test_variants_name_the_recipe_they_vary():
    variants = {
        m['Name']: m['Metadata']['Variant Of'] for m in MODEL_ENTRIES if 'layer-decay' in m['Name']
    }

    assert variants == {name: name.replace('layer-decay-', '') for name in variants}
    assert set(variants.values()) < set(MODEL_NAMES)
    assert {m['Name'] for m in MODEL_ENTRIES if 'Variant Of' in m['Metadata']} == set(variants)
