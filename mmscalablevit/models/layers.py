# Copyright (c) mmscalablevit contributors. All rights reserved.
"""Patch embedding, conditional position encoding, MLP and the block around an attention.

Maps travel between modules channels-last, as (B, H, W, C): linear layers and norms then need no
transposition, and a convolution sees the same memory as an NCHW tensor in channels-last format.
"""

from mmcv.cnn.bricks import DropPath
from torch import Tensor, nn


class PatchEmbed(nn.Module):
    """Overlapping convolutional patch embedding (ScalableViT, section "Overall Architecture").

    A strided convolution followed by LayerNorm. The output has ``ceil(size / stride)`` rows and
    columns.

    Args:
        in_channels (int): Channels of the input map.
        embed_dims (int): Channels of the output map.
        kernel_size (int): Kernel of the convolution in pixels; the padding is half of it.
        stride (int): Stride of the convolution in pixels.
        drop (float): Dropout rate of the output. Defaults to 0.

    Example:
        >>> import torch
        >>> embed = PatchEmbed(3, 64, kernel_size=7, stride=4)
        >>> embed(torch.rand(1, 97, 131, 3)).shape
        torch.Size([1, 25, 33, 64])
    """

    def __init__(
        self, in_channels: int, embed_dims: int, kernel_size: int, stride: int, drop: float = 0.0
    ) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, embed_dims, kernel_size, stride, kernel_size // 2)
        self.norm = nn.LayerNorm(embed_dims, eps=1e-6)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        """Embed a map (B, H, W, in_channels) to (B, ceil(H / stride), ceil(W / stride), C)."""
        return self.drop(self.norm(conv_channels_last(self.proj, x)))


class PositionEncodingGenerator(nn.Module):
    """Conditional position encoding, PEG (arXiv 2102.10882, as used in ScalableViT).

    A depthwise 3x3 convolution with an identity branch.

    Args:
        embed_dims (int): Channels of the map.

    Example:
        >>> import torch
        >>> PositionEncodingGenerator(64)(torch.rand(1, 7, 9, 64)).shape
        torch.Size([1, 7, 9, 64])
    """

    def __init__(self, embed_dims: int) -> None:
        super().__init__()
        # A container of one: released checkpoints name the weight `proj.0`.
        self.proj = nn.Sequential(
            nn.Conv2d(embed_dims, embed_dims, 3, padding=1, groups=embed_dims)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Add the position encoding to a map of shape (B, H, W, C); the shape stays."""
        return x + conv_channels_last(self.proj, x)


def conv_channels_last(conv: nn.Module, x: Tensor) -> Tensor:
    """Apply a convolution of NCHW maps to one of shape (B, H, W, C); transpositions are views."""
    return conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class MLP(nn.Module):
    """The feed-forward part of a block: two linear layers and an exact GELU between them.

    Args:
        embed_dims (int): Channels of input and output.
        hidden_dims (int): Channels between the two layers.
        drop (float): Dropout rate after each layer. Defaults to 0.

    Example:
        >>> import torch
        >>> MLP(64, 256)(torch.rand(1, 7, 9, 64)).shape
        torch.Size([1, 7, 9, 64])
    """

    def __init__(self, embed_dims: int, hidden_dims: int, drop: float = 0.0) -> None:
        super().__init__()
        self.fc1 = nn.Linear(embed_dims, hidden_dims)
        self.act = nn.GELU()
        self.drop1 = nn.Dropout(drop)
        self.fc2 = nn.Linear(hidden_dims, embed_dims)
        self.drop2 = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        """Transform a map of shape (B, H, W, C); the shape stays."""
        x = self.drop1(self.act(self.fc1(x)))
        return self.drop2(self.fc2(x))


class Block(nn.Module):
    """Transformer block: attention and MLP, each with pre-norm, residual and stochastic depth.

    Formulas (4) ``X + attn(LN(X))`` and, of its result, (5) ``X + MLP(LN(X))``.

    Args:
        embed_dims (int): Channels of the map.
        attn (nn.Module): Attention on a map of shape (B, H, W, C).
        mlp_ratio (float): Width of the MLP relative to ``embed_dims``. Defaults to 4.
        drop (float): Dropout rate inside the MLP. Defaults to 0.
        drop_path (float): Stochastic depth rate of both branches. Defaults to 0.

    Example:
        >>> import torch
        >>> from mmscalablevit.models import ScalableSelfAttention
        >>> block = Block(64, ScalableSelfAttention(64, num_heads=2), drop_path=0.1)
        >>> block(torch.rand(1, 7, 9, 64)).shape
        torch.Size([1, 7, 9, 64])
    """

    def __init__(
        self,
        embed_dims: int,
        attn: nn.Module,
        mlp_ratio: float = 4.0,
        drop: float = 0.0,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(embed_dims, eps=1e-6)
        self.attn = attn
        self.drop_path1 = DropPath(drop_path)
        self.norm2 = nn.LayerNorm(embed_dims, eps=1e-6)
        self.mlp = MLP(embed_dims, int(embed_dims * mlp_ratio), drop)
        self.drop_path2 = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """Transform a map of shape (B, H, W, C); the shape stays."""
        x = x + self.drop_path1(self.attn(self.norm1(x)))  # (4)
        return x + self.drop_path2(self.mlp(self.norm2(x)))  # (5)
