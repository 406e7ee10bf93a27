# Copyright (c) mmscalablevit contributors. All rights reserved.
"""The benchmark of time and memory, on images that take no time."""

import json

import pytest
import torch
from jobs import ROOT, load_tool

TOOL = 'tools/analysis_tools/benchmark.py'
benchmark = load_tool(TOOL)
CASE = benchmark.Case('inference', 'float32', 224, 224, 1)


def test_measures_and_writes(call, tmp_path):
    where = ('--sizes', '2x96x64', '--modes', 'inference', '--rounds', 2, '--out', tmp_path / 'out')
    assert f'Wrote {tmp_path}/out/benchmark.json' in call(TOOL, '--models', 'small', *where)[1]
    results = json.loads((tmp_path / 'out' / 'benchmark.json').read_text())['results']
    assert [r['model'] for r in results] == ['small', benchmark.MATMUL]
    assert all(len(r['seconds']) == 2 and min(r['seconds']) > 0 for r in results)
    # Of a process of its own, with torch in it.
    assert 100 < results[0]['memory'] < 4000
    assert results[0]['new_size'] > 0
    assert 'inference float32 2x96x64' in (tmp_path / 'out' / 'benchmark.md').read_text()


@pytest.mark.parametrize('name', ['small:cp', 'plain', 'swin-t:fused', 'twins-svt-s', 'convnext-t'])
def test_a_training_step_updates_the_weights(name):
    case = benchmark.Case('train', 'bfloat16', 64, 64, 1)
    step = benchmark.prepare(name, case, 'cpu')
    before = [p.clone() for p in step.model.parameters()]
    step()
    assert any(not torch.equal(a, b) for a, b in zip(before, step.model.parameters(), strict=True))


@pytest.mark.parametrize('names', [('small', 'plain'), ('swin-t', 'swin-t:fused')])
def test_variants_compute_the_same(names):
    outs = []
    for name in names:
        model = benchmark.build(name)
        # Swin's returns nothing.
        model.eval()
        # Of the windows of Swin some are shifted, and their biases not zero.
        if 'swin-t' in names:
            torch.manual_seed(0)
            for parameter in model.parameters():
                torch.nn.init.normal_(parameter, std=0.1)
        torch.manual_seed(1)
        with torch.no_grad():
            outs.append(model(torch.rand(2, 3, 64, 96)))

    for one, other in zip(*outs, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-3)


def test_operations_are_those_of_the_papers():
    # ResNet-50 has 4.1 G multiply-adds; ScalableViT-S 4.2 G, to which attention's products add.
    assert benchmark.count_gflops('resnet-50', CASE) == pytest.approx(2 * 4.1, rel=0.02)
    assert benchmark.count_gflops('small', CASE) == pytest.approx(2 * 4.3, rel=0.02)
    assert benchmark.count_gflops('small', CASE) == benchmark.count_gflops('plain', CASE)
    case = benchmark.Case('train', 'float32', 224, 224, 2)
    assert benchmark.count_gflops('small', case) == 6 * benchmark.count_gflops('small', CASE)


def test_table_compares_with_the_first_model_and_the_matrix_product():
    measured = {
        'small': ([1, 1, 2], 80, 500),
        # Ratios are of the times within a round.
        'plain': ([3, 2, 5], 80, 1000),
        benchmark.MATMUL: ([0.1] * 3, 10, None),
    }
    results = [benchmark.Result(name, CASE, *figures) for name, figures in measured.items()]
    small, plain, matmul = benchmark.rows(results)
    assert plain[:6] == ['plain', '3.000', '0.3333', '2.50 (2.00 to 3.00)', '1000', '2.00']
    assert small[6:8] == ['80', '80%']
    assert matmul[6:8] == ['100', '100%']


def test_share_of_the_backbone_in_a_whole_model():
    pytest.importorskip('mmdet.models')
    config = str(ROOT / 'tests' / 'data' / 'tiny_mask-rcnn.py')
    once = benchmark.prepare(config, benchmark.Case('inference', 'float32', 64, 64, 1), 'cpu')
    with torch.no_grad():
        assert 0 < benchmark.backbone_share(once, 'cpu') < 1


WRONG = {
    'model': (['--models', 'swin-x'], "there is no model 'swin-x'"),
    'config': (['--models', 'none.py'], 'config none.py does not exist'),
    'rounds': (['--rounds', '0'], '--rounds must be at least 1'),
    'size': (['--sizes', '800x1280'], 'argument --sizes'),
}


@pytest.mark.parametrize(('args', 'text'), WRONG.values(), ids=WRONG)
def test_mistakes_end_in_one_sentence(args, text, call):
    assert text in '{} {}'.format(*call(TOOL, *args))
