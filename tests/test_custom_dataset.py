# Copyright (c) mmscalablevit contributors. All rights reserved.
"""The page on own data sets: its files and commands, in their order, on a few small images."""

import shlex
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from doc_blocks import LOADERS, ROOT, environment, read_blocks, run_commands
from jobs import run, scalars, write_image, write_map
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from test_dataset_converters import (
    shape,
    write_coco,
    write_labelme,
    write_lists,
    write_voc,
    write_yolo,
)

from mmscalablevit import cli
from mmscalablevit.checkpoint.reading import read_checkpoint
from mmscalablevit.errors import CheckpointError

PAGE = ROOT / 'docs' / 'custom_dataset.md'
ARCH = Config.fromfile(ROOT / 'tests' / 'data' / 'tiny_mask-rcnn.py').model.backbone.arch.to_dict()
WIDTHS = ARCH['embed_dims']
# For speed: small images and models, few iterations and proposals, no optimizer in checkpoints.
SHORT = {
    'default_hooks.logger.interval': 1,
    'default_hooks.checkpoint.save_optimizer': False,
    'model.backbone.init_cfg': None,
    **{f'model.backbone.arch.{key}': value for key, value in ARCH.items()},
    'model.backbone.arch._delete_': True,
    'train_dataloader.dataset.pipeline.2.scale': (64, 64),
    'val_dataloader.dataset.pipeline.1.scale': (64, 64),
    'test_dataloader.dataset.pipeline.1.scale': (64, 64),
}
DETECTION = {**SHORT, 'model.neck.in_channels': WIDTHS, 'train_cfg.max_epochs': 1}
# By the config of the page.
OPTIONS = {
    'my_mask-rcnn.py': {
        **DETECTION,
        'model.roi_head.bbox_head.fc_out_channels': 32,
        'model.train_cfg.rcnn.sampler.num': 16,
        'model.test_cfg.rpn.max_per_img': 10,
        'model.test_cfg.rcnn.score_thr': 0.0,
    },
    'my_cells.py': {
        **DETECTION,
        # The recipe leaves out images of less than 32 pixels, as these are.
        'train_dataloader.dataset.filter_cfg.min_size': 1,
        'train_cfg.val_interval': 1,
        'default_hooks.checkpoint.interval': 1,
        'model.test_cfg.nms_pre': 20,
        'model.test_cfg.score_thr': 0.0,
    },
    'my_upernet.py': {
        **SHORT,
        'model.decode_head.in_channels': WIDTHS,
        'model.auxiliary_head.in_channels': WIDTHS[2],
        'model.decode_head.channels': 16,
        'model.auxiliary_head.channels': 16,
        'train_dataloader.dataset.pipeline.3.crop_size': (64, 64),
        'model.data_preprocessor.size': (64, 64),
        'train_cfg.max_iters': 2,
        'train_cfg.val_interval': 2,
        'default_hooks.checkpoint.interval': 2,
    },
}
SHORTER = {
    'epoch_24': 'epoch_1',
    'iter_20000': 'iter_2',
    # What the shell makes of it.
    'best_*': 'best_coco_bbox_mAP_epoch_1',
}
NUM_TRAIN, NUM_VAL = 4, 2


def blocks(*kinds):
    """The tested blocks of the page of these kinds."""
    return [block for block in read_blocks(PAGE) if block.kind in kinds]


def commands(folder, tools):
    """Every command of the page as a list of arguments, with what makes it short."""
    for number, block in enumerate(blocks('commands', 'python')):
        text = block.text
        for long, short in SHORTER.items():
            text = text.replace(long, short)
        if block.kind == 'python':
            (folder / f'block{number}.py').write_text(text)
            yield [f'block{number}.py']
            continue
        for line in text.replace('\\\n', ' ').splitlines():
            python, tool, *arguments = shlex.split(line.replace('$TOOLS', shlex.quote(tools)))
            assert python == 'python'
            name = Path(tool).name
            if name == 'shapes.py':
                sizes = ['--num-train', NUM_TRAIN, '--num-val', NUM_VAL, '--size', 64]
                arguments += [*map(str, sizes), '--workers', '1']
            elif name in ('train.py', 'test.py'):
                options = [f'{key}={value}' for key, value in OPTIONS[arguments[0]].items()]
                arguments += ['--cfg-options', *LOADERS, *options]
            yield [tool, *arguments]


def write_foreign_data(folder):
    """What the converters of the page read."""
    boxes = [('cell', 5, 5, 20, 20), ('dot', 5, 5, 5, 9)]
    write_voc(folder / 'my_voc', a=boxes, b=boxes, c=[('dot', 2, 2, 9, 9)], d=boxes[:1])
    write_lists(folder / 'my_voc', train='abc', val='d')
    lines = '0 0.5 0.5 0.2 0.2'
    write_yolo(folder / 'my_yolo', ('images', 'labels'), dict.fromkeys('abcde', lines))
    (folder / 'my_yolo' / 'classes.txt').write_text('cell')
    for name in 'abcde':
        write_labelme(folder / 'my_labelme' / name, shape('a', 'rectangle', [[2, 2], [9, 9]]))
    objects = [dict(category_id=3, bbox=[2, 2, 9, 9])]
    write_coco(folder / 'my_coco', 'roboflow', dict(train=objects, valid=objects))
    colors = np.zeros((30, 40, 3), np.uint8)
    for split in ('train', 'val'):
        write_image(folder / f'my_maps/images/{split}/a.png')
        write_map(folder / f'my_maps/instances/{split}/a.png', np.eye(30, 40, dtype=np.uint16))
        write_image(folder / f'my_masks/{split}/a.jpg')
        write_map(folder / f'my_masks/{split}annot/a.png', 11 * np.eye(30, 40, dtype=np.uint8))
        write_image(folder / f'my_colors/images/{split}/a.jpg')
        write_map(folder / f'my_colors/masks/{split}/a.png', colors)
    (folder / 'my_colors' / 'colors.txt').write_text('128 64 128 Road\n0 0 0 void\n')


@pytest.fixture(scope='module')
def page(tmp_path_factory):
    """The folder where the whole page was run, and what it printed command by command."""
    folder = tmp_path_factory.mktemp('page')
    write_foreign_data(folder)
    shell = ''.join(block.text for block in blocks('shell'))
    tools = run(['bash', '-c', f'{shell}echo -n "$TOOLS"'], folder, environment())
    for block in blocks('file'):
        (folder / block.note.split()[1]).write_text(block.text)
    # What the page calls a Mask R-CNN trained on COCO.
    coco = Config.fromfile(ROOT / 'configs/detection/mask-rcnn_scalablevit-s_fpn_1x_coco.py')
    coco.merge_from_dict(OPTIONS['my_mask-rcnn.py'])
    init_default_scope('mmdet')
    weights = MODELS.build(coco.model).state_dict()
    torch.save(dict(state_dict=weights), folder / 'mask-rcnn_coco.pth')
    return folder, run_commands(list(commands(folder, tools)), folder)


def output(page, *parts):
    """What the first command with all these words printed."""
    return next(text for text in page[1] if all(part in text.splitlines()[0] for part in parts))


def test_the_data_are_found_sound(page):
    for config, summary in {
        'my_mask-rcnn.py': f'CocoDataset in data/my_shapes/: {NUM_TRAIN} images',
        'my_cells.py': 'CocoDataset in data/cells/: 3 images, 3 annotations, 2 categories',
        'my_upernet.py': f'BaseSegDataset in data/my_shapes: {NUM_TRAIN} images with masks',
    }.items():
        said = output(page, 'check_data.py', config)
        assert f'train_dataloader: {summary}' in said
        assert 'No errors found' in said


def test_models_train_and_draw(page):
    for name, count, measures in (
        ('my_mask-rcnn', NUM_TRAIN / 2, {'coco/bbox_mAP_50', 'coco/segm_mAP'}),
        ('my_cells', 1, {'coco/bbox_mAP_50'}),
        ('my_upernet', 2, {'mIoU'}),
    ):
        steps, validations = scalars(page[0] / 'work_dirs' / name)
        assert len(steps) == count
        assert np.isfinite([step['loss'] for step in steps]).all()
        assert measures <= validations[-1].keys()
        if name == 'my_mask-rcnn':
            # The page's warm-up of 200 iterations, towards the 1.25e-5 for two images it names.
            rates = list(1.25e-5 * np.linspace(0.001, 1, 200)[: len(steps)])
            assert [step['lr'] for step in steps] == pytest.approx(rates)
    assert len(list((page[0] / 'pictures').iterdir())) == NUM_VAL
    assert len(list((page[0] / 'pictures_of_cells').iterdir())) == 1
    assert len(list((page[0] / 'predicted_cells' / 'vis').iterdir())) == 4
    assert len(list((page[0] / 'seg_pictures').rglob('*.png'))) == NUM_VAL
    maps = [cv2.imread(str(path), -1) for path in sorted((page[0] / 'label_maps').iterdir())]
    assert [image.shape for image in maps] == [(64, 64)] * NUM_VAL
    # The files' own numbering, from 1.
    assert min(image.min() for image in maps) >= 1


def test_every_converter_and_config_of_the_page(page):
    for data in ('cells', 'from_yolo', 'from_labelme', 'from_coco', 'nuclei'):
        assert (page[0] / 'data' / data / 'annotations' / 'val.json').exists()
    for data in ('streets', 'colors'):
        assert list((page[0] / 'data' / data / 'annotations' / 'val').glob('*.png'))
    assert 'left out: box has no area (2 times)' in output(page, 'voc_to_coco.py')
    for name, task in (('my_nuclei', 'mask_head'), ('my_streets', 'decode_head')):
        assert task in Config.fromfile(page[0] / f'{name}.py').pretty_text


def test_fine_tuning_starts_from_the_detector(page):
    said = output(page, 'train.py', 'load_from=mask-rcnn_coco.pth')
    anew = [
        f'roi_head.{layer}.{part}'
        for layer in ('bbox_head.fc_cls', 'bbox_head.fc_reg', 'mask_head.conv_logits')
        for part in ('weight', 'bias')
    ]

    assert f'Layers of another number of classes are re-initialized: {", ".join(anew)}\n' in said
    given = torch.load(page[0] / 'mask-rcnn_coco.pth')['state_dict']
    tuned = read_checkpoint(str(page[0] / 'work_dirs/fine-tuned/epoch_1.pth'))['state_dict']
    assert given.keys() == tuned.keys()
    # The first steps of the warm-up are tiny.
    for key, value in tuned.items():
        if key in anew:
            assert len(value) < len(given[key])
        else:
            torch.testing.assert_close(value, given[key], rtol=0, atol=1e-5, msg=key)


def test_predictions_on_an_image(page):
    assert "dict_keys(['labels', 'scores', 'bboxes', 'masks'])" in output(page, 'block', '.py')
    assert '(64, 64)' in page[1][-1]
    assert list((page[0] / 'predicted' / 'vis').glob('*.jpg'))
    assert list((page[0] / 'predicted_maps').rglob('*.png'))


def test_load_from_refuses_what_does_not_fit(tmp_path):
    cfg = Config.fromfile(ROOT / 'tests' / 'data' / 'tiny_retinanet.py')
    cfg.work_dir, cfg.launcher, cfg.load_from = str(tmp_path), 'none', str(tmp_path / 'weights.pth')
    init_default_scope('mmdet')
    weights = MODELS.build(cfg.model).state_dict()
    backbone = {key[9:]: value for key, value in weights.items() if key.startswith('backbone.')}
    more = {
        'backbone.patch_embeds.0.proj.weight': torch.zeros(8, 3, 7, 7),
        'neck.lateral_convs.0.conv.weight': torch.zeros(16, 8, 1, 1),
        'bbox_head.new_layer.weight': torch.zeros(1),
    }
    for content, reason in [
        *(({**weights, key: value}, key) for key, value in more.items()),
        (backbone, r'belong to model\.backbone\.init_cfg'),
    ]:
        torch.save(dict(state_dict=content), cfg.load_from)
        with pytest.raises(CheckpointError, match=reason):
            cli.build_runner(cfg.copy()).load_or_resume()
