# Copyright (c) mmscalablevit contributors. All rights reserved.
"""Whole detectors in ONNX find what mmdet's test step finds, and are drawn without mmdet."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from jobs import load_tool
from mmengine.config import Config

onnxruntime = pytest.importorskip('onnxruntime', reason='the extra onnx is not installed')
pytest.importorskip('onnxscript', reason='the extra onnx is not installed')
structures = pytest.importorskip('mmdet.structures')

ROOT = Path(__file__).parents[1]
# Of those that onnx-tensorrt lists as supported.
TENSORRT = """
Add And Cast Clip Concat Conv ConvTranspose Div Equal Erf Exp Expand Floor Gather GatherElements
GatherND Gemm Greater LayerNormalization Less Log MatMul Max MaxPool Min Mod Mul NonMaxSuppression
NonZero Pad Range ReduceMax ReduceMean ReduceMin Relu Reshape Resize RoiAlign ScatterElements Shape
Sigmoid Slice Softmax Split Sqrt Squeeze Sub Tile TopK Transpose Unsqueeze Where
"""


def tiny(name):
    """A config whose model is small, and finds much of different scores before any training."""
    source = 'tiny_retinanet' if name == 'retinanet' else 'tiny_mask-rcnn'
    cfg = Config.fromfile(ROOT / 'tests' / 'data' / f'{source}.py')
    cfg.model.backbone.arch.depths = [1, 1, 1, 1]
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


@pytest.fixture(
    scope='module',
    params=['retinanet', 'mask-rcnn', pytest.param('cascade-mask-rcnn', marks=pytest.mark.long)],
)
def exported(request, tmp_path_factory):
    """A model, and the file that the command line writes of it."""
    folder = tmp_path_factory.mktemp(request.param)
    cfg = tiny(request.param)
    cfg.dump(folder / 'config.py')
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / 'tools' / 'deployment')
        tool = load_tool('tools/deployment/export_onnx.py')
        model = tool.build_model(cfg, None)
        torch.manual_seed(0)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.1)
        torch.save(dict(state_dict=model.state_dict()), folder / 'weights.pth')
        words = ['--checkpoint', folder / 'weights.pth', '--out', folder / 'model.onnx']
        words += ['--check-sizes', '1x64x64', '--repeat', '1']
        patch.setattr(sys, 'argv', ['export_onnx.py', *map(str, (folder / 'config.py', *words))])
        tool.cli.run(tool.main)
    return model, folder / 'model.onnx'


@pytest.mark.parametrize('size', [(97, 131), (128, 192), (200, 75)])
def test_boxes_and_masks_are_those_of_the_test_step(exported, size):
    model, path = exported
    session = onnxruntime.InferenceSession(path, providers=['CPUExecutionProvider'])
    meta = session.get_modelmeta().custom_metadata_map
    torch.manual_seed(1)
    image = torch.randint(0, 256, (3, *size), dtype=torch.uint8)
    metainfo = dict(img_shape=size, ori_shape=size, scale_factor=(1, 1))
    sample = structures.DetDataSample(metainfo=metainfo)
    with torch.no_grad():
        wanted = model.test_step(dict(inputs=[image], data_samples=[sample]))[0].pred_instances
    assert meta['channels'] == 'RGB'
    mean, std = (torch.tensor(json.loads(meta[key]))[:, None, None] for key in ('mean', 'std'))
    images = ((image.flip(0) - mean) / std)[None]
    outputs = dict(
        zip(
            [output.name for output in session.get_outputs()],
            (torch.from_numpy(x)[0] for x in session.run(None, {'images': images.numpy()})),
            strict=True,
        )
    )

    dets, labels = outputs['dets'], outputs['labels']
    assert len(dets) == len(wanted) > 5
    assert len(set(labels.tolist())) > 1
    close = structures.bbox.bbox_overlaps(wanted.bboxes, dets[:, :4]) > 0.999
    close &= wanted.labels[:, None] == labels
    close &= (wanted.scores[:, None] - dets[:, 4]).abs() < 1e-3
    assert close.any(0).all()
    assert close.any(1).all()
    if 'masks' not in wanted:
        assert set(outputs) == {'dets', 'labels'}
        return
    paste = load_tool('demo/onnx_demo.py').paste
    masks = outputs['masks'].numpy()
    partners = close.float().argmax(1).tolist()
    for mask, i in zip(wanted.masks.numpy(), partners, strict=True):
        assert (mask == paste(masks[i], dets[i].tolist(), size)).mean() > 0.98


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
    subprocess.run(
        [sys.executable, '-c', code, *map(str, words), '--score-thr', '0.1'], cwd=ROOT, check=True
    )
    drawn = cv2.imread(str(tmp_path / 'out.png'))
    assert drawn.shape == image.shape
    assert (drawn != image).any()
