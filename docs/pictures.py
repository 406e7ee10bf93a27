# Copyright (c) mmscalablevit contributors. All rights reserved.
"""Draw pictures of the pages: published results over FLOPs, predictions, and several compared.

Predictions are those that ``demo/image_demo.py`` wrote to a folder; SOURCE is its predictions.json,
a COCO file of annotations, or a label map. DETECTED is what ``tools/test.py`` writes with the
option ``test_evaluator.outfile_prefix``::

    python docs/pictures.py published
    python docs/pictures.py predictions --detected IMAGE FOLDER --segmented IMAGE FOLDER --out FILE
    python docs/pictures.py compared IMAGE CONFIG --panel TITLE SOURCE [--panel ...] --out FILE
    python docs/pictures.py unmatched DETECTED CONFIG --out FILE
"""

import argparse
from pathlib import Path

import cv2
import matplotlib
import numpy as np
import yaml
from mmengine.config import Config
from pycocotools.coco import COCO
from pycocotools.mask import iou

matplotlib.use('Agg')
from matplotlib import pyplot as plt

ROOT = Path(__file__).parents[1]
IMAGES = ROOT / 'docs' / 'images'
# Backbones by a part of the names of their configs, with color and marker.
BACKBONES = {
    'scalablevit-': ('ScalableViT-S, B, L', '#4051b5', 'o'),
    'swin-t': ('Swin-T', '#d9822b', 's'),
    'twins-svt-s': ('Twins-SVT-S', '#3a9b5c', '^'),
}
# Title of a plot: its configs, its metric.
PLOTS = {
    'COCO, Mask R-CNN 1x': ('detection', 'mask-rcnn_{}*_fpn_1x_coco', 'box AP'),
    'ADE20K, UperNet 160k': ('segmentation', '{}*_upernet_8xb2-160k_*', 'mIoU'),
}
COLORS = [(230, 80, 70), (70, 150, 240), (250, 200, 60), (120, 210, 110)]
BACKGROUND = (90, 90, 90)
ANNOTATED = (0, 150, 0)
SIDE = 300
# Crops around single objects: side, rows and columns.
TILE, TILES = 120, (3, 10)
SCORE = 0.5


def main() -> None:
    """Parse the command line and draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    pictures = parser.add_subparsers(dest='picture', required=True)
    published = pictures.add_parser(
        'published', help='box AP and mIoU over GFLOPs, from the metafiles'
    )
    published.set_defaults(draw=draw_published, out=IMAGES / 'published.png')
    drawn = pictures.add_parser('predictions', help='images and what was found, side by side')
    for name in ('detected', 'segmented'):
        drawn.add_argument(
            f'--{name}',
            type=Path,
            nargs=2,
            action='append',
            default=[],
            metavar=('IMAGE', 'FOLDER'),
        )
    drawn.add_argument('--out', type=Path, required=True, help='file of the picture')
    drawn.set_defaults(draw=draw_predictions)
    compared = pictures.add_parser('compared', help='one image, from several sources')
    compared.add_argument('image', type=Path)
    compared.add_argument('config', help='a config with the metainfo of the data set')
    compared.add_argument(
        '--panel', nargs=2, action='append', required=True, metavar=('TITLE', 'SOURCE')
    )
    compared.add_argument('--out', type=Path, required=True, help='file of the picture')
    compared.set_defaults(draw=draw_compared)
    unmatched = pictures.add_parser('unmatched', help='detections where nothing is annotated')
    unmatched.add_argument('detected', type=Path)
    unmatched.add_argument('config', help='the config that was tested')
    unmatched.add_argument('--out', type=Path, required=True, help='file of the picture')
    unmatched.set_defaults(draw=draw_unmatched)
    args = parser.parse_args()
    args.draw(args)


def draw_published(args: argparse.Namespace) -> None:
    """Draw the published results: all points hollow, as none is reproduced here."""
    figure, axes = plt.subplots(1, len(PLOTS), figsize=(9, 3.4), dpi=100)
    for axis, (title, (folder, pattern, metric)) in zip(axes, PLOTS.items(), strict=True):
        models = yaml.safe_load((ROOT / 'configs' / folder / 'metafile.yml').read_text())['Models']
        for name, (label, color, marker) in BACKBONES.items():
            points = [
                (model['Metadata']['FLOPs'] / 1e9, result['Metrics'][metric])
                for model in models
                if Path(model['Name']).match(pattern.format(name))
                for result in model.get('Results') or []
                if metric in result['Metrics']
            ]
            axis.plot(*zip(*points, strict=True), marker, ls='-', c=color, mfc='white', label=label)
        axis.set(title=title, xlabel='GFLOPs', ylabel=f'{metric}, published')
        axis.grid(alpha=0.3)
    axes[0].legend(loc='lower right')
    figure.tight_layout()
    figure.savefig(args.out)


def draw_predictions(args: argparse.Namespace) -> None:
    """Draw a strip: images with their detections, then label maps."""
    tiles = []
    for path, folder in args.detected:
        image = read(path)
        objects = find_objects(path, folder / 'predictions.json')
        tiles += [enlarge(image), draw_objects(image, objects, COLORS)]
    for path, folder in args.segmented:
        labels = folder / 'label_maps' / f'{path.stem}.png'
        labels = cv2.imread(str(labels), cv2.IMREAD_UNCHANGED)
        colors = np.array([BACKGROUND, *COLORS], np.uint8)[labels]
        tiles.append(enlarge(colors, cv2.INTER_NEAREST))
    gap = np.full((SIDE, 8, 3), 255, np.uint8)
    strip = np.hstack([part for tile in tiles for part in (tile, gap)][:-1])
    cv2.imwrite(str(args.out), strip[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 88])


def draw_compared(args: argparse.Namespace) -> None:
    """Draw what several sources found in one image, or hold for true, side by side."""
    palette, image = Config.fromfile(args.config).metainfo.palette, read(args.image)
    figure, axes = plt.subplots(
        1, len(args.panel), figsize=(3.6 * len(args.panel), 3), dpi=100, squeeze=False
    )
    for axis, (title, source) in zip(axes[0], args.panel, strict=True):
        if source.endswith('.json'):
            objects = find_objects(args.image, Path(source))
            found, title = draw_objects(image, objects, palette), f'{title}: {len(objects)}'
        else:
            labels = cv2.imread(source, cv2.IMREAD_UNCHANGED)
            known = (labels < len(palette))[..., None]
            colors = np.array(palette)[np.minimum(labels, len(palette) - 1)]
            found = (0.4 * image + 0.6 * known * colors).astype(np.uint8)
        axis.imshow(found)
        axis.set_title(title, fontsize=10)
        axis.axis('off')
    figure.subplots_adjust(0.003, 0.003, 0.997, 0.93, 0.02, 0)
    figure.savefig(args.out)


def draw_unmatched(args: argparse.Namespace) -> None:
    """Draw the highest scores that overlap no annotated object by 0.1, with what is annotated."""
    data = Config.fromfile(args.config).test_dataloader.dataset
    truth, palette = COCO(Path(data.data_root, data.ann_file)), data.metainfo.palette
    detected = truth.loadRes(str(args.detected))
    certain = [x for x in detected.anns.values() if x['score'] >= SCORE]
    found = [x for x in certain if not overlaps(x, truth.imgToAnns[x['image_id']])]
    print(f'{len(found)} of {len(certain)} overlap nothing annotated')
    tiles = []
    for x in sorted(found, key=lambda x: -x['score'])[: TILES[0] * TILES[1]]:
        file = truth.imgs[x['image_id']]['file_name']
        image = read(Path(data.data_root, data.data_prefix.img, file))
        objects = [dict(y, category_id=len(palette) + 1) for y in truth.imgToAnns[x['image_id']]]
        drawn = draw_objects(image, [*objects, x], [*palette, ANNOTATED])
        drawn = np.pad(drawn, ((TILE, TILE), (TILE, TILE), (0, 0)), constant_values=255)
        left, top, width, height = np.array(x['bbox']) * SIDE / image.shape[0]
        row, column = (round(value + TILE / 2) for value in (top + height / 2, left + width / 2))
        tiles.append(drawn[row : row + TILE, column : column + TILE])
    rows = [np.hstack(tiles[k : k + TILES[1]]) for k in range(0, len(tiles), TILES[1])]
    cv2.imwrite(str(args.out), np.vstack(rows)[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 88])


def overlaps(found: dict, objects: list[dict]) -> bool:
    """Whether one of the objects has an IoU of 0.1 or more with what was found."""
    boxes = [x['bbox'] for x in objects]
    return np.max(iou([found['bbox']], boxes, [0] * len(boxes)), initial=0) >= 0.1


def read(path: Path) -> np.ndarray:
    """Read an image (H, W, 3) in RGB."""
    return cv2.imread(str(path))[..., ::-1]


def find_objects(image: Path, file: Path) -> list[dict]:
    """Find the objects of an image in a COCO file: true ones, or detected with a score of 0.5."""
    coco = COCO(file)
    (number,) = (key for key, x in coco.imgs.items() if Path(x['file_name']).name == image.name)
    objects = [x for x in coco.imgToAnns[number] if x.get('score', 1) >= SCORE]
    return [dict(x, mask=coco.annToMask(x)) if x.get('segmentation') else x for x in objects]


def draw_objects(image: np.ndarray, objects: list[dict], palette: list) -> np.ndarray:
    """Draw boxes and masks on an enlarged image (H, W, 3); without classes masks are told apart."""
    factor = SIDE / image.shape[0]
    image, random = enlarge(image), np.random.default_rng(1)
    for found in objects:
        color = palette[found['category_id'] - 1]
        if 'mask' in found:
            if len(palette) == 1:
                color = random.integers(60, 256, 3).tolist()
            mask = enlarge(found['mask']) > 0
            image[mask] = (0.35 * image[mask] + 0.65 * np.array(color)).astype(np.uint8)
        if 'mask' not in found or len(palette) > 1:
            x, y, width, height = (round(value * factor) for value in found['bbox'])
            cv2.rectangle(image, (x, y), (x + width, y + height), color, 2)
    return image


def enlarge(picture: np.ndarray, interpolation: int = cv2.INTER_LINEAR) -> np.ndarray:
    """Scale a picture to the height of the strip."""
    width = round(picture.shape[1] * SIDE / picture.shape[0])
    return cv2.resize(picture, (width, SIDE), interpolation=interpolation)


if __name__ == '__main__':
    main()
