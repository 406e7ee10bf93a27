# Copyright (c) mmscalablevit contributors. All rights reserved.
"""The converter of masks to label maps: what it writes is read back, and every fault is named."""

from pathlib import Path

import numpy as np
from jobs import write_image, write_map
from PIL import Image


def write_masks(root, masks, suffix='.png'):
    for name, mask in masks.items():
        write_image(root / f'images/{name}.jpg', size=(4, 3))
        write_map(root / f'masks/{name}{suffix}', mask)


def labels_of(folder):
    return {x.stem: np.array(Image.open(x)) for x in sorted(Path(folder).rglob('*.png'))}


def test_label_maps_with_another_ignored_value(convert, tmp_path):
    mask = np.array([[1, 2, 3, 9]] * 3, np.uint8)
    write_masks(tmp_path / 'data', {'train/a': mask, 'val/b': mask})
    options = ['--classes', 'sky,road,car', '--first', 1]
    code, said = convert('masks_to_labels.py', 'data', 'out', *options)
    assert 'nothing was written' in code
    assert 'error: value 9 is neither a class nor ignored (2 times): data/masks/train/a' in said
    assert not any(Path('out').iterdir())

    code, said = convert('masks_to_labels.py', 'data', 'out', *options, '--ignore', 9)
    assert code == 0, said
    maps = labels_of('out/annotations')
    assert maps.keys() == {'a', 'b'}
    assert np.array_equal(maps['a'], [[0, 1, 2, 255]] * 3)
    assert maps['a'].dtype == np.uint8
    assert Path('out/images/val/b.jpg').exists()
    assert Path('out/classes.txt').read_text().split() == ['sky', 'road', 'car']
    said = convert('masks_to_labels.py', 'data', 'new', *options, '--ignore', 3)[0]
    assert '--ignore 3 is the value of a class' in said


def test_colored_masks(convert, tmp_path):
    colors = np.array([[(0, 0, 0), (128, 0, 0), (0, 0, 128), (0, 0, 0)]] * 3, np.uint8)
    write_masks(tmp_path / 'data', dict.fromkeys('abcde', colors), suffix='_L.png')
    (tmp_path / 'colors.txt').write_text('128 0 0\tsky\n0 0 128  the road\n0,0,0 void\n')
    options = ['--images', 'images', '--masks', 'masks', '--mask-suffix', '_L.png']
    assert '--classes must name' in convert('masks_to_labels.py', 'data', 'out', *options)[0]
    options += ['--colors', 'colors.txt', '--ignore']
    assert 'has no viod' in convert('masks_to_labels.py', 'data', 'out', *options, 'viod')[0]
    code, said = convert('masks_to_labels.py', 'data', 'out', *options, 'void')

    assert code == 0, said
    maps = labels_of('out/annotations')
    assert len(labels_of('out/annotations/train')) == 4
    for found in maps.values():
        assert np.array_equal(found, [[255, 0, 1, 255]] * 3)
    assert Path('out/classes.txt').read_text() == 'sky\nthe road\n'

    (tmp_path / 'colors.txt').write_text('128 0 0 sky\n0 0 0 void')
    code, said = convert('masks_to_labels.py', 'data', 'new', *options, 'void')
    assert 'color 0 0 128 is neither a class nor ignored (5 times): data/masks/a_L.png' in said
    code, said = convert('masks_to_labels.py', 'data', 'new', *options, 'void', '--leave-out')
    assert code == 0
    assert np.array_equal(labels_of('new/annotations')['a'], [[255, 0, 255, 255]] * 3)


def test_faults_of_masks(convert, tmp_path):
    mask = np.zeros((3, 4), np.uint8)
    write_masks(tmp_path / 'data', {'train/a': mask, 'train/b': mask[:2], 'val/c': mask})
    write_image(tmp_path / 'data/images/train/d.jpg', size=(4, 3))
    code, said = convert('masks_to_labels.py', 'data', 'out', '--classes', 'sky')

    assert 'nothing was written' in code
    assert 'data/masks/train/b.png is 4x2 and not 4x3' in said
    assert 'mask does not exist: data/masks/train/d.png' in said
