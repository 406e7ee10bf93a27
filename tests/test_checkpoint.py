# Copyright (c) mmscalablevit contributors. All rights reserved.
"""Checkpoints of every layout, loaded strictly; what is refused, and with which words."""

import argparse
import functools
import http.server
import re
import threading

import pytest
import torch
from golden import TINY, in_old_names, read_json, reference_state
from mmengine.config import ConfigDict
from mmengine.model import PretrainedInit
from mmengine.registry import MODELS
from safetensors.torch import save_file

from mmscalablevit import ScalableViT
from mmscalablevit.checkpoint import released
from mmscalablevit.checkpoint.released import load_backbone_checkpoint
from mmscalablevit.errors import CheckpointError

FIRST = 'patch_embeds.0.proj.weight'


def tiny(**kwargs):
    return ScalableViT(dict(TINY), **kwargs)


def weights_of(model):
    """Random weights under the model's own names; seeded by the names, norms included."""
    return reference_state({k: v.shape for k, v in model.state_dict().items()})


def classifier_weights():
    """A released classifier of the tiny arch, with the four parts of its head."""
    state = weights_of(tiny(stage_norm=None, final_norm=True))
    sizes = {'0.weight': (40, 32), '1.weight': (40,), '3.weight': (5, 40)}
    sizes |= {'0.bias': (40,), '1.bias': (40,), '3.bias': (5,)}
    return {**state, **reference_state({f'head.{name}': size for name, size in sizes.items()})}


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
    for module in ('released', 'reading'):
        name = f'mmscalablevit.checkpoint.{module}.print_log'
        monkeypatch.setattr(name, lambda line, **kwargs: lines.append(line))
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


def renamed(state, rename):
    return {rename(name): tensor for name, tensor in state.items()}


# What a file holds, given the weights; and what the log says of it, besides that it was loaded.
FILES = {
    'bare': (lambda state: state, []),
    'model': (lambda state: dict(model=state), []),
    'arguments of the training': (
        lambda state: dict(model=state, args=argparse.Namespace(lr=5e-4, output_dir='runs')),
        [],
    ),
    'model and its average': (
        lambda state: dict(model_ema={k: v + 1 for k, v in state.items()}, model=state),
        ["took 'model', not 'model_ema'"],
    ),
    'distributed': (
        lambda state: dict(model=renamed(state, 'module.{}'.format)),
        [f'module.{FIRST} is read as {FIRST}'],
    ),
    'averaged': (
        lambda state: dict(renamed(state, 'module.{}'.format), n_averaged=torch.tensor(7)),
        [f'n_averaged left out; module.{FIRST} is read as {FIRST}'],
    ),
    'average of a compiled, distributed model': (
        lambda state: dict(
            ema_state_dict={
                'steps': torch.tensor(3),
                **renamed(state, 'module._orig_mod.module.{}'.format),
            }
        ),
        [f'steps left out; module._orig_mod.module.{FIRST} is read as {FIRST}'],
    ),
}


@pytest.mark.parametrize(('wrap', 'said'), FILES.values(), ids=FILES)
def test_files_as_they_occur_load_and_are_logged(saved, log, wrap, said):
    state = classifier_weights()
    path = saved(wrap(state))
    assert_holds(load(path, stage_norm=None, final_norm=True), state)
    assert log[-1] == f'Loaded {path} into ScalableViT; left out: head'
    assert len(log) == 1 + len(said)
    for line, pattern in zip(log, said, strict=False):
        assert re.search(pattern, line), log


@pytest.mark.parametrize(('dtype', 'whole'), [(torch.float16, True), (torch.bfloat16, False)])
def test_half_precision_is_widened_exactly(saved, log, dtype, whole):
    state = {k: v if k == FIRST and not whole else v.to(dtype) for k, v in dense_weights().items()}
    assert_holds(load(saved(state)), {name: tensor.float() for name, tensor in state.items()})
    assert f'weights of {dtype} are widened to torch.float32' in log[0]


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
        f'Loaded {path} into ScalableViT; left out: norm, head; '
        'norm_list is initialized to identity'
    ]


IN_BACKBONE = 'backbone.{}'.format
OTHERS = {'neck.fc.weight': torch.ones(2), 'rpn_head.fc.bias': torch.ones(2)}
LATE = [
    f'{part}.{i}' for part in ('patch_embeds', 'pos_block', 'stages', 'norm_list') for i in (2, 3)
]
# What the file holds, given the weights; init_cfg; arguments of the model; what is left out.
LAYOUTS = {
    'detection naming': (in_old_names, {}, {}, []),
    'toolbox': (lambda w: {**renamed(w, IN_BACKBONE), **OTHERS}, {}, {}, ['neck', 'rpn_head']),
    'toolbox, detection naming': (
        lambda w: {**renamed(in_old_names(w), IN_BACKBONE), **OTHERS},
        dict(prefix='backbone'),
        {},
        ['neck', 'rpn_head'],
    ),
    'fewer stages': (dict, {}, dict(out_indices=(0, 1)), LATE),
    'norms of outputs': (
        dict,
        {},
        dict(stage_norm='output', out_indices=(1, 3)),
        ['norm_list.0', 'norm_list.2'],
    ),
}


@pytest.mark.parametrize(('wrap', 'cfg', 'kwargs', 'left_out'), LAYOUTS.values(), ids=LAYOUTS)
def test_every_layout_loads(saved, log, wrap, cfg, kwargs, left_out):
    state = dense_weights()
    path = saved(dict(state_dict=wrap(state)))
    assert_holds(load(path, cfg=cfg, **kwargs), state)
    loaded, _, said = log[-1].partition('; left out: ')
    assert loaded == f'Loaded {path} into ScalableViT'
    assert sorted(filter(None, said.split(', '))) == sorted(left_out)


def test_pretrained_of_a_segmentor_loads(saved):
    pytest.importorskip('mmseg.models')
    state = dense_weights()
    head = dict(type='mmseg.FCNHead', in_channels=32, channels=8, num_classes=2)
    backbone = ConfigDict(type='ScalableViT', arch=TINY)
    cfg = dict(backbone=backbone, decode_head=head, pretrained=saved(state))
    model = MODELS.build(dict(type='mmseg.EncoderDecoder', test_cfg=dict(mode='whole'), **cfg))
    model.init_weights()
    assert_holds(model.backbone, state)
    with pytest.raises(ValueError, match='by both init_cfg and pretrained'):
        tiny(pretrained='a.pth', init_cfg=dict(type='Pretrained', checkpoint='b.pth'))


@pytest.mark.parametrize('kind', ['Pretrained', 'mmengine.Pretrained', PretrainedInit], ids=str)
def test_every_way_to_write_the_type(saved, kind):
    state = dense_weights()
    constant = dict(type='Constant', layer='Linear', val=0.5)
    init_cfg = [dict(type=kind, checkpoint=saved(state)), constant]
    model = tiny(init_cfg=init_cfg)
    model.init_weights()
    assert_holds(model, state)


def test_file_url_home_folder_and_safetensors(saved, monkeypatch, tmp_path):
    path = saved(dense_weights())
    assert_holds(load(f'file://{path}'), dense_weights())
    save_file(dense_weights(), tmp_path / 'a.safetensors')
    assert_holds(load(str(tmp_path / 'a.safetensors')), dense_weights())
    monkeypatch.setenv('HOME', str(tmp_path))
    assert_holds(load('~/checkpoint.pth'), dense_weights())


class Served(http.server.SimpleHTTPRequestHandler):
    requests = []

    def log_message(self, *args):
        self.requests.append(args)


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path / 'hub'))
    monkeypatch.setattr(Served, 'requests', [])
    handler = functools.partial(Served, directory=tmp_path)
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield f'http://127.0.0.1:{httpd.server_port}'
        httpd.shutdown()


def test_http_url_is_downloaded_once_and_failures_are_named(server, saved):
    saved(dense_weights(), 'scalablevit-b.pth')
    for _ in range(2):
        assert_holds(load(f'{server}/scalablevit-b.pth'), dense_weights())
    assert len(Served.requests) == 1
    saved({}, 'scalablevit-0123abcd.pth')
    with pytest.raises(CheckpointError, match=r'0123abcd.pth cannot be downloaded \(invalid hash'):
        load(f'{server}/scalablevit-0123abcd.pth')
    with pytest.raises(CheckpointError, match=r'none.pth cannot be downloaded .*404'):
        load(f'{server}/none.pth')


def test_unknown_address_is_named():
    with pytest.raises(CheckpointError, match=r'gopher://host/a.pth: no file backend'):
        load('gopher://host/a.pth')


def without(state, *names):
    return {name: tensor for name, tensor in state.items() if name not in names}


LIM = 'stages.0.0.attn.lim_func.weight'
NORM, FIFTH = 'norm_list.1.weight', 'stages.4.0.norm1.bias'
ONE = torch.ones(1)
# What the file holds, given the weights, and what is said of it; more in test_hostile_checkpoints.
BAD_WEIGHTS = {
    'tensor without a place': (lambda w: {**w, 'extra': ONE}, r'1 unexpected \(extra\)$'),
    'parameter without a tensor': (lambda w: without(w, LIM), rf'1 missing \({LIM}\)$'),
    'fifth stage': (lambda w: {**w, FIFTH: ONE}, rf'1 unexpected \({FIFTH}\)$'),
    'shape': (
        lambda w: {**w, LIM: torch.ones(2, 1, 3, 3)},
        rf'1 of another shape \({LIM} of \(2, 1, 3, 3\) in place of \(16, 1, 3, 3\)\)$',
    ),
    'other network': (
        lambda w: {f'layer.{i}.weight': ONE for i in range(9)},
        r'missing \(.* 170 more\); 9 unexpected \(layer.0.weight, .* 5 more\)$',
    ),
    'both namings': (lambda w: {**w, **in_old_names(w)}, 'under two names'),
}


@pytest.mark.parametrize(('content', 'text'), BAD_WEIGHTS.values(), ids=BAD_WEIGHTS)
def test_what_does_not_fit_is_refused(saved, content, text):
    path = saved(content(dense_weights()))
    model = tiny()
    model.load_state_dict(dense_weights())
    with pytest.raises(CheckpointError, match=text) as error:
        load_backbone_checkpoint(model, path)
    assert path in str(error.value)
    assert '\n' not in str(error.value)
    # A refused checkpoint leaves no trace.
    assert_holds(model, dense_weights())


def test_what_is_set_otherwise_is_named(saved):
    path = saved(dense_weights())
    with pytest.raises(CheckpointError, match="use stage_norm='chained' or 'output'"):
        load(path, stage_norm=None)
    with pytest.raises(CheckpointError, match=r"under the prefix 'student.', only .*stages.0"):
        load(path, cfg=dict(prefix='student'))
    with pytest.raises(CheckpointError, match=r'2 missing \(norm.weight, norm.bias\)'):
        load(path, final_norm=True)


def empty_state(arch, **kwargs):
    """Zeros of the right names and shapes, each of a byte."""
    with torch.device('meta'):
        model = ScalableViT(arch, **kwargs)
    return {k: torch.zeros(v.shape, dtype=torch.uint8) for k, v in model.state_dict().items()}


ARCHS = {
    'small': ('base', {}, "it holds arch='small', use --cfg-options model.backbone.arch=small"),
    'small-merged': ('small', {}, "it holds arch='small-merged', use"),
    'large': ('base', {}, "it holds arch='large', use"),
    's': ('small', dict(in_channels=4), 'use in_channels=4'),
}


@pytest.mark.parametrize('held', ARCHS)
def test_another_arch_is_named(saved, held):
    arch, kwargs, text = ARCHS[held]
    path = saved(dict(model=empty_state(held, stage_norm=None, **kwargs)))
    kwargs.pop('in_channels', None)
    with torch.device('meta'):
        model = ScalableViT(arch, **kwargs)
    with pytest.raises(CheckpointError, match=text):
        load_backbone_checkpoint(model, path)


@pytest.mark.parametrize('variant', ['small', 'base', 'large'])
def test_every_name_of_the_authors_code_has_its_place(variant):
    shapes = read_json(f'state_dict_keys_{variant}.json')
    trunk = {k: shape for k, shape in shapes.items() if k.split('.')[0] != 'head'}
    with torch.device('meta'):
        model = ScalableViT(variant, stage_norm=None, final_norm=True)
    assert {k: list(v.shape) for k, v in model.state_dict().items()} == trunk
    assert released.nearest_arch(ScalableViT, empty_state(variant)) == (variant, True)


@pytest.mark.parametrize('variant', ['small', 'base', 'large', 'small_kvmerged'])
def test_names_of_the_detection_code_translate_both_ways(variant):
    for entry in read_json(f'port_key_map_{variant}.json'):
        official = entry.get('official') or entry['official_style']
        assert released.released_name(entry['port']) == official
        assert released.detection_name(official) == entry['port']
