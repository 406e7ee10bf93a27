# Copyright (c) mmscalablevit contributors. All rights reserved.
"""Whole detectors in ONNX find what mmdet's test step finds, and are drawn without mmdet."""

import json
import subprocess
import sys

import pytest
import torch
from jobs import ROOT, load_tool, long
from mmengine.config import Config
from test_export import build, run_file, tool

for name in ('onnxruntime', 'onnxscript'):
    pytest.importorskip(name, reason='the extra onnx is not installed')
structures = pytest.importorskip('mmdet.structures')

# Of those that onnx-tensorrt lists as supported.
TENSORRT = """
Add And Cast Clip Concat Conv ConvTranspose Cos Div Equal Erf Exp Expand Floor Gather
GatherElements GatherND Gemm Greater GridSample InstanceNormalization LayerNormalization Less Log
MatMul Max MaxPool Min Mod Mul NonMaxSuppression NonZero Not Pad Range ReduceMax ReduceMean
ReduceMin ReduceSum Relu Reshape Resize RoiAlign ScatterElements ScatterND Shape Sigmoid Sin Slice
Softmax Split Sqrt Squeeze Sub Tile TopK Transpose Unsqueeze Where
"""
MODELS = ['mask-rcnn', 'retinanet', 'cascade-mask-rcnn', 'dino']


def tiny(name):
    """A config whose model is small, and finds much of different scores before any training."""
    source = 'tiny_mask-rcnn' if 'mask' in name else 'tiny_retinanet'
    cfg = Config.fromfile(ROOT / 'tests' / 'data' / f'{source}.py')
    cfg.model.backbone.arch.depths = [1, 1, 1, 1]
    if name == 'dino':
        return tiny_dino(cfg.model.backbone.arch)
    if name == 'retinanet':
        cfg.model.test_cfg.update(score_thr=0.05, nms_pre=100, max_per_img=40)
        return cfg
    cfg.model.test_cfg.rpn.update(nms_pre=100, max_per_img=60)
    cfg.model.test_cfg.rcnn.update(score_thr=0.05, max_per_img=40)
    if name == 'cascade-mask-rcnn':
        cfg.model.type = 'CascadeRCNN'
        cfg.model.train_cfg.rcnn = [cfg.model.train_cfg.rcnn] * 2
        head = cfg.model.roi_head
        head.update(type='CascadeRoIHead', num_stages=2, stage_loss_weights=[1, 1])
        head.bbox_head = [dict(head.bbox_head, reg_class_agnostic=True)] * 2
    return cfg


def tiny_dino(arch):
    cfg = Config.fromfile(ROOT / 'configs/detection/dino-4scale_scalablevit-s_8xb2-12e_coco.py')
    model = cfg.model
    model.update(num_queries=20, test_cfg=dict(max_per_img=20))
    model.backbone.update(arch=arch, init_cfg=None)
    model.neck.update(in_channels=arch.embed_dims[1:], out_channels=32)
    model.neck.norm_cfg.num_groups = 4
    model.positional_encoding.num_feats = 16
    model.bbox_head.update(embed_dims=32, num_classes=4)
    for coder, layers in ((model.encoder, 1), (model.decoder, 2)):
        coder.num_layers = layers
        for part in coder.layer_cfg.values():
            part.embed_dims = 32
        coder.layer_cfg.ffn_cfg.feedforward_channels = 32
    return cfg


@pytest.fixture(scope='module', params=[MODELS[0], *map(long, MODELS[1:])])
def exported(request, tmp_path_factory):
    """A model, and the file that the command line writes of it."""
    folder = tmp_path_factory.mktemp(request.param)
    cfg = tiny(request.param)
    cfg.dump(folder / 'config.py')
    model = build(cfg, vectors=False)
    torch.save(dict(state_dict=model.state_dict()), folder / 'weights.pth')
    words = ['--checkpoint', folder / 'weights.pth', '--out', folder / 'model.onnx']
    words += ['--check-sizes', '1x64x64', '--repeat', '1']
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, 'argv', ['export_onnx.py', *map(str, (folder / 'config.py', *words))])
        tool.cli.run(tool.main)
    return model, folder / 'model.onnx'


def compare(model, run, size):
    """Compare what ``run`` finds in a normalized image with what mmdet's test step finds."""
    torch.manual_seed(1)
    image = torch.randint(0, 256, (3, *size), dtype=torch.uint8)
    metainfo = dict(img_shape=size, ori_shape=size, scale_factor=(1, 1))
    sample = structures.DetDataSample(metainfo=metainfo)
    with torch.no_grad():
        wanted = model.test_step(dict(inputs=[image], data_samples=[sample]))[0].pred_instances
        dets, labels, *masks = (output[0] for output in run(image.flip(0)[None]))
    assert len(dets) == len(wanted) > 5
    assert len(set(labels.tolist())) > 1
    close = structures.bbox.bbox_overlaps(wanted.bboxes, dets[:, :4]) > 0.999
    close &= wanted.labels[:, None] == labels
    close &= (wanted.scores[:, None] - dets[:, 4]).abs() < 1e-3
    assert close.any(0).all()
    assert close.any(1).all()
    assert bool(masks) == ('masks' in wanted)
    if masks:
        paste = load_tool('demo/onnx_demo.py').paste
        partners = close.float().argmax(1).tolist()
        for mask, i in zip(wanted.masks.numpy(), partners, strict=True):
            pasted = paste(masks[0][i].numpy(), dets[i].tolist(), size)
            assert (mask == pasted).mean() > 0.98


@pytest.mark.parametrize('name', MODELS)
def test_the_program_finds_what_the_test_step_finds(name):
    model = build(tiny(name), vectors=False)
    wrapped = tool.wrap(model, 'model', 'onnx')
    compare(model, tool.Normalized(wrapped, model.data_preprocessor), (97, 131))


@pytest.mark.parametrize('size', [(97, 131), (128, 192), (200, 75)])
def test_boxes_and_masks_are_those_of_the_test_step(exported, size):
    model, path = exported
    session, run = run_file(path)
    names = ['dets', 'labels', 'masks'] if model.with_mask else ['dets', 'labels']
    assert [x.name for x in session.get_outputs()] == names
    meta = session.get_modelmeta().custom_metadata_map
    assert meta['channels'] == 'RGB'
    mean, std = (torch.tensor(json.loads(meta[key]))[:, None, None] for key in ('mean', 'std'))
    compare(model, lambda image: run((image - mean) / std), size)


def test_operators_are_known_to_tensorrt(exported):
    graph = pytest.importorskip('onnx').load(exported[1]).graph
    assert {node.op_type for node in graph.node} <= set(TENSORRT.split())
    assert {node.domain for node in graph.node} == {''}


def test_demo_draws_without_torch(exported, tmp_path):
    _, path = exported
    cv2 = pytest.importorskip('cv2')
    image = torch.randint(0, 256, (50, 80, 3), dtype=torch.uint8).numpy()
    cv2.imwrite(str(tmp_path / 'image.png'), image)
    code = (
        'import runpy, sys; sys.argv = sys.argv[1:];'
        "runpy.run_path(sys.argv[0], run_name='__main__');"
        "sys.exit(bool({'torch', 'mmcv', 'mmengine', 'mmdet', 'mmscalablevit'} & set(sys.modules)))"
    )
    words = ['demo/onnx_demo.py', tmp_path / 'image.png', path, '--out', tmp_path / 'out.png']
    command = [sys.executable, '-c', code, *words, '--score-thr', '0']
    subprocess.run(command, cwd=ROOT, check=True)
    drawn = cv2.imread(str(tmp_path / 'out.png'))
    assert drawn.shape == image.shape
    assert (drawn != image).any()
