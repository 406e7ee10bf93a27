# Copyright (c) mmscalablevit contributors. All rights reserved.
"""Write a small data set of drawn shapes, annotated as COCO and as ADE20K.

One set of images serves instance segmentation and semantic segmentation::

    OUT_DIR
    ├── images/{training,validation}/000001.jpg
    ├── annotations/{training,validation}/000001.png     ADE20K's layout
    ├── annotations/instances_{training,validation}.json   COCO's layout
    └── shapes.json                        the arguments the set was made with

The label maps are uint8 with ADE20K's meaning: 0 is unlabeled (and never occurs here), 1 the
background, 2 to 5 the classes, so a data set class reads them with ``reduce_zero_label=True``.
"""

import argparse
import json
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import cv2
import numpy as np
from pycocotools import mask as coco_mask
from rich.progress import track

CLASSES = ('circle', 'square', 'triangle', 'star')
PALETTE = [(230, 80, 70), (70, 150, 240), (250, 200, 60), (120, 210, 110)]
# The classes and colors of the label maps once the zero label is reduced.
SEG_CLASSES = ('background', *CLASSES)
SEG_PALETTE = [(90, 90, 90), *PALETTE]

SPLITS = ('training', 'validation')
SIZE_RANGE = (32, 1024)
# Lengths are drawn for an image of this side and scaled to the one asked for.
NOMINAL_SIZE = 128
RADIUS_RANGE = (15, 30)
COUNT_RANGE = (3, 6)
# What must stay visible of a shape, in pixels and as a share of its whole area.
MIN_VISIBLE_PIXELS = 16
MIN_VISIBLE_SHARE = 0.5
# The least distance in RGB between a shape's color, what lies under it and the earlier shapes.
MIN_CONTRAST = 100
# Standard deviation of the hue within a class, in degrees; the classes are 90 degrees apart, so
# color alone leaves about one shape in nine with the wrong class.
HUE_SPREAD = 28
SUPERSAMPLING = 4
# Raise it when the drawn images change, so that older sets are made again.
VERSION = 2
_ADVICE = 'name a new or an empty folder for OUT_DIR'


def _smooth_noise(rng: np.random.Generator, size: int, cells: int) -> np.ndarray:
    """Color noise in [-1, 1] that varies over about ``cells`` patches, (size, size, 3)."""
    coarse = rng.uniform(-1, 1, (cells, cells, 3)).astype(np.float32)
    return cv2.resize(coarse, (size, size), interpolation=cv2.INTER_CUBIC)


def _ramp(rng: np.random.Generator, size: int) -> np.ndarray:
    """A linear ramp over about [-1, 1] in a random direction, (size, size, 1)."""
    angle = rng.uniform(0, 2 * np.pi)
    axis = np.linspace(-1, 1, size, dtype=np.float32)
    return (np.cos(angle) * axis[None, :] + np.sin(angle) * axis[:, None])[..., None]


def _draw_background(rng: np.random.Generator, size: int) -> np.ndarray:
    """A cloudy, shaded and grainy color image, float32 RGB, (size, size, 3)."""
    color = rng.uniform(50, 205, 3)
    clouds = rng.uniform(6, 24) * _smooth_noise(rng, size, int(rng.integers(3, 8)))
    shade = _ramp(rng, size) * rng.uniform(-20, 20, 3)
    grain = rng.uniform(2, 6) * rng.standard_normal((size, size, 3), np.float32)
    return (color + clouds + shade + grain).astype(np.float32)


def _pick_color(rng: np.random.Generator, label: int, others: list[np.ndarray]) -> np.ndarray:
    """A color in the hues of a class that stands out from ``others``; RGB, (3,)."""
    hues = (label * 360 / len(CLASSES) + HUE_SPREAD * rng.standard_normal(64)) % 360
    hsv = np.stack([hues, rng.uniform(0.4, 1, 64), rng.uniform(0.4, 1, 64)], axis=1)
    colors = 255 * cv2.cvtColor(hsv[None].astype(np.float32), cv2.COLOR_HSV2RGB)[0]
    distances = np.linalg.norm(colors[:, None] - np.array(others), axis=2).min(axis=1)
    # argmax finds the first color that is far enough; where none is, clipping leaves the farthest.
    return colors[distances.clip(max=MIN_CONTRAST).argmax()]


def _draw_fill(
    rng: np.random.Generator, label: int, side: int, scale: float, color: np.ndarray
) -> np.ndarray:
    """The texture of a class around a main color, float32 RGB, (side, side, 3)."""
    step = rng.uniform(5, 8) * scale
    across, along = (np.pi * side / step * _ramp(rng, side) for _ in range(2))
    pattern = {
        'circle': _smooth_noise(rng, side, 3),
        'square': np.sign(np.sin(across) * np.sin(along)),
        'triangle': np.sin(across),
        'star': np.sign(rng.uniform(-1, 1, (side, side, 1))),
    }[CLASSES[label]]
    texture = pattern * rng.uniform(15, 45)
    shade = _ramp(rng, side) * rng.uniform(-20, 20)
    grain = rng.uniform(2, 5) * rng.standard_normal((side, side, 3), np.float32)
    return (color + texture + shade + grain).astype(np.float32)


def _outline(rng: np.random.Generator, label: int, radius: float) -> np.ndarray:
    """The corners of a randomly turned shape around the origin, (N, 2)."""
    num_corners = {'circle': 72, 'square': 4, 'triangle': 3, 'star': 10}[CLASSES[label]]
    angles = rng.uniform(0, 2 * np.pi) + np.arange(num_corners) * 2 * np.pi / num_corners
    radii = np.full(num_corners, radius)
    if CLASSES[label] == 'star':
        radii[1::2] *= rng.uniform(0.4, 0.5)
    return np.stack([radii * np.cos(angles), radii * np.sin(angles)], axis=1)


def _coverage(corners: np.ndarray, size: int) -> np.ndarray:
    """The share of each pixel that lies inside a polygon, float32 in [0, 1], (size, size)."""
    canvas = np.zeros((size * SUPERSAMPLING,) * 2, np.uint8)
    cv2.fillPoly(canvas, [np.round(corners * SUPERSAMPLING).astype(np.int32)], 255)
    small = cv2.resize(canvas, (size, size), interpolation=cv2.INTER_AREA)
    return small.astype(np.float32) / 255


def draw_image(
    rng: np.random.Generator, size: int = NOMINAL_SIZE
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw one image of three to six overlapping shapes on a textured background."""
    scale = size / NOMINAL_SIZE
    image = _draw_background(rng, size)
    masks = np.zeros((0, size, size), bool)
    needed = np.zeros(0)
    labels: list[int] = []
    colors: list[np.ndarray] = []
    count = rng.integers(COUNT_RANGE[0], COUNT_RANGE[1] + 1)
    while len(labels) < count:
        label = int(rng.integers(len(CLASSES)))
        radius = rng.uniform(*RADIUS_RANGE) * scale
        center = rng.uniform(radius / 2, size - radius / 2, 2)
        corners = center + _outline(rng, label, radius)
        alpha = _coverage(corners, size)
        mask = alpha >= 0.5

        area = cv2.contourArea(corners.astype(np.float32))
        new_masks = np.concatenate([masks & ~mask, mask[None]])
        new_needed = np.append(needed, max(MIN_VISIBLE_PIXELS, MIN_VISIBLE_SHARE * area))
        if (new_masks.sum(axis=(1, 2)) < new_needed).any():
            continue
        masks, needed = new_masks, new_needed
        labels.append(label)

        x, y, width, height = cv2.boundingRect((alpha > 0).astype(np.uint8))
        box = slice(y, y + height), slice(x, x + width)
        colors.append(_pick_color(rng, label, [image[mask].mean(axis=0), *colors]))
        fill = _draw_fill(rng, label, max(width, height), scale, colors[-1])
        image[box] += alpha[box][..., None] * (fill[:height, :width] - image[box])
    return image.clip(0, 255).astype(np.uint8), masks, np.array(labels, np.int64)


def to_label_map(masks: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """A label map as ADE20K has it, uint8 (H, W): 1 is the background, 2 and up the classes."""
    label_map = np.ones(masks.shape[1:], np.uint8)
    for mask, label in zip(masks, labels, strict=True):
        label_map[mask] = label + 2
    return label_map


def to_coco_annotations(masks: np.ndarray, labels: np.ndarray) -> list[dict]:
    """COCO's annotations of disjoint masks (N, H, W), all but the two ids."""
    rles = [coco_mask.encode(np.asfortranarray(mask, np.uint8)) for mask in masks]
    return [
        dict(
            category_id=int(label) + 1,
            segmentation=dict(size=rle['size'], counts=rle['counts'].decode('ascii')),
            bbox=coco_mask.toBbox(rle).tolist(),
            area=int(coco_mask.area(rle)),
            iscrowd=0,
        )
        for rle, label in zip(rles, labels, strict=True)
    ]


def _write_sample(index: int, split: int, out_dir: Path, size: int, seed: int) -> list[dict]:
    """Draw and write the image ``index`` of a split and return its COCO annotations."""
    # A seed for each image: the same file whoever draws it, and never the same in both splits.
    image, masks, labels = draw_image(np.random.default_rng([seed, split, index]), size)
    quality = [cv2.IMWRITE_JPEG_QUALITY, 95]
    for folder, ending, pixels, params in (
        ('images', '.jpg', cv2.cvtColor(image, cv2.COLOR_RGB2BGR), quality),
        ('annotations', '.png', to_label_map(masks, labels), []),
    ):
        # Through Python's own files, whose errors name their cause.
        path = out_dir / folder / SPLITS[split] / f'{index:06d}{ending}'
        path.write_bytes(cv2.imencode(ending, pixels, params)[1].tobytes())
    return to_coco_annotations(masks, labels)


def _init_worker() -> None:
    # The parent alone answers Ctrl-C; the images are far too small for OpenCV's threads.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    cv2.setNumThreads(1)


@contextmanager
def _mapper(workers: int) -> Iterator:
    """A ``map`` over ``workers`` processes, or the built-in one for a single worker."""
    if workers == 1:
        yield map
        return
    # A fork of a process in which OpenCV has threads would wait for them forever.
    context = get_context('spawn')
    with ProcessPoolExecutor(workers, context, initializer=_init_worker) as pool:
        try:
            yield partial(pool.map, chunksize=16)
        except BaseException:
            # Leaving the pool would otherwise wait until every image is drawn.
            pool.shutdown(cancel_futures=True)
            raise


def _write_split(split: int, count: int, out_dir: Path, size: int, seed: int, workers: int) -> None:
    """Write the images, label maps and COCO annotations of one split."""
    for folder in ('images', 'annotations'):
        (out_dir / folder / SPLITS[split]).mkdir(parents=True)
    write = partial(_write_sample, split=split, out_dir=out_dir, size=size, seed=seed)
    indices = range(1, count + 1)
    with _mapper(workers) as run:
        per_image = list(track(run(write, indices), f'{SPLITS[split]} images', total=count))

    pairs = [(index, a) for index, found in zip(indices, per_image, strict=True) for a in found]
    coco = dict(
        info=dict(description=f'Drawn shapes, {SPLITS[split]}', version=str(VERSION)),
        licenses=[dict(id=1, name='Apache-2.0', url='https://www.apache.org/licenses/LICENSE-2.0')],
        images=[
            dict(id=index, file_name=f'{index:06d}.jpg', width=size, height=size, license=1)
            for index in indices
        ],
        annotations=[
            dict(image_id=index, **annotation, id=i)
            for i, (index, annotation) in enumerate(pairs, start=1)
        ],
        categories=[
            dict(id=i, name=name, supercategory='shape') for i, name in enumerate(CLASSES, start=1)
        ],
    )
    (out_dir / 'annotations' / f'instances_{SPLITS[split]}.json').write_text(json.dumps(coco))


def _check_arguments(**given: int) -> None:
    counts, seeds, workers = (1, 999999), (0, 2**32 - 1), (1, 256)
    allowed = dict(num_train=counts, num_val=counts, size=SIZE_RANGE, seed=seeds, workers=workers)
    for name, (low, high) in allowed.items():
        if not low <= given[name] <= high:
            raise ValueError(f'{name} must be from {low} to {high}, got {given[name]}')


def _read_record(out_dir: Path) -> dict | None:
    """What ``shapes.json`` says of the set in ``out_dir``; None where there is none yet."""
    record_file = out_dir / 'shapes.json'
    if not record_file.exists():
        # A lone shapes.json.tmp is our own, of a run that was interrupted at its first file.
        if out_dir.exists() and {path.name for path in out_dir.iterdir()} - {'shapes.json.tmp'}:
            raise ValueError(f'{out_dir} contains other files but no shapes.json; {_ADVICE}')
        return None
    try:
        record = json.loads(record_file.read_text())
        return dict(arguments=record['arguments'], finished=record['finished'])
    except (ValueError, KeyError, TypeError):
        raise ValueError(f'{record_file} was not written by this tool; {_ADVICE}') from None


def _write_record(out_dir: Path, arguments: dict, finished: bool) -> None:
    # Through a temporary file, so that no interruption leaves half a record.
    temporary = out_dir / 'shapes.json.tmp'
    temporary.write_text(json.dumps(dict(arguments=arguments, finished=finished), indent=2) + '\n')
    os.replace(temporary, out_dir / 'shapes.json')


def _is_whole(out_dir: Path, counts: dict[str, int]) -> bool:
    """Whether the files of a finished set are still there."""
    return all(
        len(list((out_dir / 'images' / split).glob('*.jpg'))) == count
        and len(list((out_dir / 'annotations' / split).glob('*.png'))) == count
        and (out_dir / 'annotations' / f'instances_{split}.json').is_file()
        for split, count in counts.items()
    )


def write_shapes(
    out_dir: str | Path,
    num_train: int = 2000,
    num_val: int = 200,
    size: int = NOMINAL_SIZE,
    seed: int = 0,
    workers: int = 1,
) -> bool:
    """Write the data set, unless it is there already."""
    arguments = dict(num_train=num_train, num_val=num_val, size=size, seed=seed)
    _check_arguments(**arguments, workers=workers)
    arguments = dict(version=VERSION, **arguments)
    out_dir = Path(out_dir)
    counts = dict(zip(SPLITS, (num_train, num_val), strict=True))

    if record := _read_record(out_dir):
        same = record['arguments'] == arguments
        if same and record['finished'] and _is_whole(out_dir, counts):
            return False
        reason = 'is incomplete' if same else 'was made with other arguments'
        print(f'The set in {out_dir} {reason} and is written again.')

    out_dir.mkdir(parents=True, exist_ok=True)
    # Says that images and annotations below are ours to replace, before any of them is written.
    _write_record(out_dir, arguments, finished=False)
    for folder in ('images', 'annotations'):
        if (out_dir / folder).exists():
            shutil.rmtree(out_dir / folder)
    for split, count in enumerate(counts.values()):
        _write_split(split, count, out_dir, size, seed, workers)
    _write_record(out_dir, arguments, finished=True)
    return True


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description='Write a small data set of drawn shapes, annotated as COCO and as ADE20K.',
        epilog='example: python demo/shapes.py data/shapes --num-train 2000',
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument('out_dir', metavar='OUT_DIR', type=Path, help='folder to write to')
    low, high = SIZE_RANGE
    options = {
        '--num-train': (2000, 'number of training images'),
        '--num-val': (200, 'number of validation images'),
        '--size': (NOMINAL_SIZE, f'height and width in pixels, {low} to {high}'),
        '--seed': (0, 'seed of the whole set'),
        '--workers': (min(os.cpu_count() or 1, 8), 'processes; the files do not depend on it'),
    }
    for name, (default, text) in options.items():
        parser.add_argument(name, type=int, default=default, help=text)
    return parser.parse_args()


def main() -> None:
    """Run the command line."""
    args = parse_args()
    try:
        written = write_shapes(**vars(args))
    except (OSError, ValueError) as error:
        sys.exit(f'error: {error}')
    except KeyboardInterrupt:
        print('Interrupted; the same command writes the set again.', file=sys.stderr)
        sys.exit(130)
    place = f'{"are now" if written else "were already"} in {args.out_dir}'
    print(f'{args.num_train} training and {args.num_val} validation images {place}')


if __name__ == '__main__':
    main()
