# Copyright (c) mmscalablevit contributors. All rights reserved.
"""What makes the network fast, in counts that do not depend on the machine's speed."""

import shutil
import weakref

import pytest
import torch
from golden import golden_errors, golden_model, read_json
from plain import plain_forward
from torch import nn
from torch._dynamo.utils import counters
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mmscalablevit import ScalableViT
from mmscalablevit.models import attention
from mmscalablevit.models import cpu_kernels as linear
from mmscalablevit.models import cpu_kernels as mlp
from mmscalablevit.models.arch import ARCH_ZOO
from mmscalablevit.models.attention import InteractiveWindowSelfAttention as IWSA
from mmscalablevit.models.attention import ScalableSelfAttention as SSA
from mmscalablevit.models.cpu_kernels import Linear

ARCH = dict(ARCH_ZOO['small'], depths=(2, 2, 2, 2))
# Divisible by the windows of all stages where they allow it, and not.
SIZES = [(224, 224), (97, 131)]
CASES = [case for case in read_json('manifest.json')['cases'] if case['kind'] == 'dense']


@pytest.fixture(autouse=True)
def two_threads():
    """Of one thread, torch gives 1x1 convolutions to another kernel than oneDNN's."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


def model(**kwargs):
    torch.manual_seed(0)
    net = ScalableViT(dict(ARCH), **kwargs)
    net.init_weights()
    return net


def operators(net, *inputs):
    """How often each operator ran; those of ATen without that prefix."""
    with profile(activities=[ProfilerActivity.CPU]) as trace:
        net(*inputs)
    return {event.key.removeprefix('aten::'): event.count for event in trace.key_averages()}


class PeakMemory(TorchDispatchMode):
    """Highest number of bytes that tensors made inside held at one time."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.known = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        inputs = {
            x.untyped_storage()._cdata
            for x in tree_leaves((args, kwargs))
            if isinstance(x, torch.Tensor)
        }
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor):
                self._count(x.untyped_storage(), inputs)
        return out

    def _count(self, storage, inputs):
        key, size = storage._cdata, storage.nbytes()
        if key in self.known or key in inputs:
            return
        self.known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, key, size)

    def _free(self, key, size):
        self.known.discard(key)
        self.now -= size


def peak_bytes(run, *args):
    with torch.no_grad(), PeakMemory() as memory:
        run(*args)
    return memory.peak


@pytest.mark.parametrize('size', SIZES, ids=str)
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize('training', [False, True])
def test_every_attention_takes_the_fused_kernel(size, dtype, training):
    net = model().train(training)
    low_precision = dtype != torch.float32
    with torch.set_grad_enabled(training), torch.autocast('cpu', dtype, enabled=low_precision):
        counts = operators(net, torch.rand(1, 3, *size))

    assert counts['_scaled_dot_product_flash_attention_for_cpu'] == sum(ARCH['depths'])
    assert not counts.keys() & {'softmax', '_softmax', 'bmm', 'baddbmm', 'matmul'}


@pytest.mark.parametrize('amx', [False, True])
def test_bfloat16_attention_trains_in_float32_on_cpus_without_amx(amx, monkeypatch):
    """Its backward pass is many times slower in bfloat16 there; inference is not."""
    monkeypatch.setattr(attention, '_AMX', amx)
    dtypes = []
    fused = torch.nn.functional.scaled_dot_product_attention

    def spy(query, *args, **kwargs):
        dtypes.append(query.dtype)
        return fused(query, *args, **kwargs)

    monkeypatch.setattr(attention.F, 'scaled_dot_product_attention', spy)
    net, x = IWSA(64, 2), torch.rand(1, 14, 14, 64)
    with torch.autocast('cpu', torch.bfloat16):
        assert net(x).dtype == torch.bfloat16
        with torch.no_grad():
            net(x)

    assert dtypes == [torch.bfloat16 if amx else torch.float32, torch.bfloat16]


ATTENTIONS = {
    # The windows, and the values as a map for LIM.
    'windows that fit': (IWSA(64, 2), (1, 56, 56, 64), 2),
    # Also zeros around the map. The crop is a view.
    'windows that do not fit': (IWSA(64, 2), (1, 57, 55, 64), 3),
    # The reduced map, too small for oneDNN.
    'merged values': (SSA(64, 2, 1.25, 8, 'merged'), (1, 56, 56, 64), 1),
    # Also values padded to the keys' width, and their heads cut back.
    'separate values': (SSA(64, 2, 1.25, 8), (1, 56, 56, 64), 3),
    'no reduction': (SSA(64, 2), (1, 56, 56, 64), 0),
}


@pytest.mark.parametrize(('module', 'shape', 'copies'), ATTENTIONS.values(), ids=ATTENTIONS)
def test_copies_of_a_map_in_an_attention(module, shape, copies):
    with torch.no_grad():
        counts = operators(module.eval(), torch.rand(shape))

    # A linear layer of few rows copies its bias.
    biases = counts.get('addmm', 0)
    assert counts.get('copy_', 0) - biases <= copies


def test_linear_layers_on_cpu_are_convolutions_of_onednn_in_float32_alone(monkeypatch):
    layer, x = Linear(64, 128), torch.rand(2, 32, 32, 64)
    monkeypatch.setattr(linear, '_X86', True)

    assert operators(layer, x)['mkldnn_convolution'] == 1
    with torch.autocast('cpu', torch.bfloat16):
        assert 'mkldnn_convolution' not in operators(layer, x)
    assert 'mkldnn_convolution' not in operators(layer.double(), x.double())
    monkeypatch.setattr(linear, '_X86', False)
    assert 'mkldnn_convolution' not in operators(layer.float(), x)


@pytest.mark.parametrize('shape', [(2, 32, 32, 64), (2, 1100, 64), (40000, 64), (3, 64)], ids=str)
@pytest.mark.parametrize('bias', [True, False])
def test_linear_layers_equal_torch_in_values_and_gradients(shape, bias):
    torch.manual_seed(0)
    layer = Linear(64, 48, bias)
    x = torch.rand(shape, requires_grad=True)
    plain = nn.Linear(64, 48, bias)
    plain.load_state_dict(layer.state_dict())
    out, wanted = layer(x), plain(x)

    torch.testing.assert_close(out, wanted, atol=1e-5, rtol=1e-5)
    parameters = [x, *layer.parameters()], [x, *plain.parameters()]
    gradients = [
        torch.autograd.grad((y * wanted.detach()).mean(), inputs)
        for y, inputs in zip((out, wanted), parameters, strict=True)
    ]
    for ours, torchs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, torchs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('shape', [(2, 20, 20, 64), (3, 64)], ids=str)
def test_compiled_linear_layers_are_sound_operators(shape, bias):
    """Shapes, strides, aliases and gradients are what compilers are told."""
    layer, x = Linear(64, 48, bias), torch.rand(shape, requires_grad=True)
    torch.library.opcheck(torch.ops.mmscalablevit.linear.default, (x, layer.weight, layer.bias))


def test_the_compiled_mlp_is_a_sound_operator():
    norm, branch = nn.LayerNorm(32), mlp.MLP(32, 128)
    weights = branch.fc1.weight, branch.fc1.bias, branch.fc2.weight, branch.fc2.bias
    inputs = torch.rand(2, 14, 15, 32), norm.weight, norm.bias, norm.eps, *weights
    inputs = [x.detach() if isinstance(x, torch.Tensor) else x for x in inputs]
    torch.library.opcheck(torch.ops.mmscalablevit.add_mlp.default, inputs)


def compiled_operators(net, *inputs):
    torch._dynamo.reset()
    graph = torch.compile(net, backend='aot_eager', fullgraph=True)
    graph(*inputs)
    return operators(graph, *inputs), graph(*inputs)


@pytest.mark.skipif(
    not hasattr(torch.compiler, 'is_exporting'),
    reason='this torch cannot tell an export from a compilation: linear layers stay plain',
)
def test_compiled_graphs_keep_the_faster_linear_layers(monkeypatch):
    monkeypatch.setattr(linear, '_X86', True)
    net, images = model(out_indices=(0,)).eval(), torch.rand(1, 3, 97, 131)
    with torch.no_grad():
        counts, outs = compiled_operators(net, images)
        torch.testing.assert_close(outs[0], net(images)[0], atol=1e-4, rtol=1e-4)
    # A window attention has two linear layers, SSA q, k, v and the projection.
    assert counts['mmscalablevit::linear'] == 6
    assert counts['mmscalablevit::add_mlp'] == 2

    counts, _ = compiled_operators(model(out_indices=(0,)).train(), images)
    assert counts['mmscalablevit::linear'] == 10
    assert 'mmscalablevit::add_mlp' not in counts
    with torch.no_grad(), torch.autocast('cpu', torch.bfloat16):
        counts, _ = compiled_operators(net, images)
    assert not any(name.startswith('mmscalablevit') for name in counts)


class Doubled(Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def test_layers_in_the_place_of_the_mlps_own_are_kept_when_compiled():
    net, images = model(out_indices=(0,)).eval(), torch.rand(1, 3, 97, 131)
    before = net(images)[0]
    for block in net.stages[0]:
        block.mlp.fc2.__class__ = Doubled
    with torch.no_grad():
        wanted = net(images)[0]
        _, outs = compiled_operators(net, images)

    torch.testing.assert_close(outs[0], wanted, atol=1e-4, rtol=1e-4)
    assert (wanted - before).abs().max() > 0.01


def test_slices_of_the_mlp_change_nothing(monkeypatch):
    net, images = model().eval(), torch.rand(1, 3, 97, 131)
    with torch.no_grad():
        whole = net(images)
        monkeypatch.setattr(mlp, '_VALUES_IN_CACHE', 1000)
        sliced = net(images)

    for a, b in zip(whole, sliced, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize('size', [(448, 448), (448, 896)], ids=str)
def test_memory_of_inference_is_nine_maps_of_the_first_stage(size):
    """The residual, its norm, windows, queries, keys and values, LIM's maps: nothing quadratic."""
    net = model().eval()
    images = torch.rand(1, 3, *size)
    first_map = size[0] // 4 * size[1] // 4 * ARCH['embed_dims'][0] * 4

    assert peak_bytes(net, images) <= 9 * first_map
    plain = peak_bytes(plain_forward, dict(net.state_dict()), ARCH, images)
    assert plain > 15 * first_map


def test_checkpointing_saves_memory():
    peaks = {}
    for with_cp in (False, True):
        net = model(with_cp=with_cp)
        with PeakMemory() as memory:
            sum(out.mean() for out in net(torch.rand(1, 3, 224, 224))).backward()
        peaks[with_cp] = memory.peak
        gradients = sum(p.numel() * 4 for p in net.parameters())
        peaks[with_cp] -= gradients

    assert peaks[True] <= 0.55 * peaks[False]


@pytest.fixture(scope='module')
def compiled():
    """One graph for all sizes, and how often it was compiled."""
    torch._dynamo.reset()
    counters.clear()
    net = model().eval()
    # Training is the same graph with a backward pass; eval mode keeps the comparison exact.
    return net, torch.compile(net, backend='aot_eager', fullgraph=True, dynamic=True)


def test_one_compilation_serves_all_sizes_and_equals_eager(compiled):
    net, graph = compiled
    for shape in [(2, 3, 256, 352), (3, 3, 257, 321), (2, 3, 448, 512), (4, 3, 331, 343)]:
        images = torch.rand(shape)
        with torch.no_grad():
            outs, wanted = graph(images), net(images)
        for out, eager in zip(outs, wanted, strict=True):
            torch.testing.assert_close(out, eager, atol=1e-4, rtol=1e-4)

    assert counters['stats']['unique_graphs'] == 1
    assert not counters['graph_break']


def test_compiled_gradients_equal_eager():
    torch._dynamo.reset()
    net, images = model().train(), torch.rand(1, 3, 97, 131)
    graph = torch.compile(net, backend='aot_eager', fullgraph=True, dynamic=False)
    gradients = []
    for run in (net, graph):
        net.zero_grad()
        sum((out.square() * 0.5).mean() for out in run(images)).backward()
        gradients.append({name: p.grad.clone() for name, p in net.named_parameters()})

    for name, gradient in gradients[0].items():
        scale = gradient.abs().max().item()
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-4 * scale + 1e-7, rtol=0)


@pytest.mark.skipif(not shutil.which('g++'), reason='inductor needs a C++ compiler')
def test_golden_values_hold_compiled():
    """Through inductor, the compiler that users take."""
    torch._dynamo.reset()
    case = next(case for case in CASES if case['input_shape'] == [2, 3, 97, 131])
    net = golden_model(case)
    net.compile(fullgraph=True)
    errors = golden_errors(net, case, torch.float32)

    assert counters['stats']['unique_graphs'] >= 1
    assert max(errors.values()) < 1e-5, errors
