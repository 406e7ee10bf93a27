# Copyright (c) mmscalablevit contributors. All rights reserved.
"""Say exactly what is missing or wrong in COCO, ADE20K or the data sets of a config.

Training and evaluation fail late on some faults and ignore others without a word: a class whose
name is spelled otherwise in the annotations, masks saved as colors, photographs that are turned by
their EXIF tag. This reads what the data loaders of a config would read and lists every such fault.
"""

import argparse
import os
import os.path as osp
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from mmengine.config import Config, ConfigDict, DictAction
from mmengine.dataset import BaseDataset
from mmengine.registry import DATASETS, init_default_scope
from PIL import Image
from rich.console import Console
from rich.progress import track

from mmscalablevit import cli
from mmscalablevit.checks.coco import Findings, check_coco_file
from mmscalablevit.checks.config import head_classes
from mmscalablevit.checks.pipeline import data_sets

CONFIGS = Path(__file__).parents[2] / 'configs'
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
SAMPLE = 200
EXIF_ORIENTATION = 0x0112
QUARTER_TURNS = (5, 6, 7, 8)


def sample(items: list, full: bool) -> list:
    """All items, or some spread evenly over them."""
    if full or len(items) <= SAMPLE:
        return items
    return [items[i * len(items) // SAMPLE] for i in range(SAMPLE)]


def progress(items: Iterable, total: int, what: str) -> Iterable:
    """A progress bar on stderr, where that is a terminal."""
    console = Console(stderr=True)
    hidden = not console.is_terminal
    return track(items, what, total=total, console=console, transient=True, disable=hidden)


def in_threads(function: Callable, items: list, what: str) -> Iterator:
    """``function`` of every item, in order, with a progress bar."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        yield from progress(pool.map(function, items), len(items), what)


def read_size(path: str) -> tuple[int, int] | str:
    """Width and height as the toolboxes load an image, or why it cannot be read."""
    try:
        with Image.open(path) as image:
            image.load()
            width, height = image.size
            turned = image.getexif().get(EXIF_ORIENTATION) in QUARTER_TURNS
    # Damaged files raise errors of many types.
    except Exception as error:
        return str(error)
    return (height, width) if turned else (width, height)


def read_labels(path: str) -> np.ndarray | str:
    """A label map, or why it cannot be read."""
    try:
        with Image.open(path) as image:
            return np.array(image)
    except Exception as error:
        return str(error)


def check_coco(
    dataset: BaseDataset, with_masks: bool, evaluated: bool, full: bool, findings: Findings
) -> str:
    """Check a data set of COCO's format.

    Args:
        dataset (BaseDataset): mmdet's ``CocoDataset``, not yet initialized.
        with_masks (bool): Whether the pipeline loads masks.
        evaluated (bool): Whether the set serves validation or test.
        full (bool): Whether every image is opened and not a sample.
        findings (Findings): Takes the faults.

    Returns:
        str: What the set holds.

    Example:
        >>> check_coco(dataset, True, False, False, Findings())  # doctest: +SKIP
        '40 images, 312 annotations, 80 categories'
    """
    path, folder = dataset.ann_file, dataset.data_prefix.get('img', '')
    if not found([(osp.isfile, path), (osp.isdir, folder)], findings):
        return ''
    entries = check_coco_file(dataset, with_masks, evaluated, findings)
    if entries is None:
        return ''

    files = [(osp.join(folder, image['file_name']), image) for image in entries['images']]
    there = []
    for file, image in progress(files, len(files), 'images listed'):
        if osp.isfile(file):
            there.append((file, image))
        else:
            findings.error(f'image of {path} does not exist', file)

    chosen = sample(there, full)
    sizes = in_threads(read_size, [file for file, _ in chosen], 'image sizes')
    for (file, image), size in zip(chosen, sizes, strict=True):
        if isinstance(size, str):
            findings.error('image cannot be read', f'{file} ({size})')
        elif size != (image['width'], image['height']):
            findings.error(
                f'image has another size (EXIF rotation applied) than in {path}',
                f'{file} is {size[0]}x{size[1]} and not {image["width"]}x{image["height"]}',
            )
    return ', '.join(f'{len(values)} {part}' for part, values in entries.items())


def check_label_map(path: str, size: tuple, dataset: BaseDataset, findings: Findings) -> set[int]:
    """Check one label map and return the classes that occur in it."""
    labels = read_labels(path)
    if isinstance(labels, str):
        findings.error('mask cannot be read', f'{path} ({labels})')
        return set()
    if labels.ndim != 2:
        findings.error(
            'mask is a color image; it must have one channel that holds class numbers', path
        )
        return set()
    if labels.shape[::-1] != size:
        findings.error(
            'mask is not of the size of its image',
            f'{path} is {labels.shape[1]}x{labels.shape[0]} and not {size[0]}x{size[1]}',
        )
    values = set(np.unique(labels).tolist())
    ignored = {dataset.ignore_index, 0} if dataset.reduce_zero_label else {dataset.ignore_index}
    # Zero is dropped and the classes count from 1 where reduce_zero_label is set.
    first = int(dataset.reduce_zero_label)
    count = len(dataset.label_map or dataset.metainfo['classes'])
    allowed = {*range(first, first + count), *ignored}
    if values - allowed:
        findings.error(
            f'mask has values other than {first} to {first + count - 1}, for {count} classes with '
            f'reduce_zero_label={dataset.reduce_zero_label}, and {sorted(ignored)}, which are '
            'ignored',
            f'{path} has {", ".join(map(str, sorted(values - allowed)[:5]))}',
        )
    return {int(value) - first for value in values - ignored}


def check_segmentation(dataset: BaseDataset, full: bool, findings: Findings) -> str:
    """Check images and their label maps.

    Args:
        dataset (BaseDataset): mmseg's ``BaseSegDataset``, not yet initialized.
        full (bool): Whether every image is opened and not a sample.
        findings (Findings): Takes the faults.

    Returns:
        str: What the set holds.

    Example:
        >>> check_segmentation(dataset, False, Findings())  # doctest: +SKIP
        '40 images with masks, 150 classes'
    """
    images, masks = (dataset.data_prefix.get(key, '') for key in ('img_path', 'seg_map_path'))
    needed = [(osp.isdir, images), (osp.isdir, masks)]
    if dataset.ann_file:
        needed.append((osp.exists, dataset.ann_file))
    if not found(needed, findings):
        return ''
    pairs = [(data['img_path'], data['seg_map_path']) for data in dataset.load_data_list()]
    if not pairs:
        findings.error(f'no image ends in img_suffix={dataset.img_suffix!r}', images)
    listed = not dataset.ann_file or osp.isdir(dataset.ann_file)
    if listed:
        check_leftovers(images, dataset.img_suffix, {image for image, _ in pairs}, findings)
        check_leftovers(masks, dataset.seg_map_suffix, {mask for _, mask in pairs}, findings)

    there = []
    for image, mask in progress(pairs, len(pairs), 'images and masks'):
        if not osp.isfile(image):
            findings.error(f'image of {dataset.ann_file} does not exist', image)
        elif not osp.isfile(mask):
            findings.error('mask does not exist', mask)
        else:
            there.append((image, mask))

    chosen = sample(there, full)
    sizes = in_threads(read_size, [image for image, _ in chosen], 'images and label values')
    occurring = set()
    for (image, mask), size in zip(chosen, sizes, strict=True):
        if isinstance(size, str):
            findings.error('image cannot be read', f'{image} ({size})')
        else:
            occurring |= check_label_map(mask, size, dataset, findings)
    if chosen and len(chosen) == len(pairs) and dataset.label_map is None:
        for i, name in enumerate(dataset.metainfo['classes']):
            if i not in occurring:
                findings.warn(f'class has no pixel in {masks}', repr(name))
    return f'{len(there)} images with masks, {len(dataset.metainfo["classes"])} classes'


def check_leftovers(folder: str, suffix: str, used: set[str], findings: Findings) -> None:
    """Warn of files that no image-mask pair uses."""
    used = {osp.normpath(path) for path in used}
    for path in sorted(Path(folder).rglob('*')):
        if path.is_file() and osp.normpath(path) not in used:
            findings.warn(f'file has no partner or does not end in {suffix}: not used', path)


def found(needed: list[tuple[Callable, str]], findings: Findings) -> bool:
    """Whether all paths exist, each of its kind; the absent ones are added to the findings."""
    absent = [(test, path) for test, path in needed if not test(path)]
    for test, path in absent:
        kind = 'folder' if test is osp.isdir else 'file'
        findings.error(f'{kind} does not exist', path or 'none is named in the config')
    return not absent


def check_dataset(cfg: Config, loader: str, leaf: ConfigDict, full: bool) -> tuple[str, Findings]:
    """Check one data set of a config.

    Args:
        cfg (Config): The config.
        loader (str): Key of the data loader.
        leaf (ConfigDict): The data set's config.
        full (bool): Whether every image is opened and not a sample.

    Returns:
        tuple[str, Findings]: What the set holds, and its faults.

    Raises:
        UserError: If it is not of a kind that can be checked.

    Example:
        >>> dataset = cfg.train_dataloader.dataset  # doctest: +SKIP
        >>> check_dataset(cfg, 'train_dataloader', dataset, full=False)  # doctest: +SKIP
    """
    findings = Findings()
    evaluated = loader != 'train_dataloader'
    classes = (leaf.get('metainfo') or {}).get('classes')
    if isinstance(classes, str) and not osp.isfile(classes):
        findings.error('metainfo.classes must be a tuple; a single class needs a comma', classes)
        return '', findings
    root = leaf.get('data_root')
    if root and '://' not in root and not found([(osp.isdir, root)], findings):
        return '', findings
    try:
        dataset = DATASETS.build(dict(leaf, pipeline=[], lazy_init=True))
    except (AssertionError, KeyError, TypeError, ValueError) as error:
        raise cli.UserError(
            f'{loader}: the data set cannot be built: {type(error).__name__}: {error}'
        ) from error
    if not dataset.metainfo.get('classes'):
        findings.error('data set has no classes', f'{loader}.dataset.metainfo')
        return '', findings

    kind = dataset_kind(dataset, loader)
    if kind == 'coco':
        with_masks = any(step.get('with_mask') for step in leaf.get('pipeline', []))
        summary = check_coco(dataset, with_masks, evaluated, full, findings)
        name = osp.basename(dataset.ann_file)
    else:
        summary = check_segmentation(dataset, full, findings)
        name = osp.basename(osp.normpath(dataset.data_prefix['img_path']))
    check_num_classes(cfg, len(dataset.metainfo['classes']), findings)
    if evaluated and kind == 'coco':
        check_evaluator(cfg, loader, dataset.ann_file, findings)
    official = OFFICIAL_COUNTS.get((leaf.type, name)) if 'metainfo' not in leaf else None
    if summary and official and not summary.startswith(f'{official} '):
        findings.warn(f'the official set has {official} images', summary)
    return summary, findings


def dataset_kind(dataset: BaseDataset, loader: str) -> str:
    """'coco' or 'segmentation'."""
    names = {base.__name__ for base in type(dataset).__mro__}
    if 'CocoDataset' in names:
        return 'coco'
    if 'BaseSegDataset' in names:
        return 'segmentation'
    raise cli.UserError(
        f'{loader}: {type(dataset).__name__} cannot be checked, only data sets in COCO format '
        '(CocoDataset) and images with label maps (BaseSegDataset)'
    )


def check_num_classes(cfg: Config, count: int, findings: Findings) -> None:
    """Compare the heads with the number of classes."""
    for key, value in head_classes(cfg.get('model')):
        if value != count:
            findings.error(f'must be {count}, the number of classes', f'{key}={value}')


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
        description='Say exactly what is missing or wrong in the data. Exit code 0: nothing.',
        epilog='example: python tools/check_data.py coco --root data/coco',
    )
    parser.add_argument(
        'config',
        metavar='coco|ade20k|CONFIG',
        help='a standard data set, or a config whose data sets and number of classes are checked',
    )
    parser.add_argument(
        '--root', help='folder of coco or ade20k; default: data/coco, data/ade/ADEChallengeData2016'
    )
    parser.add_argument(
        '--full', action='store_true', help=f'open every image and mask, not {SAMPLE} of each set'
    )
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=DictAction,
        metavar='KEY=VALUE',
        help='settings that replace those of the config',
    )
    parser.set_defaults(work_dir=None, launcher='none', local_rank=0)
    return cli.parse_args(parser)


def main() -> None:
    """Check."""
    args = parse_args()
    standard = args.config in STANDARD
    if args.root and not standard:
        raise cli.UserError(
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
            print(
                f'{loader}: {leaf.type} in {leaf.get("data_root") or "."}: {summary or "unusable"}'
            )
            for line in findings.lines():
                print(f'  {line}')
            errors += len(findings.errors)
    if not done:
        raise cli.UserError(f'config {args.config} has no data loader')
    if errors:
        print(f'{errors} {"kind" if errors == 1 else "kinds"} of errors found')
        sys.exit(1)
    print('No errors found' + ('' if args.full else f' (at most {SAMPLE} images of a set opened)'))


if __name__ == '__main__':
    cli.run(main)
