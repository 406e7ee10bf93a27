# Copyright (c) mmscalablevit contributors. All rights reserved.
"""Logs of a distributed job, which one process writes."""

from mmengine.dist import master_only
from mmengine.hooks import LoggerHook
from mmengine.registry import HOOKS
from mmengine.runner import Runner


@HOOKS.register_module()
class MainProcessLoggerHook(LoggerHook):
    """mmengine's ``LoggerHook`` and its arguments, where rank 0 alone writes a test's results.

    With mmengine's all ranks write to this file at once, and it can end up as no valid JSON.

    Example:
        >>> default_hooks = dict(logger=dict(type='MainProcessLoggerHook', interval=50))
    """

    @master_only
    def after_test_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        """Log the metrics, and write them to ``TIMESTAMP/TIMESTAMP.json``."""
        super().after_test_epoch(runner, metrics)
