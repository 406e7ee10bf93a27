# Copyright (c) mmscalablevit contributors. All rights reserved.
"""Wrong arguments, configs and data, each with the sentence it must end in."""

import json
import os
import runpy
import shutil
import sys
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from jobs import draw_shapes
from mmengine.config import Config
from mmengine.dataset import BaseDataset
from mmengine.registry import MODELS, DefaultScope, init_default_scope
from PIL import Image

from mmscalablevit import ScalableViT
from mmscalablevit.checks import config as checks
from mmscalablevit.checks.config import data_set_faults
from mmscalablevit.checks.pipeline import check_pipelines
from mmscalablevit.engine import runner as loading
from mmscalablevit.errors import CheckpointError, DataError

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


# What a user adds to a config, and what training says to it.
CONFIGS = {
    'misspelt top-level key': (
        'train_dataloadr = dict(batch_size=2)',
        "nothing reads the key 'train_dataloadr'; did you mean 'train_dataloader'?",
    ),
    'no model': ('model = None', 'the key model is missing'),
    'model without type': ('model = dict(_delete_=True, neck=None)', 'must contain the key "type"'),
    'unknown key of the model': (
        "model = dict(neckk=dict(type='FPN'))",
        "MaskRCNN.__init__() got an unexpected keyword argument 'neckk'",
    ),
    'misspelt backbone': (
        "model = dict(backbone=dict(type='ScalableVit'))",
        'KeyError: ScalableVit is not in the mmdet::model registry',
    ),
    'wrong arch': ("model = dict(backbone=dict(arch='bas'))", "did you mean 'base'?"),
    'arch width': (
        'model = dict(backbone=dict(arch=dict(num_heads=[1, 1, 3, 2])))',
        "arch['num_heads'][2]=3 does not divide arch['embed_dims'][2]=32",
    ),
    'missing type of the neck': (
        'model = dict(neck=dict(_delete_=True, in_channels=[16, 16, 32, 32]))',
        'must contain the key "type"',
    ),
    'missing argument of the neck': (
        "model = dict(neck=dict(_delete_=True, type='FPN', out_channels=16, num_outs=5))",
        "missing 1 required positional argument: 'in_channels'",
    ),
    'maps that the neck does not expect': (
        'model = dict(neck=dict(in_channels=[16, 16, 32]))',
        'assert len(inputs) == len(self.in_channels)',
    ),
    'channels that the neck does not expect': (
        'model = dict(neck=dict(in_channels=[16, 16, 32, 64]))',
        'fails in its first iteration: RuntimeError: Given groups=1, weight of size [16, 64, 1, 1]',
    ),
    'pretrained without checkpoint': (
        "model = dict(backbone=dict(init_cfg=dict(_delete_=True, type='Pretrained')))",
        "init_cfg of type 'Pretrained' needs the key 'checkpoint'",
    ),
    'pretrained checkpoint missing': (
        'model = dict(backbone=dict(init_cfg=dict(_delete_=True, '
        "type='Pretrained', checkpoint='none.pth')))",
        'checkpoint none.pth does not exist',
    ),
    'number of classes as text': (
        "model = dict(roi_head=dict(bbox_head=dict(num_classes='4')))",
        "model.roi_head.bbox_head.num_classes must be an integer of at least 1, got '4'",
    ),
    'negative number of classes': (
        'model = dict(roi_head=dict(mask_head=dict(num_classes=-4)))',
        'model.roi_head.mask_head.num_classes must be an integer of at least 1, got -4',
    ),
    'unknown optimizer': (
        "optim_wrapper = dict(optimizer=dict(type='AdmW'))",
        "there is no optimizer 'AdmW'",
    ),
    'unknown key of the optimizer': (
        'optim_wrapper = dict(optimizer=dict(lrr=0.1))',
        "AdamW.__init__() got an unexpected keyword argument 'lrr'",
    ),
    'negative learning rate': (
        'optim_wrapper = dict(optimizer=dict(lr=-1))',
        'Invalid learning rate: -1',
    ),
    'unknown key of the optimizer wrapper': (
        'optim_wrapper = dict(acumulative_counts=2)',
        "unexpected keyword argument 'acumulative_counts'",
    ),
    'unknown key of train_cfg': (
        'train_cfg = dict(max_epoch=2)',
        "EpochBasedTrainLoop.__init__() got an unexpected keyword argument 'max_epoch'",
    ),
    'no epochs': (
        'train_cfg = dict(max_epochs=0)',
        'train_cfg.max_epochs must be an integer of at least 1, got 0',
    ),
    'epochs as text': ("train_cfg = dict(max_epochs='2')", "at least 1, got '2'"),
    'no validation interval': ('train_cfg = dict(val_interval=0)', 'train_cfg.val_interval must'),
    'no train_cfg': (
        'train_cfg = None',
        'train_cfg missing; train_loop needs train_dataloader, train_cfg, optim_wrapper',
    ),
    'no train_dataloader': ('train_dataloader = None', 'train_dataloader missing; train_loop'),
    'no val_evaluator': (
        'val_evaluator = None',
        'val_evaluator missing; val_loop needs val_dataloader, val_cfg, val_evaluator',
    ),
    'unknown metric': ("val_evaluator = dict(metric='bboxx')", 'but got bboxx'),
    'unknown schedule': (
        "param_scheduler = [dict(type='LinearLRR')]",
        'KeyError: LinearLRR is not in the mmdet::parameter scheduler registry',
    ),
    'unknown key of the schedule': (
        "param_scheduler = [dict(type='LinearLR', start_facto=1)]",
        "unexpected keyword argument 'start_facto'",
    ),
    'unknown hook': ("custom_hooks = [dict(type='EMAHok')]", 'EMAHok is not in the mmdet::hook'),
    'hook without type': ('custom_hooks = [dict(momentum=1)]', 'must contain the key "type"'),
    'unknown key of the checkpoint hook': (
        'default_hooks = dict(checkpoint=dict(intervall=1))',
        "CheckpointHook has no argument 'intervall'",
    ),
    'unknown key of another hook': (
        'default_hooks = dict(logger=dict(intervall=1))',
        "unexpected keyword argument 'intervall'",
    ),
    'unknown level of the log': ("log_level = 'LOUD'", 'log_level must be one of DEBUG, INFO'),
    'unknown key of the data loader': (
        'train_dataloader = dict(batchsize=1)',
        "DataLoader.__init__() got an unexpected keyword argument 'batchsize'",
    ),
    'empty batches': (
        'train_dataloader = dict(batch_size=0)',
        'batch_size should be a positive integer value, but got batch_size=0',
    ),
    'misspelt data set': (
        data("type='CoccoDataset'"),
        'CoccoDataset is not in the mmdet::dataset registry',
    ),
    'unknown key of the data set': (
        data("annfile='x.json'"),
        "unexpected keyword argument 'annfile'",
    ),
    'unknown key of data_prefix': (
        data("data_prefix=dict(imgs='images/training')"),
        "train_dataloader: data_prefix has no key 'imgs'; allowed are img, img_path, seg",
    ),
    'annotation file that is a folder': (
        data("ann_file='annotations'"),
        "train_dataloader: ann_file must be a file in the format of COCO, got '{data}/annotations'",
    ),
    'no annotation file': (data("ann_file=''"), 'ann_file must be a file in the format of COCO'),
    'misspelt transform': (
        data("pipeline=[dict(type='LoadImge')]"),
        'LoadImge is not in the mmdet::transform registry',
    ),
    'pipeline that does not load boxes': (
        data("pipeline=[dict(type='LoadImageFromFile'), dict(type='PackDetInputs')]"),
        "fails in its first iteration: AttributeError: 'InstanceData' object has no attribute",
    ),
    'single class without comma': (
        data("metainfo=dict(classes=('circle'))"),
        'metainfo.classes must be a tuple, where a single class needs a comma: circle',
    ),
    'class spelled otherwise': (
        data("metainfo=dict(classes=('circle', 'sqare', 'triangle', 'star'))"),
        'class of the config is not among the categories of '
        "{data}/annotations/instances_training.json: 'sqare'",
    ),
    'classes under the key of mmdet 2': (
        data("metainfo=dict(_delete_=True, CLASSES=('circle', 'square', 'triangle', 'star'))"),
        'class of the config is not among the categories of',
    ),
    'too few classes of a head': (
        'model = dict(roi_head=dict(bbox_head=dict(num_classes=3)))',
        'model.roi_head.bbox_head.num_classes=3, but the CocoDataset of train_dataloader has '
        '4 classes (circle, square, triangle, star)',
    ),
    'too many classes of a head': (
        'model = dict(roi_head=dict(mask_head=dict(num_classes=80)))',
        'model.roi_head.mask_head.num_classes=80, but the CocoDataset of train_dataloader has 4',
    ),
    'every object filtered': (
        data('filter_cfg=dict(min_size=1000)'),
        'a data set has no image left after its filter_cfg',
    ),
    'syntax': ('model = dict(', 'cannot be read: SyntaxError'),
    'undefined name': ('model = dict(neck=neck)', "NameError: name 'neck' is not defined"),
    'import': (
        "custom_imports = dict(imports=['no_such_module'], allow_failed_imports=False)",
        "Failed to import custom modules from {{'imports': ['no_such_module']",
    ),
}
SEGMENTATION_CONFIGS = {
    'too few classes of a head': (
        'model = dict(decode_head=dict(num_classes=3))',
        'model.decode_head.num_classes=3, but the BaseSegDataset of train_dataloader has 5 classes '
        '(background, circle, square, triangle, star)',
    ),
    'too many classes of a head': (
        'model = dict(auxiliary_head=dict(num_classes=150))',
        'model.auxiliary_head.num_classes=150, but the BaseSegDataset of train_dataloader has 5',
    ),
    'stage that the backbone does not give': (
        'model = dict(decode_head=dict(in_index=[0, 1, 2, 5]))',
        'fails in its first iteration: IndexError: tuple index out of range',
    ),
    'misspelt loss': (
        "model = dict(decode_head=dict(loss_decode=dict(type='CrossEntropyLos')))",
        'CrossEntropyLos is not in the mmseg::model registry',
    ),
    'suffix of images': (
        data("img_suffix='.bmp'"),
        "{data}/images/training holds no image that ends in img_suffix='.bmp'",
    ),
    'suffix of label maps': (
        data("seg_map_suffix='.bmp'"),
        "No such file or directory: '{data}/annotations/training/000001.bmp'",
    ),
    'prefix of mmdet': (
        data("data_prefix=dict(img='images/training')"),
        "data_prefix has no key 'img'; allowed are img_path, seg_map_path",
    ),
    'list of images missing': (data("ann_file='list.txt'"), '{data}/list.txt does not exist'),
    'no root': (data("data_root='nowhere'"), 'train_dataloader: nowhere does not exist'),
    'no classes': (
        data('metainfo=dict(_delete_=True)'),
        'train_dataloader: metainfo.classes is missing',
    ),
}
OPTIONS = {
    'no value': ('train_cfg.max_epochs', 'options must be KEY=VALUE'),
    'open bracket': ('train_dataloader.batch_size=[1,2', 'options must be KEY=VALUE'),
    'key into a number': ('train_cfg.max_epochs.x=1', '--cfg-options:'),
    'no such step': ('train_dataloader.dataset.pipeline.99.prob=1', '--cfg-options:'),
    'misspelt key': ('modle.neck=None', "--cfg-options: nothing reads the key 'modle'"),
}

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
        f'image {{data}}/{IMAGE} of {FILE}: LoadImageFromFile fails',
    ),
    'no image': (
        write(IMAGE, b'text' * 100),
        f'image {{data}}/{IMAGE} of {FILE}: LoadImageFromFile fails',
    ),
    'truncated image': (cut(IMAGE), f'image {{data}}/{IMAGE} '),
    'truncated header': (cut(IMAGE, 0.02), f'image {{data}}/{IMAGE} of {FILE}: LoadImageFromFile'),
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
        f'image {{data}}/{IMAGE} of {FILE}: ',
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
        f'with label map {{data}}/{LABELS}: LoadAnnotations fails: UnidentifiedImageError',
    ),
    'truncated label map': (cut(LABELS), f'label map {{data}}/{LABELS}: LoadAnnotations fails'),
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


@pytest.mark.parametrize(('text', 'sentence'), CONFIGS.values(), ids=CONFIGS)
def test_configs(text, sentence, said, folder):
    assert sentence.format(data=folder) in trains(said, DETECTOR, text)


@pytest.mark.parametrize(
    ('text', 'sentence'), SEGMENTATION_CONFIGS.values(), ids=SEGMENTATION_CONFIGS
)
def test_segmentation_configs(text, sentence, said, folder):
    assert sentence.format(data=folder) in trains(said, SEGMENTOR, text)


@pytest.mark.parametrize(('option', 'sentence'), OPTIONS.values(), ids=OPTIONS)
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
        (DETECTOR, write(IMAGE, b'text'), f'image {{data}}/{IMAGE} of {FILE}: LoadImage'),
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
    ('trained', 'warning'),
    [
        (('a cat', 'Dog', 'Blue_Bird'), ''),
        (('a cat', 'dog', 'fish'), "other classes than test_dataloader has: class 2 is 'fish'"),
        (('a cat', 'dog'), ''),
    ],
    ids=['spelling', 'another', 'fewer'],
)
def test_names_of_classes_in_a_checkpoint(trained, warning, monkeypatch):
    dataset = BaseDataset(lazy_init=True, metainfo=dict(classes=('A-cat', 'dog', 'blue bird')))
    runner = SimpleNamespace(
        cfg=Config(dict(load_from='x.pth')), test_dataloader=SimpleNamespace(dataset=dataset)
    )
    said = []
    monkeypatch.setattr(loading, 'print_log', lambda text, **_: said.append(text))
    meta = dict(meta=dict(dataset_meta=dict(classes=trained)))
    loading._SameClassesHook().after_load_checkpoint(runner, meta)

    assert len(said) == bool(warning)
    assert warning in ''.join(said)


def test_order_of_classes_in_a_checkpoint_is_checked_despite_spelling():
    dataset = BaseDataset(lazy_init=True, metainfo=dict(classes=('cat', 'dog')))
    runner = SimpleNamespace(
        cfg=Config(dict(load_from='x.pth')), test_dataloader=SimpleNamespace(dataset=dataset)
    )
    with pytest.raises(CheckpointError, match='in another order'):
        loading._SameClassesHook().after_load_checkpoint(
            runner, dict(meta=dict(dataset_meta=dict(classes=('Dog', 'Cat'))))
        )


class Photographs(BaseDataset):
    def load_data_list(self):
        return [dict(img_path='photo.jpg', height=30, width=40)] * 2


def load(pipeline):
    dataset = Photographs(pipeline=pipeline)
    check_pipelines(dataset)
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
    assert len(load([decode])) == 2
    Path('photo.jpg').write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match=r'image photo\.jpg is damaged: '):
        load([decode])


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


def test_traceback_is_shown_on_demand(said, folder, capfd):
    write(IMAGE, b'text')(folder)
    trains(said, DETECTOR, '', 'log_level=DEBUG')

    assert (
        'AssertionError: failed to load image'
        in capfd.readouterr().err + Path(next(Path('work_dir').glob('*/*.log'))).read_text()
    )


def test_number_of_cases():
    tables = [BACKBONE, INPUTS, INIT_CFGS, CONFIGS, SEGMENTATION_CONFIGS, OPTIONS]
    tables += [DETECTION_DATA, SEGMENTATION_DATA, TESTED]
    count = sum(map(len, tables))
    print(f'{count} wrong inputs, each ends in the sentence of its table')

    assert count >= 60
