# Copyright (c) mmscalablevit contributors. All rights reserved.
"""Trainings that are killed, or that the disk fails, and what is left of them."""

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import jobs
import pytest
import torch
from doc_blocks import LOADERS
from jobs import ROOT, fork_server, long, packaged, start_tool
from toy import toy_runner

from mmscalablevit.checkpoint.reading import read_checkpoint
from mmscalablevit.engine.runner import lock_work_dir
from mmscalablevit.work_dirs import find_checkpoint

TRAIN = ROOT / 'tools' / 'train.py'
DATA = ROOT / 'tests' / 'data'
MAX_ITERS = 24
# Stochastic depth, augmentation in two workers, and averaged weights: all of it must go on.
CONFIG = f"""
_base_ = '{DATA}/tiny_{{}}.py'
model = dict(backbone=dict(drop_path_rate=0.3))
train_dataloader = dict(num_workers=2, persistent_workers=True)
custom_hooks = [dict(type='EMAHook')]
default_hooks = dict(checkpoint=dict(max_keep_ckpts=1))
"""
SEGMENTOR = f"""
train_cfg = dict(max_iters={MAX_ITERS}, val_interval=12)
default_hooks['checkpoint']['interval'] = 5
"""
# Without a seed: the resumed job takes that of the checkpoint.
DETECTOR = f"""
train_cfg = dict(max_epochs={MAX_ITERS // 4}, val_interval=3)
randomness = dict(_delete_=True, seed=None)
"""


@pytest.fixture(scope='module')
def folder(folder):
    """With configs."""
    (folder / 'segmentor.py').write_text(CONFIG.format('upernet') + SEGMENTOR)
    (folder / 'detector.py').write_text(CONFIG.format('mask-rcnn') + DETECTOR)
    return folder


def start(name, work_dir, *options, tool=TRAIN):
    command = [tool, f'{name}.py', '--work-dir', work_dir, '--resume', *options]
    return start_tool(command, work_dir.parent, f'{work_dir}.txt')


def finish(job, work_dir, expect=0):
    """What a job and those before it in its work directory said, once it ends."""
    code = jobs.finish(job)
    output = Path(f'{work_dir}.txt').read_text()
    assert code == expect, output[-4000:]
    return output


def train(name, work_dir, *options, tool=TRAIN, expect=0):
    return finish(start(name, work_dir, *options, tool=tool), work_dir, expect)


def kill(job, work_dir, iteration, delay):
    """Kill a job with its workers some time after an iteration."""
    reached = 0
    while reached < iteration:
        assert job.is_alive(), 'the training ended before it was killed'
        logs = sorted(work_dir.glob('*/vis_data/scalars.json'))
        lines = logs[-1].read_text().splitlines() if logs else []
        reached = max((json.loads(x)['step'] for x in lines if x.endswith('}')), default=0)
        time.sleep(0.02)
    time.sleep(delay)
    os.killpg(job.pid, signal.SIGKILL)
    assert jobs.finish(job) == -signal.SIGKILL


def assert_same_training(one, other):
    """Weights, averaged weights and state of the optimizer are equal bit by bit."""
    first, second = (read_checkpoint(str(file)) for file in (one, other))
    assert first['meta']['iter'] == second['meta']['iter'] == MAX_ITERS
    for key in ('state_dict', 'ema_state_dict'):
        torch.testing.assert_close(first[key], second[key], rtol=0, atol=0)
    states = [checkpoint['optimizer']['state'] for checkpoint in (first, second)]
    torch.testing.assert_close(*states, rtol=0, atol=0)
    assert first['param_schedulers'] == second['param_schedulers']


@pytest.mark.parametrize(
    ('name', 'toolbox', 'kills'),
    [('segmentor', 'mmseg', 1), long('segmentor', 'mmseg', 5), long('detector', 'mmdet', 5)],
)
def test_killed_training_ends_with_the_same_weights(name, toolbox, kills, folder):
    """By the tool of a toolbox; what never stopped is trained by ours."""
    seed = 3 if kills == 1 else random.randrange(1000)
    draw, tool = random.Random(seed), packaged(toolbox, 'train.py')
    work_dir = folder / f'{name}_killed_{kills}'
    for iteration in sorted(draw.sample(range(1, MAX_ITERS - 2), kills)):
        job = start(name, work_dir, tool=tool)
        kill(job, work_dir, iteration, delay=draw.uniform(0, 0.3))
    output = train(name, work_dir, tool=tool)
    last = Path((work_dir / 'last_checkpoint').read_text())

    whole = folder / f'{name}_whole_{kills}'
    of_killed = read_checkpoint(str(last))['meta']['seed']
    train(name, whole, '--cfg-options', f'randomness.seed={of_killed}')
    assert_same_training(last, whole / last.name)
    resumed = output.count('resumed epoch')
    assert resumed > 0
    assert 'Nothing is left to train' not in output
    print(f'{name}, kills of seed {seed}: {kills}, resumed from a checkpoint: {resumed} times')

    # Once more: it says that it is done. And it is not done while another works there.
    with lock_work_dir(work_dir):
        output = train(name, work_dir, expect=1)
    assert_one_sentence(output, str(work_dir), 'is in use by another training')
    assert f'is of iteration {MAX_ITERS} of {MAX_ITERS}' in train(name, work_dir)


def run_in_child(function, *args):
    """Call a function in a child process; its exit code."""
    child = fork_server().Process(target=function, args=args, daemon=True)
    child.start()
    child.join()
    return child.exitcode


def train_toy(work_dir, options):
    torch.set_num_threads(1)
    toy_runner(work_dir, **options).train()


def train_until_operation(number, work_dir, options):
    """Train, and be killed at one of the moments at which the content of the folder changes."""
    count = 0

    def watch(event, args):
        nonlocal count
        writes = event == 'open' and isinstance(args[1], str) and set(args[1]) & set('wax+')
        if not (writes or event in ('os.rename', 'os.remove')) or '/vis_data' in str(args[0]):
            return
        if str(work_dir) in str(args[0]) and not str(args[0]).endswith('.log'):
            count += 1
            if count == number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    train_toy(work_dir, options)


def iteration_to_resume(work_dir):
    """The iteration of the checkpoint that --resume would take."""
    found = find_checkpoint(str(work_dir))
    return read_checkpoint(found)['meta']['iter'] if found else 0


KEEP_ONE = {
    'train_cfg.max_iters': 8,
    'default_hooks.checkpoint.interval': 2,
    'default_hooks.checkpoint.max_keep_ckpts': 1,
}


def test_killed_between_any_two_steps_of_saving(tmp_path):
    killed, reached = 0, [0]
    while True:
        work_dir = tmp_path / str(killed)
        code = run_in_child(train_until_operation, killed + 1, work_dir, KEEP_ONE)
        if code == 0:
            break
        assert code == -signal.SIGKILL
        killed += 1
        reached.append(iteration_to_resume(work_dir))

    # No later kill leaves less than an earlier one: nothing is removed before its successor.
    assert reached == sorted(reached)
    assert set(reached) == {0, 2, 4, 6, 8}
    # Four checkpoints, each of them written, renamed and named, and three removals.
    assert killed >= 4 * 3 + 3


def train_until_half_a_checkpoint(work_dir, options):
    """Train, and be killed by the kernel where a file grows beyond a limit."""
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10**5, 10**5))
    train_toy(work_dir, options)


def test_killed_while_a_checkpoint_is_written(tmp_path):
    options = {**KEEP_ONE, 'width': 10**4}
    assert run_in_child(train_toy, tmp_path, options) == 0
    longer = {**options, 'train_cfg.max_iters': 10, 'resume': True}
    code = run_in_child(train_until_half_a_checkpoint, tmp_path, longer)
    assert code == -signal.SIGXFSZ
    assert [path.stat().st_size for path in tmp_path.glob('*.tmp')] == [10**5]
    assert iteration_to_resume(tmp_path) == 8
    # The next job goes on from there.
    assert run_in_child(train_toy, tmp_path, longer) == 0
    assert iteration_to_resume(tmp_path) == 10


def assert_one_sentence(output, *parts):
    last = output.strip().splitlines()[-1]
    assert last.startswith('error: ')
    for part in parts:
        assert part in last


@pytest.mark.long
def test_full_disk(folder):
    work_dir = folder / 'full'
    work_dir.mkdir()
    # The kernel's device that is always full, in the place of the second checkpoint.
    (work_dir / 'iter_10.pth.tmp').symlink_to('/dev/full')
    options = ['--cfg-options', 'train_cfg.max_iters=10']
    output = train('segmentor', work_dir, *options, expect=1)
    assert_one_sentence(output, str(work_dir / 'iter_10.pth'), 'No space left on device')
    assert iteration_to_resume(work_dir) == 5
    assert [path.name for path in work_dir.glob('*.pth*')] == ['iter_5.pth']
    train('segmentor', work_dir, *options)
    assert iteration_to_resume(work_dir) == 10


@pytest.mark.long
def test_read_only_work_dir(folder):
    work_dir = folder / 'read_only'
    work_dir.mkdir()
    if subprocess.run(['mount', '-t', 'tmpfs', '-o', 'ro', 'tmpfs', work_dir]).returncode:
        pytest.skip('only root may mount a file system')
    try:
        output = train('segmentor', work_dir, expect=1)
    finally:
        subprocess.run(['umount', work_dir], check=True)
    assert_one_sentence(output, str(work_dir), 'Read-only file system')


def test_interrupted_training_names_the_way_on(folder):
    work_dir = folder / 'interrupted'
    # Without workers of the data loader: one that hands over a tensor while its job ends would
    # show the traceback of a thread of Python's own.
    options = ['train_cfg.max_iters=1000', *LOADERS[:2]]
    job = start('segmentor', work_dir, '--cfg-options', *options)
    while not list(work_dir.glob('*/vis_data/scalars.json')):
        assert job.is_alive()
        time.sleep(0.05)
    os.kill(job.pid, signal.SIGINT)
    output = finish(job, work_dir, expect=-signal.SIGINT)
    assert 'Traceback' not in output
    last = output.strip().splitlines()[-1]
    assert last == f'interrupted; --resume continues from the last checkpoint in {work_dir}'
