# Copyright (c) mmscalablevit contributors. All rights reserved.
"""What the package needs around it: versions of its dependencies, a usable torchvision."""

import importlib
import importlib.machinery
import importlib.metadata
import importlib.util
import re
import sys
import warnings

_MINIMUM = {'mmengine': (0, 8, 3), 'mmcv': (2, 0, 0)}
# What ships each import name: the maintained family, then the original one.
_DISTRIBUTIONS = {
    'mmengine': ('onedl-mmengine', 'mmengine', 'mmengine-lite'),
    'mmcv': ('onedl-mmcv', 'mmcv', 'mmcv-lite'),
}
_INSTALL = (
    'Install the maintained distributions with `pip install onedl-mmengine onedl-mmcv` '
    'or the original ones with `pip install mmengine "mmcv>=2.0.0"`; '
    '`make env` in a clone does all of it.'
)


def check_dependencies() -> None:
    """Check that mmengine and mmcv are importable and recent enough.

    The two import names are shipped by two families of distributions, so they cannot stand in
    the package's requirements: pip would lay one family over the other.
    Where that happened all the same, a warning says so.

    Raises:
        ImportError: If one is missing or too old; the message says what to install.

    Example:
        >>> from mmscalablevit.compat import check_dependencies
        >>> check_dependencies()
    """
    for name, minimum in _MINIMUM.items():
        wanted = '.'.join(map(str, minimum))
        try:
            found = importlib.import_module(name).__version__
        except ImportError as error:
            raise ImportError(
                f'mmscalablevit needs {name}>={wanted}, which cannot be imported '
                f'({error}). {_INSTALL}'
            ) from error
        if _release(found) < minimum:
            raise ImportError(f'mmscalablevit needs {name}>={wanted}, found {found}. {_INSTALL}')
        _warn_of_mixture(name)


def _warn_of_mixture(name: str) -> None:
    found = []
    for distribution in _DISTRIBUTIONS[name]:
        try:
            found.append(f'{distribution} {importlib.metadata.version(distribution)}')
        except importlib.metadata.PackageNotFoundError:
            continue
    if len(found) > 1:
        warnings.warn(
            f'{" and ".join(found)} lie over each other in this environment: both ship {name}. '
            'Uninstall all of them and install one again.',
            stacklevel=3,
        )


def _release(version: str) -> tuple[int, ...]:
    match = re.match(r'\d+(\.\d+)*', version)
    return tuple(map(int, match.group().split('.'))) if match else ()


def declare_torchvision_ops() -> None:
    """Make a torchvision whose compiled half does not fit the installed torch importable.

    torchvision registers shape functions for ``nms`` at import and raises ``RuntimeError:
    operator torchvision::nms does not exist`` if its compiled library could not be loaded (a CUDA
    build beside a CPU torch, say). mmpretrain imports torchvision for its Python transforms alone,
    and mmdet imports mmpretrain where it is installed. Declaring the two operators lets these
    imports through; calling one still fails, with torch's own error. Nothing is done where
    torchvision is missing, imported already, or whole.

    Example:
        >>> from mmscalablevit.compat import declare_torchvision_ops
        >>> declare_torchvision_ops()
    """
    if 'torchvision' in sys.modules:
        return
    package = importlib.util.find_spec('torchvision')
    if package is None or _loads_compiled_ops(package.submodule_search_locations):
        return
    import torch

    for schema in (
        'nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor',
        'qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor',
    ):
        if not hasattr(torch.ops.torchvision, schema.split('(')[0]):
            torch.library.define(
                f'torchvision::{schema.split("(")[0]}', schema[schema.index('(') :]
            )


def _loads_compiled_ops(folders: list[str]) -> bool:
    import torch

    extension = importlib.machinery.PathFinder.find_spec('_C', folders)
    if extension is None:
        return False
    try:
        torch.ops.load_library(extension.origin)
    except OSError:
        return False
    return True
