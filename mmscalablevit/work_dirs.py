# Copyright (c) mmscalablevit contributors. All rights reserved.
"""Work directories of trainings: their logs, checkpoints and results."""

import contextlib
import glob
import json
import logging
import math
import os.path as osp
import re
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path

from mmengine.config import Config
from mmengine.logging import print_log

from .checkpoint.reading import read_checkpoint
from .errors import CheckpointError, UserError

# Name in the metafiles: key in the logs, factor from the logged to the published scale.
METRICS = {
    'box AP': ('coco/bbox_mAP', 100),
    'mask AP': ('coco/segm_mAP', 100),
    'mIoU': ('mIoU', 1),
    'Top 1 Accuracy': ('accuracy/top1', 1),
}
# Name in the metafiles of a metric under test-time augmentation.
TTA_NAMES = {'mIoU': 'mIoU(ms+flip)'}
# Seconds after which a log that nobody has written to belongs to a training that no longer runs.
SILENCE = 600

_TIMESTAMP = re.compile(r'\d{8}_\d{6}')
_WORLD_SIZE = re.compile(r'GPU number: (\d+)')
_RESUMED = re.compile(r'resumed epoch: (\d+), iter: (\d+)')
_EPOCH_LENGTH = re.compile(r'Epoch\(train\)\s*\[\s*\d+\]\[\s*\d+/\s*(\d+)\]')
_CHECKPOINT_STEP = re.compile(r'(epoch|iter)_(\d+)\.pth$')

# What mmengine needs to continue a training; a file of best weights lacks the optimizer.
_TRAINING_STATE = {'meta', 'message_hub', 'optimizer'}


@dataclass(frozen=True)
class Evaluation:
    """Metrics of one checkpoint, by published name and on the published scale."""

    step: int | None
    metrics: dict[str, float]
    logged: dict


@dataclass
class Run:
    """What a work directory holds of one training and its continuations."""

    work_dir: Path
    name: str
    config: Config | None = None
    unit: str = 'epoch'
    total: int = 0
    train: dict[int, dict] = field(default_factory=dict)
    validations: dict[int, Evaluation] = field(default_factory=dict)
    tta: list[Evaluation] = field(default_factory=list)
    test_configs: list[Config] = field(default_factory=list)
    epoch_length: int | None = None
    batch_size: int = 0
    updated: float = 0.0

    @property
    def done(self) -> float:
        """Steps that were trained, as far as they were logged."""
        iteration = max(self.train, default=0)
        trained = self.train.get(iteration, {}).get('epoch', 1) - 1
        if self.unit == 'iteration':
            trained = iteration
        elif self.epoch_length:
            trained = iteration / self.epoch_length
        return float(max(trained, *self.validations, 0))

    @property
    def state(self) -> str:
        """One of 'finished', 'running', 'interrupted', 'nothing logged' and 'tested only'."""
        if self.config is None:
            return 'tested only'
        # The loops of mmengine end with an evaluation.
        if self.total and self.total in self.validations:
            return 'finished'
        if time.time() - self.updated < SILENCE:
            return 'running'
        return 'interrupted' if self.train else 'nothing logged'

    @property
    def images_per_second(self) -> float | None:
        """Median throughput of all processes together."""
        return _median(r['images'] / r['time'] for r in self.train.values() if r['time'])

    @property
    def hours(self) -> float | None:
        """Time spent in the training iterations that led to the result, without evaluation."""
        seconds = sum(record['time'] * record['span'] for record in self.train.values())
        return seconds / 3600 if self.train else None

    @property
    def hours_left(self) -> float | None:
        """Time that the remaining iterations will take, without evaluation."""
        seconds = _median(record['time'] for record in self.train.values())
        length = 1 if self.unit == 'iteration' else self.epoch_length
        if seconds is None or length is None:
            return None
        return max(self.total - self.done, 0) * length * seconds / 3600

    @property
    def peak_memory_mb(self) -> float | None:
        """The most memory that a GPU took, in MB; None without a GPU."""
        return max((r['memory'] for r in self.train.values() if 'memory' in r), default=None)

    def evaluations(self, metric: str) -> list[Evaluation]:
        """The evaluations in which a metric such as 'box AP' is a number, by step."""
        candidates = [self.validations[step] for step in sorted(self.validations)] + self.tta
        return [e for e in candidates if not math.isnan(e.metrics.get(metric, math.nan))]


class _Session:
    """One start of ``tools/train.py`` or ``tools/test.py``: a folder named by its time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        config, test = folder / 'vis_data' / 'config.py', folder / f'{folder.name}.json'
        try:
            self.config = Config.fromfile(config, import_custom_modules=False)
        # A config is Python: anything can go wrong in it.
        except Exception as error:
            why = f'{type(error).__name__}: {error}'
            raise UserError(f'config {config} cannot be read: {why}') from error
        self.records = _read_records(folder / 'vis_data' / 'scalars.json')
        # Only these have the iteration.
        self.train = [record for record in self.records if 'iter' in record]
        self.test = _read_object(_read(test), test) if test.is_file() else None
        self.log = _read(folder / f'{folder.name}.log')
        processes = _WORLD_SIZE.search(self.log)
        batch_size = (self.config.get('train_dataloader') or {}).get('batch_size') or 1
        # Of an iteration, those of all processes.
        self.images = batch_size * (int(processes[1]) if processes else 1)

    @property
    def start(self) -> tuple[int, int]:
        """Epochs and iterations that were behind it when it began."""
        found = _RESUMED.search(self.log)
        if found:
            return int(found[1]), int(found[2])
        if self.log or not self.config.get('resume'):
            return 0, 0
        first = self.train[0]
        return first.get('epoch', 1) - 1, first['iter'] - 1


def find_work_dirs(folders: list[Path]) -> list[Path]:
    """Find work directories: the given ones, or all those below a folder, like ``work_dirs``."""
    found = []
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f'work directory {folder} does not exist')
        starts = [p.parent for p in folder.rglob('vis_data') if _TIMESTAMP.fullmatch(p.parent.name)]
        if not starts:
            raise UserError(
                f'{folder} holds no training: neither it nor a folder in it has the logs '
                'YYYYMMDD_HHMMSS/vis_data/scalars.json of tools/train.py'
            )
        found += sorted({path.parent for path in starts})
    return list({path.resolve(): path for path in found}.values())


def read_run(work_dir: Path) -> Run:
    """Read the logs in a work directory, of a training and of its continuations and tests."""
    run = Run(work_dir, _find_name(work_dir))
    folders = sorted(path.parents[1] for path in work_dir.glob('*/vis_data/config.py'))
    sessions = [_Session(path) for path in folders if _TIMESTAMP.fullmatch(path.name)]
    if not sessions:
        raise UserError(f'{work_dir} holds no config of a run (YYYYMMDD_HHMMSS/vis_data/config.py)')
    tests = [session for session in sessions if session.test is not None]
    trainings = [session for session in sessions if session.test is None]
    files = [file for session in trainings for file in session.folder.rglob('*')]
    run.updated = max((path.stat().st_mtime for path in files), default=0.0)
    logged = [session for session in trainings if session.train]
    # Without any record, the last start tells at least how long it shall be.
    latest = [*tests, *trainings, *logged][-1]
    run.config = latest.config if trainings else None
    train_cfg = latest.config.get('train_cfg') or {}
    run.unit = 'epoch' if 'max_epochs' in train_cfg else 'iteration'
    run.total = train_cfg.get('max_epochs') or train_cfg.get('max_iters') or 0
    run.batch_size = latest.images
    for session in logged:
        _append(run, session)
    for session in tests:
        _add_test(run, session)
    return run


def checkpoint_step(name: str) -> int | None:
    """The epoch or iteration in the name of a checkpoint of mmengine, 12 in 'epoch_12.pth'."""
    found = _CHECKPOINT_STEP.search(name)
    return int(found[2]) if found else None


def find_checkpoint(work_dir: str) -> str | None:
    """Find the checkpoint to resume from: the one last written or, if damaged, the newest whole.

    None if there is none of a training, a ``CheckpointError`` if all are damaged. A warning names
    what was passed over.
    """
    pointer = Path(work_dir) / 'last_checkpoint'
    named = pointer.read_text(encoding='utf-8').strip() if pointer.is_file() else ''
    if '://' in named:
        return named
    folders = {work_dir, osp.dirname(named) or work_dir}
    files = [file for folder in folders for file in glob.glob(f'{glob.escape(folder)}/*.pth')]
    files.sort(key=osp.getmtime, reverse=True)
    # A work directory that was moved holds it under another path.
    latest = [named, osp.join(work_dir, osp.basename(named))] if named else []
    faults = []
    for file in filter(osp.exists, dict.fromkeys([*latest, *files])):
        try:
            found = read_checkpoint(file, map_location='cpu')
        except CheckpointError as error:
            faults.append(str(error))
            continue
        if file not in latest and not found.keys() >= _TRAINING_STATE:
            continue
        if faults:
            print_log(f'{faults[0]}: resuming from {file}', 'current', logging.WARNING)
        return file
    if faults:
        raise CheckpointError(f'nothing to resume from in {work_dir}: {faults[0]}')
    if named:
        raise CheckpointError(f'{pointer} names {named}, which does not exist')
    return None


def use_checkpoint_seed(cfg: Config, checkpoint: str) -> None:
    """Give a config without a seed the one of a checkpoint, for its data to come in that order."""
    randomness = cfg.get('randomness') or {}
    # The checkpoint is large, and the runner reads it once more.
    if randomness.get('seed') is None:
        meta = read_checkpoint(checkpoint, map_location='cpu').get('meta') or {}
        cfg.randomness = dict(randomness, seed=meta.get('seed'))


def _find_name(work_dir: Path) -> str:
    stems = sorted(path.stem for path in work_dir.glob('*.py'))
    if len(stems) > 1:
        raise UserError(
            f'{work_dir} holds runs of several configs ({", ".join(stems)}); each needs a work '
            'directory of its own'
        )
    return stems[0] if stems else work_dir.resolve().name


def _read_records(path: Path) -> list[dict]:
    """Read a JSON object per line; the last one may be half written."""
    lines = _read(path).splitlines()
    records = [_read_object(line, f'{path}, line {i}') for i, line in enumerate(lines[:-1], 1)]
    with contextlib.suppress(UserError):
        records += [_read_object(line, path) for line in lines[-1:]]
    return records


def _read(path: Path) -> str:
    return path.read_text(encoding='utf-8', errors='replace') if path.is_file() else ''


def _read_object(text: str, place: str | Path) -> dict:
    try:
        return dict(json.loads(text))
    except (ValueError, TypeError) as error:
        raise UserError(f'{place}: not a JSON object: {error}') from error


def _metrics(record: dict) -> dict[str, float]:
    found = {name: (record.get(key), factor) for name, (key, factor) in METRICS.items()}
    return {name: v * factor for name, (v, factor) in found.items() if isinstance(v, int | float)}


def _append(run: Run, session: _Session) -> None:
    """Let a continuation, which begins at a checkpoint, replace what was logged from there on."""
    epoch, iteration = session.start
    start = epoch if run.unit == 'epoch' else iteration
    run.train = {key: record for key, record in run.train.items() if key <= iteration}
    run.validations = {key: value for key, value in run.validations.items() if key <= start}
    found = _EPOCH_LENGTH.search(session.log)
    run.epoch_length = int(found[1]) if found else run.epoch_length
    for record in session.records:
        if 'iter' in record:
            span, iteration = record['iter'] - iteration, record['iter']
            if 'time' in record:
                run.train[iteration] = dict(record, span=span, images=session.images)
        elif metrics := _metrics(record):
            step = _validation_step(record, run, iteration)
            run.validations[step] = Evaluation(step, metrics, record)


def _validation_step(record: dict, run: Run, iteration: int) -> int:
    """The step of a validation; with iterations it is logged as 0 by hooks that count epochs."""
    if record.get('step') or run.unit == 'epoch':
        return record.get('step', 0)
    interval = run.config.train_cfg.get('val_interval') or 1
    return min(math.ceil(iteration / interval) * interval, run.total)


def _add_test(run: Run, session: _Session) -> None:
    metrics = _metrics(session.test)
    step = checkpoint_step(str(session.config.get('load_from')))
    if metrics and 'module' in (session.config.get('model') or {}):
        metrics = {TTA_NAMES.get(name, f'{name}(tta)'): v for name, v in metrics.items()}
        run.tta.append(Evaluation(step, metrics, session.test))
    elif metrics and step is not None and step not in run.validations:
        run.validations[step] = Evaluation(step, metrics, session.test)
    else:
        return
    run.test_configs.append(session.config)


def _median(values) -> float | None:
    values = [value for value in values if not math.isnan(value)]
    return statistics.median(values) if values else None
