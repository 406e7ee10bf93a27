# Copyright (c) mmscalablevit contributors. All rights reserved.
"""Data sets in PASCAL VOC's layout train and validate; a wrong measure is refused at the start."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from doc_blocks import environment
from PIL import Image

from mmscalablevit.checks.findings import Findings
from mmscalablevit.checks.label_maps import LabelRule

ROOT = Path(__file__).parents[1]
CONFIG = f"""
_base_ = '{ROOT}/tests/data/tiny_retinanet.py'
data = dict(
    _delete_=True, type='VOCDataset', data_root='data', data_prefix=dict(sub_data_root='VOC2007/'),
    metainfo=dict(classes=('cat', 'dog')), ann_file='all.txt')
small = [
    dict(step, scale=(64, 64)) if step['type'] == 'Resize' else step
    for step in _base_.train_pipeline]
train_dataloader = dict(
    dataset=dict(data, pipeline=small), num_workers=0, persistent_workers=False)
val_dataloader = dict(dataset=dict(data, pipeline=_base_.test_pipeline))
test_dataloader = val_dataloader
val_evaluator = dict(_delete_=True, type='VOCMetric', metric='mAP')
test_evaluator = val_evaluator
model = dict(bbox_head=dict(num_classes=2))
train_cfg = dict(max_epochs=1)
"""


@pytest.fixture
def voc(tmp_path):
    root = tmp_path / 'data' / 'VOC2007'
    for folder in ('JPEGImages', 'Annotations'):
        (root / folder).mkdir(parents=True)
    for i in (1, 2):
        pixels = np.random.default_rng(i).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / 'JPEGImages' / f'{i}.jpg')
        objects = ''.join(
            f'<object><name>{name}</name><bndbox><xmin>{x}</xmin><ymin>5</ymin>'
            f'<xmax>{x + 20}</xmax><ymax>40</ymax></bndbox></object>'
            for name, x in (('cat', 3), ('dog', 30))
        )
        size = '<size><width>64</width><height>64</height></size>'
        (root / 'Annotations' / f'{i}.xml').write_text(f'<annotation>{size}{objects}</annotation>')
    (tmp_path / 'data' / 'all.txt').write_text('1\n2\n')
    (tmp_path / 'my_voc.py').write_text(CONFIG)
    return tmp_path


def train(folder, *options):
    command = [sys.executable, str(ROOT / 'tools' / 'train.py'), 'my_voc.py']
    return subprocess.run(
        [*command, *options], cwd=folder, env=environment(), capture_output=True, text=True
    )


def test_voc_trains_and_keeps_its_best(voc):
    done = train(voc)

    assert done.returncode == 0, done.stderr[-3000:]
    assert (voc / 'work_dirs/my_voc/best_pascal_voc_mAP_epoch_1.pth').exists()
    scalars = next((voc / 'work_dirs/my_voc').glob('*/vis_data/scalars.json')).read_text()
    assert 0 <= json.loads(scalars.splitlines()[-1])['pascal_voc/mAP'] <= 1


def test_a_measure_that_nothing_has_is_refused_before_training(voc):
    options = ['--cfg-options', 'default_hooks.checkpoint.save_best=coco/bbox_mAP']
    done = train(voc, *options)

    assert done.returncode == 1
    assert "save_best must be 'auto' or one of pascal_voc/..., got 'coco/bbox_mAP'" in done.stderr
    assert not list((voc / 'work_dirs').rglob('*.pth'))


def test_a_wrong_prefix_is_named_by_its_key(voc):
    options = ['--cfg-options', 'train_dataloader.dataset.data_prefix.sub_data_root=VOC2012/']
    done = train(voc, *options)

    assert done.returncode == 1
    assert 'data/VOC2012/ does not exist' in done.stderr
    assert 'train_dataloader.dataset.data_prefix.sub_data_root=' in done.stderr


@pytest.mark.parametrize(
    ('rule', 'wrong'),
    [
        (LabelRule(3), [-1, 3, 254, 300]),
        (LabelRule(3, reduce_zero_label=True), [-1, 254, 300]),
        (LabelRule(3, ignore_index=254), [-1, 3, 255, 300]),
    ],
)
def test_values_of_label_maps(rule, wrong):
    assert rule.wrong(np.array([-1, 0, 1, 2, 3, 254, 255, 300])).tolist() == wrong


def test_findings_are_counted():
    findings = Findings()
    for place in 'abcde':
        findings.error('is wrong', place)
    findings.warn('is odd', 'f')

    assert list(findings.lines()) == [
        'error: is wrong (5 times): a, b, c and 2 more',
        'warning: is odd: f',
    ]
