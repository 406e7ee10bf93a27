# Copyright (c) mmscalablevit contributors. All rights reserved.
"""Layer-wise learning-rate decay for detectors, segmentors and classifiers."""

import logging
from numbers import Real

from mmengine.logging import MMLogger, print_log
from mmengine.optim import DefaultOptimWrapperConstructor
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS
from torch import nn

PREFIX = 'backbone.'
PARAMWISE_KEYS = set(
    """bias_decay_mult bias_lr_mult bypass_duplicate custom_keys dcn_offset_lr_mult
    dwconv_decay_mult flat_decay_mult layer_decay_rate norm_decay_mult""".split()  # noqa: SIM905
)


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class LayerDecayOptimWrapperConstructor(DefaultOptimWrapperConstructor):
    """Optimizer settings with a learning rate that falls from the head to the stem.

    On top of what mmengine's default constructor gives a parameter, its learning rate is multiplied
    by ``layer_decay_rate ** (num_layers - 1 - layer_id)``, where ``(layer_id, num_layers)`` is what
    ``model.backbone.get_layer_depth(name, 'backbone.')`` returns. ScalableViT and the backbones of
    mmpretrain have this method. Necks and heads keep the full rate, as in BEiT (arXiv 2106.08254).

    Args:
        optim_wrapper_cfg (dict): Config of the optimizer wrapper; its ``optimizer`` needs ``lr``.
        paramwise_cfg (dict): ``layer_decay_rate``, a number above 0 and up to 1, where 1 decays
            nothing; and the options of ``DefaultOptimWrapperConstructor``, which keep their
            meaning: ``lr_mult`` of ``custom_keys``, for one, multiplies the decayed rate.

    Raises:
        TypeError: If an argument has the wrong type, or the backbone has no ``get_layer_depth``.
        ValueError: If ``paramwise_cfg`` has unknown keys or an invalid rate, or ``lr`` is missing.

    Example:
        >>> from mmengine.optim import build_optim_wrapper
        >>> from mmscalablevit import ScalableViT
        >>> model = nn.Module()
        >>> model.backbone = ScalableViT('small')
        >>> wrapper = build_optim_wrapper(model, dict(
        ...     optimizer=dict(type='AdamW', lr=1e-4, weight_decay=0.05),
        ...     constructor='LayerDecayOptimWrapperConstructor',
        ...     paramwise_cfg=dict(layer_decay_rate=0.9, norm_decay_mult=0.0)))
        >>> sorted({round(group['lr'] / 1e-4, 3) for group in wrapper.optimizer.param_groups})[-3:]
        [0.729, 0.81, 0.9]
    """

    def __init__(self, optim_wrapper_cfg: dict, paramwise_cfg: dict | None = None) -> None:
        super().__init__(optim_wrapper_cfg, paramwise_cfg)
        unknown = self.paramwise_cfg.keys() - PARAMWISE_KEYS
        if unknown:
            raise ValueError(
                f'paramwise_cfg has unknown keys {sorted(unknown)}; '
                f'allowed are {sorted(PARAMWISE_KEYS)}'
            )
        rate = self.paramwise_cfg.get('layer_decay_rate')
        is_number = isinstance(rate, Real) and not isinstance(rate, bool)
        if not is_number or not 0 < rate <= 1:
            raise (ValueError if is_number else TypeError)(
                f'paramwise_cfg.layer_decay_rate must be a number above 0 and up to 1, got {rate!r}'
            )
        if self.base_lr is None:
            raise ValueError('layer_decay_rate needs optim_wrapper.optimizer.lr, which is missing')

    def add_params(
        self,
        params: list[dict],
        module: nn.Module,
        prefix: str = '',
        is_dcn_module: bool | None = None,
    ) -> None:
        """Add the parameters of a module to the groups; those of the whole model decay."""
        if prefix:
            super().add_params(params, module, prefix, is_dcn_module)
            return
        backbone = getattr(module, 'backbone', None)
        if not hasattr(backbone, 'get_layer_depth'):
            raise TypeError(
                f'backbone {type(backbone).__name__} has no method get_layer_depth(param_name, '
                f'prefix), which layer-wise learning-rate decay needs of {type(module).__name__}.'
                'backbone; ScalableViT and most backbones of mmpretrain have it'
            )
        logger = MMLogger.get_current_instance()
        logger.addFilter(_is_summary)
        try:
            super().add_params(params, module, prefix, is_dcn_module)
        finally:
            logger.removeFilter(_is_summary)
        rate = self.paramwise_cfg['layer_decay_rate']
        names = {id(param): name for name, param in module.named_parameters()}
        for group in params:
            name = names[id(group['params'][0])]
            layer, num_layers = backbone.get_layer_depth(name, PREFIX)
            group['lr_scale'] = rate ** (num_layers - 1 - layer)
            group['lr'] = group.get('lr', self.base_lr) * group['lr_scale']
        scales = [group['lr_scale'] for group in params]
        print_log(
            f'Layer-wise learning-rate decay: rate {rate}, {len(set(scales))} different learning '
            f'rates in {len(params)} parameters of {type(module).__name__} with '
            f'{type(backbone).__name__}, from {min(scales, default=1):.3g} to '
            f'{max(scales, default=1):.3g} of the base rate {self.base_lr}',
            logger='current',
        )


def _is_summary(record: logging.LogRecord) -> bool:
    # mmengine logs a line for every setting of every parameter, here with rates yet to be decayed.
    return not record.getMessage().startswith('paramwise_options --')
