# Copyright (c) mmscalablevit contributors. All rights reserved.
"""Hostile checkpoints given to every command line, and to the tools of mmseg."""

import pytest
import torch
from hostile import WEIGHTS, Payload
from jobs import ROOT, draw_shapes, packaged
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope

from mmscalablevit.errors import CheckpointError

SEGMENTOR = ROOT / 'tests' / 'data' / 'tiny_upernet.py'


@pytest.fixture(scope='module')
def workspace(tmp_path_factory):
    """Drawn shapes, an image, and a whole checkpoint of a segmentor."""
    pytest.importorskip('mmseg')
    folder = tmp_path_factory.mktemp('workspace')
    draw_shapes(folder / 'shapes', num_train=2, num_val=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('SHAPES_ROOT', str(folder / 'shapes'))
        cfg = Config.fromfile(SEGMENTOR)
    init_default_scope(cfg.default_scope)
    state = MODELS.build(cfg.model).state_dict()
    meta = dict(epoch=0, iter=2, dataset_meta=cfg.test_dataloader.dataset.metainfo.to_dict())
    hub = dict(log_scalars={}, runtime_info={}, resumed_keys={})
    torch.save(dict(meta=meta, state_dict=state, message_hub=hub), folder / 'whole.pth')
    return folder


KEY = 'decode_head.conv_seg.weight'
IMAGES = 'shapes/images/validation'
# What is said of each kind of file.
REASONS = {
    'truncated': 'is damaged or no checkpoint',
    'flipped': 'checksum of whole/data/',
    'poisoned': 'NaN or infinite values in',
    'doubled': 'as torch.float64, but the model has it as torch.float32; cast',
    'code': 'holds pickled Python code',
    'other': 'does not fit',
    'listed': 'other than named dense tensors (state_dict)',
}


@pytest.fixture(scope='module')
def bad(workspace):
    """A bad checkpoint of each kind."""
    raw = (workspace / 'whole.pth').read_bytes()
    middle = len(raw) // 2
    (workspace / 'truncated.pth').write_bytes(raw[:middle])
    flipped = raw[:middle] + bytes([raw[middle] ^ 16]) + raw[middle + 1 :]
    (workspace / 'flipped.pth').write_bytes(flipped)
    state = torch.load(workspace / 'whole.pth', weights_only=True)['state_dict']
    for kind, content in dict(
        poisoned=dict(state_dict={**state, KEY: state[KEY] / 0}),
        doubled=dict(state_dict={**state, KEY: state[KEY].double()}),
        code=dict(state_dict=state, extra=Payload(workspace / 'touched')),
        other=dict(state_dict=WEIGHTS),
        listed=dict(state_dict=[1]),
    ).items():
        torch.save(content, workspace / f'{kind}.pth')


# Those that train or test build data sets and model each time: few kinds each; test_tools.py has
# others.
RESUME = 'tools/train.py CONFIG --resume FILE --work-dir out'
COMMANDS = {
    'tools/test.py CONFIG FILE --work-dir out': 'poisoned other',
    RESUME: 'flipped doubled',
    'tools/train.py CONFIG --work-dir out --cfg-options load_from=FILE': 'poisoned',
    'tools/train.py CONFIG --work-dir out --cfg-options model.backbone.init_cfg._delete_=True '
    'model.backbone.init_cfg.type=Pretrained model.backbone.init_cfg.checkpoint=FILE': 'other',
    f'demo/image_demo.py {IMAGES} CONFIG FILE --out-dir out': ' '.join(REASONS),
    f'tools/analysis_tools/visualize_backbone.py {IMAGES}/000001.jpg --config CONFIG '
    '--checkpoint FILE --out-dir out': 'truncated code other',
    'tools/deployment/export_onnx.py CONFIG --checkpoint FILE --out out.onnx': ' '.join(REASONS),
    'tools/model_converters/publish_model.py FILE out/a.pth': 'flipped poisoned code listed',
    'tools/model_converters/scalablevit_to_mm.py FILE out/a.pth': 'truncated code other',
    'tools/model_converters/mm_to_scalablevit.py FILE out/a.pth': 'code other listed',
}


@pytest.fixture
def there(call, workspace, monkeypatch):
    """Call a tool in the workspace."""
    monkeypatch.chdir(workspace)
    monkeypatch.setenv('SHAPES_ROOT', 'shapes')
    return call


def refusal(there, command, file):
    """The sentence with which a command line ends."""
    said, _ = there(*command.replace('CONFIG', str(SEGMENTOR)).replace('FILE', file).split())
    assert isinstance(said, str)
    assert said.startswith(f'error: checkpoint {file} '), said
    assert said.isprintable()
    return said


@pytest.mark.parametrize(('command', 'kinds'), COMMANDS.items())
def test_every_command_line_refuses_in_one_sentence(workspace, bad, there, command, kinds):
    for kind in kinds.split():
        assert REASONS[kind] in refusal(there, command, f'{kind}.pth'), kind
    assert not (workspace / 'touched').exists()
    assert not list(workspace.glob('out/*.pth'))


@pytest.mark.parametrize('kind', ['truncated', 'code'])
def test_train_py_of_mmseg_refuses(workspace, bad, there, kind):
    """As its authors wrote it; test_tools.py has mmdet's."""
    options = ['--work-dir', 'out', '--cfg-options', f'load_from={kind}.pth']
    with pytest.raises(CheckpointError, match=f'^checkpoint {kind}.pth .*{REASONS[kind]}'):
        there(packaged('mmseg', 'train.py'), SEGMENTOR, *options)
    assert not (workspace / 'touched').exists()


def test_states_that_cannot_be_resumed_are_refused(workspace, there):
    whole = torch.load(workspace / 'whole.pth', weights_only=True)
    for reason, content in {
        'cannot be resumed from': dict(state_dict=whole['state_dict']),
        'cannot be resumed': dict(whole, meta=dict(epoch=0, iter='x', seed=[1])),
        'cannot be resumed from, ': dict(whole, optimizer=dict(state={})),
    }.items():
        torch.save(content, workspace / 'state.pth')
        assert reason in refusal(there, RESUME, 'state.pth')
