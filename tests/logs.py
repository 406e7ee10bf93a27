# Copyright (c) mmscalablevit contributors. All rights reserved.
"""Work directories as trainings and tests of mmengine leave them, without training."""

import json
import os
import time

from mmengine.config import Config

DETECTOR = 'mask-rcnn_scalablevit-s_fpn_1x_coco'
SEGMENTOR = 'scalablevit-s_upernet_8xb2-160k_ade20k-512x512'
STAMP, LATER = '20260101_120000', '20260102_000000'


def detector_config():
    dataset = dict(data_root='data/coco/', pipeline=[dict(type='Resize', scale=(1333, 800))])
    return dict(
        default_scope='mmdet',
        model=dict(
            type='MaskRCNN',
            backbone=dict(init_cfg=dict(type='Pretrained', checkpoint='x.pth'), with_cp=False),
        ),
        train_cfg=dict(type='EpochBasedTrainLoop', max_epochs=3, val_interval=1),
        train_dataloader=dict(batch_size=2, num_workers=2, dataset=dataset),
        val_dataloader=dict(batch_size=1, num_workers=2, dataset=dataset),
        optim_wrapper=dict(type='OptimWrapper', optimizer=dict(type='AdamW', lr=1e-4)),
        auto_scale_lr=dict(enable=False, base_batch_size=16),
    )


def segmentor_config():
    pipeline = [dict(type='Resize', scale=(2048, 512))]
    loader = dict(batch_size=1, num_workers=2, dataset=dict(data_root='ade', pipeline=pipeline))
    return dict(
        default_scope='mmseg',
        model=dict(type='EncoderDecoder', pretrained='x.pth', backbone=dict()),
        train_cfg=dict(type='IterBasedTrainLoop', max_iters=100, val_interval=40),
        train_dataloader=dict(loader, batch_size=2),
        val_dataloader=loader,
        test_dataloader=loader,
        test_evaluator=dict(type='IoUMetric'),
        tta_model=dict(type='SegTTAModel'),
        tta_pipeline=[dict(type='TestTimeAug')],
        optim_wrapper=dict(type='OptimWrapper', optimizer=dict(type='AdamW', lr=6e-5)),
        auto_scale_lr=dict(enable=False, base_batch_size=16),
    )


def step(iteration, epoch=None, seconds=0.5, memory=None):
    record = dict(loss=1.0, lr=1e-4, time=seconds, iter=iteration, step=iteration)
    others = dict(epoch=epoch, memory=memory)
    return record | {key: value for key, value in others.items() if value is not None}


def boxes(epoch, box_ap, mask_ap):
    return {'coco/bbox_mAP': box_ap, 'coco/segm_mAP': mask_ap, 'time': 0.1, 'step': epoch}


def session(
    work_dir, records, config=(), name=DETECTOR, stamp=STAMP, gpus=8, resumed=(), test=(), age=10**8
):
    """Write what mmengine writes for one start of a training or a test."""
    config = config or (segmentor_config() if name == SEGMENTOR else detector_config())
    folder = work_dir / stamp
    (folder / 'vis_data').mkdir(parents=True)
    Config(config).dump(work_dir / f'{name}.py')
    Config(config).dump(folder / 'vis_data' / 'config.py')
    lines = [f'    GPU number: {gpus}']
    if resumed:
        lines.append('mmengine - INFO - resumed epoch: {}, iter: {}'.format(*resumed))
    if 'max_epochs' in config['train_cfg']:
        lines.append('mmengine - INFO - Epoch(train)  [1][ 50/100]  base_lr: 1e-4')
    (folder / f'{stamp}.log').write_text('\n'.join(lines))
    if records:
        text = ''.join(f'{json.dumps(record)}\n' for record in records)
        (folder / 'vis_data' / 'scalars.json').write_text(text)
    if test:
        (folder / f'{stamp}.json').write_text(json.dumps(test))
    when = time.time() - age
    for path in [*folder.rglob('*'), folder]:
        os.utime(path, (when, when))


def evaluated(config, checkpoint, tta):
    config = dict(config, load_from=f'work_dirs/run/{checkpoint}')
    if tta:
        config['model'] = dict(config['tta_model'], module=config['model'])
        loader = config['test_dataloader']
        dataset = dict(loader['dataset'], pipeline=config['tta_pipeline'])
        config['test_dataloader'] = dict(loader, dataset=dataset)
    return config
