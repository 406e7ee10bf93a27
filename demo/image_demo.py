# Copyright (c) mmscalablevit contributors. All rights reserved.
"""Predict on images or a video: pictures of the predictions, and the predictions themselves."""

import argparse
import glob
import itertools
import json
import math
import os
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import matplotlib
import mmcv
import numpy as np
import torch
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.registry import DATASETS, init_default_scope
from rich.console import Console
from rich.progress import track

# Imported before any toolbox: it registers the backbone.
from mmscalablevit import cli
from mmscalablevit.checkpoint.reading import load_weights
from mmscalablevit.checks.config import find_settings
from mmscalablevit.errors import CheckpointError, UserError, config_errors

matplotlib.use('Agg')

IMAGES = {'.bmp', '.jpeg', '.jpg', '.png', '.ppm', '.tif', '.tiff', '.webp'}
VIDEOS = {'.avi', '.m4v', '.mkv', '.mov', '.mp4', '.mpeg', '.mpg', '.webm'}
SCORE_THRESHOLD = 0.3
# Of a classifier's classes, as many as are written.
TOP = 5
# A class gets its name where it reaches this far around a pixel.
MIN_DEPTH = 6
NAME_STYLE = dict(
    colors='white',
    vertical_alignments='center',
    horizontal_alignments='center',
    bboxes=dict(facecolor='black', alpha=0.5, pad=0.7, edgecolor='none'),
)


@dataclass(frozen=True)
class Frame:
    """An image, uint8 BGR (H, W, 3): its number and its name, which the outputs keep."""

    name: str
    image: np.ndarray
    number: int

    @property
    def rgb(self) -> np.ndarray:
        """The image as the visualizers need it."""
        return np.ascontiguousarray(self.image[..., ::-1])


class Detector:
    """Boxes and masks from a score on, written together as one file in COCO's format."""

    def __init__(self, cfg: Config, device: str, score_threshold: float = SCORE_THRESHOLD) -> None:
        from mmdet.apis import DetInferencer
        from mmdet.visualization import DetLocalVisualizer

        self.inferencer = DetInferencer(cfg, device=device, show_progress=False)
        self.visualizer = DetLocalVisualizer()
        self.score_threshold = score_threshold
        self.images: list[dict] = []
        self.annotations: list[dict] = []

    def write(self, frame: Frame, sample, out_dir: Path) -> None:
        """Keep the detections of an image."""
        instances = sample.pred_instances
        sample.pred_instances = instances[instances.scores >= self.score_threshold]
        found = self.inferencer.pred2dict(sample)
        height, width = frame.image.shape[:2]
        self.images.append(dict(id=frame.number, file_name=frame.name, height=height, width=width))
        for i, (x1, y1, x2, y2) in enumerate(found['bboxes']):
            width, height = x2 - x1, y2 - y1
            annotation = dict(
                id=len(self.annotations) + 1,
                image_id=frame.number,
                category_id=found['labels'][i] + 1,
                bbox=[x1, y1, width, height],
                area=width * height,
                score=found['scores'][i],
                iscrowd=0,
            )
            if 'masks' in found:
                annotation['segmentation'] = found['masks'][i]
            self.annotations.append(annotation)

    def draw(self, frame: Frame, sample) -> np.ndarray:
        """The image with boxes, masks, names and scores, RGB."""
        # What is below the threshold was taken out before.
        options = dict(draw_gt=False, pred_score_thr=-math.inf)
        self.visualizer.add_datasample('', frame.rgb, sample, **options)
        return self.visualizer.get_image()

    def finish(self, out_dir: Path) -> list[Path]:
        """Write the file."""
        names = self.visualizer.dataset_meta['classes']
        categories = [dict(id=i, name=name) for i, name in enumerate(names, start=1)]
        content = dict(images=self.images, categories=categories, annotations=self.annotations)
        return [_write_json(out_dir / 'predictions.json', content)]


class Segmentor:
    """Label maps, a png for each image, and the names of the classes beside them."""

    def __init__(self, cfg: Config, device: str) -> None:
        from mmseg.apis import MMSegInferencer
        from mmseg.visualization import SegLocalVisualizer

        self.inferencer = MMSegInferencer(cfg, device=device, show_progress=False)
        self.visualizer = SegLocalVisualizer(alpha=0.6)
        self.written: set[Path] = set()

    def write(self, frame: Frame, sample, out_dir: Path) -> None:
        """Write the label map of an image."""
        path = (out_dir / 'label_maps' / frame.name).with_suffix('.png')
        if path in self.written:
            raise UserError(f'{path} is the label map of two inputs; predict on them separately')
        self.written.add(path)
        mmcv.imwrite(sample.pred_sem_seg.data[0].numpy().astype(np.uint8), str(path))

    def draw(self, frame: Frame, sample) -> np.ndarray:
        """The image under the colors and names of its classes, RGB."""
        # mmseg's own way to place the names takes seconds for each image.
        self.visualizer.add_datasample('', frame.rgb, sample, draw_gt=False, with_labels=False)
        labels = sample.pred_sem_seg.data[0].numpy()
        for label in np.unique(labels):
            # Where the class is farthest from others; the image's border counts as such.
            region = np.pad(labels == label, 1).astype(np.uint8)
            depth = cv2.distanceTransform(region, cv2.DIST_L2, 3)[1:-1, 1:-1]
            y, x = np.unravel_index(depth.argmax(), depth.shape)
            if depth[y, x] >= MIN_DEPTH:
                name = self.visualizer.dataset_meta['classes'][label]
                self.visualizer.draw_texts(name, np.array([x, y]), **NAME_STYLE)
        return self.visualizer.get_image()

    def finish(self, out_dir: Path) -> list[Path]:
        """Write what the numbers in the label maps stand for."""
        meta = self.visualizer.dataset_meta
        classes = [
            dict(label=i, name=name, color=list(map(int, color)))
            for i, (name, color) in enumerate(zip(meta['classes'], meta['palette'], strict=False))
        ]
        return [out_dir / 'label_maps', _write_json(out_dir / 'classes.json', classes)]


class Classifier:
    """The best classes of each image with their scores, written together as one file."""

    def __init__(self, cfg: Config, device: str) -> None:
        from mmpretrain import ImageClassificationInferencer
        from mmpretrain.visualization import UniversalVisualizer

        self.inferencer = ImageClassificationInferencer(cfg, pretrained=False, device=device)
        self.visualizer = UniversalVisualizer()
        self.predictions: list[dict] = []

    def write(self, frame: Frame, sample, out_dir: Path) -> None:
        """Keep the best classes of an image."""
        names = self.visualizer.dataset_meta['classes']
        scores, labels = sample.pred_score.topk(min(TOP, len(names)))
        classes = [
            dict(label=label, name=names[label], score=score)
            for label, score in zip(labels.tolist(), scores.tolist(), strict=True)
        ]
        self.predictions.append(dict(file_name=frame.name, classes=classes))

    def draw(self, frame: Frame, sample) -> np.ndarray:
        """The image with its class, RGB."""
        self.visualizer.visualize_cls(frame.rgb, sample, draw_gt=False)
        return self.visualizer.get_image()

    def finish(self, out_dir: Path) -> list[Path]:
        """Write the file."""
        return [_write_json(out_dir / 'predictions.json', self.predictions)]


PREDICTORS = dict(mmdet=Detector, mmseg=Segmentor, mmpretrain=Classifier)
Predictor = Detector | Segmentor | Classifier


def build_predictor(
    cfg: Config, checkpoint: str, device: str, score_threshold: float | None
) -> Predictor:
    """Build the predictor of a config's toolbox, with a checkpoint's weights and class names."""
    scope = cfg.get('default_scope')
    if scope not in PREDICTORS:
        wanted = f'which must be one of {", ".join(PREDICTORS)}'
        raise UserError(f'config {cfg.filename} has default_scope={scope!r}, {wanted}')
    if score_threshold is not None and scope != 'mmdet':
        raise UserError(f'--score-thr is for detectors, and {cfg.filename} is of {scope}')
    options = {} if score_threshold is None else dict(score_threshold=score_threshold)
    init_default_scope(scope)
    # Weights and names come below: the toolboxes take a checkpoint that fits in part, and COCO's
    # or Cityscapes' names where it has none.
    with warnings.catch_warnings(), config_errors(cfg):
        warnings.simplefilter('ignore')
        predictor = PREDICTORS[scope](cfg, device, **options)
    model = predictor.inferencer.model
    meta = load_weights(model, checkpoint, cfg.filename).get('meta') or {}
    predictor.visualizer.dataset_meta = read_classes(meta, cfg, checkpoint)
    return predictor


def read_classes(meta: dict, cfg: Config, checkpoint: str) -> dict:
    """Names and RGB colors of the classes: the checkpoint's, else the config's data set's."""
    source = f'checkpoint {checkpoint}'
    try:
        found = {key.lower(): value for key, value in (meta.get('dataset_meta') or meta).items()}
    except AttributeError as error:
        raise CheckpointError(f'{source} holds a meta that is no dict of names') from error
    if not found.get('classes'):
        source = f'the test data set of {cfg.filename}'
        with config_errors(cfg):
            found = DATASETS.build(dict(cfg.test_dataloader.dataset, lazy_init=True)).metainfo
        print(f'no class names in checkpoint {checkpoint}: taking those of {source}')
    names = found.get('classes')
    if not names:
        raise UserError(
            f'no class names: neither meta.dataset_meta of checkpoint {checkpoint} nor the test '
            f'data set of {cfg.filename} has "classes"'
        )
    names = [names] if isinstance(names, str) else list(names)
    for key, number in find_settings(cfg.model, 'num_classes'):
        if 'head' in key and number != len(names):
            raise UserError(f'{source} has {len(names)} class names for a model of {number}')
    palette = found.get('palette')
    # Where a data set has no colors of its own, its class may leave it those of all its classes.
    if not isinstance(palette, list | tuple) or len(palette) < len(names):
        palette = np.random.default_rng(0).integers(30, 226, (len(names), 3)).tolist()
    return dict(classes=names, palette=[tuple(color) for color in palette][: len(names)])


def find_inputs(given: str) -> list[Path]:
    """The images, by name, of an image, folder or pattern; or a single video."""
    path = Path(given)
    if path.is_dir():
        found = sorted(p for p in path.iterdir() if p.suffix.lower() in IMAGES)
        if not found:
            raise UserError(f'folder {path} holds no image ({", ".join(sorted(IMAGES))})')
        return found
    names = [given] if path.is_file() else sorted(glob.glob(given, recursive=True))
    found = [Path(name) for name in names if Path(name).is_file()]
    if not found:
        raise UserError(f'input {given} does not exist')
    allowed = IMAGES | VIDEOS if len(found) == 1 else IMAGES
    for path in found:
        if path.suffix.lower() not in allowed:
            kinds = ', '.join(sorted(allowed))
            raise UserError(f'input {path} must be one of: {kinds}; videos one at a time')
    return found


def read_images(paths: list[Path]) -> Iterator[Frame]:
    """Read images, which are named below the folder that they share."""
    root = Path(os.path.commonpath([path.resolve().parent for path in paths]))
    for number, path in enumerate(paths):
        image = mmcv.imread(str(path))
        if image is None:
            raise UserError(f'cannot read image {path}')
        yield Frame(str(path.resolve().relative_to(root)), image, number)


def read_frames(path: Path, video: mmcv.VideoReader) -> Iterator[Frame]:
    """Read the frames of a video, which are named ``VIDEO/000000.jpg`` and so on."""
    number = -1
    for number, image in enumerate(video):
        yield Frame(f'{path.stem}/{number:06d}.jpg', image, number)
    if number < 0:
        raise UserError(f'video {path} has no frame')


def open_writer(path: Path, fps: float, size: tuple[int, int]) -> cv2.VideoWriter:
    """Begin an mp4 of a width and height."""
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*'mp4v'), fps, size)
    if not writer.isOpened():
        raise UserError(f'cannot write {path}: this OpenCV has no encoder for mp4')
    return writer


def predict(predictor: Predictor, frames: Iterable[Frame], batch_size: int) -> Iterator[tuple]:
    """Predict batch by batch; yields each image and its data sample, on the CPU."""
    inferencer = predictor.inferencer
    for batch in _batches(frames, batch_size, isinstance(predictor, Segmentor)):
        for data in inferencer.preprocess([frame.image for frame in batch], len(batch)):
            # mmdet's inferencer gives the inputs before the data.
            data = data if isinstance(data, dict) else data[1]
            samples = inferencer.forward(data)
        yield from ((frame, sample.cpu()) for frame, sample in zip(batch, samples, strict=True))


def _batches(frames: Iterable[Frame], batch_size: int, of_one_size: bool) -> Iterator[list[Frame]]:
    # mmseg takes no batch of several sizes.
    sizes = itertools.groupby(frames, lambda frame: frame.image.shape if of_one_size else None)
    for _, group in sizes:
        while batch := list(itertools.islice(group, batch_size)):
            yield batch


def run(predictor: Predictor, paths: list[Path], out_dir: Path, batch_size: int) -> list[Path]:
    """Predict and write pictures, or a video, and the predictions; returns what was written."""
    is_video = paths[0].suffix.lower() in VIDEOS
    video = mmcv.VideoReader(str(paths[0])) if is_video else None
    if is_video and not video.opened:
        raise UserError(f'cannot read video {paths[0]}')
    frames = read_images(paths) if video is None else read_frames(paths[0], video)
    # The number of frames is a guess of the container's, which may be 0.
    total = len(paths) if video is None else video.frame_cnt or None
    drawn = out_dir / 'vis' if video is None else out_dir / 'vis' / f'{paths[0].stem}.mp4'
    writer = None
    samples = predict(predictor, frames, batch_size)
    console = Console(stderr=True)
    for frame, sample in track(samples, 'Predicting', total=total, console=console):
        predictor.write(frame, sample, out_dir)
        picture = np.ascontiguousarray(predictor.draw(frame, sample)[..., ::-1])
        if video is None:
            mmcv.imwrite(picture, str(drawn / frame.name))
            continue
        writer = writer or open_writer(drawn, video.fps or 25.0, picture.shape[1::-1])
        writer.write(picture)
    if writer is not None:
        writer.release()
    return [drawn, *predictor.finish(out_dir)]


def _write_json(path: Path, content: dict | list) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content) + '\n', encoding='utf-8')
    return path


def _check_device(name: str) -> None:
    try:
        torch.zeros(1, device=name)
    # Also what torch asserts where it is compiled without CUDA.
    except (AssertionError, RuntimeError) as error:
        raise UserError(f'--device {name}: {str(error).splitlines()[0]}') from error


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        formatter_class=cli.HelpFormatter,
        description='Predict on images or a video with a trained detector, segmentor or '
        'classifier. Writes pictures (or a video) to DIR/vis, and beside them predictions.json '
        '(detections in COCO format, or classes) or the folder label_maps (segmentation).',
        epilog="example: python demo/image_demo.py 'photos/*.jpg' "
        'configs/detection/mask-rcnn_scalablevit-s_fpn_1x_coco.py epoch_12.pth --out-dir predicted',
    )
    help_ = 'image, folder of images, quoted pattern, or video'
    parser.add_argument('input', metavar='INPUT', help=help_)
    parser.add_argument('config', metavar='CONFIG', help='config of the model')
    parser.add_argument('checkpoint', metavar='CHECKPOINT', help='checkpoint of the whole model')
    help_ = 'folder to write to'
    parser.add_argument('--out-dir', metavar='DIR', type=Path, required=True, help=help_)
    parser.add_argument('--batch-size', type=int, default=1, help='images in a batch (default: 1)')
    parser.add_argument('--device', help='such as cpu or cuda:0 (default: the accelerator, if any)')
    help_ = f'detections below it are neither drawn nor written (default: {SCORE_THRESHOLD})'
    parser.add_argument('--score-thr', type=float, help=help_)
    args = parser.parse_args()
    if args.batch_size < 1:
        parser.error(f'--batch-size must be at least 1, got {args.batch_size}')
    if args.score_thr is not None and not 0 <= args.score_thr <= 1:
        parser.error(f'--score-thr must be from 0 to 1, got {args.score_thr}')
    return args


def main() -> None:
    """Predict."""
    args = parse_args()
    paths = find_inputs(args.input)
    device = args.device or get_device()
    _check_device(device)
    cfg = cli.read_config(args.config)
    predictor = build_predictor(cfg, args.checkpoint, device, args.score_thr)
    # mmengine's visualizer says it of every shape that touches the border.
    warnings.filterwarnings('ignore', r'Warning: The (bbox|polygon) is out of bounds')
    for path in run(predictor, paths, args.out_dir, args.batch_size):
        print(f'wrote {path}')


if __name__ == '__main__':
    cli.run(main)
