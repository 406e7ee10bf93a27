# Copyright (c) mmscalablevit contributors. All rights reserved.
from .amp import CPUAmpOptimWrapper
from .checkpoint import CheckpointError, read_checkpoint, use_safe_loader
from .layer_decay import LayerDecayOptimWrapperConstructor
from .resume import AtomicCheckpointHook, IterSeedHook

__all__ = [
    'AtomicCheckpointHook',
    'CPUAmpOptimWrapper',
    'CheckpointError',
    'IterSeedHook',
    'LayerDecayOptimWrapperConstructor',
    'read_checkpoint',
    'use_safe_loader',
]
