# Copyright (c) mmscalablevit contributors. All rights reserved.
"""Write the results on small public data sets from work directories.

Each finished training becomes a compact log in ``docs/results/``, which git keeps; the tables and
the curves of ``docs/results.md`` are made of all compact logs there. The text around the tables is
written by hand, and is kept. Or compare trainings with what the page says, and write nothing.
"""

import argparse
import json
import re
import statistics
from pathlib import Path

import matplotlib
import torch
from matplotlib import pyplot as plt
from mmengine.registry import MODELS, init_default_scope
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mmscalablevit import cli, work_dirs
from mmscalablevit.errors import UserError

matplotlib.use('Agg')

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / 'configs' / 'small_data'
LOGS = ROOT / 'docs' / 'results'
PAGE = ROOT / 'docs' / 'results.md'
CURVES = ROOT / 'docs' / 'images' / 'results_curves.png'
BEGIN, END = '<!-- Tables by results_page.py, do not edit -->\n', '<!-- End of the tables -->\n'
# End of the names of a harness's configs: its title.
TASKS = {
    'bccd-400x300': 'RetinaNet on BCCD',
    'nuclei-256x256': 'Mask R-CNN on nuclei',
    'camvid-320x240': 'UperNet on CamVid',
}
# Metrics by name in the logs. Those of COCO are fractions there.
METRICS = {
    'bccd-400x300': {'coco/bbox_mAP': 'box AP', 'coco/bbox_mAP_50': 'box AP50'},
    'nuclei-256x256': {'coco/segm_mAP': 'mask AP', 'coco/segm_mAP_50': 'mask AP50'},
    'camvid-320x240': {'mIoU': 'mIoU', 'aAcc': 'pixel accuracy'},
}
BACKBONES = {
    'scalablevit-demo': 'ScalableViT, small',
    'swin-demo': 'Swin, small',
    'twins-svt-demo': 'Twins-SVT, small',
    'r18': 'ResNet-18',
}
HEADER = ['Length', 'Params (M)', 'GFLOPs', 's/iteration', 'Minutes', 'Memory (GB)', 'Logs']


def count_backbone(cfg) -> tuple[float, float, float]:
    """Millions of parameters of the model and its backbone, GFLOPs of the backbone at its input.

    A FLOP is one multiply-add; attention's products are counted.
    """
    init_default_scope(cfg.default_scope)
    model = MODELS.build(cfg.model)
    width, height = map(int, re.search(r'(\d+)x(\d+)$', Path(cfg.filename).stem).groups())
    counter = FlopCounterMode(display=False)
    # Fused attention is one operator, which is not counted everywhere.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        model.backbone(torch.zeros(1, 3, height, width))
    params = [sum(p.numel() for p in m.parameters()) / 1e6 for m in (model, model.backbone)]
    return *params, counter.get_total_flops() / 2 / 1e9


def compact_log(work_dir: Path) -> dict:
    """What the page says of a training, and its curve."""
    run = work_dirs.read_run(work_dir)
    task = task_of(run.name)
    if task is None or run.state != 'finished':
        raise UserError(f'{work_dir} is no finished training of configs/small_data: {run.state}')
    last = run.validations[run.total].logged
    params, backbone_params, gflops = count_backbone(cli.read_config(CONFIGS / f'{run.name}.py'))
    memory = work_dir / 'peak_memory_kb'
    return dict(
        config=run.name,
        seed=run.config.randomness.seed,
        metrics={
            name: round(last[key] * (100 if key.startswith('coco') else 1), 2)
            for key, name in METRICS[task].items()
        },
        length=f'{run.total} {run.unit}s',
        batch_size=run.batch_size,
        optimizer=run.config.optim_wrapper.type,
        params_m=round(params, 2),
        backbone_params_m=round(backbone_params, 2),
        backbone_gflops=round(gflops, 3),
        seconds_per_iteration=round(statistics.median(r['time'] for r in run.train.values()), 2),
        minutes=round(run.hours * 60, 1),
        memory_gb=round(int(memory.read_text()) / 1e6, 2) if memory.is_file() else None,
        torch=torch.__version__,
        loss=[[step, round(record['loss'], 4)] for step, record in sorted(run.train.items())],
    )


def log_name(log: dict) -> str:
    """The file of a compact log."""
    return f'{log["config"]}_seed{log["seed"]}.json'


def read_logs() -> list[dict]:
    """The compact logs, those of one config together, by seed."""
    logs = [json.loads(path.read_text()) for path in LOGS.glob('*.json')]
    return sorted(logs, key=lambda log: (log['config'], log['seed']))


def task_of(config: str) -> str | None:
    """The data set of a config; None if it is not of configs/small_data."""
    return next((task for task in TASKS if config.endswith(task)), None)


def noise(task: str, metric: str, logs: list[dict]) -> float | None:
    """The widest range of a metric over the seeds of one config, or None if each has one seed."""
    values = {}
    for log in logs:
        if task_of(log['config']) == task:
            values.setdefault(log['config'], []).append(log['metrics'][metric])
    return max((max(v) - min(v) for v in values.values() if len(v) > 1), default=None)


def compare(found: list[dict], logs: list[dict]) -> str:
    """A table of trainings beside the compact logs of the same configs and seeds."""
    known = {log_name(log): log for log in logs}
    rows = []
    for log in found:
        page = known.get(log_name(log))
        for metric, value in log['metrics'].items():
            row = [log['config'], str(log['seed']), metric, f'{value:.1f}']
            if page is None or page['length'] != log['length']:
                why = 'no such row' if page is None else f'{page["length"]} there'
                rows.append([*row, '-', '-', why])
                continue
            width = noise(task_of(log['config']), metric, logs)
            difference = value - page['metrics'][metric]
            verdict = 'unknown noise' if width is None else f'noise {width:.1f}'
            if width is not None:
                verdict = ('within ' if abs(difference) <= width else 'OUTSIDE ') + verdict
            rows.append([*row, f'{page["metrics"][metric]:.1f}', f'{difference:+.1f}', verdict])
    return cli.markdown_table(['Config', 'Seed', 'Metric', 'Now', 'Page', 'Change', ''], rows)


def find(backbone: str, task: str) -> str:
    """The stem of a config."""
    (path,) = (p for p in CONFIGS.glob(f'*{task}.py') if f'{backbone}_' in p.stem)
    return path.stem


def table(task: str, logs: list[dict]) -> str:
    """The section of a data set."""
    metrics = list(METRICS[task].values())
    rows = []
    for backbone, name in BACKBONES.items():
        config = find(backbone, task)
        runs = [log for log in logs if log['config'] == config]
        link = f'[{name}](../configs/small_data/{config}.py)'
        if not runs:
            rows.append([link, *['not run'] * len(metrics), *['-'] * len(HEADER)])
            continue
        first = runs[0]
        memories = [run['memory_gb'] for run in runs if run['memory_gb']]
        row = [
            link,
            *(', '.join(f'{run["metrics"][metric]:.1f}' for run in runs) for metric in metrics),
            ', '.join(dict.fromkeys(run['length'] for run in runs)),
            f'{first["params_m"]:.2f}, backbone {first["backbone_params_m"]:.2f}',
            f'{first["backbone_gflops"]:.2f}',
            f'{statistics.median(run["seconds_per_iteration"] for run in runs):.2f}',
            f'{statistics.median(run["minutes"] for run in runs):.0f}',
            f'{max(memories):.1f}' if memories else '-',
            ' '.join(f'[seed {run["seed"]}](results/{log_name(run)})' for run in runs),
        ]
        rows.append(row)
    text = f'### {TASKS[task]}\n\n' + cli.markdown_table(['Backbone', *metrics, *HEADER], rows)
    widths = {metric: noise(task, metric, logs) for metric in metrics}
    if None in widths.values():
        return text
    ranges = ' and '.join(f'{width:.1f} {metric}' for metric, width in widths.items())
    return f'{text}\nNoise: the seeds of one backbone differ by up to {ranges}.\n'


def draw(logs: list[dict]) -> None:
    """Draw the loss over the iterations, a panel for each data set."""
    figure, axes = plt.subplots(1, len(TASKS), figsize=(12, 3.2), constrained_layout=True)
    for axis, (task, title) in zip(axes, TASKS.items(), strict=True):
        for number, (backbone, name) in enumerate(BACKBONES.items()):
            for log in logs:
                if log['config'] == find(backbone, task):
                    label = f'{name}, seed {log["seed"]}'
                    axis.plot(*zip(*log['loss'], strict=True), color=f'C{number}', label=label)
        axis.set(title=title, xlabel='iteration', ylabel='training loss', yscale='log')
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend()
    figure.savefig(CURVES, dpi=110)
    plt.close(figure)


def fill(page: str, logs: list[dict]) -> str:
    """Put the tables between the marks of a page."""
    head, rest = page.split(BEGIN)
    _, tail = rest.split(END)
    return f'{head}{BEGIN}\n' + '\n'.join(table(task, logs) for task in TASKS) + f'\n{END}{tail}'


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        formatter_class=cli.HelpFormatter,
        description='Write docs/results.md and its compact logs from work directories.',
        epilog='example: python tools/analysis_tools/results_page.py work_dirs/*_bccd-400x300',
    )
    parser.add_argument('work_dirs', nargs='*', type=Path, help='of finished trainings')
    help_ = 'only print how they differ from the page'
    parser.add_argument('--compare', action='store_true', help=help_)
    return parser.parse_args()


def main() -> None:
    """Write compact logs, the page and the curves."""
    args = parse_args()
    found = [compact_log(work_dir) for work_dir in args.work_dirs]
    if args.compare:
        print(compare(found, read_logs()))
        return
    LOGS.mkdir(exist_ok=True)
    for log in found:
        text = re.sub(r'\[\n\s+(\d+),\n\s+([\d.]+)\n\s+\]', r'[\1, \2]', json.dumps(log, indent=1))
        (LOGS / log_name(log)).write_text(text + '\n')
    logs = read_logs()
    PAGE.write_text(fill(PAGE.read_text(), logs))
    draw(logs)


if __name__ == '__main__':
    cli.run(main)
