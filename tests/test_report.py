# Copyright (c) mmscalablevit contributors. All rights reserved.
"""The report on the demo's trainings: its table, its pictures, and what it says is missing."""

import json
import shutil
import sys
from contextlib import nullcontext

import cv2
import numpy as np
import pytest
import torch
from jobs import ROOT, draw_shapes, load_tool
from logs import session
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from pycocotools.coco import COCO

from mmscalablevit.errors import CheckpointError, UserError

pytest.importorskip('mmdet')
pytest.importorskip('mmseg')

report = load_tool('demo/report.py')
CLASSES = ('circle', 'square', 'triangle', 'star')
COLORS = [(90, 90, 90), (230, 80, 70), (70, 150, 240), (250, 200, 60), (120, 210, 110)]
BOXES = {'coco/bbox_mAP': 0.59, 'coco/segm_mAP': 0.7, 'coco/bbox_mAP_50': 0.79, 'step': 10}
AREAS = dict(aAcc=90.0, mIoU=80.0, mAcc=80.0, step=10)
STEP = dict(lr=1e-3, loss=1.0, time=6.0, iter=10, step=10)


def write_work_dir(work_dir, name, records, meta):
    """What a training leaves behind, with weights that were never trained."""
    cfg = Config.fromfile(ROOT / 'tests' / 'data' / f'{name}.py')
    cfg.train_cfg = dict(max_iters=10)
    if name == 'tiny_upernet':
        cfg.test_pipeline = [dict(type='LoadImageFromFile'), dict(type='PackSegInputs')]
    session(work_dir, records, cfg.to_dict(), name)
    init_default_scope(cfg.default_scope)
    state = MODELS.build(cfg.model).state_dict()
    torch.save(dict(state_dict=state, meta=dict(dataset_meta=meta)), work_dir / 'iter_10.pth')
    # Work directories get moved; only the name counts.
    (work_dir / 'last_checkpoint').write_text('/where/it/was/iter_10.pth')
    return work_dir


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """Work directories of detector and segmentor, and their data."""
    import mmdet.models  # noqa: F401
    import mmseg.models  # noqa: F401

    folder = tmp_path_factory.mktemp('trained')
    draw_shapes(folder / 'shapes', num_train=1, num_val=3)
    segments = dict(classes=('background', *CLASSES), palette=COLORS)
    return (
        write_work_dir(folder / 'det', 'tiny_mask-rcnn', [STEP, BOXES], dict(classes=CLASSES)),
        write_work_dir(folder / 'seg', 'tiny_upernet', [STEP, AREAS], segments),
        folder / 'shapes',
    )


def test_report_shows_image_truth_and_prediction(trained, tmp_path, monkeypatch):
    grids = []
    draw_grid = report.draw_grid

    def keep(columns, *args):
        grids.append(columns)
        draw_grid(columns, *args)

    monkeypatch.setattr(report, 'draw_grid', keep)
    rows = report.write_report(*trained, tmp_path, num_images=2)

    text = (tmp_path / 'report.md').read_text()
    lines = [[cell.strip() for cell in line.strip('|').split('|')] for line in text.splitlines()]
    cells = {(line[0], line[1]): line[2:] for line in lines if len(line) == 5}
    assert cells['detection', 'box AP'] == ['0.590', '0.60', 'missed']
    assert cells['detection', 'mask AP'] == ['0.700', '0.50', 'reached']
    assert cells['detection', 'box AP50'] == ['0.790', '', '']
    assert cells['detection', 'training minutes'] == ['1.0', '', '']
    assert cells['segmentation', 'mIoU'] == ['0.800', '0.80', 'reached']
    assert cells['segmentation', 'iterations'] == ['10', '', '']
    assert cells['segmentation', 's/iter'] == ['6.000', '', '']
    assert [row.name for row in rows if row.missed] == ['box AP']
    for name in ('curves.png', 'detections.png', 'segmentation.png'):
        assert f'({name})' in text
        assert min(cv2.imread(str(tmp_path / name)).shape[:2]) > 400

    data = trained[2]
    coco = COCO(str(data / 'annotations/instances_validation.json'))
    for i, (detection, segmentation) in enumerate(zip(*grids, strict=True), start=1):
        original = cv2.imread(str(data / f'images/validation/{i:06d}.jpg'))[..., ::-1]
        labels = cv2.imread(str(data / f'annotations/validation/{i:06d}.png'), 0) - 1
        for image, truth, prediction in (detection, segmentation):
            assert image.shape == truth.shape == prediction.shape == (256, 256, 3)
            small = cv2.resize(image, (64, 64), interpolation=cv2.INTER_AREA)
            assert np.abs(small.astype(int) - original).mean() < 3
        # mmseg lays the colors over the image at 0.7.
        image, truth, _ = segmentation
        colors = np.array(COLORS)[labels].repeat(4, axis=0).repeat(4, axis=1)
        np.testing.assert_allclose(truth, 0.3 * image + 0.7 * colors, atol=1.5)
        # mmdet changes the color of each mask at random; boxes and names lie around it.
        image, truth, _ = detection
        changed = np.abs(truth.astype(int) - image).sum(axis=2) > 30
        for annotation in coco.loadAnns(coco.getAnnIds(i)):
            mask = coco.annToMask(annotation).repeat(4, axis=0).repeat(4, axis=1) > 0
            assert changed[mask].mean() > 0.8
        assert changed.mean() < 0.6


@pytest.fixture
def copied(trained, tmp_path):
    """A detector's work directory for a test to change, and a function that writes its log."""
    folder = shutil.copytree(trained[0], tmp_path / 'det')
    (log,) = folder.glob('*/vis_data/scalars.json')
    return folder, lambda records: log.write_text('\n'.join(map(json.dumps, records)))


@pytest.mark.parametrize(
    ('records', 'said'),
    [
        ([STEP], 'no training iteration or no evaluation'),
        ([STEP, {'coco/bbox_mAP': 0.1, 'step': 10}], 'no coco/segm_mAP in the evaluation at 10'),
    ],
)
def test_missing_entries_of_a_log_are_named(copied, records, said):
    copied[1](records)
    with pytest.raises(UserError, match=said):
        report.read_training(copied[0], report.METRICS['detection'])


def test_metric_that_is_not_a_number_misses_its_target(copied):
    copied[1]([STEP, dict(BOXES, **{'coco/bbox_mAP': np.nan})])
    run = report.read_training(copied[0], report.METRICS['detection'])
    assert report.make_rows('detection', run)[0].missed


@pytest.mark.parametrize(
    ('spoil', 'said'),
    [
        (lambda folder: (folder / 'last_checkpoint').unlink(), 'last_checkpoint'),
        (lambda folder: (folder / 'iter_10.pth').unlink(), 'iter_10.pth, which does not exist'),
        (lambda folder: (folder / 'iter_10.pth').write_text('damaged'), r'iter_10\.pth'),
        (
            lambda folder: torch.save(dict(state_dict={}, meta={}), folder / 'iter_10.pth'),
            'iter_10.pth holds no weights',
        ),
    ],
)
def test_checkpoint_that_fails_is_named(trained, copied, tmp_path, spoil, said):
    spoil(copied[0])
    with pytest.raises((UserError, CheckpointError), match=said):
        report.write_report(copied[0], *trained[1:], tmp_path / 'out', 1)


def test_report_wants_enough_images(trained, tmp_path):
    with pytest.raises(UserError, match='holds 3 images of the 4 to show'):
        report.write_report(*trained, tmp_path, num_images=4)


@pytest.mark.parametrize('missed', [False, True])
def test_missed_target_fails_only_a_strict_run(missed, tmp_path, monkeypatch):
    rows = [report.Row('detection', 'box AP', '0.590', 0.6, missed)]
    monkeypatch.setattr(report, 'write_report', lambda *args: rows)
    monkeypatch.setattr(report, 'use_safe_loader', lambda: None)
    folders = [f'--{name}={tmp_path}' for name in ('det-dir', 'seg-dir', 'data', 'out-dir')]
    monkeypatch.setattr(sys, 'argv', ['report.py', *folders])
    report.main()
    monkeypatch.setattr(sys, 'argv', ['report.py', *folders, '--strict'])
    with pytest.raises(UserError, match='target') if missed else nullcontext():
        report.main()
