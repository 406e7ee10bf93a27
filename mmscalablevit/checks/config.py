# Copyright (c) mmscalablevit contributors. All rights reserved.
"""What is wrong in a config, as sentences: mmengine ignores it, or reports it late or at length."""

import difflib
import inspect
import logging
import os
import os.path as osp
from collections.abc import Iterable, Iterator

from mmengine.config import Config, ConfigDict
from mmengine.dataset import BaseDataset
from mmengine.hooks import CheckpointHook
from mmengine.logging import print_log
from mmengine.registry import DATASETS, OPTIMIZERS
from mmengine.runner import Runner

from .coco import Findings, check_coco_file, is_plain_coco

# What belongs together, by the loop that needs it.
_PARTS = dict(
    train_loop=('train_dataloader', 'train_cfg', 'optim_wrapper'),
    val_loop=('val_dataloader', 'val_cfg', 'val_evaluator'),
    test_loop=('test_dataloader', 'test_cfg', 'test_evaluator'),
)
# Parts of a model with classes of their own: object or none, and the regions of HTC.
_OTHER_CLASSES = ('rpn', 'semantic')
_NAMED = 5
# Parsing the 450 MB of COCO's training set again would cost each start 20 s and gigabytes.
_CHECKED_BYTES = 50 * 2**20
_RANKS = dict(pytorch='RANK', slurm='SLURM_PROCID', mpi='OMPI_COMM_WORLD_RANK')


def config_faults(cfg: Config, loops: Iterable[str], known: Iterable[str]) -> Iterator[str]:
    """Find what is wrong in a config before anything is built from it.

    Args:
        cfg (Config): The config.
        loops (Iterable[str]): The loops that will run: of 'train_loop', 'val_loop', 'test_loop'.
        known (Iterable[str]): Top-level keys that something reads.

    Yields:
        str: A fault, with the key and what is allowed.

    Example:
        >>> next(config_faults(Config(dict(train_dataloadr=dict())), (), ['train_dataloader']))
        "nothing reads the key 'train_dataloadr'; did you mean 'train_dataloader'?"
    """
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

    Args:
        cfg (Config): The config.
        loader (str): Key of the data loader.
        leaf (ConfigDict): The data set's config, of no wrapper.

    Yields:
        str: A fault, with the file or key.

    Example:
        >>> next(data_set_faults(cfg, 'train_dataloader', leaf))  # doctest: +SKIP
        'train.json: annotation of an image_id that is not listed: id 4'
    """
    evaluated = loader != 'train_dataloader'
    with DATASETS.switch_scope_and_registry(cfg.get('default_scope')) as registry:
        kind = registry.get(leaf.type) if isinstance(leaf.get('type'), str) else leaf.get('type')
        is_coco = inspect.isclass(kind) and is_plain_coco(kind)
        bases = [base.__name__ for base in kind.__mro__] if inspect.isclass(kind) else []
        # An unknown type is reported where it is built; other kinds cannot be read ahead.
        if leaf.get('backend_args') or not (is_coco or 'BaseSegDataset' in bases):
            return
        classes = (leaf.get('metainfo') or {}).get('classes')
        if isinstance(classes, str) and not osp.isfile(classes):
            yield f'metainfo.classes must be a tuple, where a single class needs a comma: {classes}'
            return
        dataset = registry.build(dict(leaf, pipeline=[], lazy_init=True))
    yield from _unknown_prefixes(leaf, kind, is_coco)
    if not dataset.metainfo.get('classes'):
        yield 'metainfo.classes is missing, the names of the classes'
        return
    if not is_coco:
        if not dataset.load_data_list():
            place = dataset.ann_file or dataset.data_prefix['img_path']
            yield f'{place} holds no image that ends in img_suffix={dataset.img_suffix!r}'
        return
    if not osp.isfile(dataset.ann_file):
        yield f'ann_file must be a file in the format of COCO, got {dataset.ann_file!r}'
        return
    # Official test sets come without annotations.
    if evaluated and _only_formats(cfg, loader):
        return
    # The processes of a distributed training are not connected yet; one that fails ends all.
    if os.environ.get(_RANKS.get(cfg.get('launcher'), ''), '0') != '0':
        return
    if osp.getsize(dataset.ann_file) > _CHECKED_BYTES:
        print_log(
            f'{loader}: {dataset.ann_file} is too large to be checked at every start; '
            'tools/check_data.py checks it',
            logger='current',
        )
        return
    findings = Findings()
    with_masks = any(step.get('with_mask') for step in leaf.get('pipeline', []))
    check_coco_file(dataset, with_masks, evaluated, findings)
    for line in findings.lines():
        kind, fault = line.split(': ', 1)
        if kind == 'error':
            yield fault


def class_faults(cfg: Config, loader: str, dataset: BaseDataset) -> Iterator[str]:
    """Compare the heads of a model with the classes of a data set that was built.

    Args:
        cfg (Config): The config.
        loader (str): Key of the data loader.
        dataset (BaseDataset): The data set.

    Yields:
        str: A fault: both numbers, and the names of the classes.

    Example:
        >>> cfg = Config(dict(model=dict(head=dict(num_classes=3))))
        >>> dataset = BaseDataset(lazy_init=True, metainfo=dict(classes=('cat', 'dog')))
        >>> next(class_faults(cfg, 'train_dataloader', dataset))
        'model.head.num_classes=3, but the BaseDataset of train_dataloader has 2 classes (cat, dog)'
    """
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
    """Find arguments of the checkpoint hook that would fail at the first checkpoint only.

    Args:
        runner (Runner): The runner.

    Yields:
        str: An unknown argument.

    Example:
        >>> list(hook_faults(runner))  # doctest: +SKIP
        ["CheckpointHook has no argument 'intervall'"]
    """
    known = inspect.signature(Runner.save_checkpoint).parameters
    for hook in runner.hooks:
        for key in getattr(hook, 'args', {}) if isinstance(hook, CheckpointHook) else ():
            if key not in known:
                yield f'CheckpointHook has no argument {key!r}'


def head_classes(part: object, name: str = 'model') -> Iterator[tuple[str, int]]:
    """Every ``num_classes`` of a model's config that counts the classes of the data set.

    Args:
        part (object): The model's config or a part of it.
        name (str): Its key. Defaults to 'model'.

    Yields:
        tuple[str, int]: The key and its value.

    Example:
        >>> list(head_classes(dict(rpn_head=dict(num_classes=1), bbox_head=dict(num_classes=80))))
        [('model.bbox_head.num_classes', 80)]
    """
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
        missing = [key for key in _PARTS[loop] if cfg.get(key) is None]
        # Training without validation is allowed.
        if missing and not (loop == 'val_loop' and len(missing) == len(_PARTS[loop])):
            needed = ', '.join(_PARTS[loop])
            yield f'{", ".join(missing)} missing; {loop} needs {needed}'


def _unknown_prefixes(leaf: ConfigDict, kind: type, is_coco: bool) -> Iterator[str]:
    known = {'img', 'seg'} if is_coco else set()
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
