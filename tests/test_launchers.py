# Copyright (c) mmscalablevit contributors. All rights reserved.
"""The launchers on two hosts, network namespaces of this machine, by themselves and by Slurm."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from jobs import ROOT, draw_shapes, job_environment, run, run_tool, scalars
from test_distributed import CONFIG_TEXTS, Job, weight_difference
from test_tools import TOOLS

pytest.importorskip('mmseg')
CLUSTER = Path(__file__).parent / 'cluster.sh'
CONFIG = 'segmentor_sgd.py'
PAUSE = ['default_hooks.checkpoint.interval=5', 'custom_hooks.0.type=Pause', 'custom_hooks.0.at=7']
# Half of the batch for each of two processes.
HALF = 'train_dataloader.batch_size=2'


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """A folder with a data set and a config without BN, whose statistics are of one process."""
    folder = tmp_path_factory.mktemp('work')
    draw_shapes(folder / 'shapes', num_train=16, num_val=5)
    text = CONFIG_TEXTS[CONFIG].format(demo=ROOT / 'configs' / 'demo', data=folder / 'shapes')
    (folder / CONFIG).write_text(text)
    return folder


@pytest.fixture(scope='module')
def environment(folder):
    # An empty GRES: Slurm is asked for no GPUs.
    slurm = dict(GRES='', GPUS='2', GPUS_PER_NODE='1', CPUS_PER_TASK='1')
    return {**job_environment(folder), **slurm, 'SLURM_CONF': str(folder / 'slurm' / 'slurm.conf')}


@pytest.fixture(scope='module')
def hosts():
    """The name of two hosts."""
    if os.geteuid() != 0:
        pytest.skip('network namespaces need root')
    if not shutil.which('ip') or subprocess.run(['unshare', '--net', 'true']).returncode:
        pytest.skip('network namespaces need iproute2, and a system that lets root make them')
    name = f'launchers-{os.getpid()}'
    try:
        subprocess.run([CLUSTER, 'up', name], check=True)
        yield name
    finally:
        subprocess.run([CLUSTER, 'down', name], check=True)


@pytest.fixture(scope='module')
def slurm(hosts, folder):
    """The name of two hosts that are nodes of Slurm."""
    missing = [p for p in ('munged', 'slurmctld', 'slurmd', 'srun') if not shutil.which(p)]
    if missing:
        pytest.skip(f'Slurm is not installed: no {", ".join(missing)}')
    subprocess.run([CLUSTER, 'slurm', hosts, folder / 'slurm'], check=True)
    return hosts


@pytest.fixture(scope='module')
def alone(folder):
    """Work directory of one process, for weights to compare with."""
    run_tool([TOOLS / 'train.py', CONFIG, '--work-dir', 'alone'], folder)
    return folder / 'alone'


def on_two_hosts(hosts, folder, environment, *arguments):
    """Start ``dist_train.sh`` on both hosts."""
    jobs = []
    for rank in range(2):
        given = dict(NNODES='2', NODE_RANK=str(rank), MASTER_ADDR='10.77.0.1')
        script = [TOOLS / 'dist_train.sh', CONFIG, 1, *arguments]
        jobs.append(
            Job([CLUSTER, 'run', hosts, f'n{rank + 1}', *script], folder, environment | given)
        )
    return jobs


def wait_for_pause(job, work_dir):
    job.wait_until(lambda: (work_dir / 'paused').exists() or job.ended(), 300)
    assert not job.ended(), job.output[-4000:]


def test_two_hosts_that_lose_each_other(hosts, folder, environment, alone):
    """Both end; resumed, they end with the weights of one process with the same global batch."""
    work_dir = folder / 'hosts'
    arguments = ['--work-dir', work_dir, '--resume', '--cfg-options', HALF, *PAUSE]
    jobs = on_two_hosts(hosts, folder, environment, *arguments)
    wait_for_pause(jobs[0], work_dir)
    subprocess.run([CLUSTER, 'cut', hosts], check=True)
    (work_dir / 'go_on').touch()
    for job in jobs:
        # A minute after the link was lost, and the end of torchrun.
        job.wait_until(job.ended, 120)
        assert job.process.returncode == 1
        assert 'The link to another host of this job is broken' in job.output
    assert (work_dir / 'last_checkpoint').read_text().endswith('iter_5.pth')

    subprocess.run([CLUSTER, 'mend', hosts], check=True)
    for job in on_two_hosts(hosts, folder, environment, *arguments):
        job.wait_until(job.ended, 300)
        assert job.process.returncode == 0, job.output[-4000:]
    assert steps(work_dir) == [list(range(1, 8)), list(range(6, 11))]
    difference = weight_difference(alone, work_dir)
    print(f'two hosts: weights within {difference:.1e}')
    assert difference < 1e-3


def steps(work_dir):
    """Logged iterations of each run in a work directory."""
    logs = sorted(work_dir.glob('*/vis_data/scalars.json'))
    lines = [map(json.loads, log.read_text().splitlines()) for log in logs]
    return [[line['iter'] for line in log if 'iter' in line] for log in lines]


def on_slurm(slurm, folder, environment, *command, expect=0):
    return run([CLUSTER, 'run', slurm, 'n1', *command], folder, environment, expect)


def test_a_killed_rank_ends_the_slurm_job(slurm, folder, environment):
    hook = dict(type='EndRank', rank=1, stage='train')
    options = [f'custom_hooks.0.{key}={value}' for key, value in hook.items()]
    train = [TOOLS / 'slurm_train.sh', 'cpu', 'killed', CONFIG, 'killed', '--cfg-options', *options]
    job = Job([CLUSTER, 'run', slurm, 'n1', *train], folder, environment)
    job.wait_until(lambda: (folder / 'killed' / 'ended').exists() or job.ended(), 300)
    job.wait_until(job.ended, 60)

    assert job.process.returncode != 0
    assert 'task 1: Killed' in job.output
    # Slurm frees the nodes after srun has returned.
    job.wait_until(lambda: on_slurm(slurm, folder, environment, 'squeue', '-h') == '', 60)


def test_requeued_slurm_job_of_two_nodes(slurm, folder, environment, alone):
    """It ends with the weights of one process, which test as they were validated."""
    work_dir = folder / 'requeued'
    script = [TOOLS / 'slurm_train.sh', 'cpu', 'step', CONFIG, work_dir, '--resume']
    script += ['--cfg-options', HALF, *PAUSE]
    (folder / 'job.sh').write_text(f'#!/bin/bash\nexec {" ".join(map(str, script))}\n')
    batch = ['sbatch', '--parsable', '--wait', '--requeue', '--open-mode=append']
    batch += ['--nodes=2', '--ntasks=2', '--partition=cpu', 'job.sh']
    job = Job([CLUSTER, 'run', slurm, 'n1', *batch], folder, environment)
    wait_for_pause(job, work_dir)
    number = job.output.strip()
    on_slurm(slurm, folder, environment, 'scontrol', 'requeue', number)
    job.wait_until(job.ended, 300)

    assert job.process.returncode == 0
    assert steps(work_dir) == [list(range(1, 8)), list(range(6, 11))]
    assert weight_difference(alone, work_dir) < 1e-3

    test = [TOOLS / 'slurm_test.sh', 'cpu', 'test', CONFIG, work_dir / 'iter_10.pth']
    on_slurm(slurm, folder, environment, *test, '--work-dir', 'tested')
    tested = json.loads(next((folder / 'tested').glob('*/*.json')).read_text())
    validated = scalars(work_dir)[1][-1]
    for key in ('aAcc', 'mIoU', 'mAcc'):
        assert tested[key] == validated[key]


def test_queue_with_a_cancelled_job(slurm, folder, environment):
    queue = [sys.executable, TOOLS / 'train_all.py', CONFIG, '--work-root', 'queue']
    queue += ['--partition', 'cpu', '--cfg-options', *PAUSE]
    job = Job([CLUSTER, 'run', slurm, 'n1', *queue], folder, environment)
    work_dir = folder / 'queue' / 'segmentor_sgd'
    wait_for_pause(job, work_dir)
    on_slurm(slurm, folder, environment, 'scancel', '--name=segmentor_sgd')
    job.wait_until(job.ended, 120)
    assert job.process.returncode == 1
    assert 'segmentor_sgd: "start" failed with code' in job.output

    output = on_slurm(slurm, folder, environment, *queue)
    assert 'segmentor_sgd: resume at iter 5 of 10' in output
    assert 'segmentor_sgd: finished' in output


def test_several_hosts_need_an_address(folder, environment):
    script = [TOOLS / 'dist_train.sh', CONFIG, 1]
    output = run(script, folder, environment | {'NNODES': '2'}, expect=1)

    assert output.startswith('error: NNODES=2 needs MASTER_ADDR')
