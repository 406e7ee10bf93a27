# Copyright (c) mmscalablevit contributors. All rights reserved.
"""The table of published figures: every row, the counting, both formats."""

import json
import sys

import pytest
from jobs import ROOT, load_tool, run_tool

for toolbox in ('mmpretrain', 'mmdet', 'mmseg'):
    pytest.importorskip(toolbox)

TOOL = 'tools/analysis_tools/get_flops.py'
tool = load_tool(TOOL)
# Millions of parameters and GFLOPs by task, schedules and size: the paper and the authors' README.
FIGURES = {
    ('ImageNet-1K', '300e'): dict(S=('32.4', 4.2), B=('81.9', 8.6), L=('104.9', 14.7)),
    ('RetinaNet', '1x'): dict(S=('36.4', 238), B=('85.6', 330), L=('112.6', 457)),
    ('RetinaNet', '3x'): dict(S=('36.4', 238), B=('85.6', 330)),
    ('Mask R-CNN', '1x'): dict(S=('46.3', 256), B=('94.9', 349), L=('121.4', 477)),
    ('Mask R-CNN', '3x'): dict(S=('46.3', 256), B=('94.9', 349)),
    ('Semantic FPN', '80k'): dict(S=('30.4', 174), B=('79.0', 270), L=('105.5', 402)),
    ('UperNet', '160k'): dict(S=('56.5', 931), B=('107.0', 1029), L=('135.5', 1162)),
}
PUBLISHED = [(*key, size, *found) for key, row in FIGURES.items() for size, found in row.items()]
# Swin's repository: complete FLOPs; 28 M and 60 M with fewer digits.
SWIN = {'ImageNet-1K': (28, 4.5), 'Mask R-CNN': (48, 267), 'UperNet': (60, 945)}
# The authors' code with explicit matrix products, counted by fvcore.
AUTHORS = {'ScalableViT-S': 4.285, 'ScalableViT-B': 8.827, 'ScalableViT-L': 15.027}


@pytest.fixture(scope='module')
def table():
    """What one call of the tool prints as JSON."""
    said = run_tool([ROOT / TOOL, '--json'], ROOT)
    # Behind what the toolboxes warn of.
    return json.loads(said[said.index('{\n') :])


def rows_of(table, task, model):
    return [row for row in table['rows'] if (row['task'], row['model']) == (task, model)]


@pytest.mark.parametrize(('task', 'schedule', 'size', 'params', 'gflops'), PUBLISHED)
def test_published_row_is_reproduced(table, task, size, schedule, params, gflops):
    rows = rows_of(table, task, f'ScalableViT-{size}')
    (row,) = [row for row in rows if row['schedule'] == schedule]
    assert (row['published_params'], float(row['published_gflops'])) == (params, gflops)
    assert row['gflops'] == pytest.approx(gflops, rel=0.01)
    assert row['gflops_agree']
    assert row['complete_gflops'] > row['gflops']
    if (task, size) == ('ImageNet-1K', 'L'):
        assert row['params'] == pytest.approx(109.28884)
        assert not row['params_agree']
        assert '104.9' in table['notes'][row['notes'][0]]
        return
    assert f'{row["params"]:.1f}' == params
    assert row['params_agree']


def test_no_row_is_lost_or_added(table):
    ours = [row for row in table['rows'] if row['model'].startswith('ScalableViT')]
    assert len(ours) == len(PUBLISHED)
    assert {row['input'] for row in table['rows']} == {'224x224', '800x1280', '512x2048'}


@pytest.mark.parametrize('task', sorted({task for task, _ in FIGURES}))
def test_other_backbones_stand_beside_ours(table, task):
    (swin,) = rows_of(table, task, 'Swin-T')
    assert swin['params_agree']
    if task in SWIN:
        params, gflops = SWIN[task]
        assert round(swin['params']) == params
        assert swin['complete_gflops'] == pytest.approx(gflops, rel=0.005)
    (twins,) = rows_of(table, task, 'Twins-SVT-S')
    assert twins['params'] == pytest.approx(float(twins['published_params']), rel=0.02)
    assert twins['complete_gflops'] > twins['gflops']


def test_every_disagreement_has_a_footnote(table):
    for row in table['rows']:
        if not row['params_agree'] or row['gflops_agree'] in (None, False):
            assert row['notes'], row
        assert set(row['notes']) <= set(table['notes'])


def test_small_is_shown_beside_small_merged(table):
    note = table['notes']['merged']
    for figure in ('32.00', '36.03', '45.95', '30.05', '56.10'):
        assert f'{figure} M' in note


@pytest.mark.parametrize('model', AUTHORS)
def test_fused_attention_is_counted_as_the_products_it_stands_for(model):
    """The authors' explicit products, plus no more than the zeros that pad to one width."""
    task = tool.TASKS['ImageNet-1K']
    arch = 'small' if model == 'ScalableViT-S' else None
    counts = tool.count(task, tool.model_config(task, model, arch))
    assert AUTHORS[model] < counts.complete_gflops < 1.005 * AUTHORS[model]


def test_markdown(table, capsys):
    tool.print_table(table['rows'], table['notes'])
    markdown = capsys.readouterr().out
    lines = markdown.splitlines()
    count = 2 + len(table['rows'])
    assert {line.count('|') for line in lines[:count]} == {len(tool.HEADER) + 1}
    assert set(lines[1]) == set('|-')
    assert '109.29 (differs)' in markdown
    for number, note in enumerate(table['notes'].values(), 1):
        assert f'{number}. {note}' in lines


def test_missing_toolbox_is_one_sentence(call, monkeypatch):
    for name in ('mmseg', 'mmseg.models'):
        monkeypatch.setitem(sys.modules, name, None)
    said, _ = call(TOOL)
    assert said.startswith('error: the table needs mmseg, which cannot')
