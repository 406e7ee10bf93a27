# Copyright (c) mmscalablevit contributors. All rights reserved.
"""Draw pictures of the pages: published results over FLOPs, and predictions.

Predictions are those that ``demo/image_demo.py`` wrote to a folder for one image each::

    python docs/pictures.py published
    python docs/pictures.py predictions --detected IMAGE FOLDER --segmented IMAGE FOLDER --out FILE
"""

import argparse
import json
from pathlib import Path

import cv2
import matplotlib
import numpy as np
import yaml
from pycocotools import mask as coco_mask

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
SIDE = 300
SCORE = 0.5


def main() -> None:
    """Parse the command line and draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    pictures = parser.add_subparsers(dest='picture', required=True)
    pictures.add_parser('published', help='box AP and mIoU over GFLOPs, from the metafiles')
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
    args = parser.parse_args()
    if args.picture == 'published':
        draw_published(IMAGES / 'published.png')
    else:
        draw_predictions(args)


def draw_published(out: Path) -> None:
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
    figure.savefig(out)


def draw_predictions(args: argparse.Namespace) -> None:
    """Draw a strip: images with their detections, then label maps."""
    tiles = []
    for path, folder in args.detected:
        predictions = json.loads((folder / 'predictions.json').read_text())
        (number,) = [x['id'] for x in predictions['images'] if x['file_name'].endswith(path.name)]
        image = cv2.imread(str(path))[..., ::-1]
        objects = [
            found
            for found in predictions['annotations']
            if found['image_id'] == number and found['score'] > SCORE
        ]
        tiles += [enlarge(image), draw_objects(image, objects)]
    for path, folder in args.segmented:
        labels = folder / 'label_maps' / f'{path.stem}.png'
        labels = cv2.imread(str(labels), cv2.IMREAD_UNCHANGED)
        colors = np.array([BACKGROUND, *COLORS], np.uint8)[labels]
        tiles.append(enlarge(colors, cv2.INTER_NEAREST))
    gap = np.full((SIDE, 8, 3), 255, np.uint8)
    strip = np.hstack([part for tile in tiles for part in (tile, gap)][:-1])
    cv2.imwrite(str(args.out), strip[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 88])


def draw_objects(image: np.ndarray, objects: list[dict]) -> np.ndarray:
    """Draw boxes and masks on an enlarged image (H, W, 3), a color for each class."""
    factor = SIDE / image.shape[0]
    image = enlarge(image)
    for found in objects:
        color = COLORS[found['category_id'] - 1]
        if 'segmentation' in found:
            mask = enlarge(coco_mask.decode(found['segmentation'])) > 0
            image[mask] = (0.35 * image[mask] + 0.65 * np.array(color)).astype(np.uint8)
        x, y, width, height = (round(value * factor) for value in found['bbox'])
        cv2.rectangle(image, (x, y), (x + width, y + height), color, 2)
    return image


def enlarge(picture: np.ndarray, interpolation: int = cv2.INTER_LINEAR) -> np.ndarray:
    """Scale a picture to the height of the strip."""
    width = round(picture.shape[1] * SIDE / picture.shape[0])
    return cv2.resize(picture, (width, SIDE), interpolation=interpolation)


if __name__ == '__main__':
    main()
