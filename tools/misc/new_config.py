# Copyright (c) mmscalablevit contributors. All rights reserved.
"""Look at a data set in our layouts and write a short config that fits it.

DATA is what the converters of ``tools/dataset_converters`` write: ``annotations/{train,val}.json``
and ``{train,val}/`` for boxes and masks; ``images/{train,val}``, ``annotations/{train,val}`` and
``classes.txt`` for label maps.
"""

import argparse
import json
import math
from collections import Counter
from pathlib import Path

import numpy as np
from mmengine.config import Config
from PIL import Image
from yapf.yapflib.yapf_api import FormatCode

from mmscalablevit import cli
from mmscalablevit.errors import UserError

CONFIGS = Path(__file__).parents[2] / 'configs'
BASES = dict(
    detection='detection/retinanet_scalablevit-{}_fpn_1x_coco.py',
    instance='detection/mask-rcnn_scalablevit-{}_fpn_1x_coco.py',
    segmentation='segmentation/scalablevit-{}_upernet_8xb2-160k_ade20k-512x512.py',
)
# Widths of necks and heads, and those that fit the small backbone.
NARROW = {256: 64, 512: 64, 1024: 256}
# The parts of the text, which is formatted as a whole.
HEAD = """# {count} images to train on, {val_count} to validate; {classes} classes, {sizes}.
# Written by tools/misc/new_config.py; edit it as you like.
_base_ = __import__('mmscalablevit').__path__[0] + ('/.mim/configs/{base}')

data_root = {root!r}
metainfo = dict(classes={names!r})
"""
DETECTION = """
# Longest and shortest side of the scaled images: 90% of yours are no larger.
scale = {scale}

def scaled(pipeline):
    return [dict(step, scale=scale) if step['type'] == 'Resize' else step for step in pipeline]

data = dict(data_root=data_root, metainfo=metainfo)
train = dict(ann_file='annotations/train.json', data_prefix=dict(img='train/'))
val = dict(ann_file='annotations/val.json', data_prefix=dict(img='val/'))
train_dataloader = dict(
    batch_size={batch}, dataset=dict(**data, **train, pipeline=scaled(_base_.train_pipeline)))
val_dataloader = dict(dataset=dict(**data, **val, pipeline=scaled(_base_.test_pipeline)))
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=data_root + 'annotations/val.json')
test_evaluator = val_evaluator

max_epochs = {epochs}
train_cfg = dict(max_epochs=max_epochs, val_interval={interval})
param_scheduler = [
    dict(type='LinearLR', start_factor=0.001, by_epoch=False, begin=0, end={warmup}),
    dict(type='MultiStepLR', end=max_epochs, milestones=[{drop1}, {drop2}]),
]
default_hooks = dict(checkpoint=dict(interval={interval}, save_best='auto'))
"""
SEGMENTATION = """
# Shortest side of the scaled images, which are cropped to train on.
side = {side}
crop_size = {crop}

def scaled(pipeline):
    sizes = dict(scale=(4 * side, side), crop_size=crop_size)
    return [{{key: sizes.get(key, step[key]) for key in step}} for step in pipeline]

data = dict(
    type='BaseSegDataset', data_root=data_root, metainfo=metainfo, img_suffix={suffix!r},
    seg_map_suffix='.png', reduce_zero_label=False)
train = dict(img_path='images/train', seg_map_path='annotations/train')
val = dict(img_path='images/val', seg_map_path='annotations/val')
train_dataloader = dict(
    batch_size={batch},
    dataset=dict(**data, data_prefix=train, pipeline=scaled(_base_.train_pipeline)))
val_dataloader = dict(
    dataset=dict(**data, data_prefix=val, pipeline=scaled(_base_.test_pipeline)))
test_dataloader = val_dataloader

# {epochs} times through the images
max_iters = {iters}
train_cfg = dict(max_iters=max_iters, val_interval={interval})
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-3, by_epoch=False, begin=0, end={warmup}),
    dict(type='PolyLR', power=1.0, eta_min=0.0, by_epoch=False, begin={warmup}, end=max_iters),
]
default_hooks = dict(checkpoint=dict(interval={interval}))
"""
MODEL = """
{why}model = {model}

# The learning rate of the recipe, for 16 images, times the square root of batch_size / 16.
optim_wrapper = dict(optimizer=dict(lr={lr:.2g}){clip})
# With --auto-scale-lr: for other batches, or several GPUs
auto_scale_lr = dict(base_batch_size={batch})
"""


def look_at_coco(root: Path) -> dict:
    """What the annotation files of a data set hold: classes, sizes and counts."""
    found = {}
    for path in (root / 'annotations' / f'{split}.json' for split in ('train', 'val')):
        if not path.is_file():
            raise UserError(f'{path} does not exist; tools/dataset_converters writes this layout')
        found[path.stem] = json.loads(path.read_text())
    train = found['train']
    if not train['images'] or not train['annotations']:
        raise UserError(f'{root}/annotations/train.json has no image or no object')
    per_image = Counter((x, y['image_id']) for x in found for y in found[x]['annotations'])
    return dict(
        names=tuple(category['name'] for category in train['categories']),
        sizes=np.array([(image['width'], image['height']) for image in train['images']]),
        count=len(train['images']),
        val_count=len(found['val']['images']),
        objects=np.sqrt([x['bbox'][2] * x['bbox'][3] for x in train['annotations']]),
        most=max(per_image.values()),
        masks=all(x.get('segmentation') for x in train['annotations']),
    )


def look_at_label_maps(root: Path) -> dict:
    """What a data set of label maps holds: classes, image sizes and counts."""
    folders = {split: root / 'images' / split for split in ('train', 'val')}
    for path in (*folders.values(), root / 'classes.txt'):
        if not path.exists():
            raise UserError(f'{path} does not exist; masks_to_labels.py writes this layout')
    images = {x: [p for p in folders[x].rglob('*') if p.is_file()] for x in folders}
    sizes = []
    for path in images['train']:
        with Image.open(path) as image:
            sizes.append(image.size)
    suffixes = sorted({path.suffix for path in (*images['train'], *images['val'])})
    if len(suffixes) != 1:
        raise UserError(f'{root / "images"} must hold one suffix, found {", ".join(suffixes)}')
    return dict(
        names=tuple((root / 'classes.txt').read_text().strip().split('\n')),
        sizes=np.array(sizes),
        count=len(images['train']),
        val_count=len(images['val']),
        suffix=suffixes[0],
    )


def target_scale(found: dict, size: str) -> tuple[int, int]:
    """Longest and shortest side of the scaled images."""
    longest, shortest = (320, 320) if size == 'demo' else (1333, 800)
    sides = np.percentile(np.sort(found['sizes'], axis=1)[:, ::-1], 90, axis=0)
    factor = min(longest / sides[0], shortest / sides[1])
    # Enlarge up to twice where objects are small then, else only shrink.
    enlarged = sides[1] / np.median(found['sizes'].min(axis=1))
    grow = np.clip(32 / (np.percentile(found['objects'], 25) * enlarged), 1, 2)
    return tuple(round(float(side * min(factor, grow))) for side in sides)


def show(value: object) -> str:
    """A value as Python, dictionaries as calls of dict."""
    if not isinstance(value, dict):
        return repr(value)
    return f'dict({", ".join(f"{key}={show(inner)}" for key, inner in value.items())})'


def fit_heads(node: dict, classes: int, widths: dict[int, int]) -> dict:
    """The changes of neck and heads: the number of classes, and other widths."""
    changes = {}
    for key, value in node.items():
        if isinstance(value, dict):
            changes[key] = fit_heads(value, classes, widths)
        elif key == 'num_classes':
            changes[key] = classes
        elif key.endswith('channels') and isinstance(value, int):
            changes[key] = widths.get(value)
    return {key: value for key, value in changes.items() if value}


def fit_model(args: argparse.Namespace, found: dict, base: str, fit: dict) -> dict:
    """The changes of the model: classes, backbone with its widths, and ``fit`` by dotted keys."""
    parts = Config.fromfile(CONFIGS / base).model
    heads = {key: value for key, value in parts.items() if key.endswith(('neck', 'head'))}
    model = Config(fit_heads(heads, len(found['names']), NARROW if args.size == 'demo' else {}))
    if args.size == 'demo':
        small = Config.fromfile(CONFIGS / '_base_' / 'backbones' / 'scalablevit-demo.py')
        fit['backbone'] = dict(small.backbone.to_dict(), _delete_=True)
        fit[f'{"neck" if "neck" in parts else "decode_head"}.in_channels'] = small.embed_dims
        if 'auxiliary_head' in parts:
            fit['auxiliary_head.in_channels'] = small.embed_dims[2]
    elif args.from_scratch:
        fit['backbone.init_cfg'] = None
    model.merge_from_dict(fit)
    return model.to_dict()


def fit_detector(args: argparse.Namespace, found: dict, scale: tuple[int, int]) -> tuple[dict, str]:
    """What training from scratch, and small or many objects need of the model; and why."""
    instance, fit, why = args.task == 'instance', {}, ''
    if args.from_scratch:
        why += '# Norm layers, which training from scratch needs.\n'
        fit['neck.norm_cfg'] = dict(type='BN')
        fit |= {} if instance else {'bbox_head.norm_cfg': dict(type='GN', num_groups=8)}
    # How much training enlarges the objects.
    factor = min(np.array(scale) / np.sort(np.median(found['sizes'], axis=0))[::-1])
    # Of fewer pixels, the standard anchors find few.
    if np.percentile(found['objects'], 10) * factor < 24:
        why += '# Anchors of half the standard size: a tenth of your objects is small.\n'
        anchors = dict(scales=[4]) if instance else dict(octave_base_scale=2)
        fit[f'{"rpn" if instance else "bbox"}_head.anchor_generator'] = anchors
    if found['most'] > 80:
        limit = math.ceil(found['most'] * 1.2 / 100) * 100
        why += f'# max_per_img: an image of yours has {found["most"]} objects.\n'
        fit[f'test_cfg{".rcnn" * instance}.max_per_img'] = limit
        if instance:
            fit['test_cfg.rpn'] = dict.fromkeys(('nms_pre', 'max_per_img'), max(1000, 3 * limit))
    return fit, why


def write_config(args: argparse.Namespace) -> str:
    """The text of the config."""
    segmentation, demo = args.task == 'segmentation', args.size == 'demo'
    found = (look_at_label_maps if segmentation else look_at_coco)(args.data)
    if args.task == 'instance' and not found['masks']:
        raise UserError(f'{args.data} has boxes without masks; --task detection trains on these')
    args.from_scratch |= demo
    median, largest = np.median(found['sizes'], axis=0), found['sizes'].max(axis=0)
    values = dict(
        found,
        base=BASES[args.task].format('s' if demo else args.size),
        root=f'{args.data.as_posix()}/',
        classes=len(found['names']),
        sizes=f'mostly {median[0]:g}x{median[1]:g}, up to {largest[0]}x{largest[1]}',
    )
    if segmentation:
        side = int(min(np.median(found['sizes'].min(axis=1)), 320 if demo else 1024))
        crop = min(512, max(64, side // 32 * 32))
        fit, why = {'data_preprocessor.size': (crop, crop)}, ''
        values.update(side=side, crop=(crop, crop), batch=4)
        seen = min(max(200 * found['count'], 40_000), 1_280_000)
    else:
        scale = target_scale(found, args.size)
        fit, why = fit_detector(args, found, scale)
        batch = int(np.clip(2 * 1333 * 800 / (scale[0] * scale[1]), 2, 8))
        values.update(scale=scale, batch=batch)
        seen = max(24_000, 12 * found['count'])
    # With --amp 20 to 60 minutes of one core.
    seen = 6000 if demo else seen * (1 + args.from_scratch)
    epochs = args.epochs or min(max(seen // found['count'], 12), 300)
    iters = max(2, epochs * found['count'] // values['batch'])
    # From scratch, a small network bears a higher rate than the recipe of fine-tuning.
    rate = 1e-3 if demo else 2e-4 if args.from_scratch else 6e-5 if segmentation else 1e-4
    values.update(
        epochs=epochs,
        iters=iters,
        interval=max(1, (iters if segmentation else epochs) // 10),
        warmup=max(1, min(1000, iters // 20)),
        drop1=max(1, epochs * 2 // 3),
        drop2=max(1, epochs * 11 // 12),
        lr=rate * math.sqrt(values['batch'] / 16),
        clip=', clip_grad=dict(max_norm=1.0)' if args.from_scratch else '',
        why=why,
        model=show(fit_model(args, found, values['base'], fit)),
    )
    text = f'{HEAD}{SEGMENTATION if segmentation else DETECTION}{MODEL}'.format(**values)
    return FormatCode(text, style_config='{based_on_style: facebook, column_limit: 100}')[0]


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        formatter_class=cli.HelpFormatter,
        description='Write a short config that fits a data set.',
        epilog='example: python tools/misc/new_config.py data/cells --task instance --out my.py',
    )
    parser.add_argument('data', type=Path, metavar='DATA', help='folder that a converter wrote')
    parser.add_argument('--task', choices=BASES, required=True, help='what the model predicts')
    help_ = 'of the backbone; demo trains on a CPU'
    parser.add_argument('--size', default='s', choices=('s', 'b', 'l', 'demo'), help=help_)
    parser.add_argument('--out', type=Path, default=Path('my.py'), help='default: my.py')
    parser.add_argument('--from-scratch', action='store_true', help='no pretrained weights')
    parser.add_argument('--epochs', type=int, help='default: by the number of images')
    return parser.parse_args()


def main() -> None:
    """Write the config."""
    args = parse_args()
    if args.out.exists():
        raise UserError(f'{args.out} exists; name another file with --out')
    args.out.write_text(write_config(args))
    print(f'{args.out} is written; next: python tools/check_data.py {args.out}')


if __name__ == '__main__':
    cli.run(main)
