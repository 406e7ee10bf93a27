# Copyright (c) mmscalablevit contributors. All rights reserved.
"""What is wrong in a config, as sentences: mmengine ignores it, or reports it late or at length."""

import difflib
import inspect
import logging
import os.path as osp
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from mmengine.config import Config, ConfigDict
from mmengine.dataset import BaseDataset
from mmengine.dist import is_main_process
from mmengine.hooks import CheckpointHook
from mmengine.logging import print_log
from mmengine.registry import DATASETS, OPTIMIZERS
from mmengine.runner import Runner

from ..errors import UserError, config_errors
from .coco import check_boxes, check_coco, is_plain_coco
from .files import all_exist, check_images
from .findings import Findings
from .label_maps import check_ignored, check_segmentation
from .pipeline import data_sets

# Parts of a model with numbers of their own: object or none, and the regions of HTC.
_OTHERS = ('rpn', 'semantic')
_NAMED = 5
# Data sets of mmpretrain that fetch their own files.
_DOWNLOADED = ('CIFAR10', 'CIFAR100', 'FashionMNIST', 'MNIST')
# Parsing the 450 MB of COCO's training set again would cost each start 20 s and gigabytes.
_CHECKED_BYTES = 50 * 2**20
# An image of this many pixels takes 1.2 GB as float32, and more in every worker.
_HUGE = 100_000_000


def config_faults(cfg: Config, known: Iterable[str]) -> Iterator[str]:
    """Find what is wrong in a config before anything is built from it."""
    known = list(known)
    for key in cfg:
        # A config's own variables, such as data_root, are read while it is parsed.
        meant = [] if key in known else difflib.get_close_matches(key, known, n=1, cutoff=0.92)
        if meant:
            yield f'nothing reads the key {key!r}; did you mean {meant[0]!r}?'
    if not cfg.get('model'):
        yield 'the key model is missing'
    keys = ('max_epochs', 'max_iters', 'val_interval')
    counts = [x for key in keys for x in find_settings(cfg.get('train_cfg'), key, 'train_cfg')]
    for key, value in [*counts, *find_settings(cfg.get('model'), 'num_classes')]:
        if type(value) is not int or value < 1:
            yield f'{key} must be an integer of at least 1, got {value!r}'
    optimizer = ((cfg.get('optim_wrapper') or {}).get('optimizer') or {}).get('type')
    if isinstance(optimizer, str) and OPTIMIZERS.get(optimizer) is None:
        # mmengine fails on it without naming it.
        yield f'there is no optimizer {optimizer!r}'


def find_settings(part: object, key: str, name: str = 'model') -> Iterator[tuple[str, object]]:
    """Every value of a key in a part of a config, by its full name, but for those of an RPN."""
    if isinstance(part, list | tuple):
        part = dict(enumerate(part))
    for inner, value in part.items() if isinstance(part, dict) else ():
        if inner == key:
            yield f'{name}.{key}', value
        elif not any(other in str(inner) for other in _OTHERS):
            yield from find_settings(value, key, f'{name}.{inner}')


def check_data(cfg: Config, loaders: Iterable[str]) -> None:
    """Raise a ``UserError`` for a fault of files, folders or annotations, and log warnings."""
    sets = {key: (cfg.get(key) or {}).get('dataset') or ConfigDict() for key in loaders}
    leaves = [(loader, leaf) for loader, dataset in sets.items() for leaf in data_sets(dataset)]
    for loader, leaf in leaves:
        for key, path in _paths(leaf).items():
            if '://' not in path and not osp.exists(path):
                raise UserError(
                    f'{loader}: {path} does not exist; put the data there or set its '
                    f'path by --cfg-options {loader}.dataset.{key}=PATH'
                )
    for loader, leaf in leaves:
        findings = Findings()
        with config_errors(cfg):
            check_data_set(cfg, loader, leaf, findings)
        lines = [line.split(': ', 1) for line in findings.lines()]
        for fault in (fault for kind, fault in lines if kind == 'warning'):
            print_log(f'{loader}: {fault}', 'current', logging.WARNING)
        errors = [fault for kind, fault in lines if kind == 'error']
        if errors:
            more = f' (and {len(errors) - 1} more faults)' if errors[1:] else ''
            raise UserError(
                f'{loader}: {errors[0]}{more}; tools/check_data.py lists all faults of the data'
            )


def check_data_set(
    cfg: Config, loader: str, leaf: ConfigDict, findings: Findings, full: bool | None = None
) -> str | None:
    """Check a data set; return what it holds, '' if unusable, None if of an unknown kind.

    Unless ``full`` is given, no image is opened and no large annotation file is read, as at the
    start of a training; if it is False, a sample of the images is.
    """
    with DATASETS.switch_scope_and_registry(cfg.get('default_scope')) as registry:
        kind = registry.get(leaf.type) if isinstance(leaf.get('type'), str) else leaf.get('type')
        bases = {base.__name__ for base in getattr(kind, '__mro__', ())}
        # An unknown type is reported where it is built; other kinds cannot be read ahead.
        if leaf.get('backend_args') or not {'BaseDetDataset', 'BaseSegDataset'} & bases:
            return None
        classes = (leaf.get('metainfo') or {}).get('classes')
        if isinstance(classes, str) and not osp.isfile(classes):
            fault = 'metainfo.classes must be a tuple, where a single class needs a comma'
            findings.error(fault, classes)
            return ''
        dataset = registry.build(dict(leaf, pipeline=[], lazy_init=True))
    if not dataset.metainfo.get('classes'):
        findings.error('metainfo.classes is missing, the names of the classes', loader)
        return ''
    if is_plain_coco(kind):
        return _check_coco(cfg, loader, leaf, dataset, findings, full)
    if 'BaseSegDataset' not in bases:
        return '' if full is None else check_boxes(dataset, full, findings)
    check_ignored(cfg, loader, dataset.ignore_index, findings)
    if full is not None:
        return check_segmentation(dataset, full, findings)
    if not dataset.load_data_list():
        place = dataset.ann_file or dataset.data_prefix['img_path']
        fault = f'{place} holds no image that ends in img_suffix={dataset.img_suffix!r}'
        findings.error(fault, loader)
    return ''


def _check_coco(
    cfg: Config,
    loader: str,
    leaf: ConfigDict,
    dataset: BaseDataset,
    findings: Findings,
    full: bool | None,
) -> str:
    path, folder = dataset.ann_file, dataset.data_prefix.get('img', '')
    evaluated = loader != 'train_dataloader'
    # Official test sets come without annotations.
    formats = find_settings(cfg.get(loader.replace('dataloader', 'evaluator')), 'format_only')
    if full is None and (not is_main_process() or (evaluated and any(x for _, x in formats))):
        return ''
    needed = [(osp.isfile, path), (osp.isdir, folder)]
    if not all_exist(needed[: 1 if full is None else 2], findings):
        return ''
    if full is None and osp.getsize(path) > _CHECKED_BYTES:
        text = 'is too large to be checked at every start; tools/check_data.py checks it'
        print_log(f'{loader}: {path} {text}', 'current')
        return ''
    with_masks = any(step.get('with_mask') for step in leaf.get('pipeline', []))
    entries = check_coco(path, dataset.metainfo['classes'], with_masks, evaluated, findings)
    if entries is None:
        return ''
    if full is not None:
        sizes = {x['file_name']: (x['width'], x['height']) for x in entries['images']}
        images = [(osp.join(folder, name), size) for name, size in sizes.items()]
        check_images(images, path, full, findings)
    _check_limits(cfg.get('model') or {}, entries, path, findings)
    return ', '.join(f'{len(values)} {part}' for part, values in entries.items())


def _check_limits(model: dict, entries: dict, path: str, findings: Findings) -> None:
    """Warn of images that hold more objects than the model returns, or are huge."""
    limits = [*find_settings(model.get('test_cfg'), 'max_per_img', 'model.test_cfg')]
    if model.get('num_queries'):
        limits.append(('model.num_queries', model['num_queries']))
    key, limit = min(limits, key=lambda pair: pair[1], default=('', float('inf')))
    counts = Counter(annotation['image_id'] for annotation in entries['annotations'])
    for image in entries['images']:
        name, count = image['file_name'], counts[image['id']]
        if count > limit:
            fault = f'image of {path} has more objects than {key}={limit} returns'
            findings.warn(fault, f'{name} ({count})')
        if image['width'] * image['height'] >= _HUGE:
            fault = 'image of more than 100 million pixels is read whole for each sample; use tiles'
            findings.warn(fault, f'{name} ({image["width"]}x{image["height"]})')


def class_faults(cfg: Config, loader: str, dataset: BaseDataset) -> Iterator[str]:
    """Compare the heads of a model with the classes of a data set that was built."""
    classes = getattr(dataset, 'metainfo', {}).get('classes')
    if not isinstance(classes, list | tuple):
        return
    names = ', '.join(map(str, classes[:_NAMED])) + (', ...' if len(classes) > _NAMED else '')
    for key, value in find_settings(cfg.get('model'), 'num_classes'):
        if value != len(classes):
            yield (
                f'{key}={value}, but the {type(dataset).__name__} of {loader} has '
                f'{len(classes)} {"class" if len(classes) == 1 else "classes"} ({names})'
            )


def hook_faults(runner: Runner) -> Iterator[str]:
    """Find arguments of the checkpoint hook that would fail at the first checkpoint only."""
    known = inspect.signature(Runner.save_checkpoint).parameters
    metrics = getattr(getattr(runner.val_loop, 'evaluator', None), 'metrics', ())
    prefixes = [metric.prefix for metric in metrics]
    for hook in (hook for hook in runner.hooks if isinstance(hook, CheckpointHook)):
        for key in hook.args or ():
            if key not in known:
                yield f'CheckpointHook has no argument {key!r}'
        for measure in getattr(hook, 'key_indicators', None) or ():
            prefix = measure.rpartition('/')[0]
            # Of a metric without a prefix nothing is known.
            if prefix and prefixes and not {None, prefix} & {*prefixes}:
                allowed = ', '.join(f'{name}/...' for name in prefixes)
                yield (
                    f"default_hooks.checkpoint.save_best must be 'auto' or one of {allowed}, "
                    f'got {measure!r}'
                )


def reordered(trained: Sequence[str], wanted: Sequence[str]) -> bool:
    """Whether classes are the same, but for their spelling, in another order."""
    there, here = (
        [re.sub(r'[\s_-]', '', str(name)).lower() for name in names] for names in (trained, wanted)
    )
    return there != here and sorted(there) == sorted(here)


def _paths(leaf: ConfigDict) -> dict[str, str]:
    """The paths of a data set, by the key that names each."""
    root, prefix = leaf.get('data_root') or '', leaf.get('data_prefix') or {}
    if leaf.get('type') in _DOWNLOADED:
        return {}
    prefix = prefix if isinstance(prefix, dict) else {'': prefix}
    names = {f'data_prefix.{key}'.rstrip('.'): name for key, name in prefix.items()}
    names['ann_file'] = leaf.get('ann_file')
    names = {key: name for key, name in names.items() if isinstance(name, str) and name}
    paths = {key: osp.join(root, name) for key, name in names.items()}
    return {'data_root': root, **paths} if root else paths
