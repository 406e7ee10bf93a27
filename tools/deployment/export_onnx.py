# Copyright (c) mmscalablevit contributors. All rights reserved.
"""Export a model to ONNX or ``torch.export``, with batch, height and width left open.

Both formats start from one program of ``torch.export``. Adaptive pooling is traced in another form
of the same result, since ONNX cannot take its bins from an open size. The written file is loaded
again and compared with PyTorch, which runs the usual form.
"""

import argparse
import contextlib
import importlib
import inspect
import json
import re
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import torch
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS, init_default_scope
from torch import Tensor, nn

from mmscalablevit import cli
from mmscalablevit.checkpoint.reading import load_weights
from mmscalablevit.errors import UserError, config_errors

# Maps of one row or column may be traced as a case of their own; from 64 pixels on there are none.
MIN_SIZE, MAX_SIZE = 64, 8192
EXAMPLE_SHAPE = (3, 3, 97, 131)
MIN_OPSET = 18
TOLERANCE = 1e-4
MIN_EQUAL_LABELS = 0.999
SUFFIXES = {'onnx': '.onnx', 'torch-export': '.pt2'}


class Wrapper(nn.Module):
    """A model whose inputs and outputs are plain tensors."""

    output_names: list[str]

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model


class Backbone(Wrapper):
    """The feature maps alone: images (B, 3, H, W) to ``stage0`` to ``stage3``."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model.backbone)
        self.output_names = [f'stage{i}' for i in self.model.out_indices]

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Compute the maps."""
        return tuple(self.model(images))


class Segmentor(Wrapper):
    """A segmentor on whole images (B, 3, H, W): logits (B, classes, H, W), labels (B, H, W)."""

    output_names = ['logits', 'labels']

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Compute logits and labels at the size of the images."""
        logits = self.model.encode_decode(images, [dict(img_shape=images.shape[2:])])
        if logits.shape[1] == 1:
            threshold = self.model.decode_head.threshold
            return logits, (logits.sigmoid() > threshold)[:, 0].long()
        return logits, logits.argmax(1)


class Detector(Wrapper):
    """A single-stage detector up to its head's maps, before decoding and NMS."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        levels = range(len(model.bbox_head.prior_generator.strides))
        self.output_names = [f'{kind}{i}' for kind in ('scores', 'boxes') for i in levels]

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Compute ``scores`` of every level, then ``boxes`` of every level."""
        scores, boxes = self.model(images, mode='tensor')
        return (*scores, *boxes)


class Classifier(Wrapper):
    """A classifier: images (B, 3, H, W) to logits (B, classes)."""

    output_names = ['logits']

    def forward(self, images: Tensor) -> tuple[Tensor]:
        """Compute the logits."""
        return (self.model(images, mode='tensor'),)


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        formatter_class=cli.HelpFormatter,
        description='Export a model, or its backbone alone, to ONNX or torch.export with open '
        'batch, height and width, and check the file against PyTorch at sizes it has not seen. '
        'Inputs are normalized float32 images; mean and std are in the file. Needs the extra onnx.',
        epilog='example: python tools/deployment/export_onnx.py '
        'configs/segmentation/scalablevit-s_upernet_8xb2-160k_ade20k-512x512.py '
        '--checkpoint upernet.pth --out upernet.onnx',
    )
    parser.add_argument('config', help='config of the model')
    parser.add_argument('--checkpoint', help='weights of the whole model; else its initial ones')
    parser.add_argument('--out', required=True, help='file to write, .onnx or .pt2')
    parser.add_argument(
        '--part',
        choices=['model', 'backbone'],
        default='model',
        help='the whole model, the default, or its backbone alone, of any detector',
    )
    parser.add_argument(
        '--format', choices=list(SUFFIXES), default='onnx', help='of the file, default onnx'
    )
    parser.add_argument(
        '--opset',
        type=int,
        default=MIN_OPSET,
        help=f'version of ONNX, default {MIN_OPSET}, the tested one',
    )
    parser.add_argument(
        '--check-sizes',
        nargs='+',
        default=['1x224x224', '2x185x331', '1x512x512'],
        metavar='BxHxW',
        help='batch, height and width to check and time at; default: %(default)s',
    )
    parser.add_argument('--repeat', type=int, default=5, help='timed runs of each, default 5')
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=cli.DictAction,
        metavar='KEY=VALUE',
        help='override settings of the config',
    )
    return parser.parse_args()


def main() -> None:
    """Export, check, print the comparison."""
    args = parse_args()
    sizes = [parse_size(text) for text in args.check_sizes]
    check_arguments(args)
    cfg = cli.read_config(args.config, args.cfg_options)
    # Else every parameter's initialization is logged.
    MMLogger.get_current_instance().setLevel('WARNING')
    model = build_model(cfg, args.checkpoint)
    wrapped = Backbone(model) if args.part == 'backbone' else wrap(model)
    metadata = describe(model, args)
    out = Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)

    print('Tracing (a minute or more for a large model) ...', flush=True)
    program = trace(wrapped)
    print(f'Writing {args.format} ...', flush=True)
    if args.format == 'onnx':
        save_onnx(program, wrapped.output_names, args.opset, metadata, out)
        run = onnx_runner(out)
    else:
        torch.export.save(program, out, extra_files={'metadata.json': json.dumps(metadata)})
        run = torch.export.load(out).module()
    print(f'wrote {out} ({out.stat().st_size / 2**20:.1f} MiB)')
    compare(wrapped, run, sizes, args)


def check_arguments(args: argparse.Namespace) -> None:
    """Raise where the arguments do not fit each other or what is installed."""
    if Path(args.out).suffix != SUFFIXES[args.format]:
        raise UserError(f'--out must end in {SUFFIXES[args.format]} for --format {args.format}')
    if args.repeat < 1:
        raise UserError('--repeat must be at least 1')
    if args.opset < MIN_OPSET:
        raise UserError(f'--opset must be at least {MIN_OPSET}, got {args.opset}')
    parameters = inspect.signature(torch.export.export).parameters
    if 'prefer_deferred_runtime_asserts_over_guards' not in parameters:
        raise UserError(f'export needs a later PyTorch than {torch.__version__}; 2.13 is tested')
    for name in ('onnx', 'onnxscript', 'onnxruntime') if args.format == 'onnx' else ():
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise UserError(f"{name} is missing: pip install 'mmscalablevit[onnx]'") from error


def parse_size(text: str) -> tuple[int, int, int]:
    """Read ``BxHxW``."""
    found = re.fullmatch(r'([1-9]\d*)x(\d+)x(\d+)', text)
    if not found:
        raise UserError(f'--check-sizes must be BxHxW such as 1x224x224, got {text}')
    batch, height, width = map(int, found.groups())
    if not MIN_SIZE <= min(height, width) <= max(height, width) <= MAX_SIZE:
        allowed = f'{MIN_SIZE} to {MAX_SIZE} pixels'
        raise UserError(f'--check-sizes: height and width must be {allowed}, got {text}')
    return batch, height, width


def build_model(cfg: Config, checkpoint: str | None) -> nn.Module:
    """Build a config's model in eval mode, with the weights of a checkpoint or its initial ones."""
    init_default_scope(cfg.get('default_scope', 'mmengine'))
    if cfg.get('data_preprocessor'):
        cfg.model.setdefault('data_preprocessor', cfg.data_preprocessor)
    if checkpoint is None and cfg.model.get('backbone'):
        cfg.model.backbone.init_cfg = None
    with config_errors(cfg):
        model = revert_sync_batchnorm(MODELS.build(cfg.model))
    if checkpoint is None:
        model.init_weights()
    else:
        load_weights(model, checkpoint, cfg.filename)
    return model.eval()


def wrap(model: nn.Module) -> nn.Module:
    """Give a model plain tensors in and out, or say which of its operators ONNX lacks."""
    name = type(model).__name__
    ops = {type(m).__name__ for m in model.modules() if type(m).__module__.startswith('mmcv.ops')}
    if ops:
        raise UserError(
            f'{name} cannot be exported: it needs {", ".join(sorted(ops))} of mmcv, compiled and '
            'without a counterpart in ONNX (mmdeploy brings its own); '
            '--part backbone exports its backbone'
        )
    bases = {base.__name__ for base in type(model).__mro__}
    kinds = dict(EncoderDecoder=Segmentor, SingleStageDetector=Detector, ImageClassifier=Classifier)
    for base, kind in kinds.items():
        if base in bases:
            return kind(model).eval()
    raise UserError(
        f'{name} cannot be exported: only {", ".join(kinds)} can; '
        '--part backbone exports its backbone'
    )


def describe(model: nn.Module, args: argparse.Namespace) -> dict[str, str]:
    """What a user of the file must know, as text for its metadata."""
    preprocessor = model.data_preprocessor
    rgb = any(
        getattr(preprocessor, key, False)
        for key in ('channel_conversion', '_channel_conversion', 'to_rgb')
    )
    metadata = dict(
        config=Path(args.config).name,
        part=args.part,
        weights=Path(args.checkpoint).name if args.checkpoint else 'initial, untrained',
        input=f'float32, (B, 3, H, W), H and W of {MIN_SIZE} to {MAX_SIZE}, '
        '(value of 0 to 255 - mean) / std',
        channels='RGB' if rgb else 'BGR',
    )
    if hasattr(preprocessor, 'mean'):
        for key in ('mean', 'std'):
            metadata[key] = json.dumps(
                [round(x, 4) for x in getattr(preprocessor, key).flatten().tolist()]
            )
    return metadata


def trace(model: nn.Module) -> torch.export.ExportedProgram:
    """Trace a model in eval mode of images (B, 3, H, W) with ``torch.export``, all sizes open."""
    dim = torch.export.Dim
    side = dict(min=MIN_SIZE, max=MAX_SIZE)
    sizes = {0: dim('batch', min=1), 2: dim('height', **side), 3: dim('width', **side)}
    with exportable(), torch.no_grad():
        program = torch.export.export(
            model,
            (torch.zeros(EXAMPLE_SHAPE),),
            dynamic_shapes=(sizes,),
            strict=False,
            prefer_deferred_runtime_asserts_over_guards=True,
        )
    # PyTorch chooses kernels by size while it is traced, and would make each choice a condition of
    # the program (1280 < number of pixels). They give the same result; the range of sizes stays.
    graph = program.graph_module.graph
    for node in list(graph.nodes):
        if node.target is torch.ops.aten._assert_scalar.default:
            graph.erase_node(node)
    graph.eliminate_dead_code()
    program.graph_module.recompile()
    return program


@contextlib.contextmanager
def exportable() -> Iterator[None]:
    """Run adaptive pooling in a form for any size, and leave sizes of one open."""
    import torch.fx.experimental._config as config

    with (
        mock.patch.object(nn.AdaptiveAvgPool2d, 'forward', pool_any_map),
        # Else a batch or map of one is taken for a case of its own.
        config.patch(backed_size_oblivious=True),
    ):
        yield


def pool_any_map(self: nn.AdaptiveAvgPool2d, x: Tensor) -> Tensor:
    """``AdaptiveAvgPool2d.forward`` as two matrix products."""
    sizes = self.output_size
    rows, columns = sizes if isinstance(sizes, tuple) else (sizes, sizes)
    return bins(x.shape[2], rows, x) @ x @ bins(x.shape[3], columns, x).T


def bins(size: int, number: int, like: Tensor) -> Tensor:
    """Weights (number, size) that average ``size`` values into ``number`` bins, as torch does."""
    position = torch.arange(size, device=like.device)
    index = torch.arange(number, device=like.device)[:, None]
    start = index * size // number
    end = ((index + 1) * size + number - 1) // number
    inside = ((position >= start) & (position < end)).to(like.dtype)
    return inside / (end - start)


def save_onnx(
    program: torch.export.ExportedProgram,
    output_names: list[str],
    opset: int,
    metadata: dict[str, str],
    out: Path,
) -> None:
    """Write a traced program as one ONNX file, weights and ``metadata_props`` included."""
    onnx_program = torch.onnx.export(
        program,
        dynamo=True,
        opset_version=opset,
        input_names=['images'],
        output_names=output_names,
        verbose=False,
    )
    onnx_program.model.metadata_props.update(metadata)
    onnx_program.save(out, external_data=False)


def onnx_runner(path: Path) -> Callable[[Tensor], list[Tensor]]:
    """Load a file into onnxruntime on CPU, with as many threads as PyTorch uses."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=['CPUExecutionProvider'])

    def run(images: Tensor) -> list[Tensor]:
        return [torch.from_numpy(x) for x in session.run(None, {'images': images.numpy()})]

    return run


@torch.no_grad()
def compare(
    model: nn.Module,
    run: Callable[[Tensor], list[Tensor]],
    sizes: list[tuple[int, int, int]],
    args: argparse.Namespace,
) -> None:
    """Print difference and time of model and exported model at each batch, height and width.

    Fails where outputs differ by more than ``TOLERANCE``, relative to the larger of 1 and their
    largest value, or labels at more than 0.1% of the pixels.
    """
    exported = 'onnxruntime' if args.format == 'onnx' else 'exported'
    print(f'{torch.get_num_threads()} CPU thread(s), median of {args.repeat} runs in turns')
    header = ('B x H x W', 'largest difference', 'PyTorch (s)', f'{exported} (s)', 'ratio')
    rows = []
    torch.manual_seed(0)
    for batch, height, width in sizes:
        images = torch.randn(batch, 3, height, width)
        difference = largest_difference(model(images), run(images))
        times = [[], []]
        for _ in range(args.repeat):
            for function, seconds in zip((model, run), times, strict=True):
                start = time.perf_counter()
                function(images)
                seconds.append(time.perf_counter() - start)
        eager, other = map(statistics.median, times)
        sides = f'{batch} x {height} x {width}'
        seconds = f'{eager:.3f}', f'{other:.3f}', f'{eager / other:.2f}'
        rows.append((sides, f'{difference:.1e}', *seconds))
    print(cli.markdown_table(header, rows))


def largest_difference(wanted: tuple[Tensor, ...], got: list[Tensor]) -> float:
    """Largest difference of two sets of outputs, of labels aside; raises where it is too large."""
    largest = 0.0
    for i, (a, b) in enumerate(zip(wanted, got, strict=True)):
        if a.shape != b.shape:
            raise UserError(f'output {i} has shape {tuple(b.shape)}, PyTorch {tuple(a.shape)}')
        if not a.is_floating_point():
            equal = (a == b).float().mean().item()
            if equal < MIN_EQUAL_LABELS:
                raise UserError(f'labels agree with PyTorch at {equal:.2%} of the pixels only')
            continue
        difference = (a - b).abs().max().item()
        allowed = TOLERANCE * max(1.0, a.abs().max().item())
        # Not `>`: a difference of NaN must fail.
        if not difference <= allowed:
            raise UserError(f'output {i} differs from PyTorch by {difference:.1e}')
        largest = max(largest, difference)
    return largest


if __name__ == '__main__':
    cli.run(main)
