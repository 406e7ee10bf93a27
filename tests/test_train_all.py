# Copyright (c) mmscalablevit contributors. All rights reserved.
"""The queue of experiments: what it does next in each state, and true trainings that it runs."""

import argparse
import json
import os
import signal
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from jobs import ROOT, finish, job_environment, load_tool, run_tool, start_tool
from logs import LATER, session
from mmengine.config import Config

from mmscalablevit.engine.runner import lock_work_dir
from mmscalablevit.errors import UserError

TOOL = ROOT / 'tools' / 'train_all.py'
SEGMENTOR = ROOT / 'tests' / 'data' / 'tiny_upernet.py'
# Its training set is COCO's, which is not there.
WITHOUT_DATA = ROOT / 'tests' / 'data' / 'tiny_retinanet.py'
WORK_DIR = ('--work-dir', '{work_dir}')
UPERNET = 'scalablevit-s_upernet_8xb2-160k_ade20k-512x512'
DONE = dict(checkpoint='iter_4.pth', validated=4)


@pytest.fixture
def tool():
    return load_tool('tools/train_all.py')


def arguments(**given):
    options = dict(amp=False, auto_scale_lr=False, cfg_options=None, partition=None, tta=False)
    return argparse.Namespace(**{**options, 'gpus': 1, **given})


def names(tool, *chosen):
    return {experiment.name for experiment in tool.select(list(chosen), Path('w'), {})}


def test_selection_by_name_and_glob(tool):
    configs = ROOT / 'configs'
    assert names(tool, UPERNET) == names(tool, f'configs/segmentation/{UPERNET}.py') == {UPERNET}
    retinanets = {path.stem for path in configs.glob('detection/retinanet_*.py')}
    assert names(tool, 'retinanet_*_coco') == names(tool, 'detection/retinanet_*') == retinanets
    small = {path.stem for path in configs.glob('small_data/retinanet_*.py')}
    assert names(tool, 'retinanet_*', 'detection/retina*') == retinanets | small
    with pytest.raises(UserError, match=r"matches 'segmentation/retinanet_\*'"):
        names(tool, 'segmentation/retinanet_*')
    with pytest.raises(UserError, match='paper, baselines, all, small-data'):
        names(tool, 'papers')


def test_groups(tool):
    paths = [*ROOT.glob('configs/detection/*.py'), *ROOT.glob('configs/segmentation/*.py')]
    assert names(tool, 'all') == {path.stem for path in paths}

    baselines, paper = names(tool, 'baselines'), names(tool, 'paper')
    twins = UPERNET.replace('scalablevit-s', 'twins-svt-s')
    assert {'mask-rcnn_swin-t_fpn_1x_coco', twins} <= baselines
    assert not any('scalablevit' in name for name in baselines)
    # RetinaNet and Mask R-CNN, S B L 1x and S B 3x; Semantic FPN and UperNet, S B L.
    assert len(paper) == 2 * 5 + 2 * 3
    assert {UPERNET, 'mask-rcnn_scalablevit-s_fpn_1x_coco'} <= paper
    assert not paper & baselines


def test_rows_of_the_page(tool, tmp_path, monkeypatch):
    for config, seed in (('retinanet_r18_fpn_bccd-400x300', 0), ('r18_upernet_camvid-320x240', 2)):
        path = tmp_path / f'{config}_seed{seed}.json'
        path.write_text(json.dumps(dict(config=config, seed=seed)))
    monkeypatch.setattr(sys.modules['experiments'], 'RESULTS', tmp_path)
    chosen = tool.select(['small-data', 'retinanet_r18_*'], tmp_path, {})
    seeds = {experiment.name: experiment.seed for experiment in chosen}
    commands = [tool.plan(experiment, arguments()).command for experiment in chosen]

    first, second = 'r18_upernet_camvid-320x240_seed2', 'retinanet_r18_fpn_bccd-400x300'
    assert seeds == {first: 2, second: 0}
    assert commands[0][-2:] == ('--cfg-options', 'randomness.seed=2')
    assert chosen[0].load().randomness.seed == 2


def test_raw_data_is_converted_where_it_lacks(tool, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    called = []
    ended = argparse.Namespace(returncode=0)
    runner = sys.modules['experiments'].subprocess
    monkeypatch.setattr(runner, 'run', lambda words: called.append(words) or ended)
    chosen = tool.select(['*_upernet_camvid-320x240', 'retinanet_r18_*'], tmp_path, {})
    Path('data/bccd').mkdir(parents=True)
    tool.convert(Path('raw'), chosen)
    ended.returncode = 1
    with pytest.raises(UserError, match='raw/camvid could not be converted'):
        tool.convert(Path('raw'), chosen)
    assert [words[2:4] for words in called] == [[Path('raw/camvid'), Path('data/camvid')]] * 2


def work_dir_at(experiment, checkpoint=None, validated=None, tta=None):
    """Write what the experiment's training of 4 iterations leaves behind."""
    config, work_dir = experiment.load(), experiment.work_dir
    records = [dict(loss=1.0, time=0.1, iter=2, step=2)]
    records += [dict(mIoU=1.0, step=validated)] if validated else []
    session(work_dir, records, config.to_dict(), name=experiment.name)
    if checkpoint:
        # Of another place: the folder was moved.
        (work_dir / 'last_checkpoint').write_text(f'/elsewhere/{checkpoint}')
        torch.save(dict(state_dict={}, meta={}), work_dir / checkpoint)
    if tta:
        config.model = dict(type='SegTTAModel', module=config.model)
        config.load_from = str(work_dir / tta)
        session(work_dir, [], config.to_dict(), experiment.name, LATER, test=dict(mIoU=1.0))


@pytest.mark.parametrize(
    ('left', 'tta', 'state', 'words'),
    [
        (None, False, 'start', ['train.py', 'tiny_upernet.py', '--work-dir']),
        (dict(), False, 'start', ['train.py', 'tiny_upernet.py', '--work-dir']),
        (dict(checkpoint='iter_2.pth'), False, 'resume at iter 2 of 4', ['--resume', 'iter_2.pth']),
        (dict(checkpoint='iter_4.pth'), False, 'evaluate', ['test.py', 'iter_4.pth']),
        (DONE, False, 'finished', []),
        (DONE, True, 'test with --tta', ['test.py', '--tta']),
        (dict(DONE, tta='iter_4.pth'), True, 'finished', []),
        (dict(DONE, tta='best_mIoU_iter_2.pth'), True, 'test with --tta', ['test.py', '--tta']),
    ],
)
def test_what_comes_next(tool, tmp_path, left, tta, state, words):
    (experiment,) = tool.select([str(SEGMENTOR)], tmp_path, {})
    if left is not None:
        work_dir_at(experiment, **left)
    step = tool.plan(experiment, arguments(tta=tta))
    assert step.state == state
    found = [Path(word).name for word in step.command]
    assert [word for word in words if word not in found] == []
    assert bool(step.command) == bool(words)
    assert step.trains == ('train.py' in found)
    assert ('--resume' in found) == state.startswith('resume')


def test_longer_training_resumes_a_finished_one(tool, tmp_path):
    (experiment,) = tool.select([str(SEGMENTOR)], tmp_path, {'train_cfg.max_iters': 8})
    work_dir_at(experiment, **DONE)
    assert tool.plan(experiment, arguments()).state == 'resume at iter 4 of 8'


@pytest.mark.parametrize(
    ('launch', 'train', 'test'),
    [
        (dict(), ('train.py', '{config}', *WORK_DIR), ('test.py', '{config}', '{last}', *WORK_DIR)),
        (
            dict(gpus=4),
            ('dist_train.sh', '{config}', '4', *WORK_DIR),
            ('dist_test.sh', '{config}', '{last}', '4', *WORK_DIR),
        ),
        (
            dict(gpus=16, partition='gpu'),
            ('slurm_train.sh', 'gpu', 'tiny_upernet', '{config}', '{work_dir}'),
            ('slurm_test.sh', 'gpu', 'tiny_upernet', '{config}', '{last}', *WORK_DIR),
        ),
    ],
)
def test_commands(tool, tmp_path, launch, train, test):
    (experiment,) = tool.select([str(SEGMENTOR)], tmp_path, {})
    options = dict(amp=True, auto_scale_lr=True, cfg_options=['train_dataloader.batch_size=4'])
    flags = ['--amp', '--auto-scale-lr', '--cfg-options', 'train_dataloader.batch_size=4']
    work_dir = tmp_path / 'tiny_upernet'
    places = dict(config=SEGMENTOR, work_dir=work_dir, last=work_dir / 'iter_4.pth')

    def words(command):
        program = sys.executable if command[0].endswith('.py') else 'bash'
        script, *others = (word.format(**places) for word in command)
        return [program, str(ROOT / 'tools' / script), *others]

    step = tool.plan(experiment, arguments(**options, **launch))
    assert list(step.command) == [*words(train), *flags]
    assert dict(step.environment) == ({'GPUS': '16'} if 'partition' in launch else {})
    work_dir_at(experiment, checkpoint='iter_4.pth')
    step = tool.plan(experiment, arguments(**options, **launch))
    assert list(step.command) == [*words(test), *flags[2:]]


def test_interrupted_training_is_resumed(folder):
    pytest.importorskip('mmseg')
    work_dir = folder / 'cut' / 'tiny_upernet'
    command = [TOOL, SEGMENTOR, '--work-root', folder / 'cut', '--cfg-options']
    command += ['default_hooks.checkpoint.interval=2', 'train_cfg.val_interval=100000']
    log = folder / 'cut.txt'
    job = start_tool([*command, 'train_cfg.max_iters=100000'], folder, log)
    while not (work_dir / 'last_checkpoint').exists():
        assert job.is_alive(), log.read_text()[-4000:]
        time.sleep(0.05)
    os.kill(job.pid, signal.SIGINT)
    assert finish(job) == 130, log.read_text()[-4000:]
    output = log.read_text()
    assert output.splitlines()[-1].startswith('interrupted')
    command_lines = [process.info['cmdline'] or [] for process in psutil.process_iter(['cmdline'])]
    # Of this test alone: another one may run on the machine.
    assert not [words for words in command_lines if str(work_dir) in words]
    reached = int(Path((work_dir / 'last_checkpoint').read_text()).stem.split('_')[1])
    assert 2 <= reached < 100000

    last = reached + 2
    command.append(f'train_cfg.max_iters={last}')
    listed = run_tool([*command, '--dry-run'], folder)
    assert f'tiny_upernet: resume at iter {reached} of {last}' in listed
    output = run_tool(command, folder)
    logs = sorted(work_dir.glob('*/vis_data/scalars.json'))
    assert len(logs) == 2
    records = [json.loads(line) for line in logs[1].read_text().splitlines()]
    assert [record['iter'] for record in records if 'iter' in record] == [reached + 1, last]
    assert f'finished, iteration {last}' in output
    (row,) = json.loads((folder / 'cut' / 'compared' / 'runs.json').read_text())['rows']
    assert (row['state'], row['last_step']) == ('finished', last)
    assert row['last'] == records[-1]['mIoU']

    run_tool(command, folder)
    assert len(list(work_dir.glob('*/vis_data'))) == 2


def test_slurm_and_a_failure(folder, tmp_path):
    """Both experiments go to Slurm at once; one fails, the other is trained and tested."""
    pytest.importorskip('mmseg')
    srun = tmp_path / 'srun'
    srun.write_text(
        f"""#!/bin/bash
echo "$@" >> "{tmp_path}/calls"
while [[ $1 != python ]]; do shift; done
# Another launcher.
exec "${{@/#slurm/none}}"
"""
    )
    srun.chmod(0o755)
    environment = job_environment(folder)
    environment['PATH'] = os.pathsep.join([str(tmp_path), environment['PATH']])
    slurm = ['--work-root', 'queue', '--partition', 'gpu', '--gpus', '2', '--tta']
    command = [TOOL, WITHOUT_DATA, SEGMENTOR, *slurm]
    output = run_tool(command, folder, environment, expect=1)

    calls = (tmp_path / 'calls').read_text()
    assert calls.count('--partition=gpu') == 3
    assert calls.count('--ntasks=2') == 3
    assert '--job-name=tiny_retinanet' in calls
    assert 'tiny_retinanet: "start" failed with code 1' in output
    assert 'data/coco/ does not exist' in output
    assert output.splitlines()[-1] == 'error: 1 of 2 failed: tiny_retinanet'
    rows = json.loads((folder / 'queue' / 'compared' / 'runs.json').read_text())['rows']
    plain, augmented = (row for row in rows if row['experiment'] == 'tiny_upernet')
    work_dir = folder / 'queue' / 'tiny_upernet'
    (log,) = work_dir.glob('*/vis_data/scalars.json')
    *steps, validation = (json.loads(line) for line in log.read_text().splitlines())
    assert (plain['metric'], plain['state']) == ('mIoU', 'finished')
    assert plain['best'] == validation['mIoU']
    assert plain['hours'] == pytest.approx(sum(record['time'] for record in steps) / 3600)
    (tested,) = work_dir.glob('*/*.json')
    assert augmented['metric'] == 'mIoU(ms+flip)'
    assert augmented['best'] == json.loads(tested.read_text())['mIoU']
    assert plain['best_step'] == augmented['best_step'] == 4


def test_work_dir_in_use(tool, tmp_path, monkeypatch, capsys):
    folder = tmp_path / 'tiny_upernet'
    folder.mkdir()
    monkeypatch.setattr(sys, 'argv', [str(TOOL), str(SEGMENTOR), '--work-root', str(tmp_path)])
    monkeypatch.setattr(tool.signal, 'signal', lambda *_: None)
    failed = pytest.raises(UserError, match='1 of 1 failed: tiny_upernet')
    with lock_work_dir(folder, 'train_all'), failed:
        tool.main()
    assert 'is in use by another train_all;' in capsys.readouterr().out.replace('\n', ' ')


def test_step_without_its_result_is_not_repeated(tool, tmp_path, monkeypatch):
    experiments = tool.select([str(SEGMENTOR)], tmp_path, {})
    queue = tool.Queue(experiments, arguments(jobs=1), tool.Console())
    step = tool.Step('start', ('true',), trains=True)
    monkeypatch.setattr(tool, 'plan', lambda *_: step)
    queue.work()
    assert queue.failed == {'tiny_upernet': '"start" ended without its result'}


def test_broken_config_fails_alone(tool, tmp_path, capsys):
    broken = tmp_path / 'broken.py'
    Config(dict(train_cfg=None)).dump(broken)
    experiments = tool.select([str(broken), str(SEGMENTOR)], tmp_path, {})
    tool.show_plan(experiments, arguments(), tool.Console(width=400))

    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith('broken: error: ')
    assert lines[1] == 'tiny_upernet: start'


@pytest.mark.parametrize(
    ('words', 'said'),
    [
        (['no_such_experiment'], "matches 'no_such_experiment'"),
        (['all', '--cfg-options', 'nonsense'], '--cfg-options must be KEY=VALUE, got nonsense'),
        (['all', '--jobs', '2'], '--jobs needs --partition'),
        (['all', '--gpus', '0'], 'must be at least 1'),
    ],
)
def test_wrong_arguments(call, words, said):
    assert said in '{} {}'.format(*call(TOOL, *words))
