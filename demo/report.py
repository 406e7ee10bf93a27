# Copyright (c) mmscalablevit contributors. All rights reserved.
"""Report on the two trainings of the demo: curves, predictions beside the truth, one table."""

import argparse
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import cv2
import matplotlib
import numpy as np
from matplotlib import pyplot as plt
from matplotlib.patches import Patch
from mmengine.device import get_device
from mmengine.structures import InstanceData, PixelData
from rich.progress import track
from torch import nn

# Imported before any toolbox: it registers the backbone.
from mmscalablevit import cli
from mmscalablevit.checkpoint.reading import load_weights
from mmscalablevit.checkpoint.weights import use_safe_loader
from mmscalablevit.errors import UserError
from mmscalablevit.work_dirs import Run, find_checkpoint, read_run

matplotlib.use('Agg')

# Detections below this score are left out of the pictures, and those that overlap a better one of
# any class by this IoU; the metrics count them all.
SCORE_THRESHOLD = 0.5
IOU_THRESHOLD = 0.5
# Images are enlarged to about this side before boxes and names are drawn on them.
PICTURE_SIDE = 256
COLORS = ('tab:blue', 'tab:orange', 'tab:green')


@dataclass(frozen=True)
class Metric:
    """A metric: its name, its key in the log, the least value aimed at, and the log's unit."""

    name: str
    key: str
    target: float | None = None
    scale: float = 1.0


METRICS = dict(
    detection=(
        Metric('box AP', 'coco/bbox_mAP', 0.60),
        Metric('mask AP', 'coco/segm_mAP', 0.50),
        Metric('box AP50', 'coco/bbox_mAP_50'),
    ),
    # mmseg logs percentages.
    segmentation=(Metric('mIoU', 'mIoU', 0.80, scale=0.01), Metric('aAcc', 'aAcc', scale=0.01)),
)


@dataclass(frozen=True)
class Row:
    """A row of the report's table; ``target`` is None where the demo aims at nothing."""

    model: str
    name: str
    text: str
    target: float | None = None
    missed: bool = False


def read_training(work_dir: Path, metrics: tuple[Metric, ...]) -> Run:
    """The logs of a training, which must hold iterations, evaluations and every metric."""
    if not work_dir.is_dir():
        remedy = 'train with tools/train.py first'
        raise UserError(f'work directory {work_dir} does not exist; {remedy}')
    run = read_run(work_dir)
    if not run.train or not run.validations:
        raise UserError(f'the logs in {work_dir} contain no training iteration or no evaluation')
    for step, evaluation in run.validations.items():
        for key in [metric.key for metric in metrics if metric.key not in evaluation.logged]:
            raise UserError(f'the logs in {work_dir} contain no {key} in the evaluation at {step}')
    return run


def values_of(run: Run, metric: Metric) -> dict[int, float]:
    """A metric by step, as a share of one."""
    found = {step: e.logged[metric.key] * metric.scale for step, e in run.validations.items()}
    return dict(sorted(found.items()))


def make_rows(model: str, run: Run) -> list[Row]:
    """The table's rows on one training: last evaluation, iterations and time."""
    last, iterations = max(run.validations), max(run.train)
    rows = []
    for metric in METRICS[model]:
        value = values_of(run, metric)[last]
        # Negated, so that NaN counts as missed.
        missed = metric.target is not None and not value >= metric.target
        rows.append(Row(model, metric.name, f'{value:.3f}', metric.target, missed))
    return [
        *rows,
        Row(model, f'evaluated at {run.unit}', str(last)),
        Row(model, 'iterations', str(iterations)),
        Row(model, 'training minutes', f'{run.hours * 60:.1f}'),
        Row(model, 's/iter', f'{run.hours * 3600 / iterations:.3f}'),
    ]


def format_table(rows: list[Row]) -> str:
    """The rows as a Markdown table."""
    lines = []
    for row in rows:
        target = '' if row.target is None else f'{row.target:.2f}'
        result = '' if row.target is None else 'missed' if row.missed else 'reached'
        lines.append((row.model, row.name, row.text, target, result))
    return cli.markdown_table(('model', '', 'value', 'target', 'result'), lines)


def draw_curves(runs: dict[str, Run], path: Path) -> None:
    """Draw loss and validation metrics, a column for each model, a key of ``METRICS``."""
    size = 5.5 * len(runs), 7
    figure, axes = plt.subplots(2, len(runs), figsize=size, squeeze=False, layout='constrained')
    for (loss_axis, metric_axis), (model, run) in zip(axes.T, runs.items(), strict=True):
        losses = [run.train[step]['loss'] for step in sorted(run.train)]
        loss_axis.plot(sorted(run.train), losses, color='tab:gray')
        loss_axis.set(title=model, ylabel='training loss', xlim=0)
        for color, metric in zip(COLORS, METRICS[model], strict=False):
            found = values_of(run, metric)
            line = dict(color=color, markersize=3, label=metric.name)
            metric_axis.plot(list(found), list(found.values()), 'o-', **line)
            if metric.target is not None:
                label = f'{metric.name} aimed at'
                metric_axis.axhline(metric.target, color=color, linestyle=':', label=label)
        metric_axis.set(xlabel=run.unit, ylabel='on validation images', xlim=0, ylim=(0, 1))
        metric_axis.legend(fontsize='small')
    for axis in axes.flat:
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def draw_grid(
    columns: list[tuple[np.ndarray, ...]],
    row_titles: tuple[str, ...],
    column_titles: list[str],
    colors: dict[str, tuple[int, int, int]],
    path: Path,
) -> None:
    """Write a grid of RGB pictures with titles and a legend of the classes."""
    size = 2.4 * len(columns) + 0.4, 2.45 * len(row_titles) + 0.5
    shape = len(row_titles), len(columns)
    figure, axes = plt.subplots(*shape, figsize=size, squeeze=False, layout='constrained')
    for column, title, axes_of_column in zip(columns, column_titles, axes.T, strict=True):
        axes_of_column[0].set_title(title, fontsize='small')
        for picture, axis in zip(column, axes_of_column, strict=True):
            axis.imshow(picture)
            axis.set(xticks=[], yticks=[])
    for title, axis in zip(row_titles, axes[:, 0], strict=True):
        axis.set_ylabel(title)
    handles = [Patch(color=np.array(color) / 255, label=name) for name, color in colors.items()]
    figure.legend(handles=handles, loc='outside lower center', ncols=len(handles), frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def enlarge(maps: np.ndarray, factor: int) -> np.ndarray:
    """Repeat each row and column of maps (..., H, W)."""
    return maps.repeat(factor, axis=-2).repeat(factor, axis=-1)


def find_model(run: Run) -> tuple[Path, str]:
    """The config of a work directory's last training and its last checkpoint."""
    checkpoint = find_checkpoint(str(run.work_dir))
    if checkpoint is None:
        raise UserError(f'no file {run.work_dir}/last_checkpoint; no checkpoint was written')
    return sorted(run.work_dir.glob('*/vis_data/config.py'))[-1], checkpoint


def build(init: Callable[..., nn.Module], run: Run) -> tuple[nn.Module, dict]:
    """Build a model of a toolbox, and its classes with their colors."""
    config, checkpoint = find_model(run)
    # Without one, the toolbox leaves the weights to us; it only warns of those that do not fit.
    model = init(str(config), None, device=get_device())
    meta = load_weights(model, checkpoint, str(config)).get('meta') or {}
    found = meta.get('dataset_meta') or {}
    if not found.get('classes'):
        raise UserError(f'checkpoint {checkpoint} has no class names')
    palette = found.get('palette') or model.dataset_meta['palette']
    return model, dict(zip(found['classes'], map(tuple, palette), strict=False))


def find_images(data: Path, count: int) -> list[Path]:
    """The first validation images of the folder that ``demo/shapes.py`` wrote."""
    images = sorted((data / 'images/validation').glob('*.jpg'))[:count]
    if len(images) < count:
        held = f'{data}/images/validation holds {len(images)} images of the {count} to show'
        raise UserError(f'{held}; write them with demo/shapes.py')
    return images


def show_detections(run: Run, data: Path, images: list[Path], path: Path) -> None:
    """Draw the last checkpoint's detections beside the truth, with mmdet's visualizer."""
    from mmcv.ops import nms
    from mmdet.apis import inference_detector, init_detector
    from mmdet.structures import DetDataSample
    from mmdet.visualization import DetLocalVisualizer
    from pycocotools.coco import COCO

    model, colors = build(init_detector, run)
    classes = list(colors)
    visualizer = DetLocalVisualizer(line_width=1.5, alpha=0.6)
    visualizer.dataset_meta = dict(classes=classes, palette=list(colors.values()))
    coco = COCO(str(data / 'annotations/instances_validation.json'))
    unknown = [cat['name'] for cat in coco.cats.values() if cat['name'] not in classes]
    if unknown:
        raise UserError(f'the data set has the class {unknown[0]!r}, the model only {classes}')
    labels = {i: classes.index(cat['name']) for i, cat in coco.cats.items()}
    image_ids = {image['file_name']: image['id'] for image in coco.loadImgs(coco.getImgIds())}

    def draw(image: np.ndarray, factor: int, **instances: InstanceData) -> np.ndarray:
        for item in instances.values():
            item.bboxes = item.bboxes * factor
            item.masks = enlarge(item.masks, factor)
        sample = DetDataSample(**instances)
        # Else it would draw the image once more beside what is missing.
        parts = dict(draw_gt='gt_instances' in sample, draw_pred='pred_instances' in sample)
        visualizer.add_datasample('', image, sample, pred_score_thr=SCORE_THRESHOLD, **parts)
        return visualizer.get_image()

    columns = []
    for file in track(images, 'detections'):
        annotations = coco.loadAnns(coco.getAnnIds(image_ids[file.name]))
        x, y, width, height = np.array([a['bbox'] for a in annotations]).T
        truth = InstanceData(
            bboxes=np.stack([x, y, x + width, y + height], axis=1),
            labels=np.array([labels[a['category_id']] for a in annotations]),
            masks=np.stack([coco.annToMask(a).astype(bool) for a in annotations]),
        )
        prediction = inference_detector(model, str(file)).pred_instances
        _, kept = nms(prediction.bboxes, prediction.scores, IOU_THRESHOLD)
        prediction = prediction[kept].numpy()
        image, factor = read_image(file)
        drawn_truth = draw(image, factor, gt_instances=truth)
        columns.append((image, drawn_truth, draw(image, factor, pred_instances=prediction)))
    titles = ('image', 'truth', f'prediction (score > {SCORE_THRESHOLD})')
    draw_grid(columns, titles, [file.name for file in images], colors, path)


def show_segmentation(run: Run, data: Path, images: list[Path], path: Path) -> None:
    """Draw the last checkpoint's label maps beside the truth, with mmseg's visualizer."""
    from mmseg.apis import inference_model, init_model
    from mmseg.structures import SegDataSample
    from mmseg.visualization import SegLocalVisualizer

    model, colors = build(init_model, run)
    visualizer = SegLocalVisualizer(alpha=0.7)
    visualizer.dataset_meta = dict(classes=list(colors), palette=list(colors.values()))

    def draw(image: np.ndarray, factor: int, label_map: np.ndarray) -> np.ndarray:
        sample = SegDataSample(pred_sem_seg=PixelData(data=enlarge(label_map, factor)[None]))
        visualizer.add_datasample('', image, sample, with_labels=False)
        return visualizer.get_image()

    columns = []
    for file in track(images, 'segmentation'):
        truth_file = data / 'annotations/validation' / f'{file.stem}.png'
        truth = cv2.imread(str(truth_file), cv2.IMREAD_UNCHANGED)
        if truth is None:
            raise UserError(f'cannot read {truth_file}')
        prediction = inference_model(model, str(file)).pred_sem_seg.data[0].cpu().numpy()
        image, factor = read_image(file)
        # The files count from 1, the model from 0.
        columns.append((image, draw(image, factor, truth - 1), draw(image, factor, prediction)))
    titles = ('image', 'truth', 'prediction')
    draw_grid(columns, titles, [file.name for file in images], colors, path)


def read_image(path: Path) -> tuple[np.ndarray, int]:
    """An image, enlarged by a whole factor to about ``PICTURE_SIDE``, uint8 RGB; the factor."""
    image = cv2.imread(str(path))
    if image is None:
        raise UserError(f'cannot read {path}')
    factor = max(1, round(PICTURE_SIDE / max(image.shape)))
    image = cv2.resize(image, None, fx=factor, fy=factor, interpolation=cv2.INTER_CUBIC)
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB), factor


def write_report(
    det_dir: Path, seg_dir: Path, data: Path, out_dir: Path, num_images: int = 8
) -> list[Row]:
    """Write ``curves.png``, ``detections.png``, ``segmentation.png`` and ``report.md``."""
    # Everything that can be missing is asked for before the slow part.
    folders = dict(detection=det_dir, segmentation=seg_dir)
    runs = {model: read_training(folders[model], METRICS[model]) for model in METRICS}
    for run in runs.values():
        find_model(run)
    images = find_images(data, num_images)

    rows = [row for model, run in runs.items() for row in make_rows(model, run)]
    table = format_table(rows)
    out_dir.mkdir(parents=True, exist_ok=True)
    draw_curves(runs, out_dir / 'curves.png')
    show_detections(runs['detection'], data, images, out_dir / 'detections.png')
    show_segmentation(runs['segmentation'], data, images, out_dir / 'segmentation.png')
    names = ('curves', 'detections', 'segmentation')
    pictures = '\n\n'.join(f'![{name}]({name}.png)' for name in names)
    text = f'# The demo on images it was not trained on\n\n{table}\n{pictures}\n'
    (out_dir / 'report.md').write_text(text)
    print(f'\n{table}')
    for name in (*(f'{name}.png' for name in names), 'report.md'):
        print(f'wrote {out_dir / name}')
    return rows


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        formatter_class=cli.HelpFormatter,
        description='Report on the two trainings of the demo: curves, predictions beside the '
        'truth, and one table of the last evaluations.',
        epilog='example: python demo/report.py --det-dir work_dirs/demo/detection '
        '--seg-dir work_dirs/demo/segmentation --data data/shapes --out-dir work_dirs/demo',
    )
    folders = {
        '--det-dir': "detector's work directory",
        '--seg-dir': "segmentor's work directory",
        '--data': 'folder that demo/shapes.py wrote',
        '--out-dir': 'folder to write to',
    }
    for name, text in folders.items():
        parser.add_argument(name, type=Path, required=True, help=text)
    help_ = 'number of validation images to show (default: 8)'
    parser.add_argument('--num-images', type=int, default=8, help=help_)
    help_ = 'exit with status 1 if a target is missed'
    parser.add_argument('--strict', action='store_true', help=help_)
    args = parser.parse_args()
    if args.num_images < 1:
        parser.error(f'--num-images must be at least 1, got {args.num_images}')
    return args


def main() -> None:
    """Run the command line."""
    args = parse_args()
    use_safe_loader()
    # mmengine's visualizer says it of every shape that touches the border.
    warnings.filterwarnings('ignore', r'Warning: The (bbox|polygon) is out of bounds')
    rows = write_report(args.det_dir, args.seg_dir, args.data, args.out_dir, args.num_images)
    if args.strict and any(row.missed for row in rows):
        raise UserError('a target is missed')


if __name__ == '__main__':
    cli.run(main)
