# Copyright (c) mmscalablevit contributors. All rights reserved.
"""The converters of data sets: what they write is read back, and every fault is named."""

import json
from pathlib import Path

import numpy as np
import pytest
from jobs import write_image, write_map
from PIL import Image
from pycocotools.coco import COCO


def read(split):
    """What was written of a split; by image, its boxes with their names."""
    coco = COCO(f'out/annotations/{split}.json')
    boxes = {}
    for entry in coco.dataset['annotations']:
        name = coco.loadCats(entry['category_id'])[0]['name']
        image = coco.loadImgs(entry['image_id'])[0]['file_name']
        boxes.setdefault(image, []).append((name, entry['bbox']))
    return coco, boxes


def said_at_the_end(outcome):
    """What a converter said that did its work."""
    code, said = outcome
    assert code == 0, said
    return said


def assert_refused(outcome, *faults):
    """A converter named these faults and wrote nothing."""
    code, said = outcome
    assert 'nothing was written' in code
    assert [fault for fault in faults if fault not in said] == []


def write_voc(root, size=(40, 30), **objects):
    """A VOC data set: by image, its objects as (name, xmin, ymin, xmax, ymax)."""
    image_size = f'<size><width>{size[0]}</width><height>{size[1]}</height></size>'
    (root / 'Annotations').mkdir(parents=True, exist_ok=True)
    for name, annotated in objects.items():
        write_image(root / 'JPEGImages' / f'{name}.jpg', size)
        boxes = ''.join(
            f'<object><name>{cls}</name><difficult>{int(cls == "dog")}</difficult><bndbox>'
            f'<xmin>{x}</xmin><ymin>{y}</ymin><xmax>{x2}</xmax><ymax>{y2}</ymax></bndbox></object>'
            for cls, x, y, x2, y2 in annotated
        )
        xml = f'<annotation>{image_size}{boxes}</annotation>'
        (root / 'Annotations' / f'{name}.xml').write_text(xml)


def write_lists(root, **splits):
    (root / 'ImageSets' / 'Main').mkdir(parents=True)
    for split, names in splits.items():
        (root / 'ImageSets' / 'Main' / f'{split}.txt').write_text('\n'.join(names) + '\n')


def test_voc(convert, tmp_path):
    # The last one reaches beyond the image.
    boxes = [('cat', 1, 1, 40, 30), ('dog', 5, 6, 10, 12), ('cat', 11, 11, 60, 60)]
    write_voc(tmp_path / 'voc', a=boxes, b=[('cat', 2, 2, 3, 3)])
    write_lists(tmp_path / 'voc', train=['a'], val=['b'])
    said = said_at_the_end(convert('voc_to_coco.py', 'voc', 'out'))

    coco, boxes = read('train')
    # Pixels count from 1 in VOC, and the last one is inside.
    found = [('cat', [0, 0, 40, 30]), ('dog', [4, 5, 6, 7]), ('cat', [10, 10, 30, 20])]
    assert boxes == {'a.jpg': found}
    assert 'warning: box reaches beyond the image' in said
    assert [x['iscrowd'] for x in coco.dataset['annotations']] == [0, 1, 0]
    assert coco.dataset['annotations'][1]['area'] == 42
    assert read('val')[1] == {'b.jpg': [('cat', [1, 1, 2, 2])]}
    assert Path('out/train/a.jpg').samefile('voc/JPEGImages/a.jpg')
    assert 'train.json: 1 images, 3 objects (cat 2, dog 1)' in said


def test_voc_without_lists_is_split_the_same_each_time(convert, tmp_path):
    write_voc(tmp_path / 'voc', **{f'i{i}': [('cat', 2, 2, 30, 20)] for i in range(10)})
    splits = []
    for out in ('one', 'two'):
        said_at_the_end(convert('voc_to_coco.py', 'voc', out, '--val-share', 0.3, '--copy'))
        splits.append([{x.name for x in Path(out, s).iterdir()} for s in ('train', 'val')])

    assert splits[0] == splits[1]
    assert [len(x) for x in splits[0]] == [7, 3]
    assert not Path('one/train', *splits[0][0]).exists()
    assert not splits[0][0] & splits[0][1]


def test_faults_are_left_out_only_when_asked(convert, tmp_path):
    faults = [('cat', 5, 5, 5, 9), ('cat', 50, 5, 60, 9), ('cow', 5, 5, 9, 9)]
    write_voc(tmp_path / 'voc', a=[('cat', 1, 1, 20, 20), *faults], b=[('cat', 2, 2, 9, 9)])
    write_lists(tmp_path / 'voc', train=['a'], val=['b'])
    arguments = ['voc_to_coco.py', 'voc', 'out', '--classes', 'cat']
    sentences = [
        'box has no area: voc/Annotations/a.xml object 2 cat',
        'box is outside the image: voc/Annotations/a.xml object 3',
        "'cow' is not among the classes: voc/Annotations/a.xml",
    ]
    assert_refused(convert(*arguments), *(f'error: {sentence}' for sentence in sentences))
    assert not Path('out').exists()

    said = said_at_the_end(convert(*arguments, '--leave-out'))
    assert all(f'left out: {sentence}' in said for sentence in sentences)
    assert read('train')[1] == {'a.jpg': [('cat', [0, 0, 20, 20])]}
    # And never over what was written once.
    assert 'train.json exists' in convert('voc_to_coco.py', 'voc', 'out')[0]


def test_files_at_fault(convert, tmp_path):
    boxes = [('cat', 2, 2, 9, 9)]
    write_voc(tmp_path / 'voc', **dict.fromkeys('abcdef', boxes))
    write_lists(tmp_path / 'voc', train=[*'abcde', 'g'], val=['f'])
    (tmp_path / 'voc/JPEGImages/a.jpg').unlink()
    (tmp_path / 'voc/Annotations/b.xml').unlink()
    (tmp_path / 'voc/Annotations/c.xml').write_text('<annotation>')
    write_image(tmp_path / 'voc/JPEGImages/d.jpg', size=(41, 30))
    (tmp_path / 'voc/JPEGImages/e.jpg').write_bytes(b'none')
    assert_refused(
        convert('voc_to_coco.py', 'voc', 'out'),
        'image does not exist (2 times): voc/JPEGImages/a.jpg, voc/JPEGImages/g.jpg',
        'xml cannot be read (2 times): voc/Annotations/b.xml (',
        'voc/Annotations/d.xml (41x30 and not 40x30)',
        'image cannot be read: voc/JPEGImages/e.jpg (',
    )


@pytest.mark.parametrize('dtype', [np.uint8, np.uint16])
def test_instance_maps(dtype, convert, tmp_path):
    rng = np.random.default_rng(0)
    top = 255 if dtype == np.uint8 else 60000
    maps = {}
    for name in ('train/a', 'train/sub/b', 'val/c'):
        write_image(tmp_path / f'cells/images/{name}.png')
        maps[name] = rng.choice(np.array([0, 1, 2, top], dtype), (30, 40))
        write_map(tmp_path / f'cells/instances/{name}.png', maps[name])
    said_at_the_end(convert('instance_maps_to_coco.py', 'cells', 'out', '--classes', 'cell'))

    for split in ('train', 'val'):
        coco = COCO(f'out/annotations/{split}.json')
        for image in coco.dataset['images']:
            labels = maps[f'{split}/{image["file_name"]}'.removesuffix('.png')]
            found = coco.loadAnns(coco.getAnnIds(image['id']))
            assert len(found) == 3
            for annotation, value in zip(found, (1, 2, top), strict=True):
                assert np.array_equal(coco.annToMask(annotation), labels == value)
                assert annotation['area'] == (labels == value).sum()
            assert Path('out', split, image['file_name']).exists()


def test_faults_of_instance_maps(convert, tmp_path):
    for name in 'abcd':
        write_image(tmp_path / f'cells/all/{name}.png')
    labels = np.ones((30, 40), np.uint8)
    write_map(tmp_path / 'cells/maps/a.png', labels)
    write_map(tmp_path / 'cells/maps/b.png', labels[:20])
    write_image(tmp_path / 'cells/maps/c.png')
    options = ['--images', 'all', '--maps', 'maps', '--val-share', 0.5]
    assert_refused(
        convert('instance_maps_to_coco.py', 'cells', 'out', *options),
        'is 40x20 and not 40x30',
        'instance map has several channels: cells/maps/c.png',
        'instance map cannot be read: cells/maps/d.png',
    )
    assert 'must both hold' in convert('instance_maps_to_coco.py', 'cells', 'out', *options[:2])[0]


# Where the annotations and the images are, as the file names say, and options.
COCO_LAYOUTS = {
    'official': ('annotations/instances_{}2017.json', '{}2017/{}', '{1}', []),
    'roboflow': ('{}/_annotations.coco.json', '{}/{}', '{1}', ['--val', 'valid']),
    'elsewhere': ('{}.json', 'photos/{}/{}', 'C:\\\\me\\\\{}\\\\{}', []),
}


def write_coco(root, layout, objects):
    """A COCO data set of one image, 1.jpg of 40x30, and one annotation file a split."""
    file, image, name, _ = COCO_LAYOUTS[layout]
    for split, annotations in objects.items():
        write_image(root / image.format(split, '1.jpg'))
        content = dict(
            images=[dict(id=7, file_name=name.format(split, '1.jpg'), width=40, height=30)],
            annotations=[dict(dict(id=i, image_id=7), **x) for i, x in enumerate(annotations)],
            categories=[dict(id=90, name='dog'), dict(id=3, name='cat')],
        )
        path = root / file.format(split)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content))


@pytest.mark.parametrize('layout', COCO_LAYOUTS)
def test_coco(layout, convert, tmp_path):
    polygons = [[2, 2, 12, 2, 12, 12, 2, 12], [0, 0, 1, 1]]
    counts = dict(size=[30, 40], counts=[0, 30, 1170])
    crowd = dict(category_id=90, bbox=[0, 0, 1, 30], segmentation=counts, area=5, iscrowd=1)
    objects = dict(
        train=[dict(category_id=3, bbox=[2, 2, 10, 10], segmentation=polygons, area=0), crowd],
        val=[dict(category_id=90, bbox=[30, 20, 20, 20])],
    )
    if layout == 'roboflow':
        objects['valid'] = objects.pop('val')
    write_coco(tmp_path / 'coco', layout, objects)
    write_image(tmp_path / 'coco' / 'unused' / '1.jpg')
    said_at_the_end(convert('coco_to_coco.py', 'coco', 'out', *COCO_LAYOUTS[layout][3]))

    coco, boxes = read('train')
    assert list(boxes.values()) == [[('cat', [2, 2, 10, 10]), ('dog', [0, 0, 1, 30])]]
    assert [x['name'] for x in coco.loadCats([1, 2])] == ['cat', 'dog']
    polygon, rle = coco.loadAnns([1, 2])
    assert polygon['segmentation'] == polygons[:1]
    assert polygon['area'] == pytest.approx(100, abs=25)
    assert (rle['area'], rle['iscrowd'], coco.annToMask(rle)[:, 0].sum()) == (30, 1, 30)
    ((name, box),) = read('val')[1].items()
    assert box == [('dog', [30, 20, 10, 10])]
    assert Path('out/val', name).samefile(next(Path('coco').rglob('*val*/1.jpg')))


def test_faults_of_coco(convert, tmp_path):
    sound = dict(category_id=3, bbox=[2, 2, 10, 10])
    faults = {
        'category_id is of no category': dict(sound, category_id=4),
        'bbox is not x, y, width, height': dict(category_id=3),
        'box has no area': dict(sound, bbox=[2, 2, float('nan'), 3]),
        'box is outside the image': dict(sound, bbox=[-9, 2, 3, 3]),
        'mask has no area in the image': dict(sound, segmentation=[[50, 1, 60, 1, 60, 9]]),
        'run-length encoding is not of the size': dict(
            sound, segmentation=dict(size=[40, 30], counts=[1200])
        ),
        'annotation belongs to no image': dict(sound, image_id=8),
    }
    write_coco(tmp_path / 'coco', 'official', dict(train=[sound, *faults.values()], val=[sound]))
    path = tmp_path / 'coco/annotations/instances_train2017.json'
    content = json.loads(path.read_text())
    wide = dict(id=2, file_name='2.jpg', width=41, height=30)
    content['images'] += [dict(id=1, file_name='gone.jpg'), wide]
    path.write_text(json.dumps(content))
    write_image(tmp_path / 'coco/train2017/2.jpg')
    sentences = [*faults, 'image does not exist: coco/gone.jpg', '40x30 and not 41x30']
    assert_refused(convert('coco_to_coco.py', 'coco', 'out'), *sentences)
    said_at_the_end(convert('coco_to_coco.py', 'coco', 'out', '--leave-out'))
    assert read('train')[1] == {'train2017/1.jpg': [('cat', [2, 2, 10, 10])]}
    assert 'path of one json file' in convert('coco_to_coco.py', 'coco', 'x', '--val', 'no')[0]


def write_yolo(root, folders, labels):
    """A YOLO data set: by image, its lines."""
    for name, lines in labels.items():
        write_image(root / f'{folders[0]}/{name}.jpg')
        if lines is not None:
            path = root / f'{folders[1]}/{name}.txt'
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(lines)


# Where the images and the labels are, and the file that names the classes and the folders.
ULTRALYTICS = 'path: ../nowhere\ntrain: images/train\nval: images/val\nnames: {0: cat, 1: dog}'
ROBOFLOW = 'train: ../train/images\nval: ../val/images\nnames: [cat, dog]'
YOLO_LAYOUTS = {
    'ultralytics': ('images', 'labels', 'data.yaml', ULTRALYTICS),
    'roboflow': ('{}/images', '{}/labels', 'data.yaml', ROBOFLOW),
    'classes.txt': ('images', 'labels', 'classes.txt', 'cat\ndog\n'),
    'lists': ('images', 'images', 'data.yaml', 'train: train.txt\nval: val.txt\nnames: [cat, dog]'),
}


@pytest.mark.parametrize('layout', YOLO_LAYOUTS)
def test_yolo(layout, convert, tmp_path):
    images, labels, file, text = YOLO_LAYOUTS[layout]
    root = tmp_path / 'yolo'
    for split, name, lines in (
        ('train', 'a', '1 0.5 0.5 0.25 0.2\n0 0.0 0.0 0.5 0.0 0.5 0.5\n'),
        ('train', 'b', None),
        ('val', 'c', '0 0.5 0.5 1 1'),
    ):
        folders = [x.format(split) if '{}' in x else f'{x}/{split}' for x in (images, labels)]
        write_yolo(root, folders, {name: lines})
    (root / file).write_text(text)
    (root / 'train.txt').write_text('./images/train/a.jpg\n./images/train/b.jpg\n')
    (root / 'val.txt').write_text('./images/val/c.jpg\n')
    said = said_at_the_end(convert('yolo_to_coco.py', 'yolo', 'out'))

    coco, boxes = read('train')
    assert boxes == {'a.jpg': [('dog', [15, 12, 10, 6]), ('cat', [0, 0, 20, 15])]}
    # YOLO trains on images without a file of labels as background.
    assert [x['file_name'] for x in coco.dataset['images']] == ['a.jpg', 'b.jpg']
    assert 'warning: image has no object: yolo/' in said
    assert coco.dataset['annotations'][1]['segmentation'] == [[0, 0, 20, 0, 20, 15]]
    assert coco.dataset['annotations'][1]['area'] == pytest.approx(150, abs=20)
    assert read('val')[1] == {'c.jpg': [('cat', [0, 0, 40, 30])]}


def test_faults_of_yolo(convert, tmp_path):
    lines = {'a': '2 0.5 0.5 0.1 0.1\n', 'b': '0 0.5 0.5 0.1\nx\n0 .5 .5 0 .1\n0 .5 .5 .2 .2'}
    write_yolo(tmp_path / 'yolo', ('images', 'labels'), lines)
    assert 'neither data.yaml nor classes.txt' in convert('yolo_to_coco.py', 'yolo', 'out')[0]
    (tmp_path / 'yolo/classes.txt').write_text('cat\ndog')
    assert_refused(
        convert('yolo_to_coco.py', 'yolo', 'out', '--val-share', 0.5),
        'class number is not below 2: yolo/labels/a.txt line 1 2',
        'or a polygon (2 times): yolo/labels/b.txt line 1, yolo/labels/b.txt line 2',
        'box has no area: yolo/labels/b.txt line 3 cat',
    )


def shape(label, kind, points, group=None):
    return dict(label=label, shape_type=kind, points=points, group_id=group)


def write_labelme(path, *shapes, image=None, size=(40, 30)):
    write_image(path.with_suffix('.jpg'))
    content = dict(shapes=shapes, imagePath=image or f'{path.stem}.jpg', imageData=None)
    content.update(imageWidth=size[0], imageHeight=size[1])
    path.with_suffix('.json').write_text(json.dumps(content))


def test_labelme(convert, tmp_path):
    write_labelme(
        tmp_path / 'lm/train/a',
        shape('dog', 'rectangle', [[22, 20], [2, 10]]),
        shape('cat', 'polygon', [[0, 0], [10, 0], [10, 10]], 1),
        shape('cat', 'polygon', [[20, 0], [30, 0], [30, 10]], 1),
        shape('cat', 'circle', [[20, 15], [20, 20]]),
        image='..\\elsewhere\\a.jpg',
    )
    write_labelme(tmp_path / 'lm/val/b', shape('cat', 'polygon', [[0, 0], [9, 0], [9, 9]]))
    said_at_the_end(convert('labelme_to_coco.py', 'lm', 'out'))

    coco, boxes = read('train')
    *found, circle = boxes['a.jpg']
    assert found == [('dog', [2, 10, 20, 10]), ('cat', [0, 0, 30, 10])]
    assert circle == ('cat', pytest.approx([15, 10, 10, 10]))
    areas = [200, pytest.approx(2 * 50, abs=20), pytest.approx(np.pi * 25, abs=8)]
    assert [x['area'] for x in coco.dataset['annotations']] == areas


def test_faults_of_labelme(convert, tmp_path):
    sound = shape('cat', 'polygon', [[0, 0], [9, 0], [9, 9]])
    write_labelme(tmp_path / 'lm/a', sound, shape('cat', 'line', [[0, 0], [9, 9]]))
    write_labelme(tmp_path / 'lm/b', sound, size=(41, 30))
    write_labelme(tmp_path / 'lm/c', sound, image='gone.jpg')
    for name in 'de':
        write_labelme(tmp_path / f'lm/{name}', sound)
    (tmp_path / 'lm/other.json').write_text('[1, 2]')
    assert_refused(
        convert('labelme_to_coco.py', 'lm', 'out'),
        'line of 2 points has no area: lm/a.json shape 2 cat',
        'lm/b.json (40x30 and not 41x30)',
        'image does not exist: lm/gone.jpg',
        "json is not labelme's, with imagePath and shapes of label and points: lm/other.json",
    )
    said_at_the_end(convert('labelme_to_coco.py', 'lm', 'out', '--leave-out'))
    images = [x for s in ('train', 'val') for x in read(s)[1]]
    assert sorted(images) == ['a.jpg', 'd.jpg', 'e.jpg']


def write_masks(root, masks, suffix='.png'):
    for name, mask in masks.items():
        write_image(root / f'images/{name}.jpg', size=(4, 3))
        write_map(root / f'masks/{name}{suffix}', mask)


def labels_of(folder):
    return {x.stem: np.array(Image.open(x)) for x in sorted(Path(folder).rglob('*.png'))}


def test_label_maps_with_another_ignored_value(convert, tmp_path):
    mask = np.array([[1, 2, 3, 9]] * 3, np.uint8)
    write_masks(tmp_path / 'data', {'train/a': mask, 'val/b': mask})
    command = ['masks_to_labels.py', 'data', 'out', '--classes', 'sky,road,car', '--first', 1]
    assert_refused(
        convert(*command), 'value 9 is neither a class nor ignored (2 times): data/masks'
    )
    assert not any(Path('out').iterdir())
    assert '--ignore 3 is the value of a class' in convert(*command, '--ignore', 3)[0]

    said_at_the_end(convert(*command, '--ignore', 9))
    maps = labels_of('out/annotations')
    assert maps.keys() == {'a', 'b'}
    assert np.array_equal(maps['a'], [[0, 1, 2, 255]] * 3)
    assert maps['a'].dtype == np.uint8
    assert Path('out/images/val/b.jpg').exists()
    assert Path('out/classes.txt').read_text().split() == ['sky', 'road', 'car']


def test_colored_masks(convert, tmp_path):
    colors = np.array([[(0, 0, 0), (128, 0, 0), (0, 0, 128), (0, 0, 0)]] * 3, np.uint8)
    write_masks(tmp_path / 'data', dict.fromkeys('abcde', colors), suffix='_L.png')
    (tmp_path / 'colors.txt').write_text('128 0 0\tsky\n0 0 128  the road\n0,0,0 void\n')
    options = ['--images', 'images', '--masks', 'masks', '--mask-suffix', '_L.png']
    assert '--classes must name' in convert('masks_to_labels.py', 'data', 'out', *options)[0]
    options += ['--colors', 'colors.txt', '--ignore']
    assert 'has no viod' in convert('masks_to_labels.py', 'data', 'out', *options, 'viod')[0]
    options += ['void']
    said_at_the_end(convert('masks_to_labels.py', 'data', 'out', *options))
    maps = labels_of('out/annotations')
    assert len(labels_of('out/annotations/train')) == 4
    for found in maps.values():
        assert np.array_equal(found, [[255, 0, 1, 255]] * 3)
    assert Path('out/classes.txt').read_text() == 'sky\nthe road\n'

    (tmp_path / 'colors.txt').write_text('128 0 0 sky\n0 0 0 void')
    assert_refused(
        convert('masks_to_labels.py', 'data', 'new', *options),
        'color 0 0 128 is neither a class nor ignored (5 times): data/masks/a_L.png',
    )
    said_at_the_end(convert('masks_to_labels.py', 'data', 'new', *options, '--leave-out'))
    assert np.array_equal(labels_of('new/annotations')['a'], [[255, 0, 255, 255]] * 3)


def test_faults_of_masks(convert, tmp_path):
    mask = np.zeros((3, 4), np.uint8)
    write_masks(tmp_path / 'data', {'train/a': mask, 'train/b': mask[:2], 'val/c': mask})
    write_image(tmp_path / 'data/images/train/d.jpg', size=(4, 3))
    assert_refused(
        convert('masks_to_labels.py', 'data', 'out', '--classes', 'sky'),
        'data/masks/train/b.png is 4x2 and not 4x3',
        'mask does not exist: data/masks/train/d.png',
    )
