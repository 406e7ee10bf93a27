# Copyright (c) mmscalablevit contributors. All rights reserved.
"""The demo's data set of drawn shapes."""

from pathlib import Path

import cv2
import numpy as np
import pytest
from jobs import load_tool
from pycocotools.coco import COCO

SHAPES = 'demo/shapes.py'
SMALL = dict(num_train=12, num_val=6, size=64)
shapes = load_tool(SHAPES)


def read_tree(folder):
    files = [path for path in folder.rglob('*') if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.fixture(scope='module')
def dataset(tmp_path_factory):
    out_dir = tmp_path_factory.mktemp('shapes')
    assert shapes.write_shapes(out_dir, **SMALL)
    return out_dir


@pytest.fixture(scope='module', params=['training', 'validation'])
def split(request, dataset):
    file = dataset / f'annotations/instances_{request.param}.json'
    return dataset, request.param, COCO(str(file))


def test_files_are_laid_out_as_documented(dataset):
    for name, count in (('training', 12), ('validation', 6)):
        for folder, suffix in (('images', '.jpg'), ('annotations', '.png')):
            found = sorted(path.name for path in (dataset / folder / name).iterdir())
            assert found == [f'{i:06d}{suffix}' for i in range(1, count + 1)]


def test_coco_lists_the_images(split):
    folder, name, coco = split
    listed = coco.loadImgs(coco.getImgIds())
    files = sorted(p.name for p in (folder / 'images' / name).iterdir())
    assert [image['file_name'] for image in listed] == files
    for image in listed:
        pixels = cv2.imread(str(folder / 'images' / name / image['file_name']))
        assert pixels.shape == (image['height'], image['width'], 3) == (64, 64, 3)
    assert [c['name'] for c in coco.loadCats([1, 2, 3, 4])] == list(shapes.CLASSES)


def test_coco_annotations_agree_with_their_masks(split):
    coco = split[2]
    annotations = coco.loadAnns(coco.getAnnIds())
    assert len({a['id'] for a in annotations}) == len(coco.dataset['annotations'])
    for annotation in annotations:
        mask = coco.annToMask(annotation)
        assert mask.shape == (64, 64)
        assert mask.sum() == annotation['area'] >= 16
        rows, columns = np.nonzero(mask)
        size = [np.ptp(columns) + 1, np.ptp(rows) + 1]
        assert annotation['bbox'] == [columns.min(), rows.min(), *size]
        assert annotation['category_id'] in (1, 2, 3, 4)
        assert annotation['iscrowd'] == 0


def test_label_maps_are_the_union_of_the_coco_masks(split):
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


def whole_shapes(count):
    """Mask and class of the shapes that nothing touches, cuts off or hides."""
    found = []
    for i in range(count):
        _, masks, labels = shapes.draw_image(np.random.default_rng(i))
        for mask, label in zip(masks, labels, strict=True):
            near = cv2.dilate(mask.astype(np.uint8), np.ones((7, 7))) > 0
            on_border = mask[[0, -1]].any() or mask[:, [0, -1]].any()
            if not on_border and not (near & (masks.any(axis=0) ^ mask)).any():
                found.append((mask, shapes.CLASSES[label]))
    return found


def test_labels_name_the_drawn_shape():
    # From geometry: the share that a shape fills of its smallest enclosing circle (1, 0.64, 0.41;
    # for stars 0.37 to 0.47) and of its convex hull (1; for stars 0.49 to 0.62). Whole pixels blur
    # both.
    circle_shares = dict(
        circle=(0.89, 1), square=(0.60, 0.71), triangle=(0.38, 0.50), star=(0.36, 0.57)
    )
    seen = set()
    for mask, name in whole_shapes(60):
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


@pytest.mark.parametrize('size', [32, 100])
def test_shapes_scale_with_the_image(size):
    image, masks, labels = shapes.draw_image(np.random.default_rng(3), size)
    assert image.shape == (size, size, 3)
    assert image.dtype == np.uint8
    assert masks.shape == (len(labels), size, size)
    assert (masks.sum(axis=(1, 2)) >= 16).all()
    # No shape is larger than a circle of radius 30 at side 128.
    assert masks.sum(axis=(1, 2)).max() <= 1.05 * np.pi * (30 / 128 * size) ** 2


@pytest.mark.parametrize('workers', [1, 2])
def test_same_arguments_give_the_same_bytes(dataset, tmp_path, workers):
    # The workers of a process that has threads.
    cv2.setNumThreads(2)
    cv2.resize(np.zeros((2000, 2000, 3), np.uint8), (3000, 3000))
    shapes.write_shapes(tmp_path / 'again', **SMALL, workers=workers)
    assert read_tree(tmp_path / 'again') == read_tree(dataset)


def test_other_seed_and_other_split_give_other_images(dataset, tmp_path):
    shapes.write_shapes(tmp_path, **SMALL, seed=1)
    found = [x for y in (dataset, tmp_path) for x in read_tree(y / 'images').values()]
    assert len(set(found)) == len(found) == 36


def test_longer_set_begins_with_the_shorter_one(dataset, tmp_path):
    shapes.write_shapes(tmp_path, num_train=13, num_val=6, size=64)
    longer = read_tree(tmp_path / 'images')
    assert longer.items() > read_tree(dataset / 'images').items()


def test_finished_set_is_left_alone(tmp_path):
    assert shapes.write_shapes(tmp_path, **SMALL)
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob('*')}
    assert not shapes.write_shapes(tmp_path, **SMALL)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob('*')} == times


@pytest.mark.parametrize('written', [0, 14])
def test_interrupted_set_is_completed(dataset, tmp_path, written, monkeypatch):
    draw = [shapes.draw_image] * written
    with monkeypatch.context() as patch:
        patch.setattr(shapes, 'draw_image', lambda *args: draw.pop()(*args))
        with pytest.raises(IndexError):
            shapes.write_shapes(tmp_path, **SMALL)
    assert shapes.write_shapes(tmp_path, **SMALL)
    assert read_tree(tmp_path) == read_tree(dataset)
    # As is one that lost a file.
    (tmp_path / 'annotations/training/000004.png').unlink()
    assert shapes.write_shapes(tmp_path, **SMALL)
    assert read_tree(tmp_path) == read_tree(dataset)


def test_other_arguments_replace_the_set(dataset, tmp_path, capsys):
    shapes.write_shapes(tmp_path, num_train=14, num_val=2, size=32, seed=5)
    capsys.readouterr()
    assert shapes.write_shapes(tmp_path, **SMALL)
    assert 'other arguments' in capsys.readouterr().out
    assert read_tree(tmp_path) == read_tree(dataset), 'nothing of the older set is left'


@pytest.mark.parametrize('name', ['images/training/mine.jpg', 'notes.txt', 'shapes.json'])
def test_folder_of_somebody_else_is_not_touched(tmp_path, name):
    file = tmp_path / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text('{"mine": true}')
    with pytest.raises(ValueError, match='name a new or an empty folder'):
        shapes.write_shapes(tmp_path, **SMALL)
    assert read_tree(tmp_path) == {name: b'{"mine": true}'}


def test_command_writes_the_set_and_says_where(call):
    sizes = ('--num-train', 3, '--num-val', 2, '--size', 32)
    code, said = call(SHAPES, 'set', *sizes, '--workers', 2)
    assert code == 0
    assert '3 training and 2 validation images are now in set' in said
    assert len(list(Path('set').glob('images/*/*.jpg'))) == 5
    assert 'were already in' in call(SHAPES, 'set', *sizes)[1]


@pytest.mark.parametrize(
    ('folder', 'args', 'message'),
    [
        ('set', ('--size', 31), 'size must be from 32 to 1024, got 31'),
        ('set', ('--num-train', 0), 'num_train must be from 1 to 999999, got 0'),
        ('set', ('--size', 'big'), "argument --size: invalid int value: 'big'"),
        ('file/set', (), "Not a directory: 'file/"),
    ],
)
def test_mistakes_are_named(call, folder, args, message):
    Path('file').write_text('')
    code, said = call(SHAPES, folder, *args)
    assert message in f'{code} {said}'
    assert not Path('set').exists()
