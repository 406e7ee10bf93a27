# Copyright (c) mmscalablevit contributors. All rights reserved.
"""What the package needs around it: versions of its dependencies, a torchvision that fits torch."""

import contextlib
import importlib
import importlib.metadata
import re
import warnings

_MINIMUM = {'mmengine': (0, 8, 3), 'mmcv': (2, 0, 0)}
# What ships each import name: the maintained family, then the original one.
_DISTRIBUTIONS = {
    'mmengine': ('onedl-mmengine', 'mmengine', 'mmengine-lite'),
    'mmcv': ('onedl-mmcv', 'mmcv', 'mmcv-lite'),
}
_INSTALL = (
    'Run `make env` in a clone, or `pip install onedl-mmengine` and then, after torch, ninja and '
    'psutil, `pip install --no-build-isolation onedl-mmcv`; docs/getting_started.md says more.'
)


def check_dependencies() -> None:
    """Check that mmengine and mmcv are importable and recent enough; say what to install.

    Two families of distributions ship these import names, so that they cannot be requirements of
    the package: pip would install one over the other. Where it did all the same, a warning says so.
    """
    for name, minimum in _MINIMUM.items():
        needed = f'mmscalablevit needs {name}>={".".join(map(str, minimum))}'
        try:
            found = importlib.import_module(name).__version__
        except ImportError as error:
            raise ImportError(
                f'{needed}, which cannot be imported ({error}). {_INSTALL}'
            ) from error
        if _release(found) < minimum:
            raise ImportError(f'{needed}, found {found}. {_INSTALL}')
        _warn_of_mixture(name)


def _warn_of_mixture(name: str) -> None:
    found = []
    for distribution in _DISTRIBUTIONS[name]:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found.append(f'{distribution} {importlib.metadata.version(distribution)}')
    if len(found) > 1:
        warnings.warn(
            f'{" and ".join(found)} are both installed and both ship {name}, so that one has '
            'overwritten files of the other. Uninstall both and install one again.',
            stacklevel=3,
        )


def _release(version: str) -> tuple[int, ...]:
    match = re.match(r'\d+(\.\d+)*', version)
    return tuple(map(int, match.group().split('.'))) if match else ()


def torchvision_requirement() -> str:
    """Return the arguments of ``pip install`` for the torchvision that fits the installed torch."""
    release, _, build = importlib.metadata.version('torch').partition('+')
    major, minor, patch = release.split('.')[:3]
    # torch 2.4 has 0.19, and so on.
    requirement = f'torchvision=={int(major) - 2}.{int(minor) + 15}.{patch}'
    index = f' --index-url https://download.pytorch.org/whl/{build}' if build else ''
    return requirement + index


def torchvision_fault() -> str | None:
    """Return in one sentence why torchvision cannot be imported and how to cure it, or None.

    mmpretrain imports it, and mmdet imports mmpretrain where it is installed.
    """
    cure = f'`pip install --force-reinstall --no-deps {torchvision_requirement()}`'
    try:
        importlib.import_module('torchvision')
    except ModuleNotFoundError:
        return f'torchvision is not installed: {cure}.'
    # Its compiled operators raise what their loader raises: OSError, RuntimeError, ImportError.
    except Exception as error:
        found, torch = map(importlib.metadata.version, ('torchvision', 'torch'))
        reason = str(error).strip().splitlines()[-1]
        return f'torchvision {found} does not fit torch {torch} ({reason}): {cure}.'
    return None
