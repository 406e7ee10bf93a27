# Copyright (c) mmscalablevit contributors. All rights reserved.
"""Plot the curves of several trainings into one figure: loss, learning rate and metrics."""

import argparse
from pathlib import Path

import matplotlib
from matplotlib import pyplot as plt
from rich.console import Console
from rich.progress import track

from mmscalablevit import cli, work_dirs
from mmscalablevit.errors import UserError

matplotlib.use('Agg')

# Endings that matplotlib writes without further packages.
FORMATS = ('.jpg', '.pdf', '.png', '.svg')


def labels(runs: list[work_dirs.Run]) -> list[str]:
    """Name runs by their work directories, or by whole paths where names repeat."""
    names = [run.work_dir.resolve().name for run in runs]
    return names if len({*names}) == len(names) else [str(run.work_dir) for run in runs]


def train_curve(run: work_dirs.Run, key: str) -> tuple[list[int], list[float]]:
    """Iterations and values of a logged training scalar, such as 'loss'."""
    steps = [step for step in sorted(run.train) if key in run.train[step]]
    return steps, [run.train[step][key] for step in steps]


def metric_curve(run: work_dirs.Run, metric: str) -> tuple[list[float], list[float]]:
    """Iterations and values of a validation metric, a key of ``work_dirs.METRICS``."""
    found = {e.step: e.metrics[metric] for e in run.evaluations(metric)}
    length = 1 if run.unit == 'iteration' else run.epoch_length
    if length is None and found:
        cause = 'its YYYYMMDD_HHMMSS/*.log is missing'
        raise UserError(f'{run.work_dir} does not tell how many iterations an epoch has: {cause}')
    return [step * length for step in found], list(found.values())


def draw(runs: list[work_dirs.Run], path: Path) -> None:
    """Draw a panel for the loss, the learning rate and every metric that a run has."""
    panels = {'training loss': 'loss', 'learning rate': 'lr'}
    curves = {title: [train_curve(run, key) for run in runs] for title, key in panels.items()}
    curves |= {m: [metric_curve(run, m) for run in runs] for m in work_dirs.METRICS}
    curves = {title: lines for title, lines in curves.items() if any(steps for steps, _ in lines)}

    columns = min(2, len(curves))
    rows = -(-len(curves) // columns)
    size = 6.5 * columns, 4 * rows
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout='constrained')
    colors = plt.get_cmap('tab10' if len(runs) <= 10 else 'tab20').colors
    names = labels(runs)
    last = max(max(run.train) for run in runs)
    for axis, (title, lines) in zip(axes.flat, curves.items(), strict=False):
        # Few points, such as an evaluation each epoch, are marked.
        marker = '' if title in panels else 'o'
        for i, ((steps, values), name) in enumerate(zip(lines, names, strict=True)):
            color = colors[i % len(colors)]
            axis.plot(steps, values, color=color, marker=marker, markersize=3, label=name)
        axis.set(title=title, xlabel='iteration', xlim=(0, 1.02 * last))
        axis.grid(alpha=0.3)
    for axis in list(axes.flat)[len(curves) :]:
        axis.set_axis_off()
    handles, texts = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, texts, loc='outside lower center', frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        formatter_class=cli.HelpFormatter,
        description='Plot loss, learning rate and validation metrics '
        f'({", ".join(work_dirs.METRICS)}) of trainings, finished or running, into one figure. '
        'A resumed training is one curve.',
        epilog='example: python tools/analysis_tools/plot_logs.py '
        'work_dirs/mask-rcnn_scalablevit-s_fpn_1x_coco work_dirs/mask-rcnn_swin-t_fpn_1x_coco '
        '--out curves.png',
    )
    help_ = 'work directory of a training, or a folder of them, such as work_dirs'
    parser.add_argument('runs', nargs='+', type=Path, metavar='RUN', help=help_)
    help_ = f'picture: {", ".join(FORMATS)}'
    parser.add_argument('--out', type=Path, required=True, metavar='FILE', help=help_)
    return parser.parse_args()


def main() -> None:
    """Plot."""
    args = parse_args()
    if args.out.suffix.lower() not in FORMATS:
        raise UserError(f'--out must end in one of {", ".join(FORMATS)}, got {args.out}')
    folders = work_dirs.find_work_dirs(args.runs)
    shown = track(folders, 'Reading logs', console=Console(stderr=True))
    runs = [work_dirs.read_run(folder) for folder in shown]
    empty = [str(run.work_dir) for run in runs if not run.train]
    if empty:
        raise UserError(f'no training was logged in {", ".join(empty)}')
    draw(runs, args.out)
    print(f'wrote {args.out}')


if __name__ == '__main__':
    cli.run(main)
