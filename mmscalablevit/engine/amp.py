# Copyright (c) mmscalablevit contributors. All rights reserved.
"""Mixed precision on machines without an accelerator."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
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
        with ExitStack() as hooks:
            for module in model.modules():
                if hasattr(module, 'roi_layers'):
                    hooks.enter_context(module.register_forward_pre_hook(_to_float32))
                if hasattr(module, 'predict_by_feat'):
                    hooks.enter_context(module.register_forward_hook(_to_float32))
            with super().optim_context(model), torch.autocast('cpu', dtype=torch.bfloat16):
                yield


def _to_float32(*hooked: Any) -> Any:
    """Convert the last that a hook is given: a module's arguments, or its output."""

    def is_bfloat16(x: Any) -> bool:
        return isinstance(x, torch.Tensor) and x.dtype == torch.bfloat16

    return apply_to(hooked[-1], is_bfloat16, torch.Tensor.float)
