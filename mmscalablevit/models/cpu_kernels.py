# Copyright (c) mmscalablevit contributors. All rights reserved.
"""Linear layers of the network, and where they run in a faster way of the same result."""

import platform
from collections.abc import Callable
from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.compiler import is_compiling

_X86 = platform.machine().lower() in ('x86_64', 'amd64')
_ONEDNN = torch.backends.mkldnn.is_available()
# With fewer values or one thread torch gives a 1x1 convolution to a slower kernel than oneDNN's.
_MIN_VALUES = 20480
# torch before 2.7 cannot tell an export, whose graph should stay plain, from a compilation.
_is_exporting = getattr(torch.compiler, 'is_exporting', lambda: True)


class Linear(nn.Linear):
    """A linear layer over the last dimension, through the faster of torch's CPU kernels.

    For float32 on CPU, torch takes matrix products from MKL and convolutions from oneDNN. For the
    long and narrow products of this network oneDNN is the faster one (docs/performance.md), so that
    the layer runs there as a 1x1 convolution on a view of the same memory; in compiled graphs by
    the operator ``mmscalablevit::linear``, as inductor lays out a convolution's input anew.
    Everywhere else, while exporting included, it is ``nn.Linear``.

    Args:
        in_features (int): Width of the input.
        out_features (int): Width of the output.
        bias (bool): Whether to add a bias. Defaults to True.

    Example:
        >>> import torch
        >>> Linear(64, 192)(torch.rand(1, 7, 9, 64)).shape
        torch.Size([1, 7, 9, 192])
    """

    def forward(self, x: Tensor) -> Tensor:
        """Transform ``x`` of shape (..., in_features) to (..., out_features)."""
        if not self.may_be_convolution(x):
            return super().forward(x)
        if is_compiling():
            return _compiled_linear(x, self.weight, self.bias)
        return fastest_linear(x, self.weight, self.bias)

    def may_be_convolution(self, x: Tensor) -> bool:
        """Whether the layer may run as a convolution on ``x``: float32 on an x86 CPU."""
        return (
            x.device.type == 'cpu'
            and _X86
            and _ONEDNN
            and x.dtype == self.weight.dtype == torch.float32
            and not torch.jit.is_tracing()
            and not (is_compiling() and _is_exporting())
            and not torch.is_autocast_enabled('cpu')
        )


def runs_eagerly_on_cpu(x: Tensor) -> bool:
    """Whether ``x`` is processed on an x86 CPU, operator by operator, neither traced nor compiled.

    There, and only there, other operators for the same result are worth it: compilers choose and
    fuse operators by themselves, and a traced or exported graph should stay plain.

    Example:
        >>> import torch
        >>> runs_eagerly_on_cpu(torch.rand(2))  # doctest: +SKIP
        True
    """
    return not is_compiling() and not torch.jit.is_tracing() and x.device.type == 'cpu' and _X86


def fastest_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Compute ``F.linear`` in float32 on CPU, as a 1x1 convolution where that is faster.

    Args:
        x (Tensor): Input of shape (..., in_features).
        weight (Tensor): Weight of shape (out_features, in_features).
        bias (Tensor | None): Bias of shape (out_features,).

    Returns:
        Tensor: Output of shape (..., out_features).

    Example:
        >>> import torch
        >>> fastest_linear(torch.rand(7, 64), torch.rand(192, 64), None).shape
        torch.Size([7, 192])
    """
    if x.numel() <= _MIN_VALUES or torch.get_num_threads() == 1:
        return F.linear(x, weight, bias)
    rows = x if x.dim() == 4 else x.reshape(1, 1, -1, x.shape[-1])
    out = F.conv2d(rows.permute(0, 3, 1, 2), weight[:, :, None, None], bias)
    return out.permute(0, 2, 3, 1).reshape(*x.shape[:-1], weight.shape[0])


# `Tensor | None` is not understood by the schema reader of every torch that is supported.
@torch.library.custom_op('mmscalablevit::linear', mutates_args=(), device_types='cpu')
def _compiled_linear(x: Tensor, weight: Tensor, bias: Optional[Tensor]) -> Tensor:  # noqa: UP045
    return fastest_linear(x, weight, bias).contiguous()


@_compiled_linear.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _save_for_backward(ctx, inputs: tuple, output: Tensor) -> None:
    x, weight, _ = inputs
    ctx.save_for_backward(x, weight)


def _backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    needs_x, needs_weight, needs_bias = ctx.needs_input_grad
    rows = grad.flatten(0, -2)
    return (
        _compiled_linear(grad, weight.t(), None) if needs_x else None,
        rows.t() @ x.flatten(0, -2) if needs_weight else None,
        rows.sum(0) if needs_bias else None,
    )


_compiled_linear.register_autograd(_backward, setup_context=_save_for_backward)


# 4 MiB in float32: measured on cores with 1 MiB of L2 cache; half and double are no faster.
_VALUES_IN_CACHE = 2**20


def add_mlp(x: Tensor, norm: nn.LayerNorm, mlp: nn.Module) -> Tensor:
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
