# Copyright (c) mmscalablevit contributors. All rights reserved.
"""The backbone on a GPU: `make test-gpu`.

All but the trainings of the toolboxes run with torch, mmengine and mmcv-lite alone. The variable
MMSCALABLEVIT_TEST_DEVICE=cpu runs on a CPU what makes sense there, to test the tests.
"""

import os
import sys

# Read when CUDA starts.
os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')

import pytest
import torch
import torch.nn.functional as F
from golden import TINY, golden_errors, golden_model, load_reference, read_json, reference_input
from jobs import ROOT, draw_shapes, job_environment, run
from torch import nn

from mmscalablevit import ScalableViT

DEVICE = os.environ.get('MMSCALABLEVIT_TEST_DEVICE', 'cuda')
ON_CUDA = DEVICE == 'cuda'
if ON_CUDA and not torch.cuda.is_available():
    pytest.skip('torch sees no CUDA device', allow_module_level=True)
cuda_only = pytest.mark.skipif(not ON_CUDA, reason='needs CUDA itself')
SIZE = (2, 3, 97, 131)
CASES = ('small_2x3x97x131_norm1', 'base_1x3x96x128_norm1', 'large_1x3x97x64_norm1')
CASES += ('small-kvmerged_2x3x97x131_norm1',)
# Type, TF32 in products and convolutions, largest error relative to the largest value.
PRECISIONS = {
    'float32': (torch.float32, False, 5e-5),
    'TF32': (torch.float32, True, 0.01),
    'bfloat16': (torch.bfloat16, False, 0.1),
    'float16': (torch.float16, False, 0.02),
}
precisions = pytest.mark.parametrize('precision', PRECISIONS.values(), ids=PRECISIONS)
MIXED = {'bfloat16': (torch.bfloat16, 0.1), 'float16': (torch.float16, 0.05)}
mixed = pytest.mark.parametrize(('dtype', 'bound'), MIXED.values(), ids=MIXED)


@pytest.fixture(autouse=True)
def exact():
    """Products in float32, and the switches as before."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    use_tf32(False)
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def use_tf32(use):
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = use


def tiny(device=DEVICE, **kwargs):
    torch.manual_seed(0)
    return load_reference(ScalableViT(dict(TINY), **kwargs)).to(device)


def weighted(outs):
    """A loss that sees every value."""
    weights = (reference_input(k, out.shape).to(out.device) for k, out in enumerate(outs))
    return sum((out.float() * weight).mean() for out, weight in zip(outs, weights, strict=True))


def gradients(net, images, run=None):
    net.zero_grad()
    weighted((net if run is None else run)(images)).backward()
    return [p.grad.float().cpu() for p in net.parameters() if p.grad is not None]


def assert_near(found, wanted, bound):
    for value, want in zip(found, wanted, strict=True):
        error = (value.float().cpu() - want.float().cpu()).norm()
        assert error <= bound * want.float().norm() + 1e-6


@precisions
@pytest.mark.parametrize('name', CASES)
def test_features_are_the_authors(name, precision):
    dtype, tf32, bound = precision
    use_tf32(tf32)
    case = next(case for case in read_json('manifest.json')['cases'] if case['case'] == name)
    errors = golden_errors(golden_model(case), case, dtype, DEVICE)
    assert max(errors.values()) < bound, errors


def test_gradients_are_those_of_a_cpu():
    images = reference_input(0, SIZE)
    assert_near(gradients(tiny(), images.to(DEVICE)), gradients(tiny('cpu'), images), 1e-3)


@mixed
def test_gradients_under_autocast(dtype, bound):
    net, images = tiny(), reference_input(0, SIZE).to(DEVICE)
    wanted = torch.cat([g.flatten() for g in gradients(net, images)])
    with torch.autocast(DEVICE, dtype):
        found = torch.cat([g.flatten() for g in gradients(net, images)])
    assert_near([found], [wanted], bound)


@pytest.mark.parametrize('size', [(1, 1), (7, 9), (33, 500), (224, 224), (801, 61)], ids=str)
def test_any_size(size):
    images = reference_input(0, (2, 3, *size))
    with torch.no_grad():
        assert_near(tiny()(images.to(DEVICE)), tiny('cpu')(images), 1e-3)


def test_more_windows_than_a_launch_takes():
    net, batch = tiny(out_indices=(0,)), 1024 if ON_CUDA else 4
    images = torch.rand(batch, 3, 224, 224, device=DEVICE)
    (out,) = net(images)
    out.mean().backward()
    with torch.no_grad():
        assert_near([out[-2:]], net(images[-2:]), 1e-3)
    assert all(p.grad.isfinite().all() for p in net.parameters())


def test_checkpointing_draws_the_same_dropout():
    images, results = reference_input(0, SIZE).to(DEVICE), []
    for with_cp in (False, True):
        net = tiny(with_cp=with_cp, drop_rate=0.1, attn_drop_rate=0.1, drop_path_rate=0.3).train()
        torch.manual_seed(1)
        results.append(gradients(net, images))
    assert_near(*results, 1e-3)


def test_compiled_is_eager():
    torch._dynamo.reset()
    net, images = tiny(), reference_input(0, SIZE).to(DEVICE)
    run = torch.compile(net, fullgraph=True, backend='inductor' if ON_CUDA else 'aot_eager')
    with torch.no_grad():
        assert_near(run(images), net(images), 1e-3)
    assert_near(gradients(net, images, run), gradients(net, images), 1e-2)


@cuda_only
def test_cuda_graphs_of_forward_and_backward():
    net, images = tiny().train(), reference_input(0, SIZE).to(DEVICE)
    wanted = gradients(net, images)
    graphed = torch.cuda.make_graphed_callables(tiny().train(), (torch.rand_like(images),))
    assert_near(gradients(graphed, images), wanted, 1e-3)


@cuda_only
def test_nothing_waits_for_the_device():
    net, images = tiny(drop_rate=0.1, drop_path_rate=0.1).train(), torch.rand(SIZE, device=DEVICE)
    gradient = [torch.rand_like(out) for out in net(images)]
    torch.cuda.set_sync_debug_mode('error')
    try:
        torch.autograd.backward(net(images), gradient)
    finally:
        torch.cuda.set_sync_debug_mode('default')


def test_trainings_of_one_seed_are_equal():
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        found = []
        for _ in range(2):
            net = tiny(drop_path_rate=0.2).train()
            with torch.autocast(DEVICE, torch.bfloat16):
                found.append(gradients(net, reference_input(0, SIZE).to(DEVICE)))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


@mixed
def test_mixed_precision_learns_without_nan(dtype, bound):
    torch.manual_seed(0)
    net = ScalableViT(dict(TINY), drop_path_rate=0.1)
    net.init_weights()
    model = nn.ModuleDict(dict(net=net, head=nn.Linear(32, 4))).to(DEVICE).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scaler = torch.amp.GradScaler(DEVICE, enabled=dtype == torch.float16)
    labels = torch.arange(8, device=DEVICE) % 4
    images, losses = reference_input(0, (8, 3, 64, 64)).to(DEVICE), []
    images[::2, :, 40:] = 0  # As images of a batch are padded.
    for _ in range(200):
        optimizer.zero_grad()
        with torch.autocast(DEVICE, dtype):
            scores = model['head'](model['net'](images)[-1].mean((2, 3)))
            loss = F.cross_entropy(scores.float(), labels)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.detach())
    assert torch.stack(losses).isfinite().all()
    assert losses[-1] < 0.5 * losses[0]
    assert not scaler.is_enabled() or scaler.get_scale() >= 1
    assert all(p.isfinite().all() for p in model.parameters())


@cuda_only
def test_peak_memory():
    """As counted on a CPU (tests/test_performance.py), with some for workspaces."""
    images, peaks = torch.rand(1, 3, 448, 448, device=DEVICE), {}
    for with_cp in (False, True):
        net = ScalableViT('small', with_cp=with_cp).to(DEVICE)
        gradients(net, images)
        net.zero_grad()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        weighted(net(images)).backward()
        weights = sum(p.numel() * 4 for p in net.parameters())
        peaks[with_cp] = torch.cuda.max_memory_allocated() - before - weights
        del net
    assert peaks[True] <= 0.65 * peaks[False]


def test_a_detector_trains_with_the_launcher(tmp_path):
    pytest.importorskip('mmdet.models', reason='needs mmdet and the compiled operators of mmcv')
    draw_shapes(tmp_path / 'shapes')
    environment = job_environment(tmp_path)
    if ON_CUDA:
        del environment['CUDA_VISIBLE_DEVICES']
    launcher = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node=1']
    config = ROOT / 'tests' / 'data' / 'tiny_mask-rcnn.py'
    job = ['tools/train.py', config, '--launcher', 'pytorch', '--work-dir', tmp_path / 'work']
    run([*launcher, *job], ROOT, environment)
    assert (tmp_path / 'work' / 'epoch_1.pth').is_file()
