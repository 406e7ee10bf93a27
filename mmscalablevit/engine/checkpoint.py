# Copyright (c) mmscalablevit contributors. All rights reserved.
"""Reading checkpoints without running the code that a pickle may carry."""

import argparse
import contextlib
import functools
import os.path as osp
import pickle
import re
import textwrap
from collections.abc import Callable, Iterator

import numpy as np
import torch
from mmengine.logging import HistoryBuffer
from mmengine.runner import CheckpointLoader


class CheckpointError(RuntimeError):
    """A checkpoint file that cannot be read, or does not fit; the message names file and reason."""


def read_checkpoint(filename: str, map_location: str | torch.device | None = None) -> dict:
    """Read a local checkpoint with ``weights_only=True``.

    Besides tensors and plain containers, only what mmengine's runner writes into its own
    checkpoints is let through, numpy numbers and arrays and the history of the logged scalars, and
    the plain namespace of arguments that the authors' training script adds.

    Args:
        filename (str): The file.
        map_location (str | torch.device | None): Device of the tensors. Defaults to None, the
            device they were saved from.

    Returns:
        dict: What the file holds.

    Raises:
        FileNotFoundError: If there is no such file.
        CheckpointError: If it is damaged, holds no dict, or holds Python objects other than those
            above.

    Example:
        >>> import torch
        >>> torch.save(dict(state_dict=dict(weight=torch.zeros(2))), '/tmp/checkpoint.pth')
        >>> read_checkpoint('/tmp/checkpoint.pth')['state_dict']['weight']
        tensor([0., 0.])
    """
    filename = osp.expanduser(filename)
    if not osp.isfile(filename):
        raise FileNotFoundError(f'checkpoint {filename} does not exist')
    try:
        with _mmengine_globals():
            checkpoint = torch.load(filename, map_location=map_location, weights_only=True)
    # A damaged file fails anywhere in torch's reader, with errors of many types.
    except Exception as error:
        raise CheckpointError(f'checkpoint {filename} {_reason(error)}') from error
    if not isinstance(checkpoint, dict):
        raise CheckpointError(
            f'checkpoint {filename} holds a {type(checkpoint).__name__} and not a dict of weights'
        )
    return checkpoint


def use_safe_loader() -> None:
    """Make mmengine read every local checkpoint of this process through ``read_checkpoint``.

    mmengine falls back to unrestricted unpickling where a safe read fails, and the list of names
    it considers safe holds ``getattr``, from which any code can be reached. The tools call this;
    importing the package does not, for other people's scripts to keep the loader they know.

    Example:
        >>> use_safe_loader()
    """
    CheckpointLoader.register_scheme(prefixes='', loader=load_from_local, force=True)


# mmengine's log line shows the name of a loader without its first ten letters.
def load_from_local(filename: str, map_location: str | torch.device | None = None) -> dict:
    """Mmengine's loader of local files, with ``read_checkpoint`` behind it."""
    return read_checkpoint(filename, map_location)


def _reason(error: Exception) -> str:
    forbidden = re.search(r'GLOBAL ([\w.]+)', str(error))
    if isinstance(error, pickle.UnpicklingError) and forbidden:
        return (
            f'holds pickled Python code ({forbidden[1]}) and is refused; if you trust it, load it '
            'yourself and save its weights alone: '
            'torch.save(dict(state_dict=WEIGHTS), FILE)'
        )
    message = str(error).split('WeightsUnpickler error: ')[-1]
    return textwrap.shorten(
        f'is damaged or no checkpoint ({type(error).__name__}: {message})', 200, placeholder=' ...'
    )


@contextlib.contextmanager
def _mmengine_globals() -> Iterator[None]:
    # Before PyTorch 2.4 the list cannot be extended: plain weights load, training states do not.
    if not hasattr(torch.serialization, 'add_safe_globals'):
        yield
        return
    before = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    torch.serialization.add_safe_globals(_allowed())
    try:
        yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)


@functools.cache
def _allowed() -> list[Callable]:
    codes = np.typecodes['AllInteger'] + np.typecodes['AllFloat'] + '?'
    # The authors' training script keeps its arguments beside the weights.
    allowed = [
        argparse.Namespace,
        HistoryBuffer,
        np.ndarray,
        np.dtype,
        *{type(np.dtype(code)) for code in codes},
    ]
    allowed.append(_named(_statistics_method, 'builtins.getattr'))
    # numpy 1 and 2 write different module names for the same two functions.
    for function in (np.zeros(1).__reduce__()[0], np.float64(0).__reduce__()[0]):
        for module in ('numpy.core.multiarray', 'numpy._core.multiarray'):
            allowed.append(_named(function, f'{module}.{function.__name__}'))
    return allowed


def _named(function: Callable, path: str) -> Callable:
    """``function`` under the name by which a pickle asks for it."""

    def call(*args):
        return function(*args)

    call.__module__, call.__name__ = path.rsplit('.', 1)
    call.__qualname__ = call.__name__
    return call


def _statistics_method(owner: type, name: str) -> Callable:
    # A HistoryBuffer is pickled with its statistics methods, each as getattr(HistoryBuffer, name).
    if owner is not HistoryBuffer or name.startswith('_'):
        raise pickle.UnpicklingError(f'GLOBAL builtins.getattr of {name!r} is not allowed')
    return getattr(owner, name)
