# Copyright (c) mmscalablevit contributors. All rights reserved.
"""The results of a test are written once, by one process."""

import json
import logging
from types import SimpleNamespace

import pytest

from mmscalablevit.engine import MainProcessLoggerHook


@pytest.mark.parametrize('rank', [0, 1])
def test_rank_0_alone_writes_the_results(rank, tmp_path, monkeypatch):
    monkeypatch.setattr('mmengine.dist.utils.get_rank', lambda group=None: rank)
    tags = {'mIoU': 12.5}
    runner = SimpleNamespace(
        timestamp='20260101_000000',
        log_dir=str(tmp_path),
        logger=logging.getLogger('test'),
        test_dataloader=[0],
        log_processor=SimpleNamespace(get_log_after_epoch=lambda *args, **kwargs: (tags, '')),
    )
    hook = MainProcessLoggerHook()
    hook.before_run(runner)
    hook.after_test_epoch(runner, tags)

    written = {path.name: json.loads(path.read_text()) for path in tmp_path.iterdir()}
    assert written == ({'20260101_000000.json': tags} if rank == 0 else {})
