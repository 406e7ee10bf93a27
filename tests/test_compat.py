# Copyright (c) mmscalablevit contributors. All rights reserved.
"""Importing the package: what it needs, what it leaves alone, what it says if something is off."""

import importlib
import importlib.metadata
import json
import sys

import mmcv
import mmengine
import pytest
from jobs import ROOT, run

from mmscalablevit import compat

# What a process has in common, as JSON, before and after the import of the package. All that the
# package imports, as a fork finds, is imported before, so that nothing but the package itself can
# make a difference.
STATE = """
import importlib, json, logging, os, random, signal, sys, threading, types, warnings
import torch, mmengine.registry, mmengine.runner
from mmengine.registry import Registry
from mmengine.runner.checkpoint import CheckpointLoader

def members(owner):
    # _schemes is rebound by mmengine's own register_scheme; its entries are compared below.
    found = {k: v for k, v in vars(owner).items() if k != '_schemes'}
    return {k: id(v) for k, v in found.items() if not isinstance(v, types.ModuleType)}

def state():
    registries = {n: r for n, r in vars(mmengine.registry).items() if isinstance(r, Registry)}
    modules = {n: m for n, m in sys.modules.items() if n.split('.')[0] in ('mmengine', 'mmcv')}
    classes = {
        f'{c.__module__}.{c.__qualname__}': members(c)
        for m in modules.values() for c in vars(m).values()
        if isinstance(c, type) and c.__module__ in modules
    }
    return dict(
        entries={
            n: {k: v.__module__ for k, v in r.module_dict.items()} for n, r in registries.items()
        },
        schemes={k: v.__module__ for k, v in CheckpointLoader._schemes.items()},
        operators=sorted(torch._C._dispatch_get_all_op_names()),
        environment=dict(os.environ),
        filters=[repr(f) for f in warnings.filters],
        members={n: members(m) for n, m in modules.items()},
        classes=classes,
        nn=members(torch.nn.functional),
        settings=repr([
            torch.get_default_dtype(), torch.get_num_threads(), torch.initial_seed(),
            torch.backends.cudnn.benchmark, torch.are_deterministic_algorithms_enabled(),
            torch.multiprocessing.get_sharing_strategy(), hash(random.getstate()),
            logging.raiseExceptions, logging.root.level, logging.root.handlers, sys.excepthook,
            sys.path, sys.meta_path, threading.active_count(),
            [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)],
        ]),
    )

reading, writing = os.pipe()
if not os.fork():
    import mmscalablevit
    loaded = [n for n, m in sys.modules.items() if getattr(m, '__spec__', None)]
    with open(writing, 'w') as file:
        json.dump([n for n in loaded if n.split('.')[0] not in ('mmscalablevit', '__main__')], file)
    os._exit(0)
os.close(writing)
with open(reading) as file:
    imported = json.load(file)
for name in imported:
    if name.split('.')[0] in ('torch', 'mmengine', 'mmcv'):
        importlib.import_module(name)
before = state()
import mmscalablevit
print(json.dumps([imported, before, state()]))
"""


def python(code, expect=0):
    """Run code in a fresh interpreter and return its last line of output."""
    command = [sys.executable, '-W', 'ignore', '-c', code]
    return run(command, ROOT, None, expect).strip().splitlines()[-1]


def test_import_loads_no_toolbox_and_changes_nothing_but_its_own_registrations():
    imported, before, after = json.loads(python(STATE))
    heavy = {'mmdet', 'mmseg', 'mmpretrain', 'mmcv.ops', 'mmcv._ext', 'torchvision'}
    assert {'torch', 'mmengine', 'mmcv.cnn'} <= set(imported)
    assert not heavy & set(imported)

    entries = {
        (registry, name): module
        for registry, found in after.pop('entries').items()
        for name, module in found.items()
        if name not in before['entries'][registry]
    }
    schemes = after.pop('schemes')
    # Its own registrations are there, and nothing is taken away or replaced.
    assert entries['MODELS', 'ScalableViT'].startswith('mmscalablevit.models')
    assert {module.split('.')[0] for module in entries.values()} == {'mmscalablevit'}
    assert {k: schemes.get(k) for k in before['schemes']} == before.pop('schemes')
    assert all(
        module.startswith('mmscalablevit.') for k, module in schemes.items() if k.startswith('scal')
    )
    del before['entries']
    for part, value in before.items():
        assert after[part] == value, part


@pytest.mark.parametrize('name', ['mmengine', 'mmcv'])
def test_missing_dependency_is_one_sentence_that_says_what_to_install(name):
    message = python(f'import sys; sys.modules[{name!r}] = None; import mmscalablevit', 1)
    assert message.startswith(f'ImportError: mmscalablevit needs {name}>=')
    assert f'onedl-{name}' in message


@pytest.mark.parametrize(
    ('module', 'version', 'wanted'),
    [(mmengine, '0.7.4', '0.8.3'), (mmengine, '0.8.3rc1', None), (mmcv, '1.7.2', '2.0.0')],
)
def test_old_dependency_is_named_with_both_versions(monkeypatch, module, version, wanted):
    monkeypatch.setattr(module, '__version__', version)
    if wanted is None:
        compat.check_dependencies()
        return
    with pytest.raises(ImportError, match=f'{module.__name__}>={wanted}, found {version}'):
        compat.check_dependencies()


@pytest.fixture
def versions(monkeypatch):
    """The installed distributions, as a dict to be changed."""
    found = {}

    def version(name):
        if name not in found:
            raise importlib.metadata.PackageNotFoundError(name)
        return found[name]

    monkeypatch.setattr(importlib.metadata, 'version', version)
    return found


def test_two_families_in_one_environment_are_named(versions, recwarn):
    versions.update({'onedl-mmcv': '2.3.6', 'mmcv': '2.1.0'})
    with pytest.warns(UserWarning, match=r'^onedl-mmcv 2\.3\.6 and mmcv 2\.1\.0 are both'):
        compat.check_dependencies()
    del versions['mmcv']
    compat.check_dependencies()
    assert not recwarn.list


# Pairs that PyTorch released together.
@pytest.mark.parametrize(
    ('torch_version', 'wanted'),
    [
        ('2.4.1', 'torchvision==0.19.1'),
        ('2.14.1', 'torchvision==0.29.1'),
        ('2.13.0+cpu', 'torchvision==0.28.0 --index-url https://download.pytorch.org/whl/cpu'),
    ],
)
def test_torchvision_that_fits(versions, torch_version, wanted):
    versions['torch'] = torch_version
    assert compat.torchvision_requirement() == wanted


def test_torchvision_that_does_not_fit_is_named_with_the_cure(
    versions, monkeypatch, tmp_path, request
):
    versions.update(torch='2.13.0+cpu', torchvision='0.28.0')
    # What torchvision does at import if its compiled operators could not be loaded.
    folder = tmp_path / 'torchvision'
    folder.mkdir()
    (folder / '__init__.py').write_text(
        'import torch\n'
        '@torch.library.register_fake("torchvision::no_such_operator")\n'
        'def nms(dets, scores, iou_threshold): ...\n'
    )
    for name in [name for name in sys.modules if name.split('.')[0] == 'torchvision']:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    sentence = compat.torchvision_fault()

    assert sentence.startswith('torchvision 0.28.0 does not fit torch 2.13.0+cpu (')
    assert 'torchvision::no_such_operator' in sentence
    assert sentence.endswith(
        '`pip install --force-reinstall --no-deps torchvision==0.28.0 '
        '--index-url https://download.pytorch.org/whl/cpu`.'
    )


def test_missing_torchvision_is_named(versions, monkeypatch):
    versions['torch'] = '2.14.1'
    monkeypatch.setitem(sys.modules, 'torchvision', None)
    assert compat.torchvision_fault().startswith('torchvision is not installed: `pip install')
