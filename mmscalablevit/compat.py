# Copyright (c) mmscalablevit contributors. All rights reserved.
"""What the package needs around it: versions of its dependencies."""

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
