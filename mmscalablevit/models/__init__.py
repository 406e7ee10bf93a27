# Copyright (c) mmscalablevit contributors. All rights reserved.
from .attention import InteractiveWindowSelfAttention, ScalableSelfAttention
from .embedding import PatchEmbed, PositionEncodingGenerator
from .scalablevit import ScalableViT

__all__ = [
    'InteractiveWindowSelfAttention',
    'PatchEmbed',
    'PositionEncodingGenerator',
    'ScalableSelfAttention',
    'ScalableViT',
]
