# Copyright (c) mmscalablevit contributors. All rights reserved.
from ..checkpoint.reading import read_checkpoint
from ..checkpoint.weights import use_safe_loader
from ..errors import CheckpointError
from .amp import CPUAmpOptimWrapper
from .checkpoint_hook import AtomicCheckpointHook
from .layer_decay import LayerDecayOptimWrapperConstructor
from .runner import SafeRunner
from .seed_hook import IterSeedHook

__all__ = [
    'AtomicCheckpointHook',
    'CPUAmpOptimWrapper',
    'CheckpointError',
    'IterSeedHook',
    'LayerDecayOptimWrapperConstructor',
    'SafeRunner',
    'read_checkpoint',
    'use_safe_loader',
]
