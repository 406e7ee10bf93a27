# Copyright (c) mmscalablevit contributors. All rights reserved.
"""The curves of several trainings, and the page that shows them and the trackers."""

import json
import shlex

import cv2
import pytest
from doc_blocks import LOADERS, ROOT, read_blocks, run_commands
from jobs import load_tool
from mmengine.config import Config

TOOL = ROOT / 'tools' / 'analysis_tools' / 'plot_logs.py'
PAGE = ROOT / 'docs' / 'training.md'
STARTS = ('20260101_120000', '20260102_120000')
# Blue and orange, the first colors of matplotlib's cycle, in BGR.
COLORS = ((180, 119, 31), (14, 127, 255))


@pytest.fixture
def tool():
    return load_tool('tools/analysis_tools/plot_logs.py')


def write_log(work_dir, start, records, cfg, log=''):
    """What mmengine leaves of one start of a training."""
    folder = work_dir / start / 'vis_data'
    folder.mkdir(parents=True)
    Config(cfg).dump(folder / 'config.py')
    (folder / 'scalars.json').write_text(''.join(json.dumps(r) + '\n' for r in records))
    (folder.parent / f'{start}.log').write_text(log)


def train_record(iteration, **scalars):
    return dict(loss=1 / iteration, lr=1e-4, time=0.1, iter=iteration, step=iteration, **scalars)


@pytest.fixture
def detector(tmp_path):
    """Two epochs of four iterations, of which the second was resumed."""
    work_dir = tmp_path / 'detector'
    cfg = dict(train_cfg=dict(max_epochs=2), train_dataloader=dict(batch_size=2))
    first = [train_record(2), train_record(4), {'coco/bbox_mAP': 0.25, 'step': 1}, train_record(6)]
    log = 'Epoch(train)  [1][2/4]\n'
    write_log(work_dir, STARTS[0], first, cfg, log)
    second = [train_record(6), train_record(8), {'coco/bbox_mAP': 0.5, 'step': 2}]
    log = 'resumed epoch: 1, iter: 4\nEpoch(train)  [2][2/4]\n'
    write_log(work_dir, STARTS[1], second, dict(cfg, resume=True), log)
    return work_dir


@pytest.fixture
def segmentor(tmp_path):
    work_dir = tmp_path / 'segmentor'
    cfg = dict(train_cfg=dict(max_iters=4, val_interval=4), train_dataloader=dict(batch_size=2))
    records = [train_record(2), train_record(4), dict(mIoU=40.0, step=4)]
    write_log(work_dir, STARTS[0], records, cfg)
    return work_dir


def test_resumed_training_is_one_curve(tool, detector):
    run = tool.work_dirs.read_run(detector)

    assert tool.train_curve(run, 'loss') == ([2, 4, 6, 8], [1 / 2, 1 / 4, 1 / 6, 1 / 8])
    assert tool.train_curve(run, 'lr') == ([2, 4, 6, 8], [1e-4] * 4)
    # Epochs are counted in iterations, as in the other panels.
    assert tool.metric_curve(run, 'box AP') == ([4, 8], [25, 50])
    assert tool.metric_curve(run, 'mIoU') == ([], [])


def test_iterations_of_an_epoch_must_be_known(tool, detector):
    for start in STARTS:
        (detector / start / f'{start}.log').unlink()

    with pytest.raises(tool.UserError, match='how many iterations an epoch has'):
        tool.metric_curve(tool.work_dirs.read_run(detector), 'box AP')


def test_runs_of_one_name_are_told_apart(tool, detector, segmentor):
    runs = [tool.work_dirs.read_run(folder) for folder in (detector, segmentor)]
    assert tool.labels(runs) == ['detector', 'segmentor']
    runs[1].work_dir = detector.parent / 'other' / 'detector'
    assert tool.labels(runs) == [str(detector), str(runs[1].work_dir)]


def test_picture_has_a_panel_for_every_curve(
    call, tool, detector, segmentor, tmp_path, monkeypatch
):
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
        'mIoU': [0, 1],
    }
    picture = cv2.imread(str(out))
    for color in COLORS:
        assert (picture == color).all(axis=2).sum() > 100


def test_errors_name_what_is_missing(call, detector, tmp_path):
    empty = tmp_path / 'empty'
    write_log(empty, STARTS[0], [], dict(train_cfg=dict(max_epochs=1)))

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
