# Copyright (c) mmscalablevit contributors. All rights reserved.
"""The experiments that train_all.py trains: found by name, with their data."""

import fnmatch
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from mmengine.config import Config

from mmscalablevit.errors import UserError
from mmscalablevit.published import read_published

TOOLS = Path(__file__).resolve().parent
CONFIGS = TOOLS.parent / 'configs'
RESULTS = TOOLS.parent / 'docs' / 'results'
GROUPS = {
    'paper': 'every experiment of ScalableViT with a published result',
    'baselines': 'the same trainings with Swin-T and Twins-SVT-S',
    'all': 'every config of detection and segmentation',
    'small-data': 'every row of docs/results.md, compared with the page',
}
# Of the folders that --raw holds: what converts each to the folder in data/ that its configs read.
CONVERTERS = {
    'bccd': 'voc_to_coco.py --classes RBC,WBC,Platelets --leave-out',
    'nuclei': 'instance_maps_to_coco.py --classes nucleus',
    'camvid': 'masks_to_labels.py --images {split} --masks {split}annot --ignore 11 --classes '
    'Sky,Building,Pole,Road,Pavement,Tree,SignSymbol,Fence,Car,Pedestrian,Bicyclist',
}


@dataclass(frozen=True)
class Experiment:
    """A config, its work directory, and the options that replace settings of the config.

    A row of a page of results has its seed as well.
    """

    config: Path
    work_dir: Path
    options: dict
    seed: int | None = None

    @property
    def name(self) -> str:
        """The name of the work directory."""
        return self.work_dir.name

    def load(self) -> Config:
        """Read the config and put the options into it."""
        cfg = Config.fromfile(self.config, import_custom_modules=False)
        try:
            cfg.merge_from_dict(self.options)
            if self.seed is not None:
                cfg.merge_from_dict({'randomness.seed': self.seed})
        except (TypeError, KeyError, IndexError) as error:
            raise UserError(f'--cfg-options: {error}') from error
        return cfg


def select(chosen: list[str], work_root: Path, options: dict) -> list[Experiment]:
    """Find the experiments, each once, that names, globs, groups and files stand for."""
    paths = [p for p in sorted(CONFIGS.glob('*/*.py')) if p.parent.name != '_base_']
    found = []
    for text in chosen:
        if text == 'small-data':
            matches = _rows()
        elif text in GROUPS:
            matches = _group(text, paths)
        elif text.endswith('.py') and Path(text).is_file():
            matches = [Path(text)]
        else:
            matches = _matching(text.removeprefix('configs/').removesuffix('.py'), paths)
        if not matches:
            raise UserError(
                f'no config in {CONFIGS} matches {text!r}; give a name or glob such as '
                f"'mask-rcnn_*_1x_coco' or 'segmentation/*', or a group: {', '.join(GROUPS)}"
            )
        found += matches
    rows = {}
    for match in found:
        path, seed = match if isinstance(match, tuple) else (match, None)
        rows.setdefault(path.stem + (f'_seed{seed}' if seed else ''), (path, seed))
    return [Experiment(path, work_root / n, options, seed) for n, (path, seed) in rows.items()]


def _rows() -> list[tuple[Path, int]]:
    """The configs and seeds of the compact logs behind the page."""
    logs = [json.loads(path.read_text()) for path in sorted(RESULTS.glob('*.json'))]
    return [(CONFIGS / 'small_data' / f'{log["config"]}.py', log['seed']) for log in logs]


def _group(name: str, paths: list[Path]) -> list[Path]:
    dense = [path for path in paths if path.parent.name in ('detection', 'segmentation')]
    if name == 'all':
        return dense
    if name == 'baselines':
        return [path for path in dense if 'scalablevit' not in path.stem]
    measured = {name for name, model in read_published(CONFIGS).items() if model.metrics}
    return [path for path in dense if 'scalablevit' in path.stem and path.stem in measured]


def _matching(pattern: str, paths: list[Path]) -> list[Path]:
    named = [(path, (path.stem, f'{path.parent.name}/{path.stem}')) for path in paths]
    return [path for path, names in named if any(fnmatch.fnmatchcase(n, pattern) for n in names)]


def convert(raw: Path, experiments: list[Experiment]) -> None:
    """Convert the small data sets that experiments need and ``data/`` lacks."""
    for name, line in CONVERTERS.items():
        source, out = raw / name, Path('data', name)
        if out.exists() or not any(f'_{name}-' in e.config.stem for e in experiments):
            continue
        script, *options = line.split()
        script = TOOLS / 'dataset_converters' / script
        if subprocess.run([sys.executable, script, source, out, *options]).returncode:
            raise UserError(f'{source} could not be converted; see above')
