# Copyright (c) mmscalablevit contributors. All rights reserved.
"""Evaluate a checkpoint on the test set of its config."""

import argparse
import os
import os.path as osp

from mmengine.config import Config, ConfigDict
from mmengine.dist import is_main_process
from mmengine.utils import mkdir_or_exist

from mmscalablevit import cli
from mmscalablevit.checkpoint.reading import check_file

# Launcher: the variable in which mmengine looks for its number of processes.
WORLD_SIZES = {'pytorch': 'WORLD_SIZE', 'slurm': 'SLURM_NTASKS', 'mpi': 'OMPI_COMM_WORLD_SIZE'}


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        formatter_class=cli.HelpFormatter,
        description='Evaluate a checkpoint on the test set of its config.',
        epilog='example: python tools/test.py '
        'configs/detection/mask-rcnn_scalablevit-s_fpn_1x_coco.py '
        'work_dirs/mask-rcnn_scalablevit-s_fpn_1x_coco/epoch_12.pth --show-dir pictures',
    )
    parser.add_argument('config', help='config file')
    parser.add_argument('checkpoint', help='checkpoint of the whole model')
    help_ = (
        'where predictions are written: a .pkl file for detection and classification, '
        'a folder of png label maps for segmentation'
    )
    parser.add_argument('--out', help=help_)
    parser.add_argument('--show-dir', help='folder for pictures of the predictions')
    parser.add_argument('--tta', action='store_true', help='test-time augmentation')
    cli.add_common_arguments(parser)
    return cli.parse_args(parser)


def set_out(cfg: Config, out: str) -> None:
    """Write predictions to a file or, for segmentation, to a folder."""
    metrics = cfg.test_evaluator if isinstance(cfg.test_evaluator, list) else [cfg.test_evaluator]
    if cfg.default_scope != 'mmseg':
        if not out.endswith(('.pkl', '.pickle')):
            raise cli.UserError(f'--out must end in .pkl for {cfg.default_scope}, got {out}')
        mkdir_or_exist(osp.dirname(osp.abspath(out)))
        dump = 'DumpDetResults' if cfg.default_scope == 'mmdet' else 'DumpResults'
        cfg.test_evaluator = [*metrics, dict(type=dump, out_file_path=out)]
        return
    if osp.splitext(out)[1] or osp.isfile(out):
        raise cli.UserError(f'--out must be a folder for mmseg, got {out}')
    for metric in metrics:
        if metric.type == 'IoUMetric':
            metric.output_dir = out
            # mmseg makes it in the first process alone, and others may write to it before that.
            mkdir_or_exist(out)
            return
    raise cli.UserError(f'--out needs an IoUMetric among the test_evaluator of {cfg.filename}')


def set_show_dir(cfg: Config, show_dir: str) -> None:
    """Draw every prediction."""
    processes = int(os.environ.get(WORLD_SIZES.get(cfg.launcher, ''), 1))
    # The visualizers of mm packages draw in the first process alone.
    if processes > 1:
        raise cli.UserError(
            f'--show-dir draws the images of one process only, and there are {processes}; test '
            'with one, or write the predictions of all with --out'
        )
    hook = cfg.get('default_hooks', {}).get('visualization')
    if hook is None:
        raise cli.UserError(f'--show-dir needs default_hooks.visualization in {cfg.filename}')
    # mmdet joins a relative path to its work directory.
    show_dir = osp.abspath(show_dir)
    if cfg.default_scope == 'mmdet':
        hook.update(draw=True, test_out_dir=show_dir)
    elif cfg.default_scope == 'mmseg':
        hook.update(draw=True)
        cfg.visualizer.save_dir = show_dir
    else:
        hook.update(enable=True, interval=1, out_dir=show_dir)


def enable_tta(cfg: Config) -> None:
    """Replace model and pipeline by those for test-time augmentation."""
    for key in ('tta_model', 'tta_pipeline'):
        if key not in cfg:
            place = f'{cfg.filename} (mmdet augments boxes only)'
            raise cli.UserError(f'--tta needs {key}, which is missing in {place}')
    cfg.model = ConfigDict(**cfg.tta_model, module=cfg.model)
    dataset = cfg.test_dataloader.dataset
    while 'dataset' in dataset:
        dataset = dataset.dataset
    dataset.pipeline = cfg.tta_pipeline


def main() -> None:
    """Evaluate."""
    args = parse_args()
    cfg = cli.load_config(args)
    if '://' not in args.checkpoint:
        check_file(args.checkpoint)
    cfg.load_from = args.checkpoint
    cfg.resume = False
    if args.out:
        set_out(cfg, args.out)
    if args.show_dir:
        set_show_dir(cfg, args.show_dir)
    if args.tta:
        enable_tta(cfg)
    cli.build_runner(cfg).test()
    if is_main_process():
        for path in filter(None, (args.out, args.show_dir)):
            print(f'wrote {path}')


if __name__ == '__main__':
    cli.run(main)
