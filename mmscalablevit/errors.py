# Copyright (c) mmscalablevit contributors. All rights reserved.
"""Errors of users, as one sentence that names what to change."""

import contextlib
import errno
import logging
import traceback
from collections.abc import Iterator

from mmengine.config import Config
from mmengine.logging import print_log

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
_SHOWN_NAMES = 4


class CheckpointError(RuntimeError):
    """A checkpoint file that cannot be read, or does not fit; the message names file and reason."""


def one_line(text: object, width: int = 100) -> str:
    r"""Text of a foreign file as a message can show it: one line, short, without control codes.

    Args:
        text (object): The text, or what is to be shown as text.
        width (int): Longest result. Defaults to 100.

    Returns:
        str: The text.

    Example:
        >>> one_line('weight\n' * 100, 20)
        'weight weight w ...'
    """
    # Cut first: the text may be of any length.
    words = ' '.join(str(text)[: 4 * width].split())
    shown = ''.join(c if c.isprintable() else '?' for c in words)
    return shown if len(shown) <= width else f'{shown[: width - 4].rstrip()} ...'


def shorten(names: list) -> str:
    """List the first of many names.

    Args:
        names (list): The names.

    Returns:
        str: The first four, and how many more there are.

    Example:
        >>> shorten(['a', 'b', 'c', 'd', 'e', 'f'])
        'a, b, c, d, ... 2 more'
    """
    shown = ', '.join(map(one_line, names[:_SHOWN_NAMES]))
    more = len(names) - _SHOWN_NAMES
    return f'{shown}, ... {more} more' if more > 0 else shown


class DataError(Exception):
    """A fault in an image or its annotation; the message is one sentence that names the file."""


class UserError(Exception):
    """A mistake in what the user gave: reported as one sentence, without a traceback."""


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
        mmscalablevit.errors.UserError: config my_config.py cannot be built: TypeError: ...
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
        mmscalablevit.errors.UserError: cannot write to work_dirs: No space left ...
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
