# Copyright (c) mmscalablevit contributors. All rights reserved.
"""The two attentions of ScalableViT, on channels-last maps (B, H, W, C)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.compiler import is_compiling

from .cpu_kernels import Linear
from .layers import conv_channels_last

# In bfloat16 without these units, torch's backward pass on CPU is up to seven times as slow as in
# float32 (docs/performance.md). Older versions of torch cannot tell.
_AMX = getattr(torch.cpu, '_is_amx_tile_supported', lambda: False)()


class ScalableSelfAttention(nn.Module):
    """Scalable Self-Attention, SSA (ScalableViT, section "Scalable Self-Attention").

    Global attention whose keys and values come from a map reduced by a strided convolution
    (spatial scaling) and whose query and key widths are scaled by a factor (channel scaling).

    Args:
        embed_dims (int): Channels of the map.
        num_heads (int): Attention heads; must divide ``embed_dims`` and the scaled width
            ``int(embed_dims * c_ratio)``.
        c_ratio (float): Width of query and key relative to ``embed_dims``. Defaults to 1.
        sr_ratio (int): Kernel and stride of the reduction in pixels; 1 for none. Defaults to 1.
        kv (str): 'separate' (values ``embed_dims`` wide, as in the released classification code)
            or 'merged' (values as wide as the keys, as in the authors' detection code). Makes no
            difference where ``sr_ratio`` is 1. Defaults to 'separate'.
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
        self.value_dims = scaled_dims if merged else embed_dims
        self.q = Linear(embed_dims, scaled_dims)
        if sr_ratio > 1:
            self.reduction = nn.Sequential(
                nn.Conv2d(embed_dims, embed_dims, sr_ratio, sr_ratio, groups=embed_dims),
                nn.Conv2d(embed_dims, scaled_dims, 1),
            )
            self.norm_act = nn.Sequential(nn.LayerNorm(scaled_dims, eps=1e-5), nn.GELU())
        if merged:
            self.kv = Linear(scaled_dims, 2 * scaled_dims)
        else:
            self.k = Linear(scaled_dims, scaled_dims)
            self.v = Linear(scaled_dims, embed_dims)
        self.proj = Linear(self.value_dims, embed_dims)

    def forward(self, x: Tensor) -> Tensor:
        """Attend from every position of a map to its reduced copy.

        Args:
            x (Tensor): Map of shape (B, H, W, C). Rows and columns left over by the reduction are
                not seen by keys and values; a map smaller than the kernel is padded with zeros on
                the right and bottom up to one kernel.

        Returns:
            Tensor: Map of shape (B, H, W, C).
        """
        batch, height, width, _ = x.shape
        query = self._heads(self.q(x).flatten(1, 2))
        key, value = self._key_value(x)
        dropout = self.attn_drop if self.training else 0.0
        out = fused_attention(query, key, value, self.scale, dropout)
        out = out.transpose(1, 2).reshape(batch, height, width, self.value_dims)
        return self.proj_drop(self.proj(out))

    def _key_value(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if self.sr_ratio > 1:
            x = self.norm_act(conv_channels_last(self.reduction, self._pad_to_kernel(x)))
        x = x.flatten(1, 2)
        if hasattr(self, 'kv'):
            key, value = self.kv(x).chunk(2, dim=-1)
        else:
            key, value = self.k(x), self.v(x)
        return self._heads(key), self._heads(value)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def _pad_to_kernel(self, x: Tensor) -> Tensor:
        bottom = max(self.sr_ratio - x.shape[1], 0)
        right = max(self.sr_ratio - x.shape[2], 0)
        return F.pad(x, (0, 0, 0, right, 0, bottom)) if bottom or right else x


class InteractiveWindowSelfAttention(nn.Module):
    """Interactive Window-based Self-Attention, IWSA (ScalableViT, section of that name).

    Attention inside windows that do not overlap, plus the local interactive module (LIM): a
    depthwise 3x3 convolution of the value map, which crosses the window borders.

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
        self.head_dims = embed_dims // num_heads
        self.window_size = window_size
        self.scale = self.head_dims**-0.5
        self.attn_drop = attn_drop
        self.qkv = Linear(embed_dims, 3 * embed_dims)
        self.lim_func = nn.Conv2d(embed_dims, embed_dims, 3, padding=1, groups=embed_dims)
        self.proj = Linear(embed_dims, embed_dims)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor) -> Tensor:
        """Attend inside windows and add the convolved values.

        Args:
            x (Tensor): Map of shape (B, H, W, C). Where the window does not divide it, zeros are
                added on the right and bottom; they take part in attention as the bias of ``qkv``.

        Returns:
            Tensor: Map of shape (B, H, W, C).
        """
        batch, height, width, channels = x.shape
        size = self.window_size
        # Spelled out for compilers, which would have to prove that the windows divide the map.
        rows, columns = (height + size - 1) // size, (width + size - 1) // size
        grid = (batch, rows, size, columns, size, channels)
        bottom, right = rows * size - height, columns * size - width
        # A compiled graph always pads and crops, so that it serves maps of any size.
        compiling = is_compiling()
        if compiling or bottom or right:
            x = F.pad(x, (0, 0, 0, right, 0, bottom))
        if compiling:
            # Merging windows would be guarded against sizes at which a view might do it.
            qkv = self.qkv(x)
            value_map, qkv = qkv[..., 2 * channels :], self._windows(qkv)
            query, key, value = self._heads(qkv)
        else:
            # Three times less to copy than windows of the projected map.
            query, key, value = self._heads(self.qkv(self._windows(x)))
            value_map = value.reshape(batch, rows, columns, size, size, channels)
            value_map = value_map.transpose(2, 3).reshape(x.shape)
        lim = conv_channels_last(self.lim_func, value_map).contiguous()
        # The windows are a view of the LIM map, so adding into them needs no copy back to a map.
        out = lim.view(grid).transpose(2, 3)
        out = out.add_(self._attend(query, key, value).view(out.shape))
        out = out.transpose(2, 3).reshape(batch, rows * size, columns * size, channels)
        # Before the crop, whose result is no longer contiguous.
        out = self.proj_drop(self.proj(out))
        if compiling:
            return F.pad(out, (0, 0, 0, -right, 0, -bottom))
        return out[:, :height, :width]

    def _windows(self, x: Tensor) -> Tensor:
        """Copy a map (B, rows * size, columns * size, C) to windows (B * rows * columns, N, C)."""
        size = self.window_size
        batch, height, width, channels = x.shape
        rows, columns = height // size, width // size
        windows = x.view(batch, rows, size, columns, size, channels).transpose(2, 3)
        windows = windows.clone(memory_format=torch.contiguous_format)
        return windows.view(batch * rows * columns, size**2, channels)

    def _heads(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Take (windows, N, 3 * C) apart into three of (windows, N, heads, head_dims).

        At once: the gradient of each slice by itself would be as large as that of the whole.
        """
        return qkv.unflatten(-1, (3, self.num_heads, self.head_dims)).unbind(2)

    def _attend(self, *query_key_value: Tensor) -> Tensor:
        """Attend inside windows: three of (windows, N, heads, head_dims) to (windows, N, C)."""
        query, key, value = (x.transpose(1, 2) for x in query_key_value)
        dropout = self.attn_drop if self.training else 0.0
        return fused_attention(query, key, value, self.scale, dropout).transpose(1, 2).flatten(2)


def fused_attention(
    query: Tensor, key: Tensor, value: Tensor, scale: float, dropout: float = 0.0
) -> Tensor:
    """Scaled dot-product attention through torch's fused kernels, for any two widths.

    The fused kernels want values as wide as keys and otherwise fall back to explicit matrices. The
    narrower side is padded with zeros, which changes neither the products nor the kept outputs.
    Training in half precision on CPUs without AMX computes in float32, which is faster there.

    Args:
        query (Tensor): Queries of shape (B, heads, N, D).
        key (Tensor): Keys of shape (B, heads, M, D).
        value (Tensor): Values of shape (B, heads, M, E).
        scale (float): Factor on the products.
        dropout (float): Dropout rate of the attention weights. Defaults to 0.

    Returns:
        Tensor: Attended values of shape (B, heads, N, E).

    Example:
        >>> import torch
        >>> q, k, v = torch.rand(1, 2, 9, 40), torch.rand(1, 2, 4, 40), torch.rand(1, 2, 4, 32)
        >>> fused_attention(q, k, v, scale=40**-0.5).shape
        torch.Size([1, 2, 9, 32])
    """
    if _has_slow_backward(query):
        with torch.autocast('cpu', enabled=False):
            out = fused_attention(query.float(), key.float(), value.float(), scale, dropout)
        return out.to(query.dtype)
    key_width, value_width = key.shape[-1], value.shape[-1]
    if value_width < key_width:
        value = F.pad(value, (0, key_width - value_width))
    elif value_width > key_width:
        query = F.pad(query, (0, value_width - key_width))
        key = F.pad(key, (0, value_width - key_width))
    out = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout, scale=scale)
    return out[..., :value_width]


def _has_slow_backward(query: Tensor) -> bool:
    half = query.dtype in (torch.bfloat16, torch.float16)
    return query.device.type == 'cpu' and half and not _AMX and query.requires_grad
