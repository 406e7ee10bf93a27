# Copyright (c) mmscalablevit contributors. All rights reserved.
"""What ``tools/train.py`` and ``tools/test.py`` share: arguments, config, checks, runner."""

import argparse
import importlib
import logging
import os
import os.path as osp
import signal
import sys
import textwrap
import traceback
from collections.abc import Callable, Iterable, Sequence
from typing import NoReturn

from mmengine.config import Config, DictAction
from mmengine.logging import print_log
from mmengine.registry import RUNNERS
from mmengine.runner import Runner
from rich.box import MARKDOWN
from rich.console import Console
from rich.table import Table

from .compat import torchvision_fault
from .engine.hosts import disconnect
from .engine.runner import KNOWN_KEYS
from .errors import (
    DISK_ERRORS,
    CheckpointError,
    DataError,
    UserError,
    config_errors,
    explain,
    interruptible,
)

_DISTRIBUTIONS = {
    'mmdet': 'onedl-mmdetection',
    'mmseg': 'onedl-mmsegmentation',
    'mmpretrain': 'onedl-mmpretrain',
}
_PATH_ERRORS = (
    FileExistsError,
    FileNotFoundError,
    IsADirectoryError,
    NotADirectoryError,
    PermissionError,
)


class HelpFormatter(argparse.HelpFormatter):
    """Breaks help texts at spaces alone, to keep paths whole, and examples by backslashes."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        end = ' \\\n    ' if text.startswith('example:') else '\n'
        paragraphs = (self._split_lines(part, width - 4) for part in text.split('\n\n'))
        return '\n\n'.join(end.join(lines) for lines in paragraphs)

    def _split_lines(self, text: str, width: int) -> list[str]:
        text = ' '.join(text.split())
        return textwrap.wrap(text, width, break_on_hyphens=False, break_long_words=False)


def run(main: Callable[[], None]) -> None:
    """Run a tool and end it with one sentence and exit code 1 where the user erred.

    ``UserError``, ``CheckpointError``, ``DataError`` and the errors of full disks and of paths that
    are missing, forbidden or of the wrong kind are mistakes, whose traceback is logged at level
    DEBUG. All others keep theirs. Distributed processes that end well are then disconnected.
    """
    try:
        with interruptible():
            main()
        disconnect()
    except KeyboardInterrupt as error:
        print(error if error.args else 'interrupted', file=sys.stderr)
        # For the shell to know, and to end its loop over several commands, too.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.raise_signal(signal.SIGINT)
    except DataError as error:
        # A data loader's worker puts its traceback into the message; the sentence comes last.
        _end(_last_line(error).split(f'{DataError.__name__}: ', 1)[-1])
    except (UserError, CheckpointError) as error:
        _end(' '.join(str(error).split()))
    except _PATH_ERRORS as error:
        _end(_last_line(error))
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        _end(
            f'cannot write to {error.filename}: {error.strerror}; once it can be written to, '
            '--resume continues from the last checkpoint'
        )


def _end(sentence: str) -> NoReturn:
    print_log(traceback.format_exc(), 'current', logging.DEBUG)
    sys.exit(f'error: {sentence}')


def _last_line(error: Exception) -> str:
    return str(error).strip().splitlines()[-1]


def add_config_options(parser: argparse.ArgumentParser) -> None:
    """Add the option that overrides settings of a config."""
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=DictAction,
        metavar='KEY=VALUE',
        help='settings that replace those of the config, such as train_dataloader.batch_size=4; '
        'lists as KEY="[a,b]" or KEY=a,b, without spaces',
    )


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that training and testing share."""
    parser.add_argument('--work-dir', help='folder of logs and checkpoints')
    add_config_options(parser)
    parser.add_argument(
        '--launcher',
        choices=['none', 'pytorch', 'slurm', 'mpi'],
        default='none',
        help='how distributed processes were started; dist_*.sh and slurm_*.sh set it',
    )
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0, help=argparse.SUPPRESS)


def parse_args(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Parse the command line."""
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
        options (dict, optional): Values by dotted keys, as of ``--cfg-options``. Defaults to None.

    Raises:
        UserError: If the config cannot be read, nothing reads an option, or its toolbox is missing.

    Example:
        >>> Config(dict(train_cfg=dict(max_epochs=12))).dump('short.py')
        >>> read_config('short.py', {'train_cfg.max_epochs': 1}).train_cfg
        {'max_epochs': 1}
    """
    if not osp.isfile(path):
        raise UserError(f'config {path} does not exist')
    try:
        cfg = Config.fromfile(path)
    # A config is Python: anything can go wrong in it, and in modules that it imports.
    except Exception as error:
        _name_torchvision(error)
        imports = [f.name for f in traceback.extract_tb(error.__traceback__)]
        if 'import_modules_from_strings' in imports and not isinstance(error, ImportError):
            explain(error, f'custom_imports of config {path}')
            raise
        raise UserError(f'config {path} cannot be read: {type(error).__name__}: {error}') from error
    _merge_options(cfg, options or {})
    _import_toolbox(cfg)
    if cfg.get('default_scope') == 'mmpretrain':
        # mmpretrain's own tools make these the defaults of its data loaders.
        for loader in filter(cfg.get, ('train_dataloader', 'val_dataloader', 'test_dataloader')):
            cfg[loader].setdefault('collate_fn', dict(type='default_collate'))
            cfg[loader].setdefault('pin_memory', True)
    return cfg


def load_config(args: argparse.Namespace) -> Config:
    """Read the config and put the common arguments into it."""
    cfg = read_config(args.config, args.cfg_options)
    cfg.launcher = args.launcher
    name = osp.splitext(osp.basename(args.config))[0]
    cfg.work_dir = args.work_dir or cfg.get('work_dir') or osp.join('./work_dirs', name)
    return cfg


def markdown_table(
    header: Sequence[str], rows: Iterable[Sequence[str]], width: int = 10_000
) -> str:
    """Format rows as a Markdown table that also reads well in a terminal."""
    table = Table(*header, box=MARKDOWN)
    for row in rows:
        table.add_row(*(cell.replace('|', r'\|') for cell in row))
    console = Console(width=width, markup=False, emoji=False, highlight=False, no_color=True)
    with console.capture() as captured:
        console.print(table)
    return captured.get().strip() + '\n'


def build_runner(cfg: Config) -> Runner:
    """Build the runner that a config names, or ``SafeRunner``."""
    cfg.setdefault('runner_type', 'SafeRunner')
    with config_errors(cfg):
        return RUNNERS.build(cfg)


def _merge_options(cfg: Config, options: dict) -> None:
    for key in options:
        name = key.split('.')[0]
        # Else it would be ignored: a misspelling, or a config's own variable, such as data_root.
        if name not in KNOWN_KEYS:
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
    except RuntimeError as error:
        _name_torchvision(error)
        raise
    # The original mmdet and mmseg assert the version of mmcv.
    except (ImportError, AssertionError) as error:
        raise UserError(
            f'config {cfg.filename} needs {scope}, which cannot be imported ({error}); '
            f'install {_DISTRIBUTIONS[scope]} or the original {scope}'
        ) from error


def _name_torchvision(error: Exception) -> None:
    """Say what is wrong with a torchvision that was built for another torch, and the cure."""
    fault = torchvision_fault() if 'torchvision::' in str(error) else None
    if fault:
        raise UserError(fault) from error
