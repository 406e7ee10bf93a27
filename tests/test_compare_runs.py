# Copyright (c) mmscalablevit contributors. All rights reserved.
"""The table that compares trainings with published results, from logs made here."""

import json
from pathlib import Path

import cv2
import logs
import pytest
from jobs import load_tool
from logs import DETECTOR, LATER, SEGMENTOR, detector_config, segmentor_config, session, step
from mmengine.config import Config

from mmscalablevit import published, work_dirs

TOOL = 'tools/analysis_tools/compare_runs.py'
SWIN = 'mask-rcnn_swin-t_fpn_1x_coco'
TWINS = 'mask-rcnn_twins-svt-s_fpn_1x_coco'


@pytest.fixture
def tool(tmp_path, monkeypatch):
    """The tool on a folder of three configs, two of which have published results."""
    module = load_tool(TOOL)
    configs = tmp_path / 'configs'
    boxes, areas = {'box AP': 45.8}, {'mIoU': 48.5, 'mIoU(ms+flip)': 49.4}
    for folder, (name, *others), config, results in (
        ('detection', (DETECTOR, SWIN), detector_config(), [boxes, {'mask AP': 41.7}]),
        ('segmentation', (SEGMENTOR,), segmentor_config(), [areas]),
    ):
        (configs / folder).mkdir(parents=True)
        for config_name in (name, *others):
            Config(config).dump(configs / folder / f'{config_name}.py')
        model = dict(Name=name, Config=f'configs/{folder}/{name}.py')
        model['Metadata'] = {'Results Source': 'the authors, not reproduced here'}
        model['Results'] = [dict(Metrics=metrics) for metrics in results]
        # JSON is YAML.
        (configs / folder / 'metafile.yml').write_text(json.dumps(dict(Models=[model])))
    monkeypatch.setattr(module, 'CONFIGS', configs)
    return module


def finished_detector(work_dir, best=(0.45, 0.41), options=(), **others):
    records = []
    for epoch, drop in enumerate((0.15, 0, 0.01), start=1):
        records += [step(100 * epoch - 50, epoch, memory=9000 + epoch), step(100 * epoch, epoch)]
        records.append(logs.boxes(epoch, best[0] - drop, best[1] - drop))
    config = Config(detector_config())
    config.merge_from_dict(dict(options))
    session(work_dir, records, config.to_dict(), **others)


def markdown_of(tool, rows):
    return tool.format_markdown(rows, published.read_published(tool.CONFIGS))


def rows_of(tool, *folders):
    return tool.read_rows(work_dirs.find_work_dirs(list(folders)))[0]


def test_finished_training_is_held_against_the_published_result(tool, tmp_path):
    finished_detector(tmp_path / 'run')
    box, mask = rows_of(tool, tmp_path / 'run')

    assert (box.experiment, box.metric, mask.metric) == (DETECTOR, 'box AP', 'mask AP')
    # Logged as shares, published as percentages.
    assert (box.best, box.best_step) == (pytest.approx(45), 2)
    assert (box.last, box.last_step) == (pytest.approx(44), 3)
    assert (box.published, mask.published) == (45.8, 41.7)
    assert box.gap == pytest.approx(-0.8)
    assert mask.gap == pytest.approx(41 - 41.7)
    # 8 GPUs x 2 images in half a second; 300 iterations of it.
    assert box.images_per_second == pytest.approx(32)
    assert box.hours == pytest.approx(150 / 3600)
    assert box.peak_memory_mb == 9003
    assert (box.state, box.done, box.total, box.unit) == ('finished', 3, 3, 'epoch')
    assert box.altered == []

    # Percentages stay percentages.
    records = [step(40), dict(mIoU=47.0, step=40), step(100), dict(mIoU=48.0, step=100)]
    session(tmp_path / 'other', records, name=SEGMENTOR)
    (row,) = rows_of(tool, tmp_path / 'other')
    assert (row.metric, row.unit, row.state) == ('mIoU', 'iteration', 'finished')
    assert (row.best, row.best_step) == (48.0, 100)
    assert row.gap == pytest.approx(-0.5)


@pytest.mark.parametrize(
    ('option', 'altered'),
    [
        ({'train_cfg.max_epochs': 1}, ['train_cfg.max_epochs=1']),
        (
            {'val_dataloader.dataset.pipeline.0.scale': (448, 256)},
            ['val_dataloader.dataset.pipeline.0.scale=[448,256]'],
        ),
        ({'optim_wrapper.optimizer.lr': 2e-4}, ['optim_wrapper.optimizer.lr=0.0002']),
        ({'load_from': 'other.pth'}, ['load_from=other.pth']),
        ({'model.backbone.init_cfg': None}, ['backbone not pretrained']),
        (
            {'train_dataloader.batch_size': 1, 'auto_scale_lr.enable': True},
            ['batch size 8 where the recipe has 16 (learning rate scaled)'],
        ),
        ({'train_dataloader.num_workers': 0, 'val_dataloader.batch_size': 4}, []),
        ({'model.backbone.with_cp': True, 'default_hooks.logger.interval': 1}, []),
        ({'model.backbone.init_cfg.checkpoint': 'same_weights.pth'}, []),
        ({'optim_wrapper.type': 'AmpOptimWrapper', 'optim_wrapper.loss_scale': 'dynamic'}, []),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else '',
)
def test_what_keeps_a_run_from_standing_for_its_experiment(tool, tmp_path, option, altered):
    finished_detector(tmp_path / 'run', options=option)
    box, mask = rows_of(tool, tmp_path / 'run')
    assert box.altered == mask.altered == altered
    assert box.gap == pytest.approx(-0.8)
    markdown = markdown_of(tool, [box])
    assert ('altered: ' in markdown) == (r'-0.8\*' in markdown) == bool(altered)
    assert ('mixed precision' in box.notes) == ('optim_wrapper.type' in option)


def test_many_alterations_are_counted(tool, tmp_path):
    options = {f'model.setting_{i}': i for i in range(9)}
    finished_detector(tmp_path / 'run', options=options, gpus=1)
    box, _ = rows_of(tool, tmp_path / 'run')
    assert len(box.altered) == 10
    markdown = markdown_of(tool, [box])
    assert 'batch size 2 where the recipe has 16' in markdown
    assert 'and 5 more settings' in markdown


def test_unknown_experiment_has_a_row(tool, tmp_path):
    finished_detector(tmp_path / 'run', name='my_own')
    box, _ = rows_of(tool, tmp_path / 'run')
    assert (box.experiment, box.published, box.gap) == ('my_own', None, None)
    assert box.best == pytest.approx(45)
    assert box.notes == ['unknown experiment: no config of this name in configs/']


def test_baselines(tool, tmp_path):
    for name, best in ((DETECTOR, 0.45), (SWIN, 0.42), (TWINS, 0.46)):
        finished_detector(tmp_path / name, best=(best, 0.41), name=name)
    rows = rows_of(tool, *(tmp_path / name for name in (DETECTOR, SWIN, TWINS)))

    assert rows[0].differences == pytest.approx({'Swin-T': 3, 'Twins-SVT-S': -1})
    assert rows[0].incomparable == []
    assert all(row.differences == {} for row in rows[2:])
    header = markdown_of(tool, rows).splitlines()[0]
    assert '- Swin-T' in header
    assert '- Twins-SVT-S' in header
    assert '- Swin-T' not in markdown_of(tool, rows[2:]).splitlines()[0]

    longer = {'train_cfg.max_epochs': 36}
    finished_detector(tmp_path / 'longer', best=(0.42, 0.4), name=SWIN, options=longer)
    box, *_ = rows_of(tool, tmp_path / DETECTOR, tmp_path / 'longer')
    assert box.incomparable == ['Swin-T']
    assert r'+3.0\*' in markdown_of(tool, [box])


def test_test_with_augmentation_has_its_own_row(tool, tmp_path):
    run, config = tmp_path / 'run', segmentor_config()
    session(run, [step(100), dict(mIoU=48.0, step=100)], name=SEGMENTOR)

    def test(day, checkpoint, tta, value):
        options = dict(name=SEGMENTOR, stamp=f'2026020{day}_000000', test=dict(mIoU=value))
        session(run, [], logs.evaluated(config, checkpoint, tta), **options)

    test(1, 'best_mIoU_iter_80.pth', True, 49.0)
    test(2, 'iter_100.pth', True, 48.9)
    test(3, 'iter_80.pth', False, 1)
    plain, augmented = rows_of(tool, run)

    assert (plain.metric, plain.best, plain.published) == ('mIoU', 48.0, 48.5)
    assert (augmented.metric, augmented.published) == ('mIoU(ms+flip)', 49.4)
    assert (augmented.best, augmented.best_step, augmented.last) == (49.0, 80, 48.9)
    assert augmented.gap == pytest.approx(-0.4)
    assert augmented.altered == []

    config['tta_pipeline'] = [dict(type='TestTimeAug', transforms=[])]
    test(5, 'iter_100.pth', True, 50.0)
    assert rows_of(tool, run)[1].altered == ['tta_pipeline.0.transforms=[]']


def test_folder_of_work_dirs_and_several_runs_of_one_experiment(tool, tmp_path):
    root = tmp_path / 'work_dirs'
    finished_detector(root / 'a')
    finished_detector(root / 'b', best=(0.4, 0.4))
    (root / 'no_training').mkdir()
    rows = rows_of(tool, root, root / 'a')
    assert [Path(row.work_dir).name for row in rows] == ['a', 'a', 'b', 'b']
    markdown = markdown_of(tool, rows)
    assert f'{DETECTOR} [{root / "b"}]' in markdown


def test_files(tool, tmp_path, monkeypatch, capsys):
    finished_detector(tmp_path / 'ours')
    finished_detector(tmp_path / 'swin', best=(0.42, 0.4), name=SWIN)
    words = [TOOL, tmp_path / 'ours', tmp_path / 'swin', '--out', tmp_path / 'out']
    monkeypatch.setattr('sys.argv', [str(word) for word in words])
    tool.main()
    printed = capsys.readouterr().out

    rows = json.loads((tmp_path / 'out' / 'runs.json').read_text())['rows']
    found = [(row['experiment'], row['metric']) for row in rows]
    assert found == [(name, kind) for name in (DETECTOR, SWIN) for kind in ('box AP', 'mask AP')]
    assert rows[0]['differences'] == pytest.approx({'Swin-T': 3})
    assert rows[1]['gap'] == pytest.approx(-0.7)

    lines = (tmp_path / 'out' / 'runs.md').read_text().splitlines()
    cells = [[cell.strip() for cell in line.strip('|').split('|')] for line in lines[:6]]
    assert set(lines[1]) == set('|-')
    assert {len(line) for line in cells} == {len(cells[0])}
    assert cells[0][:6] == ['Experiment', 'Metric', 'Best', 'Last', 'Published', 'Gap']
    figures = ['45.0 (epoch 2)', '44.0 (epoch 3)', '45.8', '-0.8', '+3.0']
    assert cells[2][:7] == [DETECTOR, 'box AP', *figures]
    assert 'Source of published: the authors, not reproduced here' in lines
    for text in (DETECTOR, SWIN, '45.0 (epoch 2)', '-0.8', 'finished, epoch 3'):
        assert text in printed

    picture = cv2.imread(str(tmp_path / 'out' / 'runs.png'))
    height, width, _ = picture.shape
    # Two panels side by side.
    assert 2 * height < 3 * width
    assert min(height, width) >= 500
    # Curves in the first two colors of the cycle: blue and orange, in BGR.
    for color in ((180, 119, 31), (14, 127, 255)):
        assert (picture == color).all(axis=2).sum() > 100


def test_plot_has_a_dashed_line_at_the_published_result(tool, tmp_path, monkeypatch):
    finished_detector(tmp_path / 'ours')
    kept = []
    monkeypatch.setattr(tool.plt, 'close', kept.append)
    rows, runs = tool.read_rows([tmp_path / 'ours'])
    assert tool.draw(rows, runs, tmp_path / 'plot.png')

    curve, published = kept[0].axes[0].lines
    assert list(curve.get_xdata()) == [1, 2, 3]
    assert list(curve.get_ydata()) == pytest.approx([30, 45, 44])
    assert set(published.get_ydata()) == {45.8}
    assert published.get_linestyle() == '--'
    assert published.get_color() == curve.get_color()
    legend = [text.get_text() for text in kept[0].axes[0].get_legend().get_texts()]
    assert legend == [DETECTOR, 'published: 45.8']


def test_nothing_to_plot(tool, tmp_path, capsys):
    session(tmp_path / 'run', [])
    rows, runs = tool.read_rows([tmp_path / 'run'])
    tool.write(rows, runs, '', tmp_path / 'out')
    assert 'no evaluation to plot yet' in capsys.readouterr().out
    assert not (tmp_path / 'out' / 'runs.png').exists()


def test_wrong_folders(call, tmp_path):
    missing = tmp_path / 'missing'
    assert call(TOOL, missing)[0] == f'error: work directory {missing} does not exist'
    (tmp_path / 'empty').mkdir()
    assert 'empty holds no training' in call(TOOL, tmp_path / 'empty')[0]
    finished_detector(tmp_path / 'run')
    (tmp_path / 'file').touch()
    said, _ = call(TOOL, tmp_path / 'run', '--out', tmp_path / 'file')
    assert f'--out {tmp_path / "file"} cannot be written' in said


def test_one_unreadable_run_does_not_hide_the_others(tool, tmp_path):
    finished_detector(tmp_path / 'good')
    finished_detector(tmp_path / 'mixed')
    finished_detector(tmp_path / 'mixed', name=SWIN, stamp=LATER)
    finished_detector(tmp_path / 'damaged')
    (log,) = (tmp_path / 'damaged').glob('*/vis_data/scalars.json')
    log.write_text('{"loss": \n' + log.read_text())
    rows = rows_of(tool, *(tmp_path / name for name in ('good', 'mixed', 'damaged')))
    assert [row.state for row in rows] == ['finished', 'finished', 'unreadable', 'unreadable']
    assert f'runs of several configs ({DETECTOR}, {SWIN})' in rows[2].notes[0]
    assert 'scalars.json, line 1: not a JSON object' in rows[3].notes[0]
