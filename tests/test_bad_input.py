# Copyright (c) mmscalablevit contributors. All rights reserved.
"""Wrong configs and data, each with the sentence it must end in."""

import builtins
import json
import os
import runpy
import shutil
import sys
import traceback
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from jobs import ROOT, draw_shapes
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope, init_default_scope
from PIL import Image

from mmscalablevit.checks import config as checks
from mmscalablevit.checks.config import reordered
from mmscalablevit.errors import UserError

TOOLS = ROOT / 'tools'
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


def annotation(**values):
    return edit(lambda content: content['annotations'][0].update(values))


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
    'image of another size': (
        draw(IMAGE, 32, 48, 3),
        f'label map {{data}}/{LABELS} is 64x64 and not 48x32; it must be of',
    ),
    'missing label map': (remove(LABELS), f"No such file or directory: '{{data}}/{LABELS}'"),
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
        edit(
            lambda x: x['annotations'][0].update(segmentation=[[1, 1, 2, 2], [1, 1, 9, 1, 9, 9]]),
            VALIDATED,
        ),
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
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('SHAPES_ROOT', str(tmp_path / 'data'))
    return Path(shutil.copytree(shapes, tmp_path / 'data'))


@pytest.fixture
def said(monkeypatch):
    """Call a tool in this process and return the sentence that it ends with."""

    # For speed: every run logs its compilers and its formatted config.
    monkeypatch.setattr('mmengine.runner.runner.collect_env', dict)
    # Runs of the same second have the same name, by which mmengine keeps their scopes.
    monkeypatch.setattr(DefaultScope, '_instance_dict', OrderedDict())
    monkeypatch.setattr(Config, 'pretty_text', '')

    def call(tool, *arguments):
        monkeypatch.setattr(sys, 'argv', [str(TOOLS / tool), *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_info:
            runpy.run_path(sys.argv[0], run_name='__main__')
        sentence = exit_info.value.code
        assert isinstance(sentence, str)
        assert sentence.startswith('error: ')
        assert '\n' not in sentence
        assert len(sentence) < 900
        return sentence

    return call


def trains(said, base, text, *options):
    """What training says to a config with these lines added."""
    Path('user.py').write_text(f"_base_ = '{base}'\n{text}\n")
    options = ['--cfg-options', *options] if options else []
    return said('train.py', 'user.py', '--work-dir', 'work_dir', *options)


@pytest.mark.parametrize(
    ('base', 'text', 'sentence'),
    [
        pytest.param(base, *values, id=f'{part}-{name}')
        for part, base in (('detection', DETECTOR), ('segmentation', SEGMENTOR))
        for name, values in BAD[part].items()
    ],
)
def test_configs(base, text, sentence, said, folder):
    assert sentence.format(data=folder) in trains(said, base, text)


@pytest.mark.parametrize(('text', 'error'), BAD['traceback'].values(), ids=BAD['traceback'])
def test_other_errors_keep_their_traceback(text, error, folder, monkeypatch):
    Path('user.py').write_text(f"_base_ = '{DETECTOR}'\n{text}\n")
    monkeypatch.setattr(sys, 'argv', ['train.py', 'user.py', '--work-dir', 'work_dir'])
    with pytest.raises(getattr(builtins, error)) as raised:
        runpy.run_path(str(TOOLS / 'train.py'), run_name='__main__')

    assert any('mmdet' in frame.filename for frame in traceback.extract_tb(raised.tb))
    notes = getattr(raised.value, '__notes__', [])
    if sys.version_info >= (3, 11):
        assert notes == ['(config user.py fails in train, iteration 1)']


@pytest.mark.parametrize(('option', 'sentence'), BAD['options'].values(), ids=BAD['options'])
def test_options(option, sentence, folder, monkeypatch, capsys):
    command = [str(TOOLS / 'train.py'), str(DETECTOR), '--cfg-options', option]
    monkeypatch.setattr(sys, 'argv', command)
    with pytest.raises(SystemExit) as exit_info:
        runpy.run_path(command[0], run_name='__main__')

    code = exit_info.value.code
    assert code != 0
    assert sentence in (code if isinstance(code, str) else capsys.readouterr().err)


def test_bases(said, folder):
    Path('user.py').write_text("_base_ = ['nowhere.py']\n")
    assert 'nowhere.py' in said('train.py', 'user.py')
    Path('user.py').write_text(f"_base_ = '{DETECTOR}'\nmodel = _base_.modle\n")
    assert 'config user.py cannot be read' in said('train.py', 'user.py')
    assert 'config . does not exist' in said('train.py', '.')


@pytest.mark.parametrize(
    ('base', 'spoil', 'sentence'),
    [
        pytest.param(base, *values, id=f'{base.stem}-{name}')
        for base, cases in ((DETECTOR, DETECTION_DATA), (SEGMENTOR, SEGMENTATION_DATA))
        for name, values in cases.items()
    ],
)
def test_data(base, spoil, sentence, said, folder):
    spoil(folder)

    assert sentence.format(data=folder) in trains(said, base, '')


@pytest.mark.parametrize(
    ('base', 'spoil', 'sentence'),
    [
        (DETECTOR, remove(IMAGE), f"No such file or directory: '{{data}}/{IMAGE}'"),
        (SEGMENTOR, draw(LABELS, 64, 64, value=6), f'label map {{data}}/{LABELS} has 6; allowed'),
    ],
    ids=['missing image', 'label'],
)
def test_faults_in_a_worker(base, spoil, sentence, said, folder):
    spoil(folder)
    sentence_of_worker = trains(said, base, '', 'train_dataloader.num_workers=1')

    assert sentence.format(data=folder) in sentence_of_worker
    assert 'Traceback' not in sentence_of_worker


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

    said_of_data = said('test.py', DETECTOR, path, '--work-dir', 'work_dir')
    assert sentence.format(data=folder) in said_of_data


def test_checkpoint_of_classes_in_another_order(said, folder):
    path = checkpoint('circle', 'square', 'star', 'triangle')

    assert (
        'checkpoint untrained.pth was trained for the classes of test_dataloader in another order: '
        'circle, square, star, triangle'
    ) in said('test.py', DETECTOR, path, '--work-dir', 'work_dir')


@pytest.mark.parametrize(
    ('trained', 'refused'),
    [
        (('a cat', 'Dog', 'Blue_Bird'), False),
        (('a cat', 'dog', 'fish'), False),
        (('a cat', 'dog'), False),
        (('Dog', 'A cat', 'blue bird'), True),
    ],
    ids=['spelling', 'another', 'fewer', 'order'],
)
def test_names_of_classes_in_a_checkpoint(trained, refused):
    assert reordered(trained, ('A-cat', 'dog', 'blue bird')) == refused


def add_what_is_usual(folder):
    """What sound data sets hold: crowds, regions to ignore, empty boxes, other categories, ..."""

    def change(content):
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
        if 'train' in content['info']:
            new += [
                dict(usual, bbox=[9, 9, 9, 9], ignore=1),
                dict(usual, bbox=[8, 8, 12, 12], segmentation=[[1, 1, 2, 2], *square]),
                dict(usual, bbox=[9, 9, 9, 9], category_id=90, segmentation=[]),
            ]
        content['annotations'] += [dict(entry, id=last + 1 + i) for i, entry in enumerate(new)]
        name = image['file_name'].replace('000001', 'nothing')
        content['images'].append(dict(image, id=77, file_name=name))

    for split in ('training', 'validation'):
        name = ANNOTATIONS.replace('training', split)
        edit(lambda content, split=split: content.update(info=split), name)(folder)
        edit(change, name)(folder)
        shutil.copy(folder / IMAGE, folder / f'images/{split}/nothing.jpg')
        labels = np.arange(64 * 64).reshape(64, 64) % 7
        labels[labels == 6] = 255
        for path in (folder / 'annotations' / split).glob('*.png'):
            Image.fromarray(labels.astype(np.uint8)).save(path)
        Image.fromarray(np.zeros((64, 64), np.uint8)).save(
            folder / f'annotations/{split}/nothing.png'
        )


def test_sound_data_pass_the_checks(folder, monkeypatch):
    add_what_is_usual(folder)
    for base in (DETECTOR, SEGMENTOR):
        options = ['--work-dir', 'work_dir', '--cfg-options', 'train_dataloader.num_workers=1']
        monkeypatch.setattr(sys, 'argv', ['train.py', str(base), *options])
        runpy.run_path(str(TOOLS / 'train.py'), run_name='__main__')

    assert os.path.isfile('work_dir/epoch_1.pth')
    assert os.path.isfile('work_dir/iter_4.pth')


def test_only_small_files_are_checked_and_by_one_process(folder, monkeypatch):
    annotation(image_id=999)(folder)
    cfg = Config.fromfile(DETECTOR)
    init_default_scope('mmdet')

    def check():
        checks.check_data(cfg, ['train_dataloader'])

    monkeypatch.setattr(checks, 'is_main_process', lambda: False)
    check()
    monkeypatch.undo()
    monkeypatch.setenv('SHAPES_ROOT', str(folder))
    with pytest.raises(UserError, match='an image_id that is not listed'):
        check()

    said = []
    monkeypatch.setattr(checks, 'print_log', lambda text, *_: said.append(text))
    monkeypatch.setattr(checks, '_CHECKED_BYTES', 100)
    check()
    assert 'check_data.py checks it' in said[0]
