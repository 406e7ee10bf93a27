# Copyright (c) mmscalablevit contributors. All rights reserved.
"""Time and memory of ScalableViT side by side with its plain formulas and with other backbones.

All models of a case run in turn, round after round (A B C, A B C, ...), so that what slows the
machine down meets all of them. Reported are medians, and medians of the ratios within a round.
"""

import argparse
import gc
import json
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import product
from multiprocessing import get_context
from pathlib import Path

import torch
from benchmark_models import MODELS_HELP, OURS, Plain, build
from mmengine.logging import MMLogger
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mmscalablevit import __version__, cli

DTYPES = dict(float32=torch.float32, bfloat16=torch.bfloat16, float16=torch.float16)
MATMUL_SIZE = {'cpu': 2048, 'cuda': 8192}
MATMUL = 'matrix product'
ATTENTIONS = ('flash', 'efficient', 'cudnn')
# Of each round. A GPU's clock and a compiler need some passes before, and one pass is too short.
CALLS = {'cpu': 1, 'cuda': 10}


@dataclass(frozen=True)
class Case:
    """What every model is measured at; ``dtype`` is 'float32', or the type of autocast."""

    mode: str
    dtype: str
    height: int
    width: int
    batch: int

    def __str__(self) -> str:
        return f'{self.mode} {self.dtype} {self.batch}x{self.height}x{self.width}'


@dataclass
class Result:
    """What one model took in one case: seconds of each round, 1e9 operations, peak memory in MB.

    A multiply-add is two operations. Memory is resident on CPU, in a process of its own, and what
    PyTorch allocated on CUDA. ``backbone`` is its share in the time of a whole model. ``new_size``
    is the seconds of a first pass of one image of another size, for which kernels may be planned
    anew.
    """

    model: str
    case: Case
    seconds: list[float] = field(default_factory=list)
    gflops: float | None = None
    memory: float | None = None
    backbone: float | None = None
    new_size: float | None = None

    @property
    def median(self) -> float:
        """Median of the rounds in seconds."""
        return statistics.median(self.seconds)


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=cli.HelpFormatter,
        epilog='example: python tools/analysis_tools/benchmark.py --models small plain swin-t '
        'small:compiled --dtypes float32 --sizes 1x800x1280 --out work_dirs/benchmark',
    )
    default = ['small', 'plain', 'swin-t', 'twins-svt-s', 'pvtv2-b2', 'resnet-50']
    parser.add_argument('--models', nargs='+', default=default, metavar='MODEL', help=MODELS_HELP)
    help_ = 'forward pass, or training step with backward pass and optimizer; default: both'
    modes = ['inference', 'train']
    parser.add_argument('--modes', nargs='+', choices=modes, default=modes, help=help_)
    help_ = 'default: float32; the others by autocast'
    parser.add_argument('--dtypes', nargs='+', choices=DTYPES, default=['float32'], help=help_)
    sizes = ['32x224x224', '2x512x512', '1x800x1280', '2x800x1344']
    options = dict(nargs='+', type=size, metavar='BxHxW', default=[size(text) for text in sizes])
    parser.add_argument('--sizes', **options, help=f'default: {" ".join(sizes)}')
    help_ = 'measured passes of each model; default: 5'
    parser.add_argument('--rounds', type=int, default=5, help=help_)
    help_ = 'where to measure; default: cpu'
    parser.add_argument('--device', choices=['cpu', 'cuda'], default='cpu', help=help_)
    parser.add_argument('--no-memory', action='store_true', help='do not measure memory')
    parser.add_argument('--out', type=Path, help='folder for benchmark.json and benchmark.md')
    return parser.parse_args()


def size(text: str) -> tuple[int, int, int]:
    """Read BxHxW."""
    batch, height, width = (int(number) for number in text.split('x'))
    if min(batch, height, width) < 1:
        raise ValueError
    return batch, height, width


def prepare(name: str, case: Case, device: str) -> Callable[[], None]:
    """Build a model and return what runs it once in a case."""
    torch.backends.cuda.enable_cudnn_sdp(False)  # As in trainings.
    model = build(name).to(device)
    model.train(case.mode == 'train')
    images = torch.rand(case.batch, 3, case.height, case.width).to(device)
    run = torch.compile(model) if ':compiled' in name else model
    low_precision = case.dtype != 'float32'
    found = [kind for kind in ATTENTIONS if kind in name.split(':')]
    backends = [getattr(SDPBackend, f'{kind.upper()}_ATTENTION') for kind in found]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6) if case.mode == 'train' else None

    def once(images: Tensor = images) -> None:
        with (
            torch.set_grad_enabled(optimizer is not None),
            torch.autocast(device, DTYPES[case.dtype], enabled=low_precision),
            sdpa_kernel(backends) if backends else nullcontext(),
        ):
            outs = run(images)
        if optimizer is None:
            return
        loss = outs if isinstance(outs, Tensor) else sum(out.float().mean() for out in outs)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    once.model = model
    return once


def measure(case: Case, args: argparse.Namespace) -> list[Result]:
    """Measure all models in one case, in turn, and a matrix product."""
    results = {name: Result(name, case, gflops=count_gflops(name, case)) for name in args.models}
    # Once for all: a reset would throw away what models before were compiled to.
    torch._dynamo.reset()
    runs = {}
    for number, name in enumerate(args.models, start=1):
        try:
            runs[name] = prepare(name, case, args.device)
            for _ in range(CALLS[args.device]):
                runs[name]()
            # Of its own for each, as a process keeps its plans; a batch of it might exceed the
            # memory. A compiler would compile again.
            if ':compiled' not in name:
                image = torch.rand(1, 3, case.height + 32 * number, case.width).to(args.device)
                first = partial(runs[name], image)
                results[name].new_size = seconds(first, args.device, calls=1)
        except torch.cuda.OutOfMemoryError:
            print(f'{case}: {name} needs more memory than the GPU has')
            del runs[name], results[name]
    names = list(runs)
    results[MATMUL] = Result(MATMUL, case, gflops=2 * MATMUL_SIZE[args.device] ** 3 / 1e9)
    runs[MATMUL] = matrix_product(case, args.device)
    runs[MATMUL]()
    for _ in range(args.rounds):
        for name, run in runs.items():
            results[name].seconds.append(seconds(run, args.device))
    for name in names:
        if name.split(':')[0].endswith('.py') and case.mode == 'inference':
            results[name].backbone = backbone_share(runs[name], args.device)
    runs.clear()
    if not args.no_memory:
        for name in names:
            results[name].memory = peak_memory(name, case, args.device)
    return list(results.values())


def seconds(run: Callable[[], None], device: str, calls: int | None = None) -> float:
    """Seconds of one call, on a GPU the mean of some."""
    calls = calls or CALLS[device]
    synchronize(device)
    start = time.perf_counter()
    for _ in range(calls):
        run()
    synchronize(device)
    return (time.perf_counter() - start) / calls


def synchronize(device: str) -> None:
    """Wait for a GPU."""
    if device == 'cuda':
        torch.cuda.synchronize()


def matrix_product(case: Case, device: str) -> Callable[[], None]:
    """A large matrix product in the case's type: the rate that the machine can reach."""
    shape = 2, MATMUL_SIZE[device], MATMUL_SIZE[device]
    a, b = torch.rand(shape, device=device, dtype=DTYPES[case.dtype])
    return lambda: torch.mm(a, b)


def count_gflops(name: str, case: Case) -> float | None:
    """Operations that a backbone needs for a case, in units of 1e9.

    Ours are counted on the plain formulas, without the zeros that pad one width to another. A
    backward pass counts as two forward passes.
    """
    base = name.split(':')[0]
    if base.endswith('.py'):
        return None
    model = Plain('small') if base == 'plain' else Plain(base) if base in OURS else build(base)
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        model.to('meta').eval()
        model(torch.empty(1, 3, case.height, case.width, device='meta'))
    passes = 3 if case.mode == 'train' else 1
    return counter.get_total_flops() * case.batch * passes / 1e9


def backbone_share(run: Callable[[], None], device: str) -> float:
    """Share of the backbone in the time of a whole model."""
    times = []

    def stamp(*_) -> None:
        synchronize(device)
        times.append(time.perf_counter())

    backbone = run.model.model.backbone
    handles = [backbone.register_forward_pre_hook(stamp), backbone.register_forward_hook(stamp)]
    total = seconds(run, device)
    for handle in handles:
        handle.remove()
    return (times[1] - times[0]) / total


def peak_memory(name: str, case: Case, device: str) -> float | None:
    """Peak memory in MB; on CPU (Linux) the resident one of a process with this model alone."""
    if device == 'cuda':
        gc.collect()
        others = torch.cuda.memory_allocated()
        run = prepare(name, case, device)
        run()
        torch.cuda.reset_peak_memory_stats()
        run()
        return (torch.cuda.max_memory_allocated() - others) / 2**20
    if platform.system() != 'Linux':
        return None
    try:
        with ProcessPoolExecutor(1, get_context('spawn')) as pool:
            return pool.submit(resident_memory, name, case).result()
    except Exception as error:
        raise RuntimeError(f'measuring the memory of {name} failed') from error


def resident_memory(name: str, case: Case) -> float:
    """Run a model twice in this process and return its peak resident memory in MB."""
    MMLogger.get_current_instance().setLevel('ERROR')
    run = prepare(name, case, 'cpu')
    run()
    run()
    # Not the maximum of getrusage, which a process inherits from the one that started it.
    return int(re.search(r'VmHWM:\s+(\d+) kB', Path('/proc/self/status').read_text())[1]) / 2**10


def rows(results: list[Result]) -> Iterator[list[str]]:
    """Rows of the table of one case; the first model is what the others are compared with."""
    reference, rate = results[0], results[-1].gflops / results[-1].median
    for result in results:
        ratios = [a / b for a, b in zip(result.seconds, reference.seconds, strict=True)]
        mid, low, high = statistics.median(ratios), min(ratios), max(ratios)
        gflops = result.gflops / result.median if result.gflops else None
        is_matmul = result.model == MATMUL
        yield [
            Path(result.model).name,
            f'{result.median:.3f}',
            '' if is_matmul else f'{result.case.batch / result.median:.4g}',
            '' if is_matmul else f'{mid:.2f} ({low:.2f} to {high:.2f})',
            f'{result.memory:.0f}' if result.memory else '',
            f'{result.memory / reference.memory:.2f}' if result.memory else '',
            f'{gflops:.0f}' if gflops else '',
            f'{gflops / rate:.0%}' if gflops else '',
            f'{result.new_size:.3f}' if result.new_size else '',
            f'{result.backbone:.0%}' if result.backbone else '',
        ]


HEADER = ['Model', 'Seconds', 'Images/s', 'Time ratio', 'Peak MB', 'Ratio', 'GFLOP/s', 'Of matmul']
HEADER += ['New size', 'Backbone']


def markdown(cases: list[list[Result]]) -> str:
    """All tables in Markdown."""
    tables = [
        f'### {results[0].case}\n\n{cli.markdown_table(HEADER, rows(results))}' for results in cases
    ]
    note = (
        f'Time ratio: to {Path(cases[0][0].model).name}, median within a round (lowest to '
        'highest). GFLOP/s: needed operations, a multiply-add as two, zeros of padding not counted.'
    )
    return '\n\n'.join([machine(), *tables, note]) + '\n'


def machine() -> str:
    """One line on the machine and the software."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else cpu_name()
    software = f'torch {torch.__version__}, mmscalablevit {__version__}'
    return f'{name}, {torch.get_num_threads()} threads, {software}'


def cpu_name() -> str:
    """Name of the processor."""
    path = Path('/proc/cpuinfo')
    found = re.search(r'model name\s*: (.*)', path.read_text()) if path.exists() else None
    return found[1] if found else platform.processor()


def save(cases: list[list[Result]], out: Path) -> None:
    """Write benchmark.json and benchmark.md."""
    out.mkdir(parents=True, exist_ok=True)
    content = dict(
        machine=machine(),
        command=' '.join(sys.argv),
        results=[asdict(result) for results in cases for result in results],
    )
    (out / 'benchmark.json').write_text(json.dumps(content, indent=1))
    (out / 'benchmark.md').write_text(markdown(cases))


def main() -> None:
    """Measure all cases and report them."""
    args = parse_args()
    # mmengine tells how each parameter was initialized, and that nothing is pretrained.
    MMLogger.get_current_instance().setLevel('ERROR')
    if args.device == 'cuda' and not torch.cuda.is_available():
        raise cli.UserError('--device cuda: torch sees no CUDA device')
    if args.rounds < 1:
        raise cli.UserError(f'--rounds must be at least 1, got {args.rounds}')
    for name in args.models:
        build(name)
    cases = []
    print(machine())
    for mode, dtype, (batch, height, width) in product(args.modes, args.dtypes, args.sizes):
        case = Case(mode, dtype, height, width, batch)
        cases.append(measure(case, args))
        print(f'\n{case}\n\n{cli.markdown_table(HEADER, rows(cases[-1]))}', flush=True)
        if args.out:
            save(cases, args.out)
    if args.out:
        print(f'Wrote {args.out}/benchmark.json and benchmark.md')


if __name__ == '__main__':
    cli.run(main)
