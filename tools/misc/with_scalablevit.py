# Copyright (c) mmscalablevit contributors. All rights reserved.
"""Put ScalableViT into any config of mmdet, mmseg or mmpretrain, and prove that it works."""

import argparse
import copy
import difflib
import importlib
import os.path as osp
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import torch
from mmengine.config import Config, ConfigDict
from mmengine.logging import MessageHub
from mmengine.registry import MODELS, init_default_scope
from mmengine.structures import PixelData
from torch import nn

from mmscalablevit import ScalableViT, cli
from mmscalablevit.errors import UserError

TOOLBOXES = ('mmdet', 'mmseg', 'mmpretrain')
# What the weights were trained with, in RGB.
MEAN, STD = [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]
STRIDES = (4, 8, 16, 32)
# Parameters of other transformers that have a decay of their own.
OLD_KEYS = ('absolute_pos_embed', 'relative_position_bias_table', 'pos_embed', 'cls_token')
IMAGE_SIZE = 256


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        formatter_class=cli.HelpFormatter,
        description='Write a config that inherits from any config of mmdet, mmseg or mmpretrain, '
        'with ScalableViT as its backbone; then compute a loss and a prediction.',
        epilog='example: python tools/misc/with_scalablevit.py '
        'mmdet::rtmdet/rtmdet-ins_s_8xb32-300e_coco.py --arch small --out my.py',
    )
    parser.add_argument('config', help='a path, or TOOLBOX::PATH of an installed toolbox')
    parser.add_argument('--out', required=True, help='the config to write')
    archs = ['small', 'base', 'large', 'small-merged']
    parser.add_argument('--arch', default='small', choices=archs, help='size')
    help_ = 'weights of the backbone (default: the released ones of the size)'
    parser.add_argument('--checkpoint', help=help_)
    return parser.parse_args()


def base_of(config: str, out: str) -> tuple[str, str]:
    """Return the path of a config, and how the written one names it."""
    if '::' not in config:
        if not osp.isfile(config):
            raise UserError(f'config {config} does not exist')
        return config, repr(osp.relpath(config, osp.dirname(osp.abspath(out))))
    toolbox, _, name = config.partition('::')
    if toolbox not in TOOLBOXES:
        raise UserError(f'config {config}: the toolbox must be one of {", ".join(TOOLBOXES)}')
    root = Path(importlib.import_module(toolbox).__path__[0]) / '.mim' / 'configs'
    if not (root / name).is_file():
        names = [str(path.relative_to(root)) for path in root.rglob('*.py')]
        meant = difflib.get_close_matches(name, names, n=1)
        hint = f'; did you mean {toolbox}::{meant[0]}?' if meant else ''
        raise UserError(f'config {config} does not exist{hint}')
    # mmengine's own short names do not know the maintained packages.
    return str(root / name), f"__import__('{toolbox}').__path__[0] + '/.mim/configs/{name}'"


def dicts(node: object) -> Iterator[dict]:
    """All dicts in a config, from the outside in."""
    if isinstance(node, dict):
        yield node
    for child in node.values() if isinstance(node, dict) else node:
        if isinstance(child, (dict, list, tuple)):
            yield from dicts(child)


def outputs_of(backbone: dict) -> list[tuple[int, int | None]]:
    """Channels and stride of each map that a backbone returns; no stride for a vector."""
    settings = {k: v for k, v in backbone.items() if k not in ('init_cfg', 'pretrained')}
    module = MODELS.build(settings)
    # mmdet's ResNet returns nothing from it.
    module.eval()
    with torch.no_grad():
        outs = module(torch.zeros(1, 3, IMAGE_SIZE, IMAGE_SIZE))
    outs = outs if isinstance(outs, (list, tuple)) else [outs]
    if not all(isinstance(out, torch.Tensor) and out.dim() in (2, 4) for out in outs):
        raise UserError(f'{backbone["type"]} does not return feature maps')
    return [(o.shape[1], round(IMAGE_SIZE / o.shape[-1]) if o.dim() == 4 else None) for o in outs]


def stages_for(outputs: list[tuple[int, int | None]], kind: str) -> tuple[int, ...]:
    """Stages that stand in for the outputs: by place where all four are, else by stride."""
    strides = [stride for _, stride in outputs]
    if len(outputs) == 4:
        return (0, 1, 2, 3)
    if strides == [None] or (len(outputs) == 1 and strides[0] not in STRIDES):
        return (3,)
    stages = tuple(STRIDES.index(stride) for stride in strides if stride in STRIDES)
    if len(stages) < len(outputs) or list(stages) != sorted(set(stages)):
        lack = f'for which ScalableViT has no stages; its strides are {STRIDES}'
        raise UserError(f'{kind} returns maps of strides {strides}, {lack}')
    return stages


def adapt_channels(model: dict, old: list[int], new: list[int]) -> None:
    """Replace the widths of the old backbone in the neck, or in the heads where none has widths."""
    necks = model.get('neck') or []
    necks = necks if isinstance(necks, list) else [necks]
    first = next((neck for neck in necks if 'in_channels' in neck), None)
    parts = [first] if first else [v for k, v in model.items() if k != 'backbone']
    for node in dicts(parts):
        for key, value in node.items():
            if not key.endswith('in_channels'):
                continue
            if isinstance(value, (list, tuple)):
                node[key] = _list_of(list(value), old, new, node.get('in_index'))
            elif value in old:
                index = node.get('in_index') if key == 'in_channels' else old.index(value)
                node[key] = new[index if isinstance(index, int) else -1]
        if node is first:
            return


def _list_of(value: list, old: list[int], new: list[int], index: list[int] | None) -> list:
    if isinstance(index, (list, tuple)) and len(index) == len(value):
        return [new[i] for i in index]
    # YOLOv3 counts from the last.
    for start, step in product(range(len(old)), (1, -1)):
        if value == old[start:][::step]:
            return new[start:][::step]
    return value


def replace_backbone(cfg: Config, arch: str, checkpoint: str) -> None:
    """Put ScalableViT into every model of a config that has a backbone."""
    owners = [node for node in dicts(cfg.model) if 'type' in (node.get('backbone') or {})]
    if not owners:
        raise UserError(f'config {cfg.filename} has no model with a backbone')
    widths = ScalableViT.arch_zoo[arch]['embed_dims']
    for model in owners:
        outputs = outputs_of(model.backbone)
        stages = stages_for(outputs, model.backbone.type)
        backbone = dict(
            type='ScalableViT',
            arch=arch,
            out_indices=stages,
            drop_path_rate=0.2 if arch.startswith('small') else 0.3,
            init_cfg=dict(type='Pretrained', checkpoint=checkpoint),
        )
        if cfg.default_scope == 'mmpretrain':
            backbone.update(stage_norm=None, final_norm=3 in stages)
        if outputs[-1][1] is None and not model.get('neck'):
            model.neck = dict(type='GlobalAveragePooling')
        model.backbone = ConfigDict(backbone)
        adapt_channels(model, [width for width, _ in outputs], [widths[i] for i in stages])
        model.pop('pretrained', None)
        # A list of them has only rules for layers.
        init_cfg = model.get('init_cfg')
        if isinstance(init_cfg, dict) and 'Pretrained' in str(init_cfg.get('type')):
            model.init_cfg = None
    for node in [cfg, *dicts(cfg.model)]:
        preprocessor = node.get('data_preprocessor') or {}
        if preprocessor.get('mean') is not None or (cfg.default_scope == 'mmdet' and preprocessor):
            preprocessor.update(mean=MEAN, std=STD)
            preprocessor['to_rgb' if 'to_rgb' in preprocessor else 'bgr_to_rgb'] = True
    cfg.load_from = None


def replace_recipe(cfg: Config) -> None:
    """Take AdamW in place of SGD, and no weight decay for norms and position encodings."""
    wrapper = cfg.get('optim_wrapper')
    if not wrapper:
        return
    if wrapper.optimizer.type == 'SGD':
        wrapper.optimizer = ConfigDict(type='AdamW', lr=1e-4, weight_decay=0.05)
        # SGD's last rate may be above AdamW's first.
        for scheduler in dicts(cfg.get('param_scheduler') or []):
            if scheduler.get('eta_min', 0) >= 1e-5:
                scheduler.eta_min = 0
    # Layer-wise decay counts the layers of the old backbone.
    if wrapper.pop('constructor', None):
        wrapper.pop('paramwise_cfg', None)
    paramwise = wrapper.setdefault('paramwise_cfg', ConfigDict())
    keys = paramwise.setdefault('custom_keys', ConfigDict())
    paramwise.norm_decay_mult = 0.0
    # The longest key that is part of a name rules alone, so these carry the backbone's rate, too.
    rate = {k: v for k, v in keys.get('backbone', {}).items() if k == 'lr_mult'}
    for stale in [k for k in keys if k.startswith('backbone.') or k in OLD_KEYS]:
        del keys[stale]
    decay_free = ConfigDict(rate, decay_mult=0.0)
    keys['backbone.pos_block'] = decay_free
    if rate:
        with torch.device('meta'):
            backbone = MODELS.build(next(n.backbone for n in dicts(cfg.model) if 'backbone' in n))
        norms = [n for n, m in backbone.named_modules() if isinstance(m, nn.LayerNorm)]
        keys.update({f'backbone.{name}.': decay_free for name in norms})


def difference(old: dict, new: dict) -> dict:
    """What a config that inherits from ``old`` must say to become ``new``."""
    if not old.keys() <= new.keys():
        return dict(new, _delete_=True)
    changes = {}
    for key, value in new.items():
        if isinstance(value, dict) and isinstance(old.get(key), dict):
            if value := difference(old[key], value):
                changes[key] = value
        elif key not in old or old[key] != value:
            changes[key] = value
    return changes


def convert(config: str, out: str, arch: str, checkpoint: str | None) -> Config:
    """Write the config and return it as read back."""
    path, base = base_of(config, out)
    cfg = cli.read_config(path)
    if cfg.get('default_scope') not in TOOLBOXES:
        raise UserError(f'config {config} must have a default_scope of {", ".join(TOOLBOXES)}')
    init_default_scope(cfg.default_scope)
    before = copy.deepcopy(cfg._cfg_dict.to_dict())
    replace_backbone(cfg, arch, checkpoint or f'scalablevit://{arch.removesuffix("-merged")}')
    replace_recipe(cfg)
    imports = (cfg.get('custom_imports') or {}).get('imports') or []
    imports = [imports] if isinstance(imports, str) else list(imports)
    cfg.custom_imports = dict(imports=[*imports, 'mmscalablevit'], allow_failed_imports=False)
    changes = difference(before, cfg._cfg_dict.to_dict())
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    Path(out).write_text(f'_base_ = {base}\n\n{Config(changes).pretty_text}')
    return Config.fromfile(out)


def sample_batch(cfg: Config) -> dict:
    """Two random images with annotations, as the data loader gives them."""
    classes = min([n['num_classes'] for n in dicts(cfg.model) if n.get('num_classes')], default=2)
    shape = (3, IMAGE_SIZE, IMAGE_SIZE)
    if cfg.default_scope == 'mmdet':
        from mmdet.testing import demo_mm_inputs

        options = dict(num_classes=classes, with_mask=True, with_semantic=True)
        return demo_mm_inputs(2, [shape, shape], num_items=[4, 4], **options)
    images = list(torch.randint(0, 256, (2, *shape), dtype=torch.uint8))
    if cfg.default_scope == 'mmpretrain':
        from mmpretrain.structures import DataSample

        return dict(inputs=images, data_samples=[DataSample().set_gt_label(0) for _ in images])
    from mmseg.structures import SegDataSample

    samples = []
    for _ in images:
        labels = torch.randint(0, classes, (1, *shape[1:]))
        meta = dict(img_shape=shape[1:], ori_shape=shape[1:], pad_shape=shape[1:])
        samples.append(SegDataSample(metainfo=meta, gt_sem_seg=PixelData(data=labels)))
        samples[-1].gt_edge_map = PixelData(data=labels % 2)
    return dict(inputs=images, data_samples=samples)


def prove(cfg: Config) -> tuple[float, list]:
    """Build the model, without its weights, and return one loss and the predictions."""
    for node in dicts(cfg.model):
        if 'backbone' in node:
            node.backbone.init_cfg = None
    if cfg.get('data_preprocessor'):
        cfg.model.setdefault('data_preprocessor', cfg.data_preprocessor)
    model = MODELS.build(cfg.model)
    model.init_weights()
    # YOLOX asks for it while training.
    MessageHub.get_current_instance().update_info('iter', 0)
    batch = sample_batch(cfg)
    losses = model(**model.data_preprocessor(copy.deepcopy(batch), True), mode='loss')
    loss, _ = model.parse_losses(losses)
    if not loss.isfinite():
        raise UserError(f'config {cfg.filename} gives a loss of {loss.item()}')
    loss.backward()
    model.eval()
    with torch.no_grad():
        return loss.item(), model(**model.data_preprocessor(batch, False), mode='predict')


def main() -> None:
    """Write the config and prove it."""
    args = parse_args()
    cfg = convert(args.config, args.out, args.arch, args.checkpoint)
    loss, predictions = prove(cfg)
    found = f'loss {loss:.3g} on two random images, {len(predictions)} predictions'
    print(f'wrote {args.out}: {cfg.model.type} with ScalableViT {args.arch}, {found}')


if __name__ == '__main__':
    cli.run(main)
