# Copyright (c) mmscalablevit contributors. All rights reserved.
"""The MLP of a block, and its residual branch in slices that stay in the processor's cache."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.compiler import is_compiling

from .linear import Linear, fastest_linear, runs_eagerly_on_cpu

# 4 MiB in float32: measured on cores with 1 MiB of L2 cache; half and double are no faster.
_VALUES_IN_CACHE = 2**20


class MLP(nn.Module):
    """Two linear layers with an exact GELU between them.

    Args:
        embed_dims (int): Channels in and out.
        hidden_dims (int): Channels between the layers.
        drop (float): Dropout rate after each layer. Defaults to 0.

    Example:
        >>> import torch
        >>> MLP(64, 256)(torch.rand(1, 7, 9, 64)).shape
        torch.Size([1, 7, 9, 64])
    """

    def __init__(self, embed_dims: int, hidden_dims: int, drop: float = 0.0) -> None:
        super().__init__()
        self.fc1 = Linear(embed_dims, hidden_dims)
        self.act = nn.GELU()
        self.fc2 = Linear(hidden_dims, embed_dims)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        """Transform the last dimension of ``x``; the shape stays."""
        return self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))


def add_mlp(x: Tensor, norm: nn.LayerNorm, mlp: MLP) -> Tensor:
    """Compute ``x + mlp(norm(x))`` for inference, on CPUs in slices that stay in the cache.

    Args:
        x (Tensor): Map of shape (B, H, W, C). May be overwritten.
        norm (nn.LayerNorm): The norm before the MLP.
        mlp (MLP): The MLP, in eval mode.

    Returns:
        Tensor: Map of shape (B, H, W, C).

    Example:
        >>> import torch
        >>> with torch.no_grad():
        ...     out = add_mlp(torch.rand(1, 7, 9, 64), torch.nn.LayerNorm(64), MLP(64, 256))
        >>> out.shape
        torch.Size([1, 7, 9, 64])
    """
    fc1, fc2 = mlp.fc1, mlp.fc2
    if runs_eagerly_on_cpu(x):
        x = x.contiguous()
        return _add_in_slices(x, lambda rows: mlp(norm(rows)), fc1.out_features, out=x)
    # The operator takes their weights, so layers that somebody put in their place stay as they are.
    if is_compiling() and type(fc1) is type(fc2) is Linear and fc1.may_be_convolution(x):
        return _compiled_add_mlp(
            x, norm.weight, norm.bias, norm.eps, fc1.weight, fc1.bias, fc2.weight, fc2.bias
        )
    return x + mlp(norm(x))


def _add_in_slices(
    x: Tensor, branch: Callable[[Tensor], Tensor], width: int, out: Tensor
) -> Tensor:
    num_rows = max(1, _VALUES_IN_CACHE // width)
    slices = (t.view(-1, t.shape[-1]).split(num_rows) for t in (x, out))
    for rows, out_rows in zip(*slices, strict=True):
        torch.add(rows, branch(rows), out=out_rows)
    return out


@torch.library.custom_op('mmscalablevit::add_mlp', mutates_args=(), device_types='cpu')
def _compiled_add_mlp(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
) -> Tensor:
    def branch(rows: Tensor) -> Tensor:
        rows = F.layer_norm(rows, rows.shape[-1:], norm_weight, norm_bias, eps)
        hidden = F.gelu(fastest_linear(rows, weight1, bias1))
        return fastest_linear(hidden, weight2, bias2)

    x = x.contiguous()
    return _add_in_slices(x, branch, weight1.shape[0], out=torch.empty_like(x))


@_compiled_add_mlp.register_fake
def _(x: Tensor, *args) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)
