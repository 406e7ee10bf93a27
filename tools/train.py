# Copyright (c) mmscalablevit contributors. All rights reserved.
"""Train a detector, segmentor or classifier from its config."""

import argparse
import importlib.util

from mmengine.config import Config

from mmscalablevit import cli
from mmscalablevit.checkpoint.reading import check_file

# Tracker: backend of mmengine, the package it needs.
TRACKERS = {
    'tensorboard': ('TensorboardVisBackend', 'tensorboard'),
    'wandb': ('WandbVisBackend', 'wandb'),
    'mlflow': ('MLflowVisBackend', 'mlflow'),
}


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        formatter_class=cli.HelpFormatter,
        description='Train a detector, segmentor or classifier.',
        epilog='example: python tools/train.py '
        'configs/detection/mask-rcnn_scalablevit-s_fpn_1x_coco.py --amp',
    )
    parser.add_argument('config', help='config file')
    help_ = 'mixed precision: float16, or bfloat16 on CPU'
    parser.add_argument('--amp', action='store_true', help=help_)
    help_ = "scale the learning rate from the config's base batch size to the actual one"
    parser.add_argument('--auto-scale-lr', action='store_true', help=help_)
    help_ = 'continue from this checkpoint, or from the latest one in the work directory'
    parser.add_argument('--resume', nargs='?', const='auto', metavar='CHECKPOINT', help=help_)
    help_ = 'log to this experiment tracker besides the files'
    parser.add_argument('--tracker', choices=TRACKERS, help=help_)
    cli.add_common_arguments(parser)
    return cli.parse_args(parser)


def enable_amp(cfg: Config) -> None:
    """Turn on mixed precision."""
    if not cfg.get('optim_wrapper'):
        raise cli.UserError(f'--amp needs an optim_wrapper in {cfg.filename}')
    wrapper = cfg.optim_wrapper.get('type', 'OptimWrapper')
    if wrapper not in ('OptimWrapper', 'AmpOptimWrapper'):
        raise cli.UserError(f'--amp needs optim_wrapper.type=OptimWrapper, got {wrapper}')
    cfg.optim_wrapper.type = 'AmpOptimWrapper'
    cfg.optim_wrapper.setdefault('loss_scale', 'dynamic')


def enable_auto_scale_lr(cfg: Config) -> None:
    """Let the runner scale the learning rate."""
    if 'base_batch_size' not in (cfg.get('auto_scale_lr') or {}):
        key = 'auto_scale_lr.base_batch_size'
        raise cli.UserError(f'--auto-scale-lr needs {key} in {cfg.filename}')
    cfg.auto_scale_lr.enable = True


def set_resume(cfg: Config, checkpoint: str) -> None:
    """Continue from a checkpoint file, or with 'auto' from the work directory's latest."""
    if checkpoint != 'auto' and '://' not in checkpoint:
        check_file(checkpoint)
    cfg.resume = True
    cfg.load_from = None if checkpoint == 'auto' else checkpoint


def add_tracker(cfg: Config, name: str) -> None:
    """Log to an experiment tracker, too."""
    backend, package = TRACKERS[name]
    if importlib.util.find_spec(package) is None:
        raise cli.UserError(f'--tracker {name} needs: pip install {package}')
    if not cfg.get('visualizer'):
        raise cli.UserError(f'--tracker needs a visualizer in {cfg.filename}')
    backends = cfg.visualizer.get('vis_backends') or [dict(type='LocalVisBackend')]
    if all(given['type'] != backend for given in backends):
        cfg.visualizer.vis_backends = [*backends, dict(type=backend)]


def main() -> None:
    """Train."""
    args = parse_args()
    cfg = cli.load_config(args)
    if args.amp:
        enable_amp(cfg)
    if args.auto_scale_lr:
        enable_auto_scale_lr(cfg)
    if args.resume:
        set_resume(cfg, args.resume)
    if args.tracker:
        add_tracker(cfg, args.tracker)
    cli.build_runner(cfg).train()


if __name__ == '__main__':
    cli.run(main)
