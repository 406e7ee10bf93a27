# Copyright (c) mmscalablevit contributors. All rights reserved.
"""Say exactly what is missing or wrong in COCO, ADE20K or the data sets of a config.

Training and evaluation fail late on some faults and ignore others without a word: a class whose
name is spelled otherwise in the annotations, masks saved as colors, photographs that are turned by
their EXIF tag. This reads what the data loaders of a config would read and lists every such fault.
"""

import argparse
import os.path as osp
import sys
from pathlib import Path

from mmengine.config import Config, ConfigDict
from mmengine.registry import DATASETS, init_default_scope

from mmscalablevit import cli
from mmscalablevit.checks.config import check_data_set, class_faults
from mmscalablevit.checks.files import SAMPLE, all_exist
from mmscalablevit.checks.findings import Findings
from mmscalablevit.checks.pipeline import data_sets
from mmscalablevit.errors import UserError

CONFIGS = Path(__file__).parents[1] / 'configs'
STANDARD = {
    'coco': CONFIGS / 'detection' / 'mask-rcnn_scalablevit-s_fpn_1x_coco.py',
    'ade20k': CONFIGS / 'segmentation' / 'scalablevit-s_upernet_8xb2-160k_ade20k-512x512.py',
}
# Images of the official sets, by data set class and name of annotation file or image folder.
OFFICIAL_COUNTS = {
    ('CocoDataset', 'instances_train2017.json'): 118287,
    ('CocoDataset', 'instances_val2017.json'): 5000,
    ('ADE20KDataset', 'training'): 20210,
    ('ADE20KDataset', 'validation'): 2000,
}


def check_dataset(cfg: Config, loader: str, leaf: ConfigDict, full: bool) -> tuple[str, Findings]:
    """Check one data set of a config."""
    findings = Findings()
    root = leaf.get('data_root')
    if root and '://' not in root and not all_exist([(osp.isdir, root)], findings):
        return '', findings
    try:
        summary = check_data_set(cfg, loader, leaf, findings, full)
        dataset = DATASETS.build(dict(leaf, pipeline=[], lazy_init=True))
    except (AssertionError, KeyError, TypeError, ValueError) as error:
        fault = f'{type(error).__name__}: {error}'
        raise UserError(f'{loader}: the data set cannot be built: {fault}') from error
    if summary is None:
        raise UserError(
            f'{loader}: {type(dataset).__name__} cannot be checked, only boxes and masks of mmdet '
            'and images with label maps of mmseg in local files'
        )
    for fault in class_faults(cfg, loader, dataset):
        findings.error(*fault.split(', but ', 1))
    if loader != 'train_dataloader' and dataset.ann_file:
        check_evaluator(cfg, loader, dataset.ann_file, findings)
    prefix = dataset.data_prefix.get('img_path')
    name = osp.basename(osp.normpath(prefix) if prefix else dataset.ann_file)
    official = OFFICIAL_COUNTS.get((leaf.type, name)) if 'metainfo' not in leaf else None
    if summary and official and not summary.startswith(f'{official} '):
        findings.warn(f'the official set has {official} images', summary)
    return summary, findings


def check_evaluator(cfg: Config, loader: str, ann_file: str, findings: Findings) -> None:
    """See that the metric reads the annotations that the data set has."""
    key = loader.replace('dataloader', 'evaluator')
    evaluators = cfg.get(key) or []
    for evaluator in evaluators if isinstance(evaluators, list) else [evaluators]:
        other = evaluator.get('ann_file')
        if other and osp.realpath(other) != osp.realpath(ann_file):
            findings.error(f'must be {ann_file}, as in {loader}', f'{key}.ann_file={other}')


def set_root(cfg: Config, root: str) -> None:
    """Put another folder in the place of the standard one."""
    for loader in ('train_dataloader', 'val_dataloader', 'test_dataloader'):
        cfg[loader].dataset.data_root = root
    for key in ('val_evaluator', 'test_evaluator'):
        if 'ann_file' in cfg[key]:
            cfg[key].ann_file = osp.join(root, 'annotations', osp.basename(cfg[key].ann_file))


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        formatter_class=cli.HelpFormatter,
        description='List what is missing or wrong in the data. Exit code 0: no errors.',
        epilog='example: python tools/check_data.py coco --root data/coco',
    )
    help_ = 'a standard data set, or a config whose data sets and number of classes are checked'
    parser.add_argument('config', metavar='coco|ade20k|CONFIG', help=help_)
    help_ = 'folder of coco or ade20k; default: data/coco, data/ade/ADEChallengeData2016'
    parser.add_argument('--root', help=help_)
    help_ = f'open every image and mask, not {SAMPLE} of each set'
    parser.add_argument('--full', action='store_true', help=help_)
    cli.add_config_options(parser)
    parser.set_defaults(work_dir=None, launcher='none', local_rank=0)
    return cli.parse_args(parser)


def main() -> None:
    """Check."""
    args = parse_args()
    standard = args.config in STANDARD
    if args.root and not standard:
        raise UserError(
            '--root belongs to coco and ade20k; for a config: '
            '--cfg-options train_dataloader.dataset.data_root=DIR'
        )
    args.config = str(STANDARD.get(args.config, args.config))
    cfg = cli.load_config(args)
    if args.root:
        set_root(cfg, args.root)
    init_default_scope(cfg.get('default_scope', 'mmengine'))

    done, errors = [], 0
    for loader in ('train_dataloader', 'val_dataloader', 'test_dataloader'):
        for leaf in data_sets((cfg.get(loader) or {}).get('dataset') or ConfigDict()):
            if not leaf or leaf in done:
                continue
            done.append(leaf)
            summary, findings = check_dataset(cfg, loader, leaf, args.full)
            root = leaf.get('data_root') or '.'
            print(f'{loader}: {leaf.type} in {root}: {summary or "unusable"}')
            for line in findings.lines():
                print(f'  {line}')
            errors += len(findings.errors)
    if not done:
        raise UserError(f'config {args.config} has no data loader')
    if errors:
        print(f'{errors} {"kind" if errors == 1 else "kinds"} of errors found')
        sys.exit(1)
    print('No errors found' + ('' if args.full else f' (at most {SAMPLE} images of a set opened)'))


if __name__ == '__main__':
    cli.run(main)
