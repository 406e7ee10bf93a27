# Copyright (c) mmscalablevit contributors. All rights reserved.
"""Trainings that are killed, or that the disk fails, and what is left of them."""

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import jobs
import numpy as np
import pytest
import torch
from doc_blocks import LOADERS
from jobs import ROOT, draw_shapes, fork_server, packaged, start_tool
from mmengine.config import Config
from mmengine.hooks import CheckpointHook, Hook
from mmengine.model import BaseModel
from mmengine.registry import DATASETS, HOOKS, MODELS
from mmengine.runner import loops
from torch import nn
from torch.utils.data import Dataset

from mmscalablevit import work_dirs
from mmscalablevit.checkpoint.reading import read_checkpoint
from mmscalablevit.engine.checkpoint_hook import AtomicLocalBackend
from mmscalablevit.engine.runner import SafeRunner, lock_work_dir
from mmscalablevit.errors import CheckpointError
from mmscalablevit.work_dirs import find_checkpoint

TRAIN = ROOT / 'tools' / 'train.py'
DATA = ROOT / 'tests' / 'data'
MAX_ITERS = 24
# Stochastic depth, augmentation in two workers, and averaged weights: all of it must go on.
CONFIG = """
_base_ = '{base}'
model = dict(backbone=dict(drop_path_rate=0.3))
train_dataloader = dict(num_workers=2, persistent_workers=True)
custom_hooks = [dict(type='EMAHook')]
"""
SEGMENTOR = (
    CONFIG.format(base=DATA / 'tiny_upernet.py')
    + f"""
train_cfg = dict(max_iters={MAX_ITERS}, val_interval=12)
default_hooks = dict(checkpoint=dict(interval=5, max_keep_ckpts=1))
"""
)
# Without a seed: the resumed job takes that of the checkpoint.
DETECTOR = (
    CONFIG.format(base=DATA / 'tiny_mask-rcnn.py')
    + f"""
train_cfg = dict(max_epochs={MAX_ITERS // 4}, val_interval=3)
default_hooks = dict(checkpoint=dict(max_keep_ckpts=1))
randomness = dict(_delete_=True, seed=None)
"""
)


@pytest.fixture(scope='module')
def room(tmp_path_factory):
    """A folder to work in that holds a data set and configs."""
    folder = tmp_path_factory.mktemp('room')
    draw_shapes(folder / 'shapes')
    (folder / 'segmentor.py').write_text(SEGMENTOR)
    (folder / 'detector.py').write_text(DETECTOR)
    return folder


def start(room, config, work_dir, *options, tool=TRAIN):
    command = [tool, config, '--work-dir', work_dir, '--resume', *options]
    return start_tool(command, room, room / f'{Path(work_dir).name}.txt')


def finish(job, room, work_dir, expect=0):
    """What a job and those before it in its work directory said, once it ends."""
    code = jobs.finish(job)
    output = (room / f'{Path(work_dir).name}.txt').read_text()
    assert code == expect, output[-4000:]
    return output


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
    first, second = (torch.load(file, weights_only=False) for file in (one, other))
    assert first['meta']['iter'] == second['meta']['iter'] == MAX_ITERS
    for key in ('state_dict', 'ema_state_dict'):
        assert first[key].keys() == second[key].keys()
        different = [x for x in first[key] if not torch.equal(first[key][x], second[key][x])]
        assert not different, f'{key}: {different}'
    moments = [checkpoint['optimizer']['state'] for checkpoint in (first, second)]
    for state, expected in zip(*(m.values() for m in moments), strict=True):
        assert all(torch.equal(state[x], expected[x]) for x in expected)
    assert first['param_schedulers'] == second['param_schedulers']


def survives(room, name, kills, seed, tool):
    """Kill trainings of a tool, and compare with one of ours that never stopped."""
    draw = random.Random(seed)
    work_dir = room / f'{name}_killed_{kills}'
    for iteration in sorted(draw.sample(range(1, MAX_ITERS - 2), kills)):
        job = start(room, f'{name}.py', work_dir, tool=tool)
        kill(job, work_dir, iteration, delay=draw.uniform(0, 0.3))
    output = finish(start(room, f'{name}.py', work_dir, tool=tool), room, work_dir)
    last = Path((work_dir / 'last_checkpoint').read_text())

    whole = room / f'{name}_whole_{kills}'
    of_killed = torch.load(last, weights_only=False)['meta']['seed']
    options = ['--cfg-options', f'randomness.seed={of_killed}']
    finish(start(room, f'{name}.py', whole, *options), room, whole)
    assert_same_training(last, whole / last.name)
    return work_dir, output


def test_killed_training_ends_with_the_same_weights(room):
    tool = packaged('mmseg', 'train.py')
    work_dir, output = survives(room, 'segmentor', kills=1, seed=3, tool=tool)

    assert 'resumed epoch' in output
    assert 'Nothing is left to train' not in output
    # Once more: it says that it is done. And it is not done while another works there.
    with lock_work_dir(work_dir):
        job = start(room, 'segmentor.py', work_dir)
        output = finish(job, room, work_dir, expect=1)
    assert_one_sentence(output, str(work_dir), 'is in use by another training')
    output = finish(start(room, 'segmentor.py', work_dir), room, work_dir)
    assert f'is of iteration {MAX_ITERS} of {MAX_ITERS}' in output


@pytest.mark.long
@pytest.mark.parametrize(('name', 'toolbox'), [('segmentor', 'mmseg'), ('detector', 'mmdet')])
def test_training_killed_five_times_ends_with_the_same_weights(name, toolbox, room):
    seed = random.randrange(1000)
    print(f'random moments of seed {seed}')
    tool = packaged(toolbox, 'train.py')
    _, output = survives(room, name, kills=5, seed=seed, tool=tool)

    resumed = output.count('resumed epoch')
    assert resumed > 0
    print(
        f'{name}: kills survived: 5, resumed from a checkpoint {resumed} times; weights, averaged '
        'weights and optimizer bit-equal to those of the uninterrupted run'
    )


@MODELS.register_module()
class _Toy(BaseModel):
    """A model that draws random numbers, too."""

    def __init__(self, width=4):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, width), nn.Dropout(0.5), nn.Linear(width, 1))

    def forward(self, inputs, mode='tensor'):
        return dict(loss=self.layers(inputs).square().mean())


@DATASETS.register_module()
class _Noise(Dataset):
    """Augmentation with every generator that transforms use, beside the number of the sample."""

    def __len__(self):
        return 10

    def __getitem__(self, index):
        assert type(index) is int
        noise = [index, random.random(), np.random.rand(), torch.rand(()).item()]
        return dict(inputs=torch.tensor(noise))


class Interrupted(Exception):
    pass


@HOOKS.register_module()
class _InterruptHook(Hook):
    def __init__(self, at):
        self.at = at

    def after_train_iter(self, runner, **kwargs):
        if runner.iter + 1 == self.at:
            raise Interrupted


def toy_runner(work_dir, sampler='InfiniteSampler', epochs=False, workers=0, at=0, **kwargs):
    loop = dict(by_epoch=True, max_epochs=3) if epochs else dict(by_epoch=False, max_iters=15)
    cfg = Config(
        dict(
            model=dict(type='_Toy', width=kwargs.pop('width', 4)),
            work_dir=str(work_dir),
            train_dataloader=dict(
                dataset=dict(type='_Noise'),
                sampler=dict(type=sampler, shuffle=True),
                batch_size=2,
                num_workers=workers,
                persistent_workers=workers > 0,
                collate_fn=dict(type='default_collate'),
            ),
            train_cfg=loop,
            optim_wrapper=dict(optimizer=dict(type='AdamW', lr=0.1)),
            default_hooks=dict(
                checkpoint=dict(type='CheckpointHook', by_epoch=epochs, interval=1 if epochs else 4)
            ),
            custom_hooks=[dict(type='_InterruptHook', at=at)],
            randomness=dict(seed=5),
            experiment_name=f'toy_{time.monotonic_ns()}',
            log_level='ERROR',
        )
    )
    cfg.merge_from_dict(kwargs)
    return SafeRunner.from_cfg(cfg)


@pytest.mark.parametrize(
    ('sampler', 'epochs', 'workers'),
    [
        ('InfiniteSampler', False, 0),
        ('InfiniteSampler', False, 2),
        ('DefaultSampler', True, 2),
        ('DefaultSampler', False, 0),
    ],
    ids=str,
)
def test_random_numbers_and_data_go_on(sampler, epochs, workers, tmp_path, monkeypatch):
    # It waits for two seconds before each round of data.
    monkeypatch.setattr(loops, 'time', SimpleNamespace(sleep=lambda seconds: None))
    args = dict(sampler=sampler, epochs=epochs)
    whole = toy_runner(tmp_path / 'whole', workers=workers, **args).train()
    # In another number of workers, which decides neither data nor augmentation.
    with pytest.raises(Interrupted):
        toy_runner(tmp_path / 'cut', workers=2 - workers, at=11, **args).train()
    resumed = toy_runner(tmp_path / 'cut', workers=workers, resume=True, **args)
    resumed.train()

    assert resumed.iter == 15
    for key, value in whole.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[key])


def test_augmentation_differs_between_samples_and_rounds(tmp_path):
    seen = []

    class Record(Hook):
        def after_train_iter(self, runner, data_batch=None, **kwargs):
            seen.extend(data_batch['inputs'])

    runner = toy_runner(tmp_path, sampler='DefaultSampler', epochs=True)
    runner.register_hook(Record())
    runner.train()

    samples = torch.stack(seen)
    assert samples[:10, 0].sort().values.tolist() == list(range(10))
    for generator in (1, 2, 3):
        assert samples[:, generator].unique().numel() == 30


def test_hooks_of_other_samplers_and_pipelines_reach_the_data_set(tmp_path):
    runner = toy_runner(tmp_path)
    dataset = runner.train_dataloader.dataset
    dataset.pipeline = 'new'

    assert dataset.dataset.pipeline == 'new'
    assert not hasattr(dataset, 'no_such_attribute')


@pytest.mark.parametrize('seed', [None, 1])
def test_seed_of_the_checkpoint(seed, tmp_path):
    toy_runner(tmp_path, randomness=dict(seed=7)).train()
    runner = toy_runner(tmp_path, resume=True, randomness=dict(seed=seed))

    assert runner.seed == (7 if seed is None else seed)


def run_in_child(function, *args):
    """Call a function in a child process, and return the child."""
    child = fork_server().Process(target=function, args=args, daemon=True)
    child.start()
    return child


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
        job = run_in_child(train_until_operation, killed + 1, work_dir, KEEP_ONE)
        job.join(timeout=300)
        if job.exitcode == 0:
            break
        assert job.exitcode == -signal.SIGKILL
        killed += 1
        reached.append(iteration_to_resume(work_dir))

    # No later kill leaves less than an earlier one: nothing is removed before its successor.
    assert reached == sorted(reached)
    assert set(reached) == {0, 2, 4, 6, 8}
    # Four checkpoints, each of them written, renamed and named, and three removals.
    assert killed >= 4 * 3 + 3


def kills_while_writing(work_dir, kills, seed, aimed):
    """Kill trainings that write large checkpoints, a share of them while a file is written."""
    draw, in_writing, reached = random.Random(seed), 0, 0
    options = {
        'train_cfg.max_iters': 10**6,
        'default_hooks.checkpoint.interval': 1,
        'default_hooks.checkpoint.max_keep_ckpts': 1,
        'width': 10**6,
        'resume': True,
    }
    for _ in range(kills):
        before = reached
        job = run_in_child(train_toy, work_dir, options)
        pointer = work_dir / 'last_checkpoint'
        while not pointer.exists() or not (
            # It is just being written.
            int((pointer.read_text() or '_0.pth').split('_')[-1][:-4]) > before
        ):
            assert job.is_alive()
            time.sleep(0.01)
        if draw.random() < aimed:
            while not list(work_dir.glob('*.pth.tmp')):
                assert job.is_alive()
                time.sleep(0.001)
        else:
            time.sleep(draw.uniform(0, 0.3))
        job.kill()
        job.join()
        in_writing += bool(list(work_dir.glob('*.tmp')))
        reached = iteration_to_resume(work_dir)
        assert reached > before
    return in_writing, reached


def test_killed_while_a_checkpoint_is_written(tmp_path):
    in_writing, _ = kills_while_writing(tmp_path, kills=6, seed=0, aimed=1)

    assert in_writing > 0


@pytest.mark.long
def test_killed_while_a_checkpoint_is_written_many_times(tmp_path):
    seed = random.randrange(1000)
    in_writing, reached = kills_while_writing(
        run_in_child, tmp_path, kills=100, seed=seed, aimed=0.5
    )

    assert in_writing > 10
    print(
        f'kills of seed {seed} survived: 100, of them {in_writing} in the middle of a file; each '
        f'time the last checkpoint was whole, and the next job went on from it, to iteration '
        f'{reached}'
    )


SAVE_BEST = {
    'default_hooks.checkpoint.save_best': 'score',
    'default_hooks.checkpoint.rule': 'greater',
}


def test_best_checkpoint_is_replaced_after_the_next_is_whole(tmp_path, monkeypatch):
    unlink, iterations = os.unlink, []

    def unlink_if_there_is_another(path):
        whole = [read_checkpoint(str(file)) for file in tmp_path.glob('best_*')]
        iterations.append([checkpoint['meta']['iter'] for checkpoint in whole])
        unlink(path)

    monkeypatch.setattr(os, 'unlink', unlink_if_there_is_another)
    runner = toy_runner(tmp_path, **SAVE_BEST)
    runner.register_hook(_ScoreHook())
    runner.train()

    assert [sorted(there) for there in iterations] == [[4, 8], [8, 12]]
    assert [path.name for path in tmp_path.glob('best_*')] == ['best_score_iter_12.pth']
    assert runner.message_hub.get_info('best_ckpt') == str(tmp_path / 'best_score_iter_12.pth')


def test_best_checkpoint_of_another_folder_is_not_removed(tmp_path):
    other = tmp_path / 'other' / 'best_score_iter_2.pth'
    other.parent.mkdir()
    other.touch()
    runner = toy_runner(tmp_path / 'here', **SAVE_BEST)
    runner.register_hook(_ScoreHook())
    runner.message_hub.update_info('best_ckpt', str(other))
    runner.train()

    assert other.exists()
    assert len(list((tmp_path / 'here').glob('best_*'))) == 1


def test_best_checkpoint_stays_where_the_next_cannot_be_written(tmp_path):
    runner = toy_runner(tmp_path, **SAVE_BEST)
    runner.register_hook(_ScoreHook())
    (tmp_path / 'best_score_iter_8.pth.tmp').symlink_to('/dev/full')
    with pytest.raises(OSError, match=r'No space left on device: .*best_score_iter_8\.pth'):
        runner.train()

    assert [path.name for path in tmp_path.glob('best_*')] == ['best_score_iter_4.pth']
    assert read_checkpoint(str(tmp_path / 'best_score_iter_4.pth'))['meta']['iter'] == 4


class _ScoreHook(Hook):
    """Validations at iterations 4, 8 and 12, each better than the one before."""

    # After the checkpoint of the iteration.
    priority = 'LOWEST'

    def after_train_iter(self, runner, **kwargs):
        if (runner.iter + 1) % 4 == 0:
            hook = next(hook for hook in runner.hooks if isinstance(hook, CheckpointHook))
            # Validation comes once the iteration is counted.
            runner.train_loop._iter += 1
            hook.after_val_epoch(runner, dict(score=runner.iter))
            runner.train_loop._iter -= 1


def test_file_that_cannot_be_written_is_as_it_was(tmp_path):
    file = tmp_path / 'epoch_1.pth'
    AtomicLocalBackend().put(b'first', file)
    (tmp_path / 'epoch_1.pth.tmp').symlink_to('/dev/full')
    with pytest.raises(OSError, match='No space left') as raised:
        AtomicLocalBackend().put(b'second', file)

    assert raised.value.errno == errno.ENOSPC
    assert raised.value.filename == str(file)
    assert file.read_bytes() == b'first'
    assert [path.name for path in tmp_path.iterdir()] == ['epoch_1.pth']


def test_hooks_that_are_replaced_or_left_alone(tmp_path):
    def names(**hooks):
        runner = toy_runner(tmp_path)
        runner.hooks.clear()
        runner.register_default_hooks(hooks)
        return [type(hook).__name__ for hook in runner.hooks]

    assert {'AtomicCheckpointHook', 'IterSeedHook'} < set(names())
    assert 'CheckpointHook' not in names(checkpoint=dict(type='CheckpointHook', interval=3))
    assert not {'AtomicCheckpointHook', 'IterSeedHook'} & set(
        names(checkpoint=None, iter_seed=None)
    )


def point_to(path):
    return lambda folder: (folder / 'last_checkpoint').write_text(path)


def spoil(*names, size=0):
    return lambda folder: [os.truncate(folder / name, size) for name in names]


@pytest.mark.parametrize(
    ('change', 'expected'),
    [
        (lambda folder: None, 'iter_4.pth'),
        (spoil('iter_4.pth'), 'iter_2.pth'),
        (spoil('iter_4.pth', size=300), 'iter_2.pth'),
        (point_to(''), 'iter_4.pth'),
        (lambda folder: (folder / 'last_checkpoint').unlink(), 'iter_4.pth'),
        (point_to('/where/it/was/iter_2.pth'), 'iter_2.pth'),
        (point_to('s3://bucket/iter_6.pth'), 's3://bucket/iter_6.pth'),
    ],
    ids=['last', 'empty', 'truncated', 'empty pointer', 'no pointer', 'moved', 'remote'],
)
def test_checkpoint_to_resume_from(change, expected, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(work_dirs, 'print_log', lambda message, *args: said.append(message))
    write_checkpoints(tmp_path)
    change(tmp_path)

    found = find_checkpoint(str(tmp_path))
    assert found == (expected if '://' in expected else str(tmp_path / expected))
    if os.path.getsize(tmp_path / 'iter_4.pth') <= 300:
        assert str(tmp_path / 'iter_4.pth') in said[0]
        assert f'resuming from {found}' in said[0]


def write_checkpoints(folder):
    """Checkpoints of iterations 2 and 4, and the best of them, which no job can resume."""
    for iteration in (2, 4):
        state = dict(meta=dict(iter=iteration), message_hub={}, optimizer={}, state_dict={})
        torch.save(state, folder / f'iter_{iteration}.pth')
        os.utime(folder / f'iter_{iteration}.pth', (iteration, iteration))
    torch.save(dict(meta={}, message_hub={}, state_dict={}), folder / 'best_iter_4.pth')
    point_to(str(folder / 'iter_4.pth'))(folder)


def test_no_checkpoint_to_resume_from(tmp_path):
    torch.save(dict(state_dict={}), tmp_path / 'pretrained.pth')
    assert find_checkpoint(str(tmp_path)) is None
    assert find_checkpoint(str(tmp_path / 'none')) is None
    point_to('/where/it/was/iter_2.pth')(tmp_path)
    with pytest.raises(CheckpointError, match=r'names /where/it/was/iter_2\.pth'):
        find_checkpoint(str(tmp_path))
    write_checkpoints(tmp_path)
    spoil('iter_2.pth', 'iter_4.pth', size=2)(tmp_path)
    with pytest.raises(CheckpointError, match=r'nothing to resume from .*iter_4\.pth'):
        find_checkpoint(str(tmp_path))


def assert_one_sentence(output, *parts):
    last = output.strip().splitlines()[-1]
    assert last.startswith('error: ')
    for part in parts:
        assert part in last


@pytest.mark.long
def test_full_disk(room):
    work_dir = room / 'full'
    work_dir.mkdir()
    # The kernel's device that is always full, in the place of the second checkpoint.
    (work_dir / 'iter_10.pth.tmp').symlink_to('/dev/full')
    options = ['--cfg-options', 'train_cfg.max_iters=10']
    job = start(room, 'segmentor.py', work_dir, *options)
    output = finish(job, room, work_dir, expect=1)

    assert_one_sentence(output, str(work_dir / 'iter_10.pth'), 'No space left on device')
    assert iteration_to_resume(work_dir) == 5
    assert [path.name for path in work_dir.glob('*.pth*')] == ['iter_5.pth']
    finish(start(room, 'segmentor.py', work_dir, *options), room, work_dir)
    assert iteration_to_resume(work_dir) == 10


def mount(folder, *options):
    folder.mkdir(exist_ok=True)
    command = ['mount', '-t', 'tmpfs', '-o', ','.join(options), 'tmpfs', str(folder)]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip('only root may mount a file system')


@pytest.mark.long
def test_disk_that_fills_up(room):
    disk = room / 'small_disk'
    mount(disk, 'size=100m')
    work_dir = disk / 'work_dir'
    try:
        job = start(room, 'segmentor.py', work_dir, '--cfg-options', 'train_cfg.max_iters=5')
        finish(job, room, work_dir)
        used = sum(file.stat().st_size for file in work_dir.rglob('*'))
        # What is there and half a checkpoint more.
        space = int(used + (work_dir / 'iter_5.pth').stat().st_size / 2)
        subprocess.run(['mount', '-o', f'remount,size={space}', str(disk)], check=True)
        output = finish(start(room, 'segmentor.py', work_dir), room, work_dir, expect=1)

        assert_one_sentence(output, str(work_dir), 'No space left on device')
        assert iteration_to_resume(work_dir) == 5
        subprocess.run(['mount', '-o', 'remount,size=100m', str(disk)], check=True)
        finish(start(room, 'segmentor.py', work_dir), room, work_dir)
        assert iteration_to_resume(work_dir) == MAX_ITERS
    finally:
        subprocess.run(['umount', str(disk)], check=True)
    print('full disk: one sentence, the last checkpoint whole, and resumed once there was space')


@pytest.mark.long
def test_read_only_work_dir(room):
    folder = room / 'read_only'
    mount(folder, 'ro')
    try:
        process = start(room, 'segmentor.py', folder / 'work_dir')
        output = finish(process, room, folder / 'work_dir', expect=1)
    finally:
        subprocess.run(['umount', str(folder)], check=True)

    assert_one_sentence(output, str(folder / 'work_dir'), 'Read-only file system')


@pytest.mark.long
def test_work_dir_below_a_file(room):
    (room / 'file').touch()
    process = start(room, 'segmentor.py', room / 'file' / 'below')
    output = finish(process, room, room / 'file' / 'below', expect=1)

    assert_one_sentence(output, str(room / 'file'), 'Not a directory')


def test_error_without_a_name_gets_that_of_the_folder(tmp_path):
    class FullDisk(Hook):
        def after_train_iter(self, runner, **kwargs):
            with open('/dev/full', 'w') as file:
                file.write('text')

    runner = toy_runner(tmp_path)
    runner.register_hook(FullDisk())
    with pytest.raises(OSError, match='No space left') as raised:
        runner.train()

    assert raised.value.filename == str(tmp_path)


def test_interrupted_training_names_the_way_on(room):
    work_dir = room / 'interrupted'
    # Without workers of the data loader: one that hands over a tensor while its job ends would
    # show the traceback of a thread of Python's own.
    options = ['train_cfg.max_iters=1000', *LOADERS[:2]]
    job = start(room, 'segmentor.py', work_dir, '--cfg-options', *options)
    while not list(work_dir.glob('*/vis_data/scalars.json')):
        assert job.is_alive()
        time.sleep(0.05)
    os.kill(job.pid, signal.SIGINT)
    output = finish(job, room, work_dir, expect=-signal.SIGINT)

    assert 'Traceback' not in output
    last = output.strip().splitlines()[-1]
    assert last == f'interrupted; --resume continues from the last checkpoint in {work_dir}'
