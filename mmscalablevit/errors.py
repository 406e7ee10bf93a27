# Copyright (c) mmscalablevit contributors. All rights reserved.
"""Errors of users, as one sentence that names what to change."""

import contextlib
import errno
import logging
import re
import traceback
from collections.abc import Iterator

from mmengine.config import Config
from mmengine.logging import print_log

DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}
_SHOWN_NAMES = 4


class CheckpointError(RuntimeError):
    """A checkpoint file that cannot be read, or does not fit; the message names file and reason."""


def one_line(text: object, width: int = 100) -> str:
    """Text of a foreign file as a message can show it: one line, short, without control codes."""
    # Cut first: the text may be of any length.
    words = ' '.join(str(text)[: 4 * width].split())
    shown = ''.join(c if c.isprintable() else '?' for c in words)
    return shown if len(shown) <= width else f'{shown[: width - 4].rstrip()} ...'


def shorten(names: list) -> str:
    """List the first of many names."""
    shown = ', '.join(map(one_line, names[:_SHOWN_NAMES]))
    more = len(names) - _SHOWN_NAMES
    return f'{shown}, ... {more} more' if more > 0 else shown


class DataError(Exception):
    """A fault in an image or its annotation; the message is one sentence that names the file."""


class UserError(Exception):
    """A mistake in what the user gave: reported as one sentence, without a traceback."""


def explain(error: Exception, place: str) -> None:
    """Turn an error that says by itself what is wrong in a config into a ``UserError``."""
    if isinstance(error, (UserError, CheckpointError, DataError, OSError)):
        return
    # str() of a KeyError is its message in quotes.
    message = str(error.args[0] if isinstance(error, KeyError) and error.args else error)
    if _is_mistake(error):
        reason = f'{type(error).__name__}: {one_line(message, 500)}'
        raise UserError(f'{place}: {reason}') from error
    add_note(error, place)


def add_note(error: Exception, note: str) -> None:
    """Add a line below the traceback of an error, or log it where Python (3.10) has no notes."""
    if hasattr(error, 'add_note'):
        error.add_note(f'({note})')
    else:
        print_log(f'{note}: {type(error).__name__}', 'current', logging.ERROR)


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Pass on Ctrl-C where mmengine, formatting a config to log or save it, calls it bad syntax."""
    try:
        yield
    except SyntaxError as error:
        if isinstance(error.__context__, KeyboardInterrupt):
            raise error.__context__ from None
        raise


@contextlib.contextmanager
def config_errors(cfg: Config) -> Iterator[None]:
    """Explain the errors of building from a config, see ``explain``."""
    try:
        yield
    except Exception as error:
        explain(error, f'config {cfg.filename} cannot be built')
        raise


def _is_mistake(error: Exception) -> bool:
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    places = [(f.f_globals.get('__name__', '').split('.')[0], f.f_code.co_name) for f in frames]
    built = [module == 'mmengine' and name.startswith('build_') for module, name in places]
    if built[-1]:
        return isinstance(error, (KeyError, TypeError))
    # A key of the config that a class hands on to its base.
    key = re.search(r"unexpected keyword argument '(\w+)'", str(error))
    builders = [frame for frame, builds in zip(frames, built, strict=True) if builds]
    if key and any(key[1] in (frame.f_locals.get('args') or ()) for frame in builders):
        return True
    # A sentence that somebody wrote, and no accident.
    line = traceback.extract_tb(error.__traceback__)[-1].line or ''
    refused = line.startswith('raise ') and isinstance(error, (KeyError, TypeError, ValueError))
    module, name = places[-1]
    return refused and (module == 'mmscalablevit' or (any(built) and name == '__init__'))
