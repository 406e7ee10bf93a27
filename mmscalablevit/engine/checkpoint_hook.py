# Copyright (c) mmscalablevit contributors. All rights reserved.
"""Checkpoints of which a whole one is on the disk at every moment."""

import contextlib
import os
import os.path as osp

from mmengine.fileio import LocalBackend, register_backend
from mmengine.hooks import CheckpointHook
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from mmengine.utils import mkdir_or_exist

# Folder: files in it that are removed once the next file is there.
_OUTDATED: dict[str, set[str]] = {}


class AtomicLocalBackend(LocalBackend):
    """mmengine's backend of local files, with a whole file on the disk at every moment.

    A file is written as ``FILE.tmp``, flushed to the disk, and then takes its name. One that is
    removed stays until the next one of its folder is written: mmengine removes an outdated
    checkpoint before it writes the one that replaces it. Registered as ``atomic_local``.
    """

    def put(self, obj: bytes, filepath: str | os.PathLike) -> None:
        """Write a file, or leave it as it was where this fails; then remove what is outdated."""
        path = osp.abspath(filepath)
        temporary = f'{path}.tmp'
        outdated = _OUTDATED.pop(osp.dirname(path), set()) - {path}
        try:
            mkdir_or_exist(osp.dirname(path))
            with open(temporary, 'wb') as file:
                file.write(obj)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            # An error in writing, unlike one in opening, comes without the name of the file.
            raise OSError(error.errno, error.strerror, path) from error
        for old in outdated:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(old)

    def remove(self, filepath: str | os.PathLike) -> None:
        """Remove a file once the next one of its folder is written."""
        path = osp.abspath(filepath)
        _OUTDATED.setdefault(osp.dirname(path), set()).add(path)


register_backend('atomic_local', AtomicLocalBackend)


@HOOKS.register_module()
class AtomicCheckpointHook(CheckpointHook):
    """mmengine's ``CheckpointHook`` and its arguments, with files of ``AtomicLocalBackend``.

    The disk must hold one checkpoint more than ``max_keep_ckpts``. Checkpoints on remote storage
    (``out_dir`` with '://') are written by its own backend.

    Example:
        >>> default_hooks = dict(
        ...     checkpoint=dict(type='AtomicCheckpointHook', interval=1, max_keep_ckpts=3))
    """

    def before_train(self, runner: Runner) -> None:
        """Choose the backend that writes the files."""
        given = self.backend_args or self.file_client_args
        if not given and '://' not in str(self.out_dir or runner.work_dir):
            self.backend_args = dict(backend='atomic_local')
        super().before_train(runner)
