# Copyright (c) mmscalablevit contributors. All rights reserved.
"""What is wrong in a config, as sentences: mmengine ignores it, or reports it late or at length."""

import difflib
import inspect
import logging
import os
import os.path as osp
import re
from collections.abc import Iterable, Iterator, Sequence

from mmengine.config import Config, ConfigDict
from mmengine.dataset import BaseDataset
from mmengine.hooks import CheckpointHook
from mmengine.logging import print_log
from mmengine.registry import DATASETS, OPTIMIZERS
from mmengine.runner import Runner

from ..errors import UserError, config_errors, one_line
from .coco import check_boxes, check_coco, check_coco_file, is_plain_coco, warn_of_crowded
from .findings import Findings
from .label_maps import check_segmentation, ignore_faults
from .pipeline import data_sets

# What belongs together, by the loop that needs it.
PARTS = dict(
    train_loop=('train_dataloader', 'train_cfg', 'optim_wrapper'),
    val_loop=('val_dataloader', 'val_cfg', 'val_evaluator'),
    test_loop=('test_dataloader', 'test_cfg', 'test_evaluator'),
)
# Parts of a model with classes of their own: object or none, and the regions of HTC.
_OTHER_CLASSES = ('rpn', 'semantic')
_NAMED = 5
# Data sets of mmpretrain that fetch their own files.
_DOWNLOADED = ('CIFAR10', 'CIFAR100', 'FashionMNIST', 'MNIST')
# Parsing the 450 MB of COCO's training set again would cost each start 20 s and gigabytes.
_CHECKED_BYTES = 50 * 2**20
_RANKS = dict(pytorch='RANK', slurm='SLURM_PROCID', mpi='OMPI_COMM_WORLD_RANK')


def config_faults(cfg: Config, loops: Iterable[str], known: Iterable[str]) -> Iterator[str]:
    """Find what is wrong in a config before anything is built from it."""
    known = list(known)
    for key in cfg:
        # A config's own variables, such as data_root, are read while it is parsed.
        meant = [] if key in known else difflib.get_close_matches(key, known, n=1, cutoff=0.92)
        if meant:
            yield f'nothing reads the key {key!r}; did you mean {meant[0]!r}?'
    if not cfg.get('model'):
        yield 'the key model is missing'
    yield from _missing_parts(cfg, loops)
    for key in ('max_epochs', 'max_iters', 'val_interval'):
        value = (cfg.get('train_cfg') or {}).get(key)
        if value is not None and (type(value) is not int or value < 1):
            yield f'train_cfg.{key} must be an integer of at least 1, got {value!r}'
    level = cfg.get('log_level')
    if isinstance(level, str) and not isinstance(logging.getLevelName(level), int):
        yield f'log_level must be one of DEBUG, INFO, WARNING and ERROR, got {level!r}'
    for key, value in head_classes(cfg.get('model')):
        if type(value) is not int or value < 1:
            yield f'{key} must be an integer of at least 1, got {value!r}'
    optimizer = ((cfg.get('optim_wrapper') or {}).get('optimizer') or {}).get('type')
    if 'train_loop' in loops and isinstance(optimizer, str) and OPTIMIZERS.get(optimizer) is None:
        # mmengine fails on it without naming it.
        yield f'there is no optimizer {optimizer!r}'


def data_set_faults(cfg: Config, loader: str, leaf: ConfigDict) -> Iterator[str]:
    """Find what is wrong in a local data set of mmdet or mmseg before a model is built.

    Warnings are logged.
    """
    findings = Findings()
    check_data_set(cfg, loader, leaf, findings)
    for line in findings.lines():
        kind, fault = line.split(': ', 1)
        if kind == 'error':
            yield fault
        else:
            print_log(f'{loader}: {fault}', logger='current', level=logging.WARNING)


def check_data_set(
    cfg: Config, loader: str, leaf: ConfigDict, findings: Findings, full: bool | None = None
) -> str | None:
    """Check a data set; return what it holds, '' if unusable, None if of an unknown kind."""
    with DATASETS.switch_scope_and_registry(cfg.get('default_scope')) as registry:
        kind = registry.get(leaf.type) if isinstance(leaf.get('type'), str) else leaf.get('type')
        bases = [base.__name__ for base in kind.__mro__] if inspect.isclass(kind) else []
        is_coco = bool(bases) and is_plain_coco(kind)
        # An unknown type is reported where it is built; other kinds cannot be read ahead.
        if leaf.get('backend_args') or not {'BaseDetDataset', 'BaseSegDataset'} & {*bases}:
            return None
        classes = (leaf.get('metainfo') or {}).get('classes')
        if isinstance(classes, str) and not osp.isfile(classes):
            fault = 'metainfo.classes must be a tuple, where a single class needs a comma'
            findings.error(fault, classes)
            return ''
        dataset = registry.build(dict(leaf, pipeline=[], lazy_init=True))
    for fault in _unknown_prefixes(leaf, kind, is_coco):
        findings.error(fault, loader)
    if not dataset.metainfo.get('classes'):
        findings.error('metainfo.classes is missing, the names of the classes', loader)
        return ''
    if 'BaseSegDataset' in bases:
        for fault in ignore_faults(cfg, loader, dataset.ignore_index):
            findings.error(*fault.rsplit('; ', 1))
        if full is not None:
            return check_segmentation(dataset, full, findings)
        if not dataset.load_data_list():
            place = dataset.ann_file or dataset.data_prefix['img_path']
            fault = f'{place} holds no image that ends in img_suffix={dataset.img_suffix!r}'
            findings.error(fault, loader)
        return ''
    evaluated = loader != 'train_dataloader'
    if not is_coco:
        return '' if full is None else check_boxes(dataset, full, findings)
    return _check_coco(cfg, loader, leaf, dataset, findings, full, evaluated)


def _check_coco(
    cfg: Config,
    loader: str,
    leaf: ConfigDict,
    dataset: BaseDataset,
    findings: Findings,
    full: bool | None,
    evaluated: bool,
) -> str:
    path = dataset.ann_file
    with_masks = any(step.get('with_mask') for step in leaf.get('pipeline', []))
    if full is not None:
        entries = check_coco(dataset, with_masks, evaluated, full, findings)
    elif not osp.isfile(path):
        findings.error(f'ann_file must be a file in the format of COCO, got {path!r}', loader)
        return ''
    # Official test sets come without annotations. The processes of a distributed training are not
    # connected yet; one that fails ends all.
    elif (evaluated and _only_formats(cfg, loader)) or (
        os.environ.get(_RANKS.get(cfg.get('launcher'), ''), '0') != '0'
    ):
        return ''
    elif osp.getsize(path) > _CHECKED_BYTES:
        print_log(
            f'{loader}: {path} is too large to be checked at every start; '
            'tools/check_data.py checks it',
            logger='current',
        )
        return ''
    else:
        entries = check_coco_file(dataset, with_masks, evaluated, findings)
    if entries is None:
        return ''
    warn_of_crowded(cfg.get('model') or {}, entries, path, findings)
    return ', '.join(f'{len(values)} {part}' for part, values in entries.items())


def class_faults(cfg: Config, loader: str, dataset: BaseDataset) -> Iterator[str]:
    """Compare the heads of a model with the classes of a data set that was built."""
    classes = getattr(dataset, 'metainfo', {}).get('classes')
    if not isinstance(classes, list | tuple):
        return
    if is_plain_coco(type(dataset)) and len(getattr(dataset, 'cat_ids', classes)) != len(classes):
        yield (
            f'{loader}: {len(dataset.cat_ids)} of the {len(classes)} classes of the config are '
            f'among the categories of {dataset.ann_file}; '
            'tools/check_data.py names the others'
        )
    names = ', '.join(map(str, classes[:_NAMED])) + (', ...' if len(classes) > _NAMED else '')
    for key, value in head_classes(cfg.get('model')):
        if value != len(classes):
            yield (
                f'{key}={value}, but the {type(dataset).__name__} of {loader} has '
                f'{len(classes)} {"class" if len(classes) == 1 else "classes"} ({names})'
            )


def hook_faults(runner: Runner) -> Iterator[str]:
    """Find arguments of the checkpoint hook that would fail at the first checkpoint only."""
    known = inspect.signature(Runner.save_checkpoint).parameters
    for hook in runner.hooks:
        for key in getattr(hook, 'args', {}) if isinstance(hook, CheckpointHook) else ():
            if key not in known:
                yield f'CheckpointHook has no argument {key!r}'
        if isinstance(hook, CheckpointHook):
            yield from _unmeasured(runner, hook)


def _unmeasured(runner: Runner, hook: CheckpointHook) -> Iterator[str]:
    """Find a measure in ``save_best`` that no evaluator has, where they tell their prefixes."""
    evaluator = getattr(runner._val_loop, 'evaluator', None)
    prefixes = [metric.prefix for metric in getattr(evaluator, 'metrics', ())]
    for measure in getattr(hook, 'key_indicators', None) or ():
        prefix = measure.rpartition('/')[0]
        if prefix and prefixes and None not in prefixes and prefix not in prefixes:
            allowed = ', '.join(f'{name}/...' for name in prefixes)
            yield (
                f"default_hooks.checkpoint.save_best must be 'auto' or one of {allowed}, "
                f'got {measure!r}'
            )


def other_classes(
    trained: Sequence[str] | None, wanted: Sequence[str] | None, loader: str
) -> tuple[str, bool]:
    """Say what differs between classes, and whether that makes results wrong, as another order."""
    if not wanted or not trained or len(wanted) != len(trained):
        return '', False
    there, here = (
        [re.sub(r'[\s_-]', '', str(x)).lower() for x in names] for names in (trained, wanted)
    )
    if there == here:
        return '', False
    i = next(i for i, plain in enumerate(there) if plain != here[i])
    names = f'class {i} is {one_line(trained[i])!r} there and {wanted[i]!r} here'
    if sorted(there) == sorted(here):
        return f'was trained for the classes of {loader} in another order: {names}', True
    return f'was trained for other classes than {loader} has: {names}', False


def head_classes(part: object, name: str = 'model') -> Iterator[tuple[str, int]]:
    """Every ``num_classes`` of a model's config that counts the classes of the data set."""
    if isinstance(part, list | tuple):
        for i, item in enumerate(part):
            yield from head_classes(item, f'{name}.{i}')
    if not isinstance(part, dict):
        return
    for key, value in part.items():
        if key == 'num_classes':
            yield f'{name}.{key}', value
        elif not any(other in key for other in _OTHER_CLASSES):
            yield from head_classes(value, f'{name}.{key}')


def _missing_parts(cfg: Config, loops: Iterable[str]) -> Iterator[str]:
    for loop in loops:
        missing = [key for key in PARTS[loop] if cfg.get(key) is None]
        # Training without validation is allowed.
        if missing and not (loop == 'val_loop' and len(missing) == len(PARTS[loop])):
            needed = ', '.join(PARTS[loop])
            yield f'{", ".join(missing)} missing; {loop} needs {needed}'


def _unknown_prefixes(leaf: ConfigDict, kind: type, is_coco: bool) -> Iterator[str]:
    known = {'img', 'seg'} if is_coco else set()
    # mmdet's VOC data sets find their files by a key of their own.
    if any(base.__name__ == 'XMLDataset' for base in kind.__mro__):
        known.add('sub_data_root')
    for base in kind.__mro__:
        default = inspect.signature(base.__init__).parameters.get('data_prefix')
        if default is not None and isinstance(default.default, dict):
            known |= default.default.keys()
    for key in leaf.get('data_prefix') or {}:
        if key not in known:
            yield f'data_prefix has no key {key!r}; allowed are {", ".join(sorted(known))}'


def _only_formats(cfg: Config, loader: str) -> bool:
    evaluators = cfg.get(loader.replace('dataloader', 'evaluator')) or []
    evaluators = evaluators if isinstance(evaluators, list) else [evaluators]
    return any(evaluator.get('format_only') for evaluator in evaluators)


def check_data(cfg: Config, loaders: Iterable[str]) -> None:
    """Check files, folders and annotations of the data sets, before a model is built."""
    for loader in loaders:
        for key, path in _data_paths((cfg.get(loader) or {}).get('dataset') or {}):
            if '://' not in path and not osp.exists(path):
                raise UserError(
                    f'{loader}: {path} does not exist; put the data there or name it with '
                    f'--cfg-options {loader}.dataset.{key}=PATH'
                )
    for loader in loaders:
        for leaf in data_sets((cfg.get(loader) or {}).get('dataset') or ConfigDict()):
            with config_errors(cfg):
                faults = list(data_set_faults(cfg, loader, leaf))
            if faults:
                more = f' (and {len(faults) - 1} more faults)' if len(faults) > 1 else ''
                raise UserError(
                    f'{loader}: {faults[0]}{more}; tools/check_data.py lists all faults of the data'
                )


def _data_paths(dataset: ConfigDict, inside: str = '') -> Iterator[tuple[str, str]]:
    """Every path of a data set, with the key that names it."""
    if dataset.get('type') in _DOWNLOADED:
        return
    nested = {'dataset.': dataset.get('dataset')}
    nested |= {f'datasets.{i}.': inner for i, inner in enumerate(dataset.get('datasets', []))}
    for key, inner in nested.items():
        if inner:
            yield from _data_paths(inner, inside + key)
    root = dataset.get('data_root') or ''
    if root:
        yield f'{inside}data_root', root
    prefix = dataset.get('data_prefix') or {}
    prefix = prefix if isinstance(prefix, dict) else {'': prefix}
    names = {'ann_file': dataset.get('ann_file')}
    names |= {f'data_prefix.{key}'.rstrip('.'): name for key, name in prefix.items()}
    for key, name in names.items():
        if isinstance(name, str) and name:
            yield inside + key, osp.join(root, name)
