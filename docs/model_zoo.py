# Copyright (c) mmscalablevit contributors. All rights reserved.
"""Write ``docs/model_zoo.md`` from the metafiles: ``python docs/model_zoo.py``."""

from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]
PAGE = ROOT / 'docs' / 'model_zoo.md'
# Task: its data set, then the columns of its table by the names of the metafile.
TASKS = {
    'detection': ('COCO', ['box AP', 'mask AP']),
    'segmentation': ('ADE20K', ['mIoU', 'mIoU(ms+flip)']),
    'classification': ('ImageNet-1K', ['Top 1 Accuracy']),
}
HEAD = """\
<!-- Written by docs/model_zoo.py from the metafiles of configs/; change those. -->
# Model zoo

Every config with its parameters and FLOPs, and the results that others published. **None of the
results has been reproduced here yet, and no trained weights are offered.**

- FLOPs are multiply-adds, computed from the config and counted as in the published figures: without
  the two matrix products of attention. They differ from the published ones by 1.1 GFLOPs at most
  (457 and 1162 for RetinaNet and UperNet with L).
- S in detection and segmentation is counted as `small-merged`, as published; `small`, which the
  configs build, has 0.38 M parameters less.
- What is inferred in the recipes: the READMEs of
  [detection](../configs/detection/README.md), [segmentation](../configs/segmentation/README.md) and
  [classification](../configs/classification/README.md).
- To compare your trainings with these figures:
  [configs](../configs/README.md#do-i-match-the-paper). Which size to take:
  [choosing a size](sizes.md).
"""


def source(text: str) -> str:
    """Whose result it is, in short."""
    if text == 'none published':
        return '-'
    if 'Twins' in text:
        return 'authors of Twins'
    return 'authors' if text.startswith('published') else text.split(' (')[0]


def table(folder: str) -> str:
    """The section of one folder of configs."""
    dataset, metrics = TASKS[folder]
    columns = ['Config', 'Schedule', 'Params (M)', 'GFLOPs', *metrics, 'Source']
    rows = [columns, ['---'] * len(columns)]
    for model in yaml.safe_load((ROOT / 'configs' / folder / 'metafile.yml').read_text())['Models']:
        metadata = model['Metadata']
        results = {k: v for part in model.get('Results') or [] for k, v in part['Metrics'].items()}
        length = metadata.get('Iterations')
        flops = metadata.get('FLOPs')
        rows.append(
            [
                f'[{model["Name"]}](../{model["Config"]})',
                f'{length // 1000}k iterations' if length else f'{metadata["Epochs"]} epochs',
                f'{metadata["Parameters"] / 1e6:.1f}',
                f'{flops / 1e9:.1f}' if flops else '-',
                *(str(results.get(metric, '-')) for metric in metrics),
                source(metadata['Results Source']),
            ]
        )
    lines = '\n'.join(f'| {" | ".join(row)} |' for row in rows)
    return f'\n## {folder.capitalize()}, {dataset}\n\n{lines}\n'


def page() -> str:
    """The whole page."""
    return HEAD + ''.join(map(table, TASKS))


if __name__ == '__main__':
    PAGE.write_text(page())
    print(f'wrote {PAGE}')
