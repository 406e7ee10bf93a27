# Copyright (c) mmscalablevit contributors. All rights reserved.
"""The runner, and how it extends mmengine: by its public methods alone."""

import ast
import importlib
import re
import sys
from pathlib import Path

import pytest
import torch
from golden import TINY
from jobs import run_tool
from mmengine.config import Config
from mmengine.registry import RUNNERS

from mmscalablevit.engine.runner import SafeRunner, lock_work_dir
from mmscalablevit.errors import UserError, explain, interruptible

PACKAGE = Path(__file__).parents[1] / 'mmscalablevit'
# What is assigned to attributes of objects that are not the module's own: file, beginning of the
# target, reason.
ASSIGNED = {
    ('checkpoint/reading.py', 'call.__module__, call.__name__'): 'a function made there',
    ('checkpoint/reading.py', 'call.__qualname__'): 'a function made there',
    ('checkpoint/reading.py', 'left._metadata'): 'a state dict made there, as torch makes them',
    ('cli.py', "os.environ.setdefault('LOCAL_RANK'"): 'set once, as all OpenMMLab tools do',
    ('engine/hosts.py', 'os.environ'): "torch's interface, set once, as mmengine's launchers do",
    ('engine/seed_hook.py', 'setattr(self.dataset, name'): 'a wrapper hands on what others assign',
    ('_moved.py', 'setattr(sys.modules[parent]'): 'modules of this package',
}
# Objects of this package that modules fill: configs and records.
OWN = {'self', 'cls', 'cfg', 'run', 'args'}
CALLS = {'setattr', 'delattr', 'os.environ.setdefault', 'os.environ.update', 'os.environ.pop'}


def assignments(path):
    """What a module assigns to attributes of objects, or to variables of the environment."""
    for node in ast.walk(ast.parse(path.read_text())):
        targets = getattr(node, 'targets', [getattr(node, 'target', None)])
        for target in filter(None, targets):
            parts = [x for x in ast.walk(target) if isinstance(getattr(x, 'ctx', None), ast.Store)]
            for part in parts:
                owner = ast.unparse(part.value) if hasattr(part, 'value') else 'self'
                if (isinstance(part, ast.Attribute) and owner not in OWN) or owner == 'os.environ':
                    yield ast.unparse(target).strip('()')
        if isinstance(node, ast.Call) and ast.unparse(node.func) in CALLS:
            yield ast.unparse(node)


def test_no_attribute_of_others_is_assigned():
    found = {
        (path.relative_to(PACKAGE).as_posix(), text)
        for path in PACKAGE.rglob('*.py')
        for text in assignments(path)
    }
    assert ('checkpoint/reading.py', 'left._metadata') in found
    known = {x for x in found for file, text in ASSIGNED if x[0] == file and x[1].startswith(text)}
    assert not found - known


def test_runner_has_no_private_method_of_mmengines():
    own = {name for name in vars(SafeRunner) if name.startswith('_') and not name.endswith('__')}
    theirs = {name for base in SafeRunner.__mro__[1:] for name in vars(base)}
    assert own
    assert not own & theirs
    assert RUNNERS.get('SafeRunner') is SafeRunner


def test_attention_of_cudnn_is_a_choice(tmp_path):
    """It plans for each shape, and PyTorch may take it first."""
    code = f"""
import torch
from mmengine.config import Config
from mmscalablevit.engine.runner import SafeRunner
for option in ({{}}, dict(cudnn_sdp=True), dict(cudnn_sdp=False)):
    cfg = dict(work_dir='.', model=dict(type='ScalableViT', arch={TINY}), log_level='ERROR')
    SafeRunner.from_cfg(Config(dict(cfg, env_cfg=dict(dist_cfg=dict(backend='nccl'), **option))))
    print('cuDNN:', torch.backends.cuda.cudnn_sdp_enabled())
"""
    used = re.findall(r'cuDNN: (\w+)', run_tool(['-c', code], tmp_path))
    assert used == ['False', 'True', 'False']


@pytest.mark.parametrize(
    'name',
    [
        'engine.checkpoint.read_checkpoint',
        'engine.cli.load_config',
        'engine.data.DataError',
        'engine.loading.load_weights',
        'engine.resume.IterSeedHook',
        'engine.resume.find_checkpoint',
        'models.checkpoint.recognize',
    ],
)
def test_old_names_work_with_a_warning(name):
    module, _, attribute = f'mmscalablevit.{name}'.rpartition('.')
    with pytest.warns(DeprecationWarning, match=rf'{attribute} is now in mmscalablevit\.'):
        assert callable(getattr(importlib.import_module(module), attribute))
    with pytest.raises(AttributeError, match='no_such_name'):
        _ = importlib.import_module(module).no_such_name


def test_a_work_directory_is_used_by_one_training(tmp_path):
    def other(name, expect=0):
        code = (
            'from mmscalablevit.engine.runner import lock_work_dir\n'
            f'with lock_work_dir({str(tmp_path)!r}, {name!r}): pass'
        )
        return run_tool(['-c', code], tmp_path, expect=expect)

    with lock_work_dir(tmp_path):
        assert f'{tmp_path} is in use by another training' in other('training', expect=1)
        other('queue')
    other('training')


class Head:
    """Somebody's module, with a check of its arguments and a bug."""

    def __init__(self, width):
        if width < 1:
            raise ValueError('width must be at least 1')
        self.weight = torch.ones(width) @ torch.ones(2)


def test_what_is_a_mistake_and_what_keeps_its_traceback():
    from mmengine.registry import Registry

    heads = Registry('heads')
    heads.register_module(module=Head)

    def after(cfg):
        try:
            heads.build(cfg)
        except Exception as error:
            explain(error, 'config x.py cannot be built')
            return error

    with pytest.raises(UserError, match=r'config x\.py cannot be built: KeyError: Haed is not in'):
        after(dict(type='Haed'))
    with pytest.raises(UserError, match='unexpected keyword argument'):
        after(dict(type='Head', with_=1))
    with pytest.raises(UserError, match='width must be at least 1'):
        after(dict(type='Head', width=0))
    bug = after(dict(type='Head', width=3))
    assert isinstance(bug, RuntimeError)
    if sys.version_info >= (3, 11):
        assert bug.__notes__ == ['(config x.py cannot be built)']


@pytest.mark.parametrize('raised', [KeyboardInterrupt, ValueError])
def test_ctrl_c_while_a_config_is_formatted(monkeypatch, raised):
    """Each checkpoint holds the config, whose formatting takes most of the time of saving."""

    def interrupt(*args, **kwargs):
        raise raised

    monkeypatch.setattr('yapf.yapflib.yapf_api.FormatCode', interrupt)
    monkeypatch.setattr('mmengine.config.config.FormatCode', interrupt, raising=False)
    shown = KeyboardInterrupt if raised is KeyboardInterrupt else SyntaxError
    with pytest.raises(shown), interruptible():
        _ = Config(dict(lr=0.1)).pretty_text
