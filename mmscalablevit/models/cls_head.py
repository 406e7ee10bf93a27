# Copyright (c) mmscalablevit contributors. All rights reserved.
"""The classification head of the released models; needs mmpretrain.

Not imported by ``import mmscalablevit``: a config that uses it names it after the package,
``custom_imports = dict(imports=['mmscalablevit', 'mmscalablevit.models.cls_head'])``.
"""

from __future__ import annotations

from torch import Tensor, nn

try:
    from mmpretrain.models import ClsHead
    from mmpretrain.registry import MODELS
except ImportError as error:
    # Not an ImportError: mmengine drops the words of one that is raised in custom_imports.
    raise RuntimeError(
        f'ScalableViTClsHead needs mmpretrain, which cannot be imported ({error}); install '
        'onedl-mmpretrain or the original mmpretrain'
    ) from error


@MODELS.register_module()
class ScalableViTClsHead(ClsHead):
    """Head of the released ScalableViT classifiers.

    Linear layer, LayerNorm, GELU and the classifying linear layer, on features that were normed and
    pooled. The released models use a width of 4096, which the paper does not mention.

    Args:
        num_classes (int): Number of classes.
        in_channels (int): Channels of the backbone's last stage.
        hidden_channels (int, optional): Width of the hidden layer; None for a plain linear
            classifier. Defaults to 4096.
        init_cfg (dict | list[dict], optional): Initialization. Defaults to None: truncated normal
            of standard deviation 0.02 for linear layers, as released.
        **kwargs: ``loss``, ``topk`` and ``cal_acc`` of mmpretrain's ``ClsHead``.

    Example:
        >>> import torch
        >>> from mmengine.registry import init_default_scope
        >>> init_default_scope('mmpretrain')
        >>> head = ScalableViTClsHead(num_classes=10, in_channels=64, hidden_channels=128)
        >>> head((torch.rand(2, 64),)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        num_classes: int,
        in_channels: int,
        hidden_channels: int | None = 4096,
        init_cfg: dict | list[dict] | None = None,
        **kwargs,
    ) -> None:
        numbers = dict(num_classes=num_classes, in_channels=in_channels)
        if hidden_channels is not None:
            numbers['hidden_channels'] = hidden_channels
        for name, number in numbers.items():
            if type(number) is not int or number < 1:
                raise ValueError(f'{name} must be a positive integer, got {number!r}')
        init_cfg = init_cfg or dict(type='TruncNormal', layer='Linear', std=0.02)
        super().__init__(init_cfg=init_cfg, **kwargs)
        # The names inside are those of the released `head`.
        if hidden_channels is None:
            self.fc = nn.Linear(in_channels, num_classes)
            return
        self.fc = nn.Sequential(
            nn.Linear(in_channels, hidden_channels),
            nn.LayerNorm(hidden_channels, eps=1e-6),
            nn.GELU(),
            nn.Linear(hidden_channels, num_classes),
        )

    def pre_logits(self, feats: tuple[Tensor, ...]) -> Tensor:
        """Compute what the last linear layer classifies, of shape (B, C), of the last feature."""
        return self.fc[:-1](feats[-1]) if isinstance(self.fc, nn.Sequential) else feats[-1]

    def forward(self, feats: tuple[Tensor, ...]) -> Tensor:
        """Compute logits of shape (B, num_classes) of pooled features, the last (B, C) of them."""
        return self.fc(feats[-1])
