# Copyright (c) mmscalablevit contributors. All rights reserved.
"""The tools as a user calls them: mostly as processes of their own, on drawn shapes."""

import json
import os
import pickle
import runpy
import shutil
import sys
from pathlib import Path

import cv2
import mmengine
import numpy as np
import pytest
import torch
from jobs import ROOT, draw_shapes, job_environment, packaged, run, run_tool, scalars
from mmengine.config import Config

from mmscalablevit.errors import CheckpointError

TOOLS = ROOT / 'tools'
DETECTOR = ROOT / 'tests' / 'data' / 'tiny_mask-rcnn.py'
BOX_DETECTOR = ROOT / 'tests' / 'data' / 'tiny_retinanet.py'
SEGMENTOR = ROOT / 'tests' / 'data' / 'tiny_upernet.py'
NUM_TRAIN, NUM_VAL = 8, 4


@pytest.fixture(scope='module')
def room(tmp_path_factory):
    """A folder to work in that holds the data set."""
    folder = tmp_path_factory.mktemp('room')
    draw_shapes(folder / 'shapes', NUM_TRAIN, NUM_VAL)
    return folder


@pytest.fixture(scope='module')
def environment(room):
    return job_environment(room)


@pytest.fixture(scope='module')
def detector(room, environment):
    """The log of one epoch's training of a detector, four iterations."""
    command = [sys.executable, TOOLS / 'train.py', DETECTOR, '--work-dir', 'detector']
    return run([*command, '--auto-scale-lr'], room, environment)


@pytest.fixture(scope='module')
def segmentor(room, environment):
    command = [sys.executable, TOOLS / 'train.py', SEGMENTOR, '--work-dir', 'segmentor', '--amp']
    return run(command, room, environment)


def test_train_detector(room, detector):
    steps, validations = scalars(room / 'detector')

    assert [step['step'] for step in steps] == [1, 2, 3, 4]
    assert all(np.isfinite(step['loss']) and step['loss'] > 0 for step in steps)
    # Two images an iteration where the recipe has 16; the warm-up starts at a thousandth.
    assert steps[0]['lr'] == pytest.approx(1e-4 * 2 / 16 * 0.001)
    boxes = {f'coco/bbox_mAP{suffix}' for suffix in ('', '_50', '_75', '_s', '_m', '_l')}
    assert boxes | {key.replace('bbox', 'segm') for key in boxes} <= validations[-1].keys()
    assert (room / 'detector' / 'epoch_1.pth').is_file()


def test_resume_continues(room, detector):
    shutil.copytree(room / 'detector', room / 'resumed')
    (room / 'resumed' / 'last_checkpoint').write_text(str(room / 'resumed' / 'epoch_1.pth'))
    command = [TOOLS / 'train.py', DETECTOR, '--work-dir', 'resumed', '--resume']
    run_tool([*command, '--cfg-options', 'train_cfg.max_epochs=2'], room)

    first = torch.load(room / 'resumed' / 'epoch_1.pth', weights_only=False)
    second = torch.load(room / 'resumed' / 'epoch_2.pth', weights_only=False)
    assert (first['meta']['epoch'], first['meta']['iter']) == (1, 4)
    assert (second['meta']['epoch'], second['meta']['iter']) == (2, 8)
    assert {float(state['step']) for state in second['optimizer']['state'].values()} == {8}
    steps, _ = scalars(room / 'resumed')
    assert [step['step'] for step in steps] == [5, 6, 7, 8]
    # The warm-up goes on where it was, from the learning rate that was scaled once.
    rates = 1e-4 * np.linspace(0.001, 1, 1000)[4:8]
    assert [step['lr'] for step in steps] == pytest.approx(list(rates * 2 / 16))


def test_test_detector(room, detector):
    command = [TOOLS / 'test.py', DETECTOR, 'detector/epoch_1.pth']
    options = ['--work-dir', 'tested', '--out', 'results/detections.pkl', '--show-dir', 'pictures']
    output = run_tool([*command, *options], room)

    metrics = json.loads(next((room / 'tested').glob('*/*.json')).read_text())
    validated = scalars(room / 'detector')[1][-1]
    for key, value in metrics.items():
        if key.startswith('coco/'):
            assert validated[key] == pytest.approx(value)
    results = mmengine.load(room / 'results' / 'detections.pkl')
    assert len(results) == NUM_VAL
    assert {'bboxes', 'scores', 'labels', 'masks'} <= results[0]['pred_instances'].keys()
    pictures = sorted(path.name for path in (room / 'pictures').iterdir())
    assert pictures == [f'{i:06d}.jpg' for i in range(1, NUM_VAL + 1)]
    assert 'wrote results/detections.pkl' in output
    assert 'wrote pictures' in output


def test_train_segmentor_with_amp(room, segmentor):
    steps, validations = scalars(room / 'segmentor')

    assert [step['step'] for step in steps] == [1, 2, 3, 4]
    assert all(np.isfinite(step['loss']) and step['loss'] > 0 for step in steps)
    assert 0 <= validations[-1]['mIoU'] <= 100
    assert 'bfloat16 on CPU' in segmentor
    state = torch.load(room / 'segmentor' / 'iter_4.pth', weights_only=False)['state_dict']
    assert {value.dtype for value in state.values()} == {torch.float32, torch.int64}


def test_test_segmentor_with_tta(room, segmentor):
    command = [TOOLS / 'test.py', SEGMENTOR, 'segmentor/iter_4.pth', '--tta']
    options = ['--work-dir', 'tested_seg', '--out', 'label_maps', '--show-dir', 'seg_pictures']
    run_tool([*command, *options], room)

    metrics = json.loads(next((room / 'tested_seg').glob('*/*.json')).read_text())
    assert 0 <= metrics['mIoU'] <= 100
    maps = sorted((room / 'label_maps').iterdir())
    assert [path.name for path in maps] == [f'{i:06d}.png' for i in range(1, NUM_VAL + 1)]
    # Labels as in the data set's files: 1 to 5, none of them reduced.
    labels = np.stack([cv2.imread(str(path), cv2.IMREAD_UNCHANGED) for path in maps])
    assert labels.shape == (NUM_VAL, 64, 64)
    assert labels.min() >= 1
    assert labels.max() <= 5
    assert len(list((room / 'seg_pictures').rglob('*.png'))) == NUM_VAL


def test_tta_of_boxes(room):
    from mmengine.registry import MODELS, init_default_scope

    cfg = Config.fromfile(BOX_DETECTOR)
    init_default_scope(cfg.default_scope)
    torch.save(dict(state_dict=MODELS.build(cfg.model).state_dict()), room / 'retinanet.pth')
    command = [TOOLS / 'test.py', BOX_DETECTOR, 'retinanet.pth', '--tta']
    run_tool([*command, '--out', 'boxes.pkl'], room)

    results = mmengine.load(room / 'boxes.pkl')
    assert len(results) == NUM_VAL
    for result in results:
        boxes = result['pred_instances']['bboxes']
        assert 0 < len(boxes) <= 100
        assert boxes.min() >= 0
        assert boxes.max() <= 64


@pytest.mark.parametrize(
    ('toolbox', 'config', 'options'),
    [
        ('mmdet', DETECTOR, []),
        ('mmseg', SEGMENTOR, []),
        (None, SEGMENTOR, ['--cfg-options', 'runner_type=FlexibleRunner']),
    ],
    ids=['mmdet', 'mmseg', 'FlexibleRunner'],
)
def test_other_tools_and_runners_train(toolbox, config, options, room):
    tool = packaged(toolbox, 'train.py') if toolbox else TOOLS / 'train.py'
    work_dir = f'trained by {toolbox}'
    run_tool([tool, config, '--work-dir', work_dir, *options], room)

    steps, validations = scalars(room / work_dir)
    assert [step['step'] for step in steps] == [1, 2, 3, 4]
    assert {'coco/bbox_mAP', 'mIoU'} & validations[-1].keys()


@pytest.fixture
def fake_srun(tmp_path, environment):
    """A PATH whose srun writes its arguments to a file."""
    srun = tmp_path / 'srun'
    srun.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" > "{tmp_path}/arguments"\n')
    srun.chmod(0o755)
    for name in ('c.py', 'c.pth'):
        (tmp_path / name).touch()
    path = os.pathsep.join([str(tmp_path), environment['PATH']])
    return tmp_path, {**environment, 'PATH': path}


def test_slurm_train(fake_srun):
    folder, environment = fake_srun
    environment.update(GPUS='4', SRUN_ARGS='--qos=high --time=1:00')
    options = ['--resume', '--cfg-options', 'a.b=[1, 2]']
    run(
        [TOOLS / 'slurm_train.sh', 'gpu', 'a job', 'c.py', 'work dir', *options],
        folder,
        environment,
    )

    assert (folder / 'arguments').read_text().splitlines() == [
        '--partition=gpu',
        '--job-name=a job',
        '--gres=gpu:4',
        '--ntasks=4',
        '--ntasks-per-node=4',
        '--cpus-per-task=5',
        '--kill-on-bad-exit=1',
        '--qos=high',
        '--time=1:00',
        'python',
        '-u',
        str(TOOLS / 'train.py'),
        'c.py',
        '--work-dir',
        'work dir',
        '--launcher',
        'slurm',
        *options,
    ]


def test_slurm_test(fake_srun):
    folder, environment = fake_srun
    environment.update(GPUS='16')
    run([TOOLS / 'slurm_test.sh', 'gpu', 'job', 'c.py', 'c.pth', '--tta'], folder, environment)

    arguments = (folder / 'arguments').read_text().splitlines()
    assert '--ntasks=16' in arguments
    assert '--gres=gpu:8' in arguments
    tail = ['c.py', 'c.pth', '--launcher', 'slurm', '--tta']
    assert arguments[-8:] == ['python', '-u', str(TOOLS / 'test.py'), *tail]


def test_user_error_is_one_sentence(room, environment):
    command = [sys.executable, TOOLS / 'train.py', 'no/such.py']
    output = run(command, room, environment, expect=1)

    assert output == 'error: config no/such.py does not exist\n'


@pytest.fixture
def fails(room, environment, monkeypatch):
    """Call a tool in this process and return the sentence that it ends with."""
    monkeypatch.chdir(room)
    monkeypatch.setenv('SHAPES_ROOT', environment['SHAPES_ROOT'])

    def call(tool, *arguments):
        command = [str(TOOLS / tool), *(str(argument) for argument in arguments)]
        monkeypatch.setattr(sys, 'argv', command)
        with pytest.raises(SystemExit) as exit_info:
            runpy.run_path(command[0], run_name='__main__')
        assert isinstance(exit_info.value.code, str)
        assert '\n' not in exit_info.value.code
        return exit_info.value.code

    return call


@pytest.mark.parametrize(
    ('options', 'sentence'),
    [
        (['modle.type=RetinaNet'], "nothing reads the key 'modle'"),
        (['data_root=elsewhere'], "nothing reads the key 'data_root'"),
        (['model.type=NoSuchModel'], 'NoSuchModel is not in the'),
        (['model.backbone.archh=small'], "unexpected keyword argument 'archh'"),
        (['model.backbone.arch=huge'], 'arch must be a dict or one of'),
        (['train_cfg.max_iters=3'], "unexpected keyword argument 'max_iters'"),
        (
            ['train_dataloader.dataset.data_root=no/such'],
            'train_dataloader: no/such does not exist',
        ),
        (
            ['val_dataloader.dataset.data_prefix.img=no_images'],
            'val_dataloader: {shapes}/no_images does not exist',
        ),
        (
            ['train_dataloader.dataset.ann_file=annotations/none.json'],
            'train_dataloader: {shapes}/annotations/none.json does not exist',
        ),
        (['val_evaluator.ann_file=no/such.json'], "No such file or directory: 'no/such.json'"),
    ],
    ids=lambda value: value[0].split('=')[0] if isinstance(value, list) else '',
)
def test_wrong_options(fails, room, options, sentence):
    said = fails('train.py', DETECTOR, '--work-dir', 'failed', '--cfg-options', *options)

    assert sentence.format(shapes=room / 'shapes') in said


def test_broken_config(fails, room):
    (room / 'broken.py').write_text('model = dict(\n')
    assert 'config broken.py cannot be read' in fails('train.py', 'broken.py')
    (room / 'orphan.py').write_text("_base_ = 'nowhere.py'\n")
    assert 'nowhere.py' in fails('train.py', 'orphan.py')


def test_train_flags_that_do_not_fit(fails):
    assert 'checkpoint no.pth does not exist' in fails('train.py', DETECTOR, '--resume', 'no.pth')
    assert '--auto-scale-lr needs auto_scale_lr.base_batch_size' in fails(
        'train.py', DETECTOR, '--auto-scale-lr', '--cfg-options', 'auto_scale_lr=None'
    )
    assert '--amp needs optim_wrapper.type=OptimWrapper, got Other' in fails(
        'train.py', DETECTOR, '--amp', '--cfg-options', 'optim_wrapper.type=Other'
    )


def test_test_flags_that_do_not_fit(fails, room):
    (room / 'any.pth').touch()
    assert 'checkpoint no.pth does not exist' in fails('test.py', DETECTOR, 'no.pth')
    assert '--out must end in .pkl for mmdet, got folder' in fails(
        'test.py', DETECTOR, 'any.pth', '--out', 'folder'
    )
    assert '--out must be a folder for mmseg, got file.pkl' in fails(
        'test.py', SEGMENTOR, 'any.pth', '--out', 'file.pkl'
    )
    assert '--tta needs tta_model' in fails('test.py', DETECTOR, 'any.pth', '--tta')


def test_a_missing_image_is_named(fails, room):
    shutil.copytree(room / 'shapes', room / 'holed')
    (room / 'holed' / 'images' / 'training' / '000003.jpg').unlink()
    options = ['train_dataloader.dataset.data_root=holed', 'train_dataloader.num_workers=1']
    said = fails('train.py', DETECTOR, '--work-dir', 'failed', '--cfg-options', *options)

    assert 'holed/images/training/000003.jpg' in said


def test_checkpoint_of_another_model(fails, room, detector, segmentor, monkeypatch):
    said = fails('test.py', DETECTOR, 'segmentor/iter_4.pth', '--work-dir', 'failed')
    assert 'segmentor/iter_4.pth does not fit the model' in said
    assert 'unexpected key' in said
    assert 'missing key' in said
    said = fails('train.py', DETECTOR, '--resume', 'segmentor/iter_4.pth', '--work-dir', 'failed')
    assert 'segmentor/iter_4.pth does not fit the model' in said
    command = [str(packaged('mmdet', 'test.py')), str(DETECTOR), 'segmentor/iter_4.pth']
    monkeypatch.setattr(sys, 'argv', [*command, '--work-dir', 'failed'])
    with pytest.raises(CheckpointError, match=r'segmentor/iter_4\.pth does not fit the model'):
        runpy.run_path(command[0], run_name='__main__')

    checkpoint = torch.load(room / 'detector' / 'epoch_1.pth', weights_only=False)
    weights = checkpoint['state_dict']
    weights['roi_head.bbox_head.fc_cls.bias'] = torch.zeros(9)
    torch.save(dict(state_dict=weights), room / 'other_classes.pth')
    said = fails('test.py', DETECTOR, 'other_classes.pth', '--work-dir', 'failed')
    assert 'size mismatch for roi_head.bbox_head.fc_cls.bias' in said


class Payload:
    """Writes a file where it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (Path(self.path),)


def test_checkpoints_that_are_refused(fails, room, detector, monkeypatch):
    whole = (room / 'detector' / 'epoch_1.pth').read_bytes()
    (room / 'truncated.pth').write_bytes(whole[: len(whole) // 2])
    (room / 'empty.pth').touch()
    torch.save(torch.zeros(2), room / 'tensor.pth')
    torch.save(dict(state_dict={}, extra=Payload(room / 'touched')), room / 'code.pth')
    with open(room / 'pickle.pth', 'wb') as file:
        pickle.dump(Payload(room / 'touched'), file)
    # getattr is a way to any code, and mmengine's own checkpoints need it.
    attribute = dict(state_dict={}, extra=GetAttribute())
    torch.save(attribute, room / 'getattr.pth')

    reasons = dict(
        truncated='is damaged or no checkpoint',
        empty='is damaged or no checkpoint',
        tensor='holds a Tensor',
        code='holds pickled Python code',
        pickle='',
        getattr='holds pickled Python code',
    )
    for name, reason in reasons.items():
        said = fails('test.py', DETECTOR, f'{name}.pth', '--work-dir', 'failed')
        assert said.startswith(f'error: checkpoint {name}.pth {reason}')
    # The tools of mmdet, as they are, refuse the same.
    for tool, options in (('test.py', ['code.pth']), ('train.py', ['--resume', 'code.pth'])):
        command = [str(packaged('mmdet', tool)), str(DETECTOR), *options, '--work-dir', 'failed']
        monkeypatch.setattr(sys, 'argv', command)
        with pytest.raises(CheckpointError, match=r'^checkpoint code\.pth holds pickled Python'):
            runpy.run_path(command[0], run_name='__main__')
    assert not (room / 'touched').exists()


class GetAttribute:
    """Unpickles as getattr(HistoryBuffer, '__init__')."""

    def __reduce__(self):
        from mmengine.logging import HistoryBuffer

        return getattr, (HistoryBuffer, '__init__')
