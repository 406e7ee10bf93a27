# Copyright (c) mmscalablevit contributors. All rights reserved.
"""What ``tools/train.py`` and ``tools/test.py`` share: arguments, config, checks, runner."""

import argparse
import contextlib
import errno
import functools
import importlib
import inspect
import logging
import os
import os.path as osp
import re
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator

import torch
from mmengine.config import Config, ConfigDict, DictAction
from mmengine.device import get_device
from mmengine.dist import broadcast
from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.model import is_model_wrapper
from mmengine.registry import RUNNERS
from mmengine.runner import BaseLoop, Runner
from torch import nn
from torch.utils.data import DataLoader

from .checkpoint import (
    CheckpointError,
    check_values,
    find_weights,
    one_line,
    read_checkpoint,
    use_safe_loader,
)
from .checks import class_faults, config_faults, data_set_faults, hook_faults
from .data import DataError, check_pipelines, data_sets

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
_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}
# What building from a wrong config raises, or the first iteration of what was built.
_BUILD_ERRORS = (
    AssertionError,
    AttributeError,
    IndexError,
    KeyError,
    RuntimeError,
    TypeError,
    ValueError,
)


class UserError(Exception):
    """A mistake in what the user gave: reported as one sentence, without a traceback."""


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


def load_config(args: argparse.Namespace) -> Config:
    """Read the config, put the common arguments into it and import its toolbox.

    Args:
        args (argparse.Namespace): The arguments ``config``, ``work_dir``, ``cfg_options`` and
            ``launcher``.

    Returns:
        Config: The config; ``work_dir`` is set.

    Raises:
        UserError: If the config cannot be read, an option does not fit it, or its toolbox is not
            installed.

    Example:
        >>> args = argparse.Namespace(
        ...     config='configs/detection/mask-rcnn_scalablevit-s_fpn_1x_coco.py',
        ...     work_dir=None, cfg_options={'train_cfg.max_epochs': 1}, launcher='none')
        >>> load_config(args).work_dir  # doctest: +SKIP
        './work_dirs/mask-rcnn_scalablevit-s_fpn_1x_coco'
    """
    if not osp.isfile(args.config):
        raise UserError(f'config {args.config} does not exist')
    try:
        cfg = Config.fromfile(args.config)
    # A config is Python: anything can go wrong in it.
    except Exception as error:
        raise UserError(
            f'config {args.config} cannot be read: {type(error).__name__}: {error}'
        ) from error

    _merge_options(cfg, args.cfg_options or {})
    cfg.launcher = args.launcher
    name = osp.splitext(osp.basename(args.config))[0]
    cfg.work_dir = args.work_dir or cfg.get('work_dir') or osp.join('./work_dirs', name)
    _import_toolbox(cfg)
    if cfg.get('default_scope') == 'mmpretrain':
        _stack_batches(cfg)
    return cfg


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
        mmscalablevit.engine.cli.UserError: test_dataloader: data/coco/val.json does not exist; ...
    """
    for loader in loaders:
        for path in _data_paths((cfg.get(loader) or {}).get('dataset') or {}):
            if '://' not in path and not osp.exists(path):
                raise UserError(
                    f'{loader}: {path} does not exist; put the data there or name its folder with '
                    f'--cfg-options {loader}.dataset.data_root=DIR'
                )
    for loader in loaders:
        for leaf in data_sets((cfg.get(loader) or {}).get('dataset') or ConfigDict()):
            with config_errors(cfg):
                faults = list(data_set_faults(cfg, loader, leaf))
            if faults:
                more = f' (and {len(faults) - 1} more faults)' if len(faults) > 1 else ''
                raise UserError(
                    f'{loader}: {faults[0]}{more}; '
                    'tools/dataset_converters/check_data.py lists all faults of the data'
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
    if strict or cfg.get('load_from'):
        _load_strictly(runner)
    runner.register_hook(_SameClassesHook() if strict else _NewClassesHook())
    runner.register_hook(_SameBuffersHook())
    return runner


@contextlib.contextmanager
def config_errors(cfg: Config, fails: str = 'cannot be built') -> Iterator[None]:
    """Turn the errors of building from a wrong config into a ``UserError`` that names it.

    Args:
        cfg (Config): The config.
        fails (str): What the config does, for the message. Defaults to 'cannot be built'.

    Raises:
        UserError: In place of what modules raise for unknown types and bad arguments.

    Example:
        >>> with config_errors(Config(filename='my_config.py')):
        ...     raise TypeError("unexpected keyword argument 'depht'")
        Traceback (most recent call last):
        mmscalablevit.engine.cli.UserError: config my_config.py cannot be built: TypeError: ...
    """
    try:
        yield
    except CheckpointError:
        raise
    except _BUILD_ERRORS as error:
        print_log(traceback.format_exc(), logger='current', level=logging.DEBUG)
        raise UserError(f'config {cfg.filename} {fails}: {_reason(error)}') from error


def _reason(error: Exception) -> str:
    # str() of a KeyError is its message in quotes.
    message = str(error.args[0] if isinstance(error, KeyError) and error.args else error)
    # numpy says so of a list of images that is empty.
    if 'need at least one array to concatenate' in message:
        return 'a data set has no image left after its filter_cfg, such as min_size'
    if not message:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        message = f'{frame.line} ({frame.filename}:{frame.lineno})'
    return f'{type(error).__name__}: {one_line(message, 500)}'


@contextlib.contextmanager
def disk_errors(folder: str) -> Iterator[None]:
    """Turn the errors of a full or read-only disk into a ``UserError`` that names the file.

    Args:
        folder (str): The folder that is written to, for errors that come without a name.

    Raises:
        UserError: In place of these errors.

    Example:
        >>> with disk_errors('work_dirs'), open('/dev/full', 'w') as file:
        ...     file.write('text')
        Traceback (most recent call last):
        mmscalablevit.engine.cli.UserError: cannot write to work_dirs: No space left on device; ...
    """
    # Else each line that does not fit into the log file prints a traceback.
    raise_exceptions, logging.raiseExceptions = logging.raiseExceptions, False
    try:
        yield
    except OSError as error:
        if error.errno not in _DISK_ERRORS:
            raise
        raise UserError(
            f'cannot write to {error.filename or folder}: {error.strerror}; once it can be '
            'written to, --resume continues from the last checkpoint'
        ) from error
    finally:
        logging.raiseExceptions = raise_exceptions


def load_weights(model: nn.Module, filename: str, config: str) -> dict:
    """Load a checkpoint that must hold exactly the model's parameters.

    Args:
        model (nn.Module): The model.
        filename (str): The checkpoint, a local file.
        config (str): The model's config, for the message.

    Returns:
        dict: What the checkpoint holds.

    Raises:
        FileNotFoundError: If there is no such file.
        CheckpointError: If it cannot be read, does not fit, is of another precision, or holds NaN
            or infinite values; the message names what differs.

    Example:
        >>> model = torch.nn.Linear(2, 1)
        >>> torch.save(model.state_dict(), '/tmp/linear.pth')
        >>> load_weights(model, '/tmp/linear.pth', 'my_config.py').keys()
        odict_keys(['weight', 'bias'])
    """
    checkpoint = read_checkpoint(filename, map_location='cpu')
    weights = find_weights(checkpoint, filename)
    check_values(weights, filename, model.state_dict())
    try:
        model.load_state_dict(weights)
    # The file holds versions of the layers, too, on which their code relies.
    except Exception as error:
        raise _misfit(filename, config, error) from error
    return checkpoint


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
    if cfg.launcher == 'pytorch' and not torch.distributed.is_initialized():
        # mmengine would select a CUDA device first.
        torch.distributed.init_process_group('gloo')
        cfg.model_wrapper_cfg = dict(
            type='MMDistributedDataParallel',
            device_ids=None,
            broadcast_buffers=False,
            find_unused_parameters=cfg.get('find_unused_parameters', False),
        )
        cfg.sync_bn = None
        print_log('No accelerator: gloo on CPU, where BN layers are not synchronized', 'current')


def _data_paths(dataset: ConfigDict) -> Iterator[str]:
    if dataset.get('type') in _DOWNLOADED:
        return
    for nested in [dataset.get('dataset'), *dataset.get('datasets', [])]:
        if nested:
            yield from _data_paths(nested)
    root = dataset.get('data_root') or ''
    if root:
        yield root
    prefix = dataset.get('data_prefix') or {}
    names = [dataset.get('ann_file'), *(prefix.values() if isinstance(prefix, dict) else [prefix])]
    yield from (osp.join(root, name) for name in names if isinstance(name, str) and name)


def _refuse(cfg: Config, faults: Iterable[str]) -> None:
    for fault in faults:
        raise UserError(f'config {cfg.filename}: {fault}')


def _explain_first_iteration(cfg: Config, loop: BaseLoop) -> None:
    # What of a config does not fit together, such as numbers of channels, shows there.
    run_iter = loop.run_iter

    def run_first(*args, **kwargs) -> None:
        loop.run_iter = run_iter
        with config_errors(cfg, 'fails in its first iteration'):
            run_iter(*args, **kwargs)

    loop.run_iter = run_first


def _end_workers_with_job(loader: DataLoader) -> None:
    """Make the workers of a data loader end with its process, also where that is killed.

    torch's workers notice it, but then wait to hand over what they loaded, which nobody takes.
    """
    loader.worker_init_fn = functools.partial(_start_worker, loader.worker_init_fn)


def _start_worker(init: Callable[[int], None] | None, worker_id: int) -> None:
    def end_with(parent: int) -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=end_with, args=[os.getppid()], daemon=True).start()
    if init is not None:
        init(worker_id)


def _load_strictly(runner: Runner) -> None:
    """Make the runner refuse a checkpoint that does not fit its model; mmengine only warns."""
    load_checkpoint, resume = runner.load_checkpoint, runner.resume
    check = _CheckWeightsHook()
    runner.register_hook(check, priority='HIGHEST')

    def load(filename: str, *args, **kwargs) -> dict:
        check.filename = filename
        try:
            return load_checkpoint(filename, *args, **{**kwargs, 'strict': True})
        except (CheckpointError, OSError):
            raise
        except Exception as error:
            raise _misfit(filename, runner.cfg.filename, error) from error

    def resume_strictly(filename: str, *args, **kwargs) -> None:
        try:
            resume(filename, *args, **kwargs)
        except (CheckpointError, OSError, UserError):
            raise
        except Exception as error:
            raise CheckpointError(
                f'checkpoint {filename} cannot be resumed from, as its training state is missing '
                f'or does not fit {runner.cfg.filename} '
                f'({one_line(f"{type(error).__name__}: {error}", 200)})'
            ) from error

    runner.load_checkpoint, runner.resume = load, resume_strictly


def _misfit(filename: str, config: str, error: Exception) -> CheckpointError:
    # The first line only says that model and checkpoint differ.
    lines = [line for line in str(error).splitlines() if line.strip()]
    lines = lines[1:] or lines
    found = '; '.join(one_line(line, 120) for line in lines[:3])
    return CheckpointError(
        f'checkpoint {filename} does not fit the model of {config}: {found} '
        '(weights of the backbone alone belong to model.backbone.init_cfg)'
    )


class _CheckWeightsHook(Hook):
    """Checks what a checkpoint holds before the runner takes any of it."""

    filename = ''

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        weights = find_weights(checkpoint, self.filename)
        # Wrappers of a model put this before its names, in the checkpoint or in the model.
        parameters = {_unwrapped(k): v for k, v in runner.model.state_dict().items()}
        check_values({_unwrapped(k): v for k, v in weights.items()}, self.filename, parameters)
        if not runner.cfg.get('resume'):
            return
        # Of an EMAHook: the model's own weights, while state_dict holds the averaged ones.
        states = {'ema_state_dict': checkpoint.get('ema_state_dict') or {}}
        moments = (checkpoint.get('optimizer') or {}).get('state') or {}
        states.update({f'optimizer.state.{index}': state for index, state in moments.items()})
        for where, state in states.items():
            values = {f'{where}.{k}': v for k, v in state.items()}
            tensors = {k: v for k, v in values.items() if isinstance(v, torch.Tensor)}
            check_values(tensors, self.filename, tensors)


def _unwrapped(name: str) -> str:
    return name.removeprefix('module.')


class _SameClassesHook(Hook):
    """Refuses a checkpoint of the data set's classes in another order; warns of other classes."""

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        name = 'train_dataloader' if runner.cfg.get('resume') else 'test_dataloader'
        wanted = (getattr(runner, name).dataset.metainfo or {}).get('classes')
        meta = (checkpoint.get('meta') or {}).get('dataset_meta') or {}
        trained = meta.get('classes', meta.get('CLASSES'))
        if not wanted or not trained or len(wanted) != len(trained):
            return
        there, here = list(map(_plain, trained)), list(map(_plain, wanted))
        if there == here:
            return
        i = next(i for i, plain in enumerate(there) if plain != here[i])
        names = f'class {i} is {one_line(trained[i])!r} there and {wanted[i]!r} here'
        said = f'checkpoint {runner.cfg.load_from} was trained for'
        if sorted(there) == sorted(here):
            raise CheckpointError(f'{said} the classes of {name} in another order: {names}')
        print_log(
            f'{said} other classes than {name} has: {names}',
            logger='current',
            level=logging.WARNING,
        )


def _plain(name: str) -> str:
    """A class's name without what its spellings differ in: case, spaces, hyphens, underscores."""
    return re.sub(r'[\s_-]', '', str(name)).lower()


class _SameBuffersHook(Hook):
    """Lets every rank validate the model that rank 0 saves.

    Without SyncBN each rank has its own statistics in the buffers of BN.
    """

    def before_val_epoch(self, runner: Runner) -> None:
        for buffer in runner.model.buffers():
            broadcast(buffer)


class _NewClassesHook(Hook):
    """Keeps the model's own weights where ``load_from`` has those of another number of classes."""

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        weights = checkpoint.get('state_dict', checkpoint)
        # The classes are the outputs of a layer, and no layer of the backbone depends on them.
        kept = {
            key: value
            for key, value in model.state_dict().items()
            if key in weights
            and not key.startswith('backbone.')
            and weights[key].shape != value.shape
            and weights[key].shape[1:] == value.shape[1:]
        }
        weights.update(kept)
        if kept:
            print_log(
                'Layers of another number of classes start anew: ' + ', '.join(kept),
                logger='current',
                level=logging.WARNING,
            )
