# Copyright (c) mmscalablevit contributors. All rights reserved.
"""The published results, which the metafiles of the configs hold."""

from dataclasses import dataclass
from pathlib import Path

import yaml

from .errors import UserError


@dataclass(frozen=True)
class Published:
    """A model of a metafile.

    Args:
        name (str): The stem of its config.
        config (Path): Its config.
        metrics (dict[str, float]): Published results by name; empty where none were published.
        source (str): Where they come from.
    """

    name: str
    config: Path
    metrics: dict[str, float]
    source: str = ''


def read_published(configs: Path) -> dict[str, Published]:
    """Read the metafiles of the configs.

    Args:
        configs (Path): The folder ``configs`` of the repository or of an installed package.

    Returns:
        dict[str, Published]: Models by the stem of their config.

    Raises:
        UserError: If a metafile is no YAML of the kind that MIM reads.

    Example:
        >>> models = read_published(Path('configs'))  # doctest: +SKIP
        >>> models['mask-rcnn_scalablevit-s_fpn_1x_coco'].metrics  # doctest: +SKIP
        {'box AP': 45.8, 'mask AP': 41.7}
    """
    models = {}
    for path in sorted(configs.glob('*/metafile.yml')):
        try:
            for model in yaml.safe_load(path.read_text(encoding='utf-8'))['Models']:
                published = _read_model(model, configs.parent)
                models[published.name] = published
        except (yaml.YAMLError, KeyError, TypeError, AttributeError, ValueError) as error:
            raise UserError(f'{path} cannot be read: {type(error).__name__}: {error}') from error
    return models


def _read_model(model: dict, root: Path) -> Published:
    metrics = {}
    for result in model.get('Results') or []:
        metrics.update({name: float(value) for name, value in result['Metrics'].items()})
    source = (model.get('Metadata') or {}).get('Results Source', '')
    return Published(model['Name'], root / model['Config'], metrics, str(source))
