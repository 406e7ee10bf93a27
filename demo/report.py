# Copyright (c) mmscalablevit contributors. All rights reserved.
"""Report on the two trainings of the demo: curves, predictions beside the truth, one table."""

import argparse
import json
import warnings
from dataclasses import dataclass
from pathlib import Path

import cv2
import matplotlib
import numpy as np
from matplotlib import pyplot as plt
from matplotlib.patches import Patch
from mmengine.device import get_device
from mmengine.runner import find_latest_checkpoint
from mmengine.structures import InstanceData, PixelData
from rich.progress import track

# Imported before any toolbox: it registers the backbone.
from mmscalablevit import cli
from mmscalablevit.checkpoint.reading import (
    find_weights,
    load_weights,
    read_checkpoint,
    use_safe_loader,
)
from mmscalablevit.errors import UserError

matplotlib.use('Agg')

# Detections below this score are left out of the pictures; the metrics count them all.
SCORE_THRESHOLD = 0.5
# Images are enlarged to about this side before boxes and names are drawn on them.
PICTURE_SIDE = 256


@dataclass(frozen=True)
class Metric:
    """A metric as the report shows it and as the log has it.

    Args:
        name (str): The name to show.
        key (str): The key in the log.
        target (float, optional): The least value that the demo aims at. Defaults to None.
        scale (float): Factor from the logged value to a share of one. Defaults to 1.
    """

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


@dataclass
class History:
    """What the logs of one work directory say, by iteration.

    Args:
        train (dict[int, dict]): Records with the loss and the seconds per iteration.
        evaluations (dict[int, dict]): Records with validation metrics.
    """

    train: dict[int, dict]
    evaluations: dict[int, dict]

    @property
    def iterations(self) -> int:
        """The last iteration that was logged."""
        return max(self.train)

    @property
    def seconds(self) -> float:
        """Time spent in training iterations, without evaluation.

        Each record's time stands for the iterations since the record before it.
        """
        steps = sorted(self.train)
        spans = np.diff([0, *steps])
        return float(
            sum(span * self.train[step]['time'] for span, step in zip(spans, steps, strict=True))
        )


@dataclass(frozen=True)
class Row:
    """A row of the report's table; ``target`` is None where the demo aims at nothing."""

    model: str
    name: str
    text: str
    target: float | None = None
    missed: bool = False


def read_log(path: Path) -> list[dict]:
    """Read one ``scalars.json`` of mmengine: a JSON object per line.

    Args:
        path (Path): The log.

    Returns:
        list[dict]: Its records in order. A last line that was cut off in writing is left out.

    Raises:
        UserError: If another line is not a JSON object.
    """
    lines = path.read_text().splitlines()
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number < len(lines):
                raise UserError(f'{path}, line {number}: not a JSON object: {error}') from error
    return records


def split_records(records: list[dict]) -> History:
    """Tell the training records of one log from its evaluations and find their iterations.

    Evaluations are logged with the iteration as their step or, by configurations that count
    epochs, with the epoch; the iterations logged before tell which.

    Args:
        records (list[dict]): The records of one log in order.

    Returns:
        History: The records by iteration.
    """
    history = History({}, {})
    iteration = 0
    for record in records:
        if 'loss' in record:
            iteration = record['iter']
            history.train[iteration] = record
        else:
            history.evaluations[max(iteration, record['step'])] = record
    return history


def merge_histories(histories: list[History]) -> History:
    """Merge the histories of a training and its continuations.

    A later run goes on from a checkpoint of the runs before it, so what they logged from its
    first iteration on led nowhere and is dropped.

    Args:
        histories (list[History]): Those of the single runs, oldest first.

    Returns:
        History: What led to the last run's weights.
    """
    merged = History({}, {})
    for history in histories:
        if history.train:
            first = min(history.train)
            merged.train = {i: r for i, r in merged.train.items() if i < first}
            merged.evaluations = {i: r for i, r in merged.evaluations.items() if i < first}
        merged.train.update(history.train)
        merged.evaluations.update(history.evaluations)
    return merged


def find_logs(work_dir: Path) -> list[Path]:
    """The logs of every run in a work directory, oldest first.

    Args:
        work_dir (Path): The ``--work-dir`` of ``tools/train.py``.

    Returns:
        list[Path]: The ``scalars.json`` of each run.

    Raises:
        UserError: If there is none.
    """
    logs = sorted(work_dir.glob('*/vis_data/scalars.json'))
    if not logs:
        raise UserError(
            f'no training log {work_dir}/*/vis_data/scalars.json; train with '
            f'tools/train.py and --work-dir {work_dir} first'
        )
    return logs


def read_history(work_dir: Path, metrics: tuple[Metric, ...]) -> History:
    """Read and merge the logs of every run in a work directory.

    Args:
        work_dir (Path): The ``--work-dir`` of ``tools/train.py``.
        metrics (tuple[Metric, ...]): The metrics that every evaluation must hold.

    Returns:
        History: What led to the last run's weights.

    Raises:
        UserError: If a log, the loss, the time or a metric is missing.
    """
    history = merge_histories([split_records(read_log(path)) for path in find_logs(work_dir)])
    if not history.train:
        raise UserError(f'the logs in {work_dir} hold no training iteration')
    if not history.evaluations:
        raise UserError(f'the logs in {work_dir} hold no evaluation')
    for iteration, record in history.train.items():
        if 'time' not in record:
            raise UserError(f'the logs in {work_dir} hold no time at iteration {iteration}')
    for iteration, record in history.evaluations.items():
        for metric in metrics:
            if metric.key not in record:
                raise UserError(
                    f'the logs in {work_dir} hold no {metric.key} in the evaluation '
                    f'at iteration {iteration}, only {", ".join(record)}'
                )
    return history


def make_rows(model: str, history: History) -> list[Row]:
    """The table's rows on one training: last evaluation, iterations and time.

    Args:
        model (str): A key of ``METRICS``.
        history (History): The training's logs.

    Returns:
        list[Row]: One row for each metric, then those on iterations and time.
    """
    last = max(history.evaluations)
    rows = []
    for metric in METRICS[model]:
        value = history.evaluations[last][metric.key] * metric.scale
        # Negated, so that NaN counts as missed.
        missed = metric.target is not None and not value >= metric.target
        rows.append(Row(model, metric.name, f'{value:.3f}', metric.target, missed))
    return [
        *rows,
        Row(model, 'evaluated at iteration', str(last)),
        Row(model, 'iterations', str(history.iterations)),
        Row(model, 'training minutes', f'{history.seconds / 60:.1f}'),
        Row(model, 's/iter', f'{history.seconds / history.iterations:.3f}'),
    ]


def format_table(rows: list[Row]) -> str:
    """Lay the rows out as a Markdown table that also reads well in a terminal.

    Args:
        rows (list[Row]): The rows.

    Returns:
        str: The table's lines, ending in a newline.
    """
    cells = [('model', '', 'value', 'target', 'result')]
    for row in rows:
        target = '' if row.target is None else f'{row.target:.2f}'
        result = '' if row.target is None else 'missed' if row.missed else 'reached'
        cells.append((row.model, row.name, row.text, target, result))
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    cells.insert(1, tuple('-' * width for width in widths))
    return ''.join(
        '| '
        + ' | '.join(text.ljust(width) for text, width in zip(line, widths, strict=True))
        + ' |\n'
        for line in cells
    )


def draw_curves(histories: dict[str, History], path: Path) -> None:
    """Draw loss and validation metrics against iterations, a column for each model.

    Args:
        histories (dict[str, History]): The trainings' logs by key of ``METRICS``.
        path (Path): The picture to write.
    """
    figure, axes = plt.subplots(
        2, len(histories), figsize=(5.5 * len(histories), 7), squeeze=False, layout='constrained'
    )
    for (loss_axis, metric_axis), (model, history) in zip(axes.T, histories.items(), strict=True):
        steps = sorted(history.train)
        loss_axis.plot(steps, [history.train[step]['loss'] for step in steps], color='tab:gray')
        loss_axis.set(title=model, ylabel='training loss', xlim=0)
        steps = sorted(history.evaluations)
        for color, metric in zip(
            ('tab:blue', 'tab:orange', 'tab:green'), METRICS[model], strict=False
        ):
            values = [history.evaluations[step][metric.key] * metric.scale for step in steps]
            metric_axis.plot(steps, values, 'o-', color=color, markersize=3, label=metric.name)
            if metric.target is not None:
                metric_axis.axhline(
                    metric.target, color=color, linestyle=':', label=f'{metric.name} aimed at'
                )
        metric_axis.set(xlabel='iteration', ylabel='on validation images', xlim=0, ylim=(0, 1))
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
    """Write a grid of pictures with a title to each row and column and a legend of the classes.

    Args:
        columns (list[tuple[np.ndarray, ...]]): RGB pictures, each tuple a column.
        row_titles (tuple[str, ...]): A title for each picture of a column.
        column_titles (list[str]): A title for each column.
        colors (dict[str, tuple[int, int, int]]): RGB color of each class.
        path (Path): The picture to write.
    """
    figure, axes = plt.subplots(
        len(row_titles),
        len(columns),
        squeeze=False,
        layout='constrained',
        figsize=(2.4 * len(columns) + 0.4, 2.45 * len(row_titles) + 0.5),
    )
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


def enlarge(array: np.ndarray, factor: int) -> np.ndarray:
    """Repeat the pixels of maps.

    Args:
        array (np.ndarray): Maps, (..., H, W).
        factor (int): How often to repeat each row and column.

    Returns:
        np.ndarray: (..., H * factor, W * factor).
    """
    return array.repeat(factor, axis=-2).repeat(factor, axis=-1)


def find_model(work_dir: Path) -> tuple[Path, Path]:
    """Find the configuration and the last checkpoint of a work directory.

    Args:
        work_dir (Path): The ``--work-dir`` of ``tools/train.py``.

    Returns:
        tuple[Path, Path]: The last run's configuration and the checkpoint.

    Raises:
        UserError: If either is missing.
        CheckpointError: If the checkpoint is damaged or holds no weights.
    """
    last = find_latest_checkpoint(str(work_dir))
    if last is None:
        raise UserError(f'no file {work_dir}/last_checkpoint; the training wrote no checkpoint')
    config = find_logs(work_dir)[-1].with_name('config.py')
    # By name, since the path within holds no longer once a work directory was moved.
    checkpoint = work_dir / Path(last).name
    for path in (config, checkpoint):
        if not path.is_file():
            raise UserError(f'no file {path}; the run in {work_dir} is incomplete')
    # The toolboxes, which build the models, fail on wrong weights without naming the file.
    find_weights(read_checkpoint(str(checkpoint), 'cpu'), str(checkpoint))
    return config, checkpoint


def find_images(data: Path, count: int) -> list[Path]:
    """The first validation images of the demo's data set.

    Args:
        data (Path): The folder that ``demo/shapes.py`` wrote.
        count (int): How many to take.

    Returns:
        list[Path]: Image files.

    Raises:
        UserError: If there are fewer.
    """
    images = sorted((data / 'images/validation').glob('*.jpg'))[:count]
    if len(images) < count:
        raise UserError(
            f'{data}/images/validation holds {len(images)} images of the {count} to '
            'show; write them with demo/shapes.py'
        )
    return images


def _class_index(classes: tuple[str, ...], name: str) -> int:
    if name not in classes:
        raise UserError(
            f'the data set holds the class {name!r}, the model knows only {", ".join(classes)}'
        )
    return classes.index(name)


def show_detections(work_dir: Path, data: Path, images: list[Path], path: Path) -> None:
    """Draw the last checkpoint's detections beside the truth, with mmdet's visualizer.

    Args:
        work_dir (Path): The detector's work directory.
        data (Path): The data set.
        images (list[Path]): Validation images.
        path (Path): The picture to write.
    """
    from mmdet.apis import inference_detector, init_detector
    from mmdet.structures import DetDataSample
    from mmdet.visualization import DetLocalVisualizer
    from pycocotools.coco import COCO

    config, checkpoint = find_model(work_dir)
    model = init_detector(str(config), str(checkpoint), device=get_device())
    classes = model.dataset_meta['classes']
    # Where the configuration names no colors, the palette is COCO's and longer.
    palette = list(model.dataset_meta['palette'])[: len(classes)]
    # The toolbox only warns of weights that do not fit.
    load_weights(model, str(checkpoint), str(config))
    visualizer = DetLocalVisualizer(line_width=1.5, alpha=0.6)
    visualizer.dataset_meta = dict(classes=classes, palette=palette)

    coco = COCO(str(data / 'annotations/instances_validation.json'))
    labels = {i: _class_index(classes, coco.cats[i]['name']) for i in coco.getCatIds()}
    image_ids = {image['file_name']: image['id'] for image in coco.loadImgs(coco.getImgIds())}

    def draw(image: np.ndarray, factor: int, **instances: InstanceData) -> np.ndarray:
        for item in instances.values():
            item.bboxes = item.bboxes * factor
            item.masks = enlarge(item.masks, factor)
        visualizer.add_datasample(
            '',
            image,
            DetDataSample(**instances),
            draw_gt='gt_instances' in instances,
            draw_pred='pred_instances' in instances,
            pred_score_thr=SCORE_THRESHOLD,
        )
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
        prediction = inference_detector(model, str(file)).pred_instances.numpy()
        image, factor = read_image(file)
        columns.append(
            (
                image,
                draw(image, factor, gt_instances=truth),
                draw(image, factor, pred_instances=prediction),
            )
        )
    titles = ('image', 'truth', f'prediction (score > {SCORE_THRESHOLD})')
    draw_grid(
        columns,
        titles,
        [file.name for file in images],
        dict(zip(classes, palette, strict=True)),
        path,
    )


def show_segmentation(work_dir: Path, data: Path, images: list[Path], path: Path) -> None:
    """Draw the last checkpoint's label maps beside the truth, with mmseg's visualizer.

    Args:
        work_dir (Path): The segmentor's work directory.
        data (Path): The data set.
        images (list[Path]): Validation images.
        path (Path): The picture to write.
    """
    from mmseg.apis import inference_model, init_model
    from mmseg.structures import SegDataSample
    from mmseg.visualization import SegLocalVisualizer

    config, checkpoint = find_model(work_dir)
    model = init_model(str(config), str(checkpoint), device=get_device())
    classes, palette = model.dataset_meta['classes'], model.dataset_meta['palette']
    # The toolbox only warns of weights that do not fit.
    load_weights(model, str(checkpoint), str(config))
    visualizer = SegLocalVisualizer(alpha=0.7)
    visualizer.dataset_meta = dict(classes=classes, palette=palette)

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
    draw_grid(
        columns,
        ('image', 'truth', 'prediction'),
        [file.name for file in images],
        dict(zip(classes, palette, strict=True)),
        path,
    )


def read_image(path: Path) -> tuple[np.ndarray, int]:
    """Read an image and enlarge it by a whole factor to about ``PICTURE_SIDE``.

    Args:
        path (Path): The image file.

    Returns:
        tuple[np.ndarray, int]: The enlarged image, uint8 RGB, and the factor.

    Raises:
        UserError: If it cannot be read.
    """
    image = cv2.imread(str(path))
    if image is None:
        raise UserError(f'cannot read {path}')
    factor = max(1, round(PICTURE_SIDE / max(image.shape)))
    image = cv2.resize(image, None, fx=factor, fy=factor, interpolation=cv2.INTER_CUBIC)
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB), factor


def write_report(
    det_dir: Path, seg_dir: Path, data: Path, out_dir: Path, num_images: int = 8
) -> list[Row]:
    """Write ``curves.png``, ``detections.png``, ``segmentation.png`` and ``report.md``.

    Args:
        det_dir (Path): Work directory of the detector.
        seg_dir (Path): Work directory of the segmentor.
        data (Path): The data set that both were trained on.
        out_dir (Path): The folder to write to; it is made if missing.
        num_images (int): How many validation images to show. Defaults to 8.

    Returns:
        list[Row]: The table's rows.

    Raises:
        UserError: If a log, a metric, a checkpoint or an image is missing.
    """
    # Everything that can be missing is asked for before the slow part.
    histories = dict(
        detection=read_history(det_dir, METRICS['detection']),
        segmentation=read_history(seg_dir, METRICS['segmentation']),
    )
    for work_dir in (det_dir, seg_dir):
        find_model(work_dir)
    images = find_images(data, num_images)

    rows = [row for model, history in histories.items() for row in make_rows(model, history)]
    table = format_table(rows)
    out_dir.mkdir(parents=True, exist_ok=True)
    draw_curves(histories, out_dir / 'curves.png')

    show_detections(det_dir, data, images, out_dir / 'detections.png')
    show_segmentation(seg_dir, data, images, out_dir / 'segmentation.png')
    (out_dir / 'report.md').write_text(
        '# The demo on images it was not trained on\n\n'
        + table
        + '\n![curves](curves.png)\n\n![detections](detections.png)\n\n'
        '![segmentation](segmentation.png)\n'
    )
    print(f'\n{table}')
    for name in ('curves.png', 'detections.png', 'segmentation.png', 'report.md'):
        print(f'wrote {out_dir / name}')
    return rows


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description='Report on the two trainings of the demo: curves, predictions beside the '
        'truth, and one table of the last evaluations.',
        epilog='example: python demo/report.py --det-dir work_dirs/demo/det '
        '--seg-dir work_dirs/demo/seg --data data/shapes --out-dir work_dirs/demo/report',
    )
    parser.add_argument('--det-dir', type=Path, required=True, help="detector's work directory")
    parser.add_argument('--seg-dir', type=Path, required=True, help="segmentor's work directory")
    parser.add_argument(
        '--data',
        type=Path,
        required=True,
        help='folder that demo/shapes.py wrote',
    )
    parser.add_argument('--out-dir', type=Path, required=True, help='folder to write to')
    parser.add_argument(
        '--num-images', type=int, default=8, help='number of validation images to show (default: 8)'
    )
    parser.add_argument(
        '--strict', action='store_true', help='exit with status 1 if a target is missed'
    )
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
    try:
        rows = write_report(args.det_dir, args.seg_dir, args.data, args.out_dir, args.num_images)
    except OSError as error:
        raise UserError(str(error)) from error
    if args.strict and any(row.missed for row in rows):
        raise UserError('a target is missed')


if __name__ == '__main__':
    cli.run(main)
