# Copyright (c) mmscalablevit contributors. All rights reserved.
"""Data sets in PASCAL VOC's layout are checked and train; findings and label values."""

import json
from pathlib import Path

import numpy as np
import pytest
from jobs import ROOT, run_tool, write_image
from mmengine.dataset import BaseDataset
from PIL import Image

from mmscalablevit.checks.findings import Findings
from mmscalablevit.checks.label_maps import LabelRule
from mmscalablevit.engine.seed_hook import SeededDataset
from mmscalablevit.errors import DataError

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
    (root / 'Annotations').mkdir(parents=True)
    for i in (1, 2):
        write_image(root / 'JPEGImages' / f'{i}.jpg', size=(64, 64))
        write_xml(tmp_path, i, 'cat', 'dog')
    (tmp_path / 'data' / 'all.txt').write_text('1\n2\n')
    (tmp_path / 'my_voc.py').write_text(CONFIG)
    return tmp_path


def write_xml(folder, i, *names, box=(3, 5, 23, 40), width=64):
    edges = zip(('xmin', 'ymin', 'xmax', 'ymax'), box, strict=True)
    edges = ''.join(f'<{key}>{value}</{key}>' for key, value in edges)
    objects = ''.join(f'<object><name>{x}</name><bndbox>{edges}</bndbox></object>' for x in names)
    size = f'<size><width>{width}</width><height>64</height></size>'
    path = folder / 'data' / 'VOC2007' / 'Annotations' / f'{i}.xml'
    path.write_text(f'<annotation>{size}{objects}</annotation>')


def test_check_of_voc(call, voc):
    code, said = call('tools/check_data.py', 'my_voc.py')
    assert code == 0, said
    assert 'train_dataloader: VOCDataset in data: 2 images, 4 objects, 2 classes' in said
    assert 'warning:' not in said

    write_xml(voc, 1, 'cat', 'cow', box=(5, 5, 5, 9), width=65)
    write_xml(voc, 2, 'cat')
    code, said = call('tools/check_data.py', 'my_voc.py')
    assert code == 1
    assert 'error: box has no area or is off the image: data/VOC2007/JPEGImages/1.jpg' in said
    assert "warning: class has no object in data/all.txt: 'dog'" in said
    assert 'data/VOC2007/JPEGImages/1.jpg is 64x64 and not 65x64' in said


def test_voc_trains_and_keeps_its_best(voc):
    train = [ROOT / 'tools' / 'train.py', 'my_voc.py']
    run_tool(train, voc)
    assert (voc / 'work_dirs/my_voc/best_pascal_voc_mAP_epoch_1.pth').exists()
    scalars = next((voc / 'work_dirs/my_voc').glob('*/vis_data/scalars.json')).read_text()
    assert 0 <= json.loads(scalars.splitlines()[-1])['pascal_voc/mAP'] <= 1

    # Mistakes are told before the training.
    for option, *sentences in (
        (
            'default_hooks.checkpoint.save_best=coco/bbox_mAP',
            "save_best must be 'auto' or one of pascal_voc/..., got 'coco/bbox_mAP'",
        ),
        (
            'train_dataloader.dataset.data_prefix.sub_data_root=VOC2012/',
            'data/VOC2012/ does not exist',
            'train_dataloader.dataset.data_prefix.sub_data_root=',
        ),
    ):
        said = run_tool([*train, '--work-dir', 'wrong', '--cfg-options', option], voc, expect=1)
        assert all(sentence in said.splitlines()[-1] for sentence in sentences)
        assert not list((voc / 'wrong').rglob('*.pth'))


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


class Photographs(BaseDataset):
    def load_data_list(self):
        return [dict(img_path=name, height=30, width=40) for name in ('photo.jpg', 'photo.png')]


def sizes():
    dataset = SeededDataset(Photographs(pipeline=[dict(type='mmcv.LoadImageFromFile')]))
    return [dataset[i]['ori_shape'] for i in (0, 1, 0, 1)]


def test_turned_photograph_is_warned_of_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    warned = []
    monkeypatch.setattr('mmscalablevit.checks.pipeline.print_log', lambda x, *_: warned.append(x))
    exif = Image.Exif()
    exif[0x0112] = 6
    for name in ('photo.jpg', 'photo.png'):
        Image.new('RGB', (40, 30)).save(name, exif=exif)

    assert sizes() == [(40, 30)] * 4
    assert len(warned) == 1
    assert 'photo.jpg is 30x40 (EXIF rotation applied) and not 40x30' in warned[0]
    assert "color_type='color_ignore_orientation'" in warned[0]


def test_image_that_a_decoder_completes(tmp_path, monkeypatch):
    # Older OpenCV fills what is missing with gray.
    monkeypatch.chdir(tmp_path)
    noise = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    for name in ('photo.jpg', 'photo.png'):
        Image.fromarray(noise).save(name)
    whole = {name: Path(name).read_bytes() for name in ('photo.jpg', 'photo.png')}
    for name, content in whole.items():
        Path(name).write_bytes(content + b'trailing')
    assert sizes() == [(30, 40)] * 4

    for name, content in whole.items():
        Path(name).write_bytes(content[: len(content) // 2])
        with pytest.raises(DataError, match=rf'image {name} is damaged: '):
            sizes()
        Path(name).write_bytes(content)
