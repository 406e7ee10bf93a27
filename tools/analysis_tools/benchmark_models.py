# Copyright (c) mmscalablevit contributors. All rights reserved.
"""The models that benchmark.py and roofline.py compare, by their names."""

import importlib.util
from pathlib import Path

import torch
import torch.nn.functional as F
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from torch import Tensor, nn

from mmscalablevit import ScalableViT, cli

ROOT = Path(__file__).parents[2]
OURS = ('small', 'base', 'large', 'small-merged')
PEERS = {
    'pvtv2-b2': dict(
        type='mmdet.PyramidVisionTransformerV2', embed_dims=64, num_layers=[3, 4, 6, 3]
    ),
    'convnext-t': dict(
        type='mmpretrain.ConvNeXt',
        arch='tiny',
        out_indices=[0, 1, 2, 3],
        gap_before_final_norm=False,
    ),
    'resnet-50': dict(type='mmdet.ResNet', depth=50),
}
# The class of mmdet or mmseg, from the configs of the comparison.
BASES = {'swin-t': 'mmdet', 'twins-svt-s': 'mmseg'}
MODELS_HELP = (
    f'of {", ".join([*OURS, "plain", *BASES, *PEERS])}, or configs (*.py) of whole detectors and '
    'segmentors; with :compiled for torch.compile, :cp for gradient checkpointing, :flash, '
    ':efficient or :cudnn for that fused attention of CUDA, :fused for a fused one in swin-t'
)


class Plain(ScalableViT):
    """The plain transcription of the formulas, with the weights of the backbone of an arch."""

    def __init__(self, arch: str) -> None:
        super().__init__(arch)
        path = ROOT / 'tests' / 'plain.py'
        if not path.exists():
            raise cli.UserError(f"the model 'plain' is {path}, which only a clone has")
        spec = importlib.util.spec_from_file_location('plain', path)
        self.plain = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(self.plain)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Compute the four maps."""
        parameters = dict(self.named_parameters())
        return self.plain.plain_forward(parameters, self.arch_settings, images)


class Whole(nn.Module):
    """A detector or segmentor of a config, on made-up images and annotations."""

    def __init__(self, path: str) -> None:
        super().__init__()
        cfg = Config.fromfile(path)
        init_default_scope(cfg.default_scope)
        # Times do not depend on the weights, which are not everywhere.
        cfg.model.backbone.init_cfg = None
        self.model = MODELS.build(cfg.model)
        self.is_detector = cfg.default_scope == 'mmdet'
        self.init_weights = self.model.init_weights

    def inputs(self, images: Tensor) -> dict:
        """Images with as many made-up annotations as usual."""
        batch, _, height, width = images.shape
        # What the data preprocessor would add.
        shapes = dict.fromkeys(('img_shape', 'ori_shape', 'pad_shape'), (height, width))
        if self.is_detector:
            from mmdet.testing import demo_mm_inputs

            sizes = dict(image_shapes=(3, height, width), num_items=[8] * batch)
            samples = demo_mm_inputs(batch, **sizes, with_mask=True, device='cpu')['data_samples']
            shapes = dict(shapes, batch_input_shape=(height, width))
        else:
            from mmengine.structures import PixelData
            from mmseg.structures import SegDataSample

            labels = PixelData(data=torch.zeros(1, height, width, dtype=torch.long))
            samples = [SegDataSample(gt_sem_seg=labels) for _ in range(batch)]
        samples = [sample.to(images.device) for sample in samples]
        for sample in samples:
            sample.set_metainfo(shapes)
        return dict(inputs=images, data_samples=samples)

    def forward(self, images: Tensor) -> object:
        """Predict, or compute the losses while training."""
        data = self.inputs(images)
        if not self.training:
            return self.model(**data, mode='predict')
        return self.model.parse_losses(self.model(**data, mode='loss'))[0]


class FusedWindows(nn.Module):
    """The window attention of mmdet's Swin, by fused attention."""

    def __init__(self, windows: nn.Module) -> None:
        super().__init__()
        self.windows = windows

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attend inside windows (B, N, C), with masks (M, N, N) of M windows that repeat."""
        heads, length = self.windows.num_heads, x.shape[1]
        qkv = self.windows.qkv(x).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        index = self.windows.relative_position_index
        bias = self.windows.relative_position_bias_table[index].permute(2, 0, 1)
        if mask is not None:
            # The masked windows of an image are further heads: fused kernels take four dimensions.
            bias = (mask.unsqueeze(1) + bias).flatten(0, 1)
            qkv = qkv.reshape(3, -1, len(bias), length, qkv.shape[-1])
        bias = bias.to(qkv.dtype).expand(qkv.shape[1], -1, -1, -1)
        out = F.scaled_dot_product_attention(*qkv, attn_mask=bias)
        out = out.reshape(len(x), heads, length, -1).transpose(1, 2).flatten(2)
        return self.windows.proj(out)


def build(name: str) -> nn.Module:
    """Build a model by its name, without compilation."""
    base = name.split(':')[0]
    with_cp = ':cp' in name
    torch.manual_seed(0)
    if base.endswith('.py'):
        if not Path(base).exists():
            raise cli.UserError(f'config {base} does not exist')
        model = Whole(base)
    elif base == 'plain':
        model = Plain('small')
    elif base in OURS:
        model = ScalableViT(base, with_cp=with_cp)
    else:
        model = build_peer(base, with_cp)
    model.init_weights()
    for module in list(model.modules()) if ':fused' in name else []:
        if hasattr(module, 'w_msa'):
            module.register_module('w_msa', FusedWindows(module.w_msa))
    return model


def build_peer(name: str, with_cp: bool) -> nn.Module:
    """Build another project's backbone by its name."""
    if name in BASES:
        cfg = Config.fromfile(ROOT / 'configs' / '_base_' / 'backbones' / f'{name}.py').backbone
        scope = BASES[name]
        cfg.drop_path_rate = 0.0
    elif name in PEERS:
        cfg, scope = dict(PEERS[name]), PEERS[name]['type'].split('.')[0]
    else:
        raise cli.UserError(f'there is no model {name!r}; --models are {MODELS_HELP}')
    if with_cp:
        cfg['with_cp'] = True
    # Registers the toolbox's classes.
    __import__(f'{scope}.models')
    init_default_scope(scope)
    return MODELS.build(cfg)
