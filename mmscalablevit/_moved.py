# Copyright (c) mmscalablevit contributors. All rights reserved.
"""Module names of version 0.1, which work for one more version, with a warning."""

import importlib
import sys
import types
import warnings
from typing import Any

# Old module: those that have what it had.
_MOVED = {
    'engine.annotations': ['checks.coco'],
    'engine.benchmark': ['work_dirs'],
    'engine.checkpoint': ['checkpoint.reading', 'checkpoint.weights', 'errors'],
    'engine.checks': ['checks.config'],
    'engine.cli': ['cli'],
    'engine.data': ['checks.pipeline', 'errors'],
    'engine.errors': ['errors'],
    'engine.loading': ['checkpoint.reading', 'engine.runner'],
    'engine.resume': ['engine.checkpoint_hook', 'engine.seed_hook', 'work_dirs'],
    'models.checkpoint': ['checkpoint.released', 'checkpoint.weights', 'checkpoint.reading'],
    'models.embedding': ['models.layers'],
    'models.mlp': ['models.layers'],
}


class _Moved(types.ModuleType):
    def __getattr__(self, name: str) -> Any:
        package, _, old = self.__name__.partition('.')
        for place in () if name.startswith('__') else _MOVED[old]:
            try:
                found = getattr(importlib.import_module(f'{package}.{place}'), name)
            except (AttributeError, ModuleNotFoundError):
                continue
            text = f'{self.__name__}.{name} is now in {package}.{place}'
            warnings.warn(text, DeprecationWarning, stacklevel=2)
            return found
        raise AttributeError(f'module {self.__name__!r} has no attribute {name!r}')


def keep_old_names() -> None:
    """Let the old modules be imported; the new ones are imported where a name is asked for."""
    for old in _MOVED:
        name = f'{__package__}.{old}'
        parent, _, child = name.rpartition('.')
        sys.modules[name] = _Moved(name)
        setattr(sys.modules[parent], child, sys.modules[name])
