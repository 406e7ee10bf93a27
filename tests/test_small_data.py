# Copyright (c) mmscalablevit contributors. All rights reserved.
"""The configs for small public data sets, from raw folders on, and their page of results."""

import hashlib
import importlib.util
import json
import re
import sys

import numpy as np
import pytest
import torch
from jobs import ROOT, load_tool, run_tool, write_image, write_map
from logs import session, step
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from test_dataset_converters import write_lists, write_voc

from mmscalablevit import cli
from mmscalablevit.errors import UserError

CONFIGS = sorted((ROOT / 'configs' / 'small_data').glob('*.py'))
TASKS = ('bccd', 'nuclei', 'camvid')
# A backbone in each harness, and each small backbone in one.
TRAINED = [p for p in CONFIGS if 'scalablevit-demo' in p.stem or '_bccd-400x300' in p.stem]
# Steps that are quick, and as many workers as are needed to see that the config's own do.
SHORT = {
    'train_cfg.val_interval': 1,
    'train_dataloader.batch_size': 2,
    'default_hooks.logger.interval': 1,
    **{f'{x}_dataloader.num_workers': 0 for x in ('train', 'val')},
    **{f'{x}_dataloader.persistent_workers': False for x in ('train', 'val')},
}
if importlib.util.find_spec('mmcv._ext') is None:
    pytest.skip('the models need the compiled operators of mmcv', allow_module_level=True)


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    """The three sets with two images a split, from their owners' layouts through the converters."""
    root = tmp_path_factory.mktemp('small')
    raw = root / 'raw'
    boxes = dict(RBC=(100, 90, 200, 190), WBC=(300, 200, 480, 400), Platelets=(20, 20, 60, 62))
    objects = [(name, *box) for name, box in boxes.items()]
    lists = {split: [f'{split}{i}' for i in range(2)] for split in ('train', 'val')}
    names = [name for split in lists.values() for name in split]
    write_voc(raw / 'bccd', (640, 480), **dict.fromkeys(names, objects))
    write_lists(raw / 'bccd', **lists)
    instances = np.zeros((260, 347), np.uint16)
    for k in range(12):
        instances[20 * k : 20 * k + 14, 28 * k : 28 * k + 20] = k + 1
    labels = np.repeat(np.arange(360, dtype=np.uint8)[:, None] // 30, 480, axis=1)
    for split, name in ((split, name) for split, names in lists.items() for name in names):
        write_image(raw / 'nuclei' / 'images' / split / f'{name}.png', (347, 260))
        write_map(raw / 'nuclei' / 'instances' / split / f'{name}.png', instances)
        write_image(raw / 'camvid' / split / f'{name}.jpg', (480, 360))
        write_map(raw / 'camvid' / f'{split}annot' / f'{name}.png', labels)
    for name, line in load_tool('tools/experiments.py').CONVERTERS.items():
        script, *options = line.split()
        converter = ROOT / 'tools' / 'dataset_converters' / script
        run_tool([converter, raw / name, root / 'data' / name, *options], root)
    return root


def load(path):
    return Config.fromfile(path, import_custom_modules=False)


@pytest.mark.parametrize('path', TRAINED, ids=lambda path: path.stem)
def test_trains_and_validates(path, data, tmp_path, monkeypatch):
    monkeypatch.chdir(data)
    cfg = cli.read_config(str(path))
    cfg.work_dir = str(tmp_path)
    cfg.launcher = 'none'
    cfg.merge_from_dict(SHORT)
    if 'max_epochs' in cfg.train_cfg:
        # With the other pipeline in the second, each of the two images of the training part.
        cfg.merge_from_dict({'train_cfg.max_epochs': 2, 'custom_hooks.1.switch_epoch': 1})
    else:
        cfg.train_cfg.max_iters = 1
    # Scores of detectors that hardly trained are low, and a few of their many boxes are enough.
    test_cfg = cfg.model.test_cfg
    test_cfg.get('rpn', test_cfg).update(nms_pre=50, max_per_img=50)
    test_cfg.get('rcnn', test_cfg).update(score_thr=0.0, max_per_img=20)
    runner = cli.build_runner(cfg)
    before = {key: value.clone() for key, value in runner.model.named_parameters()}
    reached = set()
    for key, value in runner.model.named_parameters():
        value.register_hook(lambda _, key=key: reached.add(key))
    runner.train()

    # Distributed training stops at a parameter without a gradient.
    assert reached == before.keys()
    moved = [k for k, v in runner.model.named_parameters() if not v.equal(before[k])]
    assert any(key.startswith('backbone.') for key in moved)
    assert any(not key.startswith('backbone.') for key in moved)
    logged = runner.message_hub.log_scalars
    assert np.isfinite(logged['train/loss'].current())
    assert {'val/coco/bbox_mAP', 'val/mIoU'} & logged.keys()


@pytest.mark.parametrize('path', CONFIGS, ids=lambda path: path.stem)
def test_builds(path):
    cfg = cli.read_config(str(path))
    init_default_scope(cfg.default_scope)
    model = MODELS.build(cfg.model)
    with torch.no_grad():
        maps = model.backbone(torch.zeros(1, 3, 64, 64))

    # RetinaNet takes no map of stride 4.
    unused = 1 if 'retinanet' in path.stem else 0
    assert [x.shape[1] for x in maps] == cfg.embed_dims[unused:]
    assert [x.shape[-1] for x in maps] == [16, 8, 4, 2][unused:]
    heads = [m for m in model.modules() if hasattr(m, 'num_classes') and 'RPN' not in str(type(m))]
    assert {head.num_classes for head in heads} == {len(cfg.metainfo.classes)}


@pytest.mark.parametrize('task', TASKS)
def test_configs_of_a_harness_differ_by_the_backbone_alone(task):
    for size in {path.stem.rsplit('-', 1)[1] for path in CONFIGS if f'_{task}-' in path.stem}:
        harnesses = []
        for path in CONFIGS:
            if not path.stem.endswith(f'_{task}-{size}'):
                continue
            cfg = load(path).to_dict()
            dims = cfg.pop('embed_dims')
            for key in ('backbone', 'custom_imports'):
                cfg.pop(key)
            assert cfg['model'].pop('backbone')
            if task == 'camvid':
                assert cfg['model']['decode_head'].pop('in_channels') == dims
                assert cfg['model']['auxiliary_head'].pop('in_channels') == dims[2]
            else:
                used = dims[1:] if task == 'bccd' else dims
                assert cfg['model']['neck'].pop('in_channels') == used
            harnesses.append(cfg)
        assert len(harnesses) >= 3
        assert all(harness == harnesses[0] for harness in harnesses)


@pytest.fixture
def page(monkeypatch, tmp_path):
    """The tool, which writes into a folder of the test."""
    tool = load_tool('tools/analysis_tools/results_page.py')
    monkeypatch.setattr(tool, 'LOGS', tmp_path / 'results')
    monkeypatch.setattr(tool, 'PAGE', tmp_path / 'results.md')
    monkeypatch.setattr(tool, 'CURVES', tmp_path / 'curves.png')
    tool.PAGE.write_text(f'# Mine\n\n{tool.BEGIN}old\n{tool.END}\nText.\n')
    return tool


def write_run(work_dir, config, seed, losses, last):
    """A work directory as a training of as many iterations, each an epoch, as losses leaves it."""
    cfg = load(ROOT / 'configs' / 'small_data' / f'{config}.py')
    cfg.randomness.seed = seed
    epochs = 'max_epochs' in cfg.train_cfg
    cfg.train_cfg['max_epochs' if epochs else 'max_iters'] = len(losses)
    records = [
        dict(step(i, i if epochs else None, seconds=2.0), loss=loss)
        for i, loss in enumerate(losses, start=1)
    ]
    last = dict(last, step=len(losses) if epochs else 0)
    session(work_dir, [*records, last], cfg.to_dict(), config)
    return work_dir


def test_page_from_work_directories(page, tmp_path, monkeypatch):
    name = 'scalablevit-demo_upernet_camvid-320x240'
    runs = [
        write_run(tmp_path / f'seed{s}', name, s, [3.0, 2.0, 1.0], dict(mIoU=40.0 + s, aAcc=80.0))
        for s in (0, 1)
    ]
    (runs[0] / 'peak_memory_kb').write_text('1500000\n')
    found = {'coco/bbox_mAP': 0.6, 'coco/bbox_mAP_50': 0.9}
    epochs = 'retinanet_swin-demo_fpn_bccd-400x300'
    runs.append(write_run(tmp_path / epochs, epochs, 0, [2.0, 1.0], found))
    monkeypatch.setattr(sys, 'argv', ['results_page.py', *map(str, runs)])
    page.main()

    log = json.loads((page.LOGS / f'{name}_seed1.json').read_text())
    assert log['loss'] == [[1, 3.0], [2, 2.0], [3, 1.0]]
    assert (log['metrics'], log['minutes']) == ({'mIoU': 41.0, 'pixel accuracy': 80.0}, 0.1)
    text = page.PAGE.read_text()
    assert text.startswith('# Mine\n')
    assert text.endswith('\nText.\n')
    assert 'old' not in text
    (row,) = re.findall(r'\| \[ScalableViT, small\].*camvid.*', text)
    cells = [cell.strip() for cell in row.split('|')[1:-1]]
    assert cells[1:3] == ['40.0, 41.0', '80.0, 80.0']
    assert cells[3] == '3 iterations'
    assert cells[7:9] == ['0', '1.5']
    assert re.search(r'\[Swin, small\].*bccd.*\| 60.0 +\| 90.0 +\| 2 epochs', text)
    assert len(re.findall('not run', text)) == 2 * (3 + 4 + 3)
    assert page.CURVES.stat().st_size > 0


def test_comparison_with_the_page(page, tmp_path, monkeypatch, capsys):
    name = 'scalablevit-demo_upernet_camvid-320x240'
    page.LOGS.mkdir()
    for seed, value in ((0, 40.0), (1, 43.0)):
        metrics = {'mIoU': value, 'pixel accuracy': 80.0 + seed}
        log = dict(config=name, seed=seed, length='3 iterations', metrics=metrics)
        (page.LOGS / page.log_name(log)).write_text(json.dumps(log))
    found = dict(mIoU=42.9, aAcc=78.9)
    runs = [write_run(tmp_path / f'seed{s}', name, s, [3.0, 2.0, 1.0], found) for s in (0, 2)]
    runs.append(write_run(tmp_path / 'short', name, 1, [3.0, 2.0], found))
    monkeypatch.setattr(sys, 'argv', ['results_page.py', *map(str, runs), '--compare'])
    before = page.PAGE.read_text()
    page.main()

    assert page.PAGE.read_text() == before
    table = [line.split('|')[2:-1] for line in capsys.readouterr().out.split('\n') if '|' in line]
    assert [[cell.strip() for cell in cells] for cells in table[2:]] == [
        ['0', 'mIoU', '42.9', '40.0', '+2.9', 'within noise 3.0'],
        ['0', 'pixel accuracy', '78.9', '80.0', '-1.1', 'OUTSIDE noise 1.0'],
        ['2', 'mIoU', '42.9', '-', '-', 'no such row'],
        ['2', 'pixel accuracy', '78.9', '-', '-', 'no such row'],
        ['1', 'mIoU', '42.9', '-', '-', '3 iterations there'],
        ['1', 'pixel accuracy', '78.9', '-', '-', '3 iterations there'],
    ]


def test_unfinished_training_is_refused(page, tmp_path):
    name = 'retinanet_swin-demo_fpn_bccd-400x300'
    run = write_run(tmp_path / 'run', name, 0, [3.0, 2.0], {})

    with pytest.raises(UserError, match='no finished training of configs/small_data'):
        page.compact_log(run)


def test_committed_page_is_up_to_date(page):
    found = ROOT / 'docs'
    page.LOGS = found / 'results'
    text = (found / 'results.md').read_text()
    assert page.fill(text, page.read_logs()) == text


def test_weights_are_released_in_half_precision(tmp_path):
    weights = dict(weight=torch.full((2, 2), 1 / 3), count=torch.tensor(7))
    torch.save(dict(state_dict=weights, optimizer={}), tmp_path / 'iter_800.pth')
    publish = ROOT / 'tools' / 'model_converters' / 'publish_model.py'
    run_tool([publish, 'iter_800.pth', 'released', '--half'], tmp_path)
    (path,) = tmp_path.glob('released-*.pth')
    released = torch.load(path, weights_only=True)['state_dict']
    assert (released['weight'].dtype, released['count'].dtype) == (torch.float16, torch.int64)
    assert released['weight'].float().allclose(weights['weight'], rtol=1e-3)
    assert hashlib.sha256(path.read_bytes()).hexdigest().startswith(path.stem[-8:])
