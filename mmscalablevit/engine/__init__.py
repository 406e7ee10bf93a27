# Copyright (c) mmscalablevit contributors. All rights reserved.
from .amp import CPUAmpOptimWrapper
from .checkpoint import CheckpointError, read_checkpoint, use_safe_loader

__all__ = ['CPUAmpOptimWrapper', 'CheckpointError', 'read_checkpoint', 'use_safe_loader']
