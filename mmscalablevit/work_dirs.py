# Copyright (c) mmscalablevit contributors. All rights reserved.
"""What the logs of a training say, and what the metafiles of the configs publish."""

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

import yaml
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
# A log that nobody has written to for so long belongs to a training that no longer runs.
SILENCE = 600

_TIMESTAMP = re.compile(r'\d{8}_\d{6}')
_WORLD_SIZE = re.compile(r'GPU number: (\d+)')
_RESUMED = re.compile(r'resumed epoch: (\d+), iter: (\d+)')
_EPOCH_LENGTH = re.compile(r'Epoch\(train\)\s*\[\s*\d+\]\[\s*\d+/\s*(\d+)\]')
_CHECKPOINT_STEP = re.compile(r'(epoch|iter)_(\d+)\.pth$')


@dataclass(frozen=True)
class Published:
    """A model of a metafile.

    Args:
        name (str): The stem of its config.
        config (Path): Its config.
        metrics (dict[str, float]): Published results by name; empty where none were published.
        source (str): Where they come from.
    """

    name: str
    config: Path
    metrics: dict[str, float]
    source: str = ''


@dataclass(frozen=True)
class Evaluation:
    """Metrics of one checkpoint, by published name and on the published scale.

    Args:
        step (int, optional): Its epoch or iteration, if known.
        metrics (dict[str, float]): The metrics.
    """

    step: int | None
    metrics: dict[str, float]


@dataclass
class Run:
    """What a work directory holds of one training and its continuations.

    Args:
        work_dir (Path): The ``--work-dir`` of ``tools/train.py``.
        name (str): The stem of the config.
        config (Config, optional): The config as the last training ran it, options included; None
            if there are only tests.
        unit (str): What steps count: 'epoch' or 'iteration'.
        total (int): Steps the training shall have.
        train (dict[int, dict]): Training records by iteration, with ``time`` in seconds per
            iteration, ``images`` per iteration, ``span`` the iterations it stands for and, on
            GPUs, ``memory`` in MB.
        validations (dict[int, Evaluation]): Validations by step; a test of a checkpoint stands in
            for a validation that is missing.
        tta (list[Evaluation]): Tests with augmentation, oldest first.
        test_configs (list[Config]): The configs of the tests in ``validations`` and ``tta``.
        epoch_length (int, optional): Iterations of an epoch, where known.
        batch_size (int): Images per iteration of the last training, all processes together.
        updated (float): When anything was logged last, in seconds since 1970.
    """

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
        steps = float(max(self.validations, default=0))
        if not self.train:
            return steps
        iteration = max(self.train)
        if self.unit == 'iteration':
            return max(steps, iteration)
        if self.epoch_length:
            return max(steps, iteration / self.epoch_length)
        return max(steps, self.train[iteration].get('epoch', 1) - 1)

    @property
    def state(self) -> str:
        """One of 'finished', 'running', 'cut off', 'nothing logged' and 'tested only'.

        A training has finished once its last step is evaluated, with which the loops of mmengine
        end. Whether another one runs, only the age of its log can tell.
        """
        if self.config is None:
            return 'tested only'
        if self.total and self.total in self.validations:
            return 'finished'
        if time.time() - self.updated < SILENCE:
            return 'running'
        return 'cut off' if self.train else 'nothing logged'

    @property
    def seconds_per_iteration(self) -> float | None:
        """Median time of an iteration, since the first ones and those beside others are slow."""
        return _median(record['time'] for record in self.train.values())

    @property
    def images_per_second(self) -> float | None:
        """Median throughput of all processes together."""
        return _median(
            record['images'] / record['time'] for record in self.train.values() if record['time']
        )

    @property
    def hours(self) -> float | None:
        """Time spent in the training iterations that led to the result, without evaluation."""
        if not self.train:
            return None
        return sum(record['time'] * record['span'] for record in self.train.values()) / 3600

    @property
    def hours_left(self) -> float | None:
        """Time that the remaining iterations will take, without evaluation."""
        seconds = self.seconds_per_iteration
        length = 1 if self.unit == 'iteration' else self.epoch_length
        if seconds is None or length is None:
            return None
        return max(self.total - self.done, 0) * length * seconds / 3600

    @property
    def peak_memory(self) -> float | None:
        """The most memory that a GPU took, in MB; None without a GPU."""
        return max((r['memory'] for r in self.train.values() if 'memory' in r), default=None)

    def evaluations(self, metric: str) -> list[Evaluation]:
        """The evaluations that have a metric, in the order of their steps.

        Args:
            metric (str): A published name, such as 'box AP'.

        Returns:
            list[Evaluation]: Those where it is a number.
        """
        candidates = [self.validations[step] for step in sorted(self.validations)] + self.tta
        return [e for e in candidates if not math.isnan(e.metrics.get(metric, math.nan))]


@dataclass
class _Session:
    """One start of ``tools/train.py`` or ``tools/test.py``: a folder named by its time."""

    folder: Path
    records: list[dict]
    test: dict | None
    config: Config | None
    log: str

    @property
    def train(self) -> list[dict]:
        """The training records; only these have the iteration."""
        return [record for record in self.records if 'iter' in record]

    @property
    def world_size(self) -> int:
        found = _WORLD_SIZE.search(self.log)
        return int(found.group(1)) if found else 1

    @property
    def start(self) -> tuple[int, int]:
        """Epochs and iterations that were behind it when it began."""
        found = _RESUMED.search(self.log)
        if found:
            return int(found.group(1)), int(found.group(2))
        if self.log or not self.config.get('resume'):
            return 0, 0
        first = self.train[0]
        return first.get('epoch', 1) - 1, first['iter'] - 1


def read_published(configs: Path) -> dict[str, Published]:
    """Read the metafiles of the configs.

    Args:
        configs (Path): The folder ``configs`` of the repository or of an installed package.

    Returns:
        dict[str, Published]: Models by the stem of their config.

    Raises:
        UserError: If a metafile is no YAML of the kind that MIM reads.

    Example:
        >>> models = read_published(Path('configs'))  # doctest: +SKIP
        >>> models['mask-rcnn_scalablevit-s_fpn_1x_coco'].metrics  # doctest: +SKIP
        {'box AP': 45.8, 'mask AP': 41.7}
    """
    models = {}
    for path in sorted(configs.glob('*/metafile.yml')):
        try:
            for model in yaml.safe_load(path.read_text(encoding='utf-8'))['Models']:
                published = _read_model(model, configs.parent)
                models[published.name] = published
        except (yaml.YAMLError, KeyError, TypeError, AttributeError, ValueError) as error:
            raise UserError(f'{path} cannot be read: {type(error).__name__}: {error}') from error
    return models


def find_work_dirs(folders: list[Path]) -> list[Path]:
    """Find work directories: the given ones, or those in a folder of such, like ``work_dirs``.

    Args:
        folders (list[Path]): The folders.

    Returns:
        list[Path]: Work directories, each once.

    Raises:
        UserError: If a folder does not exist or holds no training.

    Example:
        >>> find_work_dirs([Path('work_dirs')])  # doctest: +SKIP
        [Path('work_dirs/mask-rcnn_scalablevit-s_fpn_1x_coco')]
    """
    found = []
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f'work directory {folder} does not exist')
        if _sessions(folder):
            found.append(folder)
            continue
        nested = [path for path in sorted(folder.iterdir()) if path.is_dir() and _sessions(path)]
        if not nested:
            raise UserError(
                f'{folder} holds no training: neither it nor a folder in it has the logs '
                'YYYYMMDD_HHMMSS/vis_data/scalars.json of tools/train.py'
            )
        found += nested
    return list({path.resolve(): path for path in found}.values())


def read_run(work_dir: Path) -> Run:
    """Read the logs of a training and of its continuations and tests.

    A continuation goes on from a checkpoint, so what was logged before from that step on led
    nowhere and is dropped.

    Args:
        work_dir (Path): The ``--work-dir`` of ``tools/train.py``.

    Returns:
        Run: What they say together.

    Raises:
        UserError: If the work directory holds several experiments, or a log or config in it cannot
            be read.

    Example:
        >>> run = read_run(Path('work_dirs/mask-rcnn_scalablevit-s_fpn_1x_coco'))  # doctest: +SKIP
        >>> run.state, run.validations[12].metrics  # doctest: +SKIP
        ('finished', {'box AP': 45.8, 'mask AP': 41.7})
    """
    run = Run(work_dir, _find_name(work_dir))
    sessions = [_read_session(folder) for folder in _sessions(work_dir)]
    tests = [session for session in sessions if session.test is not None and session.config]
    trainings = [session for session in sessions if session.test is None and session.config]
    if not trainings and not tests:
        raise UserError(f'{work_dir} holds no config of a run (YYYYMMDD_HHMMSS/vis_data/config.py)')

    for session in trainings:
        run.updated = max(run.updated, *(path.stat().st_mtime for path in _log_files(session)))
    logged = [session for session in trainings if session.train]
    # Without any record, the last start tells at least how long it shall be.
    latest = [*tests, *trainings, *logged][-1]
    run.config = latest.config if trainings else None
    train_cfg = latest.config.get('train_cfg') or {}
    run.unit = 'epoch' if 'max_epochs' in train_cfg else 'iteration'
    run.total = train_cfg.get('max_epochs') or train_cfg.get('max_iters') or 0
    run.batch_size = latest.world_size * _batch_size(latest.config)
    for session in logged:
        _append(run, session)
    for session in tests:
        _add_test(run, session)
    return run


def newest_checkpoint(work_dir: Path) -> tuple[Path, int] | None:
    """Find the checkpoint from which a training can continue.

    Args:
        work_dir (Path): The ``--work-dir`` of ``tools/train.py``.

    Returns:
        tuple[Path, int] | None: The file and its epoch or iteration; None if there is none.

    Example:
        >>> newest_checkpoint(Path('work_dirs/mask-rcnn'))  # doctest: +SKIP
        (Path('work_dirs/mask-rcnn/epoch_3.pth'), 3)
    """
    pointer = work_dir / 'last_checkpoint'
    if not pointer.is_file():
        return None
    # By name, since the path within holds no longer once a work directory was moved.
    checkpoint = work_dir / Path(pointer.read_text().strip()).name
    step = checkpoint_step(checkpoint.name)
    return (checkpoint, step) if checkpoint.is_file() and step is not None else None


def checkpoint_step(name: str) -> int | None:
    """The epoch or iteration in the name of a checkpoint of mmengine.

    Args:
        name (str): The name or path.

    Returns:
        int | None: None where the name has none.

    Example:
        >>> checkpoint_step('best_mIoU_iter_16000.pth')
        16000
    """
    found = _CHECKPOINT_STEP.search(name)
    return int(found.group(2)) if found else None


def _read_model(model: dict, root: Path) -> Published:
    metrics = {}
    for result in model.get('Results') or []:
        metrics.update({name: float(value) for name, value in result['Metrics'].items()})
    source = (model.get('Metadata') or {}).get('Results Source', '')
    return Published(model['Name'], root / model['Config'], metrics, str(source))


def _sessions(work_dir: Path) -> list[Path]:
    return [path for path in sorted(work_dir.iterdir()) if _TIMESTAMP.fullmatch(path.name)]


def _find_name(work_dir: Path) -> str:
    stems = sorted(path.stem for path in work_dir.glob('*.py'))
    if len(stems) > 1:
        raise UserError(
            f'{work_dir} holds runs of several configs ({", ".join(stems)}); each needs a work '
            'directory of its own'
        )
    return stems[0] if stems else work_dir.resolve().name


def _read_session(folder: Path) -> _Session:
    config = folder / 'vis_data' / 'config.py'
    scalars = folder / 'vis_data' / 'scalars.json'
    test = folder / f'{folder.name}.json'
    log = folder / f'{folder.name}.log'
    return _Session(
        folder,
        _read_records(scalars) if scalars.is_file() else [],
        _read_json(test) if test.is_file() else None,
        _read_config(config) if config.is_file() else None,
        log.read_text(encoding='utf-8', errors='replace') if log.is_file() else '',
    )


def _read_records(path: Path) -> list[dict]:
    """Read a JSON object per line; the last one may be cut off in writing."""
    lines = path.read_text(encoding='utf-8', errors='replace').splitlines()
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            if number < len(lines):
                raise UserError(f'{path}, line {number}: not a JSON object: {error}') from error
            continue
        if not isinstance(record, dict):
            raise UserError(f'{path}, line {number}: not a JSON object')
        records.append(record)
    return records


def _read_json(path: Path) -> dict:
    try:
        return dict(json.loads(path.read_text(encoding='utf-8')))
    except (ValueError, TypeError) as error:
        raise UserError(f'{path} is not a JSON object: {error}') from error


def _read_config(path: Path) -> Config:
    try:
        return Config.fromfile(path, import_custom_modules=False)
    # A config is Python: anything can go wrong in it.
    except Exception as error:
        raise UserError(f'config {path} cannot be read: {type(error).__name__}: {error}') from error


def _log_files(session: _Session) -> list[Path]:
    return [session.folder, *session.folder.glob('*.log'), *session.folder.glob('vis_data/*')]


def _batch_size(config: Config) -> int:
    return (config.get('train_dataloader') or {}).get('batch_size') or 1


def _metrics(record: dict) -> dict[str, float]:
    return {
        name: record[key] * factor
        for name, (key, factor) in METRICS.items()
        if isinstance(record.get(key), int | float)
    }


def _append(run: Run, session: _Session) -> None:
    """Let a continuation follow what the run has up to its start."""
    epoch, iteration = session.start
    start = epoch if run.unit == 'epoch' else iteration
    run.train = {key: record for key, record in run.train.items() if key <= iteration}
    run.validations = {key: value for key, value in run.validations.items() if key <= start}
    found = _EPOCH_LENGTH.search(session.log)
    if found:
        run.epoch_length = int(found.group(1))
    images = session.world_size * _batch_size(session.config)
    for record in session.records:
        if 'iter' in record:
            span = record['iter'] - iteration
            iteration = record['iter']
            if 'time' in record:
                run.train[iteration] = dict(record, span=span, images=images)
            continue
        metrics = _metrics(record)
        if metrics:
            step = _validation_step(record, run, iteration)
            run.validations[step] = Evaluation(step, metrics)


def _validation_step(record: dict, run: Run, iteration: int) -> int:
    """The step of a validation; with iterations it is logged as 0 by hooks that count epochs."""
    if record.get('step') or run.unit == 'epoch':
        return record.get('step', 0)
    interval = run.config.train_cfg.get('val_interval') or 1
    return min(math.ceil(iteration / interval) * interval, run.total)


def _add_test(run: Run, session: _Session) -> None:
    metrics = _metrics(session.test)
    if not metrics:
        return
    step = checkpoint_step(str(session.config.get('load_from')))
    if 'module' in (session.config.get('model') or {}):
        names = {name: TTA_NAMES.get(name, f'{name}(tta)') for name in metrics}
        run.tta.append(Evaluation(step, {names[name]: v for name, v in metrics.items()}))
    elif step is None or step in run.validations:
        return
    else:
        run.validations[step] = Evaluation(step, metrics)
    run.test_configs.append(session.config)


def _median(values) -> float | None:
    values = [value for value in values if not math.isnan(value)]
    return statistics.median(values) if values else None


# What mmengine needs to continue a training; a file of best weights lacks the optimizer.
_TRAINING_STATE = {'meta', 'message_hub', 'optimizer'}


def find_checkpoint(work_dir: str) -> str | None:
    """Find the checkpoint to resume from: the one last written or, if damaged, the newest whole.

    Args:
        work_dir (str): Work directory of the training.

    Returns:
        str | None: The file, or None if no training wrote a checkpoint there. A damaged or
        missing latest checkpoint that was passed over is warned about.

    Raises:
        CheckpointError: If there are checkpoints of a training, and all of them are damaged.

    Example:
        >>> find_checkpoint('work_dirs/not_begun')
    """
    named = _last_checkpoint(work_dir)
    if named and '://' in named:
        return named
    folders = {work_dir, osp.dirname(named or '') or work_dir}
    files = [file for folder in folders for file in glob.glob(f'{glob.escape(folder)}/*.pth')]
    files.sort(key=osp.getmtime, reverse=True)
    # A work directory that was moved holds it under another path.
    latest = [named, osp.join(work_dir, osp.basename(named))] if named else []
    faults = []
    for file in dict.fromkeys([*latest, *files]):
        try:
            found = read_checkpoint(file, map_location='cpu')
        except FileNotFoundError:
            continue
        except CheckpointError as error:
            faults.append(str(error))
            continue
        if file not in latest and not found.keys() >= _TRAINING_STATE:
            continue
        if faults:
            print_log(f'{faults[0]}: resuming from {file}', 'current', logging.WARNING)
        return file
    if faults:
        raise CheckpointError(f'--resume: nothing to resume from in {work_dir}: {faults[0]}')
    if named:
        raise CheckpointError(
            f'--resume: {work_dir}/last_checkpoint names {named}, which does not exist'
        )
    return None


def use_checkpoint_seed(cfg: Config, checkpoint: str) -> None:
    """Give a config without a seed the one of a checkpoint, for its data to come in that order.

    Args:
        cfg (Config): The config.
        checkpoint (str): The checkpoint to resume from.

    Raises:
        CheckpointError: If the config has no seed and the checkpoint cannot be read.

    Example:
        >>> import torch
        >>> torch.save(dict(state_dict={}, meta=dict(seed=7)), '/tmp/seeded.pth')
        >>> cfg = Config()
        >>> use_checkpoint_seed(cfg, '/tmp/seeded.pth')
        >>> cfg.randomness
        {'seed': 7}
    """
    randomness = cfg.get('randomness') or {}
    # The checkpoint is large, and the runner reads it once more.
    if randomness.get('seed') is not None:
        return
    seed = (read_checkpoint(checkpoint, map_location='cpu').get('meta') or {}).get('seed')
    if seed is not None:
        cfg.randomness = dict(randomness, seed=seed)


def _last_checkpoint(work_dir: str) -> str | None:
    file = osp.join(work_dir, 'last_checkpoint')
    if not osp.isfile(file):
        return None
    with open(file, encoding='utf-8') as opened:
        return opened.read().strip() or None
