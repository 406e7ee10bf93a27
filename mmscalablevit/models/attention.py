# Copyright (c) mmscalablevit contributors. All rights reserved.
"""The two attentions of ScalableViT, on channels-last maps (B, H, W, C).

The formulas, numbered as in docs/architecture.md and in the comments below, for each head::

    (1)  Attention(Q, K, V) = softmax(s Q K^T) V
    (2)  SSA(X)  = Attention(Q(X), K(X'), V(X')) W,   X' = GELU(LN(Reduce(X)))
    (3)  IWSA(X) = (merge(Attention(Q, K, V) of each window) + LIM(merge(V))) W
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers import conv_channels_last

# CUDA's kernels take no larger batch; 1,024 images of 224x224 have 65,536 windows. By device, as
# elsewhere the comparison would needlessly limit the sizes of an exported program.
MAX_BATCH = {'cuda': 65535}


class ScalableSelfAttention(nn.Module):
    """Scalable Self-Attention, SSA (ScalableViT, section "Scalable Self-Attention").

    Global attention, formula (2). Keys and values come from a map reduced by a strided convolution
    (spatial scaling); the width of queries and keys is scaled by a factor (channel scaling).

    Args:
        embed_dims (int): Channels of the map.
        num_heads (int): Attention heads; must divide ``embed_dims`` and the scaled width
            ``int(embed_dims * c_ratio)``.
        c_ratio (float): Width of query and key relative to ``embed_dims``. Defaults to 1.
        sr_ratio (int): Kernel and stride of the reduction in pixels; 1 for none. Defaults to 1.
        kv (str): 'separate' (values ``embed_dims`` wide, as in the released classification code)
            or 'merged' (as wide as the keys, as in the authors' detection code); the same where
            ``sr_ratio`` is 1. Defaults to 'separate'.
        attn_drop (float): Dropout rate of the attention weights. Defaults to 0.
        proj_drop (float): Dropout rate of the output. Defaults to 0.

    Example:
        >>> import torch
        >>> attn = ScalableSelfAttention(64, num_heads=2, c_ratio=1.25, sr_ratio=8)
        >>> attn(torch.rand(1, 25, 33, 64)).shape
        torch.Size([1, 25, 33, 64])
    """

    def __init__(
        self,
        embed_dims: int,
        num_heads: int,
        c_ratio: float = 1.0,
        sr_ratio: int = 1,
        kv: str = 'separate',
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.sr_ratio = sr_ratio
        self.scale = (embed_dims // num_heads * c_ratio) ** -0.5
        self.attn_drop = attn_drop
        self.proj_drop = nn.Dropout(proj_drop)

        scaled_dims = int(embed_dims * c_ratio) if sr_ratio > 1 else embed_dims
        merged = sr_ratio == 1 or kv == 'merged'
        self.q = nn.Linear(embed_dims, scaled_dims)
        if sr_ratio > 1:
            self.reduction = nn.Sequential(
                nn.Conv2d(embed_dims, embed_dims, sr_ratio, sr_ratio, groups=embed_dims),
                nn.Conv2d(embed_dims, scaled_dims, 1),
            )
            self.norm_act = nn.Sequential(nn.LayerNorm(scaled_dims, eps=1e-5), nn.GELU())
        if merged:
            self.kv = nn.Linear(scaled_dims, 2 * scaled_dims)
        else:
            self.k = nn.Linear(scaled_dims, scaled_dims)
            self.v = nn.Linear(scaled_dims, embed_dims)
        self.proj = nn.Linear(scaled_dims if merged else embed_dims, embed_dims)

    def forward(self, x: Tensor) -> Tensor:
        """Attend from every position of a map (B, H, W, C) to its reduced copy; the shape stays.

        Rows and columns left over by the reduction are not seen by keys and values; a map smaller
        than the kernel is padded with zeros on the right and bottom up to one kernel.
        """
        height, width = x.shape[1], x.shape[2]
        query, (key, value) = self.q(x), self.key_value(x)
        tokens = (each.flatten(1, 2) for each in (query, key, value))
        dropout = self.attn_drop if self.training else 0.0
        # (2): (B, H * W, C), each head by (1).
        out = fused_attention(*tokens, self.num_heads, self.scale, dropout)
        return self.proj_drop(self.proj(out.unflatten(1, (height, width))))

    def key_value(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Compute keys and values of shape (B, H // sr_ratio, W // sr_ratio, C') of a map."""
        if self.sr_ratio > 1:
            x = pad_to_kernel(x, self.sr_ratio)
            x = self.norm_act(conv_channels_last(self.reduction, x))  # X' of (2)
        if hasattr(self, 'kv'):
            return self.kv(x).chunk(2, dim=-1)
        return self.k(x), self.v(x)


class InteractiveWindowSelfAttention(nn.Module):
    """Interactive Window-based Self-Attention, IWSA (ScalableViT, section of that name).

    Attention inside windows that do not overlap, plus the local interactive module (LIM): a
    depthwise 3x3 convolution of the value map, which crosses the window borders; formula (3).

    Args:
        embed_dims (int): Channels of the map.
        num_heads (int): Attention heads; must divide ``embed_dims``.
        window_size (int): Side of a window in pixels of the map. Defaults to 7.
        attn_drop (float): Dropout rate of the attention weights. Defaults to 0.
        proj_drop (float): Dropout rate of the output. Defaults to 0.

    Example:
        >>> import torch
        >>> InteractiveWindowSelfAttention(64, num_heads=2)(torch.rand(1, 25, 33, 64)).shape
        torch.Size([1, 25, 33, 64])
    """

    def __init__(
        self,
        embed_dims: int,
        num_heads: int,
        window_size: int = 7,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.window_size = window_size
        self.scale = (embed_dims // num_heads) ** -0.5
        self.attn_drop = attn_drop
        self.qkv = nn.Linear(embed_dims, 3 * embed_dims)
        self.lim_func = nn.Conv2d(embed_dims, embed_dims, 3, padding=1, groups=embed_dims)
        self.proj = nn.Linear(embed_dims, embed_dims)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor) -> Tensor:
        """Attend inside the windows of a map (B, H, W, C), and add the convolved values.

        Where the window does not divide it, zeros are added on the right and bottom; they take part
        in attention as the bias of ``qkv``. The shape stays.
        """
        shape, size = x.shape, self.window_size
        qkv = self.qkv(partition_windows(x, size))  # (B * windows, N, 3 * C)
        query, key, value = qkv.chunk(3, dim=-1)
        lim = conv_channels_last(self.lim_func, merge_windows(value, shape, size))
        dropout = self.attn_drop if self.training else 0.0
        out = fused_attention(query, key, value, self.num_heads, self.scale, dropout)  # (1)
        out = merge_windows(out, shape, size) + lim
        out = self.proj_drop(self.proj(out))  # (3)
        return pad_or_crop(out, shape[1], shape[2])


def partition_windows(x: Tensor, size: int) -> Tensor:
    """Split a map (B, H, W, C), padded with zeros, into windows of shape (B * n, size**2, C).

    Example:
        >>> partition_windows(torch.rand(2, 25, 33, 64), size=7).shape  # 4 x 5 windows each
        torch.Size([40, 49, 64])
    """
    batch, height, width, channels = x.shape
    rows, columns = (height + size - 1) // size, (width + size - 1) // size
    x = pad_or_crop(x, rows * size, columns * size)
    x = x.view(batch, rows, size, columns, size, channels).transpose(2, 3)
    # Not reshape(), which compilers guard against the sizes at which it would not copy.
    x = x.clone(memory_format=torch.contiguous_format)
    return x.view(batch * rows * columns, size * size, channels)


def merge_windows(windows: Tensor, shape: torch.Size, size: int) -> Tensor:
    """Reverse :func:`partition_windows`, but for what it padded.

    Args:
        windows (Tensor): Windows of shape (B * n, size**2, C).
        shape (torch.Size): Shape (B, H, W, C) of the map that was split.
        size (int): Side of a window in pixels of the map.

    Example:
        >>> x = torch.rand(2, 25, 33, 64)
        >>> merge_windows(partition_windows(x, 7), x.shape, 7)[:, :25, :33].equal(x)
        True
    """
    batch, height, width, channels = shape
    rows, columns = (height + size - 1) // size, (width + size - 1) // size
    x = windows.view(batch, rows, columns, size, size, channels).transpose(2, 3)
    x = x.clone(memory_format=torch.contiguous_format)
    return x.view(batch, rows * size, columns * size, channels)


@torch.fx.wrap
def pad_or_crop(x: Tensor, height: int, width: int) -> Tensor:
    """Pad a map (B, H, W, C) with zeros or crop it, on the right and bottom, to a size."""
    # Compilers copy and do not compare: they would tell sizes that windows divide from others.
    if not torch.compiler.is_compiling() and x.shape[1:3] == (height, width):
        return x
    return F.pad(x, (0, 0, 0, width - x.shape[2], 0, height - x.shape[1]))


@torch.fx.wrap
def pad_to_kernel(x: Tensor, size: int) -> Tensor:
    """Pad a map (B, H, W, C) that is smaller than a kernel with zeros to the kernel's size."""
    bottom, right = max(size - x.shape[1], 0), max(size - x.shape[2], 0)
    return F.pad(x, (0, 0, 0, right, 0, bottom)) if bottom or right else x


@torch.fx.wrap
def fused_attention(
    query: Tensor, key: Tensor, value: Tensor, num_heads: int, scale: float, dropout: float = 0.0
) -> Tensor:
    """Multi-head attention, formula (1), by torch's fused kernels, for values of any width.

    They need values as wide as keys: the narrower side is padded with zeros, which is exact.

    Args:
        query (Tensor): Queries of shape (B, N, heads * D).
        key (Tensor): Keys of shape (B, M, heads * D).
        value (Tensor): Values of shape (B, M, heads * E); the result is of shape (B, N, heads * E).
        num_heads (int): Number of heads.
        scale (float): Factor on the products.
        dropout (float): Dropout rate of the attention weights. Defaults to 0.

    Example:
        >>> query, key, value = torch.rand(1, 99, 80), torch.rand(1, 12, 80), torch.rand(1, 12, 64)
        >>> fused_attention(query, key, value, num_heads=2, scale=40**-0.5).shape
        torch.Size([1, 99, 64])
    """
    limit = MAX_BATCH.get(query.device.type)
    if limit and query.shape[0] > limit:
        parts = zip(*(x.split(limit) for x in (query, key, value)), strict=True)
        return torch.cat([fused_attention(*part, num_heads, scale, dropout) for part in parts])
    query, key, value = (
        x.unflatten(-1, (num_heads, -1)).transpose(1, 2) for x in (query, key, value)
    )
    width = value.shape[-1]
    missing = key.shape[-1] - width
    if missing > 0:
        value = F.pad(value, (0, missing))
    elif missing < 0:
        query, key = F.pad(query, (0, -missing)), F.pad(key, (0, -missing))
    if query.device.type == 'cpu' and query.dtype == torch.bfloat16 and query.requires_grad:
        # The backward pass of CPUs' bfloat16 kernel takes five times as long as float32's.
        with torch.autocast('cpu', enabled=False):
            parts = (x.float() for x in (query, key, value))
            out = F.scaled_dot_product_attention(*parts, dropout_p=dropout, scale=scale)
        out = out.to(query.dtype)
    else:
        out = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout, scale=scale)
    return out[..., :width].transpose(1, 2).flatten(2)
