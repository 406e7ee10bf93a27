# Copyright (c) mmscalablevit contributors. All rights reserved.
"""What a released checkpoint holds, and its keys in our names."""

import torch
from torch import nn


def load_backbone_checkpoint(
    model: nn.Module, checkpoint: str, prefix: str | None = None, map_location: str = 'cpu'
) -> None:
    """Load a checkpoint file into a backbone, strictly."""
    state = torch.load(checkpoint, map_location=map_location, weights_only=True)
    state = state.get('state_dict', state.get('model', state))
    if prefix:
        state = {k[len(prefix) :]: v for k, v in state.items() if k.startswith(prefix)}
    model.load_state_dict(state, strict=True)
