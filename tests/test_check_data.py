# Copyright (c) mmscalablevit contributors. All rights reserved.
"""The check of data sets: a sound set passes, and every fault is named with its file."""

import json
import runpy
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]
TOOL = ROOT / 'tools' / 'check_data.py'
CLASSES = ('cat', 'dog')
DETECTOR = f"""
_base_ = '{ROOT}/configs/detection/mask-rcnn_scalablevit-s_fpn_1x_coco.py'
data = dict(data_root='data', metainfo=dict(classes={CLASSES}))
train_dataloader = dict(
    dataset=dict(**data, ann_file='train.json', data_prefix=dict(img='images')))
val_dataloader = dict(
    dataset=dict(**data, ann_file='val.json', data_prefix=dict(img='images')))
test_dataloader = val_dataloader
val_evaluator = dict(ann_file='data/val.json')
test_evaluator = val_evaluator
model = dict(roi_head=dict(bbox_head=dict(num_classes=2), mask_head=dict(num_classes=2)))
"""
SEGMENTOR = f"""
_base_ = '{ROOT}/configs/segmentation/scalablevit-s_upernet_8xb2-160k_ade20k-512x512.py'
data = dict(
    type='BaseSegDataset', data_root='data', metainfo=dict(classes={CLASSES}),
    data_prefix=dict(img_path='images', seg_map_path='masks'))
train_dataloader = dict(dataset=data)
val_dataloader = dict(dataset=data)
test_dataloader = val_dataloader
model = dict(decode_head=dict(num_classes=2), auxiliary_head=dict(num_classes=2))
"""


def write_image(path, size=(40, 30), **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, **options)


def write_mask(path, values=(0, 1, 255), size=(40, 30), dtype=np.uint8):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.resize(np.array(values, dtype), size[::-1])).save(path)


def coco():
    return dict(
        images=[dict(id=i, file_name=f'{i}.jpg', width=40, height=30) for i in (1, 2, 3)],
        annotations=[
            dict(
                id=i,
                image_id=1 + i // 2,
                category_id=7 + i % 2,
                bbox=[2, 3, 10, 8],
                area=80,
                iscrowd=0,
                segmentation=[[2, 3, 12, 3, 12, 11]],
            )
            for i in (1, 2, 3, 4)
        ],
        categories=[dict(id=7, name='cat'), dict(id=8, name='dog')],
    )


@pytest.fixture
def check(tmp_path, monkeypatch, capsys):
    """Call the tool in a folder and return its exit code and what it printed."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments):
        monkeypatch.setattr(sys, 'argv', [str(TOOL), *map(str, arguments)])
        code = 0
        try:
            runpy.run_path(str(TOOL), run_name='__main__')
        except SystemExit as error:
            code = error.code
        return code, capsys.readouterr().out

    return call


@pytest.fixture
def detection(tmp_path):
    """A sound data set in COCO format; the content is written by ``save``."""
    for i in (1, 2, 3):
        write_image(tmp_path / 'data' / 'images' / f'{i}.jpg')
    (tmp_path / 'config.py').write_text(DETECTOR)
    for name in ('train', 'val'):
        (tmp_path / 'data' / f'{name}.json').write_text(json.dumps(coco()))
    return tmp_path / 'data'


@pytest.fixture
def segmentation(tmp_path):
    for i in (1, 2, 3):
        write_image(tmp_path / 'data' / 'images' / f'{i}.jpg')
        write_mask(tmp_path / 'data' / 'masks' / f'{i}.png')
    (tmp_path / 'config.py').write_text(SEGMENTOR)
    return tmp_path / 'data'


def test_sound_coco(check, detection):
    code, said = check('config.py')

    assert code == 0
    assert 'train_dataloader: CocoDataset in data: 3 images, 4 annotations, 2 categories' in said
    assert 'val_dataloader: CocoDataset in data: 3 images' in said
    # The test set is the validation set.
    assert 'test_dataloader' not in said
    assert 'error:' not in said
    assert 'warning:' not in said


def test_sound_segmentation(check, segmentation):
    code, said = check('config.py', '--full')

    assert code == 0
    assert 'train_dataloader: BaseSegDataset in data: 3 images with masks, 2 classes' in said
    assert 'error:' not in said
    assert 'warning:' not in said


def remove(key, index=0, part='annotations'):
    def change(content):
        del content[part][index][key]

    return change


def put(key, value, index=0, part='annotations'):
    def change(content):
        content[part][index][key] = value

    return change


COCO_FAULTS = {
    'key': (remove('area'), 'val.json: entry has no valid area: annotations[0]'),
    'no list': (lambda x: x.pop('categories'), 'has no list of categories: data/val.json'),
    'double id': (put('id', 2), 'val.json: id is given to several annotations: 2'),
    'class spelled otherwise': (
        put('name', 'Dog', 1, 'categories'),
        "class of the config is not among the categories of data/val.json: 'dog'",
    ),
    'order of classes': (
        lambda x: x['categories'].reverse(),
        "order of the categories of data/val.json: ['dog', 'cat']",
    ),
    'no such image_id': (put('image_id', 9), 'annotation of an image_id that is not listed: id 1'),
    'no such category': (
        put('category_id', 9),
        'annotation of a category_id that is not listed: id 1',
    ),
    'id 0': (put('id', 0), 'pycocotools counts a match with this id as none: id 0'),
    'no iscrowd': (
        remove('iscrowd'),
        'annotation has no iscrowd, which the evaluation reads: id 1',
    ),
    'short polygon': (put('segmentation', [[1, 2, 3, 4]]), 'polygon is not of at least 3 points'),
    'size of rle': (
        put('segmentation', dict(size=[40, 30], counts='')),
        'run-length encoding is not of the size of its image: id 1',
    ),
    'box': (put('bbox', [1, 2, 3]), 'bbox is not four numbers x, y, width, height: id 1'),
    'missing image': (
        put('file_name', 'sub/4.jpg', 1, 'images'),
        'image of data/val.json does not exist: data/images/sub/4.jpg',
    ),
    'image size': (
        put('width', 41, 1, 'images'),
        'data/images/2.jpg is 40x30 and not 41x30',
    ),
}


@pytest.mark.parametrize('fault', COCO_FAULTS)
def test_coco_faults(fault, check, detection):
    change, sentence = COCO_FAULTS[fault]
    content = coco()
    change(content)
    (detection / 'val.json').write_text(json.dumps(content))
    code, said = check('config.py')

    assert code == 1
    errors = [line for line in said.splitlines() if line.startswith('  error:')]
    assert len(errors) == 1, said
    assert sentence in errors[0]
    # The training set stays sound.
    assert said.index('val_dataloader') < said.index('error:')


def test_coco_warnings(check, detection):
    content = coco()
    content['categories'].append(dict(id=9, name='bird'))
    content['annotations'][0]['bbox'] = [50, 3, 10, 8]
    content['annotations'] = [x for x in content['annotations'] if x['category_id'] == 8]
    (detection / 'train.json').write_text(json.dumps(content))
    code, said = check('config.py')

    assert code == 0
    assert "is no class of the config; its objects are ignored: 'bird'" in said
    assert "warning: class has no object in data/train.json: 'cat'" in said
    assert 'object is ignored, its bbox is empty or off the image: id 1' in said


def test_files_that_cannot_be_read(check, detection):
    (detection / 'images' / '1.jpg').write_bytes(b'')
    whole = (detection / 'images' / '2.jpg').read_bytes()
    (detection / 'images' / '2.jpg').write_bytes(whole[: len(whole) // 2])
    (detection / 'val.json').write_text('{"images": [')
    code, said = check('config.py')

    assert code == 1
    assert 'error: image cannot be read (2 times): data/images/1.jpg (' in said
    assert 'data/images/2.jpg (' in said
    assert 'error: is not JSON: data/val.json: Expecting value: line 1 column 13' in said


def test_only_a_sample_is_opened(check, detection):
    content = coco()
    content['images'] = [
        dict(id=i, file_name=f'{i}.jpg', width=40, height=30) for i in range(1, 402)
    ]
    for i in range(4, 402):
        shutil.copy(detection / 'images' / '1.jpg', detection / 'images' / f'{i}.jpg')
    (detection / 'train.json').write_text(json.dumps(content))
    write_image(detection / 'images' / '401.jpg', size=(50, 30))

    assert check('config.py')[0] == 0
    code, said = check('config.py', '--full')
    assert code == 1
    assert 'data/images/401.jpg is 50x30 and not 40x30' in said


def test_heads_and_metric_of_the_config(check, detection, tmp_path):
    code, said = check(
        'config.py',
        '--cfg-options',
        'model.roi_head.mask_head.num_classes=80',
        'val_evaluator.ann_file=data/train.json',
    )

    assert code == 1
    assert 'error: model.roi_head.mask_head.num_classes=80: the CocoDataset of train_data' in said
    assert 'has 2 classes (cat, dog)' in said
    assert 'must be data/val.json, as in val_dataloader: val_evaluator.ann_file=data/train' in said

    (tmp_path / 'config.py').write_text(DETECTOR.replace(str(CLASSES), "('cat')"))
    code, said = check('config.py')
    assert code == 1
    assert 'a single class needs a comma: cat' in said


def test_folders_that_do_not_exist(check, detection):
    shutil.rmtree(detection / 'images')
    (detection / 'train.json').unlink()
    code, said = check('config.py')

    assert code == 1
    assert 'error: file does not exist: data/train.json' in said
    assert 'error: folder does not exist: data/images' in said
    shutil.rmtree(detection)
    assert 'error: folder does not exist: data' in check('config.py')[1]


def test_wrapped_data_sets_are_checked(check, detection, tmp_path):
    wrapped = "train_dataloader = dict(dataset=dict(_delete_=True, type='RepeatDataset', times=2,"
    wrapped += " dataset=dict(type='CocoDataset', **data, ann_file='none.json')))"
    (tmp_path / 'config.py').write_text(DETECTOR + wrapped)
    code, said = check('config.py')

    assert code == 1
    assert 'error: file does not exist: data/none.json' in said


SEGMENTATION_FAULTS = {
    'missing mask': (
        lambda data: (data / 'masks' / '2.png').unlink(),
        'mask does not exist: data/masks/2.png',
    ),
    'size': (
        lambda data: write_mask(data / 'masks' / '2.png', size=(30, 40)),
        'data/masks/2.png is 30x40 and not 40x30',
    ),
    'value': (
        lambda data: write_mask(data / 'masks' / '2.png', (0, 1, 2, 254)),
        'data/masks/2.png has 2, 254',
    ),
    '16 bits': (
        lambda data: write_mask(data / 'masks' / '2.png', (0, 1, 256), dtype=np.uint16),
        'data/masks/2.png has 256',
    ),
    'color': (
        lambda data: write_image(data / 'masks' / '2.png'),
        'it must have one channel that holds class numbers: data/masks/2.png is a color image',
    ),
    'damaged': (
        lambda data: (data / 'masks' / '2.png').write_bytes(b'x'),
        'mask cannot be read: data/masks/2.png (',
    ),
    'damaged image': (
        lambda data: (data / 'images' / '2.jpg').write_bytes(b'x'),
        'image cannot be read: data/images/2.jpg (',
    ),
}


@pytest.mark.parametrize('fault', SEGMENTATION_FAULTS)
def test_segmentation_faults(fault, check, segmentation):
    spoil, sentence = SEGMENTATION_FAULTS[fault]
    spoil(segmentation)
    code, said = check('config.py')

    assert code == 1
    errors = [line for line in said.splitlines() if line.startswith('  error:')]
    # Training and validation read the same files.
    assert len(errors) == 2, said
    assert all(sentence in error for error in errors)


def test_zero_label(check, segmentation):
    options = ['--cfg-options']
    for loader in ('train', 'val', 'test'):
        options.append(f'{loader}_dataloader.dataset.reduce_zero_label=True')
    code, said = check('config.py', *options)
    # 0 is ignored now, 1 is the first class, and the second, 2, does not occur.
    assert code == 0
    assert "warning: class has no pixel in data/masks: 'dog'" in said

    write_mask(segmentation / 'masks' / '1.png', (0, 1, 2, 3))
    code, said = check('config.py', *options)
    assert code == 1
    assert 'label map: allowed are 1 to 2 for 2 classes' in said
    assert 'data/masks/1.png has 3' in said


def test_suffixes(check, segmentation):
    options = [f'{x}_dataloader.dataset.img_suffix=.bmp' for x in ('train', 'val', 'test')]
    code, said = check('config.py', '--cfg-options', *options)
    assert code == 1
    assert "no image ends in img_suffix='.bmp': data/images" in said


def test_list_of_images(check, segmentation):
    (segmentation / 'list.txt').write_text('1\n7\n')
    code, said = check('config.py', '--cfg-options', 'train_dataloader.dataset.ann_file=list.txt')

    assert code == 1
    assert 'image of data/list.txt does not exist: data/images/7.jpg' in said


def test_standard_sets(check, tmp_path):
    root = tmp_path / 'my coco'
    names = sorted(standard_categories())
    assert len(names) == 80
    for split in ('train2017', 'val2017'):
        content = coco()
        content['categories'] = [
            dict(id=i + 7, name=name) for i, name in enumerate(standard_categories())
        ]
        (root / 'annotations').mkdir(parents=True, exist_ok=True)
        (root / 'annotations' / f'instances_{split}.json').write_text(json.dumps(content))
        for i in (1, 2, 3):
            write_image(root / split / f'{i}.jpg')
    code, said = check('coco', '--root', root)

    assert code == 0
    assert 'warning: the official set has 118287 images: 3 images, 4 annotations' in said
    assert 'warning: the official set has 5000 images' in said

    for split in ('training', 'validation'):
        write_image(tmp_path / 'ade' / 'images' / split / '1.jpg')
        write_mask(tmp_path / 'ade' / 'annotations' / split / '1.png', (0, 1, 150))
    code, said = check('ade20k', '--root', 'ade')
    assert code == 0
    assert 'warning: the official set has 20210 images: 1 images with masks, 150 classes' in said
    assert 'warning: the official set has 2000 images' in said

    code, said = check('ade20k')
    assert code == 1
    assert 'error: folder does not exist: data/ade/ADEChallengeData2016' in said


def standard_categories():
    from mmdet.datasets import CocoDataset

    return CocoDataset.METAINFO['classes']


def test_what_cannot_be_checked(check, detection, tmp_path):
    assert '--root belongs to coco and ade20k' in check('config.py', '--root', 'x')[0]
    assert 'config none.py does not exist' in check('none.py')[0]
    (tmp_path / 'data' / 'train').mkdir()
    classifier = ROOT / 'configs' / 'classification' / 'scalablevit-s_8xb128_in1k.py'
    options = ['--cfg-options', 'train_dataloader.dataset.data_root=data']
    assert 'ImageNet cannot be checked' in check(classifier, *options)[0]


def test_more_objects_than_are_returned(check, detection):
    content = coco()
    entry = content['annotations'][0]
    content['annotations'] = [dict(entry, id=i, image_id=2) for i in range(1, 376)]
    (detection / 'train.json').write_text(json.dumps(content))
    code, said = check('config.py')

    assert code == 0
    assert 'more objects than model.test_cfg.rcnn.max_per_img=100 returns: 2.jpg (375)' in said
    said = check('config.py', '--cfg-options', 'model.test_cfg.rcnn.max_per_img=400')[1]
    assert 'more objects' not in said


def test_huge_images(check, detection):
    content = coco()
    content['images'][0].update(width=40000, height=30000)
    (detection / 'train.json').write_text(json.dumps(content))

    said = check('config.py')[1]
    assert 'more than 100 million pixels is read whole for each sample' in said
    assert '1.jpg (40000x30000)' in said


IGNORING = [
    'model.decode_head.ignore_index=11',
    'model.auxiliary_head.ignore_index=11',
    'model.data_preprocessor.seg_pad_val=11',
    'val_evaluator.ignore_index=11',
    'train_dataloader.dataset.pipeline.3.ignore_index=11',
]


def test_one_value_is_ignored(check, segmentation):
    for i in (1, 2, 3):
        write_mask(segmentation / 'masks' / f'{i}.png', (0, 1, 11))
    options = [f'{x}_dataloader.dataset.ignore_index=11' for x in ('train', 'val', 'test')]
    said = check('config.py', '--cfg-options', *options)[1]

    assert (
        'train_dataloader.dataset.ignore_index=11, but model.decode_head.ignore_index=255' in said
    )
    assert check('config.py', '--cfg-options', *options, *IGNORING)[0] == 0
    for one in IGNORING:
        some = [x for x in IGNORING if x != one]
        assert check('config.py', '--cfg-options', *options, *some)[0] == 1, one
