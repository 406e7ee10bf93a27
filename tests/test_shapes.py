# Copyright (c) mmscalablevit contributors. All rights reserved.
"""The demo's data set of drawn shapes, and the report on the demo's trainings."""

import importlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from pycocotools.coco import COCO

from mmscalablevit.errors import CheckpointError

ROOT = Path(__file__).resolve().parents[1]
SHAPES = ROOT / 'demo/shapes.py'
REPORT = ROOT / 'demo/report.py'
SMALL = dict(num_train=12, num_val=6, size=64)


def load(path: Path) -> ModuleType:
    """Import a tool by its file, so that its worker processes find it, too."""
    sys.path.append(str(path.parent))
    return importlib.import_module(path.stem)


shapes = load(SHAPES)
report = load(REPORT)


def run(script: Path, *args: object) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, script, *map(str, args)], capture_output=True, text=True, timeout=120
    )


def read_tree(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob('*'))
        if path.is_file()
    }


@pytest.fixture(scope='module')
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out_dir = tmp_path_factory.mktemp('shapes')
    assert shapes.write_shapes(out_dir, **SMALL)
    return out_dir


@pytest.fixture(scope='module', params=['training', 'validation'])
def split(request: pytest.FixtureRequest, dataset: Path) -> tuple[Path, str, COCO]:
    file = dataset / f'annotations/instances_{request.param}.json'
    return dataset, request.param, COCO(str(file))


# ---------------------------------------------------------------- the data set


def test_files_are_laid_out_as_documented(dataset: Path) -> None:
    for name, count in (('training', 12), ('validation', 6)):
        stems = [f'{i:06d}' for i in range(1, count + 1)]
        assert sorted(p.name for p in (dataset / 'images' / name).iterdir()) == [
            f'{stem}.jpg' for stem in stems
        ]
        assert sorted(p.name for p in (dataset / 'annotations' / name).iterdir()) == [
            f'{stem}.png' for stem in stems
        ]


def test_coco_lists_the_images(split: tuple[Path, str, COCO]) -> None:
    folder, name, coco = split
    listed = coco.loadImgs(coco.getImgIds())
    files = sorted(p.name for p in (folder / 'images' / name).iterdir())
    assert [image['file_name'] for image in listed] == files
    for image in listed:
        pixels = cv2.imread(str(folder / 'images' / name / image['file_name']))
        assert pixels.shape == (image['height'], image['width'], 3) == (64, 64, 3)
    assert [c['name'] for c in coco.loadCats([1, 2, 3, 4])] == list(shapes.CLASSES)


def test_coco_annotations_agree_with_their_masks(split: tuple[Path, str, COCO]) -> None:
    coco = split[2]
    annotations = coco.loadAnns(coco.getAnnIds())
    assert len({a['id'] for a in annotations}) == len(coco.dataset['annotations'])
    for annotation in annotations:
        mask = coco.annToMask(annotation)
        assert mask.shape == (64, 64)
        assert mask.sum() == annotation['area'] >= 16
        rows, columns = np.nonzero(mask)
        assert annotation['bbox'] == [
            columns.min(),
            rows.min(),
            np.ptp(columns) + 1,
            np.ptp(rows) + 1,
        ]
        assert annotation['category_id'] in (1, 2, 3, 4)
        assert annotation['iscrowd'] == 0


def test_label_maps_are_the_union_of_the_coco_masks(split: tuple[Path, str, COCO]) -> None:
    folder, name, coco = split
    for image in coco.loadImgs(coco.getImgIds()):
        file = folder / 'annotations' / name / image['file_name'].replace('.jpg', '.png')
        label_map = cv2.imread(str(file), cv2.IMREAD_UNCHANGED)
        annotations = coco.loadAnns(coco.getAnnIds(image['id']))
        masks = np.stack([coco.annToMask(a) for a in annotations])
        assert 3 <= len(masks) <= 6
        assert masks.sum(axis=0).max() == 1, 'visible parts share no pixel'
        # ADE20K: 1 is the background here, so category 1 is 2.
        categories = np.array([a['category_id'] for a in annotations])
        expected = 1 + (masks * categories[:, None, None]).sum(axis=0)
        assert label_map.dtype == np.uint8
        np.testing.assert_array_equal(label_map, expected)


def test_every_class_occurs(split: tuple[Path, str, COCO]) -> None:
    coco = split[2]
    assert {a['category_id'] for a in coco.loadAnns(coco.getAnnIds())} == {1, 2, 3, 4}


def whole_shapes(count: int) -> list[tuple[np.ndarray, np.ndarray, str]]:
    """Image, mask and class of the shapes that nothing touches, cuts off or hides."""
    found = []
    for i in range(count):
        image, masks, labels = shapes.draw_image(np.random.default_rng(i))
        for mask, label in zip(masks, labels, strict=True):
            near = cv2.dilate(mask.astype(np.uint8), np.ones((7, 7))) > 0
            on_border = mask[[0, -1]].any() or mask[:, [0, -1]].any()
            if not on_border and not (near & (masks.any(axis=0) ^ mask)).any():
                found.append((image, mask, shapes.CLASSES[label]))
    return found


def test_labels_name_the_drawn_shape() -> None:
    # From geometry: the share that a shape fills of its smallest enclosing circle (1, 0.64, 0.41;
    # for stars 0.37 to 0.47) and of its convex hull (1; for stars 0.49 to 0.62). Whole pixels blur
    # both.
    circle_shares = dict(
        circle=(0.89, 1), square=(0.60, 0.71), triangle=(0.38, 0.50), star=(0.36, 0.57)
    )
    seen = set()
    for _, mask, name in whole_shapes(60):
        points = np.argwhere(mask).astype(np.float32)
        radius = cv2.minEnclosingCircle(points)[1] + 0.5
        low, high = circle_shares[name]
        assert low < mask.sum() / (np.pi * radius**2) < high, name
        hull = np.zeros(mask.shape, np.uint8)
        cv2.fillConvexPoly(hull, cv2.convexHull(points[:, ::-1].astype(np.int32)), 1)
        hull_share = mask.sum() / hull.sum()
        assert hull_share < 0.75 if name == 'star' else hull_share > 0.85, name
        seen.add(name)
    assert seen == set(shapes.CLASSES)


def test_shapes_stand_out_where_their_masks_are() -> None:
    kernel = np.ones((5, 5))
    contrasts = []
    for image, mask, _ in whole_shapes(60):
        near = cv2.dilate(mask.astype(np.uint8), kernel) > 0
        inside, around = image[mask].mean(axis=0), image[near & ~mask].mean(axis=0)
        contrasts.append(np.linalg.norm(inside - around))
    assert min(contrasts) > 30
    assert np.median(contrasts) > 70


def test_color_hints_at_the_class_and_does_not_give_it_away() -> None:
    found = whole_shapes(200)
    colors = np.array([[image[mask].mean(axis=0) / 255 for image, mask, _ in found]], np.float32)
    hues = cv2.cvtColor(colors, cv2.COLOR_RGB2HSV)[0, :, 0]
    nearest = np.round(hues / 90).astype(int) % 4
    accuracy = np.mean(
        [shapes.CLASSES[n] == name for n, (*_, name) in zip(nearest, found, strict=True)]
    )
    assert len(found) > 80
    assert 0.7 < accuracy < 0.97, 'the nearest hue is right in about nine of ten'


@pytest.mark.parametrize('size', [32, 100])
def test_shapes_scale_with_the_image(size: int) -> None:
    image, masks, labels = shapes.draw_image(np.random.default_rng(3), size)
    assert image.shape == (size, size, 3)
    assert image.dtype == np.uint8
    assert masks.shape == (len(labels), size, size)
    assert (masks.sum(axis=(1, 2)) >= 16).all()
    # No shape is larger than a circle of radius 30 at side 128.
    assert masks.sum(axis=(1, 2)).max() <= 1.05 * np.pi * (30 / 128 * size) ** 2


# ------------------------------------------------- writing, repeating, resuming


@pytest.mark.parametrize('workers', [1, 2])
def test_same_arguments_give_the_same_bytes(dataset: Path, tmp_path: Path, workers: int) -> None:
    shapes.write_shapes(tmp_path / 'again', **SMALL, workers=workers)
    assert read_tree(tmp_path / 'again') == read_tree(dataset)


def test_workers_of_a_process_that_has_threads(tmp_path: Path) -> None:
    script = tmp_path / 'script.py'
    script.write_text(
        f"""
import sys
sys.path.append({str(SHAPES.parent)!r})
if __name__ == '__main__':
    from pathlib import Path
    import cv2, numpy, shapes
    cv2.setNumThreads(2)
    cv2.resize(numpy.zeros((2000, 2000, 3), numpy.uint8), (3000, 3000))
    shapes.write_shapes(Path({str(tmp_path / 'set')!r}), **{SMALL}, workers=2)
"""
    )
    assert run(script).returncode == 0
    assert len(list((tmp_path / 'set').glob('images/*/*.jpg'))) == 18


def test_other_seed_and_other_split_give_other_images(dataset: Path, tmp_path: Path) -> None:
    shapes.write_shapes(tmp_path, **SMALL, seed=1)
    images = [
        path.read_bytes()
        for folder in (dataset, tmp_path)
        for path in folder.glob('images/*/*.jpg')
    ]
    assert len(set(images)) == len(images) == 36


def test_longer_set_begins_with_the_shorter_one(dataset: Path, tmp_path: Path) -> None:
    shapes.write_shapes(tmp_path, num_train=13, num_val=6, size=64)
    longer = read_tree(tmp_path / 'images')
    assert longer.items() > read_tree(dataset / 'images').items()


def test_finished_set_is_left_alone(tmp_path: Path) -> None:
    assert shapes.write_shapes(tmp_path, **SMALL)
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob('*')}
    assert not shapes.write_shapes(tmp_path, **SMALL)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob('*')} == times


@pytest.mark.parametrize('written', [0, 5, 14])
def test_interrupted_set_is_completed(
    dataset: Path, tmp_path: Path, written: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw, calls = shapes.draw_image, []

    def interrupted(*args: object) -> tuple:
        calls.append(args)
        if len(calls) > written:
            raise KeyboardInterrupt
        return draw(*args)

    with monkeypatch.context() as patch:
        patch.setattr(shapes, 'draw_image', interrupted)
        with pytest.raises(KeyboardInterrupt):
            shapes.write_shapes(tmp_path, **SMALL)
    assert shapes.write_shapes(tmp_path, **SMALL)
    assert read_tree(tmp_path) == read_tree(dataset)


def test_set_that_lost_a_file_is_completed(dataset: Path, tmp_path: Path) -> None:
    shapes.write_shapes(tmp_path, **SMALL)
    (tmp_path / 'annotations/training/000004.png').unlink()
    assert shapes.write_shapes(tmp_path, **SMALL)
    assert read_tree(tmp_path) == read_tree(dataset)


def test_set_cut_off_in_its_last_file_is_completed(dataset: Path, tmp_path: Path) -> None:
    shapes.write_shapes(tmp_path, **SMALL)
    (tmp_path / 'annotations/instances_validation.json').write_text('{"info": {"descr')
    record = tmp_path / 'shapes.json'
    record.write_text(record.read_text().replace('true', 'false'))
    assert shapes.write_shapes(tmp_path, **SMALL)
    assert read_tree(tmp_path) == read_tree(dataset)


def test_other_arguments_replace_the_set(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    shapes.write_shapes(tmp_path, num_train=14, num_val=2, size=32, seed=5)
    capsys.readouterr()
    assert shapes.write_shapes(tmp_path, **SMALL)
    assert 'other arguments' in capsys.readouterr().out
    assert read_tree(tmp_path) == read_tree(dataset), 'nothing of the older set is left'


@pytest.mark.parametrize('name', ['images/training/mine.jpg', 'notes.txt', 'shapes.json'])
def test_folder_of_somebody_else_is_not_touched(tmp_path: Path, name: str) -> None:
    file = tmp_path / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text('{"mine": true}')
    with pytest.raises(ValueError, match='name a new or an empty folder'):
        shapes.write_shapes(tmp_path, **SMALL)
    assert read_tree(tmp_path) == {name: b'{"mine": true}'}


def test_command_writes_the_set_and_says_where(tmp_path: Path) -> None:
    command = (
        SHAPES,
        tmp_path / 'set',
        '--num-train',
        3,
        '--num-val',
        2,
        '--size',
        32,
        '--workers',
        2,
    )
    done = run(*command)
    assert done.returncode == 0, done.stderr
    assert f'3 training and 2 validation images are now in {tmp_path}' in done.stdout
    assert len(list(tmp_path.glob('set/images/*/*.jpg'))) == 5
    assert 'were already in' in run(*command).stdout


@pytest.mark.parametrize(
    ('args', 'message'),
    [
        (('--size', 31), 'size must be from 32 to 1024, got 31'),
        (('--size', 1025), 'size must be from 32 to 1024, got 1025'),
        (('--num-train', 0), 'num_train must be from 1 to 999999, got 0'),
        (('--num-val', -1), 'num_val must be from 1 to 999999, got -1'),
        (('--seed', -1), 'seed must be from 0 to 4294967295, got -1'),
        (('--workers', 0), 'workers must be from 1 to 256, got 0'),
        (('--size', 'big'), "argument --size: invalid int value: 'big'"),
    ],
)
def test_command_refuses_bad_arguments(tmp_path: Path, args: tuple, message: str) -> None:
    done = run(SHAPES, tmp_path / 'set', *args)
    assert done.returncode != 0
    assert message in done.stderr
    assert 'Traceback' not in done.stderr
    assert not (tmp_path / 'set').exists()


def test_command_names_the_folder_it_cannot_write_to(tmp_path: Path) -> None:
    (tmp_path / 'file').write_text('')
    done = run(SHAPES, tmp_path / 'file/set')
    assert done.returncode != 0
    assert f"Not a directory: '{tmp_path}/file" in done.stderr
    assert 'Traceback' not in done.stderr


# ------------------------------------------------------ the report's log reader


def train_record(iteration: int, loss: float = 1.0, time: float = 0.5) -> dict:
    return dict(lr=1e-3, loss=loss, time=time, data_time=0.1, iter=iteration, step=iteration)


def det_record(step: int, box_ap: float) -> dict:
    return {
        'coco/bbox_mAP': box_ap,
        'coco/segm_mAP': box_ap - 0.1,
        'coco/bbox_mAP_50': box_ap + 0.2,
        'time': 0.1,
        'step': step,
    }


def seg_record(step: int, miou: float) -> dict:
    return dict(aAcc=miou + 10, mIoU=miou, mAcc=miou, time=0.1, step=step)


def write_log(work_dir: Path, timestamp: str, records: list[dict], tail: str = '') -> Path:
    path = work_dir / timestamp / 'vis_data/scalars.json'
    path.parent.mkdir(parents=True)
    path.write_text(''.join(json.dumps(record) + '\n' for record in records) + tail)
    return path


def read_det(work_dir: Path) -> 'report.History':
    return report.read_history(work_dir, report.METRICS['detection'])


def test_logs_of_a_resumed_run_are_merged(tmp_path: Path) -> None:
    # Cut off at 100 and in the middle of a line, resumed from the checkpoint of 50.
    write_log(
        tmp_path,
        '20240101_100000',
        [
            train_record(20, 5),
            train_record(40, 4),
            det_record(50, 0.2),
            train_record(60, 3.3),
            train_record(80, 3.2),
            train_record(100, 3.1),
            det_record(100, 0.3),
        ],
        '{"lr": 0.',
    )
    write_log(
        tmp_path, '20240101_110000', [train_record(60, 3, time=1.0), train_record(80, 2, time=1.0)]
    )
    history = read_det(tmp_path)
    assert {i: r['loss'] for i, r in history.train.items()} == {20: 5, 40: 4, 60: 3, 80: 2}
    assert {i: r['coco/bbox_mAP'] for i, r in history.evaluations.items()} == {50: 0.2}
    assert history.iterations == 80
    assert history.seconds == pytest.approx(40 * 0.5 + 40 * 1.0)


def test_log_of_a_run_begun_anew_replaces_the_older_one(tmp_path: Path) -> None:
    write_log(
        tmp_path, '20240101_100000', [train_record(20), train_record(40), det_record(40, 0.9)]
    )
    write_log(tmp_path, '20240102_090000', [train_record(10), det_record(10, 0.1)])
    history = read_det(tmp_path)
    assert list(history.train) == [10]
    assert list(history.evaluations) == [10]


def test_evaluations_logged_by_epoch_are_placed_by_iteration(tmp_path: Path) -> None:
    write_log(
        tmp_path,
        '20240101_100000',
        [
            train_record(20),
            train_record(40),
            det_record(1, 0.2),
            train_record(60),
            train_record(80),
            det_record(2, 0.3),
        ],
    )
    assert list(read_det(tmp_path).evaluations) == [40, 80]


def test_damaged_log_is_named(tmp_path: Path) -> None:
    path = write_log(tmp_path, '20240101_100000', [train_record(20)], 'oops\n{"a": 1}\n')
    with pytest.raises(report.UserError, match=f'{path}, line 2'):
        read_det(tmp_path)


@pytest.mark.parametrize(
    ('records', 'message'),
    [
        ([], 'hold no training iteration'),
        ([train_record(10)], 'hold no evaluation'),
        (
            [train_record(10), seg_record(10, 80)],
            'hold no coco/bbox_mAP in the evaluation at iteration 10',
        ),
        (
            [{'loss': 1.0, 'iter': 10, 'step': 10}, det_record(10, 0.5)],
            'hold no time at iteration 10',
        ),
    ],
)
def test_missing_entries_are_named(tmp_path: Path, records: list[dict], message: str) -> None:
    write_log(tmp_path, '20240101_100000', records)
    with pytest.raises(report.UserError, match=message):
        read_det(tmp_path)


def test_table_holds_the_last_evaluation_against_the_targets(tmp_path: Path) -> None:
    write_log(
        tmp_path / 'det',
        '1',
        [train_record(100, time=0.6), det_record(50, 0.7), det_record(100, 0.59)],
    )
    write_log(tmp_path / 'seg', '1', [train_record(200, time=0.3), seg_record(200, 80.0)])
    rows = []
    for model in ('detection', 'segmentation'):
        history = report.read_history(tmp_path / model[:3], report.METRICS[model])
        rows += report.make_rows(model, history)
    table = [
        [cell.strip() for cell in line.strip('|').split('|')]
        for line in report.format_table(rows).splitlines()
    ]
    cells = {(line[0], line[1]): line[2:] for line in table}
    assert cells['detection', 'box AP'] == ['0.590', '0.60', 'missed']
    assert cells['detection', 'mask AP'] == ['0.490', '0.50', 'missed']
    assert cells['detection', 'box AP50'] == ['0.790', '', '']
    assert cells['detection', 'training minutes'] == ['1.0', '', '']
    assert cells['segmentation', 'mIoU'] == ['0.800', '0.80', 'reached']
    assert cells['segmentation', 'aAcc'] == ['0.900', '', '']
    assert cells['segmentation', 'iterations'] == ['200', '', '']
    assert cells['segmentation', 's/iter'] == ['0.300', '', '']


def test_metric_that_is_not_a_number_misses_its_target(tmp_path: Path) -> None:
    write_log(tmp_path, '1', [train_record(10), det_record(10, float('nan'))])
    rows = report.make_rows('detection', read_det(tmp_path))
    assert [row.missed for row in rows[:3]] == [True, True, False]


def test_command_names_the_missing_log(tmp_path: Path) -> None:
    done = run(
        REPORT,
        '--det-dir',
        tmp_path / 'det',
        '--seg-dir',
        tmp_path / 'seg',
        '--data',
        tmp_path,
        '--out-dir',
        tmp_path / 'out',
    )
    assert done.returncode != 0
    assert f'no training log {tmp_path}/det/*/vis_data/scalars.json' in done.stderr
    assert 'Traceback' not in done.stderr
    assert not (tmp_path / 'out').exists()


# --------------------------------------------------------- the report's pictures

ARCH = dict(
    embed_dims=[8, 16, 24, 32],
    num_heads=[1, 2, 3, 4],
    depths=[1, 1, 1, 1],
    c_ratios=[1.25, 1.25, 1.25, 1],
    sr_ratios=[8, 4, 2, 1],
    window_sizes=[7, 7, 7, 7],
    mlp_ratios=[2, 2, 2, 2],
    ssa_kv='separate',
)
WIDTH = 16


def det_config() -> Config:
    cfg = Config.fromfile(ROOT / 'configs/_base_/models/mask-rcnn_fpn.py')
    roi = dict(out_channels=WIDTH)
    cfg.merge_from_dict(
        dict(
            default_scope='mmdet',
            model=dict(
                backbone=dict(type='ScalableViT', arch=ARCH),
                neck=dict(in_channels=ARCH['embed_dims'], out_channels=WIDTH),
                rpn_head=dict(in_channels=WIDTH, feat_channels=WIDTH),
                roi_head=dict(
                    bbox_roi_extractor=roi,
                    mask_roi_extractor=roi,
                    bbox_head=dict(in_channels=WIDTH, fc_out_channels=WIDTH, num_classes=4),
                    mask_head=dict(in_channels=WIDTH, conv_out_channels=WIDTH, num_classes=4),
                ),
                test_cfg=dict(rcnn=dict(score_thr=0.0, max_per_img=5)),
            ),
            test_dataloader=dict(
                dataset=dict(
                    type='CocoDataset',
                    metainfo=dict(classes=shapes.CLASSES),
                    pipeline=[
                        dict(type='LoadImageFromFile'),
                        dict(type='Resize', scale=(64, 64)),
                        dict(
                            type='PackDetInputs',
                            meta_keys=('img_id', 'ori_shape', 'img_shape', 'scale_factor'),
                        ),
                    ],
                )
            ),
        )
    )
    return cfg


def seg_config() -> Config:
    cfg = Config.fromfile(ROOT / 'configs/_base_/models/upernet.py')
    cfg.merge_from_dict(
        dict(
            default_scope='mmseg',
            model=dict(
                data_preprocessor=dict(size=(64, 64)),
                backbone=dict(type='ScalableViT', arch=ARCH),
                decode_head=dict(in_channels=ARCH['embed_dims'], channels=WIDTH, num_classes=5),
                auxiliary_head=dict(in_channels=24, channels=WIDTH, num_classes=5),
            ),
            test_pipeline=[dict(type='LoadImageFromFile'), dict(type='PackSegInputs')],
        )
    )
    return cfg


def write_work_dir(work_dir: Path, cfg: Config, record: dict, meta: dict) -> Path:
    """What a training leaves behind, with weights that were never trained."""
    log = write_log(work_dir, '20240101_100000', [train_record(10), record])
    cfg.dump(log.with_name('config.py'))
    importlib.import_module(f'{cfg.default_scope}.models')
    init_default_scope(cfg.default_scope)
    state = MODELS.build(cfg.model).state_dict()
    torch.save(dict(state_dict=state, meta=dict(dataset_meta=meta)), work_dir / 'iter_10.pth')
    # Work directories get moved; only the name counts.
    (work_dir / 'last_checkpoint').write_text('/where/it/was/iter_10.pth')
    return work_dir


@pytest.fixture(scope='module')
def work_dirs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    pytest.importorskip('mmdet')
    pytest.importorskip('mmseg')
    folder = tmp_path_factory.mktemp('work_dirs')
    return (
        write_work_dir(
            folder / 'det',
            det_config(),
            det_record(10, 0.7),
            dict(classes=shapes.CLASSES),
        ),
        write_work_dir(
            folder / 'seg',
            seg_config(),
            seg_record(10, 50.0),
            dict(classes=shapes.SEG_CLASSES, palette=shapes.SEG_PALETTE),
        ),
    )


def test_report_shows_image_truth_and_prediction(
    work_dirs: tuple[Path, Path],
    dataset: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    grids = []
    draw_grid = report.draw_grid

    def keep(columns: list, *args: object) -> None:
        grids.append(columns)
        draw_grid(columns, *args)

    monkeypatch.setattr(report, 'draw_grid', keep)
    rows = report.write_report(*work_dirs, dataset, tmp_path / 'out', num_images=2)

    assert [row.name for row in rows if row.missed] == ['mIoU']
    text = (tmp_path / 'out/report.md').read_text()
    assert report.format_table(rows) in text
    for name in ('curves.png', 'detections.png', 'segmentation.png'):
        assert f'({name})' in text
        assert min(cv2.imread(str(tmp_path / 'out' / name)).shape[:2]) > 400

    coco = COCO(str(dataset / 'annotations/instances_validation.json'))
    for i, (detection, segmentation) in enumerate(zip(*grids, strict=True), start=1):
        file = f'{i:06d}'
        original = cv2.imread(str(dataset / f'images/validation/{file}.jpg'))[..., ::-1]
        labels = cv2.imread(str(dataset / f'annotations/validation/{file}.png'), 0) - 1
        for image, truth, prediction in (detection, segmentation):
            assert image.shape == truth.shape == prediction.shape == (256, 256, 3)
            small = cv2.resize(image, (64, 64), interpolation=cv2.INTER_AREA)
            assert np.abs(small.astype(int) - original).mean() < 3
        # mmseg lays the colors over the image at 0.7.
        image, truth, _ = segmentation
        colors = np.array(shapes.SEG_PALETTE)[labels].repeat(4, axis=0).repeat(4, axis=1)
        np.testing.assert_allclose(truth, 0.3 * image + 0.7 * colors, atol=1.5)
        # mmdet changes the color of each mask at random; boxes and names lie around it.
        image, truth, _ = detection
        changed = np.abs(truth.astype(int) - image).sum(axis=2) > 30
        for annotation in coco.loadAnns(coco.getAnnIds(i)):
            mask = coco.annToMask(annotation).repeat(4, axis=0).repeat(4, axis=1) > 0
            assert changed[mask].mean() > 0.8
        assert changed.mean() < 0.6


@pytest.mark.parametrize(
    ('spoil', 'message'),
    [
        (lambda folder: (folder / 'last_checkpoint').unlink(), 'last_checkpoint'),
        (lambda folder: (folder / 'iter_10.pth').unlink(), 'no file .*iter_10.pth'),
        (
            lambda folder: torch.save(dict(state_dict={}, meta={}), folder / 'iter_10.pth'),
            'iter_10.pth holds no weights',
        ),
    ],
)
def test_report_names_the_checkpoint_that_fails(
    work_dirs: tuple[Path, Path],
    dataset: Path,
    tmp_path: Path,
    spoil: Callable[[Path], object],
    message: str,
) -> None:
    shutil.copytree(work_dirs[0], tmp_path / 'det')
    spoil(tmp_path / 'det')
    with pytest.raises((report.UserError, CheckpointError), match=message):
        report.write_report(tmp_path / 'det', work_dirs[1], dataset, tmp_path / 'out', 1)


def test_report_wants_enough_images(
    work_dirs: tuple[Path, Path], dataset: Path, tmp_path: Path
) -> None:
    with pytest.raises(report.UserError, match='holds 6 images of the 7 to show'):
        report.write_report(*work_dirs, dataset, tmp_path / 'out', num_images=7)


@pytest.mark.parametrize('missed', [False, True])
def test_missed_target_fails_only_a_strict_run(
    missed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [report.Row('detection', 'box AP', '0.590', 0.6, missed)]
    monkeypatch.setattr(report, 'write_report', lambda *args: rows)
    monkeypatch.setattr(report, 'use_safe_loader', lambda: None)
    folders = [f'--{name}={tmp_path}' for name in ('det-dir', 'seg-dir', 'data', 'out-dir')]
    monkeypatch.setattr(sys, 'argv', ['report.py', *folders])
    report.main()
    monkeypatch.setattr(sys, 'argv', ['report.py', *folders, '--strict'])
    expected = pytest.raises(report.UserError, match='target') if missed else nullcontext()
    with expected:
        report.main()
