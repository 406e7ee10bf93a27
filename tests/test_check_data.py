# Copyright (c) mmscalablevit contributors. All rights reserved.
"""The check of data sets: a sound set passes, and every fault is named with its file."""

import json
import shutil

import numpy as np
import pytest
from jobs import ROOT, write_image, write_map

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


def write_mask(path, values=(0, 1, 255), size=(40, 30), dtype=np.uint8):
    write_map(path, np.resize(np.array(values, dtype), size[::-1]))


def coco(num_images=3):
    sound = dict(bbox=[2, 3, 10, 8], area=80, iscrowd=0, segmentation=[[2, 3, 12, 3, 12, 11]])
    return dict(
        images=[
            dict(id=i + 1, file_name=f'{i + 1}.jpg', width=40, height=30) for i in range(num_images)
        ],
        annotations=[
            dict(sound, id=i, image_id=1 + i // 2, category_id=7 + i % 2) for i in (1, 2, 3, 4)
        ],
        categories=[dict(id=7, name='cat'), dict(id=8, name='dog')],
    )


@pytest.fixture
def check(call):
    return lambda *arguments: call('tools/check_data.py', *arguments)


@pytest.fixture
def detection(tmp_path):
    """A sound data set in COCO format."""
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


def test_sound_data(check, detection, segmentation, tmp_path):
    code, said = check('config.py', '--full')
    assert (code, findings(said)) == (0, [])
    assert 'train_dataloader: BaseSegDataset in data: 3 images with masks, 2 classes' in said

    (tmp_path / 'config.py').write_text(DETECTOR)
    code, said = check('config.py')
    assert (code, findings(said)) == (0, [])
    assert 'train_dataloader: CocoDataset in data: 3 images, 4 annotations, 2 categories' in said
    assert 'val_dataloader: CocoDataset in data: 3 images' in said
    # The test set is the validation set.
    assert 'test_dataloader' not in said


def findings(said):
    return [line.strip() for line in said.splitlines() if 'error: ' in line or 'warning: ' in line]


def remove(key):
    return lambda content: content['annotations'][0].pop(key)


def put(index=0, part='annotations', **values):
    return lambda content: content[part][index].update(values)


def only_dogs(content):
    content['annotations'] = [x for x in content['annotations'] if x['category_id'] == 8]


def crowded(content):
    content['annotations'] = [dict(content['annotations'][1], id=i) for i in range(1, 376)]
    content['annotations'].append(dict(content['annotations'][0], id=999, category_id=8))


COCO_ERRORS = {
    'key': (remove('area'), 'val.json: entry has no valid area: annotations[0]'),
    'no list': (lambda x: x.pop('categories'), 'has no list of categories: data/val.json'),
    'double id': (put(id=2), 'val.json: id is given to several annotations: 2'),
    'class spelled otherwise': (
        put(1, 'categories', name='Dog'),
        "class of the config is not among the categories of data/val.json: 'dog'",
    ),
    'order of classes': (
        lambda x: x['categories'].reverse(),
        "order of the categories of data/val.json: ['dog', 'cat']",
    ),
    'no such image_id': (put(image_id=9), 'annotation of an image_id that is not listed: id 1'),
    'no such category': (put(category_id=9), 'of a category_id that is not listed: id 1'),
    'id 0': (put(id=0), 'pycocotools counts a match with this id as none: id 0'),
    'no iscrowd': (remove('iscrowd'), 'has no iscrowd, which the evaluation reads: id 1'),
    'short polygon': (put(segmentation=[[1, 2, 3, 4]]), 'polygon is not of at least 3 points'),
    'size of rle': (
        put(segmentation=dict(size=[40, 30], counts='')),
        'run-length encoding is not of the size of its image: id 1',
    ),
    'box': (put(bbox=[1, 2, 3]), 'bbox is not four numbers x, y, width, height: id 1'),
    'missing image': (
        put(1, 'images', file_name='sub/4.jpg'),
        'image of data/val.json does not exist: data/images/sub/4.jpg',
    ),
    'image size': (put(1, 'images', width=41), 'data/images/2.jpg is 40x30 and not 41x30'),
}
COCO_WARNINGS = {
    'no class': (
        lambda x: x['categories'].append(dict(id=9, name='bird')),
        "is no class of the config; its objects are ignored: 'bird'",
    ),
    'no object': (only_dogs, "class has no object in data/val.json: 'cat'"),
    'off the image': (put(bbox=[50, 3, 10, 8]), 'its bbox is empty or off the image: id 1'),
    'many objects': (
        crowded,
        'more objects than model.test_cfg.rcnn.max_per_img=100 returns: 2.jpg (376)',
    ),
}


@pytest.mark.parametrize('fault', [*COCO_ERRORS, *COCO_WARNINGS])
def test_coco_faults(fault, check, detection):
    change, sentence = (COCO_ERRORS | COCO_WARNINGS)[fault]
    content = coco()
    change(content)
    (detection / 'val.json').write_text(json.dumps(content))
    code, said = check('config.py')

    # A class that is spelled otherwise is also one that nothing in the config reads.
    (finding, *_) = sorted(findings(said))
    assert len(findings(said)) == 1 + (fault == 'class spelled otherwise')
    assert finding.startswith('error: ' if fault in COCO_ERRORS else 'warning: ')
    assert code == (fault in COCO_ERRORS)
    assert sentence in finding
    # The training set stays sound.
    assert said.index('val_dataloader') < said.index(finding)


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
    content = coco(num_images=401)
    (detection / 'train.json').write_text(json.dumps(content))
    for i in range(4, 401):
        shutil.copy(detection / 'images' / '1.jpg', detection / 'images' / f'{i}.jpg')
    write_image(detection / 'images' / '401.jpg', size=(50, 30))

    assert check('config.py')[0] == 0
    code, said = check('config.py', '--full')
    assert code == 1
    assert 'data/images/401.jpg is 50x30 and not 40x30' in said


def test_heads_and_metric_of_the_config(check, detection):
    options = ['model.roi_head.mask_head.num_classes=80', 'val_evaluator.ann_file=data/train.json']
    code, said = check('config.py', '--cfg-options', *options)

    assert code == 1
    assert 'error: model.roi_head.mask_head.num_classes=80: the CocoDataset of train_data' in said
    assert 'has 2 classes (cat, dog)' in said
    assert 'must be data/val.json, as in val_dataloader: val_evaluator.ann_file=data/train' in said


def test_folders_that_do_not_exist(check, detection, tmp_path):
    shutil.rmtree(detection / 'images')
    (detection / 'train.json').unlink()
    code, said = check('config.py')

    assert code == 1
    assert 'error: file does not exist: data/train.json' in said
    assert 'error: folder does not exist: data/images' in said
    # Also in a data set that another one wraps.
    wrapped = "train_dataloader = dict(dataset=dict(_delete_=True, type='RepeatDataset', times=2,"
    wrapped += " dataset=dict(type='CocoDataset', **data, ann_file='none.json')))"
    (tmp_path / 'config.py').write_text(DETECTOR + wrapped)
    assert 'error: file does not exist: data/none.json' in check('config.py')[1]
    shutil.rmtree(detection)
    assert 'error: folder does not exist: data' in check('config.py')[1]


MASK = 'masks/2.png'


def mask(*values, **options):
    return lambda data: write_mask(data / MASK, values, **options)


def damaged(name):
    return lambda data: (data / name).write_bytes(b'x')


SEGMENTATION_FAULTS = {
    'missing mask': (lambda data: (data / MASK).unlink(), 'mask does not exist: data/masks/2.png'),
    'size': (mask(0, 1, size=(30, 40)), 'data/masks/2.png is 30x40 and not 40x30'),
    'value': (mask(0, 1, 2, 254), 'data/masks/2.png has 2, 254'),
    '16 bits': (mask(0, 1, 256, dtype=np.uint16), 'data/masks/2.png has 256'),
    'color': (
        lambda data: write_image(data / MASK),
        'it must have one channel that holds class numbers: data/masks/2.png is a color image',
    ),
    'damaged': (damaged(MASK), 'mask cannot be read: data/masks/2.png ('),
    'damaged image': (damaged('images/2.jpg'), 'image cannot be read: data/images/2.jpg ('),
}


@pytest.mark.parametrize('fault', SEGMENTATION_FAULTS)
def test_segmentation_faults(fault, check, segmentation):
    spoil, sentence = SEGMENTATION_FAULTS[fault]
    spoil(segmentation)
    code, said = check('config.py')

    assert code == 1
    # Training and validation read the same files.
    assert len(findings(said)) == 2, said
    assert all('error: ' in line and sentence in line for line in findings(said))


def of_all(setting):
    """Options with a setting for the three data sets."""
    sets = [f'{split}_dataloader.dataset.{setting}' for split in ('train', 'val', 'test')]
    return ['--cfg-options', *sets]


def test_zero_label(check, segmentation):
    options = of_all('reduce_zero_label=True')
    code, said = check('config.py', *options)
    # 0 is ignored now, 1 is the first class, and the second, 2, does not occur.
    assert code == 0
    assert "warning: class has no pixel in data/masks: 'dog'" in said

    write_mask(segmentation / 'masks' / '1.png', (0, 1, 2, 3))
    code, said = check('config.py', *options)
    assert code == 1
    assert 'label map: allowed are 1 to 2 for 2 classes' in said
    assert 'data/masks/1.png has 3' in said


def test_images_that_are_not_there(check, segmentation):
    code, said = check('config.py', *of_all('img_suffix=.bmp'))
    assert code == 1
    assert "no image ends in img_suffix='.bmp': data/images" in said

    (segmentation / 'list.txt').write_text('1\n7\n')
    code, said = check('config.py', '--cfg-options', 'train_dataloader.dataset.ann_file=list.txt')
    assert code == 1
    assert 'image of data/list.txt does not exist: data/images/7.jpg' in said


def test_standard_sets(check, tmp_path):
    from mmdet.datasets import CocoDataset

    root = tmp_path / 'my coco'
    (root / 'annotations').mkdir(parents=True)
    content, names = coco(), CocoDataset.METAINFO['classes']
    content['categories'] = [dict(id=i, name=name) for i, name in enumerate(names, start=7)]
    for split in ('train2017', 'val2017'):
        (root / 'annotations' / f'instances_{split}.json').write_text(json.dumps(content))
        for i in (1, 2, 3):
            write_image(root / split / f'{i}.jpg')
    code, said = check('coco', '--root', root)
    assert code == 0
    assert 'warning: the official set has 118287 images: 3 images, 4 annotations' in said
    assert 'warning: the official set has 5000 images' in said

    code, said = check('ade20k')
    assert code == 1
    assert 'error: folder does not exist: data/ade/ADEChallengeData2016' in said


def test_what_cannot_be_checked(check, detection, tmp_path):
    assert '--root belongs to coco and ade20k' in check('config.py', '--root', 'x')[0]
    (tmp_path / 'data' / 'train').mkdir()
    classifier = ROOT / 'configs' / 'classification' / 'scalablevit-s_8xb128_in1k.py'
    options = ['--cfg-options', 'train_dataloader.dataset.data_root=data']
    assert 'ImageNet cannot be checked' in check(classifier, *options)[0]


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
    options = [*of_all('ignore_index=11'), *IGNORING]
    assert check('config.py', *options)[0] == 0
    for one in IGNORING:
        code, said = check('config.py', *(option for option in options if option != one))
        assert code == 1
        named = 'ignore_index of RandomCrop' if 'pipeline' in one else one.split('=')[0]
        assert f'_dataloader.dataset.ignore_index=11, but {named}=255' in said
