# Copyright (c) mmscalablevit contributors. All rights reserved.
"""Prediction on images and videos: the page on it, run as it stands, and the demo's errors."""

import json
import shlex
from functools import partial
from pathlib import Path

import cv2
import mmcv
import numpy as np
import pytest
import torch
from doc_blocks import ROOT, read_blocks, run_commands
from jobs import write_image
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

PAGE = ROOT / 'docs' / 'inference.md'
SHAPES = ('circle', 'square', 'triangle', 'star')
PALETTE = [(90, 90, 90), (230, 80, 70), (70, 150, 240), (250, 200, 60), (120, 210, 110)]
# Height and width of the photos by name.
SIZES = {'harbor.jpg': (60, 90), 'street.jpg': (72, 64)}
NUM_FRAMES, FPS = 3, 10
TINY = ROOT / 'tests' / 'data' / 'tiny_mask-rcnn.py'
ARCH = Config.fromfile(TINY).model.backbone.arch.to_dict() | dict(ssa_kv='separate')
CLASSIFIER = f"""
_base_ = '{ROOT}/configs/classification/scalablevit-s_8xb128_in1k.py'
model = dict(
    backbone=dict(arch=dict(_delete_=True, **{ARCH})),
    head=dict(in_channels={ARCH['embed_dims'][-1]}, num_classes=6, hidden_channels=None),
    train_cfg=None,
)
"""
MODELS_OF_PAGE = {
    'mask-rcnn': ('tiny_mask-rcnn.py', dict(classes=SHAPES, palette=PALETTE[1:])),
    'upernet': ('tiny_upernet.py', dict(classes=('background', *SHAPES), palette=PALETTE)),
    'classifier': (None, dict(classes=[f'kind {i}' for i in range(6)])),
}


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """Photos, a video, and the models of the page."""
    folder = tmp_path_factory.mktemp('demo')
    (folder / 'demo').symlink_to(ROOT / 'demo')
    rng = np.random.default_rng(0)

    def draw(path, height, width):
        image = cv2.resize(rng.integers(0, 255, (6, 8, 3), np.uint8), (width, height))
        mmcv.imwrite(image, str(path))

    for name, size in SIZES.items():
        draw(folder / 'photos' / name, *size)
    for i in range(NUM_FRAMES):
        draw(folder / 'frames' / f'{i:06d}.jpg', 64, 96)
    mmcv.frames2video(str(folder / 'frames'), str(folder / 'clip.mp4'), FPS, 'mp4v')
    for name, (base, meta) in MODELS_OF_PAGE.items():
        text = f"_base_ = '{ROOT}/tests/data/{base}'\n" if base else CLASSIFIER
        config = folder / f'my_{name}.py'
        config.write_text(text)
        cfg = Config.fromfile(config)
        init_default_scope(cfg.default_scope)
        torch.manual_seed(0)
        model = MODELS.build(cfg.model)
        if name == 'mask-rcnn':
            # Scores above the page's threshold.
            torch.nn.init.normal_(model.roi_head.bbox_head.fc_cls.weight, std=1)
        content = dict(state_dict=model.state_dict(), meta=dict(dataset_meta=meta))
        torch.save(content, folder / f'{name}.pth')
    return folder


@pytest.fixture(scope='module')
def page(folder):
    """The folder after every block of the page, and what each command printed."""
    commands = []
    for number, block in enumerate(read_blocks(PAGE)):
        if block.kind == 'commands':
            commands += [shlex.split(line)[1:] for line in block.text.splitlines()]
        elif block.kind == 'python':
            (folder / f'block{number}.py').write_text(block.text)
            commands.append([f'block{number}.py'])
    assert len(commands) == 7
    return folder, run_commands(commands, folder)


def test_detections_are_those_of_the_toolbox(page):
    from mmdet.apis import inference_detector, init_detector

    folder, _ = page
    model = init_detector(
        str(folder / 'my_mask-rcnn.py'), str(folder / 'mask-rcnn.pth'), device='cpu'
    )
    coco = COCO(str(folder / 'detected' / 'predictions.json'))

    assert [coco.cats[i]['name'] for i in sorted(coco.cats)] == list(SHAPES)
    images = {image['file_name']: image for image in coco.loadImgs(coco.getImgIds())}
    assert images.keys() == SIZES.keys()
    for name, (height, width) in SIZES.items():
        assert (images[name]['height'], images[name]['width']) == (height, width)
        found = coco.loadAnns(coco.getAnnIds([images[name]['id']]))
        expected = inference_detector(model, str(folder / 'photos' / name)).pred_instances
        expected = expected[expected.scores >= 0.4]
        assert len(found) == len(expected) > 0
        boxes = torch.tensor([entry['bbox'] for entry in found])
        boxes[:, 2:] += boxes[:, :2]
        torch.testing.assert_close(boxes, expected.bboxes)
        assert [entry['category_id'] for entry in found] == (expected.labels + 1).tolist()
        assert [entry['score'] for entry in found] == pytest.approx(expected.scores.tolist())
        masks = [coco_mask.decode(entry['segmentation']) for entry in found]
        assert np.array_equal(masks, expected.masks)


def test_label_maps_are_those_of_the_toolbox(page):
    from mmseg.apis import inference_model, init_model

    folder, _ = page
    model = init_model(str(folder / 'my_upernet.py'), str(folder / 'upernet.pth'), device='cpu')
    # mmseg's function takes another pipeline than tests and inferencers.
    model.cfg.test_pipeline = model.cfg.test_dataloader.dataset.pipeline
    for name, size in SIZES.items():
        label_map = cv2.imread(str(folder / f'segmented/label_maps/{Path(name).stem}.png'), -1)
        expected = inference_model(model, str(folder / 'photos' / name)).pred_sem_seg.data[0]
        assert label_map.shape == size
        assert np.array_equal(label_map, expected.numpy())
    classes = json.loads((folder / 'segmented' / 'classes.json').read_text())
    assert [entry['name'] for entry in classes] == ['background', *SHAPES]
    assert [entry['label'] for entry in classes] == [0, 1, 2, 3, 4]


def test_pictures_have_the_colors_of_the_classes(page):
    folder, _ = page
    photo = cv2.imread(str(folder / 'photos' / 'harbor.jpg')).astype(float)
    picture = cv2.imread(str(folder / 'segmented' / 'vis' / 'harbor.jpg')).astype(float)
    labels = cv2.imread(str(folder / 'segmented' / 'label_maps' / 'harbor.png'), -1)
    assert picture.shape == photo.shape

    # Median, for names are written over some of the pixels.
    for label in np.unique(labels):
        if (labels == label).mean() < 0.2:
            continue
        blended = 0.4 * photo + 0.6 * np.array(PALETTE[label][::-1])
        difference = np.median(np.abs(picture - blended)[labels == label], axis=0)
        assert (difference < 12).all(), (label, difference)
    for out in ('detected', 'classified'):
        for name, size in SIZES.items():
            drawn = cv2.imread(str(folder / out / 'vis' / name))
            assert drawn.shape[:2] == size
            assert not np.array_equal(drawn, cv2.imread(str(folder / 'photos' / name)))


def test_video_becomes_a_video(page):
    video = mmcv.VideoReader(str(page[0] / 'segmented_video' / 'vis' / 'clip.mp4'))
    label_maps = sorted((page[0] / 'segmented_video' / 'label_maps' / 'clip').iterdir())

    assert [picture.shape for picture in video] == [(64, 96, 3)] * NUM_FRAMES
    assert video.fps == FPS
    assert [path.name for path in label_maps] == [f'{i:06d}.png' for i in range(NUM_FRAMES)]


def test_classes_are_ranked(page):
    predictions = json.loads((page[0] / 'classified' / 'predictions.json').read_text())

    assert [entry['file_name'] for entry in predictions] == sorted(SIZES)
    for entry in predictions:
        scores = [found['score'] for found in entry['classes']]
        assert len(scores) == 5
        assert scores == sorted(scores, reverse=True)
        assert all(found['name'] == f'kind {found["label"]}' for found in entry['classes'])


def test_inferencers_of_the_page_agree_with_the_demo(page):
    folder, printed = page
    detector, segmentor, classifier = printed[4:]

    assert "dict_keys(['labels', 'scores', 'bboxes', 'masks'])" in detector
    assert (folder / 'inferred/detection/vis/street.jpg').is_file()
    assert '(72, 64)' in segmentor
    (label_map,) = (folder / 'inferred/segmentation/pred').iterdir()
    demo = cv2.imread(str(folder / 'segmented/label_maps/street.png'), -1)
    assert np.array_equal(cv2.imread(str(label_map), -1), demo)
    predictions = json.loads((folder / 'classified' / 'predictions.json').read_text())
    best = predictions[sorted(SIZES).index('street.jpg')]['classes'][0]
    assert f'{best["name"]} {best["score"]:.3f}' in classifier


@pytest.fixture
def demo(call, folder, tmp_path, monkeypatch):
    """Calls the demo; returns its exit code or message, and what it printed."""
    monkeypatch.chdir(folder)
    return partial(call, 'demo/image_demo.py', '--out-dir', tmp_path / 'out')


UPERNET = ('my_upernet.py', 'upernet.pth', '--device', 'cpu')
DETECTOR = ('my_mask-rcnn.py', 'mask-rcnn.pth', '--device', 'cpu')


def test_batches_change_nothing(demo, tmp_path):
    maps = []
    for batch_size in (1, 2):
        assert demo('clip.mp4', *UPERNET, '--batch-size', batch_size)[0] == 0
        files = sorted((tmp_path / 'out' / 'label_maps' / 'clip').iterdir())
        maps.append([cv2.imread(str(file), -1) for file in files])

    assert len(maps[1]) == NUM_FRAMES
    for one, two in zip(*maps, strict=True):
        # Sums of another order may decide a tie otherwise.
        assert (one == two).mean() > 0.99


def test_no_detection_is_no_error(demo, folder, tmp_path):
    # Names come from the data set where the checkpoint has none.
    weights = torch.load(folder / 'mask-rcnn.pth')['state_dict']
    torch.save(dict(state_dict=weights), tmp_path / 'bare.pth')
    code, said = demo('photos', DETECTOR[0], tmp_path / 'bare.pth', '--score-thr', '1')

    assert code == 0
    assert 'taking those of the test data set of my_mask-rcnn.py' in said
    found = json.loads((tmp_path / 'out' / 'predictions.json').read_text())
    assert [entry['name'] for entry in found['categories']] == list(SHAPES)
    assert len(found['images']) == len(SIZES)
    assert found['annotations'] == []


def test_names_of_another_number_of_classes_are_refused(demo, folder, tmp_path):
    """test_hostile_commands.py has the weights that do not fit."""
    weights = torch.load(folder / 'upernet.pth')['state_dict']
    for meta in (dict(dataset_meta=dict(classes=('a', 'b'))), dict(CLASSES=('a', 'b'))):
        torch.save(dict(state_dict=weights, meta=meta), tmp_path / 'other.pth')
        said, _ = demo('photos', 'my_upernet.py', tmp_path / 'other.pth')
        assert '2 class names for a model of 5' in said


def test_unusable_inputs_are_named(demo, tmp_path):
    (tmp_path / 'empty').mkdir()
    (tmp_path / 'notes.txt').write_text('notes')
    (tmp_path / 'broken.jpg').write_text('no picture')
    (tmp_path / 'broken.mp4').write_text('no video')

    assert 'input nowhere/*.jpg does not exist' in demo('nowhere/*.jpg', *UPERNET)[0]
    assert 'holds no image' in demo(tmp_path / 'empty', *UPERNET)[0]
    assert 'notes.txt must be one of: .avi, .bmp' in demo(tmp_path / 'notes.txt', *UPERNET)[0]
    assert 'broken.jpg' in demo(tmp_path / 'broken.jpg', *UPERNET)[0]
    assert 'cannot read video' in demo(tmp_path / 'broken.mp4', *UPERNET)[0]
    for name in ('one.jpg', 'one.png'):
        write_image(tmp_path / name)
    assert 'one.png is the label map of two inputs' in demo(tmp_path / 'one.*', *UPERNET)[0]


def test_options_that_do_not_fit_are_errors(demo, tmp_path):
    config = tmp_path / 'no_toolbox.py'
    config.write_text("default_scope = 'mmyolo'\n")

    assert 'default_scope' in demo('photos', config, 'upernet.pth')[0]
    assert '--score-thr is for detectors' in demo('photos', *UPERNET, '--score-thr', '0.5')[0]
    assert '--device nowhere:' in demo('photos', *UPERNET[:2], '--device', 'nowhere')[0]
    assert demo('photos', *UPERNET, '--batch-size', '0')[0] == 2
    assert demo('photos', *DETECTOR, '--score-thr', '2')[0] == 2
