# Copyright (c) mmscalablevit contributors. All rights reserved.
"""Several processes: they train as one, end together, and count images once."""

import contextlib
import json
import os
import re
import runpy
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import cv2
import mmengine
import numpy as np
import pytest
import torch
from doc_blocks import LOADERS
from jobs import ROOT, TESTS, draw_shapes, long, run, run_tool, scalars
from mmengine.config import Config
from test_config_models import build
from test_tools import SEGMENTOR, TOOLS

from mmscalablevit.checkpoint.reading import read_checkpoint
from mmscalablevit.errors import UserError

NUM_TRAIN, NUM_VAL = 16, 5
# The demo's configs, flips of images included, without what the number of processes may change:
# dropout, random samples of boxes, and BN, whose statistics are of one process.
COMMON = """
custom_imports = dict(imports=['mmscalablevit', 'rank_hooks'], allow_failed_imports=False)
custom_hooks = [dict(type='RecordLosses')]
data_root = '{data}/'
loader = dict(num_workers=0, persistent_workers=False)
train_dataloader = dict(batch_size=4, dataset=dict(data_root=data_root), **loader)
val_dataloader = dict(batch_size=2, dataset=dict(data_root=data_root), **loader)
test_dataloader = val_dataloader
param_scheduler = [dict(type='ConstantLR', factor=1.0)]
train_cfg = dict(max_iters=10, val_interval=10)
default_hooks = dict(logger=dict(interval=1), checkpoint=dict(interval=10))
"""
SEGMENTOR_CONFIG = """
_base_ = '{demo}/scalablevit-demo_upernet_shapes-128x128.py'
norm_cfg = dict(type='GN', num_groups=4)
model = dict(
    data_preprocessor=dict(size=(64, 64)),
    decode_head=dict(norm_cfg=norm_cfg, dropout_ratio=0.0),
    auxiliary_head=dict(norm_cfg=norm_cfg, dropout_ratio=0.0),
)
"""
DETECTOR_BASE = "_base_ = '{demo}/mask-rcnn_scalablevit-demo_fpn_shapes.py'"
# Each image gives the same number of samples, and of positive ones, as the losses are means over
# the samples of one process.
DETECTOR_CONFIG = """
model = dict(
    train_cfg=dict(
        rpn=dict(sampler=dict(type='FirstSampler')),
        rcnn=dict(sampler=dict(type='FirstSampler', num=32, pos_fraction=1 / 16)),
    ),
)
"""
# Adam would hide gradients of another scale, as would their clipping, and gives noise instead of
# zero gradients, such as those of a key's bias, the full learning rate.
SGD = """
optim_wrapper = dict(
    _delete_=True, type='OptimWrapper', optimizer=dict(type='SGD', lr=0.01, momentum=0.9))
"""
TEST_IMAGES = """
train_dataloader['dataset'].update(
    ann_file='annotations/instances_validation.json', data_prefix=dict(img='images/validation/'))
"""
COCO = """
pipeline = _base_.test_pipeline
pipeline[1].scale = (64, 64)
val_dataloader['dataset'].update(pipeline=pipeline)
val_evaluator = dict(ann_file=data_root + 'annotations/instances_validation.json')
test_evaluator = val_evaluator
"""
CONFIG_TEXTS = {
    'segmentor_sgd.py': SEGMENTOR_CONFIG + COMMON + SGD,
    'segmentor_adamw.py': SEGMENTOR_CONFIG + COMMON,
    'detector_sgd.py': DETECTOR_BASE + DETECTOR_CONFIG + COMMON + SGD + COCO,
    # Trained on the images that it is tested on, for an AP that is not zero.
    'learned.py': DETECTOR_BASE + COMMON + COCO + TEST_IMAGES,
}


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """A folder to work in: the data set, with an odd number of images to test on, and configs."""
    folder = tmp_path_factory.mktemp('work')
    draw_shapes(folder / 'shapes', NUM_TRAIN, NUM_VAL)
    for name, text in CONFIG_TEXTS.items():
        places = dict(demo=ROOT / 'configs' / 'demo', data=folder / 'shapes')
        (folder / name).write_text(text.format(**places))
    return folder


def free_port():
    # Each process has ports of its own, below those that the system gives to connections.
    first = 20000 + os.getpid() % 1000 * 10
    for port in range(first, first + 10):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(('127.0.0.1', port))
            return str(port)
    raise OSError(f'no free port among {first} to {first + 9}')


def by_two(script, folder, environment, *arguments):
    # The scripts themselves say where the package is.
    environment = {**environment, 'PORT': free_port(), 'PYTHONPATH': str(TESTS)}
    return run([TOOLS / script, *arguments], folder, environment)


def losses_by_iteration(work_dir):
    """Images of each iteration, and its losses averaged over the ranks."""
    steps = {}
    for path in work_dir.glob('rank*.jsonl'):
        for line in map(json.loads, path.read_text().splitlines()):
            images, losses = steps.setdefault(line['iter'], ([], {}))
            images.extend(line['images'])
            for key, value in line['losses'].items():
                losses.setdefault(key, []).append(value)
    return [
        (sorted(images), {key: np.mean(values) for key, values in losses.items()})
        for _, (images, losses) in sorted(steps.items())
    ]


def weight_difference(one, two):
    """Greatest relative difference of a parameter in the last checkpoints of two trainings."""
    states = [
        read_checkpoint((work_dir / 'last_checkpoint').read_text())['state_dict']
        for work_dir in (one, two)
    ]
    return max(
        ((states[1][key] - value).norm() / value.norm().clamp(min=1e-3)).item()
        for key, value in states[0].items()
    )


def evaluate_by_one_and_two(config, checkpoint, out, folder, environment, *options):
    """Test with one process and with two; their metrics, and where their predictions are."""
    name = f'{Path(config).stem} {checkpoint.parent.name}'
    metrics, outs = [], []
    for number in ('one', 'two'):
        work_dir = f'{name} tested by {number}'
        outs.append(folder / f'{work_dir}{out}')
        arguments = ['--work-dir', work_dir, '--out', outs[-1], *options]
        if number == 'one':
            run_tool([TOOLS / 'test.py', config, checkpoint, *arguments], folder)
        else:
            by_two('dist_test.sh', folder, environment, config, checkpoint, 2, *arguments)
        metrics.append(json.loads(max((folder / work_dir).glob('*/*.json')).read_text()))
    return metrics, outs


@pytest.mark.parametrize(
    'config', ['segmentor_sgd.py', *map(long, ('segmentor_adamw.py', 'detector_sgd.py'))]
)
def test_two_processes_train_as_one(config, folder, environment):
    one, two = folder / f'{config} by one', folder / f'{config} by two'
    run_tool([TOOLS / 'train.py', config, '--work-dir', one], folder)
    half = ['--cfg-options', 'train_dataloader.batch_size=2']
    output = by_two('dist_train.sh', folder, environment, config, 2, '--work-dir', two, *half)
    assert len(list(two.glob('rank*.jsonl'))) == 2
    # Else they abort a process now and then, after all is done.
    assert output.count('gloo has 0 threads at the end') == 2

    losses = []
    steps = list(zip(losses_by_iteration(one), losses_by_iteration(two), strict=True))
    for (images, alone), (shared, together) in steps:
        assert images == shared
        assert alone.keys() == together.keys()
        # An accuracy is a count, and a nearly even choice may fall otherwise.
        losses += [abs(together[key] / alone[key] - 1) for key in alone if 'loss' in key]
    loss, weight = max(losses), weight_difference(one, two)
    print(f'{config}: losses within {loss:.1e}, weights within {weight:.1e}')
    assert len(steps) == 10
    assert loss < 1e-4
    assert weight < 1e-3 or 'adamw' in config


@pytest.fixture(scope='module')
def weights(folder):
    """Random ones, as those of a short training find background alone."""
    (folder / 'random').mkdir()
    weights = build(Config.fromfile(folder / 'segmentor_sgd.py')).state_dict()
    torch.save(dict(state_dict=weights), folder / 'random' / 'weights.pth')
    return folder / 'random' / 'weights.pth'


def test_two_processes_count_every_image_once(weights, folder, environment):
    arguments = 'segmentor_sgd.py', weights, ' maps', folder, environment
    (alone, together), outs = evaluate_by_one_and_two(*arguments)
    for key in ('aAcc', 'mIoU', 'mAcc'):
        assert alone[key] > 0
        assert together[key] == pytest.approx(alone[key], abs=0.02)
    maps = [{path.name: cv2.imread(str(path), 0) for path in out.iterdir()} for out in outs]
    assert maps[0].keys() == maps[1].keys()
    assert len(maps[0]) == NUM_VAL
    for name, labels in maps[0].items():
        assert len(np.unique(labels)) > 1
        assert (labels != maps[1][name]).mean() < 1e-3
    print(f'{NUM_VAL} images: mIoU {alone["mIoU"]:.2f} by one, {together["mIoU"]:.2f} by two')


@pytest.fixture(scope='module')
def learned(folder):
    options = ['--cfg-options', 'train_cfg.max_iters=150', 'train_cfg.val_interval=150']
    options.append('default_hooks.checkpoint.interval=150')
    run_tool([TOOLS / 'train.py', 'learned.py', '--work-dir', 'learned', *options], folder)
    return folder / 'learned' / 'iter_150.pth'


@pytest.mark.long
@pytest.mark.parametrize('batch_size', [1, 2])
def test_two_processes_count_every_detection_once(batch_size, learned, folder, environment):
    options = ['--cfg-options', f'test_dataloader.batch_size={batch_size}']
    arguments = 'learned.py', learned, f' {batch_size}.pkl', folder, environment, *options
    (alone, together), files = evaluate_by_one_and_two(*arguments)
    keys = [key for key in alone if key.startswith('coco/')]
    assert len(keys) == 12
    for key in keys:
        assert together[key] == alone[key], key
    for key in ('coco/bbox_mAP', 'coco/segm_mAP'):
        assert alone[key] > 0.05
        print(f'{NUM_VAL} images in batches of {batch_size}: {key} {alone[key]} {together[key]}')

    results = [mmengine.load(file) for file in files]
    assert [len(result) for result in results] == [NUM_VAL, NUM_VAL]
    for one, two in zip(*results, strict=True):
        assert one['img_path'] == two['img_path']
        first, second = one['pred_instances'], two['pred_instances']
        assert len(first['scores']) > 0
        for key in ('bboxes', 'scores', 'labels'):
            torch.testing.assert_close(first[key], second[key], rtol=1e-4, atol=1e-4)


@pytest.mark.long
def test_validation_of_two_processes_is_that_of_their_checkpoint(folder, environment):
    # With BN, of which each process has statistics of its own.
    by_two('dist_train.sh', folder, environment, SEGMENTOR, 2, '--work-dir', 'normed')
    arguments = SEGMENTOR, folder / 'normed' / 'iter_4.pth', ' maps', folder, environment
    (tested, _), _ = evaluate_by_one_and_two(*arguments)
    validated = scalars(folder / 'normed')[1][-1]
    print({key: (validated[key], tested[key]) for key in ('aAcc', 'mIoU', 'mAcc')})
    for key in ('aAcc', 'mIoU', 'mAcc'):
        assert validated[key] == tested[key]


def test_pictures_of_one_process_only(monkeypatch):
    tool = runpy.run_path(str(TOOLS / 'test.py'))
    monkeypatch.setenv('WORLD_SIZE', '2')
    with pytest.raises(UserError, match='--show-dir draws the images of one process only'):
        tool['set_show_dir'](Config(dict(launcher='pytorch')), 'pictures')


class Job:
    """A launcher's processes, of which the last has ended when nobody holds their output."""

    def __init__(self, command, folder, environment):
        self.process = subprocess.Popen(
            [str(part) for part in command],
            cwd=folder,
            env={**environment, 'PORT': free_port()},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.output = ''
        self.reader = threading.Thread(target=self._read)
        self.reader.start()

    def _read(self):
        for line in self.process.stdout:
            self.output += line

    def wait_until(self, condition, seconds):
        """Wait in steps, whose number does not grow where this process itself is stopped."""
        for step in range(seconds * 10):
            if condition():
                return step / 10
            time.sleep(0.1)
        # torchrun ends its workers where it is asked to.
        self.process.terminate()
        raise AssertionError(f'still running after {seconds} s: {self.output[-4000:]}')

    def ended(self):
        return not self.reader.is_alive() and self.process.poll() is not None


def end_one_rank(folder, environment, rank, stage, *checkpoint, raises=False):
    """Start two processes of which a hook ends one; the job, and how long the other lived on."""
    work_dir = folder / f'rank {rank} ends in {stage}{raises}'
    hook = dict(type='EndRank', rank=rank, stage=stage, raises=raises)
    # With workers of the data loaders, which must end, too.
    workers = [option.replace('=0', '=1').replace('False', 'True') for option in LOADERS]
    options = ['--work-dir', work_dir, '--cfg-options', *workers, 'train_cfg.val_interval=5']
    options += [f'custom_hooks.0.{key}={value}' for key, value in hook.items()]
    script = TOOLS / ('dist_test.sh' if checkpoint else 'dist_train.sh')
    job = Job([script, 'segmentor_sgd.py', *checkpoint, 2, *options], folder, environment)
    job.wait_until(lambda: (work_dir / 'ended').exists() or job.ended(), 600)
    seconds = job.wait_until(job.ended, 60)

    assert (work_dir / 'ended').exists(), job.output[-4000:]
    assert job.process.returncode == 1
    return job.output, seconds


@pytest.mark.parametrize(
    ('rank', 'stage'),
    [
        (1, 'train'),
        *(long(0, stage) for stage in ('train', 'val', 'test')),
        *(long(1, stage) for stage in ('val', 'test')),
    ],
)
def test_a_killed_rank_ends_the_job(rank, stage, folder, environment, weights):
    checkpoint = [weights] if stage == 'test' else []
    output, seconds = end_one_rank(folder, environment, rank, stage, *checkpoint)
    assert 'Signal 9 (SIGKILL) received' in output
    print(f'rank {rank} killed in {stage}: all processes ended after {seconds} s')


def test_a_failing_rank_ends_the_job_with_its_error(folder, environment):
    output, _ = end_one_rank(folder, environment, 1, 'train', raises=True)

    # Its own code, where threads of gloo would abort it.
    own = r'rank +: 1 \(local_rank: 1\)\s+exitcode +: 1 '
    assert re.search(own, output), output[-4000:]
    assert 'ZeroDivisionError: of rank 1' in output
    assert 'fails in train, iteration 2)' in output or sys.version_info < (3, 11)
