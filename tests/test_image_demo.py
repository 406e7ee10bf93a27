# Copyright (c) mmscalablevit contributors. All rights reserved.
"""Prediction on images and videos: the page on it, run as it stands, and the demo's errors."""

import json
import shlex
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from doc_blocks import ROOT, read_blocks, run_commands
from jobs import write_image
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

DEMO = ROOT / 'demo' / 'image_demo.py'
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
    (folder / 'demo').symlink_to(DEMO.parent)
    (folder / 'photos').mkdir()
    rng = np.random.default_rng(0)
    for name, (height, width) in SIZES.items():
        image = cv2.resize(rng.integers(0, 255, (6, 8, 3), np.uint8), (width, height))
        cv2.imwrite(str(folder / 'photos' / name), image)
    code = cv2.VideoWriter_fourcc(*'mp4v')
    writer = cv2.VideoWriter(str(folder / 'clip.mp4'), code, FPS, (96, 64))
    for _ in range(NUM_FRAMES):
        writer.write(cv2.resize(rng.integers(0, 255, (6, 8, 3), np.uint8), (96, 64)))
    writer.release()
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
            lines = [shlex.split(line) for line in block.text.splitlines()]
            commands += [line[1:] for line in lines]
        elif block.kind == 'python':
            script = folder / f'block{number}.py'
            script.write_text(block.text)
            commands.append([str(script)])
    assert len(commands) == 7
    return folder, run_commands(commands, folder)


def frames(path):
    video = cv2.VideoCapture(str(path))
    found = []
    while (read := video.read())[0]:
        found.append(read[1])
    return found, video.get(cv2.CAP_PROP_FPS)


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
        for annotation, box, label, score, mask in zip(
            found, expected.bboxes, expected.labels, expected.scores, expected.masks, strict=True
        ):
            x, y, w, h = annotation['bbox']
            torch.testing.assert_close(torch.tensor([x, y, x + w, y + h]), box)
            assert annotation['category_id'] == label + 1
            assert annotation['score'] == pytest.approx(score.item())
            decoded = coco_mask.decode(annotation['segmentation'])
            assert np.array_equal(decoded.astype(bool), mask.numpy())


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
    pictures, fps = frames(page[0] / 'segmented_video' / 'vis' / 'clip.mp4')
    label_maps = sorted((page[0] / 'segmented_video' / 'label_maps' / 'clip').iterdir())

    assert len(pictures) == NUM_FRAMES
    assert fps == FPS
    assert {picture.shape for picture in pictures} == {(64, 96, 3)}
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
    """Calls the demo; returns its exit code or message."""
    monkeypatch.chdir(folder)
    out = ['--out-dir', tmp_path / 'out']
    return lambda *arguments: call('demo/image_demo.py', *arguments, *out)[0]


UPERNET = ('my_upernet.py', 'upernet.pth', '--device', 'cpu')
DETECTOR = ('my_mask-rcnn.py', 'mask-rcnn.pth', '--device', 'cpu')


def test_batches_change_nothing(demo, tmp_path):
    maps = []
    for batch_size in (1, 2):
        assert demo('clip.mp4', *UPERNET, '--batch-size', batch_size) == 0
        files = sorted((tmp_path / 'out' / 'label_maps' / 'clip').iterdir())
        maps.append([cv2.imread(str(file), -1) for file in files])

    assert len(maps[1]) == NUM_FRAMES
    for one, two in zip(*maps, strict=True):
        # Sums of another order may decide a tie otherwise.
        assert (one == two).mean() > 0.99


def test_no_detection_is_no_error(demo, call, folder, tmp_path):
    # Names come from the data set where the checkpoint has none.
    weights = torch.load(folder / 'mask-rcnn.pth')['state_dict']
    torch.save(dict(state_dict=weights), tmp_path / 'bare.pth')
    command = ['photos', DETECTOR[0], tmp_path / 'bare.pth', '--score-thr', '1']
    code, said = call('demo/image_demo.py', *command, '--out-dir', tmp_path / 'out')

    assert code == 0
    assert 'taking those of the test data set of my_mask-rcnn.py' in said
    found = json.loads((tmp_path / 'out' / 'predictions.json').read_text())
    assert [entry['name'] for entry in found['categories']] == list(SHAPES)
    assert len(found['images']) == len(SIZES)
    assert found['annotations'] == []


def test_checkpoints_that_do_not_fit_are_refused(demo, folder, tmp_path):
    weights = torch.load(folder / 'upernet.pth')['state_dict']

    def said(weights, **meta):
        torch.save(dict(state_dict=weights, meta=meta), tmp_path / 'other.pth')
        return demo('photos', 'my_upernet.py', tmp_path / 'other.pth')

    names = dict(dataset_meta=dict(classes=('a', 'b')))
    assert '2 class names for a model of 5' in said(weights, **names)
    assert '3 class names for a model of 5' in said(weights, CLASSES=('a', 'b', 'c'))
    del weights['decode_head.conv_seg.bias']
    assert 'does not fit the model of my_upernet.py' in said(weights)
    assert 'decode_head.conv_seg.bias' in said(weights)
    assert 'does not fit' in demo('photos', 'my_upernet.py', 'mask-rcnn.pth')
    assert 'notes.txt does not exist' in demo('photos', 'my_upernet.py', 'notes.txt')


def test_unusable_inputs_are_named(demo, tmp_path):
    (tmp_path / 'empty').mkdir()
    (tmp_path / 'notes.txt').write_text('notes')
    (tmp_path / 'broken.jpg').write_text('no picture')
    (tmp_path / 'broken.mp4').write_text('no video')

    assert 'input nowhere.jpg does not exist' in demo('nowhere.jpg', *UPERNET)
    assert 'input nowhere/*.jpg does not exist' in demo('nowhere/*.jpg', *UPERNET)
    assert 'holds no image' in demo(tmp_path / 'empty', *UPERNET)
    assert 'notes.txt must be one of: .avi, .bmp' in demo(tmp_path / 'notes.txt', *UPERNET)
    assert 'broken.jpg' in demo(tmp_path / 'broken.jpg', *UPERNET)
    assert 'cannot read video' in demo(tmp_path / 'broken.mp4', *UPERNET)
    for name in ('one.jpg', 'one.png'):
        write_image(tmp_path / name)
    assert 'one.png is the label map of two inputs' in demo(tmp_path / 'one.*', *UPERNET)


def test_options_that_do_not_fit_are_errors(demo, tmp_path):
    config = tmp_path / 'no_toolbox.py'
    config.write_text("default_scope = 'mmyolo'\n")

    assert 'default_scope' in demo('photos', config, 'upernet.pth')
    assert '--score-thr is for detectors' in demo('photos', *UPERNET, '--score-thr', '0.5')
    assert '--device nowhere:' in demo('photos', *UPERNET[:2], '--device', 'nowhere')
    assert demo('photos', *UPERNET, '--batch-size', '0') == 2
    assert demo('photos', *DETECTOR, '--score-thr', '2') == 2
