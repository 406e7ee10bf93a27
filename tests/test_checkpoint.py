# Copyright (c) mmscalablevit contributors. All rights reserved.
"""Checkpoints of every layout, loaded strictly; what is refused, and with which words."""

import argparse
import functools
import http.server
import threading
from collections import OrderedDict

import numpy as np
import pytest
import torch
from golden import (
    REFERENCE,
    in_old_names,
    read_json,
    reference_input,
    reference_state,
    relative_error,
)
from mmengine.logging import MessageHub
from mmengine.model import BaseModel, PretrainedInit
from mmengine.registry import MODELS
from safetensors.torch import load_file, save_file
from torch import nn

from mmscalablevit import ScalableViT
from mmscalablevit.checkpoint.released import (
    detection_name,
    load_backbone_checkpoint,
    nearest_arch,
    released_name,
)
from mmscalablevit.errors import CheckpointError

TINY = dict(
    embed_dims=(16, 16, 32, 32),
    num_heads=(2, 2, 4, 4),
    depths=(2, 2, 3, 2),
    c_ratios=(1.25, 2, 0.5, 1),
    sr_ratios=(8, 4, 2, 1),
    window_sizes=(7, 5, 7, 3),
    mlp_ratios=(4, 2, 4, 4),
    ssa_kv='separate',
)


def tiny(**kwargs):
    return ScalableViT(dict(TINY), **kwargs)


def weights_of(model):
    """Random weights under the model's own names; seeded by the names, norms included."""
    return reference_state({k: v.shape for k, v in model.state_dict().items()})


def classifier_weights():
    """A released classifier of the tiny arch, with the four parts of its head."""
    state = weights_of(tiny(stage_norm=None, final_norm=True))
    shapes = {
        'head.0.weight': (40, 32),
        'head.0.bias': (40,),
        'head.1.weight': (40,),
        'head.1.bias': (40,),
        'head.3.weight': (5, 40),
        'head.3.bias': (5,),
    }
    return {**state, **reference_state(shapes)}


def dense_weights():
    return weights_of(tiny())


@pytest.fixture
def saved(tmp_path):
    def save(content, name='checkpoint.pth'):
        torch.save(content, tmp_path / name)
        return str(tmp_path / name)

    return save


@pytest.fixture
def log(monkeypatch):
    lines = []
    monkeypatch.setattr(
        'mmscalablevit.checkpoint.released.print_log', lambda line, **kwargs: lines.append(line)
    )
    return lines


def load(path, **kwargs):
    init_cfg = dict(type='Pretrained', checkpoint=path, **kwargs.pop('cfg', {}))
    model = tiny(init_cfg=init_cfg, **kwargs)
    model.init_weights()
    return model


def assert_holds(model, weights):
    """Exactly these values, for every parameter of the model."""
    for name, parameter in model.state_dict().items():
        assert torch.equal(parameter, weights[name]), name


WRAPPERS = {
    'bare': lambda state: state,
    'ordered': OrderedDict,
    'model': lambda state: dict(model=state),
    'state_dict': lambda state: dict(state_dict=state, meta=dict(epoch=3)),
    'model_ema': lambda state: dict(model_ema=state),
    'distributed': lambda state: dict(model={f'module.{k}': v for k, v in state.items()}),
    'with the arguments of the training': lambda state: dict(
        model=state, args=argparse.Namespace(lr=5e-4, output_dir='runs'), epoch=299
    ),
    'model before its average': lambda state: dict(
        model_ema={k: v + 1 for k, v in state.items()}, model=state
    ),
}


@pytest.mark.parametrize('wrap', WRAPPERS.values(), ids=WRAPPERS)
def test_released_classifier_loads_from_every_wrapper(saved, wrap):
    state = classifier_weights()
    assert_holds(load(saved(wrap(state)), stage_norm=None, final_norm=True), state)


def test_known_differences_of_a_classifier_are_logged_in_one_line(saved, log):
    state = classifier_weights()
    path = saved(dict(model=state))
    model = load(path)
    identity = {
        name: torch.full_like(parameter, float(name.endswith('weight')))
        for name, parameter in model.state_dict().items()
        if name.startswith('norm_list.')
    }
    assert len(identity) == 8
    assert_holds(model, {**state, **identity})
    assert log == [
        f'Loaded {path} into ScalableViT; left out: norm, head; norm_list starts from identity'
    ]


def test_norm_list_starts_from_identity_in_a_model_that_was_trained(saved):
    model = tiny()
    model.load_state_dict(dense_weights())
    load_backbone_checkpoint(model, saved(classifier_weights()))
    assert model.norm_list[2].weight.eq(1).all()
    assert model.norm_list[2].bias.eq(0).all()


def test_detection_naming_loads(saved, log):
    state = dense_weights()
    path = saved(dict(state_dict=in_old_names(state)))
    assert_holds(load(path), state)
    assert log == [f'Loaded {path} into ScalableViT']


@pytest.mark.parametrize('cfg', [{}, dict(prefix='backbone.'), dict(prefix='backbone')], ids=str)
@pytest.mark.parametrize('rename', [dict, in_old_names])
def test_model_of_a_toolbox_loads(saved, log, cfg, rename):
    state = dense_weights()
    detector = {f'backbone.{name}': tensor for name, tensor in rename(state).items()}
    detector.update({'neck.fc.weight': torch.ones(2), 'rpn_head.fc.bias': torch.ones(2)})
    path = saved(dict(state_dict=detector))
    assert_holds(load(path, cfg=cfg), state)
    assert log == [f'Loaded {path} into ScalableViT; left out: neck, rpn_head']


def test_other_prefix_loads(saved):
    state = dense_weights()
    path = saved({f'teacher.backbone.{name}': tensor for name, tensor in state.items()})
    assert_holds(load(path, cfg=dict(prefix='teacher.backbone')), state)


@pytest.mark.parametrize('kind', ['Pretrained', 'mmengine.Pretrained', PretrainedInit], ids=str)
def test_every_way_to_write_the_type(saved, kind):
    state = dense_weights()
    init_cfg = [
        dict(type=kind, checkpoint=saved(state)),
        dict(type='Constant', layer='Linear', val=0.5),
    ]
    model = tiny(init_cfg=init_cfg)
    model.init_weights()
    assert_holds(model, state)


def test_stages_that_are_not_built_are_left_out(saved, log):
    path = saved(dense_weights())
    assert_holds(load(path, out_indices=(0, 1)), dense_weights())
    left_out = log[0].split('left out: ')[1].split(', ')
    parts = ('patch_embeds', 'pos_block', 'stages', 'norm_list')
    assert set(left_out) == {f'{part}.{i}' for part in parts for i in (2, 3)}


def test_norms_of_stages_that_are_not_put_out_are_left_out(saved):
    state = dense_weights()
    assert_holds(load(saved(state), stage_norm='output', out_indices=(1, 3)), state)


def test_safetensors_load(tmp_path):
    state = dense_weights()
    save_file(state, tmp_path / 'weights.safetensors')
    assert_holds(load(str(tmp_path / 'weights.safetensors')), state)


def test_checkpoint_of_mmengines_runner_loads(tmp_path):
    """As the runner writes it: with optimizer, scalar history and numpy numbers."""
    from mmengine.config import Config
    from mmengine.runner import Runner
    from torch.utils.data import DataLoader, TensorDataset

    class Classifier(BaseModel):
        def __init__(self):
            super().__init__()
            self.backbone = tiny()
            self.fc = nn.Linear(32, 2)

        def forward(self, inputs, mode='tensor'):
            return dict(loss=self.fc(self.backbone(inputs)[-1].mean((2, 3))).square().mean())

    runner = Runner(
        Classifier(),
        str(tmp_path),
        train_dataloader=DataLoader(TensorDataset(torch.rand(2, 3, 32, 32))),
        train_cfg=dict(by_epoch=True, max_epochs=1),
        optim_wrapper=dict(optimizer=dict(type='AdamW', lr=1e-3)),
        default_hooks=dict(checkpoint=dict(type='CheckpointHook', interval=1)),
        param_scheduler=dict(type='LinearLR', start_factor=0.1, by_epoch=False),
        cfg=Config(dict(work_dir=str(tmp_path))),
        experiment_name='checkpoint',
    )
    MessageHub.get_current_instance().update_info('best', np.float64(0.5))
    runner.train()
    path = tmp_path / 'epoch_1.pth'
    assert {'optimizer', 'message_hub'} <= torch.load(path, weights_only=False).keys()
    assert_holds(load(str(path)), runner.model.backbone.state_dict())


def test_file_url_and_home_folder(saved, monkeypatch, tmp_path):
    path = saved(dense_weights())
    assert_holds(load(f'file://{path}'), dense_weights())
    monkeypatch.setenv('HOME', str(tmp_path))
    assert_holds(load('~/checkpoint.pth'), dense_weights())


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path / 'hub'))
    folder = tmp_path / 'served'
    folder.mkdir()
    requests = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            requests.append(args)

    handler = functools.partial(Handler, directory=folder)
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield f'http://127.0.0.1:{httpd.server_port}', folder, requests
        httpd.shutdown()


def test_http_url_is_downloaded_once(server):
    url, folder, requests = server
    torch.save(dense_weights(), folder / 'scalablevit-b.pth')
    for _ in range(2):
        assert_holds(load(f'{url}/scalablevit-b.pth'), dense_weights())
    assert len(requests) == 1


def test_http_failures_are_named(server):
    url, folder, _ = server
    torch.save(dense_weights(), folder / 'scalablevit-0123abcd.pth')
    with pytest.raises(CheckpointError, match=r'0123abcd.pth cannot be downloaded \(invalid hash'):
        load(f'{url}/scalablevit-0123abcd.pth')
    with pytest.raises(CheckpointError, match=r'none.pth cannot be downloaded .*404'):
        load(f'{url}/none.pth')


def test_unknown_address_is_named():
    with pytest.raises(CheckpointError, match=r'gopher://host/a.pth: no file backend'):
        load('gopher://host/a.pth')


class Opaque:
    """Stands for whatever code somebody's training script pickles."""


def without(state, *names):
    return {name: tensor for name, tensor in state.items() if name not in names}


LIM = 'stages.0.0.attn.lim_func.weight'
BAD_WEIGHTS = {
    'tensor without a place': (
        dict(classifier_weights(), extra=torch.ones(1)),
        r'1 unexpected \(extra\)$',
    ),
    'parameter without a tensor': (without(dense_weights(), LIM), rf'1 missing \({LIM}\)$'),
    'some norms without a tensor': (
        without(dense_weights(), 'norm_list.1.weight'),
        r'1 missing \(norm_list.1.weight\)$',
    ),
    'fifth stage': (
        dict(dense_weights(), **{'stages.4.0.norm1.bias': torch.ones(1)}),
        r'1 unexpected \(stages.4.0.norm1.bias\)$',
    ),
    'shape': (
        dict(dense_weights(), **{LIM: torch.ones(2, 1, 3, 3)}),
        rf'1 of another shape \({LIM} of \(2, 1, 3, 3\) in place of \(16, 1, 3, 3\)\)$',
    ),
    'other network': (
        {f'layer.{i}.weight': torch.ones(1) for i in range(9)},
        r'missing \(.* 170 more\); 9 unexpected \(layer.0.weight, .* 5 more\)$',
    ),
    'both namings': ({**dense_weights(), **in_old_names(dense_weights())}, 'under two names'),
    'no tensor': (dict(model=dict(epoch=3)), r'no tensors \(epoch\)'),
    'empty dict': ({}, 'no weights'),
    'NaN': (dict(dense_weights(), **{LIM: torch.full((16, 1, 3, 3), torch.nan)}), f'NaN .* {LIM}'),
    'integers': (
        dict(dense_weights(), **{LIM: torch.ones(16, 1, 3, 3, dtype=torch.int64)}),
        f'{LIM} as torch.int64',
    ),
    'list': ([1, 2], 'a list and not a dict'),
    'code': (dict(model=dense_weights(), extra=Opaque()), r'Python code \(.*Opaque\).*torch.save'),
}


@pytest.mark.parametrize(('content', 'text'), BAD_WEIGHTS.values(), ids=BAD_WEIGHTS)
def test_what_does_not_fit_is_refused(saved, content, text):
    path = saved(content)
    model = tiny()
    model.load_state_dict(dense_weights())
    with pytest.raises(CheckpointError, match=text) as error:
        load_backbone_checkpoint(model, path)
    assert path in str(error.value)
    assert '\n' not in str(error.value)
    # A refused checkpoint leaves no trace.
    assert_holds(model, dense_weights())


@pytest.mark.parametrize('name', ['a.pth', 'a.safetensors'])
def test_damaged_files_are_named(tmp_path, name):
    path = tmp_path / name
    with pytest.raises(FileNotFoundError, match=f'{name} does not exist'):
        load(str(path))
    if name.endswith('pth'):
        torch.save(dense_weights(), path)
    else:
        save_file(dense_weights(), path)
    whole = path.read_bytes()
    for content in (b'', b'<html>404</html>', whole[: len(whole) // 2]):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=f'{name} is damaged'):
            load(str(path))


def test_norms_without_a_place_say_which_argument_to_set(saved):
    with pytest.raises(CheckpointError, match="use stage_norm='chained' or 'output'"):
        load(saved(dense_weights()), stage_norm=None)


def test_prefix_without_names_is_refused(saved):
    with pytest.raises(CheckpointError, match=r"under the prefix 'student.', only .*stages.0"):
        load(saved(dense_weights()), cfg=dict(prefix='student'))


def test_final_norm_needs_the_classifiers_norm(saved):
    with pytest.raises(CheckpointError, match=r'2 missing \(norm.weight, norm.bias\)'):
        load(saved(dense_weights()), final_norm=True)


def empty_state(arch, **kwargs):
    """Zeros of the right names and shapes that take no room."""
    with torch.device('meta'):
        model = ScalableViT(arch, **kwargs)
    return {k: torch.zeros(()).expand(v.shape) for k, v in model.state_dict().items()}


@pytest.mark.parametrize('held', ['small', 'small-merged', 'base', 'large'])
def test_wrong_arch_is_named(saved, held):
    path = saved(dict(model=empty_state(held, stage_norm=None)))
    with torch.device('meta'):
        model = ScalableViT('base' if held != 'base' else 'small')
    with pytest.raises(CheckpointError, match=f"it holds arch='{held}', use that arch"):
        load_backbone_checkpoint(model, path)


def test_wrong_arch_is_named_for_fewer_stages(saved):
    path = saved(dict(state_dict=empty_state('small-merged', out_indices=(0, 1))))
    with torch.device('meta'):
        model = ScalableViT('small', out_indices=(0, 1))
    with pytest.raises(CheckpointError, match="it holds arch='small-merged'"):
        load_backbone_checkpoint(model, path)


def test_wrong_in_channels_are_named(saved):
    path = saved(empty_state('small', in_channels=4))
    with torch.device('meta'):
        model = ScalableViT('small')
    with pytest.raises(CheckpointError, match='use in_channels=4'):
        load_backbone_checkpoint(model, path)


@pytest.mark.parametrize('variant', ['small', 'base', 'large'])
def test_every_name_of_the_authors_code_has_its_place(variant):
    shapes = read_json(f'state_dict_keys_{variant}.json')
    trunk = {k: shape for k, shape in shapes.items() if k.split('.')[0] != 'head'}
    with torch.device('meta'):
        model = ScalableViT(variant, stage_norm=None, final_norm=True)
    assert {k: list(v.shape) for k, v in model.state_dict().items()} == trunk
    assert nearest_arch(ScalableViT, empty_state(variant)) == (variant, True)


@pytest.mark.parametrize('variant', ['small', 'base', 'large', 'small_kvmerged'])
def test_names_of_the_detection_code_translate_both_ways(variant):
    for entry in read_json(f'port_key_map_{variant}.json'):
        official = entry.get('official') or entry['official_style']
        assert released_name(entry['port']) == official
        assert detection_name(official) == entry['port']


def test_file_in_detection_names_gives_the_golden_features(saved):
    """The full small-merged model, through a file as the authors' detection code writes it."""
    entries = read_json('port_key_map_small_kvmerged.json')
    official = reference_state({e['official_style']: e['shape'] for e in entries})
    detector = {f'backbone.{e["port"]}': official[e['official_style']] for e in entries}
    path = saved(dict(state_dict=detector))
    model = MODELS.build(
        dict(
            type='ScalableViT',
            arch='small-merged',
            init_cfg=dict(type='Pretrained', checkpoint=path),
        )
    )
    model.init_weights()
    golden = load_file(REFERENCE / 'dense_small_kvmerged.safetensors')
    with torch.no_grad():
        outs = model.eval()(reference_input(102, (1, 3, 64, 96)))
    for i, out in enumerate(outs):
        assert relative_error(out, golden[f'small-kvmerged_1x3x64x96_norm1.stage{i + 1}']) < 1e-5
