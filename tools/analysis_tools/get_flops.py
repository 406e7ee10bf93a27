# Copyright (c) mmscalablevit contributors. All rights reserved.
"""Published and computed parameters and FLOPs of every published model, beside Swin and Twins.

The models are those of the configs. They are built without memory (PyTorch's meta device) and
run once at the published input size under PyTorch's own counter, ``FlopCounterMode``. A FLOP is one
multiply-add, as in the papers. Two figures are given:

- **published way**: convolutions, linear layers and norms, these with the factors of mmengine's
  analysis. The counters of the time hooked layers and did not see attention's matrix products.
- **complete**: with these products. Fused attention is one opaque operator to most counters, which
  then count nothing; here it runs as the two products that it stands for, so that they are counted
  as executed, including the zeros by which values or keys are padded to one width.

Activations, additions, softmax, pooling and interpolation are left out of both.
"""

import argparse
import importlib
import json
import math
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from mmengine.config import Config, ConfigDict
from mmengine.logging import MMLogger
from mmengine.registry import MODELS, init_default_scope
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mmscalablevit import cli

CONFIGS = Path(__file__).parents[2] / 'configs'
FLOPS_TOLERANCE = 0.01
HEADER = ['Task', 'Backbone', 'Schedule', 'Input', 'Params (M), published', 'computed']
HEADER += ['GFLOPs, published', 'published way', 'complete', 'Notes']
# mmdet's counting at the time put 1000 proposals through the box head, 100 through the mask head.
NUM_PROPOSALS, NUM_MASKS = 1000, 100


@dataclass(frozen=True)
class Task:
    """A table of the paper: config, where a backbone's name goes in, and height and width."""

    toolbox: str
    config: str
    size: tuple[int, int]


@dataclass(frozen=True)
class Published:
    """A published model: params in 1e6 and FLOPs in 1e9 with their digits, '' if not published.

    ``counts_attention`` says whether the published FLOPs are complete.
    """

    task: str
    model: str
    schedules: tuple[str, ...]
    params: str
    gflops: str
    notes: tuple[str, ...] = ()
    counts_attention: bool = False


@dataclass(frozen=True)
class Counts:
    """Parameters in 1e6, FLOPs in 1e9 counted the published way and complete."""

    params: float
    gflops: float
    complete_gflops: float


TASKS = {
    'ImageNet-1K': Task('mmpretrain', 'classification/{}_8xb128_in1k.py', (224, 224)),
    'RetinaNet': Task('mmdet', 'detection/retinanet_{}_fpn_1x_coco.py', (800, 1280)),
    'Mask R-CNN': Task('mmdet', 'detection/mask-rcnn_{}_fpn_1x_coco.py', (800, 1280)),
    'Semantic FPN': Task('mmseg', 'segmentation/{}_fpn_4xb4-80k_ade20k-512x512.py', (512, 2048)),
    'UperNet': Task('mmseg', 'segmentation/{}_upernet_8xb2-160k_ade20k-512x512.py', (512, 2048)),
}
# By mmpretrain's classes, and the widths of their heads' inputs.
LAST_STAGE = dict(out_indices=(3,), norm_after_stage=[False, False, False, True])
CLASSIFIERS = {
    'Swin-T': (dict(type='SwinTransformer', arch='tiny'), 768),
    'Twins-SVT-S': (dict(type='SVT', arch='small', **LAST_STAGE), 512),
}
PUBLISHED = (
    Published('ImageNet-1K', 'ScalableViT-S', ('300e',), '32.4', '4.2', ('merged',)),
    Published('ImageNet-1K', 'ScalableViT-B', ('300e',), '81.9', '8.6'),
    Published('ImageNet-1K', 'ScalableViT-L', ('300e',), '104.9', '14.7', ('large',)),
    Published('ImageNet-1K', 'Swin-T', ('300e',), '28', '4.5', ('complete',), True),
    Published('ImageNet-1K', 'Twins-SVT-S', ('300e',), '24', '2.9', ('complete',), True),
    Published('RetinaNet', 'ScalableViT-S', ('1x', '3x'), '36.4', '238', ('merged',)),
    Published('RetinaNet', 'ScalableViT-B', ('1x', '3x'), '85.6', '330'),
    Published('RetinaNet', 'ScalableViT-L', ('1x',), '112.6', '457'),
    Published('RetinaNet', 'Swin-T', ('1x',), '38.5', '', ('size',)),
    Published('RetinaNet', 'Twins-SVT-S', ('1x',), '34.3', '', ('size', 'twins')),
    Published('Mask R-CNN', 'ScalableViT-S', ('1x', '3x'), '46.3', '256', ('merged',)),
    Published('Mask R-CNN', 'ScalableViT-B', ('1x', '3x'), '94.9', '349'),
    Published('Mask R-CNN', 'ScalableViT-L', ('1x',), '121.4', '477'),
    Published('Mask R-CNN', 'Swin-T', ('3x',), '47.8', '267', ('complete',), True),
    Published('Mask R-CNN', 'Twins-SVT-S', ('1x',), '44.0', '', ('size', 'twins')),
    Published('Semantic FPN', 'ScalableViT-S', ('80k',), '30.4', '174', ('merged',)),
    Published('Semantic FPN', 'ScalableViT-B', ('80k',), '79.0', '270'),
    Published('Semantic FPN', 'ScalableViT-L', ('80k',), '105.5', '402'),
    Published('Semantic FPN', 'Swin-T', ('80k',), '31.9', '', ('size',)),
    Published('Semantic FPN', 'Twins-SVT-S', ('80k',), '28.3', '', ('size', 'twins')),
    Published('UperNet', 'ScalableViT-S', ('160k',), '56.5', '931', ('merged',)),
    Published('UperNet', 'ScalableViT-B', ('160k',), '107.0', '1029'),
    Published('UperNet', 'ScalableViT-L', ('160k',), '135.5', '1162'),
    Published('UperNet', 'Swin-T', ('160k',), '59.9', '945', ('complete',), True),
    Published('UperNet', 'Twins-SVT-S', ('160k',), '54.4', '', ('size', 'twins')),
)
NOTES = {
    'merged': "S is counted as arch='small-merged', merged keys and values in SSA, which the "
    "published figures are of. The released classification code has arch='small': {small}.",
    'large': 'The published 104.9 M agree with no variant of L. The released code has what is '
    'computed here, and the published detectors and segmentors with L agree with it.',
    'complete': "Published in Swin's and Twins' own papers and repositories, with complete FLOPs.",
    'size': 'FLOPs were published at another input size only.',
    'twins': "The parameters published for dense prediction are more than those of mmseg's class, "
    'by {twins}. An unused ImageNet classifier would be 0.51 M.',
}
LEGEND = (
    'A FLOP is one multiply-add. "Published way" leaves out the two matrix products of attention, '
    'as the counters of the time did; "complete" counts them as fused attention executes them, '
    'with the zeros that pad values and keys to one width.'
)


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        formatter_class=cli.HelpFormatter,
        description='Print a Markdown table of the published and the computed parameters and FLOPs '
        'of every published model, beside Swin-T and Twins-SVT-S. Needs mmpretrain, mmdet and '
        'mmseg, no weights.',
        epilog='example: python tools/analysis_tools/get_flops.py',
    )
    parser.add_argument('--json', action='store_true', help='print JSON, not Markdown')
    return parser.parse_args()


def model_config(task: Task, model: str, arch: str | None = None) -> ConfigDict:
    """Config of a published model, or of arch ``arch`` of size S.

    Where there is none, of other papers' backbones, it is the model of size S with this backbone
    and its widths.
    """
    name = model.lower()
    path = CONFIGS / task.config.format(name)
    if path.exists():
        cfg = Config.fromfile(path).model
        if model == 'ScalableViT-S':
            cfg.backbone.arch = arch or 'small-merged'
        return cfg
    cfg = Config.fromfile(CONFIGS / task.config.format('scalablevit-s')).model
    if task.toolbox == 'mmpretrain':
        cfg.backbone, width = CLASSIFIERS[model]
        cfg.head.update(in_channels=width, hidden_channels=None)
        return cfg
    base = Config.fromfile(CONFIGS / '_base_' / 'backbones' / f'{name}.py')
    cfg.backbone = base.backbone
    cfg.neck.in_channels = base.embed_dims
    return cfg


def build(task: Task, cfg: ConfigDict) -> nn.Module:
    """Build a model without memory for its weights, on the meta device."""
    init_default_scope(task.toolbox)
    if cfg.backbone.type == 'ScalableViT':
        with torch.device('meta'):
            return MODELS.build(cfg).eval()
    # The others read values of tensors while they are built.
    return MODELS.build(cfg).to('meta').eval()


def count(task: Task, cfg: ConfigDict) -> Counts:
    """Count parameters and FLOPs of a model at the task's input size."""
    model = build(task, cfg)
    aten = torch.ops.aten
    norms = {
        aten.native_layer_norm: norm_flops(5),
        aten.native_batch_norm: norm_flops(2),
        aten._native_batch_norm_legit_no_training: norm_flops(2),
    }
    counter = FlopCounterMode(display=False, custom_mapping=norms)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        forward(model, torch.empty(1, 3, *task.size, device='meta'))
    # The counter counts a multiply-add as two.
    gflops = {op: flops / 2e9 for op, flops in counter.get_flop_counts()['Global'].items()}
    attention = gflops.pop(aten.bmm, 0) + gflops.pop(aten.baddbmm, 0)
    published_way = sum(gflops.values())
    return Counts(num_params(model), published_way, published_way + attention)


def num_params(model: nn.Module) -> float:
    """Millions of parameters."""
    return sum(parameter.numel() for parameter in model.parameters()) / 1e6


def norm_flops(factor: int) -> Callable:
    """FLOPs of a norm by the factor of mmengine's analysis, in the unit of PyTorch's counter."""
    return lambda shape, *_, **__: 2 * factor * math.prod(shape)


def forward(model: nn.Module, images: Tensor) -> None:
    """Run what the published counts ran: all layers, no post-processing."""
    if not hasattr(model, 'roi_head'):
        model(images, mode='tensor')
        return
    features = model.extract_feat(images)
    model.rpn_head(features)
    channels = features[0].shape[1]
    for part, number in (('bbox', NUM_PROPOSALS), ('mask', NUM_MASKS)):
        extractor = getattr(model.roi_head, f'{part}_roi_extractor')
        regions = images.new_empty(number, channels, *extractor.roi_layers[0].output_size)
        getattr(model.roi_head, f'{part}_head')(regions)


def count_all() -> tuple[list[dict], dict[str, str]]:
    """Count every published model; the rows, and the footnotes by their keys."""
    rows, small, twins = [], [], []
    for published in track(PUBLISHED, 'Counting', console=Console(stderr=True)):
        task = TASKS[published.task]
        counts = count(task, model_config(task, published.model))
        rows += rows_of(published, counts)
        if 'merged' in published.notes:
            params = num_params(build(task, model_config(task, published.model, 'small')))
            small.append(f'{published.task} {params:.2f} M')
        if 'twins' in published.notes:
            more = float(published.params) - counts.params
            twins.append(f'{more:.2f} M ({published.task})')
    texts = dict(small=', '.join(small), twins=', '.join(twins))
    return rows, {key: note.format(**texts) for key, note in NOTES.items()}


def rows_of(published: Published, counts: Counts) -> list[dict]:
    """Compare a published model with its counts, a row for each schedule.

    Figures agree that round to the published one; FLOPs, counted like the published ones, also
    within 1%. ``gflops_agree`` is None if none are published.
    """
    counted = counts.complete_gflops if published.counts_attention else counts.gflops
    height, width = TASKS[published.task].size
    row = dict(
        task=published.task,
        model=published.model,
        input=f'{height}x{width}',
        published_params=published.params,
        params_agree=rounds_to(counts.params, published.params),
        published_gflops=published.gflops,
        gflops_agree=agree(counted, published.gflops) if published.gflops else None,
        notes=published.notes,
        **asdict(counts),
    )
    return [dict(row, schedule=schedule) for schedule in published.schedules]


def rounds_to(value: float, published: str) -> bool:
    """Whether a value rounds to the published digits."""
    return f'{value:.{len(published.partition(".")[2])}f}' == published


def agree(gflops: float, published: str) -> bool:
    """Whether FLOPs round to the published digits or come close to them."""
    near = abs(gflops / float(published) - 1) <= FLOPS_TOLERANCE
    return near or rounds_to(gflops, published)


def cells(row: dict, numbers: dict[str, int]) -> list[str]:
    """The texts of a row, one for each of ``HEADER``."""
    digits = 3 if row['gflops'] < 100 else 1
    return [
        *(row[key] for key in ('task', 'model', 'schedule', 'input', 'published_params')),
        f'{row["params"]:.2f}' + ('' if row['params_agree'] else ' (differs)'),
        row['published_gflops'] + ('' if row['gflops_agree'] is not False else ' (differs)') or '-',
        f'{row["gflops"]:.{digits}f}',
        f'{row["complete_gflops"]:.{digits}f}',
        ', '.join(str(numbers[note]) for note in row['notes']),
    ]


def print_table(rows: list[dict], notes: dict[str, str]) -> None:
    """Print the table and its footnotes."""
    numbers = {key: number for number, key in enumerate(notes, 1)}
    print(cli.markdown_table(HEADER, [cells(row, numbers) for row in rows]))
    print(f'{LEGEND}\n')
    for key, note in notes.items():
        print(f'{numbers[key]}. {note}')


def main() -> None:
    """Count every published model and print the table."""
    args = parse_args()
    for toolbox in ('mmpretrain', 'mmdet', 'mmseg'):
        try:
            importlib.import_module(f'{toolbox}.models')
        except (ImportError, AssertionError) as error:
            fault = f'which cannot be imported ({error})'
            raise cli.UserError(f'the table needs {toolbox}, {fault}') from error
    # What the toolboxes say while they build would get between the lines.
    MMLogger.get_current_instance().setLevel('ERROR')
    warnings.simplefilter('ignore')
    rows, notes = count_all()
    if args.json:
        print(json.dumps(dict(rows=rows, notes=notes), indent=2))
    else:
        print_table(rows, notes)


if __name__ == '__main__':
    cli.run(main)
