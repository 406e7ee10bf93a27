# Copyright (c) mmscalablevit contributors. All rights reserved.
"""What makes the network fast, in counts that do not depend on the machine's speed."""

import itertools
import shutil

import pytest
import torch
from golden import TINY
from plain import plain_forward
from torch._dynamo.utils import counters
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mmscalablevit import ScalableViT
from mmscalablevit.models import attention
from mmscalablevit.models.arch import ARCH_ZOO

ARCH = dict(ARCH_ZOO['small'], depths=(2, 2, 2, 2))
# That no window divides.
ODD_SIZE = (97, 131)


def model(arch=ARCH, **kwargs):
    torch.manual_seed(0)
    net = ScalableViT(dict(arch), **kwargs)
    net.init_weights()
    return net


def peak_bytes(run, *args):
    """Highest number of bytes that PyTorch allocated meanwhile and held at one time."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        run(*args)
    events = trace.profiler.kineto_results.events()
    changes = [(x.start_ns(), x.nbytes()) for x in events if x.name() == '[memory]']
    return max(itertools.accumulate(size for _, size in sorted(changes)))


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize('training', [False, True])
def test_every_attention_takes_the_fused_kernel(dtype, training):
    net = model(TINY).train(training)
    low_precision = dtype != torch.float32
    with (
        torch.set_grad_enabled(training),
        torch.autocast('cpu', dtype, enabled=low_precision),
        profile(activities=[ProfilerActivity.CPU]) as trace,
    ):
        net(torch.rand(1, 3, *ODD_SIZE))
    counts = {event.key.removeprefix('aten::'): event.count for event in trace.key_averages()}
    assert counts['_scaled_dot_product_flash_attention_for_cpu'] == sum(TINY['depths'])
    assert not counts.keys() & {'softmax', '_softmax', 'bmm', 'baddbmm', 'matmul'}


def test_no_call_of_fused_attention_takes_more_windows_than_cuda_can(monkeypatch):
    assert attention.MAX_BATCH['cuda'] < 2**16
    batches = []
    fused = torch.nn.functional.scaled_dot_product_attention

    def spy(query, *args, **kwargs):
        batches.append(len(query))
        return fused(query, *args, **kwargs)

    net, images = model(out_indices=(0,)).train(), torch.rand(3, 3, 97, 131)
    results = []
    for limits in ({}, {'cpu': 7}):
        monkeypatch.setattr(attention, 'MAX_BATCH', limits)
        net.zero_grad()
        (out,) = net(images)
        (out * torch.linspace(0, 1, out.numel()).view_as(out)).sum().backward()
        results.append([out.detach(), *(p.grad.clone() for p in net.parameters())])
        monkeypatch.setattr(attention.F, 'scaled_dot_product_attention', spy)

    # 4 by 5 windows of each image, then SSA's three images.
    assert batches == [7] * 8 + [4, 3]
    for whole, split in zip(*results, strict=True):
        torch.testing.assert_close(split, whole, atol=1e-4, rtol=1e-4)


class OnlyMeta(TorchDispatchMode):
    """Fails on values that are read and on tensors of another device, constants included."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        assert '_local_scalar_dense' not in str(func)
        assert all(x.is_meta for x in tree_leaves((args, out)) if isinstance(x, torch.Tensor)), func
        return out


@pytest.mark.parametrize('training', [False, True])
def test_no_operator_leaves_the_device(training):
    rates = dict(drop_rate=0.1, attn_drop_rate=0.1, drop_path_rate=0.1)
    with torch.device('meta'):
        net, images = ScalableViT(dict(TINY), **rates), torch.empty(2, 3, *ODD_SIZE)
    with OnlyMeta():
        sum(out.sum() for out in net.train(training)(images)).backward()


def test_memory_of_inference_is_twelve_maps_of_the_first_stage():
    """The MLP's: images, block's input, residual, norm, four each around GELU. Not quadratic."""
    net = model().eval()
    images = torch.rand(1, 3, 448, 896)
    first_map = 112 * 224 * ARCH['embed_dims'][0] * 4

    with torch.no_grad():
        assert peak_bytes(net, images) <= 12 * first_map
        plain = peak_bytes(plain_forward, net.state_dict(), ARCH, images)
    assert plain > 15 * first_map


def test_checkpointing_saves_memory():
    def step(net):
        sum(out.mean() for out in net(torch.rand(1, 3, 224, 224))).backward()

    peaks = {}
    for with_cp in (False, True):
        net = model(with_cp=with_cp)
        gradients = sum(p.numel() * 4 for p in net.parameters())
        peaks[with_cp] = peak_bytes(step, net) - gradients
    assert peaks[True] <= 0.55 * peaks[False]


def test_one_compilation_serves_all_sizes_and_equals_eager():
    torch._dynamo.reset()
    counters.clear()
    # A compilation takes its time for each block: a stage of both attentions.
    net = model(TINY, out_indices=(0,)).eval()
    graph = torch.compile(net, backend='aot_eager', fullgraph=True, dynamic=True)
    for shape in [(2, 3, 64, 88), (3, 3, 65, 81), (4, 3, 99, 85)]:
        images = torch.rand(shape)
        with torch.no_grad():
            torch.testing.assert_close(graph(images), net(images), atol=1e-4, rtol=1e-4)
    assert counters['stats']['unique_graphs'] == 1
    assert not counters['graph_break']


@pytest.mark.skipif(not shutil.which('g++'), reason='inductor needs a C++ compiler')
def test_inductor_equals_eager_and_so_do_its_gradients():
    """The compiler that users take, on a stage of both attentions."""
    torch._dynamo.reset()
    net, images = model(TINY, out_indices=(0,)).train(), torch.rand(1, 3, *ODD_SIZE)
    results = []
    for run in (net, torch.compile(net, fullgraph=True, dynamic=False)):
        net.zero_grad()
        (out,) = run(images)
        out.square().mean().backward()
        results.append([out.detach(), *(p.grad.clone() for p in net.parameters())])

    for eager, compiled in zip(*results, strict=True):
        scale = eager.abs().max().item()
        torch.testing.assert_close(compiled, eager, atol=1e-4 * scale + 1e-7, rtol=0)
