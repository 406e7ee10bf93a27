# Copyright (c) mmscalablevit contributors. All rights reserved.
"""The converters of data sets: what they write is read back, and every fault is named."""

import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

TOOLS = Path(__file__).parents[1] / 'tools' / 'dataset_converters'


@pytest.fixture
def convert(tmp_path, monkeypatch, capsys):
    """Call a converter in a folder; its exit code or sentence, and what it printed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(TOOLS))

    def call(tool, *arguments):
        monkeypatch.setattr(sys, 'argv', [tool, *map(str, arguments)])
        code = 0
        try:
            runpy.run_path(str(TOOLS / tool), run_name='__main__')
        except SystemExit as error:
            code = error.code
        said = capsys.readouterr()
        return code, said.out + said.err

    return call


def write_image(path, size=(40, 30), **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new('RGB', size, (9, 99, 199)).save(path, **options)


def write_map(path, labels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(labels).save(path)


def read(path):
    coco = COCO(path)
    boxes = {}
    for entry in coco.dataset['annotations']:
        name = coco.loadCats(entry['category_id'])[0]['name']
        image = coco.loadImgs(entry['image_id'])[0]['file_name']
        boxes.setdefault(image, []).append((name, entry['bbox']))
    return coco, boxes


def write_voc(root, **objects):
    """A VOC data set: by image, its objects as (name, xmin, ymin, xmax, ymax)."""
    for name, annotated in objects.items():
        write_image(root / 'JPEGImages' / f'{name}.jpg')
        boxes = ''.join(
            f'<object><name>{cls}</name><difficult>{int(cls == "dog")}</difficult><bndbox>'
            + ''.join(
                f'<{k}>{v}</{k}>'
                for k, v in zip(('xmin', 'ymin', 'xmax', 'ymax'), box, strict=True)
            )
            + '</bndbox></object>'
            for cls, *box in annotated
        )
        xml = f'<annotation><size><width>40</width><height>30</height></size>{boxes}</annotation>'
        (root / 'Annotations').mkdir(exist_ok=True)
        (root / 'Annotations' / f'{name}.xml').write_text(xml)


def write_lists(root, **splits):
    (root / 'ImageSets' / 'Main').mkdir(parents=True)
    for split, names in splits.items():
        (root / 'ImageSets' / 'Main' / f'{split}.txt').write_text('\n'.join(names) + '\n')


def test_voc(convert, tmp_path):
    write_voc(
        tmp_path / 'voc', a=[('cat', 1, 1, 40, 30), ('dog', 5, 6, 10, 12)], b=[('cat', 2, 2, 3, 3)]
    )
    write_lists(tmp_path / 'voc', train=['a'], val=['b'])
    code, said = convert('voc_to_coco.py', 'voc', 'out')

    assert code == 0, said
    coco, boxes = read('out/annotations/train.json')
    # Pixels count from 1 in VOC, and the last one is inside.
    assert boxes == {'a.jpg': [('cat', [0, 0, 40, 30]), ('dog', [4, 5, 6, 7])]}
    assert [x['iscrowd'] for x in coco.dataset['annotations']] == [0, 1]
    assert coco.dataset['annotations'][1]['area'] == 42
    assert read('out/annotations/val.json')[1] == {'b.jpg': [('cat', [1, 1, 2, 2])]}
    assert Path('out/train/a.jpg').samefile('voc/JPEGImages/a.jpg')
    assert 'train.json: 1 images, 2 objects (cat 1, dog 1)' in said


def test_voc_without_lists_is_split_the_same_each_time(convert, tmp_path):
    write_voc(tmp_path / 'voc', **{f'i{i}': [('cat', 2, 2, 30, 20)] for i in range(10)})
    splits = []
    for out in ('one', 'two'):
        assert convert('voc_to_coco.py', 'voc', out, '--val-share', 0.3, '--copy')[0] == 0
        splits.append([{x.name for x in Path(out, s).iterdir()} for s in ('train', 'val')])

    assert splits[0] == splits[1]
    assert [len(x) for x in splits[0]] == [7, 3]
    assert not Path('one/train', *splits[0][0]).exists()
    assert not splits[0][0] & splits[0][1]


FAULTS = {
    'no area': ([('cat', 5, 5, 5, 9)], 'box has no area: voc/Annotations/a.xml object 2 cat'),
    'outside': (
        [('cat', 50, 5, 60, 9)],
        'box is outside the image: voc/Annotations/a.xml object 2',
    ),
    'unknown': ([('cow', 5, 5, 9, 9)], "'cow' is not among the classes: voc/Annotations/a.xml"),
}


@pytest.mark.parametrize('fault', FAULTS)
def test_faults_are_left_out_only_when_asked(fault, convert, tmp_path):
    objects, sentence = FAULTS[fault]
    write_voc(tmp_path / 'voc', a=[('cat', 1, 1, 20, 20), *objects], b=[('cat', 2, 2, 9, 9)])
    write_lists(tmp_path / 'voc', train=['a'], val=['b'])
    code, said = convert('voc_to_coco.py', 'voc', 'out', '--classes', 'cat')

    assert 'nothing was written' in code
    assert f'error: {sentence}' in said
    assert not Path('out').exists()
    code, said = convert('voc_to_coco.py', 'voc', 'out', '--classes', 'cat', '--leave-out')
    assert code == 0
    assert f'left out: {sentence}' in said
    assert read('out/annotations/train.json')[1] == {'a.jpg': [('cat', [0, 0, 20, 20])]}
    # And never over what was written once.
    assert 'train.json exists' in convert('voc_to_coco.py', 'voc', 'out')[0]


def test_files_at_fault(convert, tmp_path):
    boxes = [('cat', 2, 2, 9, 9)]
    write_voc(tmp_path / 'voc', a=boxes, b=boxes, c=boxes, d=boxes, e=boxes, f=boxes)
    write_lists(tmp_path / 'voc', train=[*'abcde', 'g'], val=['f'])
    (tmp_path / 'voc/JPEGImages/a.jpg').unlink()
    (tmp_path / 'voc/Annotations/b.xml').unlink()
    (tmp_path / 'voc/Annotations/c.xml').write_text('<annotation>')
    write_image(tmp_path / 'voc/JPEGImages/d.jpg', size=(41, 30))
    (tmp_path / 'voc/JPEGImages/e.jpg').write_bytes(b'none')
    write_voc(tmp_path / 'voc', k=boxes)
    code, said = convert('voc_to_coco.py', 'voc', 'out')

    assert 'nothing was written' in code
    for sentence in (
        'image does not exist (2 times): voc/JPEGImages/a.jpg, voc/JPEGImages/g.jpg',
        'xml cannot be read (2 times): voc/Annotations/b.xml (',
        'voc/Annotations/d.xml (41x30 and not 40x30)',
        'image cannot be read: voc/JPEGImages/e.jpg (',
    ):
        assert sentence in said


def test_a_box_over_the_edge_is_cut(convert, tmp_path):
    write_voc(tmp_path / 'voc', a=[('cat', 11, 11, 60, 60)], b=[('cat', 2, 2, 9, 9)])
    write_lists(tmp_path / 'voc', train=['a'], val=['b'])
    code, said = convert('voc_to_coco.py', 'voc', 'out')

    assert code == 0
    assert 'warning: box reaches beyond the image' in said
    assert read('out/annotations/train.json')[1] == {'a.jpg': [('cat', [10, 10, 30, 20])]}


@pytest.mark.parametrize('dtype', [np.uint8, np.uint16])
def test_instance_maps(dtype, convert, tmp_path):
    rng = np.random.default_rng(0)
    top = 255 if dtype == np.uint8 else 60000
    maps = {}
    for name in ('train/a', 'train/sub/b', 'val/c'):
        write_image(tmp_path / f'cells/images/{name}.png')
        maps[name] = rng.choice(np.array([0, 1, 2, top], dtype), (30, 40))
        write_map(tmp_path / f'cells/instances/{name}.png', maps[name])
    code, said = convert('instance_maps_to_coco.py', 'cells', 'out', '--classes', 'cell')

    assert code == 0, said
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
    code, said = convert('instance_maps_to_coco.py', 'cells', 'out', *options)

    assert 'nothing was written' in code
    assert 'is 40x20 and not 40x30' in said
    assert 'instance map has several channels: cells/maps/c.png' in said
    assert 'instance map cannot be read' in said
    assert 'cells/maps/d.png' in said
    assert 'must both hold' in convert('instance_maps_to_coco.py', 'cells', 'out', *options[:2])[0]
