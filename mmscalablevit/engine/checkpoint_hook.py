# Copyright (c) mmscalablevit contributors. All rights reserved.
"""Training that goes on where it was cut off: whole checkpoints and the same random numbers."""

import contextlib
import os
import os.path as osp
from collections import deque

from mmengine.config import Config
from mmengine.dist import is_main_process
from mmengine.fileio import LocalBackend, register_backend
from mmengine.hooks import CheckpointHook
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from mmengine.utils import mkdir_or_exist


class AtomicLocalBackend(LocalBackend):
    """mmengine's backend of local files, which writes a file as a whole or not at all.

    The content goes to a temporary file beside it, ``FILE.tmp``, is flushed to the disk, and then
    takes the name. Registered as ``atomic_local``.

    Example:
        >>> from mmengine.fileio import get_file_backend
        >>> backend = get_file_backend(backend_args=dict(backend='atomic_local'))
        >>> backend.put(b'weights', '/tmp/whole.pth')
        >>> backend.get('/tmp/whole.pth')
        b'weights'
    """

    def put(self, obj: bytes, filepath: str | os.PathLike) -> None:
        """Write bytes to a file.

        Args:
            obj (bytes): The content.
            filepath (str | os.PathLike): The file; its folder is made if there is none.

        Raises:
            OSError: If it cannot be written, on a full disk for example; the file is as it was,
                and the error names it.
        """
        path = os.fspath(filepath)
        temporary = f'{path}.tmp'
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

    def put_text(self, obj: str, filepath: str | os.PathLike, encoding: str = 'utf-8') -> None:
        """Write text to a file.

        Args:
            obj (str): The content.
            filepath (str | os.PathLike): The file; its folder is made if there is none.
            encoding (str): Encoding of the text. Defaults to 'utf-8'.

        Raises:
            OSError: As ``put``.
        """
        self.put(obj.encode(encoding), filepath)


register_backend('atomic_local', AtomicLocalBackend)


@HOOKS.register_module()
class AtomicCheckpointHook(CheckpointHook):
    """mmengine's ``CheckpointHook``, with a whole checkpoint on the disk at every moment.

    mmengine removes an outdated checkpoint before it writes the next one, and writes in place, so
    that a job killed in between, or a full disk, can leave no checkpoint at all. Here files are
    written by ``AtomicLocalBackend``, ``last_checkpoint`` included, and what they replace is
    removed after them. The disk must hold one checkpoint more than ``max_keep_ckpts``.

    Checkpoints on remote storage (``out_dir`` with '://') are written by its own backend. A
    validation that was cut off is not repeated by the resumed job; its result is missing in the
    logs and in the choice of the best checkpoint.

    Args:
        **kwargs: Arguments of ``CheckpointHook``.

    Example:
        >>> default_hooks = dict(
        ...     checkpoint=dict(type='AtomicCheckpointHook', interval=1, max_keep_ckpts=3))
    """

    def before_train(self, runner: Runner) -> None:
        """Choose the backend that writes the files.

        Args:
            runner (Runner): The runner of the training.
        """
        given = self.backend_args or self.file_client_args
        if not given and '://' not in str(self.out_dir or runner.work_dir):
            self.backend_args = dict(backend='atomic_local')
        super().before_train(runner)

    def _save_checkpoint_with_step(self, runner: Runner, step: int, meta: dict) -> None:
        outdated = []
        if self.max_keep_ckpts > 0:
            steps = [*(kept for kept in self.keep_ckpt_ids if kept != step), step]
            outdated = steps[: -self.max_keep_ckpts]
            self.keep_ckpt_ids = deque(steps, self.max_keep_ckpts)
            # With the outdated ones: a job killed before their removal removes them when resumed.
            runner.message_hub.update_info('keep_ckpt_ids', steps)

        filename = self.filename_tmpl.format(step)
        self.last_ckpt = self.file_backend.join_path(self.out_dir, filename)
        runner.message_hub.update_info('last_ckpt', self.last_ckpt)
        runner.save_checkpoint(
            self.out_dir,
            filename,
            self.file_client_args,
            save_optimizer=self.save_optimizer,
            save_param_scheduler=self.save_param_scheduler,
            meta=meta,
            by_epoch=self.by_epoch,
            backend_args=self.backend_args,
            **self.args,
        )
        if not is_main_process():
            return
        AtomicLocalBackend().put_text(self.last_ckpt, osp.join(runner.work_dir, 'last_checkpoint'))
        for old in outdated:
            name = self.filename_tmpl.format(old)
            self._remove(self.file_backend.join_path(self.out_dir, name), {self.last_ckpt})

    def _save_best_checkpoint(self, runner: Runner, metrics: dict) -> None:
        if not self.save_best:
            return
        previous = self._best()
        # Not knowing the previous one, mmengine does not remove it before it saves the next.
        self._set_best(dict.fromkeys(previous))
        super()._save_best_checkpoint(runner, metrics)
        current = {key: path or previous.get(key) for key, path in self._best().items()}
        self._set_best(current)
        if is_main_process():
            for path in previous.values():
                # A resumed checkpoint names it, perhaps in the folder of another training.
                if path and osp.dirname(path) == self.out_dir:
                    self._remove(path, set(current.values()))

    def _best(self) -> dict[str, str | None]:
        if len(self.key_indicators) == 1:
            return {'': self.best_ckpt_path}
        return dict(self.best_ckpt_path_dict)

    def _set_best(self, paths: dict[str, str | None]) -> None:
        if len(self.key_indicators) == 1:
            self.best_ckpt_path = paths['']
        else:
            self.best_ckpt_path_dict = dict(paths)

    def _remove(self, path: str | None, kept: set[str]) -> None:
        if path is None or path in kept:
            return
        if self.file_backend.isfile(path):
            self.file_backend.remove(path)
        # DeepSpeed saves folders.
        elif self.file_backend.isdir(path):
            self.file_backend.rmtree(path)


def use_resumable_hooks(cfg: Config) -> None:
    """Let a config's training be resumable to the same result: its hooks are replaced or added.

    Args:
        cfg (Config): The config; mmengine's ``CheckpointHook`` becomes ``AtomicCheckpointHook``,
            and ``IterSeedHook`` is added if it is not there.

    Example:
        >>> cfg = Config(dict(default_hooks=dict(checkpoint=dict(type='CheckpointHook'))))
        >>> use_resumable_hooks(cfg)
        >>> [hook.type for hook in cfg.default_hooks.values()]
        ['AtomicCheckpointHook', 'IterSeedHook']
    """
    if not cfg.get('default_hooks'):
        cfg.default_hooks = {}
    hooks = cfg.default_hooks
    # mmengine's own default.
    hooks.setdefault('checkpoint', dict(type='CheckpointHook', interval=1))
    names = ('CheckpointHook', 'mmengine.CheckpointHook', CheckpointHook)
    if hooks.checkpoint and hooks.checkpoint.get('type') in names:
        hooks.checkpoint.type = 'AtomicCheckpointHook'
    hooks.setdefault('iter_seed', dict(type='IterSeedHook'))
