# Copyright (c) mmscalablevit contributors. All rights reserved.
"""Export: a file of one size serves others, states its input, and models that cannot say why."""

import json
import re

import pytest
import torch
from jobs import ROOT, load_tool
from torch import nn

DATA = ROOT / 'tests' / 'data'
TOOL = 'tools/deployment/export_onnx.py'
tool = load_tool(TOOL)


def build(cfg, vectors=True):
    """The model of a config with random weights, those of biases and norms where asked for."""
    model = tool.build_model(cfg, None)
    torch.manual_seed(0)
    for parameter in model.parameters():
        if vectors or parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.1)
    return model


def run_file(path):
    """What a file in ONNX says of itself, and a function that computes its outputs."""
    onnxruntime = pytest.importorskip('onnxruntime', reason='the extra onnx is not installed')
    session = onnxruntime.InferenceSession(path, providers=['CPUExecutionProvider'])

    def run(images):
        return map(torch.from_numpy, session.run(None, {'images': images.numpy()}))

    return session, run


@pytest.mark.parametrize(('size', 'number'), [(9, 6), (4, 6), (7, 1), (13, 3)])
def test_pooling_by_products_is_adaptive_pooling(size, number):
    x = torch.randn(2, 3, size, 11)
    pool = nn.AdaptiveAvgPool2d((number, 2))
    torch.testing.assert_close(tool.pool_any_map(pool, x), pool(x))


@pytest.mark.parametrize(('width', 'value_width'), [(8, 8), (10, 8), (8, 10)])
def test_attention_by_products_is_fused_attention(width, value_width):
    shapes = (9, width), (5, width), (5, value_width)
    query, key, value = (torch.randn(2, n, 2 * d) for n, d in shapes)
    got = tool.attend_by_products(query, key, value, 2, 0.3)
    torch.testing.assert_close(got, tool.attention.fused_attention(query, key, value, 2, 0.3))


def test_torch_export_of_maps_at_other_sizes():
    pytest.importorskip('mmdet')
    cfg = tool.Config.fromfile(DATA / 'tiny_retinanet.py')
    ratios = [1.25, 1.25, 1.5, 1]
    cfg.model.backbone.arch.update(depths=[2, 1, 1, 1], c_ratios=ratios, ssa_kv='separate')
    model = build(cfg)
    wrapped = tool.wrap(model, 'maps', 'torch-export')
    assert wrapped.output_names == [f'{k}{i}' for k in ('scores', 'boxes') for i in range(5)]
    # Neither one of the traced sizes nor of one batch; windows that fit, and that do not.
    program = tool.trace(wrapped).module()
    with torch.no_grad():
        for shape in ((1, 3, 64, 70), (2, 3, 224, 224), (4, 3, 201, 77)):
            images = torch.randn(shape)
            scores, boxes = model(images, mode='tensor')
            for got, wanted in zip(program(images), (*scores, *boxes), strict=True):
                torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)
        with pytest.raises(Exception, match=r'64'):
            program(torch.randn(1, 3, 63, 64))


@pytest.fixture
def export(call, tmp_path):
    """Write a model's weights, and by the command line its file in ONNX."""
    for name in ('onnxruntime', 'onnxscript'):
        pytest.importorskip(name, reason='the extra onnx is not installed')

    def export(model, config, *words):
        torch.save(dict(state_dict=model.state_dict()), tmp_path / 'weights.pth')
        options = ['--checkpoint', 'weights.pth', '--out', 'model.onnx', '--repeat', 1, *words]
        code, said = call(TOOL, config, *options)
        assert code == 0, said
        return said, *run_file(tmp_path / 'model.onnx')

    return export


def test_onnx_of_a_segmentor_with_its_checkpoint(export):
    pytest.importorskip('mmseg')
    cfg = tool.Config.fromfile(DATA / 'tiny_upernet.py')
    cfg.model.backbone.arch.depths = [1, 1, 1, 1]
    model = build(cfg)
    words = ['--check-sizes', '1x64x64', '--normalize']
    words += ['--cfg-options', 'model.backbone.arch.depths=[1,1,1,1]']
    said, session, run = export(model, DATA / 'tiny_upernet.py', *words)
    assert '| 1 x 64 x 64 |' in said
    metadata = session.get_modelmeta().custom_metadata_map
    # Nothing is left to normalize, but OpenCV's channels are to be reversed.
    assert [json.loads(metadata[key]) for key in ('mean', 'std')] == [[0] * 3, [1] * 3]
    assert metadata['channels'] == 'RGB'
    for batch, height, width in ((2, 75, 110), (1, 112, 112), (1, 64, 150)):
        images = torch.randint(256, (batch, 3, height, width))
        logits, labels = run(images.flip(1).float())
        with torch.no_grad():
            inputs = model.data_preprocessor(dict(inputs=list(images)))['inputs']
            wanted = model.whole_inference(inputs, [dict(img_shape=(height, width))])
        torch.testing.assert_close(logits, wanted, atol=1e-4, rtol=1e-4)
        assert (labels == wanted.argmax(1)).float().mean() > 0.999


@pytest.fixture
def mask2former():
    """A small one as its config, and built."""
    pytest.importorskip('mmdet')
    pytest.importorskip('mmseg')
    path = ROOT / 'configs/segmentation/scalablevit-s_mask2former_8xb2-160k_ade20k-512x512.py'
    cfg = tool.Config.fromfile(path)
    cfg.model.backbone.arch = tool.Config.fromfile(DATA / 'tiny_upernet.py').model.backbone.arch
    cfg.model.backbone.arch.depths = [1, 1, 1, 1]
    head = cfg.model.decode_head
    head.in_channels = cfg.model.backbone.arch.embed_dims
    head.pixel_decoder.encoder.num_layers = head.transformer_decoder.num_layers = 2
    cfg.pop('test_dataloader')
    torch.manual_seed(0)
    return cfg, tool.build_model(cfg, None)


def check_mask2former(model, run):
    """Compare labels and logits at other sizes than traced with those of mmseg's test step."""
    from mmseg.structures import SegDataSample

    for size in ((64, 70), (96, 160), (201, 77)):
        image = torch.randint(256, (3, *size), dtype=torch.uint8)
        sample = SegDataSample(metainfo=dict(img_shape=size, ori_shape=size))
        with torch.no_grad():
            wanted = model.test_step(dict(inputs=[image], data_samples=[sample]))[0]
            mean, std = model.data_preprocessor.mean, model.data_preprocessor.std
            logits, labels = run(((image.flip(0) - mean) / std)[None])
        torch.testing.assert_close(logits[0], wanted.seg_logits.data, atol=1e-4, rtol=1e-4)
        assert (labels == wanted.pred_sem_seg.data).float().mean() > 0.999


def test_mask2former_computes_what_the_test_step_does(mask2former):
    _, model = mask2former
    check_mask2former(model, tool.wrap(model, 'model', 'onnx'))


@pytest.mark.long
def test_onnx_of_mask2former(export, mask2former, tmp_path):
    cfg, model = mask2former
    cfg.dump(tmp_path / 'config.py')
    check_mask2former(model, export(model, 'config.py')[2])


@pytest.mark.parametrize(
    ('config', 'words', 'said'),
    [
        (
            'detection/dino-4scale_scalablevit-s_8xb2-12e_coco',
            ['--part', 'maps'],
            'maps of DINO cannot be exported .*MultiScaleDeformable',
        ),
        (
            'demo/mask-rcnn_scalablevit-demo_fpn_shapes',
            [],
            'soft_nms.* cannot be exported: .* model.test_cfg.rcnn.nms._delete_=True ',
        ),
        (
            'detection/retinanet_scalablevit-s_fpn_1x_coco',
            ['--check-sizes', '2x64x64'],
            'one image',
        ),
    ],
)
def test_what_cannot_be_exported_says_why(call, config, words, said):
    pytest.importorskip('mmdet')
    ended, _ = call(TOOL, ROOT / 'configs' / f'{config}.py', '--out', 'x.onnx', *words)
    assert re.search(said, str(ended))


@pytest.mark.parametrize(
    ('words', 'said'),
    [
        (['--out', 'x.pt2'], '--out must end in .onnx'),
        (['--out', 'x.onnx', '--opset', '11'], 'at least 18'),
        (['--out', 'x.onnx', '--check-sizes', '64x64'], 'BxHxW'),
        (['--out', 'x.onnx', '--check-sizes', '1x63x64'], '64 to 8192'),
        (['--out', 'x.pt2', '--format', 'torch-export'], 'boxes are for --format onnx'),
        (['--out', 'x.onnx', '--static', '64'], '--static must be BxHxW'),
        (
            ['--out', 'x.onnx', '--static', '2x64x64', '--check-sizes', '1x64x64'],
            '--check-sizes must be that of --static, 2x64x64',
        ),
    ],
)
def test_wrong_arguments(call, words, said):
    assert said in str(call(TOOL, DATA / 'tiny_retinanet.py', *words)[0])


def test_a_difference_is_not_let_through():
    wanted = (torch.zeros(2, 3), torch.zeros(1000, dtype=torch.long))
    near = [wanted[0] + 5e-5, wanted[1]]
    assert tool.largest_difference(wanted, near) == pytest.approx(5e-5)
    for other in (wanted[0] + 2e-4, wanted[0] * float('nan'), torch.zeros(3, 2)):
        with pytest.raises(tool.cli.UserError, match='output 0'):
            tool.largest_difference(wanted, [other, wanted[1]])
    labels = wanted[1].clone()
    labels[:2] = 1
    with pytest.raises(tool.cli.UserError, match=r'99\.80%'):
        tool.largest_difference(wanted, [wanted[0], labels])
