# Copyright (c) mmscalablevit contributors. All rights reserved.
"""What ``tools/train.py`` and ``tools/test.py`` share: arguments, config, checks, runner."""

import argparse
import importlib
import inspect
import logging
import os
import os.path as osp
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from mmengine.config import Config, ConfigDict, DictAction
from mmengine.device import get_device
from mmengine.logging import print_log
from mmengine.registry import RUNNERS
from mmengine.runner import Runner
from rich.box import MARKDOWN
from rich.console import Console
from rich.table import Table

from .checkpoint.weights import use_safe_loader
from .checks.config import class_faults, config_faults, data_set_faults, hook_faults
from .checks.pipeline import check_pipelines, data_sets
from .engine.runner import (
    _end_workers_with_job,
    _explain_first_iteration,
    _SameBuffersHook,
    guard_loading,
)
from .errors import CheckpointError, DataError, UserError, config_errors

_DISTRIBUTIONS = {
    'mmdet': 'onedl-mmdetection',
    'mmseg': 'onedl-mmsegmentation',
    'mmpretrain': 'onedl-mmpretrain',
}
# Data sets of mmpretrain that fetch their own files.
_DOWNLOADED = ('CIFAR10', 'CIFAR100', 'FashionMNIST', 'MNIST')
# Top-level keys that are read from a config besides the arguments of Runner.
_OTHER_KEYS = {
    'activation_checkpointing',
    'compile',
    'custom_imports',
    'efficient_conv_bn_eval',
    'find_unused_parameters',
    'model_wrapper_cfg',
    'runner_type',
    'sync_bn',
    'tta_model',
    'tta_pipeline',
}
_PATH_ERRORS = (
    FileExistsError,
    FileNotFoundError,
    IsADirectoryError,
    NotADirectoryError,
    PermissionError,
)


def run(main: Callable[[], None]) -> None:
    """Run a tool and end it with one sentence and exit code 1 where the user erred.

    Args:
        main (Callable[[], None]): The tool. All errors but ``UserError``, ``CheckpointError``,
            ``DataError`` and those of paths that are missing, forbidden or of the wrong kind keep
            their traceback.

    Example:
        >>> def main():
        ...     raise UserError('--out must end in .pkl')
        >>> run(main)
        Traceback (most recent call last):
        SystemExit: error: --out must end in .pkl
    """
    try:
        main()
    except _PATH_ERRORS as error:
        # A data loader's worker puts its traceback into the message; the sentence comes last.
        sys.exit(f'error: {str(error).strip().splitlines()[-1]}')
    except DataError as error:
        print_log(traceback.format_exc(), logger='current', level=logging.DEBUG)
        sentence = str(error).strip().splitlines()[-1].split(f'{DataError.__name__}: ', 1)[-1]
        sys.exit(f'error: {sentence}')
    except (UserError, CheckpointError) as error:
        sys.exit(f'error: {" ".join(str(error).split())}')


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that training and testing share.

    Args:
        parser (argparse.ArgumentParser): The parser to add to.

    Example:
        >>> parser = argparse.ArgumentParser()
        >>> add_common_arguments(parser)
        >>> parser.parse_args(['--launcher', 'slurm']).launcher
        'slurm'
    """
    parser.add_argument('--work-dir', help='folder of logs and checkpoints')
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=DictAction,
        metavar='KEY=VALUE',
        help='settings that replace those of the config, such as train_dataloader.batch_size=4; '
        'lists as KEY="[a,b]" or KEY=a,b, without spaces',
    )
    parser.add_argument(
        '--launcher',
        choices=['none', 'pytorch', 'slurm', 'mpi'],
        default='none',
        help='how distributed processes were started; dist_*.sh and slurm_*.sh set it',
    )
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0, help=argparse.SUPPRESS)


def parse_args(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Parse the command line.

    Args:
        parser (argparse.ArgumentParser): A parser with the common arguments.

    Returns:
        argparse.Namespace: The arguments.

    Example:
        >>> parser = argparse.ArgumentParser()
        >>> add_common_arguments(parser)
        >>> args = parse_args(parser)  # doctest: +SKIP
    """
    try:
        args = parser.parse_args()
    # mmengine's parser of options fails in its own ways on what it cannot read.
    except (ValueError, AssertionError, RecursionError):
        parser.error(
            'argument --cfg-options: options must be KEY=VALUE, where VALUE is a number, a word, '
            'or a list or tuple of them without spaces'
        )
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    return args


def read_config(path: str, options: dict | None = None) -> Config:
    """Read a config, put options into it and import its toolbox.

    Args:
        path (str): The config.
        options (dict, optional): Settings that replace those of the config, by dotted key.

    Returns:
        Config: The config.

    Raises:
        UserError: If the config cannot be read, an option does not fit it, or its toolbox is not
            installed.

    Example:
        >>> path = 'configs/detection/mask-rcnn_scalablevit-s_fpn_1x_coco.py'
        >>> read_config(path, {'train_cfg.max_epochs': 1}).train_cfg.max_epochs  # doctest: +SKIP
        1
    """
    if not osp.isfile(path):
        raise UserError(f'config {path} does not exist')
    try:
        cfg = Config.fromfile(path)
    # A config is Python: anything can go wrong in it.
    except Exception as error:
        raise UserError(f'config {path} cannot be read: {type(error).__name__}: {error}') from error
    _merge_options(cfg, options or {})
    _import_toolbox(cfg)
    if cfg.get('default_scope') == 'mmpretrain':
        _stack_batches(cfg)
    return cfg


def load_config(args: argparse.Namespace) -> Config:
    """Read the config and put the common arguments into it.

    Args:
        args (argparse.Namespace): The arguments ``config``, ``work_dir``, ``cfg_options`` and
            ``launcher``.

    Returns:
        Config: The config; ``work_dir`` is set.

    Raises:
        UserError: See ``read_config``.

    Example:
        >>> args = argparse.Namespace(
        ...     config='configs/detection/mask-rcnn_scalablevit-s_fpn_1x_coco.py',
        ...     work_dir=None, cfg_options={'train_cfg.max_epochs': 1}, launcher='none')
        >>> load_config(args).work_dir  # doctest: +SKIP
        './work_dirs/mask-rcnn_scalablevit-s_fpn_1x_coco'
    """
    cfg = read_config(args.config, args.cfg_options)
    cfg.launcher = args.launcher
    name = osp.splitext(osp.basename(args.config))[0]
    cfg.work_dir = args.work_dir or cfg.get('work_dir') or osp.join('./work_dirs', name)
    return cfg


def markdown_table(
    header: Sequence[str], rows: Iterable[Sequence[str]], width: int = 10_000
) -> str:
    """Format rows as a Markdown table that also reads well in a terminal.

    Args:
        header (Sequence[str]): The names of the columns.
        rows (Iterable[Sequence[str]]): The cells of each row.
        width (int): Characters in a line; a table that is wider is folded, for terminals. Defaults
            to 10,000, which folds none.

    Returns:
        str: The lines of the table, ending in a newline.

    Example:
        >>> print(markdown_table(['model', 'mIoU'], [['UperNet', '48.5']]), end='')
        | model   | mIoU |
        |---------|------|
        | UperNet | 48.5 |
    """
    table = Table(*header, box=MARKDOWN)
    for row in rows:
        table.add_row(*(cell.replace('|', r'\|') for cell in row))
    # Cells are plain text.
    console = Console(width=width, markup=False, emoji=False, highlight=False, no_color=True)
    with console.capture() as captured:
        console.print(table)
    return captured.get().strip() + '\n'


def check_data(cfg: Config, loaders: tuple[str, ...]) -> None:
    """Check files, folders and annotations of the data sets, before a model is built.

    Args:
        cfg (Config): The config.
        loaders (tuple[str, ...]): Keys of the data loaders that will be used.

    Raises:
        UserError: If a path is missing or an annotation file of COCO's format has a fault; the
            message names it.

    Example:
        >>> check_data(Config(dict(test_dataloader=dict(dataset=dict(
        ...     data_root='data/coco', ann_file='val.json')))), ('test_dataloader',))
        Traceback (most recent call last):
        mmscalablevit.cli.UserError: test_dataloader: data/coco/val.json does not exist; ...
    """
    for loader in loaders:
        for key, path in _data_paths((cfg.get(loader) or {}).get('dataset') or {}):
            if '://' not in path and not osp.exists(path):
                raise UserError(
                    f'{loader}: {path} does not exist; put the data there or name it with '
                    f'--cfg-options {loader}.dataset.{key}=PATH'
                )
    for loader in loaders:
        for leaf in data_sets((cfg.get(loader) or {}).get('dataset') or ConfigDict()):
            with config_errors(cfg):
                faults = list(data_set_faults(cfg, loader, leaf))
            if faults:
                more = f' (and {len(faults) - 1} more faults)' if len(faults) > 1 else ''
                raise UserError(
                    f'{loader}: {faults[0]}{more}; tools/check_data.py lists all faults of the data'
                )


def build_runner(cfg: Config, loops: tuple[str, ...], strict: bool) -> Runner:
    """Build the runner, which reads checkpoints with ``weights_only=True``.

    Args:
        cfg (Config): The config.
        loops (tuple[str, ...]): Loops to build at once, for errors of their config to show here:
            of 'train_loop', 'val_loop' and 'test_loop'.
        strict (bool): Whether a checkpoint must hold exactly the model's parameters. Else layers
            of ``load_from`` that were trained for another number of classes start anew.

    Returns:
        Runner: The runner.

    Raises:
        UserError: If the model or a loop cannot be built, or the model's number of classes is not
            that of the data; ``train()`` raises it for the optimizer and its schedulers, and for
            the first iteration. The traceback is shown with ``--cfg-options log_level=DEBUG``.

    Example:
        >>> cfg = Config.fromfile('configs/detection/mask-rcnn_scalablevit-s_fpn_1x_coco.py')
        >>> cfg.work_dir = '/tmp/work_dir'
        >>> runner = build_runner(cfg, loops=('test_loop',), strict=True)  # doctest: +SKIP
    """
    _refuse(cfg, config_faults(cfg, loops, _known_keys()))
    _adapt_to_cpu(cfg)
    use_safe_loader()
    cfg.setdefault('runner_type', 'SafeRunner')
    with config_errors(cfg):
        runner = RUNNERS.build(cfg)
        built = {loop: getattr(runner, loop) for loop in loops}
    _refuse(cfg, hook_faults(runner))
    for name, loop in built.items():
        if loop is not None:
            _end_workers_with_job(loop.dataloader)
            dataset = loop.dataloader.dataset
            for leaf in data_sets(dataset):
                _refuse(cfg, class_faults(cfg, name.replace('loop', 'dataloader'), leaf))
            check_pipelines(dataset)
            _explain_first_iteration(cfg, loop)
    # The schedulers must not be built before the learning rate is scaled, so train() builds these.
    for build in (
        'build_optim_wrapper',
        'scale_lr',
        'build_param_scheduler',
        '_init_model_weights',
    ):
        setattr(runner, build, config_errors(cfg)(getattr(runner, build)))
    guard_loading(runner, strict)
    runner.register_hook(_SameBuffersHook())
    return runner


def _known_keys() -> set[str]:
    return {*inspect.signature(Runner.__init__).parameters, *_OTHER_KEYS}


def _merge_options(cfg: Config, options: dict) -> None:
    known = _known_keys()
    for key in options:
        name = key.split('.')[0]
        # Else it would be ignored: a misspelling, or a config's own variable, such as data_root.
        if name not in known:
            raise UserError(
                f'--cfg-options: nothing reads the key {name!r} once {cfg.filename} is parsed; '
                'name the entry that uses it, such as train_dataloader.dataset.data_root'
            )
    try:
        cfg.merge_from_dict(options)
    except (TypeError, KeyError, IndexError) as error:
        raise UserError(f'--cfg-options: {error}') from error


def _import_toolbox(cfg: Config) -> None:
    scope = cfg.get('default_scope')
    if scope not in _DISTRIBUTIONS:
        return
    try:
        importlib.import_module(f'{scope}.models')
    # The original mmdet and mmseg assert the version of mmcv.
    except (ImportError, AssertionError) as error:
        raise UserError(
            f'config {cfg.filename} needs {scope}, which cannot be imported ({error}); '
            f'install {_DISTRIBUTIONS[scope]} or the original {scope}'
        ) from error


def _stack_batches(cfg: Config) -> None:
    # mmpretrain's own tools make these the defaults of its data loaders.
    for loader in ('train_dataloader', 'val_dataloader', 'test_dataloader'):
        if cfg.get(loader):
            cfg[loader].setdefault('collate_fn', dict(type='default_collate'))
            cfg[loader].setdefault('pin_memory', True)


def _adapt_to_cpu(cfg: Config) -> None:
    """Replace what needs an accelerator, where there is none: AMP wrapper, NCCL, SyncBN."""
    if get_device() != 'cpu':
        return
    wrapper = cfg.get('optim_wrapper') or {}
    if wrapper.get('type') == 'AmpOptimWrapper':
        for key in ('loss_scale', 'dtype', 'use_fsdp'):
            wrapper.pop(key, None)
        wrapper.type = 'CPUAmpOptimWrapper'
        print_log('No accelerator: mixed precision runs in bfloat16 on CPU', logger='current')
    if cfg.launcher in ('pytorch', 'slurm') and not torch.distributed.is_initialized():
        cfg.model_wrapper_cfg = dict(
            type='MMDistributedDataParallel',
            device_ids=None,
            broadcast_buffers=False,
            find_unused_parameters=cfg.get('find_unused_parameters', False),
        )
        cfg.sync_bn = None


def _data_paths(dataset: ConfigDict, inside: str = '') -> Iterator[tuple[str, str]]:
    """Every path of a data set, with the key that names it."""
    if dataset.get('type') in _DOWNLOADED:
        return
    nested = {'dataset.': dataset.get('dataset')}
    nested |= {f'datasets.{i}.': inner for i, inner in enumerate(dataset.get('datasets', []))}
    for key, inner in nested.items():
        if inner:
            yield from _data_paths(inner, inside + key)
    root = dataset.get('data_root') or ''
    if root:
        yield f'{inside}data_root', root
    prefix = dataset.get('data_prefix') or {}
    prefix = prefix if isinstance(prefix, dict) else {'': prefix}
    names = {'ann_file': dataset.get('ann_file')}
    names |= {f'data_prefix.{key}'.rstrip('.'): name for key, name in prefix.items()}
    for key, name in names.items():
        if isinstance(name, str) and name:
            yield inside + key, osp.join(root, name)


def _refuse(cfg: Config, faults: Iterable[str]) -> None:
    for fault in faults:
        raise UserError(f'config {cfg.filename}: {fault}')
