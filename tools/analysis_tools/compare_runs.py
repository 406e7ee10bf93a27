# Copyright (c) mmscalablevit contributors. All rights reserved.
"""Hold trainings, finished or running, against the published results: a table and a plot.

A gap is marked with * where the run does not stand for its experiment: its config was altered, or
its backbone was not pretrained; the notes under the table say how. A difference from a baseline is
marked where the two runs differ in that, or are not both finished.
"""

import argparse
import json
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path

import matplotlib
from matplotlib import pyplot as plt
from matplotlib.ticker import MaxNLocator
from mmengine.config import Config
from rich.console import Console
from rich.progress import track
from rich.table import Table

from mmscalablevit import cli
from mmscalablevit import work_dirs as logs
from mmscalablevit.errors import UserError
from mmscalablevit.work_dirs import METRICS, Published, Run

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
HEADER = [
    'Experiment',
    'Metric',
    'Best',
    'Last',
    'Published',
    'Gap',
    *(f'- {name}' for name in BASELINES.values()),
    'Images/s',
    'GPU GB',
    'Hours',
    'State',
    'Notes',
]


@dataclass
class Row:
    """A metric of a run; all values are on the published scale.

    Args:
        experiment (str): The stem of the config.
        work_dir (str): Where the run is.
        metric (str): The metric's published name; empty if the run has no evaluation yet.
        unit (str): What steps count: 'epoch' or 'iteration'.
        best (float, optional): The best value.
        best_step (int, optional): Its step.
        last (float, optional): The last value.
        last_step (int, optional): Its step.
        published (float, optional): The published result.
        gap (float, optional): Best minus published.
        differences (dict[str, float]): Best minus that of each baseline.
        incomparable (list[str]): Baselines that ran under other conditions.
        images_per_second (float, optional): Median throughput in training.
        peak_memory_mb (float, optional): The most memory that a GPU took.
        hours (float, optional): Time in training iterations.
        state (str): See ``Run.state``.
        done (float): Steps that were trained.
        total (int): Steps that shall be trained.
        hours_left (float, optional): For the remaining iterations.
        altered (list[str]): What keeps the run from standing for its experiment.
        notes (list[str]): Other remarks.
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
    """Lay nested dicts, and lists of dicts, out as one dict with dotted keys.

    Args:
        value (object): Part of a config.
        key (str): Its place.

    Returns:
        dict[str, object]: Its leaves; a list of other things is one.

    Example:
        >>> flatten({'a': {'b': 1}, 'c': [{'d': (2, 3)}]})
        {'a.b': 1, 'c.0.d': [2, 3]}
    """
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
    """Find what differs between the config of a run and that of its experiment.

    Args:
        config (Config): What was run.
        reference (Config): What the repository has.
        keys (tuple[str, ...]): The entries to compare.

    Returns:
        list[str]: A text for each difference, such as 'train_cfg.max_epochs=1'.
    """
    altered = []
    for entry in keys:
        mine, theirs = (flatten(c.get(entry), entry) for c in (config, reference))
        for key in dict.fromkeys([*mine, *theirs]):
            if NEUTRAL.search(key) or mine.get(key) == theirs.get(key):
                continue
            if key == 'optim_wrapper.type' and mine.get(key) in MIXED_PRECISION:
                continue
            # A key that is set to None is as good as absent, and so compares equal above.
            text = f'{key}={mine[key]}' if mine.get(key) is not None else f'{key} removed'
            altered.append(text.replace(', ', ','))
    return altered


def alterations(run: Run, reference: Config) -> list[str]:
    """Find what keeps a run from standing for its experiment.

    Args:
        run (Run): The run.
        reference (Config): The experiment's config in the repository.

    Returns:
        list[str]: A text for each alteration, those of the training first.
    """
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
    """Find what differs between a test and the test of the experiment's config.

    Args:
        config (Config): The test's config, as ``tools/test.py`` set it up.
        reference (Config): The experiment's config in the repository.

    Returns:
        list[str]: A text for each difference.
    """
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
    """Whether a detector or segmentor starts from pretrained weights; classifiers need none.

    Args:
        config (Config): Its config.

    Returns:
        bool: Whether anything names pretrained weights.
    """
    if config.get('default_scope') == 'mmpretrain':
        return True
    model = config.get('model') or {}
    backbone = model.get('backbone') or {}
    init = backbone.get('init_cfg') or {}
    named = [config.get('load_from'), model.get('pretrained'), backbone.get('pretrained')]
    inits = init if isinstance(init, list) else [init]
    return any(named) or any(each.get('type') == 'Pretrained' for each in inits)


def find_reference(name: str, models: dict[str, Published]) -> Config | None:
    """Find the config of an experiment in the repository.

    Args:
        name (str): Its stem.
        models (dict[str, Published]): Those of the metafiles.

    Returns:
        Config | None: The config; None if there is none of this name.
    """
    paths = [models[name].config] if name in models else []
    paths += sorted(CONFIGS.glob(f'*/{name}.py'))
    for path in paths:
        if path.is_file():
            return Config.fromfile(path, import_custom_modules=False)
    return None


def make_rows(run: Run, models: dict[str, Published]) -> list[Row]:
    """Hold a run against the published results.

    Args:
        run (Run): The run.
        models (dict[str, Published]): Those of the metafiles.

    Returns:
        list[Row]: A row for each of its metrics, or one that says how far it is.
    """
    altered, notes = [], []
    published = models[run.name].metrics if run.name in models else {}
    reference = find_reference(run.name, models)
    if reference is None:
        notes.append('unknown experiment: no config of this name in configs/')
    else:
        altered = alterations(run, reference)
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
    common = dict(
        experiment=run.name,
        work_dir=str(run.work_dir),
        unit=run.unit,
        images_per_second=run.images_per_second,
        peak_memory_mb=run.peak_memory,
        hours=run.hours,
        state=run.state,
        done=run.done,
        total=run.total,
        hours_left=run.hours_left,
    )
    rows = []
    for metric in metrics:
        row = Row(**common, metric=metric, altered=altered, notes=notes)
        evaluations = run.evaluations(metric)
        row.published = published.get(metric)
        if evaluations:
            best = max(evaluations, key=lambda e: e.metrics[metric])
            row.best, row.best_step = best.metrics[metric], best.step
            row.last, row.last_step = evaluations[-1].metrics[metric], evaluations[-1].step
            if row.published is not None:
                row.gap = row.best - row.published
        rows.append(row)
    return rows or [Row(**common, altered=altered, notes=[*notes, 'no evaluation yet'])]


def compare_with_baselines(rows: list[Row]) -> None:
    """Set the differences between ScalableViT-S and the baselines that differ by the backbone.

    Where a baseline was trained several times, its best run counts.

    Args:
        rows (list[Row]): All rows.
    """
    for row in rows:
        if 'scalablevit-s' not in row.experiment or row.best is None:
            continue
        for part, name in BASELINES.items():
            twin = row.experiment.replace('scalablevit-s', part)
            others = [
                r
                for r in rows
                if (r.experiment, r.metric) == (twin, row.metric) and r.best is not None
            ]
            if not others:
                continue
            other = max(others, key=lambda r: r.best)
            row.differences[name] = row.best - other.best
            finished = row.state == other.state == 'finished'
            if not finished or set(row.altered) != set(other.altered):
                row.incomparable.append(name)


def read_rows(work_dirs: list[Path]) -> tuple[list[Row], list[Run]]:
    """Read all runs and hold them against the published results and each other.

    Args:
        work_dirs (list[Path]): Their work directories.

    Returns:
        tuple[list[Row], list[Run]]: The rows, ours before the baselines of the same experiment,
        and the runs. A work directory that cannot be read has a row that says why, and no run.
    """
    models = logs.read_published(CONFIGS)
    rows, runs = [], []
    console = Console(stderr=True)
    hidden = not console.is_terminal
    for work_dir in track(
        work_dirs, 'Reading logs', console=console, transient=True, disable=hidden
    ):
        try:
            run = logs.read_run(work_dir)
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
    if value is None:
        return '-'
    return f'{value:.1f}' if step is None else f'{value:.1f} ({unit} {step})'


def describe_state(row: Row) -> str:
    """Say how far a run is.

    Args:
        row (Row): One of its rows.

    Returns:
        str: Such as 'running, epoch 2.4 of 12, 5.2 h left'.
    """
    if row.state in ('tested only', 'unreadable'):
        return row.state
    # Rounded down, so that it is not said to be further than it is.
    done = f'{int(row.done * 10) / 10:g}'
    if row.state == 'finished':
        return f'finished, {row.unit} {done}'
    text = f'{row.state}, {row.unit} {done} of {row.total}'
    if row.hours_left is None:
        return text
    if row.hours_left < 1:
        return f'{text}, {row.hours_left * 60:.0f} min left'
    return f'{text}, {row.hours_left:.1f} h left'


def _note_texts(row: Row) -> list[str]:
    texts = list(row.notes)
    if row.altered:
        more = len(row.altered) - NUM_SHOWN
        shown = '; '.join(row.altered[:NUM_SHOWN])
        # Not settings, and so easily lost among many of them.
        others = [text for text in row.altered[NUM_SHOWN:] if ' ' in text and '=' not in text]
        shown = '; '.join([shown, *others])
        more -= len(others)
        texts.insert(0, f'altered: {shown}' + (f'; and {more} more settings' if more > 0 else ''))
    return texts


def format_cells(rows: list[Row]) -> tuple[list[str], list[list[str]], list[str]]:
    """Lay the rows out as text.

    Args:
        rows (list[Row]): The rows.

    Returns:
        tuple[list[str], list[list[str]], list[str]]: Header, cells of each row, and notes; the
        column of a baseline is left out where there is no difference to show.
    """
    notes, lines = [], []
    names = [name for name in BASELINES.values() if any(name in row.differences for row in rows)]
    several = {r.experiment for r in rows for o in rows if _same_experiment(r, o)}
    before = None
    for row in rows:
        texts = _note_texts(row)
        notes += [text for text in texts if text not in notes]
        label = row.experiment
        if row.experiment in several:
            label += f' [{row.work_dir}]'
        first = row.work_dir != before
        before = row.work_dir
        star = '*' if row.altered else ''
        gap = '-' if row.gap is None else f'{row.gap:+.1f}{star}'
        differences = [
            f'{row.differences[name]:+.1f}' + ('*' if name in row.incomparable else '')
            if name in row.differences
            else '-'
            for name in names
        ]
        memory = None if row.peak_memory_mb is None else row.peak_memory_mb / 1024
        common = [
            _number(row.images_per_second, '.1f' if (row.images_per_second or 0) >= 10 else '.2f'),
            _number(memory),
            _number(row.hours, '.1f' if (row.hours or 0) >= 1 else '.2g'),
            describe_state(row),
            ' '.join(str(notes.index(text) + 1) for text in texts),
        ]
        lines.append(
            [
                label if first else '',
                row.metric or '-',
                _at(row.best, row.best_step, row.unit),
                _at(row.last, row.last_step, row.unit),
                _number(row.published),
                gap,
                *differences,
                *(common if first else [''] * len(common)),
            ]
        )
    shown = [f'- {name}' for name in names]
    header = [text for text in HEADER if not text.startswith('- ') or text in shown]
    return header, lines, notes


def _same_experiment(row: Row, other: Row) -> bool:
    return row.experiment == other.experiment and row.work_dir != other.work_dir


def explain(rows: list[Row], models: dict[str, Published]) -> list[str]:
    """The sentences under the table: what its columns are, and where published results come from.

    Args:
        rows (list[Row]): The rows.
        models (dict[str, Published]): Those of the metafiles.

    Returns:
        list[str]: The sentences.
    """
    texts = ['Gap: best minus published. Hours: in training iterations, without evaluation.']
    marked = any(row.altered and row.gap is not None for row in rows)
    if marked or any(row.incomparable for row in rows):
        texts.append('* Not comparable: altered or not under the same conditions; see the notes.')
    named = {row.experiment for row in rows if row.published is not None}
    sources = dict.fromkeys(models[name].source for name in sorted(named) if models[name].source)
    return texts + [f'Source of published: {source}' for source in sources]


def print_table(rows: list[Row], models: dict[str, Published]) -> None:
    """Print the table to the terminal.

    Args:
        rows (list[Row]): The rows.
        models (dict[str, Published]): Those of the metafiles.
    """
    console = Console()
    if not console.is_terminal:
        console = Console(width=240)
    header, lines, notes = format_cells(rows)
    table = Table(*header, show_lines=False)
    for column, name in zip(table.columns, header, strict=True):
        column.justify = 'left' if name in ('Experiment', 'Metric', 'State', 'Notes') else 'right'
        column.overflow = 'fold'
    for index, line in enumerate(lines):
        last = index + 1 == len(lines) or bool(lines[index + 1][0])
        table.add_row(*(text.replace('[', r'\[') for text in line), end_section=last)
    console.print(table)
    for number, text in enumerate(notes, start=1):
        console.print(f'{number}. {text}', markup=False, highlight=False)
    for text in explain(rows, models):
        console.print(text, markup=False, highlight=False)


def format_markdown(rows: list[Row], models: dict[str, Published]) -> str:
    """Lay the table out as Markdown.

    Args:
        rows (list[Row]): The rows.
        models (dict[str, Published]): Those of the metafiles.

    Returns:
        str: The table, its notes and explanations.
    """
    header, lines, notes = format_cells(rows)
    # A star would begin emphasis.
    cells = [[text.replace('|', r'\|').replace('*', r'\*') for text in line] for line in lines]
    cells = [header, *cells]
    widths = [max(len(line[i]) for line in cells) for i in range(len(header))]
    cells.insert(1, ['-' * width for width in widths])
    text = ''.join(
        '| ' + ' | '.join(t.ljust(w) for t, w in zip(line, widths, strict=True)) + ' |\n'
        for line in cells
    )
    numbered = [f'{number}. {note}' for number, note in enumerate(notes, start=1)]
    paragraphs = [text.replace('*', r'\*') for text in explain(rows, models)]
    return '\n'.join([text, *numbered, *([''] if numbered else []), '\n\n'.join(paragraphs), ''])


def draw(rows: list[Row], runs: list[Run], path: Path) -> bool:
    """Plot each metric of every run, with the published result as a dashed line.

    Args:
        rows (list[Row]): The rows.
        runs (list[Run]): The runs.
        path (Path): The picture to write.

    Returns:
        bool: Whether there was anything to plot.
    """
    panels = dict.fromkeys((r.metric, r.unit) for r in rows if r.best is not None)
    if not panels:
        return False
    experiments = list(dict.fromkeys(run.name for run in runs))
    colors = plt.get_cmap('tab10' if len(experiments) <= 10 else 'tab20').colors
    color_of = {name: colors[i % len(colors)] for i, name in enumerate(experiments)}
    run_of = {str(run.work_dir): run for run in runs}
    columns = min(len(panels), 2)
    lines = -(-len(panels) // columns)
    shown = max(sum((r.metric, r.unit) == panel for r in rows) for panel in panels)
    figure, axes = plt.subplots(
        lines,
        columns,
        squeeze=False,
        layout='constrained',
        figsize=(7.5 * columns, (4.2 + 0.4 * shown) * lines),
    )
    for axis, (metric, unit) in zip(axes.flat, panels, strict=False):
        drawn = []
        for row in rows:
            if (row.metric, row.unit) != (metric, unit) or row.best is None:
                continue
            color = color_of[row.experiment]
            evaluations = run_of[row.work_dir].evaluations(metric)
            steps = [e.step if e.step is not None else row.total for e in evaluations]
            values = [e.metrics[metric] for e in evaluations]
            label = row.experiment + (' (altered)' if row.altered else '')
            if any(_same_experiment(row, other) for other in rows):
                label += f'\n{row.work_dir}'
            # Runs of one experiment share its color.
            marker = MARKERS[drawn.count(row.experiment) % len(MARKERS)]
            axis.plot(steps, values, f'{marker}-', color=color, markersize=5, label=label)
            drawn.append(row.experiment)
            if row.published is not None and drawn.count(row.experiment) == 1:
                published = f'published: {row.published:.1f}'
                axis.axhline(row.published, color=color, linestyle='--', label=published)
        axis.set(title=metric, xlabel=unit, ylabel=metric)
        axis.set_xlim(left=0)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.grid(alpha=0.3)
        axis.legend(fontsize='small', loc='upper center', bbox_to_anchor=(0.5, -0.12))
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return True


def write(rows: list[Row], runs: list[Run], models: dict[str, Published], folder: Path) -> None:
    """Write the table as Markdown and JSON, and the plot.

    Args:
        rows (list[Row]): The rows.
        runs (list[Run]): The runs.
        models (dict[str, Published]): Those of the metafiles.
        folder (Path): Where to write ``benchmark.md``, ``benchmark.json`` and ``benchmark.png``.

    Raises:
        UserError: If the folder cannot be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / 'benchmark.md').write_text(format_markdown(rows, models), encoding='utf-8')
        text = json.dumps(dict(rows=[asdict(row) for row in rows]), indent=2)
        (folder / 'benchmark.json').write_text(f'{text}\n', encoding='utf-8')
        drawn = draw(rows, runs, folder / 'benchmark.png')
    except OSError as error:
        raise UserError(f'--out {folder} cannot be written: {error.strerror}') from error
    pictures = 'and .png' if drawn else '(no evaluation to plot yet)'
    print(f'wrote {folder}/benchmark.md, .json {pictures}')


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description='Hold trainings, finished or running, against the published results.',
        epilog='example: python tools/analysis_tools/compare_runs.py '
        'work_dirs/mask-rcnn_scalablevit-s_fpn_1x_coco '
        'work_dirs/mask-rcnn_swin-t_fpn_1x_coco --out work_dirs/benchmark',
    )
    parser.add_argument(
        'work_dirs',
        nargs='+',
        type=Path,
        metavar='WORK_DIR',
        help='--work-dir of a training, or a folder of such, like work_dirs',
    )
    parser.add_argument(
        '--out',
        type=Path,
        metavar='DIR',
        help='folder for benchmark.md, benchmark.json and the plot benchmark.png',
    )
    return parser.parse_args()


def main() -> None:
    """Print the table and, if asked to, write it and the plot."""
    args = parse_args()
    models = logs.read_published(CONFIGS)
    rows, runs = read_rows(logs.find_work_dirs(args.work_dirs))
    print_table(rows, models)
    if args.out:
        write(rows, runs, models, args.out)


if __name__ == '__main__':
    cli.run(main)
