# Copyright (c) mmscalablevit contributors. All rights reserved.
"""The curves of several trainings, and the page that shows them and the trackers."""

import json
import shlex

import cv2
import pytest
from doc_blocks import LOADERS, ROOT, read_blocks, run_commands
from jobs import load_tool
from logs import LATER, SEGMENTOR, boxes, session, step
from mmengine.config import Config

TOOL = 'tools/analysis_tools/plot_logs.py'
PAGE = ROOT / 'docs' / 'training.md'
# Blue and orange, the first colors of matplotlib's cycle, in BGR.
COLORS = ((180, 119, 31), (14, 127, 255))
tool = load_tool(TOOL)


def steps(*iterations):
    return [dict(step(i), loss=1 / i) for i in iterations]


@pytest.fixture
def detector(tmp_path):
    """Two epochs of a hundred iterations, of which the second was resumed."""
    work_dir = tmp_path / 'detector'
    session(work_dir, [*steps(50, 100), boxes(1, 0.25, 0.2), *steps(150)])
    second = [*steps(150, 200), boxes(2, 0.5, 0.4)]
    session(work_dir, second, stamp=LATER, resumed=(1, 100))
    return work_dir


@pytest.fixture
def segmentor(tmp_path):
    work_dir = tmp_path / 'segmentor'
    session(work_dir, [*steps(50, 100), dict(mIoU=40.0, step=100)], name=SEGMENTOR)
    return work_dir


def test_resumed_training_is_one_curve(detector):
    run = tool.work_dirs.read_run(detector)
    iterations = [50, 100, 150, 200]
    assert tool.train_curve(run, 'loss') == (iterations, [1 / i for i in iterations])
    assert tool.train_curve(run, 'lr') == (iterations, [1e-4] * 4)
    # Epochs are counted in iterations, as in the other panels.
    assert tool.metric_curve(run, 'box AP') == ([100, 200], [25, 50])
    assert tool.metric_curve(run, 'mIoU') == ([], [])


def test_iterations_of_an_epoch_must_be_known(detector):
    for log in detector.glob('*/*.log'):
        log.unlink()
    with pytest.raises(tool.UserError, match='how many iterations an epoch has'):
        tool.metric_curve(tool.work_dirs.read_run(detector), 'box AP')


def test_runs_of_one_name_are_told_apart(detector, segmentor):
    runs = [tool.work_dirs.read_run(folder) for folder in (detector, segmentor)]
    assert tool.labels(runs) == ['detector', 'segmentor']
    runs[1].work_dir = detector.parent / 'other' / 'detector'
    assert tool.labels(runs) == [str(detector), str(runs[1].work_dir)]


def test_picture_has_a_panel_for_every_curve(call, detector, segmentor, tmp_path, monkeypatch):
    drawn = {}
    save = tool.plt.Figure.savefig

    def keep(figure, *args, **kwargs):
        axes = [axis for axis in figure.axes if axis.get_title()]
        drawn.update({x.get_title(): [len(y.get_xdata()) for y in x.get_lines()] for x in axes})
        return save(figure, *args, **kwargs)

    monkeypatch.setattr(tool.plt.Figure, 'savefig', keep)
    out = tmp_path / 'pictures' / 'curves.png'

    assert call(TOOL, detector, segmentor, '--out', out)[0] == 0
    assert drawn == {
        'training loss': [4, 2],
        'learning rate': [4, 2],
        'box AP': [2, 0],
        'mask AP': [2, 0],
        'mIoU': [0, 1],
    }
    picture = cv2.imread(str(out))
    for color in COLORS:
        assert (picture == color).all(axis=2).sum() > 100


def test_errors_name_what_is_missing(call, detector, tmp_path):
    empty = tmp_path / 'empty'
    session(empty, [])
    assert 'nowhere does not exist' in call(TOOL, 'nowhere', '--out', 'curves.png')[0]
    assert '.pdf, .png, .svg, got curves.txt' in call(TOOL, detector, '--out', 'curves.txt')[0]
    said, _ = call(TOOL, detector, empty, '--out', 'curves.png')
    assert said == f'error: no training was logged in {empty}'
    assert not (tmp_path / 'curves.png').exists()


def test_page_logs_to_tensorboard(tmp_path, monkeypatch):
    pytest.importorskip('tensorboard')
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    shapes = ['demo/shapes.py', 'shapes', '--num-train', '4', '--num-val', '2']
    for name in ('demo', 'tools'):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / 'my_upernet.py').write_text(f"_base_ = '{ROOT}/tests/data/tiny_upernet.py'\n")
    blocks = read_blocks(PAGE)
    for block in blocks:
        if block.kind == 'file':
            (tmp_path / block.note.split()[1]).write_text(block.text)
    plot, train = (shlex.split(block.text)[1:] for block in blocks if block.kind == 'commands')
    short = ['--cfg-options', *LOADERS, 'train_cfg.max_iters=2', 'train_cfg.val_interval=2']
    second = ['tools/train.py', 'my_tracked.py', '--work-dir', 'work_dirs/second', *short]
    monkeypatch.setenv('SHAPES_ROOT', str(tmp_path / 'shapes'))
    commands = [[*shapes, '--size', '64', '--workers', '1'], [*train, *short], second, plot]
    run_commands(commands, tmp_path)

    assert (tmp_path / 'curves.png').is_file()
    for name in ('first', 'second'):
        (data,) = (tmp_path / 'work_dirs' / name).glob('*/vis_data')
        events = EventAccumulator(str(data))
        events.Reload()
        logged = [json.loads(line) for line in (data / 'scalars.json').read_text().splitlines()]
        losses = [record['loss'] for record in logged if 'loss' in record]
        assert len(losses) == 2
        assert [event.value for event in events.Scalars('loss')] == pytest.approx(losses)
        assert len(events.Scalars('mIoU')) == 1


@pytest.mark.parametrize('name', ['tensorboard', 'wandb', 'mlflow'])
def test_trackers_are_added_to_what_is_there(name, monkeypatch):
    from mmengine.registry import VISBACKENDS

    train = load_tool('tools/train.py')
    monkeypatch.setattr(train.importlib.util, 'find_spec', lambda name: True)
    cfg = Config.fromfile(ROOT / 'configs/detection/mask-rcnn_scalablevit-s_fpn_1x_coco.py')
    train.add_tracker(cfg, name)
    train.add_tracker(cfg, name)

    local, tracker = [backend.type for backend in cfg.visualizer.vis_backends]
    assert local == 'LocalVisBackend'
    assert VISBACKENDS.get(tracker).__name__.lower() == f'{name}visbackend'
