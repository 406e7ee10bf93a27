# Copyright (c) mmscalablevit contributors. All rights reserved.
"""Reading checkpoints as untrusted input: damage is found, and no code is run.

What PyTorch writes since 1.6 is a zip archive with a checksum of every record, so any change of a
byte that means something is found. Its older format and safetensors have none: what breaks their
structure is found, but another number in the place of a weight is not.
"""

import argparse
import codecs
import functools
import os.path as osp
import pickle
import re
import tarfile
import zipfile
from collections import OrderedDict
from collections.abc import Callable

import numpy as np
import torch
from mmengine.logging import HistoryBuffer, print_log
from torch import Tensor, nn

from ..errors import CheckpointError, one_line, shorten

# Attribute of a folder in zip archives.
_FOLDER = 0x10
_PRECISIONS = {torch.float16, torch.bfloat16, torch.float32, torch.float64}
# What torch.compile, FSDP and gradient checkpointing put into names, at any depth; and what
# distributed training and moving averages put before them.
_INSIDE = re.compile(r'(?<![^.])(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.')
_BEFORE = re.compile(r'^(?:(?:module|ema_model)\.)*(backbone\.)?(?:(?:module|ema_model)\.)*')
# How often a moving average was updated, in torch, mmengine and ema_pytorch.
_COUNTERS = ('n_averaged', 'steps', 'step', 'initted')


def read_checkpoint(filename: str, map_location: str | torch.device | None = None) -> dict:
    """Read a local checkpoint with ``weights_only=True``, and compare its checksums.

    Besides tensors and plain containers, only what mmengine's runner writes (numbers and arrays of
    numpy, the history of logged scalars) and the authors' training script adds (its arguments) is
    let through.

    Args:
        filename (str): The file. One that ends in ``.safetensors`` needs that package.
        map_location (str | torch.device | None): Device of the tensors. Defaults to None, the
            device they were saved from.

    Raises:
        FileNotFoundError: If there is no such file.
        CheckpointError: If it is damaged, holds no dict, or holds other Python objects.

    Example:
        >>> torch.save(dict(state_dict=dict(weight=torch.zeros(2))), 'checkpoint.pth')
        >>> read_checkpoint('checkpoint.pth')['state_dict']['weight']
        tensor([0., 0.])
    """
    filename = osp.expanduser(filename)
    check_file(filename)
    try:
        if filename.endswith('.safetensors'):
            from safetensors.torch import load_file

            checkpoint = load_file(filename, device=str(map_location or 'cpu'))
        else:
            checkpoint = _read_pickled(filename, map_location)
    except (ImportError, PermissionError):
        raise
    # A damaged file fails anywhere in its reader, with errors of many types.
    except Exception as error:
        raise CheckpointError(f'checkpoint {filename} {_reason(error)}') from error
    if not isinstance(checkpoint, dict):
        raise CheckpointError(
            f'checkpoint {filename} holds a {type(checkpoint).__name__} and not a dict of weights'
        )
    _check_plain(checkpoint, filename)
    if not isinstance(checkpoint.get('meta') or {}, dict):
        raise CheckpointError(f'checkpoint {filename} has a meta that is not a dict')
    return checkpoint


def check_file(filename: str) -> None:
    """Check that a checkpoint is a file, before it is opened: a pipe would wait for its end."""
    if not osp.exists(filename):
        raise FileNotFoundError(f'checkpoint {filename} does not exist')
    if not osp.isfile(filename):
        raise CheckpointError(f'checkpoint {filename} is a directory or device, not a file')


def find_weights(
    checkpoint: dict, filename: str, wrappers: tuple[str, ...] = ('state_dict',)
) -> dict[str, Tensor]:
    """Find the weights in a checkpoint and check that they are plain tensors with names.

    They may be bare, or under one of the keys ``wrappers``, of which the first that is there is
    taken. What ``torch.compile``, distributed training, FSDP and moving averages put into names is
    removed, counters of the latter are left out, and both are logged.

    Raises:
        CheckpointError: If there are none, or others than named dense tensors.

    Example:
        >>> weights = {'module.fc.weight': torch.zeros(2)}
        >>> list(find_weights(dict(state_dict=weights), 'ddp.pth'))
        ['fc.weight']
    """
    found = [key for key in wrappers if isinstance(checkpoint.get(key), dict)]
    if found[1:]:
        others = ' or '.join(map(repr, found[1:]))
        print_log(f'checkpoint {filename}: took {found[0]!r}, not {others}', logger='current')
    weights = checkpoint[found[0]] if found else checkpoint
    _check_plain(weights, filename)
    if not weights:
        raise CheckpointError(f'checkpoint {filename} holds no weights')
    others = [k for k, v in weights.items() if not isinstance(k, str) or not _is_dense(v)]
    if others:
        raise CheckpointError(
            f'checkpoint {filename} holds entries other than named dense tensors '
            f'({shorten(others)})'
        )
    return _without_wrappers(weights, filename)


def check_values(
    weights: dict[str, Tensor], filename: str, parameters: dict[str, Tensor] | None = None
) -> None:
    """Check that weights are numbers, and of a precision that a model's parameters can hold.

    Lower precision than the model's is exact there, so it is taken, with a line in the log.
    Without parameters, weights of any precision are taken.
    """
    widened = set()
    for name, tensor in weights.items():
        held, wanted = tensor.dtype, (parameters or {}).get(name, tensor).dtype
        if parameters is None and held not in _PRECISIONS:
            wanted = torch.float32
        if held != wanted:
            exact = {held, wanted} <= _PRECISIONS and torch.promote_types(held, wanted) == wanted
            if not exact:
                raise CheckpointError(
                    f'checkpoint {filename} holds {one_line(name)} as {held}, but the model has it '
                    f'as {wanted}; cast such weights to {wanted} and save them again'
                )
            widened.add(f'{held} are widened to {wanted}')
        if held in _PRECISIONS and not tensor.isfinite().all():
            raise CheckpointError(
                f'checkpoint {filename} holds NaN or infinite values in {one_line(name)}'
            )
    for change in widened:
        print_log(f'checkpoint {filename}: weights of {change}, exactly', logger='current')


def load_weights(model: nn.Module, filename: str, config: str) -> dict:
    """Load a local checkpoint that must hold exactly the model's parameters, and return all of it.

    A ``CheckpointError`` says what differs from the model of ``config``, a path for messages.
    """
    checkpoint = read_checkpoint(filename, map_location='cpu')
    weights = find_weights(checkpoint, filename)
    check_values(weights, filename, model.state_dict())
    try:
        model.load_state_dict(weights)
    # The file holds versions of the layers, too, on which their code relies.
    except Exception as error:
        raise misfit(filename, config, error) from error
    return checkpoint


def misfit(filename: str, config: str, error: Exception | str) -> CheckpointError:
    """Return the error for a checkpoint on which ``load_state_dict`` failed, or why it did."""
    lines = [one_line(line, 120) for line in str(error).splitlines() if line.strip()]
    # The first of several lines only says that model and checkpoint differ.
    found = '; '.join(lines[1:4] or lines)
    return CheckpointError(
        f'checkpoint {filename} does not fit the model of {config}: {found} '
        '(weights of the backbone alone belong to model.backbone.init_cfg)'
    )


def _without_wrappers(weights: dict[str, Tensor], filename: str) -> dict[str, Tensor]:
    def plain(name: str) -> str:
        return _BEFORE.sub(r'\1', _INSIDE.sub('', name))

    names = {name: plain(name) for name in weights}
    counters = [k for k, new in names.items() if new in _COUNTERS and weights[k].numel() == 1]
    changed = [name for name, new in names.items() if name != new]
    if not changed and not counters:
        return weights
    left = OrderedDict((names[k], v) for k, v in weights.items() if k not in counters)
    if len(left) < len(names) - len(counters):
        raise CheckpointError(f'checkpoint {filename} holds some weights under two names')
    # Versions of the layers, by their names.
    metadata = getattr(weights, '_metadata', None)
    if isinstance(metadata, dict):
        left._metadata = OrderedDict((plain(f'{k}.')[:-1], v) for k, v in metadata.items())
    notes = [f'{shorten(counters)} left out'] if counters else []
    notes += [f'{one_line(name)} is read as {one_line(names[name])}' for name in changed[:1]]
    print_log(f'checkpoint {filename}: {"; ".join(notes)}', logger='current')
    return left


def _read_pickled(filename: str, map_location: str | torch.device | None) -> object:
    with open(filename, 'rb') as file:
        is_zip = file.read(4) == b'PK\x03\x04'
    if is_zip:
        _check_records(filename)
    # Before PyTorch 2.6 code in such a file is run in spite of weights_only.
    elif tarfile.is_tarfile(filename):
        raise ValueError('a tar archive of PyTorch before 0.1.12 or of other tools')
    before = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    torch.serialization.add_safe_globals(_allowed())
    try:
        return torch.load(filename, map_location=map_location, weights_only=True)
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)


def _check_records(filename: str) -> None:
    """Compare every record with its checksum; PyTorch's reader does not."""
    with zipfile.ZipFile(filename) as archive:
        records = archive.infolist()
        # PyTorch stores weights as they are; of compressed or overlapping records a small file
        # could unfold to any size, and for folders its reader shows what was in memory.
        compressed = any(record.compress_type != zipfile.ZIP_STORED for record in records)
        folders = any(record.is_dir() or record.external_attr & _FOLDER for record in records)
        names = {record.filename for record in records}
        size = sum(record.file_size for record in records)
        if compressed or folders or len(names) < len(records) or size > osp.getsize(filename):
            raise ValueError('records that are compressed, overlap, or are folders')
        damaged = archive.testzip()
    if damaged:
        raise ValueError(f'checksum of {damaged} is wrong')


def _check_plain(content: dict, filename: str) -> None:
    # A pickle can give an OrderedDict attributes, which then hide its methods.
    attributes = [name for name in getattr(content, '__dict__', ()) if name != '_metadata']
    if attributes:
        names = shorten(attributes)
        raise CheckpointError(f'checkpoint {filename} holds a dict with attributes ({names})')


def _is_dense(tensor: object) -> bool:
    """Whether it is a tensor that holds its numbers, each as such."""
    return (
        isinstance(tensor, Tensor)
        and tensor.layout == torch.strided
        and not (tensor.is_nested or tensor.is_quantized or tensor.is_meta)
        # A view of any size can stand for one stored number.
        and tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()
    )


def _reason(error: Exception) -> str:
    forbidden = re.search(r'GLOBAL ([\w.]+)', str(error))
    if isinstance(error, pickle.UnpicklingError) and forbidden:
        return (
            f'holds pickled Python code ({one_line(forbidden[1])}) and is refused; if you trust '
            'it, load it yourself and save its weights alone: '
            'torch.save(dict(state_dict=WEIGHTS), FILE)'
        )
    message = str(error).split('WeightsUnpickler error: ')[-1]
    return f'is damaged or no checkpoint ({one_line(f"{type(error).__name__}: {message}", 170)})'


@functools.cache
def _allowed() -> list[Callable]:
    codes = np.typecodes['AllInteger'] + np.typecodes['AllFloat'] + '?'
    allowed = [HistoryBuffer, np.ndarray, np.dtype, *{type(np.dtype(code)) for code in codes}]
    allowed.append(_named(_statistics_method, 'builtins.getattr'))
    # Of the authors' arguments, and of bytes, which torch from 2.5 on allows by itself.
    allowed += [argparse.Namespace, codecs.encode]
    # numpy 1 and 2 write different module names for the same two functions.
    for function in (np.zeros(1).__reduce__()[0], np.float64(0).__reduce__()[0]):
        for module in ('numpy.core.multiarray', 'numpy._core.multiarray'):
            allowed.append(_named(function, f'{module}.{function.__name__}'))
    return allowed


def _named(function: Callable, path: str) -> Callable:
    """``function`` under the name by which a pickle asks for it."""
    call = functools.partial(function)
    call.__module__, call.__name__ = path.rsplit('.', 1)
    call.__qualname__ = call.__name__
    return call


def _statistics_method(owner: type, name: str) -> Callable:
    # A HistoryBuffer is pickled with its statistics methods, each as getattr(HistoryBuffer, name).
    if owner is not HistoryBuffer or name.startswith('_'):
        raise pickle.UnpicklingError(f'GLOBAL builtins.getattr of {name!r} is not allowed')
    return getattr(owner, name)
