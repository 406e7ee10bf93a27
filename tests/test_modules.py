# Copyright (c) mmscalablevit contributors. All rights reserved.
"""What people do with the modules and weights of a model: ours is one like any other."""

import copy
import io
import pickle

import pytest
import torch
from golden import TINY, load_reference
from mmengine.model import ExponentialMovingAverage
from torch import nn
from torch.nn.utils import prune

from mmscalablevit import ScalableViT

IMAGES = torch.rand(2, 3, 61, 75, generator=torch.Generator().manual_seed(0))
LAYERS = nn.Linear, nn.Conv2d, nn.LayerNorm


@pytest.fixture
def net():
    return load_reference(ScalableViT(dict(TINY)))


@pytest.fixture
def wanted(net):
    with torch.no_grad():
        return net(IMAGES)


def assert_same(outs, wanted, **tolerances):
    for out, want in zip(outs, wanted, strict=True):
        torch.testing.assert_close(out, want, **tolerances)


def replace(model, kind, make):
    """Put ``make(layer)`` in the place of every layer of a kind; return how many."""
    layers = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, kind)]
    for name, layer in layers:
        parent, _, child = name.rpartition('.')
        setattr(model.get_submodule(parent), child, make(layer))
    return len(layers)


SHAPES = {
    'patch_embeds.0': (2, 16, 19, 16),
    'patch_embeds.0.proj': (2, 16, 16, 19),
    'pos_block.0': (2, 16, 19, 16),
    'stages.0.0': (2, 16, 19, 16),
    'stages.0.0.norm1': (2, 16, 19, 16),
    'stages.0.0.attn': (2, 16, 19, 16),
    # Windows of 49 pixels, three by three of each image.
    'stages.0.0.attn.qkv': (18, 49, 48),
    'stages.0.0.attn.lim_func': (2, 16, 21, 21),
    'stages.0.0.norm2': (2, 16, 19, 16),
    'stages.0.0.mlp': (2, 16, 19, 16),
    'stages.0.0.mlp.fc1': (2, 16, 19, 64),
    'stages.0.1.attn.q': (2, 16, 19, 20),
    'stages.0.1.attn.reduction': (2, 20, 2, 2),
    'stages.0.1.attn.k': (2, 2, 2, 20),
    'stages.3.1.attn.kv': (2, 2, 3, 64),
    'norm_list.3': (2, 2, 3, 32),
}


@pytest.mark.parametrize('mode', ['train', 'eval', 'no_grad'])
def test_every_module_is_called_once_with_its_map(net, mode):
    net.train(mode == 'train')
    calls = {}
    for name, module in net.named_modules():
        if not isinstance(module, (ScalableViT, nn.ModuleList)):
            calls[name] = []
            module.register_forward_hook(
                lambda module, args, out, seen=calls[name]: seen.append(tuple(out.shape))
            )
    with torch.set_grad_enabled(mode != 'no_grad'):
        net(IMAGES)
    assert {name: len(seen) for name, seen in calls.items()} == dict.fromkeys(calls, 1)
    assert {name: calls[name][0] for name in SHAPES} == SHAPES


class Wrapped(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)


class LoRA(Wrapped):
    """A layer plus a learned product of two narrow matrices."""

    def __init__(self, layer, rank=2):
        super().__init__(layer)
        self.down = nn.Linear(layer.in_features, rank, bias=False)
        self.up = nn.Linear(rank, layer.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x):
        return self.layer(x) + self.up(self.down(x))


@pytest.mark.parametrize('kind', LAYERS)
def test_layers_can_be_wrapped(net, wanted, kind):
    assert replace(net, kind, Wrapped) > 8
    with torch.no_grad():
        assert_same(net(IMAGES), wanted, rtol=0, atol=0)


def test_adapters_on_every_linear_layer_learn(net, wanted):
    net.requires_grad_(False)
    count = replace(net, nn.Linear, LoRA)
    assert_same(net(IMAGES), wanted, rtol=0, atol=0)
    adapters = {name: p for name, p in net.named_parameters() if p.requires_grad}
    assert len(adapters) == 2 * count
    for _ in range(2):
        loss = sum((out * torch.rand_like(out)).sum() for out in net(IMAGES))
        gradients = torch.autograd.grad(loss, adapters.values())
        with torch.no_grad():
            for parameter, gradient in zip(adapters.values(), gradients, strict=True):
                parameter -= 1e-3 * gradient
    # Those of `down` begin with the second step, as `up` begins with zeros.
    assert [n for n, g in zip(adapters, gradients, strict=True) if not g.any()] == []


def test_adapters_of_peft(net, wanted):
    peft = pytest.importorskip('peft', reason='peft is not installed')
    names = [name for name, layer in net.named_modules() if isinstance(layer, nn.Linear)]
    adapted = peft.get_peft_model(net, peft.LoraConfig(r=2, target_modules=names))
    assert_same(adapted(IMAGES), wanted)
    sum(out.mean() for out in adapted(IMAGES)).backward()
    learned = {name for name, p in adapted.named_parameters() if p.grad is not None}
    assert len(learned) == 2 * len(names)
    assert all('lora' in name for name in learned)


def test_pruned_layers_stay_pruned(net, wanted):
    layers = [layer for layer in net.modules() if isinstance(layer, (nn.Linear, nn.Conv2d))]
    for layer in layers:
        prune.l1_unstructured(layer, 'weight', amount=0.5)
    pruned = net(IMAGES)
    for layer in layers:
        prune.remove(layer, 'weight')
        assert (layer.weight == 0).float().mean() == pytest.approx(0.5, abs=0.05)
    assert_same(net(IMAGES), pruned, rtol=0, atol=0)
    assert not torch.allclose(pruned[0], wanted[0])


def test_dynamic_quantization_reaches_every_linear_layer(net, wanted):
    quantized = torch.ao.quantization.quantize_dynamic(net, {nn.Linear})
    kinds = [type(module) for module in quantized.modules()]
    count = sum(isinstance(module, nn.Linear) for module in net.modules())
    assert kinds.count(torch.ao.nn.quantized.dynamic.Linear) == count
    for out, want in zip(quantized(IMAGES), wanted, strict=True):
        assert (out - want).norm() < 0.1 * want.norm()
        assert not torch.equal(out, want)


@pytest.mark.parametrize('training', [True, False])
def test_symbolic_trace_serves_any_size(net, wanted, training):
    traced = torch.fx.symbolic_trace(net.train(training))
    called = [node.target for node in traced.graph.nodes if node.op == 'call_module']
    assert len(called) == len(set(called))
    assert 'stages.1.1.attn.k' in called
    other = torch.rand(1, 3, 40, 9)
    assert_same(traced(IMAGES), wanted, rtol=0, atol=0)
    assert_same(traced(other), net(other), rtol=0, atol=0)
    with pytest.raises(ValueError, match='in_channels=3'):
        traced(torch.rand(1, 4, 40, 40))


def saved_and_loaded(net):
    file = io.BytesIO()
    torch.save(net.state_dict(), file)
    file.seek(0)
    with torch.device('meta'):
        model = ScalableViT(dict(TINY)).eval()
    model.load_state_dict(torch.load(file, weights_only=True), strict=True, assign=True)
    return model


def averaged(net):
    average = ExponentialMovingAverage(net, momentum=0.1)
    average.update_parameters(net)
    return average


COPIES = {
    'deepcopy': copy.deepcopy,
    'pickle': lambda net: pickle.loads(pickle.dumps(net)),
    'state dict': saved_and_loaded,
    'moving average': averaged,
    'exported': lambda net: torch.export.export(net, (IMAGES,)).module(),
}


@pytest.mark.parametrize('make', COPIES.values(), ids=COPIES)
def test_a_copy_computes_the_same(net, wanted, make):
    with torch.no_grad():
        assert_same(make(net)(IMAGES), wanted, rtol=1e-5, atol=1e-5)


def test_functional_calls_take_their_parameters(net, wanted):
    parameters = {name: p.detach().clone() for name, p in net.named_parameters()}
    nn.init.zeros_(net.norm_list[0].weight)
    assert_same(torch.func.functional_call(net, parameters, (IMAGES,)), wanted)
