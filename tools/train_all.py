# Copyright (c) mmscalablevit contributors. All rights reserved.
"""Train and evaluate a chosen set of experiments: on one machine in turn, or through Slurm.

What is finished is skipped, what was interrupted is resumed, the rest is started. The output of
each experiment goes to ``output.log`` in its work directory. After a failure the next one is taken;
Ctrl-C stops what runs, and the same command goes on from there.
"""

import argparse
import os
import shlex
import signal
import subprocess
import sys
import time
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

from experiments import GROUPS, Experiment, convert, select
from mmengine.config import DictAction
from rich.console import Console
from rich.progress import BarColumn, Progress, TimeElapsedColumn

from mmscalablevit import cli, work_dirs
from mmscalablevit.engine.runner import lock_work_dir
from mmscalablevit.errors import CheckpointError, UserError

TOOLS = Path(__file__).resolve().parent
# Seconds that processes have to end by themselves before they are killed; torchrun takes 30.
GRACE = 40
# Seconds between looks at processes, and at logs for the progress bars.
POLL, REFRESH = 0.5, 10


@dataclass(frozen=True)
class Step:
    """What comes next for an experiment: no command if it is finished."""

    state: str
    command: tuple[str, ...] = ()
    environment: tuple[tuple[str, str], ...] = ()
    trains: bool = False


@dataclass
class Job:
    """A step that runs; the lock is held as long as the experiment is worked on."""

    experiment: Experiment
    step: Step
    process: subprocess.Popen
    lock: ExitStack
    bar: int
    looked: float = 0.0


def plan(experiment: Experiment, args: argparse.Namespace) -> Step:
    """Find out what an experiment needs next.

    That is to start or resume its training, to test its last checkpoint where the training ended
    without an evaluation, to test it with augmentation, or nothing.
    """
    cfg = experiment.load()
    train_cfg = cfg.get('train_cfg') or {}
    total = train_cfg.get('max_epochs') or train_cfg.get('max_iters')
    if not total:
        raise UserError(f'{experiment.config} has no train_cfg.max_epochs or max_iters')
    unit = 'epoch' if 'max_epochs' in train_cfg else 'iter'
    flags = ['--amp'] * args.amp + ['--auto-scale-lr'] * args.auto_scale_lr
    checkpoint = work_dirs.find_checkpoint(str(experiment.work_dir))
    if checkpoint is None:
        return _step('start', experiment, args, '', *flags)
    step = work_dirs.checkpoint_step(checkpoint) or 0
    if step < total:
        flags += ['--resume', checkpoint]
        return _step(f'resume at {unit} {step} of {total}', experiment, args, '', *flags)

    run = work_dirs.read_run(experiment.work_dir)
    if step not in run.validations:
        return _step('evaluate', experiment, args, checkpoint)
    augmented = args.tta and cfg.get('default_scope') == 'mmseg' and 'tta_pipeline' in cfg
    if augmented and step not in [evaluation.step for evaluation in run.tta]:
        return _step('test with --tta', experiment, args, checkpoint, '--tta')
    return Step('finished')


def _step(
    state: str, experiment: Experiment, args: argparse.Namespace, checkpoint: str, *flags: str
) -> Step:
    """Test a checkpoint or else train: by one process, torchrun or Slurm."""
    kind = 'test' if checkpoint else 'train'
    model = [str(experiment.config), *([checkpoint] if checkpoint else [])]
    work_dir = ['--work-dir', str(experiment.work_dir)]
    # The scripts of an installed package may not be executable.
    if args.partition:
        # slurm_train.sh takes the work directory by its place.
        work_dir = work_dir[1:] if kind == 'train' else work_dir
        script = ['bash', str(TOOLS / f'slurm_{kind}.sh'), args.partition, experiment.name, *model]
    elif args.gpus > 1:
        script = ['bash', str(TOOLS / f'dist_{kind}.sh'), *model, str(args.gpus)]
    else:
        script = [sys.executable, str(TOOLS / f'{kind}.py'), *model]
    texts = list(args.cfg_options or [])
    if experiment.seed is not None:
        texts.append(f'randomness.seed={experiment.seed}')
    options = ['--cfg-options', *texts] if texts else []
    environment = (('GPUS', str(args.gpus)),) if args.partition else ()
    command = (*script, *work_dir, *flags, *options)
    return Step(state, command, environment, trains=kind == 'train')


class Queue:
    """Works through experiments in their order, up to ``args.jobs`` at a time."""

    def __init__(self, experiments: list[Experiment], args: argparse.Namespace, console: Console):
        self.waiting = list(experiments)
        self.count = len(experiments)
        self.args = args
        self.console = console
        self.running: list[Job] = []
        self.failed: dict[str, str] = {}
        columns = '{task.description}', BarColumn(), '{task.fields[text]}', TimeElapsedColumn()
        self.progress = Progress(*columns, console=console, disable=not console.is_terminal)

    def work(self) -> None:
        """Do everything; failures are kept in ``failed``."""
        try:
            with self.progress:
                while self.waiting or self.running:
                    while self.waiting and len(self.running) < self.args.jobs:
                        self._start(self.waiting.pop(0))
                    for job in list(self.running):
                        self._look(job)
                    time.sleep(POLL if self.running else 0)
        finally:
            stop([job.process for job in self.running])

    def _start(
        self, experiment: Experiment, lock: ExitStack | None = None, before: Step | None = None
    ) -> None:
        """Start the next step of an experiment, if there is one."""
        try:
            if lock is None:
                lock = ExitStack()
                lock.enter_context(lock_work_dir(experiment.work_dir, 'train_all'))
            step = plan(experiment, self.args)
        except (UserError, CheckpointError) as error:
            self._fail(experiment, str(error), lock)
            return
        number = f'{self.count - len(self.waiting)} of {self.count}'
        if not step.command:
            say(self.console, f'{experiment.name}: finished ({number})')
            lock.close()
            return
        if step == before:
            self._fail(experiment, f'"{step.state}" ended without its result', lock)
            return
        say(self.console, f'{experiment.name}: {step.state} ({number})')
        with open(experiment.work_dir / 'output.log', 'ab') as log:
            process = subprocess.Popen(
                step.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **dict(step.environment)},
                start_new_session=True,
            )
        bar = self.progress.add_task(experiment.name, total=None, text=step.state)
        self.running.append(Job(experiment, step, process, lock, bar))

    def _look(self, job: Job) -> None:
        """Show how far a job is; once it has ended, go on."""
        code = job.process.poll()
        if code is None:
            if time.time() - job.looked > REFRESH:
                job.looked = time.time()
                self._show(job)
            return
        self.running.remove(job)
        self.progress.remove_task(job.bar)
        if code == 0:
            self._start(job.experiment, job.lock, job.step)
            return
        log = job.experiment.work_dir / 'output.log'
        reason = f'"{job.step.state}" failed with code {code}; see {log}'
        self._fail(job.experiment, reason, job.lock)
        lines = log.read_text(encoding='utf-8', errors='replace').splitlines()
        for line in [line for line in lines if line.strip()][-3:]:
            say(self.console, f'  {line}')

    def _show(self, job: Job) -> None:
        # A log or config may be just being written.
        with suppress(UserError, OSError):
            run = work_dirs.read_run(job.experiment.work_dir)
            if run.total and job.step.trains:
                left = '' if run.hours_left is None else f', {run.hours_left:.1f} h left'
                text = f'{run.unit} {run.done:.1f} of {run.total}{left}'
                self.progress.update(job.bar, total=run.total, completed=run.done, text=text)

    def _fail(self, experiment: Experiment, reason: str, lock: ExitStack) -> None:
        self.failed[experiment.name] = reason
        say(self.console, f'{experiment.name}: {reason}')
        lock.close()


def say(console: Console, text: str) -> None:
    """Print plain text beside the progress bars."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def stop(processes: list[subprocess.Popen]) -> None:
    """End processes, leaders of groups of their own, with all that they have started."""
    for process in processes:
        _signal(process, signal.SIGTERM)
    end = time.time() + GRACE
    for process in processes:
        try:
            process.wait(max(end - time.time(), 0))
        except subprocess.TimeoutExpired:
            _signal(process, signal.SIGKILL)
            process.wait()


def _signal(process: subprocess.Popen, number: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def show_plan(experiments: list[Experiment], args: argparse.Namespace, console: Console) -> None:
    """Print the state of every experiment and the command that comes next."""
    for experiment in experiments:
        try:
            step = plan(experiment, args)
        except (UserError, CheckpointError) as error:
            step = Step(f'error: {error}')
        say(console, f'{experiment.name}: {step.state}')
        if step.command:
            words = [f'{k}={v}' for k, v in step.environment] + [shlex.join(step.command)]
            say(console, '    ' + ' '.join(words))


def report(experiments: list[Experiment], work_root: Path) -> None:
    """Compare with the page of results, or with the published ones in the folder ``compared``."""
    trained = [e for e in experiments if any(e.work_dir.glob('*/vis_data'))]
    for script, of_page, options in (
        ('results_page.py', True, ['--compare']),
        ('compare_runs.py', False, ['--out', work_root / 'compared']),
    ):
        chosen = [e.work_dir for e in trained if (e.seed is not None) == of_page]
        words = [TOOLS / 'analysis_tools' / script, *chosen, *options]
        if chosen and subprocess.run([sys.executable, *words]).returncode:
            raise UserError('the results could not be compared; see above')


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    groups = '; '.join(f'{name}: {text}' for name, text in GROUPS.items())
    parser = argparse.ArgumentParser(
        formatter_class=cli.HelpFormatter,
        description='Train and evaluate a chosen set of experiments: skip what is finished, resume '
        'what was interrupted, start the rest, and compare the results with the published ones.',
        epilog="example: python tools/train_all.py 'mask-rcnn_*_1x_coco' "
        "'segmentation/*upernet*' --gpus 8 --amp --tta",
    )
    help_ = (
        "names of configs or globs over them, with or without their folder, such as 'mask-rcnn_*"
        f"_1x_coco' or 'segmentation/*'; files of your own configs; or groups ({groups})"
    )
    parser.add_argument('experiments', nargs='+', metavar='EXPERIMENT', help=help_)
    help_ = 'folder of the work directories'
    parser.add_argument('--work-root', type=Path, default=Path('work_dirs'), help=help_)
    help_ = (
        'folder of the original bccd, nuclei and camvid, from which data sets that are missing in '
        'data/ are converted first'
    )
    parser.add_argument('--raw', type=Path, help=help_)
    parser.add_argument('--gpus', type=_positive, default=1, help='GPUs for each experiment')
    parser.add_argument('--partition', help='train through Slurm, in this partition')
    help_ = 'experiments at a time with --partition; default: all at once'
    parser.add_argument('--jobs', type=_positive, help=help_)
    parser.add_argument('--dry-run', action='store_true', help='only list states and commands')
    parser.add_argument('--amp', action='store_true', help='mixed precision')
    help_ = 'scale learning rates to the batch size'
    parser.add_argument('--auto-scale-lr', action='store_true', help=help_)
    help_ = 'test segmentors with multiple scales and flips as well'
    parser.add_argument('--tta', action='store_true', help=help_)
    help_ = 'settings that replace those of every chosen config'
    parser.add_argument('--cfg-options', nargs='+', metavar='KEY=VALUE', help=help_)
    args = parser.parse_args()
    if args.jobs and not args.partition:
        parser.error('--jobs needs --partition: on one machine, experiments run in turn')
    return args


def _positive(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f'must be at least 1, got {text}')
    return int(text)


def parse_options(texts: list[str] | None) -> dict:
    """Read options as ``tools/train.py`` does."""
    parser = argparse.ArgumentParser()
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, default={})
    try:
        return parser.parse_args(['--cfg-options', *texts] if texts else []).cfg_options
    except (ValueError, AssertionError, RecursionError) as error:
        raise UserError(f'--cfg-options must be KEY=VALUE, got {" ".join(texts)}') from error


def main() -> None:
    """Work through the experiments."""
    args = parse_args()
    experiments = select(args.experiments, args.work_root, parse_options(args.cfg_options))
    console = Console()
    if args.dry_run:
        show_plan(experiments, args, console)
        return
    args.jobs = (args.jobs or len(experiments)) if args.partition else 1
    if args.raw:
        convert(args.raw, experiments)
    # SIGINT too, which shells have background jobs ignore.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    queue = Queue(experiments, args, console)
    try:
        queue.work()
    except KeyboardInterrupt:
        print('interrupted; the same command continues from the last checkpoints', file=sys.stderr)
        sys.exit(130)
    report(experiments, args.work_root)
    if queue.failed:
        names = ', '.join(queue.failed)
        raise UserError(f'{len(queue.failed)} of {len(experiments)} failed: {names}')


if __name__ == '__main__':
    cli.run(main)
