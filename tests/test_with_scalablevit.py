# Copyright (c) mmscalablevit contributors. All rights reserved.
"""ScalableViT in configs of the toolboxes: written, built, one loss, one prediction."""

import pytest
import torch
from golden import TINY
from jobs import ROOT, load_tool
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS
from torch import nn

from mmscalablevit import ScalableViT
from mmscalablevit.errors import UserError

TOOL = 'tools/misc/with_scalablevit.py'
tool = load_tool(TOOL)
# The stages that the backbone must return, and where their widths must be.
ALGORITHMS = {
    'mmdet::rtmdet/rtmdet-ins_s_8xb32-300e_coco.py': ((1, 2, 3), 'neck.in_channels'),
    'mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py': ((0, 1, 2, 3), 'neck.in_channels'),
    'mmdet::yolo/yolov3_d53_8xb8-ms-608-273e_coco.py': ((1, 2, 3), None),
    'mmdet::detr/detr_r50_8xb2-150e_coco.py': ((3,), 'neck.in_channels'),
    'mmseg::pspnet/pspnet_r50-d8_4xb2-40k_cityscapes-512x1024.py': ((0, 1, 2, 3), None),
    'mmseg::segformer/segformer_mit-b0_8xb2-160k_ade20k-512x512.py': (
        (0, 1, 2, 3),
        'decode_head.in_channels',
    ),
    'mmpretrain::convnext/convnext-tiny_32xb128_in1k.py': ((3,), None),
}


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setattr(ScalableViT, 'arch_zoo', {**ScalableViT.arch_zoo, 'tiny': TINY})
    monkeypatch.setattr(tool, 'IMAGE_SIZE', 128)


@pytest.mark.parametrize('config', ALGORITHMS)
def test_any_algorithm_gives_a_loss_and_a_prediction(tmp_path, config):
    pytest.importorskip(config.split('::')[0])
    stages, widths_at = ALGORITHMS[config]
    out = tmp_path / 'configs' / 'my.py'
    cfg = tool.convert(config, str(out), 'tiny', 'scalablevit://small')
    backbone = cfg.model.backbone
    assert backbone.type == 'ScalableViT'
    assert tuple(backbone.out_indices) == stages
    assert backbone.init_cfg == dict(type='Pretrained', checkpoint='scalablevit://small')
    assert not {'pretrained', 'depth', 'norm_cfg', 'style'} & {*cfg.model, *backbone}
    assert not cfg.get('load_from')
    if widths_at:
        part, key = widths_at.split('.')
        assert cfg.model[part][key] == [TINY['embed_dims'][i] for i in stages]
    assert 'mmscalablevit' in cfg.custom_imports.imports
    # It inherits, and says only what differs.
    assert len(out.read_text()) < 6000

    torch.manual_seed(0)
    loss, predictions = tool.prove(cfg)
    assert loss > 0
    assert len(predictions) == 2


@pytest.mark.parametrize(
    'config',
    ['faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py', 'dino/dino-4scale_r50_8xb2-12e_coco.py'],
)
def test_norms_and_position_encodings_have_no_weight_decay(tmp_path, config):
    pytest.importorskip('mmdet')
    cfg = tool.convert(f'mmdet::{config}', str(tmp_path / 'my.py'), 'tiny', 'scalablevit://small')
    wrapper = cfg.optim_wrapper
    model = nn.Module()
    model.backbone = MODELS.build(dict(cfg.model.backbone, init_cfg=None))
    groups = build_optim_wrapper(model, wrapper).optimizer.param_groups
    decay = {id(p): g['weight_decay'] for g in groups for p in g['params']}
    rates = {g['lr'] for g in groups}
    names = dict(model.backbone.named_parameters())
    free = {n for n in names if '.norm' in n or n.startswith(('norm', 'pos_block'))}
    for name, parameter in names.items():
        assert (decay[id(parameter)] == 0) == (name in free), name
    # DINO's backbone learns at a tenth of the rate, its norms included.
    assert rates == ({1e-5} if 'dino' in config else {1e-4})
    assert wrapper.optimizer.type == 'AdamW'


def test_a_path_is_inherited_from_where_it_is(tmp_path):
    base = ROOT / 'configs' / 'segmentation' / 'swin-t_upernet_8xb2-160k_ade20k-512x512.py'
    cfg = tool.convert(str(base), str(tmp_path / 'my.py'), 'small', None)
    assert cfg.model.decode_head.in_channels == [64, 128, 256, 512]
    assert cfg.model.auxiliary_head.in_channels == 256
    assert cfg.model.backbone.init_cfg.checkpoint == 'scalablevit://small'
    assert 'qkv_bias' not in cfg.model.backbone
    assert Config.fromfile(tmp_path / 'my.py').model == cfg.model


@pytest.mark.parametrize(
    ('config', 'text'),
    [
        ('mmdet::mask_rcn/mask-rcnn_r50_fpn_1x_coco.py', 'did you mean mmdet::mask_rcnn/mask-rcnn'),
        ('timm::resnet.py', 'the toolbox must be one of mmdet, mmseg, mmpretrain'),
        ('none.py', 'config none.py does not exist'),
        ('mmdet::cornernet/cornernet_hourglass104_8xb6-210e-mstest_coco.py', 'has no stages'),
    ],
)
def test_what_cannot_be_converted_is_named(tmp_path, config, text):
    pytest.importorskip('mmdet')
    with pytest.raises(UserError, match=text):
        tool.convert(config, str(tmp_path / 'my.py'), 'tiny', None)
    assert not (tmp_path / 'my.py').exists()


def test_the_command_line_proves_it(call, monkeypatch):
    pytest.importorskip('mmpretrain')
    monkeypatch.setitem(ScalableViT.arch_zoo, 'small', TINY)
    said = call(TOOL, 'mmpretrain::resnet/resnet50_8xb32_in1k.py', '--out', 'my.py')[1]
    assert 'wrote my.py: ImageClassifier with ScalableViT small, loss' in said
