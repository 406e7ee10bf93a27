# Copyright (c) mmscalablevit contributors. All rights reserved.
"""Bytes, operations and lower bound of the time of a backbone on a GPU, without a GPU.

The forward and backward pass run on the meta device, which computes nothing. Each operator counts
as one kernel that reads its inputs and writes its outputs once, views for nothing; its bound is
what takes longer, the bytes at the GPU's bandwidth or the products at its bfloat16 rate. Types are
those of CUDA's autocast to bfloat16: products in bfloat16, norms and softmax in float32.
"""

import argparse
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import product
from math import prod
from pathlib import Path

import benchmark
import torch
import torch.nn.functional as F
from mmengine.logging import MMLogger
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry
from torch.utils.module_tracker import ModuleTracker

from mmscalablevit import cli

aten = torch.ops.aten
# TB/s and dense bfloat16 TFLOP/s with float32 sums, from NVIDIA's data sheets.
GPUS = {'h100': (3.35, 989.4), 'rtx-4090': (1.008, 165.2)}
# What CUDA's autocast computes in bfloat16, and in float32.
PRODUCTS = {F.linear, F.conv2d, F.scaled_dot_product_attention, torch.matmul, Tensor.matmul}
FLOAT32 = {F.layer_norm, F.softmax, Tensor.softmax}


@dataclass
class Call:
    """One operator's call: the module that made it, what it moves and computes."""

    module: str
    operator: str
    bytes: int
    flops: int

    def ms(self, rates: tuple[float, float]) -> float:
        """Lower bound in milliseconds."""
        return max(self.bytes / rates[0], self.flops / rates[1]) / 1e9


class Autocast(TorchFunctionMode):
    """CUDA's autocast to bfloat16 and its fused attention, for the meta device, which has none."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.multi_head_attention_forward:
            # Its products are inside and would stay in float32.
            raise cli.UserError('a model with nn.MultiheadAttention cannot be traced')
        if func in PRODUCTS or func in FLOAT32:
            dtype = torch.bfloat16 if func in PRODUCTS else torch.float32
            args, kwargs = tree_map_only(Tensor, lambda x: x.to(dtype), (args, kwargs))
        if func is F.scaled_dot_product_attention:
            dropout, scale = kwargs['dropout_p'], kwargs['scale']
            return aten._scaled_dot_product_flash_attention(*args, dropout, scale=scale)[0]
        return func(*args, **kwargs)


class Trace(TorchDispatchMode):
    """The calls of all operators that run inside."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self.tracker = ModuleTracker()
        # By the number that autograd gives to a forward operator and its backward node.
        self.modules: dict[int, str] = {}

    def __enter__(self):
        self.tracker.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.tracker.__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func is aten.convolution_backward.default and out[0] is not None:
            # As cuDNN does it; the meta kernel forgets the format.
            out = (torch.empty_like(args[1]), *out[1:])
        module = self._module()
        inputs, outputs = tree_leaves((args, kwargs)), tree_leaves(out)
        storages = {x.untyped_storage()._cdata for x in inputs if isinstance(x, Tensor)}
        is_view = all(x.untyped_storage()._cdata in storages for x in outputs if x is not None)
        # Nor does memory without values take a kernel.
        if (func._schema.is_mutable or not is_view) and 'empty' not in func.__name__:
            moved = sum(num_bytes(x) for x in inputs + outputs if isinstance(x, Tensor))
            flops = operations(func, args, kwargs, out)
            self.calls.append(Call(module, short(str(func)), moved, flops))
        return out

    def _module(self) -> str:
        node = torch._C._current_autograd_node()
        if node is not None:
            return self.modules.get(node._sequence_nr(), 'gradients')
        path = max(self.tracker.parents, key=lambda path: path.count('.'))
        module = '.'.join(part for part in path.split('.')[1:] if not part.isdigit()) or 'network'
        self.modules.setdefault(torch.autograd._get_sequence_nr() - 1, module)
        return module


def operations(func: OpOverload, args: tuple, kwargs: dict, out: object) -> int:
    """Operations of products and convolutions, a multiply-add as two."""
    if func is aten.convolution_backward.default:
        # PyTorch's own formula takes depthwise convolutions for full ones.
        forward = flop_registry[aten.convolution](*args[1:3], *[None] * 4, False, out_val=args[0])
        return forward * sum(args[-1][:2])
    formula = flop_registry.get(func.overloadpacket)
    return formula(*args, **kwargs, out_val=out) if formula else 0


def num_bytes(x: Tensor) -> int:
    """Bytes of a tensor, what is expanded counted once."""
    return x.element_size() * prod(n for n, s in zip(x.shape, x.stride(), strict=True) if s)


def short(operator: str) -> str:
    """Name of 'aten.add.Tensor' or 'aten::add' alone; all backends of fused attention are one."""
    name = operator.replace('::', '.').removeprefix('aten.').split('.')[0]
    if name.startswith('_scaled_dot_product'):
        return 'attention_backward' if name.endswith('_backward') else 'attention'
    return name


def trace(model: nn.Module, case: benchmark.Case) -> list[Call]:
    """Trace the forward and, when training, the backward pass of a backbone."""
    training = case.mode == 'train'
    # mmdet's Swin returns nothing from train().
    model.to('meta').train(training)
    images = torch.empty(case.batch, 3, case.height, case.width, device='meta')
    with Trace() as found, torch.set_grad_enabled(training):
        with Autocast():
            outs = model(images)
        if training:
            torch.autograd.backward(outs, [torch.empty_like(out) for out in outs])
    return found.calls


def measure(name: str, case: benchmark.Case, device: str) -> dict[str, float]:
    """Milliseconds of each operator, measured by the profiler on this machine."""
    once = benchmark.prepare(name, case, device)
    for _ in range(3):
        once()
    kinds = {ProfilerActivity.CPU, getattr(ProfilerActivity, device.upper())}
    with profile(activities=kinds) as found:
        once()
        benchmark.synchronize(device)
    took = defaultdict(float)
    for event in found.key_averages():
        time = event.device_time_total if device == 'cuda' else event.cpu_time_total
        took[short(event.key)] += time / 1e3
    # These call it.
    took['copy_'] -= took['clone'] + took['_to_copy']
    return took


def table(header: list[str], rows: Iterable[list]) -> str:
    """A table in Markdown with numbers of three digits."""
    rows = [[f'{x:.3g}' if isinstance(x, float) else str(x) for x in row] for row in rows]
    return cli.markdown_table(header, rows)


def summary(calls: list[Call], rates: tuple[float, float]) -> list[float]:
    """Number of calls, GB, GFLOP, and lower bound in milliseconds."""
    giga = [sum(call.bytes for call in calls) / 1e9, sum(call.flops for call in calls) / 1e9]
    return [len(calls), *giga, sum(call.ms(rates) for call in calls)]


def groups(calls: list[Call], key: str, rates: tuple, took: dict | None) -> list[list]:
    """Rows of modules or operators: those first that lose most.

    What is lost is the time beyond the bound where it was measured, else the bound's time beyond
    that of the products.
    """
    found = defaultdict(list)
    for call in calls:
        found[getattr(call, key)].append(call)
    rows = []
    for title, group in found.items():
        _, _, gflop, bound = row = summary(group, rates)
        lost = took[title] - bound if took else bound - gflop / rates[1]
        rows.append([title, *row, *([took[title]] if took else []), lost])
    return sorted(rows, key=lambda row: -row[-1])


def report(args: argparse.Namespace, case: benchmark.Case) -> Iterator[str]:
    """Tables of one case."""
    traces = {name: trace(benchmark.build(name), case) for name in args.models}
    rows = []
    for name, calls in traces.items():
        rows.append([name, *summary(calls, args.gpus[0][1])[:3]])
        for _, rates in args.gpus:
            bound, first = (summary(found, rates)[3] for found in (calls, traces[args.models[0]]))
            rows[-1] += [bound, bound / first]
    gpus = [part for gpu_, _ in args.gpus for part in (f'{gpu_}, ms', 'Ratio')]
    yield f'## {case}\n\n{table(["Model", "Kernels", "GB", "GFLOP", *gpus], rows)}'
    title, rates = args.gpus[0]
    for name, calls in traces.items():
        for key in ('operator', 'module'):
            timed = args.measure and key == 'operator'
            took = measure(name, case, args.measure) if timed else None
            header = [key.title(), 'Kernels', 'GB', 'GFLOP', f'Bound on {title}, ms']
            header += ['Measured, ms', 'Beyond bound, ms'] if took else ['Beyond products, ms']
            yield f'{name}:\n\n{table(header, groups(calls, key, rates, took)[: args.top])}'


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=cli.HelpFormatter,
        epilog='example: python tools/analysis_tools/roofline.py --models small swin-t '
        '--sizes 2x800x1344 --gpus h100 mine:0.9:71 --out roofline.md',
    )
    default = ['small', 'base', 'large', 'swin-t']
    parser.add_argument('--models', nargs='+', default=default, help=benchmark.MODELS_HELP)
    help_ = 'forward pass, or training step; default: train'
    modes = ['inference', 'train']
    parser.add_argument('--modes', nargs='+', choices=modes, default=modes[1:], help=help_)
    help_ = 'batch, height and width as BxHxW; default: 2x800x1344'
    sizes = [(2, 800, 1344)]
    parser.add_argument('--sizes', nargs='+', type=benchmark.size, default=sizes, help=help_)
    help_ = f'{", ".join(GPUS)} or NAME:TB/s:TFLOP/s; the tables of operators are for the first one'
    parser.add_argument('--gpus', nargs='+', type=gpu, default=list(GPUS.items()), help=help_)
    parser.add_argument('--top', type=int, default=10, help='rows of each table; default: 10')
    help_ = 'also time the operators on this device'
    parser.add_argument('--measure', choices=['cpu', 'cuda'], help=help_)
    parser.add_argument('--out', type=Path, help='file (.md) to write the tables to')
    return parser.parse_args()


def gpu(text: str) -> tuple[str, tuple[float, float]]:
    """Read a GPU's name, or its name, TB/s and TFLOP/s."""
    if text in GPUS:
        return text, GPUS[text]
    title, bandwidth, rate = text.split(':')
    return title, (float(bandwidth), float(rate))


def main() -> None:
    """Trace all models and report them."""
    args = parse_args()
    MMLogger.get_current_instance().setLevel('ERROR')
    if args.measure == 'cuda' and not torch.cuda.is_available():
        raise cli.UserError('--measure cuda: torch sees no CUDA device')
    parts = [f'Bounds, and what was measured, on {benchmark.machine()}.' if args.measure else '']
    for mode, (batch, height, width) in product(args.modes, args.sizes):
        for part in report(args, benchmark.Case(mode, 'bfloat16', height, width, batch)):
            print(f'{part}\n', flush=True)
            parts.append(part)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text('\n\n'.join(filter(None, parts)) + '\n')


if __name__ == '__main__':
    cli.run(main)
