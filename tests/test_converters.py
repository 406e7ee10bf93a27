# Copyright (c) mmscalablevit contributors. All rights reserved.
"""Converters: exact both ways, refusing what is not whole; publishing."""

import hashlib

import pytest
import torch
from golden import TINY, in_old_names, read_json, reference_state
from jobs import ROOT, load_tool, run_tool
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope

from mmscalablevit import ScalableViT
from mmscalablevit.errors import CheckpointError

TOOLS = ROOT / 'tools' / 'model_converters'


def tool(name):
    return load_tool(f'tools/model_converters/{name}.py')


@pytest.fixture
def tiny(monkeypatch):
    """A small arch with a name, for the converters know the named ones alone."""
    zoo = dict(small=ScalableViT.arch_zoo['small'], tiny=TINY)
    monkeypatch.setattr(ScalableViT, 'arch_zoo', zoo)


def weights_of(**kwargs):
    model = ScalableViT(dict(TINY), **kwargs)
    return reference_state({k: v.shape for k, v in model.state_dict().items()})


HEADS = {
    'wide': {'0.weight': (40, 32), '0.bias': (40,), '1.weight': (40,), '1.bias': (40,)}
    | {'3.weight': (5, 40), '3.bias': (5,)},
    'plain': {'weight': (5, 32), 'bias': (5,)},
}


def classifier_weights(head):
    named = {f'head.{name}': shape for name, shape in HEADS[head].items()}
    return {**weights_of(stage_norm=None, final_norm=True), **reference_state(named)}


@pytest.fixture
def saved(tmp_path):
    def save(content, name='source.pth'):
        torch.save(content, tmp_path / name)
        return str(tmp_path / name)

    return save


def assert_same(state, wanted):
    """The same names in the same order, and the same bits."""
    assert list(state) == list(wanted)
    for name, tensor in state.items():
        assert tensor.dtype == wanted[name].dtype
        assert torch.equal(tensor, wanted[name]), name


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize('head', ['wide', 'plain'])
def test_classifier_and_back(tiny, saved, head, dtype):
    state = {name: tensor.to(dtype) for name, tensor in classifier_weights(head).items()}
    source = saved(dict(model=state, epoch=299))
    converted, left_out = tool('scalablevit_to_mm').convert(source, 'classifier')
    assert converted['meta'] == dict(arch='tiny')
    assert left_out == []
    back, arch, left_out = tool('mm_to_scalablevit').convert(saved(converted), 'released')
    assert (arch, left_out) == ('tiny', [])
    assert_same(back['model'], state)


@pytest.mark.parametrize(('naming', 'stages'), [('released', 4), ('detection', 4), ('released', 2)])
def test_backbone_and_back(tiny, saved, naming, stages):
    wanted = weights_of(out_indices=tuple(range(stages)))
    state = in_old_names(wanted) if naming == 'detection' else wanted
    converted, _ = tool('scalablevit_to_mm').convert(saved(dict(state_dict=state)), 'backbone')
    assert_same(converted['state_dict'], wanted)
    back, arch, left_out = tool('mm_to_scalablevit').convert(saved(converted), naming)
    assert (arch, left_out) == ('tiny', [])
    assert_same(back['model' if naming == 'released' else 'state_dict'], state)


def test_what_a_backbone_leaves_out_is_named(tiny, saved):
    classifier = saved(classifier_weights('wide'))
    converted, left_out = tool('scalablevit_to_mm').convert(classifier, 'backbone')
    assert left_out == ['head']
    assert_same(converted['state_dict'], weights_of(stage_norm=None, final_norm=True))

    detector = {f'backbone.{name}': tensor for name, tensor in weights_of().items()}
    detector.update({'neck.fc.weight': ONE, 'rpn_head.fc.weight': ONE})
    back, _, left_out = tool('mm_to_scalablevit').convert(saved(detector), 'released')
    assert left_out == ['neck', 'rpn_head']
    assert_same(back['model'], weights_of())


NAME = 'stages.2.1.attn.proj.bias'


def without(start):
    return lambda state: {k: v for k, v in state.items() if not k.startswith(start)}


def with_tensor(name, tensor):
    return lambda state: {**state, name: tensor}


ONE = torch.ones(1)
NAN = torch.full((32,), torch.nan)
# Other faults of a backbone: test_checkpoint.py.
BAD = {
    'parameter without a tensor': ('backbone', without(NAME), rf'1 missing \({NAME}\)$'),
    'NaN': ('backbone', with_tensor(NAME, NAN), f'NaN or infinite values in {NAME}'),
    'no head': ('classifier', without('head.'), 'is no released .* it holds patch_embeds.0'),
    'other head': ('classifier', with_tensor('head.5.bias', ONE), 'is no released classifier'),
    'dense backbone': ('classifier', lambda state: weights_of(), 'it holds .*norm_list.3$'),
}


@pytest.mark.parametrize(('task', 'change', 'text'), BAD.values(), ids=BAD)
def test_what_is_not_whole_is_refused(tiny, saved, task, change, text):
    source = saved(change(classifier_weights('wide')))
    with pytest.raises(CheckpointError, match=text):
        tool('scalablevit_to_mm').convert(source, task)


def test_released_small_classifier_from_the_command_line(saved, tmp_path):
    """By the names with which test_classification.py has the authors' logits."""
    official = reference_state(read_json('state_dict_keys_small.json'))
    source = saved(dict(model=official))
    target, back = tmp_path / 'new' / 'a.pth', tmp_path / 'b.pth'
    said = run_tool([TOOLS / 'scalablevit_to_mm.py', source, target, '--task', 'classifier'], ROOT)
    assert f"{target}: classifier of arch 'small', 492 tensors" in said

    names = (
        name.replace('head.', 'head.fc.') if name.startswith('head.') else f'backbone.{name}'
        for name in official
    )
    wanted = dict(zip(names, official.values(), strict=True))
    assert_same(torch.load(target, weights_only=True)['state_dict'], wanted)
    run_tool([TOOLS / 'mm_to_scalablevit.py', target, back], ROOT)
    assert_same(torch.load(back, weights_only=True)['model'], official)
    run_tool([TOOLS / 'mm_to_scalablevit.py', target, back, '--naming', 'detection'], ROOT)
    for part in ('norm.', 'head.'):
        official = without(part)(official)
    assert_same(torch.load(back, weights_only=True)['state_dict'], in_old_names(official))


@pytest.mark.parametrize('name', ['model', 'model.pth', 'model.v1'])
def test_publishing_strips_and_names_by_hash(saved, tmp_path, name):
    state = weights_of()
    optimizer = torch.optim.AdamW(torch.nn.Linear(2, 2).parameters()).state_dict()
    content = dict(meta=dict(epoch=3), state_dict=state, optimizer=optimizer, message_hub={})
    out, kept = str(tmp_path / 'out' / name), ['meta', 'state_dict']
    published, removed = tool('publish_model').publish(saved(content), out, kept)
    assert removed == ['optimizer', 'message_hub']
    digest = hashlib.sha256(published.read_bytes()).hexdigest()
    assert published.name == f'{name.removesuffix(".pth")}-{digest[:8]}.pth'
    assert list(published.parent.iterdir()) == [published]
    content = torch.load(published, weights_only=True)
    assert content['meta'] == dict(epoch=3)
    assert_same(content.pop('state_dict'), state)
    assert list(content) == ['meta']


def test_publishing_nothing_is_refused(saved, tmp_path):
    with pytest.raises(CheckpointError, match='without state_dict; it holds model'):
        tool('publish_model').publish(saved(dict(model={})), str(tmp_path / 'o'), ['state_dict'])
    assert not (tmp_path / 'o.pth').exists()


USERS = {
    'mmdet': 'detection/mask-rcnn_scalablevit-s_fpn_1x_coco.py',
    'mmseg': 'segmentation/scalablevit-s_upernet_8xb2-160k_ade20k-512x512.py',
    'mmpretrain': 'classification/scalablevit-s_8xb128_in1k.py',
}


@pytest.mark.parametrize(('toolbox', 'config'), USERS.items())
def test_released_classifier_loads_in_the_toolboxes(saved, toolbox, config):
    """test_checkpoint.py has the other layouts."""
    pytest.importorskip(toolbox)
    weights = classifier_weights('wide')
    init_cfg = dict(type='Pretrained', checkpoint=saved(dict(model=weights)))
    cfg = Config.fromfile(ROOT / 'configs' / config).model.backbone
    init_default_scope(toolbox)
    backbone = MODELS.build(dict(cfg, arch=TINY, init_cfg=init_cfg))
    backbone.init_weights()
    state = backbone.state_dict()
    held = [name for name in weights if name.split('.')[0] not in ('head', 'norm')]
    if toolbox == 'mmpretrain':
        held += ['norm.weight', 'norm.bias']
        assert len(state) == len(held)
    for name in held:
        assert torch.equal(state[name], weights[name]), name
