# Copyright (c) mmscalablevit contributors. All rights reserved.
"""The ScalableViT backbone: stages, multi-scale outputs, freezing, initialization.

Formula (6) of a stage, numbered as in docs/architecture.md, with blocks of formulas (4) and (5)::

    (6)  X = block_n(... block_1(PEG(block_0(PatchEmbed(X)))))
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from mmengine.logging import print_log
from mmengine.model import BaseModule, PretrainedInit, initialize, trunc_normal_init
from mmengine.registry import MODELS, WEIGHT_INITIALIZERS
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..checkpoint.released import load_backbone_checkpoint
from .arch import ARCH_ZOO, NUM_STAGES, arch_settings, check_int, check_out_indices, check_rate
from .attention import InteractiveWindowSelfAttention, ScalableSelfAttention
from .layers import Block, PatchEmbed, PositionEncodingGenerator

# Kernel and stride of each stage's patch embedding, in pixels of the map before it.
_PATCHES = ((7, 4), (3, 2), (3, 2), (3, 2))


@MODELS.register_module()
class ScalableViT(BaseModule):
    """ScalableViT backbone with multi-scale outputs (arXiv 2203.10790, ECCV 2022).

    Four stages of strides 4, 8, 16 and 32, each a patch embedding and blocks that alternate window
    attention (IWSA, even index) and global attention on a reduced map (SSA, odd index), with one
    position encoding (PEG) after the first block. Parameters are named as in the released
    checkpoints. Stages after the last requested output are not built.

    Args:
        arch (str | dict): Architecture. A name: 'small' ('s'), 'base' ('b') and 'large' ('l') as in
            the released classification code, or 'small-merged' ('s-merged'), the small model of the
            published detection and segmentation tables. Or a dict of these keys, all of them
            needed, each a sequence of four numbers except the last:

            - **embed_dims** (Sequence[int]): Channels of each stage.
            - **num_heads** (Sequence[int]): Attention heads of each stage.
            - **depths** (Sequence[int]): Blocks of each stage.
            - **c_ratios** (Sequence[float]): SSA's width of query and key relative to
              ``embed_dims``; 1 where ``sr_ratios`` is 1.
            - **sr_ratios** (Sequence[int]): SSA's spatial reduction in pixels of the stage's map.
            - **window_sizes** (Sequence[int]): IWSA's window in pixels of the stage's map.
            - **mlp_ratios** (Sequence[float]): Width of the MLP relative to ``embed_dims``.
            - **ssa_kv** (str): 'separate' or 'merged', see :class:`ScalableSelfAttention`.

            Defaults to 'small'.
        in_channels (int): Channels of the input image. Defaults to 3.
        out_indices (Sequence[int]): Stages to return, of 0 to 3 in ascending order.
            Defaults to (0, 1, 2, 3).
        stage_norm (str | None): 'chained': a LayerNorm after each stage, emitted and fed to the
            next stage, as in the authors' code for dense prediction. 'output': a LayerNorm on the
            emitted copies only. None: no norm, as in the classifier. Defaults to 'chained'.
        final_norm (bool): Whether the output of stage 3, which ``out_indices`` must have, passes
            the classifier's ``norm``. Defaults to False.
        drop_rate (float): Dropout after patch embeddings, attentions and in MLPs. Defaults to 0.
        attn_drop_rate (float): Dropout rate of attention weights. Defaults to 0.
        drop_path_rate (float): Stochastic depth rate of the last block; it grows linearly from 0
            at the first. Defaults to 0.
        frozen_stages (int): Freeze (no gradient, eval mode) nothing at -1, the stem (first patch
            embedding) at 0, the stem and the first i stages at i. Defaults to -1.
        norm_eval (bool): Whether norm layers with running statistics stay in eval mode during
            training. Defaults to False.
        with_cp (bool): Whether to save memory by recomputing blocks in the backward pass (gradient
            checkpointing). Defaults to False.
        init_cfg (dict | list[dict], optional): Initialization. None initializes from scratch as
            released; ``dict(type='Pretrained', checkpoint=FILE)`` loads a checkpoint of any layout
            that :mod:`mmscalablevit.checkpoint.released` knows, strictly. Defaults to None.
        pretrained (str, optional): Checkpoint in place of ``init_cfg``, as mmseg's segmentors hand
            it on. Defaults to None.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument is out of its range; the message names it and what is allowed.

    Example:
        >>> import torch
        >>> from mmscalablevit import ScalableViT
        >>> model = ScalableViT('small').eval()
        >>> [tuple(x.shape) for x in model(torch.rand(1, 3, 97, 131))]
        [(1, 64, 25, 33), (1, 128, 13, 17), (1, 256, 7, 9), (1, 512, 4, 5)]
    """

    arch_zoo = ARCH_ZOO

    def __init__(
        self,
        arch: str | dict = 'small',
        in_channels: int = 3,
        out_indices: Sequence[int] = (0, 1, 2, 3),
        stage_norm: str | None = 'chained',
        final_norm: bool = False,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        frozen_stages: int = -1,
        norm_eval: bool = False,
        with_cp: bool = False,
        init_cfg: dict | list[dict] | None = None,
        pretrained: str | None = None,
    ) -> None:
        if pretrained is not None:
            if init_cfg:
                raise ValueError('weights are named by both init_cfg and pretrained; give one')
            init_cfg = dict(type='Pretrained', checkpoint=pretrained)
        super().__init__(init_cfg=init_cfg)
        self.arch_settings = arch_settings(arch, self.arch_zoo)
        check_int('in_channels', in_channels, 1)
        check_out_indices(out_indices)
        if stage_norm not in ('chained', 'output', None):
            raise ValueError(f"stage_norm must be 'chained', 'output' or None, got {stage_norm!r}")
        if final_norm and NUM_STAGES - 1 not in out_indices:
            raise ValueError(f'final_norm needs stage 3 in out_indices, got {tuple(out_indices)}')
        check_rate('drop_rate', drop_rate)
        check_rate('attn_drop_rate', attn_drop_rate)
        check_rate('drop_path_rate', drop_path_rate)
        check_int('frozen_stages', frozen_stages, -1, NUM_STAGES)
        for name, flag in dict(final_norm=final_norm, norm_eval=norm_eval, with_cp=with_cp).items():
            if not isinstance(flag, bool):
                raise TypeError(f'{name} must be True or False, got {flag!r}')

        self.in_channels = in_channels
        self.out_indices = tuple(out_indices)
        self.stage_norm = stage_norm
        self.frozen_stages = frozen_stages
        self.norm_eval = norm_eval
        self.with_cp = with_cp

        embed_dims = self.arch_settings['embed_dims']
        built = range(self.out_indices[-1] + 1)
        channels = (in_channels, *embed_dims)
        self.patch_embeds = nn.ModuleList(
            PatchEmbed(channels[i], channels[i + 1], *_PATCHES[i], drop=drop_rate) for i in built
        )
        self.pos_block = nn.ModuleList(PositionEncodingGenerator(embed_dims[i]) for i in built)
        self.stages = nn.ModuleList(
            self._make_stage(i, drop_rate, attn_drop_rate, drop_path_rate) for i in built
        )
        if stage_norm is not None:
            used = built if stage_norm == 'chained' else self.out_indices
            # The index is part of the released name, so a norm without use leaves its place empty.
            self.norm_list = nn.ModuleList(
                nn.LayerNorm(embed_dims[i], eps=1e-6) if i in used else nn.Identity() for i in built
            )
        if final_norm:
            self.norm = nn.LayerNorm(embed_dims[-1], eps=1e-6)
        self._freeze_stages()

    def _make_stage(self, i: int, drop: float, attn_drop: float, drop_path: float) -> nn.ModuleList:
        arch = self.arch_settings
        dims, heads = arch['embed_dims'][i], arch['num_heads'][i]
        first, last = sum(arch['depths'][:i]), max(sum(arch['depths']) - 1, 1)
        blocks = nn.ModuleList()
        for j in range(arch['depths'][i]):
            if j % 2 == 0:
                size = arch['window_sizes'][i]
                attn = InteractiveWindowSelfAttention(dims, heads, size, attn_drop, drop)
            else:
                scales = arch['c_ratios'][i], arch['sr_ratios'][i], arch['ssa_kv']
                attn = ScalableSelfAttention(dims, heads, *scales, attn_drop, drop)
            rate = drop_path * (first + j) / last
            blocks.append(Block(dims, attn, arch['mlp_ratios'][i], drop, rate))
        return blocks

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Compute the feature maps of images (B, in_channels, H, W), any H and W from 1 up.

        Returns:
            tuple[Tensor]: One contiguous map of shape (B, embed_dims[i], H_i, W_i) for each i of
            ``out_indices``; sizes are rounded up: H_0 = ceil(H / 4), H_i = ceil(H_(i-1) / 2).
        """
        x = check_images(x, self.in_channels)
        x = x.contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1)
        outs = []
        for i, stage in enumerate(self.stages):
            # Formula (6); not in a method of its own, whose caller would keep the input in memory.
            x = self.patch_embeds[i](x)
            for j, block in enumerate(stage):
                if self.with_cp and torch.is_grad_enabled():
                    x = checkpoint(block, x, use_reentrant=False)
                else:
                    x = block(x)
                if j == 0:
                    x = self.pos_block[i](x)
            out = x if self.stage_norm is None else self.norm_list[i](x)
            if self.stage_norm == 'chained':
                x = out
            # Not "in", which dynamo of torch 2.4 gets wrong with dynamic=True.
            if any(i == index for index in self.out_indices):
                if i == NUM_STAGES - 1 and hasattr(self, 'norm'):
                    out = self.norm(out)
                # mmcv's RoIAlign reads the memory as NCHW whatever the strides say.
                outs.append(out.permute(0, 3, 1, 2).contiguous())
        return tuple(outs)

    def train(self, mode: bool = True) -> ScalableViT:
        """Set the training mode; what is frozen stays in eval mode."""
        super().train(mode)
        self._freeze_stages()
        if mode and self.norm_eval:
            for module in self.modules():
                if isinstance(module, nn.modules.batchnorm._NormBase):
                    module.eval()
        return self

    def _freeze_stages(self) -> None:
        if self.frozen_stages < 0:
            return
        count = self.frozen_stages
        norms = [] if self.stage_norm is None else self.norm_list
        frozen = [*self.patch_embeds[: max(count, 1)]]
        frozen += [*self.pos_block[:count], *self.stages[:count], *norms[:count]]
        if count == NUM_STAGES and hasattr(self, 'norm'):
            frozen.append(self.norm)
        for module in frozen:
            module.eval().requires_grad_(False)

    def get_layer_depth(self, param_name: str, prefix: str = '') -> tuple[int, int]:
        """Depth of a parameter's layer, for layer-wise learning-rate decay.

        Layer 0 is the stem (first patch embedding), then come the blocks of all built stages, and
        the last layer is what follows the backbone. A later patch embedding and a position encoding
        count with the first block of their stage, a norm with the block before it.

        Args:
            param_name (str): Name of the parameter.
            prefix (str): What the names of this backbone's parameters start with. Defaults to ''.

        Returns:
            tuple[int, int]: The layer, from 0, and the number of layers.

        Example:
            >>> model = ScalableViT('small')
            >>> model.get_layer_depth('backbone.stages.1.0.norm1.weight', 'backbone.')
            (3, 28)
        """
        depths = [len(stage) for stage in self.stages]
        num_layers = sum(depths) + 2
        if not param_name.startswith(prefix):
            return num_layers - 1, num_layers
        part, *place = param_name.removeprefix(prefix).split('.')
        if part == 'norm':
            return num_layers - 2, num_layers
        if part not in ('patch_embeds', 'pos_block', 'stages', 'norm_list'):
            raise ValueError(f'param_name {param_name!r} is no parameter of ScalableViT')
        stage = int(place[0])
        if part == 'patch_embeds' and stage == 0:
            return 0, num_layers
        if part == 'norm_list':
            return sum(depths[: stage + 1]), num_layers
        block = int(place[1]) if part == 'stages' else 0
        return 1 + sum(depths[:stage]) + block, num_layers

    def init_weights(self) -> None:
        """Initialize from scratch as released, or from ``init_cfg``.

        From scratch: truncated normal of standard deviation 0.02 for linear layers, normal by fan
        out for convolutions, ones and zeros for norms, zero biases. One differs from the released
        code: the first bias is drawn, see ``_init_from_scratch``.
        """
        if self.is_init:
            print_log('init_weights of ScalableViT has been called before', logger='current')
            return
        cfgs = [self.init_cfg] if isinstance(self.init_cfg, dict) else list(self.init_cfg or [])
        pretrained = [cfg for cfg in cfgs if _is_pretrained(cfg)]
        self._init_from_scratch()
        initialize(self, [cfg for cfg in cfgs if cfg not in pretrained])
        for cfg in pretrained:
            load_backbone_checkpoint(self, **{k: v for k, v in cfg.items() if k != 'type'})
        self.is_init = True

    def _init_from_scratch(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                trunc_normal_init(module, std=0.02)
            elif isinstance(module, nn.LayerNorm):
                module.reset_parameters()
            elif isinstance(module, nn.Conv2d):
                fan_out = math.prod(module.kernel_size) * module.out_channels // module.groups
                nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
                nn.init.zeros_(module.bias)
        # The padding of a batch is zero, and a norm multiplies the gradients of zeros by 1000, the
        # next one again: they had a norm of 5e8 in a batch of varied sizes.
        stem = self.patch_embeds[0].proj
        bound = 1 / math.sqrt(stem.weight[0].numel())
        nn.init.uniform_(stem.bias, -bound, bound)


@torch.fx.wrap
def check_images(x: Tensor, in_channels: int) -> Tensor:
    """Return a batch of images (B, in_channels, H, W) unless it is none."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f'ScalableViT expects a tensor of floating-point images, got {kind}')
    if x.dim() != 4 or x.shape[1] != in_channels or 0 in x.shape:
        raise ValueError(
            f'ScalableViT with in_channels={in_channels} expects images of shape '
            f'(B, {in_channels}, H, W), none of them empty, got {tuple(x.shape)}'
        )
    return x


def _is_pretrained(init_cfg: dict) -> bool:
    if 'type' not in init_cfg:
        raise ValueError(f"init_cfg needs the key 'type', such as 'Pretrained', got {init_cfg}")
    kind = init_cfg['type']
    kind = WEIGHT_INITIALIZERS.get(kind) if isinstance(kind, str) else kind
    if kind is PretrainedInit and 'checkpoint' not in init_cfg:
        raise ValueError(
            f"init_cfg of type 'Pretrained' needs the key 'checkpoint', got {init_cfg}"
        )
    return kind is PretrainedInit
