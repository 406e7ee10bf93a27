# Copyright (c) mmscalablevit contributors. All rights reserved.
"""Wrong configs and data, each with the sentence it must end in."""

import builtins
import json
import shutil
import sys
import traceback
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from jobs import ROOT, draw_shapes, write_map
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from PIL import Image

from mmscalablevit.checks import config as checks
from mmscalablevit.checks.config import reordered
from mmscalablevit.errors import UserError

DETECTOR = ROOT / 'tests' / 'data' / 'tiny_mask-rcnn.py'
SEGMENTOR = ROOT / 'tests' / 'data' / 'tiny_upernet.py'
BAD = yaml.safe_load((ROOT / 'tests' / 'data' / 'bad_configs.yml').read_text())
ANNOTATIONS = 'annotations/instances_training.json'
IMAGE = 'images/training/000001.jpg'
LABELS = 'annotations/training/000001.png'


def write(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def remove(name):
    return lambda folder: (folder / name).unlink()


def cut(name):
    def spoil(folder):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: len(content) // 2])

    return spoil


def draw(name, height, width, *channels, value=1, dtype=np.uint8):
    pixels = np.full((height, width, *channels), value, dtype)
    return lambda folder: Image.fromarray(pixels).save(folder / name)


def edit(change, name=ANNOTATIONS):
    def spoil(folder):
        content = json.loads((folder / name).read_text())
        change(content)
        (folder / name).write_text(json.dumps(content))

    return spoil


def annotation(name=ANNOTATIONS, **values):
    return edit(lambda content: content['annotations'][0].update(values), name)


FILE = '{data}/' + ANNOTATIONS
DETECTION_DATA = {
    'no annotation file': (remove(ANNOTATIONS), f'train_dataloader: {FILE} does not exist'),
    'no images': (
        edit(lambda content: content.update(images=[], annotations=[])),
        f'{FILE} has no usable entry in (2 times): images, annotations',
    ),
    'bbox of NaN': (annotation(bbox=[float('nan'), 2, 9, 9]), f'{FILE}: bbox is not four numbers'),
    'other size than annotated': (
        draw(IMAGE, 48, 32, 3),
        f'image {{data}}/{IMAGE} is 32x48 (EXIF rotation applied) and not 64x64 as annotated',
    ),
    'missing image': (remove(IMAGE), f"No such file or directory: '{{data}}/{IMAGE}'"),
    'empty image': (write(IMAGE, b''), f'image {{data}}/{IMAGE} cannot be loaded: '),
    'truncated image': (cut(IMAGE), f'image {{data}}/{IMAGE} '),
    'no folder': (
        lambda folder: shutil.rmtree(folder / 'images' / 'training'),
        'train_dataloader: {data}/images/training does not exist',
    ),
    'run-length encoding of a negative length': (
        annotation(segmentation=dict(size=[64, 64], counts=[1, -5])),
        f'{FILE}: run-length encoding does not add up to the size of its image',
    ),
    'polygon of text': (annotation(segmentation=[['a'] * 6]), f'image {{data}}/{IMAGE} '),
}
NOT_LABELS = 'allowed are 1 to 5 for 5 classes with reduce_zero_label=True, and 255 and 0'
SEGMENTATION_DATA = {
    'empty image': (write(IMAGE, b''), f'image {{data}}/{IMAGE} with label map {{data}}/{LABELS}'),
    'empty label map': (
        write(LABELS, b''),
        f'with label map {{data}}/{LABELS} cannot be loaded: UnidentifiedImageError',
    ),
    'truncated label map': (cut(LABELS), f'label map {{data}}/{LABELS} cannot be loaded'),
    'label out of range': (
        draw(LABELS, 64, 64, value=6),
        f'label map {{data}}/{LABELS} has 6; {NOT_LABELS}',
    ),
    'label of 16 bits': (
        draw(LABELS, 64, 64, value=258, dtype=np.uint16),
        f'label map {{data}}/{LABELS} has 258; {NOT_LABELS}',
    ),
    'label map of another size': (
        draw(LABELS, 128, 96),
        f'label map {{data}}/{LABELS} is 96x128 and not 64x64; it must be of',
    ),
}
VALIDATED = ANNOTATIONS.replace('training', 'validation')
TESTED = {
    'short polygon among others': (
        annotation(VALIDATED, segmentation=[[1, 1, 2, 2], [1, 1, 9, 1, 9, 9]]),
        'test_dataloader: {data}/annotations/instances_validation.json: polygon is not of at least',
    ),
    'cut image': (
        cut(IMAGE.replace('training', 'validation')),
        'image {data}/images/validation/000001.jpg ',
    ),
}


@pytest.fixture(scope='module')
def shapes(tmp_path_factory):
    folder = tmp_path_factory.mktemp('shapes') / 'shapes'
    draw_shapes(folder, num_train=2, num_val=1)
    return folder


@pytest.fixture
def folder(shapes, tmp_path, monkeypatch):
    """A copy of the data for a test to spoil."""
    monkeypatch.setenv('SHAPES_ROOT', str(tmp_path / 'data'))
    # For speed: every run logs its compilers and its formatted config.
    monkeypatch.setattr('mmengine.runner.runner.collect_env', dict)
    monkeypatch.setattr(Config, 'pretty_text', '')
    return Path(shutil.copytree(shapes, tmp_path / 'data'))


@pytest.fixture
def said(call):
    """Call a tool in this process and return the sentence that it ends with."""

    def sentence(tool, *arguments):
        sentence, _ = call(f'tools/{tool}', *arguments, '--work-dir', 'work_dir')
        assert isinstance(sentence, str)
        assert sentence.startswith('error: ')
        assert '\n' not in sentence
        assert len(sentence) < 900
        return sentence

    return sentence


def add_to(base, text):
    """Write a config with these lines added."""
    Path('user.py').write_text(f"_base_ = '{base}'\n{text}\n")


@pytest.mark.parametrize(
    ('base', 'text', 'sentence'),
    [
        pytest.param(base, *values, id=f'{part}-{name}')
        for part, base in (('detection', DETECTOR), ('segmentation', SEGMENTOR))
        for name, values in BAD[part].items()
    ],
)
def test_configs(base, text, sentence, said, folder):
    add_to(base, text)
    assert sentence.format(data=folder) in said('train.py', 'user.py')


@pytest.mark.parametrize(('text', 'error'), BAD['traceback'].values(), ids=BAD['traceback'])
def test_other_errors_keep_their_traceback(text, error, folder, call):
    add_to(DETECTOR, text)
    with pytest.raises(getattr(builtins, error)) as raised:
        call('tools/train.py', 'user.py')

    assert any('mmdet' in frame.filename for frame in traceback.extract_tb(raised.tb))
    notes = getattr(raised.value, '__notes__', [])
    if sys.version_info >= (3, 11):
        assert notes == ['(config user.py fails in train, iteration 1)']


@pytest.mark.parametrize(('option', 'sentence'), BAD['options'].values(), ids=BAD['options'])
def test_options(option, sentence, folder, call):
    code, printed = call('tools/train.py', DETECTOR, '--cfg-options', option)

    assert code != 0
    assert sentence in (code if isinstance(code, str) else printed)


def test_bases(said):
    add_to('nowhere.py', '')
    assert 'nowhere.py' in said('train.py', 'user.py')
    add_to(DETECTOR, 'model = _base_.modle')
    assert 'config user.py cannot be read' in said('train.py', 'user.py')
    assert 'config . does not exist' in said('train.py', '.')


@pytest.mark.parametrize(
    ('base', 'spoil', 'sentence', 'workers'),
    [
        pytest.param(base, *values, workers, id=f'{base.stem}-{name}-{workers}')
        for base, cases in ((DETECTOR, DETECTION_DATA), (SEGMENTOR, SEGMENTATION_DATA))
        for name, values in cases.items()
        for workers in ((0, 1) if name in ('missing image', 'label out of range') else (0,))
    ],
)
def test_data(base, spoil, sentence, workers, said, folder):
    spoil(folder)
    sentence_of_training = said(
        'train.py', base, '--cfg-options', f'train_dataloader.num_workers={workers}'
    )

    assert sentence.format(data=folder) in sentence_of_training
    assert 'Traceback' not in sentence_of_training


def checkpoint(*classes):
    """An untrained detector's checkpoint."""
    cfg = Config.fromfile(DETECTOR)
    init_default_scope(cfg.default_scope)
    weights = MODELS.build(cfg.model).state_dict()
    meta = dict(dataset_meta=dict(classes=classes))
    torch.save(dict(state_dict=weights, meta=meta), 'untrained.pth')
    return 'untrained.pth'


@pytest.mark.parametrize(('spoil', 'sentence'), TESTED.values(), ids=TESTED)
def test_data_of_a_test(spoil, sentence, said, folder):
    spoil(folder)
    path = checkpoint('circle', 'square', 'triangle', 'star')

    assert sentence.format(data=folder) in said('test.py', DETECTOR, path)


def test_checkpoint_of_classes_in_another_order(said, folder):
    path = checkpoint('circle', 'square', 'star', 'triangle')

    assert (
        'checkpoint untrained.pth was trained for the classes of test_dataloader in another order: '
        'circle, square, star, triangle'
    ) in said('test.py', DETECTOR, path)


def test_names_of_classes_in_a_checkpoint():
    wanted = ('A-cat', 'dog', 'blue bird')
    # Spelled otherwise, another one, fewer.
    for trained in (('a cat', 'Dog', 'Blue_Bird'), ('a cat', 'dog', 'fish'), ('a cat', 'dog')):
        assert not reordered(trained, wanted)
    assert reordered(('Dog', 'A cat', 'blue bird'), wanted)


def add_what_is_usual(folder):
    """What sound data sets hold: crowds, regions to ignore, empty boxes, other categories, ..."""

    def change(content, split):
        image = content['images'][0]
        pixels = image['height'] * image['width']
        last = max(entry['id'] for entry in content['annotations'])
        content['categories'].append(dict(id=90, name='hair drier', supercategory='other'))
        usual = dict(image_id=image['id'], category_id=1, area=9.5, iscrowd=0)
        square = [[8, 8, 20, 8, 20, 20, 8, 20]]
        crowd = dict(size=[image['height'], image['width']], counts=[pixels // 2, pixels // 2])
        new = [
            dict(usual, iscrowd=1, bbox=[0, 0, 64, 64], segmentation=crowd),
            dict(usual, bbox=[5, 5, 1.03, 0.0], segmentation=square, area=0),
            dict(usual, bbox=[-0.01, 0, 64.02, 64.01], segmentation=square),
            dict(usual, bbox=[8, 8, 12, 12], category_id=90, segmentation=square, score=1),
        ]
        if split == 'training':
            new += [
                dict(usual, bbox=[9, 9, 9, 9], ignore=1),
                dict(usual, bbox=[8, 8, 12, 12], segmentation=[[1, 1, 2, 2], *square]),
                dict(usual, bbox=[9, 9, 9, 9], category_id=90, segmentation=[]),
            ]
        content['annotations'] += [dict(entry, id=last + 1 + i) for i, entry in enumerate(new)]
        name = image['file_name'].replace('000001', 'nothing')
        content['images'].append(dict(image, id=77, file_name=name))

    labels = np.resize(np.uint8([0, 1, 2, 3, 4, 5, 255]), (64, 64))
    for split in ('training', 'validation'):
        edit(partial(change, split=split), ANNOTATIONS.replace('training', split))(folder)
        shutil.copy(folder / IMAGE, folder / f'images/{split}/nothing.jpg')
        for path in (folder / 'annotations' / split).glob('*.png'):
            write_map(path, labels)
        draw(f'annotations/{split}/nothing.png', 64, 64, value=0)(folder)


def test_sound_data_pass_the_checks(folder, call):
    add_what_is_usual(folder)
    for base, last in ((DETECTOR, 'epoch_1'), (SEGMENTOR, 'iter_4')):
        options = ['--work-dir', 'work_dir', '--cfg-options', 'train_dataloader.num_workers=1']
        assert call('tools/train.py', base, *options)[0] == 0
        assert Path(f'work_dir/{last}.pth').is_file()


def test_only_small_files_are_checked_and_by_one_process(folder, monkeypatch):
    annotation(image_id=999)(folder)
    init_default_scope('mmdet')
    check = partial(checks.check_data, Config.fromfile(DETECTOR), ['train_dataloader'])
    with monkeypatch.context() as patch:
        patch.setattr(checks, 'is_main_process', lambda: False)
        check()
    with pytest.raises(UserError, match='an image_id that is not listed'):
        check()

    said = []
    monkeypatch.setattr(checks, 'print_log', lambda text, *_: said.append(text))
    monkeypatch.setattr(checks, '_CHECKED_BYTES', 100)
    check()
    assert 'check_data.py checks it' in said[0]
