# Copyright (c) mmscalablevit contributors. All rights reserved.
"""Linear layers of the network, and where they run in a faster way of the same result."""

import math
import platform

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.utils.flop_counter import register_flop_formula

_X86 = platform.machine().lower() in ('x86_64', 'amd64')
_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, '_linear_pointwise')
# torch before 2.7 cannot tell an export, whose graph should stay plain, from a compilation.
_is_exporting = getattr(torch.compiler, 'is_exporting', lambda: True)


class Linear(nn.Linear):
    """A linear layer over the last dimension, through the faster of torch's CPU kernels.

    For float32 on CPU, ``nn.Linear`` takes matrix products from MKL. For the long and narrow
    products of this network those of oneDNN are faster (docs/performance.md), so that the layer
    takes these, by the operator ``mmscalablevit::linear``, which compilers leave as it is.
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
        if not self.takes_onednn(x):
            return super().forward(x)
        return onednn_linear(x, self.weight, self.bias)

    def takes_onednn(self, x: Tensor) -> bool:
        """Whether the layer takes oneDNN's product for ``x``: float32 on an x86 CPU."""
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


def onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Compute ``F.linear`` in float32 on CPU by oneDNN, as an operator of its own.

    Args:
        x (Tensor): Input of shape (..., in_features).
        weight (Tensor): Weight of shape (out_features, in_features).
        bias (Tensor | None): Bias of shape (out_features,).

    Returns:
        Tensor: Output of shape (..., out_features).

    Example:
        >>> import torch
        >>> onednn_linear(torch.rand(7, 64), torch.rand(192, 64), None).shape
        torch.Size([7, 192])
    """
    return torch.ops.mmscalablevit.linear.default(x, weight, bias)


torch.library.define('mmscalablevit::linear', '(Tensor x, Tensor weight, Tensor? bias) -> Tensor')


@torch.library.impl('mmscalablevit::linear', 'cpu')
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, 'none', [], '')


@torch.library.register_fake('mmscalablevit::linear')
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _save_for_backward(ctx, inputs: tuple, output: Tensor) -> None:
    x, weight, _ = inputs
    ctx.save_for_backward(x, weight)


def _backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    needs_x, needs_weight, needs_bias = ctx.needs_input_grad
    rows = grad.reshape(-1, grad.shape[-1])
    return (
        onednn_linear(grad, weight.t(), None) if needs_x else None,
        rows.t() @ x.reshape(-1, x.shape[-1]) if needs_weight else None,
        rows.sum(0) if needs_bias else None,
    )


torch.library.register_autograd(
    'mmscalablevit::linear', _backward, setup_context=_save_for_backward
)


@register_flop_formula(torch.ops.mmscalablevit.linear)
def _(x_shape: tuple, weight_shape: tuple, *args, **kwargs) -> int:
    return 2 * math.prod(x_shape) * weight_shape[0]
