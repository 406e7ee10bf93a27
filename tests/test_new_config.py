# Copyright (c) mmscalablevit contributors. All rights reserved.
"""The starter of configs: what it writes fits the data, is found sound and trains."""

import json
from pathlib import Path

import numpy as np
import pytest
from doc_blocks import LOADERS, run_commands
from jobs import ROOT, scalars, write_image, write_map
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope

TOOL = ROOT / 'tools' / 'misc' / 'new_config.py'
CLASSES = ('circle', 'square')


def write_boxes(root, counts=(3, 3, 3, 3), size=(64, 64), masks=True):
    """A data set as the converters write it; an image for each number of objects."""
    rng = np.random.default_rng(0)
    (root / 'annotations').mkdir(parents=True)
    for split, numbers in (('train', counts), ('val', counts[:2])):
        images, annotations = [], []
        for i, count in enumerate(numbers, start=1):
            write_image(root / split / f'{i}.jpg', size)
            images.append(dict(id=i, file_name=f'{i}.jpg', width=size[0], height=size[1]))
            for x, y in rng.integers(0, np.array(size) - 20, (count, 2)).tolist():
                entry = dict(id=len(annotations) + 1, image_id=i, bbox=[x, y, 18, 18], area=324)
                entry.update(iscrowd=0, category_id=1 + len(annotations) % 2)
                polygon = [x, y, x + 18, y, x + 18, y + 18, x, y + 18]
                annotations.append(dict(entry, segmentation=[polygon] if masks else []))
        categories = [dict(id=i, name=name) for i, name in enumerate(CLASSES, start=1)]
        content = dict(images=images, annotations=annotations, categories=categories)
        (root / 'annotations' / f'{split}.json').write_text(json.dumps(content))


def write_label_maps(root, size=(64, 64), suffix='.jpg'):
    for i in range(4):
        for split in ('train', 'val'):
            write_image(root / f'images/{split}/{i}{suffix}', size)
            labels = np.resize(np.uint8([0, 1, 255]), size[::-1])
            write_map(root / f'annotations/{split}/{i}.png', labels)
    (root / 'classes.txt').write_text('ground\nsquare\n')


@pytest.fixture
def new_config(call):
    """Call the tool; the config that it wrote, or its sentence."""

    def config(*arguments):
        Path('my.py').unlink(missing_ok=True)
        return call(TOOL, *arguments)[0] or Config.fromfile('my.py')

    return config


def resized(cfg):
    pipelines = cfg.train_dataloader.dataset.pipeline + cfg.val_dataloader.dataset.pipeline
    return [step['scale'] for step in pipelines if step['type'] == 'Resize']


def test_detector_of_many_small_objects(new_config):
    write_boxes(Path('data'), counts=[90, 2, 2, 2], size=(640, 480))
    cfg = new_config('data', '--task', 'instance')

    assert cfg.train_dataloader.dataset.metainfo.classes == CLASSES
    assert cfg.model.roi_head.bbox_head.num_classes == cfg.model.roi_head.mask_head.num_classes == 2
    # The objects are of 18 pixels: enlarged as far as the recipe's largest size allows.
    assert resized(cfg) == [(1067, 800)] * 2
    assert cfg.model.test_cfg.rcnn.max_per_img == 200
    assert cfg.model.rpn_head.anchor_generator.scales == [8]
    assert cfg.val_evaluator.ann_file == 'data/annotations/val.json'
    # The shortest training that a detector gets, of the recipe's rate at 16 images.
    assert cfg.train_cfg.max_epochs == cfg.param_scheduler[1].end == 300
    assert cfg.optim_wrapper.optimizer.lr == pytest.approx(1e-4 * (2 / 16) ** 0.5, rel=0.05)
    assert '90 objects' in Path('my.py').read_text()


def test_detector_of_large_images(new_config):
    write_boxes(Path('data'), counts=[1] * 3, size=(4000, 2000))
    cfg = new_config('data', '--task', 'detection')

    assert resized(cfg) == [(1333, 666)] * 2
    assert cfg.model.bbox_head.anchor_generator.octave_base_scale == 2
    assert cfg.model.test_cfg.max_per_img == 100


def test_length_and_weights_can_be_chosen(new_config):
    write_boxes(Path('data'))
    cfg = new_config('data', '--task', 'detection', '--epochs', 30, '--from-scratch')

    assert cfg.train_cfg.max_epochs == 30
    assert cfg.param_scheduler[1].milestones == [20, 27]
    assert cfg.model.backbone.init_cfg is None
    assert cfg.optim_wrapper.clip_grad.max_norm == 1


@pytest.mark.parametrize('size', ['s', 'b', 'l'])
def test_segmentor(size, new_config):
    write_label_maps(Path('data'), size=(200, 150), suffix='.png')
    cfg = new_config('data', '--task', 'segmentation', '--size', size)

    heads = cfg.model.decode_head, cfg.model.auxiliary_head
    assert [head.num_classes for head in heads] == [2, 2]
    assert cfg.model.data_preprocessor['size'] == (128, 128)
    crops = {step.get('crop_size') for step in cfg.train_dataloader.dataset.pipeline}
    assert crops == {None, (128, 128)}
    assert cfg.val_dataloader.dataset.pipeline[1]['scale'] == (600, 150)
    assert cfg.train_dataloader.dataset.img_suffix == '.png'
    assert cfg.param_scheduler[-1].end == cfg.train_cfg.max_iters
    init_default_scope('mmseg')
    MODELS.build(cfg.model)


def test_what_cannot_be_looked_at(new_config):
    assert 'train.json does not exist' in new_config('data', '--task', 'detection')
    assert 'train does not exist' in new_config('data', '--task', 'segmentation')
    write_boxes(Path('data'), masks=False)
    assert 'boxes without masks' in new_config('data', '--task', 'instance')
    write_label_maps(Path('maps'))
    write_image(Path('maps/images/val/9.png'))
    assert 'one suffix, found .jpg, .png' in new_config('maps', '--task', 'segmentation')


def test_what_is_written_trains(tmp_path):
    """On CPU, from scratch."""
    write_boxes(tmp_path / 'boxes')
    write_label_maps(tmp_path / 'maps')
    # With thresholds low enough for the scores of detectors that hardly trained.
    boxes = ['model.test_cfg.score_thr=0.0', 'model.test_cfg.nms_pre=50']
    masks = ['model.test_cfg.rcnn.score_thr=0.0', 'model.test_cfg.rpn.max_per_img=20']
    tasks = dict(
        detection=('boxes', 'coco/bbox_mAP', boxes),
        instance=('boxes', 'coco/segm_mAP', masks),
        segmentation=('maps', 'mIoU', []),
    )
    for task, (data, measure, low) in tasks.items():
        options = ['--task', task, '--size', 'demo', '--epochs', '1', '--out', f'{task}.py']
        train = [str(ROOT / 'tools' / 'train.py'), f'{task}.py', '--cfg-options', *LOADERS, *low]
        check = [str(ROOT / 'tools' / 'check_data.py'), f'{task}.py', '--full']
        said = run_commands([[str(TOOL), data, *options], check, train], tmp_path)

        assert 'No errors found' in said[1]
        assert measure in scalars(tmp_path / 'work_dirs' / task)[1][-1]
        assert list((tmp_path / 'work_dirs' / task).glob('best_*.pth'))
