# Copyright (c) mmscalablevit contributors. All rights reserved.
"""Train a detector, segmentor or classifier from its config."""

import argparse
import os.path as osp

from mmengine.config import Config

# Imported before any toolbox: the package makes a torchvision that lacks its compiled half
# importable.
from mmscalablevit.engine import cli


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description='Train a detector, segmentor or classifier.',
        epilog='example: python tools/train.py '
        'configs/detection/mask-rcnn_scalablevit-s_fpn_1x_coco.py --amp',
    )
    parser.add_argument('config', help='config file')
    parser.add_argument(
        '--amp', action='store_true', help='mixed precision: float16, or bfloat16 on CPU'
    )
    parser.add_argument(
        '--auto-scale-lr',
        action='store_true',
        help="scale the learning rate from the config's base batch size to the actual one",
    )
    parser.add_argument(
        '--resume',
        nargs='?',
        const='auto',
        metavar='CHECKPOINT',
        help='continue from this checkpoint, or from the latest one in the work directory',
    )
    cli.add_common_arguments(parser)
    return cli.parse_args(parser)


def enable_amp(cfg: Config) -> None:
    """Turn on mixed precision."""
    wrapper = cfg.optim_wrapper.get('type', 'OptimWrapper')
    if wrapper not in ('OptimWrapper', 'AmpOptimWrapper'):
        raise cli.UserError(f'--amp needs optim_wrapper.type=OptimWrapper, got {wrapper}')
    cfg.optim_wrapper.type = 'AmpOptimWrapper'
    cfg.optim_wrapper.setdefault('loss_scale', 'dynamic')


def enable_auto_scale_lr(cfg: Config) -> None:
    """Let the runner scale the learning rate."""
    if 'base_batch_size' not in (cfg.get('auto_scale_lr') or {}):
        raise cli.UserError(
            f'--auto-scale-lr needs auto_scale_lr.base_batch_size in {cfg.filename}'
        )
    cfg.auto_scale_lr.enable = True


def set_resume(cfg: Config, checkpoint: str) -> None:
    """Continue from a checkpoint file, or with 'auto' from the work directory's latest."""
    if checkpoint != 'auto' and '://' not in checkpoint and not osp.isfile(checkpoint):
        raise cli.UserError(f'--resume: checkpoint {checkpoint} does not exist')
    cfg.resume = True
    cfg.load_from = None if checkpoint == 'auto' else checkpoint


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
    cli.check_data(cfg, ('train_dataloader', 'val_dataloader'))
    runner = cli.build_runner(cfg, ('train_loop', 'val_loop'), strict=cfg.get('resume', False))
    runner.train()


if __name__ == '__main__':
    cli.run(main)
