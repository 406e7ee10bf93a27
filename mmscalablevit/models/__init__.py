# Copyright (c) mmscalablevit contributors. All rights reserved.
from .attention import InteractiveWindowSelfAttention, ScalableSelfAttention
from .layers import PatchEmbed, PositionEncodingGenerator
from .scalablevit import ScalableViT

__all__ = [
    'InteractiveWindowSelfAttention',
    'PatchEmbed',
    'PositionEncodingGenerator',
    'ScalableSelfAttention',
    'ScalableViT',
]
