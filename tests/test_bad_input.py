# Copyright (c) mmscalablevit contributors. All rights reserved.
"""Wrong arguments, configs and data, each with the sentence it must end in."""

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
from jobs import draw_shapes
from mmengine.config import Config
from mmengine.dataset import BaseDataset
from mmengine.registry import MODELS, DefaultScope, init_default_scope
from PIL import Image

from mmscalablevit import ScalableViT
from mmscalablevit.checks import config as checks
from mmscalablevit.checks.config import data_set_faults, other_classes
from mmscalablevit.checks.pipeline import with_checks
from mmscalablevit.errors import DataError

ROOT = Path(__file__).parents[1]
TOOLS = ROOT / 'tools'
DETECTOR = ROOT / 'tests' / 'data' / 'tiny_mask-rcnn.py'
SEGMENTOR = ROOT / 'tests' / 'data' / 'tiny_upernet.py'
CLASSES = ('circle', 'square', 'triangle', 'star')
ARCH = dict(
    embed_dims=(8, 16, 24, 32),
    num_heads=(1, 2, 3, 4),
    depths=(1, 1, 1, 1),
    c_ratios=(1, 1, 1, 1),
    sr_ratios=(8, 4, 2, 1),
    window_sizes=(7, 7, 7, 7),
    mlp_ratios=(2, 2, 2, 2),
    ssa_kv='separate',
)


def arch(**changes):
    return dict(arch=dict(ARCH, **changes))


BACKBONE = {
    'misspelt arch': (dict(arch='smal'), ValueError, r"got 'smal'; did you mean 'small'\?"),
    'misspelt merged arch': (dict(arch='Small_merged'), ValueError, "did you mean 'small-merged'"),
    'arch None': (dict(arch=None), TypeError, 'arch must be a name or a dict, got NoneType'),
    'arch list': (dict(arch=['small']), TypeError, 'arch must be a name or a dict, got list'),
    'empty arch': (dict(arch={}), ValueError, r"missing: \['c_ratios', 'depths'"),
    'five stages': (
        arch(depths=(1,) * 5),
        ValueError,
        r"arch\['depths'\] must be 4 positive integers, got \(1, 1, 1, 1, 1\)",
    ),
    'depth of a number': (arch(depths=2), ValueError, r"arch\['depths'\] .*got 2"),
    'depth bool': (arch(depths=(True, 1, 1, 1)), ValueError, r"arch\['depths'\] .*got \(True"),
    'negative width': (arch(embed_dims=(-8, 16, 24, 32)), ValueError, r"arch\['embed_dims'\]"),
    'width text': (arch(embed_dims=('8', 16, 24, 32)), ValueError, r"positive integers, got \('8'"),
    'zero heads': (arch(num_heads=(0, 2, 3, 4)), ValueError, r"arch\['num_heads'\] must be 4 pos"),
    'zero window': (arch(window_sizes=(7, 7, 7, 0)), ValueError, r"arch\['window_sizes'\]"),
    'float window': (arch(window_sizes=(7.0, 7, 7, 7)), ValueError, r"arch\['window_sizes'\]"),
    'zero reduction': (arch(sr_ratios=(8, 4, 0, 1)), ValueError, r"arch\['sr_ratios'\]"),
    'NaN c_ratio': (arch(c_ratios=(float('nan'), 1, 1, 1)), ValueError, r"'c_ratios'.*numbers"),
    'infinite mlp_ratio': (
        arch(mlp_ratios=(float('inf'), 2, 2, 2)),
        ValueError,
        r"arch\['mlp_ratios'\] must be 4 positive numbers",
    ),
    'MLP without width': (arch(mlp_ratios=(0.01, 2, 2, 2)), ValueError, 'leaves the MLP no width'),
    'ssa_kv None': (arch(ssa_kv=None), ValueError, "'separate' or 'merged', got None"),
    'in_channels bool': (
        dict(in_channels=True),
        TypeError,
        'in_channels must be an integer of at least 1, got True',
    ),
    'in_channels float': (dict(in_channels=3.0), TypeError, 'in_channels .*got 3.0'),
    'in_channels negative': (dict(in_channels=-3), ValueError, 'at least 1, got -3'),
    'out_indices text': (dict(out_indices='0123'), TypeError, "out_indices .*got '0123'"),
    'out_indices bool': (dict(out_indices=(False, True)), TypeError, 'out_indices'),
    'out_indices floats': (dict(out_indices=(0.0, 1.0)), TypeError, 'out_indices'),
    'out_indices set': (dict(out_indices={0, 1}), TypeError, 'must be a sequence of stages'),
    'stage_norm bool': (dict(stage_norm=True), ValueError, 'stage_norm .*got True'),
    'final_norm text': (dict(final_norm='yes'), TypeError, 'final_norm must be True or False'),
    'norm_eval number': (dict(norm_eval=1), TypeError, 'norm_eval must be True or False, got 1'),
    'with_cp None': (dict(with_cp=None), TypeError, 'with_cp must be True or False, got None'),
    'drop_rate NaN': (dict(drop_rate=float('nan')), ValueError, r'drop_rate .*\[0, 1\), got nan'),
    'drop_path_rate bool': (dict(drop_path_rate=True), TypeError, r'number in \[0, 1\), got True'),
    'drop_path_rate list': (dict(drop_path_rate=[0.1]), TypeError, 'drop_path_rate'),
    'attn_drop_rate above one': (dict(attn_drop_rate=1.5), ValueError, 'attn_drop_rate'),
    'frozen_stages negative': (dict(frozen_stages=-2), ValueError, '-1 to 4, got -2'),
    'frozen_stages bool': (dict(frozen_stages=True), TypeError, 'frozen_stages'),
    'frozen_stages None': (dict(frozen_stages=None), TypeError, 'frozen_stages .*got None'),
    'unknown argument': (dict(droppath=0.1), TypeError, "argument 'droppath'"),
}
INPUTS = {
    'no batch': (torch.zeros(3, 32, 32), ValueError, r'\(B, 3, H, W\).*got \(3, 32, 32\)'),
    'video': (torch.zeros(1, 3, 2, 32, 32), ValueError, r'got \(1, 3, 2, 32, 32\)'),
    'gray': (torch.zeros(1, 1, 32, 32), ValueError, r'in_channels=3 .*got \(1, 1, 32, 32\)'),
    'channels last': (torch.zeros(1, 32, 32, 3), ValueError, r'got \(1, 32, 32, 3\)'),
    'empty batch': (torch.zeros(0, 3, 32, 32), ValueError, 'none of them empty'),
    'no width': (torch.zeros(1, 3, 32, 0), ValueError, 'none of them empty'),
    'bytes': (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), TypeError, 'got torch.uint8'),
    'array': (np.zeros((1, 3, 32, 32), np.float32), TypeError, 'got ndarray'),
    'list': ([torch.zeros(3, 32, 32)], TypeError, 'floating-point images, got list'),
}
INIT_CFGS = {
    'no checkpoint': (dict(type='Pretrained'), "needs the key 'checkpoint'"),
    'no type': (dict(checkpoint='backbone.pth'), "init_cfg needs the key 'type'"),
}


def data(text, loader='train'):
    return f'{loader}_dataloader = dict(dataset=dict({text}))'


BAD = yaml.safe_load((ROOT / 'tests' / 'data' / 'bad_configs.yml').read_text())
ANNOTATIONS = 'annotations/instances_training.json'
IMAGE = 'images/training/000001.jpg'
LABELS = 'annotations/training/000001.png'


def write(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def remove(name):
    return lambda folder: (folder / name).unlink()


def cut(name, share=0.5):
    def spoil(folder):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: int(len(content) * share)])

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


def empty(*parts):
    return edit(lambda content: content.update({part: [] for part in parts}))


def empty_folder(name):
    def spoil(folder):
        for path in (folder / name).iterdir():
            path.unlink()

    return spoil


FILE = '{data}/' + ANNOTATIONS
DETECTION_DATA = {
    'no annotation file': (remove(ANNOTATIONS), f'train_dataloader: {FILE} does not exist'),
    'empty annotation file': (write(ANNOTATIONS, b''), f'is not JSON: {FILE}: Expecting value'),
    'empty JSON': (
        write(ANNOTATIONS, b'{}'),
        f'has no list of images and no list of annotations and no list of categories: {FILE}',
    ),
    'JSON list': (write(ANNOTATIONS, b'[]'), 'has no list of images and no list of annotations'),
    'truncated JSON': (cut(ANNOTATIONS), f'is not JSON: {FILE}:'),
    'binary annotation file': (write(ANNOTATIONS, b'\xff\xd8'), f'is not JSON: {FILE}:'),
    'no images': (
        empty('images', 'annotations'),
        f'{FILE} has no usable entry in (2 times): images, annotations',
    ),
    'no annotations': (empty('annotations'), f'{FILE} has no usable entry in: annotations'),
    'no categories': (empty('categories'), f'{FILE} has no usable entry in: categories'),
    'unknown image_id': (
        annotation(image_id=999),
        f'{FILE}: annotation of an image_id that is not listed: id',
    ),
    'unknown category_id': (
        annotation(category_id=999),
        f'{FILE}: annotation of a category_id that is not listed: id',
    ),
    'category_id of text': (annotation(category_id='1'), 'no valid category_id: annotations[0]'),
    'bbox of text': (annotation(bbox='1,2,3,4'), f'{FILE}: entry has no valid bbox'),
    'bbox of three numbers': (annotation(bbox=[1, 2, 3]), f'{FILE}: bbox is not four numbers'),
    'bbox of NaN': (annotation(bbox=[float('nan'), 2, 9, 9]), f'{FILE}: bbox is not four numbers'),
    'no area': (
        edit(lambda content: content['annotations'][0].pop('area')),
        f'{FILE}: entry has no valid area: annotations[0]',
    ),
    'no mask': (annotation(segmentation=None), f'{FILE}: annotation has no segmentation'),
    'polygon of two points': (
        annotation(segmentation=[[1, 2, 3, 4]]),
        f'{FILE}: polygon is not of at least 3 points x, y',
    ),
    'mask of another size': (
        annotation(segmentation=dict(size=[9, 9], counts=[81])),
        f'{FILE}: run-length encoding is not of the size of its image',
    ),
    'id twice': (
        edit(lambda content: content['annotations'].append(content['annotations'][0])),
        f'{FILE}: id is given to several annotations',
    ),
    'image without height': (
        edit(lambda content: content['images'][0].pop('height')),
        f'{FILE}: entry has no valid height: images[0]',
    ),
    'other size than annotated': (
        draw(IMAGE, 48, 32, 3),
        f'image {{data}}/{IMAGE} is 32x48 (EXIF rotation applied) and not 64x64 as in {FILE}',
    ),
    'missing image': (remove(IMAGE), f"No such file or directory: '{{data}}/{IMAGE}'"),
    'empty image': (
        write(IMAGE, b''),
        f'image {{data}}/{IMAGE} cannot be loaded: ',
    ),
    'no image': (
        write(IMAGE, b'text' * 100),
        f'image {{data}}/{IMAGE} cannot be loaded: ',
    ),
    'truncated image': (cut(IMAGE), f'image {{data}}/{IMAGE} '),
    'truncated header': (cut(IMAGE, 0.02), f'image {{data}}/{IMAGE} cannot be loaded: '),
    'empty folder': (
        empty_folder('images/training'),
        "No such file or directory: '{data}/images/training/",
    ),
    'no folder': (
        lambda folder: shutil.rmtree(folder / 'images' / 'training'),
        'train_dataloader: {data}/images/training does not exist',
    ),
    'run-length encoding of a negative length': (
        annotation(segmentation=dict(size=[64, 64], counts=[1, -5])),
        f'{FILE}: run-length encoding does not add up to the size of its image',
    ),
    'run-length encoding without lengths': (
        annotation(segmentation=dict(size=[64, 64], counts=None)),
        f'{FILE}: run-length encoding has no counts',
    ),
    'polygon of text': (
        annotation(segmentation=[['a'] * 6]),
        f'image {{data}}/{IMAGE} ',
    ),
}
NOT_LABELS = 'allowed are 1 to 5 for 5 classes with reduce_zero_label=True, and 255 and 0'
SEGMENTATION_DATA = {
    'empty image': (write(IMAGE, b''), f'image {{data}}/{IMAGE} with label map {{data}}/{LABELS}'),
    'truncated image': (cut(IMAGE), f'image {{data}}/{IMAGE} '),
    'image of another size': (
        draw(IMAGE, 32, 48, 3),
        f'label map {{data}}/{LABELS} is 64x64 and not 48x32 as image {{data}}/{IMAGE}',
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
    'fraction': (
        lambda folder: Image.new('F', (64, 64), 1.5).save(folder / LABELS, 'tiff'),
        f'label map {{data}}/{LABELS} has 1.5; {NOT_LABELS}',
    ),
    'color': (
        draw(LABELS, 64, 64, 3),
        f'label map {{data}}/{LABELS} is a color image; it must have one channel',
    ),
    'label map of another size': (
        draw(LABELS, 128, 96),
        f'label map {{data}}/{LABELS} is 96x128 and not 64x64 as image {{data}}/{IMAGE}',
    ),
    'empty folder': (
        empty_folder('images/training'),
        '{data}/images/training holds no image that ends in',
    ),
    'empty folder of label maps': (
        empty_folder('annotations/training'),
        "No such file or directory: '{data}/annotations/training/",
    ),
    'validation label out of range': (
        draw(LABELS.replace('training', 'validation'), 64, 64, value=77),
        f'label map {{data}}/annotations/validation/000001.png has 77; {NOT_LABELS}',
    ),
}
VALIDATED = ANNOTATIONS.replace('training', 'validation')
TESTED = {
    'short polygon among others': (
        DETECTOR,
        edit(
            lambda x: x['annotations'][0].update(segmentation=[[1, 1, 2, 2], [1, 1, 9, 1, 9, 9]]),
            VALIDATED,
        ),
        'test_dataloader: {data}/annotations/instances_validation.json: polygon is not of at least',
    ),
    'cut image': (
        DETECTOR,
        cut(IMAGE.replace('training', 'validation')),
        'image {data}/images/validation/000001.jpg ',
    ),
    'no annotation': (
        DETECTOR,
        edit(lambda x: x['annotations'].clear(), VALIDATED),
        'test_dataloader: {data}/annotations/instances_validation.json has no usable entry in',
    ),
    'label out of range': (
        SEGMENTOR,
        draw(LABELS.replace('training', 'validation'), 64, 64, value=9),
        'label map {data}/annotations/validation/000001.png has 9',
    ),
}


@pytest.mark.parametrize(('kwargs', 'error', 'text'), BACKBONE.values(), ids=BACKBONE)
def test_backbone_arguments(kwargs, error, text):
    with pytest.raises(error, match=text):
        ScalableViT(**dict(dict(arch=ARCH), **kwargs))


@pytest.mark.parametrize(('images', 'error', 'text'), INPUTS.values(), ids=INPUTS)
def test_inputs(images, error, text):
    with pytest.raises(error, match=text):
        ScalableViT(ARCH)(images)


@pytest.mark.parametrize(('init_cfg', 'text'), INIT_CFGS.values(), ids=INIT_CFGS)
def test_init_cfgs(init_cfg, text):
    with pytest.raises(ValueError, match=text):
        ScalableViT(ARCH, init_cfg=init_cfg).init_weights()


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


@pytest.mark.parametrize(('text', 'sentence'), BAD['detection'].values(), ids=BAD['detection'])
def test_configs(text, sentence, said, folder):
    assert sentence.format(data=folder) in trains(said, DETECTOR, text)


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


@pytest.mark.parametrize(
    ('text', 'sentence'), BAD['segmentation'].values(), ids=BAD['segmentation']
)
def test_segmentation_configs(text, sentence, said, folder):
    assert sentence.format(data=folder) in trains(said, SEGMENTOR, text)


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


@pytest.mark.parametrize(('spoil', 'sentence'), DETECTION_DATA.values(), ids=DETECTION_DATA)
def test_detection_data(spoil, sentence, said, folder):
    spoil(folder)

    assert sentence.format(data=folder) in trains(said, DETECTOR, '')


@pytest.mark.parametrize(('spoil', 'sentence'), SEGMENTATION_DATA.values(), ids=SEGMENTATION_DATA)
def test_segmentation_data(spoil, sentence, said, folder):
    spoil(folder)

    assert sentence.format(data=folder) in trains(said, SEGMENTOR, '')


@pytest.mark.parametrize(
    ('base', 'spoil', 'sentence'),
    [
        (DETECTOR, write(IMAGE, b'text'), f'image {{data}}/{IMAGE} cannot be loaded: '),
        (DETECTOR, remove(IMAGE), f"No such file or directory: '{{data}}/{IMAGE}'"),
        (SEGMENTOR, draw(LABELS, 64, 64, value=6), f'label map {{data}}/{LABELS} has 6; allowed'),
    ],
    ids=['image', 'missing image', 'label'],
)
def test_faults_in_a_worker(base, spoil, sentence, said, folder):
    spoil(folder)
    sentence_of_worker = trains(said, base, '', 'train_dataloader.num_workers=1')

    assert sentence.format(data=folder) in sentence_of_worker
    assert 'Traceback' not in sentence_of_worker


def checkpoint(config, classes):
    """An untrained model's checkpoint."""
    cfg = Config.fromfile(config)
    init_default_scope(cfg.default_scope)
    weights = MODELS.build(cfg.model).state_dict()
    meta = dict(dataset_meta=dict(classes=classes))
    torch.save(dict(state_dict=weights, meta=meta), 'untrained.pth')
    return 'untrained.pth'


@pytest.mark.parametrize(('config', 'spoil', 'sentence'), TESTED.values(), ids=TESTED)
def test_data_of_a_test(config, spoil, sentence, said, folder):
    spoil(folder)
    classes = CLASSES if config == DETECTOR else ('background', *CLASSES)
    options = ['--work-dir', 'work_dir']

    sentence_of_tool = said('test.py', config, checkpoint(config, classes), *options)
    assert sentence.format(data=folder) in sentence_of_tool


def test_label_map_in_test_time_augmentation(said, folder):
    draw(LABELS.replace('training', 'validation'), 64, 64, value=9)(folder)
    path = checkpoint(SEGMENTOR, ('background', *CLASSES))

    assert '000001.png has 9' in said('test.py', SEGMENTOR, path, '--tta', '--work-dir', 'w')


def test_checkpoint_of_classes_in_another_order(said, folder):
    path = checkpoint(DETECTOR, ('circle', 'square', 'star', 'triangle'))

    assert (
        'checkpoint untrained.pth was trained for the classes of test_dataloader in another order: '
        "class 2 is 'star' there and 'triangle' here"
    ) in said('test.py', DETECTOR, path, '--work-dir', 'work_dir')


@pytest.mark.parametrize(
    ('trained', 'said'),
    [
        (('a cat', 'Dog', 'Blue_Bird'), ''),
        (('a cat', 'dog', 'fish'), "other classes than test_dataloader has: class 2 is 'fish'"),
        (('a cat', 'dog'), ''),
        (('Dog', 'A cat', 'blue bird'), 'in another order'),
    ],
    ids=['spelling', 'another', 'fewer', 'order'],
)
def test_names_of_classes_in_a_checkpoint(trained, said):
    fault, is_error = other_classes(trained, ('A-cat', 'dog', 'blue bird'), 'test_dataloader')

    assert said in fault
    assert bool(fault) == bool(said)
    assert is_error == (said == 'in another order')


class Photographs(BaseDataset):
    def load_data_list(self):
        return [dict(img_path='photo.jpg', height=30, width=40)] * 2


def load(pipeline):
    dataset = Photographs(**with_checks(dict(pipeline=pipeline)))
    return [dataset[i] for i in range(2)]


def test_turned_photograph_is_warned_of_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = []
    monkeypatch.setattr('mmscalablevit.checks.pipeline.print_log', lambda x, **_: said.append(x))
    init_default_scope('mmdet')
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new('RGB', (40, 30)).save('photo.jpg', exif=exif)

    assert [x['ori_shape'] for x in load([dict(type='LoadImageFromFile')])] == [(40, 30)] * 2
    assert len(said) == 1
    assert 'photo.jpg is 30x40 (EXIF rotation applied) and not 40x30' in said[0]
    assert "color_type='color_ignore_orientation'" in said[0]
    load([dict(type='LoadImageFromFile', color_type='color_ignore_orientation')])
    assert len(said) == 1


@pytest.mark.parametrize('suffix', ['.jpg', '.png'])
def test_image_that_a_decoder_completes(suffix, tmp_path, monkeypatch):
    # Older OpenCV fills what is missing with gray.
    monkeypatch.chdir(tmp_path)
    noise = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    Image.fromarray(noise).save('whole' + suffix)
    content = Path('whole' + suffix).read_bytes()

    def decode(data):
        return dict(data, ori_shape=(30, 40))

    Path('photo.jpg').write_bytes(content + b'trailing')
    assert len(load([decode, dict(type='CheckImage')])) == 2
    Path('photo.jpg').write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match=r'image photo\.jpg is damaged: '):
        load([decode, dict(type='CheckImage')])


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
    leaf = cfg.train_dataloader.dataset

    assert len(list(data_set_faults(cfg, 'train_dataloader', leaf))) == 1
    cfg.launcher = 'pytorch'
    monkeypatch.setenv('RANK', '1')
    assert not list(data_set_faults(cfg, 'train_dataloader', leaf))
    monkeypatch.setenv('RANK', '0')
    assert list(data_set_faults(cfg, 'train_dataloader', leaf))

    said = []
    monkeypatch.setattr(checks, 'print_log', lambda text, **_: said.append(text))
    monkeypatch.setattr(checks, '_CHECKED_BYTES', 100)
    assert not list(data_set_faults(cfg, 'train_dataloader', leaf))
    assert 'check_data.py checks it' in said[0]


def test_misspelt_class_of_a_large_file(said, folder, monkeypatch):
    monkeypatch.setattr(checks, '_CHECKED_BYTES', 100)
    text = data("metainfo=dict(classes=('circle', 'sqare', 'triangle', 'star'))")

    assert (
        f'train_dataloader: 3 of the 4 classes of the config are among the categories of {folder}/'
    ) in trains(said, DETECTOR, text)


def test_number_of_cases():
    tables = [BACKBONE, INPUTS, INIT_CFGS, *BAD.values()]
    tables += [DETECTION_DATA, SEGMENTATION_DATA, TESTED]
    count = sum(map(len, tables))
    print(f'{count} wrong inputs, each ends in the sentence of its table')

    assert count >= 60
