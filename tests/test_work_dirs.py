# Copyright (c) mmscalablevit contributors. All rights reserved.
"""What is read from work directories that are resumed, interrupted, damaged or being written."""

import math
import re

import logs
import pytest
import torch
from logs import DETECTOR, LATER, SEGMENTOR, STAMP, boxes, session, step

from mmscalablevit.errors import CheckpointError, UserError
from mmscalablevit.published import read_published
from mmscalablevit.work_dirs import checkpoint_step, find_checkpoint, find_work_dirs, read_run


def test_resumed_run_overrides_what_it_repeats(tmp_path):
    first = [step(50, 1), step(100, 1), boxes(1, 0.1, 0.1)]
    # The second epoch's checkpoint was lost: what was logged beyond the first epoch led nowhere.
    lost = [step(150, 2, 9), step(200, 2, 9), boxes(2, 0.9, 0.9), step(220, 3, 9)]
    session(tmp_path, first + lost)
    second = [step(140, 2), step(200, 2), boxes(2, 0.2, 0.2), step(300, 3), boxes(3, 0.3, 0.3)]
    config = dict(logs.detector_config(), resume=True, load_from='epoch_1.pth')
    session(tmp_path, second, config, stamp=LATER, gpus=4, resumed=(1, 100))
    read = read_run(tmp_path)

    assert sorted(read.train) == [50, 100, 140, 200, 300]
    values = [evaluation.metrics['box AP'] for evaluation in read.evaluations('box AP')]
    assert values == pytest.approx([10, 20, 30])
    assert read.validations[3].logged['coco/bbox_mAP'] == 0.3
    # Half a second each for 300 iterations, none of the 9 seconds.
    assert read.hours == pytest.approx(150 / 3600)
    # 2 x 16 / 0.5 and 3 x 8 / 0.5: the median.
    assert read.images_per_second == pytest.approx(16)
    assert (read.state, read.batch_size) == ('finished', 8)


def test_start_from_scratch_in_the_same_folder_replaces_the_older_one(tmp_path):
    session(tmp_path, [step(100, 1), boxes(1, 0.1, 0.1)])
    session(tmp_path, [step(50, 1, memory=9000)], stamp=LATER)
    read = read_run(tmp_path)
    assert (read.state, read.done, read.validations) == ('interrupted', 0.5, {})
    # A record keeps what was logged.
    (record,) = read.train.values()
    assert record.items() >= step(50, 1, memory=9000).items()
    assert (record['span'], record['images']) == (50, 16)


def test_last_line_may_be_half_written(tmp_path):
    session(tmp_path, [step(100, 1), boxes(1, 0.1, 0.1), step(150, 2)])
    log = tmp_path / STAMP / 'vis_data' / 'scalars.json'
    log.write_text(log.read_text()[:-20])
    assert list(read_run(tmp_path).train) == [100]
    assert read_run(tmp_path).state == 'running'  # The log was just written.
    log.write_text('{"loss": \n' + log.read_text())
    with pytest.raises(UserError, match=r'scalars\.json, line 1: not a JSON object'):
        read_run(tmp_path)


@pytest.mark.parametrize(
    ('records', 'age', 'state'),
    [
        ([step(150, 2)], 60, 'running'),
        ([step(150, 2)], 3600, 'interrupted'),
        ([], 1, 'running'),
        ([], 9999, 'nothing logged'),
    ],
)
def test_state(tmp_path, records, age, state):
    session(tmp_path, records, age=age)
    read = read_run(tmp_path)
    assert read.state == state
    # 1.5 epochs of 100 iterations, half a second each, are left.
    assert read.hours_left == (pytest.approx(75 / 3600) if records else None)


def test_validations_logged_without_their_iteration(tmp_path):
    """Hooks that count epochs log a step of 0 in trainings that count iterations."""
    records = [step(30), dict(mIoU=1.0, step=0), step(60), dict(mIoU=math.nan, step=0), step(90)]
    session(tmp_path, [*records, dict(mIoU=3.0, step=0)], name=SEGMENTOR)
    read = read_run(tmp_path)

    # Every 40 iterations, and at the last of the 100.
    assert sorted(read.validations) == [40, 80, 100]
    # What is no number is no result.
    assert [evaluation.step for evaluation in read.evaluations('mIoU')] == [40, 100]


def test_test_stands_in_for_a_validation_that_is_missing(tmp_path):
    session(tmp_path, [step(80), dict(mIoU=40.0, step=80), step(100)], name=SEGMENTOR)
    assert read_run(tmp_path).state == 'interrupted'

    config = logs.evaluated(logs.segmentor_config(), 'iter_100.pth', tta=False)
    session(tmp_path, [], config, SEGMENTOR, LATER, test=dict(mIoU=48.2))
    read = read_run(tmp_path)
    assert (read.state, read.validations[100].metrics) == ('finished', {'mIoU': 48.2})


def test_work_dirs_are_found_below_a_folder(tmp_path):
    session(tmp_path / 'demo' / 'detection', [])
    session(tmp_path / 'demo' / 'segmentation', [], name=SEGMENTOR)
    (tmp_path / 'empty').mkdir()
    found = find_work_dirs([tmp_path, tmp_path / 'demo' / 'detection'])
    assert [path.name for path in found] == ['detection', 'segmentation']
    with pytest.raises(UserError, match='empty holds no training'):
        find_work_dirs([tmp_path / 'empty'])
    with pytest.raises(UserError, match='missing does not exist'):
        find_work_dirs([tmp_path / 'missing'])


def test_folder_of_two_experiments_is_refused(tmp_path):
    session(tmp_path, [])
    session(tmp_path, [], name=SEGMENTOR, stamp=LATER)
    with pytest.raises(UserError, match=f'runs of several configs \\({DETECTOR}, {SEGMENTOR}\\)'):
        read_run(tmp_path)


def test_checkpoint_of_a_moved_work_dir(tmp_path):
    assert find_checkpoint(str(tmp_path)) is None
    (tmp_path / 'last_checkpoint').write_text('/where/it/was/iter_20.pth')
    with pytest.raises(CheckpointError, match=r'iter_20\.pth, which does not exist'):
        find_checkpoint(str(tmp_path))
    torch.save(dict(state_dict={}), tmp_path / 'iter_20.pth')
    assert find_checkpoint(str(tmp_path)) == str(tmp_path / 'iter_20.pth')
    assert checkpoint_step(find_checkpoint(str(tmp_path))) == 20


def test_broken_metafile(tmp_path):
    (tmp_path / 'detection').mkdir()
    metafile = tmp_path / 'detection' / 'metafile.yml'
    for text in ('Models: [', 'Collections: []', 'Models:\n  - Name: only\n'):
        metafile.write_text(text)
        with pytest.raises(UserError, match=f'{re.escape(str(metafile))} cannot be read'):
            read_published(tmp_path)
