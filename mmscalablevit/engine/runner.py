# Copyright (c) mmscalablevit contributors. All rights reserved.
"""The runner of this package: mmengine's, for trainings that nobody watches."""

import atexit
import contextlib
import copy
import ctypes
import importlib
import inspect
import os
import os.path as osp
import signal
import sys
from collections.abc import Iterable, Iterator

import torch
from filelock import FileLock, Timeout
from mmengine.config import Config
from mmengine.dataset import worker_init_fn
from mmengine.device import get_device
from mmengine.dist import barrier, broadcast, get_rank, is_distributed, is_main_process
from mmengine.hooks import CheckpointHook, LoggerHook
from mmengine.model import is_model_wrapper, revert_sync_batchnorm
from mmengine.optim import OptimWrapper
from mmengine.registry import MODEL_WRAPPERS, RUNNERS
from mmengine.runner import Runner
from torch import nn
from torch.utils.data import DataLoader

from ..checkpoint.reading import check_values, find_weights, misfit
from ..checkpoint.released import other_arch
from ..checkpoint.weights import use_safe_loader
from ..checks.config import check_data, class_faults, config_faults, hook_faults, reordered
from ..checks.pipeline import data_sets
from ..errors import (
    DISK_ERRORS,
    CheckpointError,
    UserError,
    config_errors,
    explain,
    interruptible,
    one_line,
)
from ..work_dirs import find_checkpoint, use_checkpoint_seed
from .hosts import Ending, connect_cpus, watch_hosts

# Top-level keys of a config that are read, besides the arguments of Runner.
_OTHER_KEYS = """activation_checkpointing compile custom_imports efficient_conv_bn_eval
    find_unused_parameters model_wrapper_cfg runner_type strategy sync_bn tta_model tta_pipeline"""
KNOWN_KEYS = {*inspect.signature(Runner.__init__).parameters, *_OTHER_KEYS.split()}
# Default hooks: mmengine's, and the one that takes its place.
_REPLACED_HOOKS = (
    ('checkpoint', CheckpointHook, 'AtomicCheckpointHook'),
    ('logger', LoggerHook, 'MainProcessLoggerHook'),
)


@RUNNERS.register_module()
class SafeRunner(Runner):
    """mmengine's ``Runner`` with guards, which every tool of the toolboxes builds from a config.

    - Checkpoints are read without running code in them. What is resumed from, validated or tested
      must hold exactly the model's weights (``CheckpointError``); ``load_from`` of a training may
      differ in layers of another number of classes, which are then re-initialized.
    - A resumed training ends with the weights of one that never stopped, see ``IterSeedHook``, and
      a job that is killed leaves a whole checkpoint, see ``AtomicCheckpointHook``.
    - Faults of config and data end in one sentence (``UserError``) before the first iteration.
    - Two trainings do not share a work directory.
    - Distributed processes that end well end together, and close what connects them. One that fails
      waits for nobody: its launcher ends the others. Workers of data loaders end with their job.
    - Without an accelerator, gloo takes the place of NCCL, bfloat16 that of float16, and BN layers
      are not synchronized.
    - cuDNN's attention, which plans anew for each image size, is used with ``cudnn_sdp=True`` in
      ``env_cfg`` alone.

    Its arguments are those of mmengine's ``Runner``.

    Example:
        >>> cfg = dict(runner_type='SafeRunner', work_dir='run', log_level='ERROR')
        >>> runner = RUNNERS.build(Config(dict(cfg, model=dict(type='ScalableViT'))))
        >>> runner.load_checkpoint('none.pth')
        Traceback (most recent call last):
        FileNotFoundError: checkpoint none.pth does not exist
    """

    _part = 'train'

    @classmethod
    def from_cfg(cls, cfg: Config) -> 'SafeRunner':
        """Build a runner; ``resume`` without ``load_from`` takes the latest whole checkpoint.

        Raises:
            UserError: If something in the config is wrong.
            CheckpointError: If all checkpoints to resume from are damaged.
        """
        cfg = copy.deepcopy(cfg)
        _refuse(cfg, config_faults(cfg, KNOWN_KEYS))
        if cfg.get('resume'):
            cfg['load_from'] = cfg.get('load_from') or find_checkpoint(cfg['work_dir'])
            if cfg['load_from'] and '://' not in cfg['load_from']:
                use_checkpoint_seed(cfg, cfg['load_from'])
        use_safe_loader()
        with config_errors(cfg):
            return super().from_cfg(cfg)

    def setup_env(self, env_cfg: dict) -> None:
        """Set up the environment, and connect the processes of a distributed job."""
        connects = self.distributed and not is_distributed()
        if connects:
            # Its functions keep the group that is there when they are imported.
            importlib.import_module('torch.distributed.nn.functional')
        if connects and get_device() == 'cpu':
            connect_cpus(self.launcher)
        super().setup_env(env_cfg)
        # On Hopper and later, PyTorch may take cuDNN's attention first, which plans for each new
        # shape: up to a second for each, and a detector has new ones with nearly every batch.
        torch.backends.cuda.enable_cudnn_sdp(env_cfg.get('cudnn_sdp', False))
        self._ending = Ending()
        if connects:
            watch_hosts()
            # Not a method of the runner, which would keep the model and its group to the end.
            atexit.register(self._ending.disconnect)

    def wrap_model(self, model_wrapper_cfg: dict | None, model: nn.Module) -> nn.Module:
        """Wrap the model for distributed training, see mmengine's ``Runner``."""
        if not self.distributed or get_device() != 'cpu' or is_model_wrapper(model):
            return super().wrap_model(model_wrapper_cfg, model)
        find_unused = self.cfg.get('find_unused_parameters', False)
        wrapper = dict(find_unused_parameters=find_unused, broadcast_buffers=False)
        wrapper.update(model_wrapper_cfg or {}, device_ids=None)
        wrapper.setdefault('type', 'MMDistributedDataParallel')
        return MODEL_WRAPPERS.build(wrapper, default_args=dict(module=revert_sync_batchnorm(model)))

    def build_optim_wrapper(self, optim_wrapper: dict | OptimWrapper) -> OptimWrapper:
        """Build the optimizer wrapper, in which ``CPUAmpOptimWrapper`` replaces float16 on CPU."""
        amp = isinstance(optim_wrapper, dict) and optim_wrapper.get('type') == 'AmpOptimWrapper'
        if amp and get_device() == 'cpu':
            optim_wrapper = copy.deepcopy(optim_wrapper)
            optim_wrapper['type'] = 'CPUAmpOptimWrapper'
            for key in ('loss_scale', 'dtype', 'use_fsdp'):
                optim_wrapper.pop(key, None)
            self.logger.info('No accelerator: mixed precision runs in bfloat16 on CPU')
        return super().build_optim_wrapper(optim_wrapper)

    @staticmethod
    def build_dataloader(
        dataloader: dict | DataLoader, seed: int | None = None, diff_rank_seed: bool = False
    ) -> DataLoader:
        """Build a data loader whose samples are seeded, and whose workers end with the job."""
        if isinstance(dataloader, dict):
            dataloader = dict(dataloader)
            dataloader['dataset'] = dict(type='SeededDataset', dataset=dataloader['dataset'])
            if isinstance(dataloader.get('sampler'), dict):
                dataloader['sampler'] = dict(type='SeededSampler', sampler=dataloader['sampler'])
            quiet = dataloader.pop('disable_subprocess_warning', False)
            init = dict(type=_start_worker, seed=seed, rank=get_rank())
            init['num_workers'] = dataloader.get('num_workers', 0)
            init['disable_subprocess_warning'] = quiet
            dataloader.setdefault('worker_init_fn', init)
        return Runner.build_dataloader(dataloader, seed, diff_rank_seed)

    def register_default_hooks(self, hooks: dict | None = None) -> None:
        """Register the default hooks, with those of this package in place of mmengine's."""
        hooks = dict(hooks or {})
        hooks.setdefault('checkpoint', dict(type='CheckpointHook', interval=1))
        hooks.setdefault('logger', dict(type='LoggerHook'))
        for name, theirs, ours in _REPLACED_HOOKS:
            names = (theirs.__name__, f'mmengine.{theirs.__name__}', theirs)
            if isinstance(hooks[name], dict) and hooks[name].get('type') in names:
                hooks[name] = dict(hooks[name], type=ours)
        if hooks.setdefault('iter_seed', dict(type='IterSeedHook')) is None:
            del hooks['iter_seed']
        super().register_default_hooks(hooks)

    def call_hook(self, fn_name: str, **kwargs) -> None:
        """Call all hooks; checkpoints are checked before and after they see them."""
        if fn_name == 'after_load_checkpoint':
            self._check_weights(kwargs['checkpoint'])
        if fn_name == 'before_val_epoch':
            # Without SyncBN each rank has statistics of its own; validated is what rank 0 saves.
            for buffer in self.model.buffers():
                broadcast(buffer)
        try:
            super().call_hook(fn_name, **kwargs)
        except TypeError as error:
            # mmengine hides where in the hook it was.
            raise error from error.__context__
        if fn_name == 'after_load_checkpoint':
            if self._part == 'train' and not self._resume:
                self._keep_new_classes(kwargs['checkpoint'])
            else:
                self._check_classes(kwargs['checkpoint'])

    def load_checkpoint(
        self,
        filename: str,
        map_location: str = 'cpu',
        strict: bool = True,
        revise_keys: tuple = ((r'^module\.', ''),),
    ) -> dict:
        """Load a checkpoint strictly, whatever ``strict`` is; see mmengine's ``Runner``.

        Raises:
            CheckpointError: If it cannot be read or does not fit; the message names the difference.
        """
        self._checkpoint, self._weights = filename, {}
        use_safe_loader()
        try:
            return super().load_checkpoint(filename, map_location, True, list(revise_keys))
        except (CheckpointError, OSError):
            raise
        # A foreign file can hold anything.
        except Exception as error:
            model = self.model.module if is_model_wrapper(self.model) else self.model
            held = other_arch(model, self._weights)
            raise misfit(filename, self.cfg.filename, held or error) from error
        finally:
            self._weights = {}

    def resume(self, filename: str, *args, **kwargs) -> None:
        """Resume a training, see mmengine's ``Runner``.

        Raises:
            CheckpointError: If weights or the state of the training do not fit.
        """
        try:
            super().resume(filename, *args, **kwargs)
        except (CheckpointError, OSError, UserError):
            raise
        except Exception as error:
            raise CheckpointError(
                f'checkpoint {filename} cannot be resumed from, as its training state is missing '
                f'or does not fit {self.cfg.filename} '
                f'({one_line(f"{type(error).__name__}: {error}", 200)})'
            ) from error
        if self.iter >= self.max_iters:
            self.logger.warning(
                f'Nothing is left to train: {filename} is of iteration {self.iter} of '
                f'{self.max_iters}; a larger train_cfg.max_epochs or max_iters trains longer'
            )

    def train(self) -> nn.Module:
        """Train, see mmengine's ``Runner``.

        Raises:
            UserError: If config or data have a fault, or the work directory is in use.
            CheckpointError: If the checkpoint does not fit.
        """
        lock = lock_work_dir(self.work_dir) if is_main_process() else contextlib.nullcontext()
        with lock, self._ending, self._run('train', 'train_loop', 'val_loop'):
            return super().train()

    def val(self) -> dict:
        """Validate, see ``train``."""
        with self._ending, self._run('val', 'val_loop'):
            return super().val()

    def test(self) -> dict:
        """Test, see ``train``."""
        with self._ending, self._run('test', 'test_loop'):
            return super().test()

    @contextlib.contextmanager
    def _run(self, part: str, *loops: str) -> Iterator[None]:
        self._part = part
        try:
            self._check(loops)
            with interruptible():
                yield
        except KeyboardInterrupt as error:
            again = f'; --resume continues from the last checkpoint in {self.work_dir}'
            raise KeyboardInterrupt(f'interrupted{again if part == "train" else ""}') from error
        except OSError as error:
            # Unlike one in opening a file, an error in writing comes without its name.
            if error.errno in DISK_ERRORS and not error.filename:
                raise OSError(error.errno, error.strerror, self.work_dir) from error
            raise
        except Exception as error:
            # Not self.iter, which builds the loop, and fails again.
            done = self.message_hub.get_info('iter', 0)
            explain(error, f'config {self.cfg.filename} fails in {part}, iteration {done + 1}')
            raise
        barrier()

    def _check(self, loops: Iterable[str]) -> None:
        """Find faults of config and data before the first iteration."""
        loaders = {name.replace('loop', 'dataloader'): name for name in loops}
        if self.cfg:
            _refuse(self.cfg, config_faults(self.cfg, KNOWN_KEYS))
            check_data(self.cfg, loaders)
        for loader, name in loaders.items():
            loop = getattr(self, name)
            for leaf in data_sets(loop.dataloader.dataset) if loop else ():
                _refuse(self.cfg, class_faults(self.cfg, loader, leaf))
        if self._part == 'train':
            _refuse(self.cfg, hook_faults(self))

    def _check_weights(self, checkpoint: dict) -> None:
        # Wrappers of a model put this before its names, in the checkpoint or in the model.
        parameters, self._weights = (
            {name.removeprefix('module.'): value for name, value in state.items()}
            for state in (self.model.state_dict(), find_weights(checkpoint, self._checkpoint))
        )
        check_values(self._weights, self._checkpoint, parameters)

    def _check_classes(self, checkpoint: dict) -> None:
        """Refuse the data set's classes in another order."""
        loader = f'{self._part}_dataloader'
        dataset = getattr(self, loader).dataset
        wanted = (getattr(dataset, 'metainfo', None) or {}).get('classes') or ()
        meta = (checkpoint.get('meta') or {}).get('dataset_meta') or {}
        trained = meta.get('classes', meta.get('CLASSES')) or ()
        if reordered(trained, wanted):
            raise CheckpointError(
                f'checkpoint {self._checkpoint} was trained for the classes of {loader} in '
                f'another order: {one_line(", ".join(map(str, trained)))}'
            )

    def _keep_new_classes(self, checkpoint: dict) -> None:
        """Keep the model's own weights where the checkpoint has another number of classes."""
        model = self.model.module if is_model_wrapper(self.model) else self.model
        weights = checkpoint.get('state_dict', checkpoint)
        # The classes are the outputs of a layer, and no layer of the backbone depends on them.
        kept = {
            key: value
            for key, value in model.state_dict().items()
            if key in weights
            and not key.startswith('backbone.')
            and weights[key].shape != value.shape
            and weights[key].shape[1:] == value.shape[1:]
        }
        weights.update(kept)
        if kept:
            names = ', '.join(kept)
            self.logger.warning(f'Layers of another number of classes are re-initialized: {names}')


@contextlib.contextmanager
def lock_work_dir(work_dir: str | os.PathLike, name: str = 'training') -> Iterator[None]:
    """Refuse a work directory to all others of a name, until the block or this process ends."""
    os.makedirs(work_dir, exist_ok=True)
    try:
        held = FileLock(osp.join(work_dir, f'.{name}.lock'), timeout=0).acquire()
    except Timeout as error:
        raise UserError(
            f'{work_dir} is in use by another {name}; wait for its end, or choose another folder '
            'with --work-dir'
        ) from error
    with held:
        yield


def _refuse(cfg: Config, faults: Iterable[str]) -> None:
    for fault in faults:
        raise UserError(f'config {cfg.filename}: {fault}')


def _start_worker(worker_id: int, seed: int | None, **kwargs) -> None:
    """Let a worker end with its job: torch's wait to hand over what they loaded."""
    if sys.platform == 'linux':
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    if seed is not None:
        worker_init_fn(worker_id, seed=seed, **kwargs)
