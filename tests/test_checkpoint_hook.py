# Copyright (c) mmscalablevit contributors. All rights reserved.
"""Checkpoints are written whole or not at all; which one a folder is resumed from."""

import os

import pytest
import torch
from mmengine.hooks import CheckpointHook, Hook
from toy import toy_runner

from mmscalablevit import work_dirs
from mmscalablevit.checkpoint.reading import read_checkpoint
from mmscalablevit.errors import CheckpointError
from mmscalablevit.work_dirs import find_checkpoint


def scored_runner(folder):
    best = {'save_best': 'score', 'rule': 'greater'}
    runner = toy_runner(folder, **{f'default_hooks.checkpoint.{k}': v for k, v in best.items()})
    runner.register_hook(_ScoreHook())
    return runner


def test_best_checkpoint_is_replaced_after_the_next_is_whole(tmp_path, monkeypatch):
    unlink, iterations = os.unlink, []

    def unlink_if_there_is_another(path):
        whole = [read_checkpoint(str(file)) for file in tmp_path.glob('best_*')]
        iterations.append([checkpoint['meta']['iter'] for checkpoint in whole])
        unlink(path)

    monkeypatch.setattr(os, 'unlink', unlink_if_there_is_another)
    runner = scored_runner(tmp_path)
    runner.train()

    assert [sorted(there) for there in iterations] == [[4, 8], [8, 12]]
    assert [path.name for path in tmp_path.glob('best_*')] == ['best_score_iter_12.pth']
    assert runner.message_hub.get_info('best_ckpt') == str(tmp_path / 'best_score_iter_12.pth')


def test_best_checkpoint_of_another_folder_is_not_removed(tmp_path):
    other = tmp_path / 'other' / 'best_score_iter_2.pth'
    other.parent.mkdir()
    other.touch()
    runner = scored_runner(tmp_path / 'here')
    runner.message_hub.update_info('best_ckpt', str(other))
    runner.train()

    assert other.exists()
    assert len(list((tmp_path / 'here').glob('best_*'))) == 1


def test_files_stay_where_a_checkpoint_cannot_be_written(tmp_path):
    runner = scored_runner(tmp_path)
    (tmp_path / 'best_score_iter_8.pth').write_bytes(b'of another training')
    (tmp_path / 'best_score_iter_8.pth.tmp').symlink_to('/dev/full')
    with pytest.raises(OSError, match=r'Errno 28\] No space left') as raised:
        runner.train()

    assert raised.value.filename == str(tmp_path / 'best_score_iter_8.pth')
    last, other = sorted(tmp_path.glob('best_*'))
    assert read_checkpoint(str(last))['meta']['iter'] == 4
    assert other.read_bytes() == b'of another training'


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


def test_hooks_that_are_replaced_or_left_alone(tmp_path):
    def names(**hooks):
        runner = toy_runner(tmp_path)
        runner.hooks.clear()
        runner.register_default_hooks(hooks)
        return {type(hook).__name__ for hook in runner.hooks}

    ours = {'AtomicCheckpointHook', 'IterSeedHook', 'MainProcessLoggerHook'}
    assert ours < names()
    theirs = dict(checkpoint=dict(type='CheckpointHook'), logger=dict(type='LoggerHook'))
    assert names(**theirs) == names()
    assert names(checkpoint=None, iter_seed=None) & ours == {'MainProcessLoggerHook'}


def point_to(path):
    return lambda folder: (folder / 'last_checkpoint').write_text(path)


def spoil(*names, size=0):
    return lambda folder: [os.truncate(folder / name, size) for name in names]


TO_RESUME = {
    'last': (lambda folder: None, 'iter_4.pth'),
    'empty': (spoil('iter_4.pth'), 'iter_2.pth'),
    'truncated': (spoil('iter_4.pth', size=300), 'iter_2.pth'),
    'empty pointer': (point_to(''), 'iter_4.pth'),
    'no pointer': (lambda folder: (folder / 'last_checkpoint').unlink(), 'iter_4.pth'),
    'moved': (point_to('/where/it/was/iter_2.pth'), 'iter_2.pth'),
    'remote': (point_to('s3://bucket/iter_6.pth'), 's3://bucket/iter_6.pth'),
}


@pytest.mark.parametrize(('change', 'expected'), TO_RESUME.values(), ids=TO_RESUME)
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
