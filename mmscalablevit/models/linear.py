# Copyright (c) mmscalablevit contributors. All rights reserved.
"""Linear layers of the network, and where they run in a faster way of the same result."""

import platform

import torch
import torch.nn.functional as F
from mmengine.utils import digit_version
from torch import Tensor, nn

# torch before 2.3 cannot tell; 2.4 brought the other questions that are asked here.
is_compiling = getattr(getattr(torch, 'compiler', None), 'is_compiling', lambda: False)
_RECENT_TORCH = digit_version(torch.__version__) >= digit_version('2.4')
_X86 = platform.machine().lower() in ('x86_64', 'amd64')
# With fewer values or one thread torch gives a 1x1 convolution to a slower kernel than oneDNN's.
_MIN_VALUES = 20480


class Linear(nn.Linear):
    """A linear layer over the last dimension, through the faster of torch's CPU kernels.

    For float32 on CPU, torch takes matrix products from MKL and convolutions from oneDNN. For the
    long and narrow products of this network oneDNN is the faster one (docs/performance.md), so that
    the layer runs there as a 1x1 convolution on a view of the same memory. Everywhere else, while
    compiling and exporting included, it is ``nn.Linear``.

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
        if not self._convolution_is_faster(x):
            return super().forward(x)
        rows = x if x.dim() == 4 else x.reshape(1, 1, -1, self.in_features)
        out = F.conv2d(rows.permute(0, 3, 1, 2), self.weight[:, :, None, None], self.bias)
        return out.permute(0, 2, 3, 1).reshape(*x.shape[:-1], self.out_features)

    def _convolution_is_faster(self, x: Tensor) -> bool:
        # First, since a compiler would guard whatever else is asked.
        return runs_eagerly_on_cpu(x) and (
            x.dtype == self.weight.dtype == torch.float32
            and x.numel() > _MIN_VALUES
            and torch.get_num_threads() > 1
            and torch.backends.mkldnn.is_available()
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
    return (
        not is_compiling()
        and not torch.jit.is_tracing()
        and x.device.type == 'cpu'
        and _X86
        and _RECENT_TORCH
    )
