# Copyright (c) mmscalablevit contributors. All rights reserved.
"""The published results, which the metafiles of the configs hold."""

from dataclasses import dataclass
from pathlib import Path

import yaml

from .errors import UserError


@dataclass(frozen=True)
class Published:
    """A model of a metafile."""

    name: str
    config: Path
    metrics: dict[str, float]
    source: str = ''


def read_published(configs: Path) -> dict[str, Published]:
    """Read the metafiles of the configs."""
    models = {}
    for path in sorted(configs.glob('*/metafile.yml')):
        try:
            for model in yaml.safe_load(path.read_text(encoding='utf-8'))['Models']:
                name, config = model['Name'], configs.parent / model['Config']
                found = [result['Metrics'].items() for result in model.get('Results') or []]
                metrics = {key: float(value) for items in found for key, value in items}
                source = str((model.get('Metadata') or {}).get('Results Source', ''))
                models[name] = Published(name, config, metrics, source)
        except (yaml.YAMLError, KeyError, TypeError, AttributeError, ValueError) as error:
            raise UserError(f'{path} cannot be read: {type(error).__name__}: {error}') from error
    return models
