# Copyright (c) mmscalablevit contributors. All rights reserved.
"""The starter of configs: what it writes fits the data, is found sound and trains."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
from doc_blocks import LOADERS, run_commands
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope

ROOT = Path(__file__).parents[1]
TOOL = ROOT / 'tools' / 'misc' / 'new_config.py'
CLASSES = ('circle', 'square')


def draw(rng, count, size):
    """An image of squares, and their boxes."""
    width, height = size
    image = rng.integers(0, 60, (height, width, 3), dtype=np.uint8)
    boxes = []
    for _ in range(count):
        x, y = rng.integers(0, width - 20), rng.integers(0, height - 20)
        image[y : y + 18, x : x + 18] = rng.integers(150, 256, 3)
        boxes.append((int(x), int(y), 18, 18))
    return image, boxes


def write_boxes(root, counts=(3, 3, 3, 3), size=(64, 64), masks=True):
    """A data set as the converters write it; an image for each number of objects."""
    rng = np.random.default_rng(0)
    (root / 'annotations').mkdir(parents=True)
    for split, numbers in (('train', counts), ('val', counts[:2])):
        (root / split).mkdir()
        images, annotations = [], []
        for i, count in enumerate(numbers, start=1):
            image, boxes = draw(rng, count, size)
            cv2.imwrite(str(root / split / f'{i}.jpg'), image)
            images.append(dict(id=i, file_name=f'{i}.jpg', width=size[0], height=size[1]))
            for x, y, w, h in boxes:
                entry = dict(id=len(annotations) + 1, image_id=i, bbox=[x, y, w, h], area=w * h)
                entry.update(iscrowd=0, category_id=1 + len(annotations) % 2)
                polygon = [x, y, x + w, y, x + w, y + h, x, y + h]
                annotations.append(dict(entry, segmentation=[polygon] if masks else []))
        categories = [dict(id=i, name=name) for i, name in enumerate(CLASSES, start=1)]
        content = dict(images=images, annotations=annotations, categories=categories)
        (root / 'annotations' / f'{split}.json').write_text(json.dumps(content))


def write_label_maps(root, size=(64, 64), suffix='.jpg', count=4):
    rng = np.random.default_rng(0)
    for split in ('train', 'val'):
        for folder in ('images', 'annotations'):
            (root / folder / split).mkdir(parents=True)
        for i in range(count):
            image, boxes = draw(rng, 3, size)
            labels = np.zeros(image.shape[:2], np.uint8)
            for x, y, width, height in boxes:
                labels[y : y + height, x : x + width] = 1
            labels[:3] = 255
            cv2.imwrite(str(root / 'images' / split / f'{i}{suffix}'), image)
            cv2.imwrite(str(root / 'annotations' / split / f'{i}.png'), labels)
    (root / 'classes.txt').write_text('ground\nsquare\n')


@pytest.fixture
def new_config(call):
    """Call the tool; the config that it wrote, or its sentence."""

    def config(*arguments):
        Path('my.py').unlink(missing_ok=True)
        return call(TOOL, *arguments)[0] or Config.fromfile('my.py')

    return config


def resized(cfg):
    return [
        step['scale']
        for loader in (cfg.train_dataloader, cfg.val_dataloader)
        for step in loader.dataset.pipeline
        if step['type'] == 'Resize'
    ]


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
    assert {step.get('crop_size') for step in cfg.train_dataloader.dataset.pipeline} == {
        None,
        (128, 128),
    }
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
    cv2.imwrite('maps/images/val/9.png', np.zeros((64, 64, 3), np.uint8))
    assert 'one suffix, found .jpg, .png' in new_config('maps', '--task', 'segmentation')


def test_what_is_written_trains(tmp_path):
    """On CPU, from scratch."""
    write_boxes(tmp_path / 'boxes')
    write_label_maps(tmp_path / 'maps')
    commands = []
    # Low enough for the scores of detectors that hardly trained.
    low = dict(
        detection=['model.test_cfg.score_thr=0.0', 'model.test_cfg.nms_pre=50'],
        instance=['model.test_cfg.rcnn.score_thr=0.0', 'model.test_cfg.rpn.max_per_img=20'],
        segmentation=[],
    )
    for task, data in (('detection', 'boxes'), ('instance', 'boxes'), ('segmentation', 'maps')):
        options = ['--task', task, '--size', 'demo', '--epochs', '1', '--out', f'{task}.py']
        commands += [
            [str(TOOL), data, *options],
            [str(ROOT / 'tools' / 'check_data.py'), f'{task}.py', '--full'],
            [str(ROOT / 'tools' / 'train.py'), f'{task}.py', '--cfg-options', *LOADERS, *low[task]],
        ]
    said = run_commands(commands, tmp_path)

    assert sum('No errors found' in text for text in said) == 3
    for task, measure in (
        ('detection', 'coco/bbox_mAP'),
        ('instance', 'coco/segm_mAP'),
        ('segmentation', 'mIoU'),
    ):
        lines = next((tmp_path / 'work_dirs' / task).glob('*/vis_data/scalars.json')).read_text()
        assert measure in json.loads(lines.splitlines()[-1])
        assert list((tmp_path / 'work_dirs' / task).glob('best_*.pth'))
