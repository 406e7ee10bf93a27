# Copyright (c) mmscalablevit contributors. All rights reserved.
"""Compare trainings, finished or running, with the published results: a table and a plot.

A gap is marked with * where the run does not stand for its experiment: its config was altered, or
its backbone was not pretrained; the notes under the table say how. A difference from a baseline is
marked where the two runs differ in that, or are not both finished.
"""

import argparse
import json
import re
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path

import matplotlib
from matplotlib import pyplot as plt
from matplotlib.ticker import MaxNLocator
from mmengine.config import Config
from rich.console import Console
from rich.progress import track

from mmscalablevit import cli
from mmscalablevit.errors import UserError
from mmscalablevit.published import Published, read_published
from mmscalablevit.work_dirs import METRICS, Run, find_work_dirs, read_run

matplotlib.use('Agg')

CONFIGS = Path(__file__).parents[2] / 'configs'
# Baselines of the size of ScalableViT-S: part of the config's name, name to show.
BASELINES = {'swin-t': 'Swin-T', 'twins-svt-s': 'Twins-SVT-S'}
# What a training's result depends on, most telling first; batch sizes are compared as a whole.
TRAINING_KEYS = (
    'train_cfg',
    'load_from',
    'optim_wrapper',
    'param_scheduler',
    'model',
    'custom_hooks',
    'train_dataloader',
    'val_dataloader',
    'val_evaluator',
)
TEST_KEYS = ('model', 'tta_model', 'tta_pipeline', 'test_dataloader', 'test_evaluator')
# Settings under these that change speed and memory, and no result beyond rounding. Pretraining is
# looked at on its own.
NEUTRAL = re.compile(
    r'(^|\.)(num_workers|persistent_workers|pin_memory|prefetch_factor|with_cp|backend_args)(\.|$)'
    r'|_dataloader\.batch_size$'
    r'|^model\.backbone\.(init_cfg|pretrained)(\.|$)|^model\.pretrained$'
    r'|^optim_wrapper\.(loss_scale|dtype)(\.|$)'
)
MIXED_PRECISION = ('AmpOptimWrapper', 'CPUAmpOptimWrapper')
# Alterations that the table's notes name; the JSON has all of them.
NUM_SHOWN = 4
MARKERS = 'osD^vP'


@dataclass
class Row:
    """A metric of a run on the published scale, or no metric if nothing was evaluated yet.

    ``differences`` are those of the best value from the baselines, of which ``incomparable`` ran
    under other conditions; ``altered`` is what keeps the run from standing for its experiment;
    ``peak_memory_mb`` is in MB.
    """

    experiment: str
    work_dir: str
    metric: str = ''
    unit: str = 'epoch'
    best: float | None = None
    best_step: int | None = None
    last: float | None = None
    last_step: int | None = None
    published: float | None = None
    gap: float | None = None
    differences: dict[str, float] = field(default_factory=dict)
    incomparable: list[str] = field(default_factory=list)
    images_per_second: float | None = None
    peak_memory_mb: float | None = None
    hours: float | None = None
    state: str = ''
    done: float = 0.0
    total: int = 0
    hours_left: float | None = None
    altered: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def flatten(value: object, key: str = '') -> dict[str, object]:
    """Nested dicts, and lists of dicts, as one dict with dotted keys."""
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list | tuple) and value and all(isinstance(x, dict) for x in value):
        items = enumerate(value)
    else:
        return {key: list(value) if isinstance(value, tuple) else value}
    leaves = {}
    for name, nested in items:
        leaves.update(flatten(nested, f'{key}.{name}' if key else str(name)))
    return leaves


def find_alterations(config: Config, reference: Config, keys: tuple[str, ...]) -> list[str]:
    """What a run's config has otherwise than its experiment's, such as 'train_cfg.max_epochs=1'."""
    altered = []
    for entry in keys:
        mine, theirs = (flatten(c.get(entry), entry) for c in (config, reference))
        for key in dict.fromkeys([*mine, *theirs]):
            # A key that is set to None is as good as absent.
            value = mine.get(key)
            faster = key == 'optim_wrapper.type' and value in MIXED_PRECISION
            if faster or NEUTRAL.search(key) or value == theirs.get(key):
                continue
            text = f'{key} removed' if value is None else f'{key}={value}'
            altered.append(text.replace(', ', ','))
    return altered


def alterations(run: Run, reference: Config) -> list[str]:
    """What keeps a run from standing for its experiment, alterations of the training first."""
    altered = []
    if run.config is not None:
        config = run.config
        if config.get('resume'):
            # It went on from there; pretrained weights are named in the first start.
            config = Config(dict(config, load_from=reference.get('load_from')))
        altered += find_alterations(config, reference, TRAINING_KEYS)
        recipe = (reference.get('auto_scale_lr') or {}).get('base_batch_size')
        if recipe and run.batch_size != recipe:
            scaled = (config.get('auto_scale_lr') or {}).get('enable')
            rate = 'learning rate scaled' if scaled else 'learning rate not scaled'
            altered.append(f'batch size {run.batch_size} where the recipe has {recipe} ({rate})')
    for config in run.test_configs:
        altered += find_test_alterations(config, reference)
    return list(dict.fromkeys(altered))


def find_test_alterations(config: Config, reference: Config) -> list[str]:
    """What differs between a test, as ``tools/test.py`` set it up, and the experiment's test."""
    config, reference = (Config(c.to_dict()) for c in (config, reference))
    if 'module' in config.model:
        # What tools/test.py --tta replaces by entries that are compared on their own.
        config.model = config.model.module
        for each in (config, reference):
            each.test_dataloader.dataset.pop('pipeline', None)
    # tools/test.py adds where to write predictions.
    for evaluator in [config.test_evaluator, reference.test_evaluator]:
        if isinstance(evaluator, dict):
            evaluator.pop('output_dir', None)
    if isinstance(config.test_evaluator, list):
        kept = [e for e in config.test_evaluator if not e.type.startswith('Dump')]
        config.test_evaluator = kept[0] if len(kept) == 1 else kept
    return find_alterations(config, reference, TEST_KEYS)


def is_pretrained(config: Config) -> bool:
    """Whether a detector or segmentor starts from pretrained weights; classifiers need none."""
    if config.get('default_scope') == 'mmpretrain':
        return True
    leaves = flatten(config.get('model') or {})
    named = [config.get('load_from'), leaves.get('pretrained'), leaves.get('backbone.pretrained')]
    inits = [key for key in leaves if re.fullmatch(r'backbone\.init_cfg(\.\d+)?\.type', key)]
    return any(named) or any(leaves[key] == 'Pretrained' for key in inits)


def make_rows(run: Run, models: dict[str, Published]) -> list[Row]:
    """A row for each metric of a run, or one that says how far it is."""
    altered, notes = [], []
    published = models[run.name].metrics if run.name in models else {}
    paths = sorted(CONFIGS.glob(f'*/{run.name}.py'))
    if not paths:
        notes.append('unknown experiment: no config of this name in configs/')
    else:
        altered = alterations(run, Config.fromfile(paths[0], import_custom_modules=False))
        # The demo, which no metafile has, starts from scratch by design.
        if run.config is not None and run.name in models and not is_pretrained(run.config):
            altered.append('backbone not pretrained')
        if not published:
            notes.append('no published result')
    if run.config is not None and run.config.optim_wrapper.get('type') in MIXED_PRECISION:
        notes.append('mixed precision')

    seen = {metric for e in [*run.validations.values(), *run.tta] for metric in e.metrics}
    # In the order of METRICS; those with augmentation after them.
    metrics = [m for m in METRICS if m in seen] + sorted(seen - METRICS.keys())
    common = {key: getattr(run, key) for key in Row.__annotations__ if hasattr(run, key)}
    common |= dict(experiment=run.name, work_dir=str(run.work_dir))
    rows = []
    for metric in metrics:
        wanted = published.get(metric)
        row = Row(**common, metric=metric, published=wanted, altered=altered, notes=notes)
        if evaluations := run.evaluations(metric):
            best = max(evaluations, key=lambda e: e.metrics[metric])
            row.best, row.best_step = best.metrics[metric], best.step
            row.last, row.last_step = evaluations[-1].metrics[metric], evaluations[-1].step
            row.gap = None if wanted is None else row.best - wanted
        rows.append(row)
    return rows or [Row(**common, altered=altered, notes=[*notes, 'no evaluation yet'])]


def compare_with_baselines(rows: list[Row]) -> None:
    """Set the differences from the best runs of the same training with another backbone."""
    measured = [row for row in rows if row.best is not None]
    for row, (part, name) in product(measured, BASELINES.items()):
        twin = row.experiment.replace('scalablevit-s', part)
        others = [r for r in measured if (r.experiment, r.metric) == (twin, row.metric)]
        if twin == row.experiment or not others:
            continue
        other = max(others, key=lambda r: r.best)
        row.differences[name] = row.best - other.best
        finished = row.state == other.state == 'finished'
        if not finished or set(row.altered) != set(other.altered):
            row.incomparable.append(name)


def read_rows(work_dirs: list[Path]) -> tuple[list[Row], list[Run]]:
    """Read all runs and compare them with the published results and each other.

    A work directory that cannot be read has a row that says why, and no run.
    """
    models = read_published(CONFIGS)
    rows, runs = [], []
    console = Console(stderr=True)
    for work_dir in track(
        work_dirs, 'Reading logs', console=console, disable=not console.is_terminal
    ):
        try:
            run = read_run(work_dir)
        except UserError as error:
            note = ' '.join(str(error).split())
            rows.append(Row(work_dir.name, str(work_dir), state='unreadable', notes=[note]))
            continue
        runs.append(run)
        rows += make_rows(run, models)
    compare_with_baselines(rows)
    return rows, runs


def _number(value: float | None, form: str = '.1f') -> str:
    return '-' if value is None else f'{value:{form}}'


def _at(value: float | None, step: int | None, unit: str) -> str:
    return _number(value) + ('' if value is None or step is None else f' ({unit} {step})')


def describe_state(row: Row) -> str:
    """Say how far a run is, such as 'running, epoch 2.4 of 12, 5.2 h left'."""
    if row.state in ('tested only', 'unreadable'):
        return row.state
    # Rounded down, so that it is not said to be further than it is.
    done = f'{int(row.done * 10) / 10:g}'
    if row.state == 'finished':
        return f'finished, {row.unit} {done}'
    text = f'{row.state}, {row.unit} {done} of {row.total}'
    if row.hours_left is None:
        return text
    left = f'{row.hours_left * 60:.0f} min' if row.hours_left < 1 else f'{row.hours_left:.1f} h'
    return f'{text}, {left} left'


def _note_texts(row: Row) -> list[str]:
    if not row.altered:
        return row.notes
    # What is not a setting would be lost among many of them.
    more = [text for text in row.altered if ' ' not in text or '=' in text][NUM_SHOWN:]
    shown = '; '.join(text for text in row.altered if text not in more)
    counted = f'; and {len(more)} more settings' if more else ''
    return [f'altered: {shown}{counted}', *row.notes]


def format_cells(rows: list[Row]) -> tuple[list[str], list[list[str]], list[str]]:
    """The header, the cells of each row, and the notes that cells refer to by number."""
    names = [name for name in BASELINES.values() if any(name in row.differences for row in rows)]
    header = ['Experiment', 'Metric', 'Best', 'Last', 'Published', 'Gap']
    header += [f'- {name}' for name in names]
    header += ['Images/s', 'GPU GB', 'Hours', 'State', 'Notes']
    notes = list(dict.fromkeys(text for row in rows for text in _note_texts(row)))
    lines, before = [], None
    for row in rows:
        label = row.experiment + f' [{row.work_dir}]' * _is_repeated(row, rows)
        differences = [
            _number(row.differences.get(name), '+.1f') + '*' * (name in row.incomparable)
            for name in names
        ]
        speed, hours = row.images_per_second, row.hours
        common = [
            _number(speed, '.1f' if (speed or 0) >= 10 else '.2f'),
            _number(row.peak_memory_mb and row.peak_memory_mb / 1024),
            _number(hours, '.1f' if (hours or 0) >= 1 else '.2g'),
            describe_state(row),
            ' '.join(str(notes.index(text) + 1) for text in _note_texts(row)),
        ]
        if row.work_dir == before:
            label, common = '', [''] * len(common)
        before = row.work_dir
        line = [
            label,
            row.metric or '-',
            _at(row.best, row.best_step, row.unit),
            _at(row.last, row.last_step, row.unit),
            _number(row.published),
            _number(row.gap, '+.1f') + '*' * (row.gap is not None and bool(row.altered)),
        ]
        lines.append([*line, *differences, *common])
    return header, lines, notes


def _is_repeated(row: Row, rows: list[Row]) -> bool:
    return any(r.experiment == row.experiment and r.work_dir != row.work_dir for r in rows)


def explain(rows: list[Row], models: dict[str, Published]) -> list[str]:
    """What the columns of the table are, and where published results come from."""
    texts = ['Gap: best minus published. Hours: in training iterations, without evaluation.']
    marked = any(row.altered and row.gap is not None for row in rows)
    if marked or any(row.incomparable for row in rows):
        texts.append('* Not comparable: altered or not under the same conditions; see the notes.')
    named = {row.experiment for row in rows if row.published is not None}
    sources = dict.fromkeys(models[name].source for name in sorted(named) if models[name].source)
    return texts + [f'Source of published: {source}' for source in sources]


def format_markdown(rows: list[Row], models: dict[str, Published], **width: int) -> str:
    """The table, its notes and explanations as Markdown, or folded for a terminal of a width."""
    header, lines, notes = format_cells(rows)
    numbered = [f'{number}. {note}\n' for number, note in enumerate(notes, start=1)]
    parts = [cli.markdown_table(header, lines, **width), ''.join(numbered)]
    parts += [f'{text}\n' for text in explain(rows, models)]
    # A star would begin emphasis.
    return '\n'.join(part for part in parts if part).replace('*', r'\*')


def draw(rows: list[Row], runs: list[Run], path: Path) -> bool:
    """Plot each metric of every run, published results dashed; False if there is none."""
    rows = [row for row in rows if row.best is not None]
    panels = list(dict.fromkeys((row.metric, row.unit) for row in rows))
    if not panels:
        return False
    experiments = list(dict.fromkeys(run.name for run in runs))
    colors = plt.get_cmap('tab10' if len(experiments) <= 10 else 'tab20').colors
    run_of = {str(run.work_dir): run for run in runs}
    columns = min(len(panels), 2)
    lines = -(-len(panels) // columns)
    size = 7.5 * columns, (4.2 + 0.4 * len(rows) / len(panels)) * lines
    figure = plt.figure(figsize=size, layout='constrained')
    for place, (metric, unit) in enumerate(panels, start=1):
        axis = figure.add_subplot(lines, columns, place)
        drawn = []
        for row in [row for row in rows if (row.metric, row.unit) == (metric, unit)]:
            color = colors[experiments.index(row.experiment) % len(colors)]
            evaluations = run_of[row.work_dir].evaluations(metric)
            steps = [row.total if e.step is None else e.step for e in evaluations]
            values = [e.metrics[metric] for e in evaluations]
            label = row.experiment + (' (altered)' if row.altered else '')
            label += f'\n{row.work_dir}' * _is_repeated(row, rows)
            # Runs of one experiment share its color.
            marker = MARKERS[drawn.count(row.experiment) % len(MARKERS)]
            axis.plot(steps, values, f'{marker}-', color=color, markersize=5, label=label)
            if row.published is not None and row.experiment not in drawn:
                published = f'published: {row.published:.1f}'
                axis.axhline(row.published, color=color, linestyle='--', label=published)
            drawn.append(row.experiment)
        axis.set(title=metric, xlabel=unit, ylabel=metric)
        axis.set_xlim(left=0)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.grid(alpha=0.3)
        axis.legend(fontsize='small', loc='upper center', bbox_to_anchor=(0.5, -0.12))
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return True


def write(rows: list[Row], runs: list[Run], markdown: str, folder: Path) -> None:
    """Write the table as ``runs.md`` and ``runs.json``, and the plot ``runs.png``."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / 'runs.md').write_text(markdown, encoding='utf-8')
        text = json.dumps(dict(rows=[asdict(row) for row in rows]), indent=2)
        (folder / 'runs.json').write_text(f'{text}\n', encoding='utf-8')
        drawn = draw(rows, runs, folder / 'runs.png')
    except OSError as error:
        raise UserError(f'--out {folder} cannot be written: {error.strerror}') from error
    pictures = 'and .png' if drawn else '(no evaluation to plot yet)'
    print(f'wrote {folder}/runs.md, .json {pictures}')


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        formatter_class=cli.HelpFormatter,
        description='Compare trainings, finished or running, with the published results.',
        epilog='example: python tools/analysis_tools/compare_runs.py '
        'work_dirs/mask-rcnn_scalablevit-s_fpn_1x_coco '
        'work_dirs/mask-rcnn_swin-t_fpn_1x_coco --out work_dirs/compared',
    )
    help_ = 'work directory of a training, or a folder of them, such as work_dirs'
    parser.add_argument('work_dirs', nargs='+', type=Path, metavar='WORK_DIR', help=help_)
    help_ = 'folder for runs.md, runs.json and the plot runs.png'
    parser.add_argument('--out', type=Path, metavar='DIR', help=help_)
    return parser.parse_args()


def main() -> None:
    """Print the table and, if asked to, write it and the plot."""
    args = parse_args()
    rows, runs = read_rows(find_work_dirs(args.work_dirs))
    models = read_published(CONFIGS)
    width = dict(width=Console().width) if Console().is_terminal else {}
    print(format_markdown(rows, models, **width).replace(r'\*', '*'))
    if args.out:
        write(rows, runs, format_markdown(rows, models), args.out)


if __name__ == '__main__':
    cli.run(main)
