# Copyright (c) mmscalablevit contributors. All rights reserved.
from .amp import CPUAmpOptimWrapper
from .checkpoint_hook import AtomicCheckpointHook
from .layer_decay import LayerDecayOptimWrapperConstructor
from .logger_hook import MainProcessLoggerHook
from .runner import SafeRunner
from .seed_hook import IterSeedHook

__all__ = [
    'AtomicCheckpointHook',
    'CPUAmpOptimWrapper',
    'IterSeedHook',
    'LayerDecayOptimWrapperConstructor',
    'MainProcessLoggerHook',
    'SafeRunner',
]
