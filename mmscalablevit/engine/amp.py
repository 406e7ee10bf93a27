# Copyright (c) mmscalablevit contributors. All rights reserved.
"""Mixed precision on machines without an accelerator."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from mmengine.optim import OptimWrapper
from mmengine.registry import OPTIM_WRAPPERS
from mmengine.utils import apply_to
from torch import nn


@OPTIM_WRAPPERS.register_module()
class CPUAmpOptimWrapper(OptimWrapper):
    """Training under bfloat16 autocast on CPU.

    bfloat16 has the range of float32, so no loss scaling is needed. mmcv's compiled operations know
    no bfloat16 on CPU: what reaches them in training, the input of RoI extractors and the
    predictions of dense heads (for NMS), is kept in float32.

    Example:
        >>> import torch
        >>> from mmengine.optim import build_optim_wrapper
        >>> model = torch.nn.Linear(2, 2)
        >>> wrapper = build_optim_wrapper(model, dict(
        ...     type='CPUAmpOptimWrapper', optimizer=dict(type='AdamW', lr=1e-4)))
        >>> with wrapper.optim_context(model):
        ...     print(model(torch.ones(1, 2)).dtype)
        torch.bfloat16
    """

    @contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        """Put a forward pass of a model under autocast."""
        hooks = []
        for module in model.modules():
            if hasattr(module, 'roi_layers'):
                hooks.append(module.register_forward_pre_hook(lambda _, args: _to_float32(args)))
            if hasattr(module, 'predict_by_feat'):
                hooks.append(module.register_forward_hook(lambda _, args, out: _to_float32(out)))
        try:
            with super().optim_context(model), torch.autocast('cpu', dtype=torch.bfloat16):
                yield
        finally:
            for hook in hooks:
                hook.remove()


def _to_float32(data: Any) -> Any:
    return apply_to(
        data,
        lambda x: isinstance(x, torch.Tensor) and x.dtype == torch.bfloat16,
        torch.Tensor.float,
    )
