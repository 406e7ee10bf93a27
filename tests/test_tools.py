# Copyright (c) mmscalablevit contributors. All rights reserved.
"""The tools as a user calls them: mostly as processes of their own, on drawn shapes."""

import json
import os
import shutil
import sys

import cv2
import mmengine
import numpy as np
import pytest
import torch
from hostile import Payload
from jobs import ROOT, packaged, run, run_tool, scalars
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope

from mmscalablevit.checkpoint.reading import read_checkpoint
from mmscalablevit.errors import CheckpointError

TOOLS = ROOT / 'tools'
DETECTOR = ROOT / 'tests' / 'data' / 'tiny_mask-rcnn.py'
BOX_DETECTOR = ROOT / 'tests' / 'data' / 'tiny_retinanet.py'
SEGMENTOR = ROOT / 'tests' / 'data' / 'tiny_upernet.py'
# Images to test on that jobs.draw_shapes draws.
NUM_VAL = 4


@pytest.fixture(scope='module')
def detector(folder, environment):
    """The log of one epoch's training of a detector, four iterations, by a process of its own."""
    command = [sys.executable, TOOLS / 'train.py', DETECTOR, '--work-dir', 'detector']
    return run([*command, '--auto-scale-lr'], folder, environment)


@pytest.fixture(scope='module')
def segmentor(folder):
    command = [TOOLS / 'train.py', SEGMENTOR, '--work-dir', 'segmentor', '--amp']
    return run_tool(command, folder)


def trained(work_dir):
    """What four sound iterations and their validation logged."""
    steps, validations = scalars(work_dir)
    assert [step['step'] for step in steps] == [1, 2, 3, 4]
    assert all(np.isfinite(step['loss']) and step['loss'] > 0 for step in steps)
    return steps, validations[-1]


def test_train_detector(folder, detector):
    steps, validation = trained(folder / 'detector')

    # Two images an iteration where the recipe has 16; the warm-up starts at a thousandth.
    assert steps[0]['lr'] == pytest.approx(1e-4 * 2 / 16 * 0.001)
    boxes = {f'coco/bbox_mAP{suffix}' for suffix in ('', '_50', '_75', '_s', '_m', '_l')}
    assert boxes | {key.replace('bbox', 'segm') for key in boxes} <= validation.keys()
    assert (folder / 'detector' / 'epoch_1.pth').is_file()


def test_resume_continues(folder, detector):
    shutil.copytree(folder / 'detector', folder / 'resumed')
    (folder / 'resumed' / 'last_checkpoint').write_text(str(folder / 'resumed' / 'epoch_1.pth'))
    command = [TOOLS / 'train.py', DETECTOR, '--work-dir', 'resumed', '--resume']
    run_tool([*command, '--cfg-options', 'train_cfg.max_epochs=2'], folder)

    first = read_checkpoint(str(folder / 'resumed' / 'epoch_1.pth'))
    second = read_checkpoint(str(folder / 'resumed' / 'epoch_2.pth'))
    assert (first['meta']['epoch'], first['meta']['iter']) == (1, 4)
    assert (second['meta']['epoch'], second['meta']['iter']) == (2, 8)
    assert {float(state['step']) for state in second['optimizer']['state'].values()} == {8}
    steps, _ = scalars(folder / 'resumed')
    assert [step['step'] for step in steps] == [5, 6, 7, 8]
    # The warm-up goes on where it was, from the learning rate that was scaled once.
    rates = 1e-4 * np.linspace(0.001, 1, 1000)[4:8]
    assert [step['lr'] for step in steps] == pytest.approx(list(rates * 2 / 16))


def test_test_detector(folder, detector):
    command = [TOOLS / 'test.py', DETECTOR, 'detector/epoch_1.pth']
    options = ['--work-dir', 'tested', '--out', 'results/detections.pkl', '--show-dir', 'pictures']
    output = run_tool([*command, *options], folder)

    metrics = json.loads(next((folder / 'tested').glob('*/*.json')).read_text())
    validated = {k: v for k, v in scalars(folder / 'detector')[1][-1].items() if 'coco/' in k}
    assert len(validated) == 12
    assert validated == pytest.approx({key: metrics[key] for key in validated})
    results = mmengine.load(folder / 'results' / 'detections.pkl')
    assert len(results) == NUM_VAL
    assert {'bboxes', 'scores', 'labels', 'masks'} <= results[0]['pred_instances'].keys()
    pictures = sorted(path.name for path in (folder / 'pictures').iterdir())
    assert pictures == [f'{i:06d}.jpg' for i in range(1, NUM_VAL + 1)]
    assert 'wrote results/detections.pkl' in output
    assert 'wrote pictures' in output


def test_train_segmentor_with_amp(folder, segmentor):
    assert 0 <= trained(folder / 'segmentor')[1]['mIoU'] <= 100
    assert 'bfloat16 on CPU' in segmentor
    state = read_checkpoint(str(folder / 'segmentor' / 'iter_4.pth'))['state_dict']
    assert {value.dtype for value in state.values()} == {torch.float32, torch.int64}


def test_test_segmentor_with_tta(folder, segmentor):
    command = [TOOLS / 'test.py', SEGMENTOR, 'segmentor/iter_4.pth', '--tta']
    options = ['--work-dir', 'tested_seg', '--out', 'label_maps', '--show-dir', 'seg_pictures']
    run_tool([*command, *options], folder)

    metrics = json.loads(next((folder / 'tested_seg').glob('*/*.json')).read_text())
    assert 0 <= metrics['mIoU'] <= 100
    maps = sorted((folder / 'label_maps').iterdir())
    assert [path.name for path in maps] == [f'{i:06d}.png' for i in range(1, NUM_VAL + 1)]
    # Labels as in the data set's files: 1 to 5, none of them reduced.
    labels = np.stack([cv2.imread(str(path), cv2.IMREAD_UNCHANGED) for path in maps])
    assert labels.shape == (NUM_VAL, 64, 64)
    assert labels.min() >= 1
    assert labels.max() <= 5
    assert len(list((folder / 'seg_pictures').rglob('*.png'))) == NUM_VAL


def test_tta_of_boxes(folder):
    cfg = Config.fromfile(BOX_DETECTOR)
    init_default_scope(cfg.default_scope)
    torch.save(dict(state_dict=MODELS.build(cfg.model).state_dict()), folder / 'retinanet.pth')
    command = [TOOLS / 'test.py', BOX_DETECTOR, 'retinanet.pth', '--tta']
    run_tool([*command, '--out', 'boxes.pkl'], folder)

    results = mmengine.load(folder / 'boxes.pkl')
    assert len(results) == NUM_VAL
    for result in results:
        boxes = result['pred_instances']['bboxes']
        assert 0 < len(boxes) <= 100
        assert boxes.min() >= 0
        assert boxes.max() <= 64


def test_another_runner_trains(folder):
    """test_weights.py and test_interruptions.py have the train.py of mmdet and mmseg."""
    options = ['--cfg-options', 'runner_type=FlexibleRunner']
    run_tool([TOOLS / 'train.py', SEGMENTOR, '--work-dir', 'flexible', *options], folder)

    assert 'mIoU' in trained(folder / 'flexible')[1]


def test_what_slurm_is_given(tmp_path, environment):
    """By an srun that writes its arguments to a file."""
    srun = tmp_path / 'srun'
    srun.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" > "{tmp_path}/arguments"\n')
    srun.chmod(0o755)
    for name in ('c.py', 'c.pth'):
        (tmp_path / name).touch()
    path = os.pathsep.join([str(tmp_path), environment['PATH']])
    environment = {**environment, 'PATH': path, 'GPUS': '4'}
    environment['SRUN_ARGS'] = '--qos=high --time=1:00'
    options = ['--resume', '--cfg-options', 'a.b=[1, 2]']
    command = [TOOLS / 'slurm_train.sh', 'gpu', 'a job', 'c.py', 'work dir', *options]
    run(command, tmp_path, environment)
    srun = '--partition=gpu --job-name=a job --gres=gpu:4 --ntasks=4 --ntasks-per-node=4'
    srun += ' --cpus-per-task=5 --kill-on-bad-exit=1 --qos=high --time=1:00 python -u'
    train = [str(TOOLS / 'train.py'), 'c.py', '--work-dir', 'work dir', '--launcher', 'slurm']
    arguments = (tmp_path / 'arguments').read_text().splitlines()
    assert ' '.join(arguments[:11]) == srun
    assert arguments[11:] == [*train, *options]

    environment.update(GPUS='16')
    run([TOOLS / 'slurm_test.sh', 'gpu', 'job', 'c.py', 'c.pth', '--tta'], tmp_path, environment)

    arguments = (tmp_path / 'arguments').read_text().splitlines()
    assert '--ntasks=16' in arguments
    assert '--gres=gpu:8' in arguments
    tail = ['c.py', 'c.pth', '--launcher', 'slurm', '--tta']
    assert arguments[-8:] == ['python', '-u', str(TOOLS / 'test.py'), *tail]


@pytest.fixture
def shapes(call, folder, monkeypatch):
    """Call a tool in this process where the data are."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv('SHAPES_ROOT', str(folder / 'shapes'))
    return call


def test_checkpoint_of_another_model(shapes, folder, detector, segmentor):
    for tool, words in (('test.py', []), ('train.py', ['--work-dir', 'failed', '--resume'])):
        said, _ = shapes(f'tools/{tool}', DETECTOR, *words, 'segmentor/iter_4.pth')
        assert 'segmentor/iter_4.pth does not fit the model' in said
        assert 'unexpected key' in said
        assert 'missing key' in said

    weights = read_checkpoint(str(folder / 'detector' / 'epoch_1.pth'))['state_dict']
    weights['roi_head.bbox_head.fc_cls.bias'] = torch.zeros(9)
    torch.save(dict(state_dict=weights), folder / 'other_classes.pth')
    said, _ = shapes('tools/test.py', DETECTOR, 'other_classes.pth')
    assert 'size mismatch for roi_head.bbox_head.fc_cls.bias' in said


def test_checkpoints_that_are_refused(folder, segmentor, shapes):
    """By the tools of mmdet, as they are; test_hostile_commands.py has ours."""
    torch.save(dict(state_dict={}, extra=Payload(folder / 'touched')), folder / 'code.pth')
    code, other = 'code.pth holds pickled Python', 'segmentor/iter_4.pth does not fit the model'
    for tool, words, said in (
        ('test.py', ['code.pth'], code),
        ('train.py', ['--resume', 'code.pth'], code),
        ('test.py', ['segmentor/iter_4.pth'], other),
    ):
        with pytest.raises(CheckpointError, match=f'^checkpoint {said}'):
            shapes(packaged('mmdet', tool), DETECTOR, *words, '--work-dir', 'failed')
    assert not (folder / 'touched').exists()
