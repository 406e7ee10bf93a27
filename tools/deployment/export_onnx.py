# Copyright (c) mmscalablevit contributors. All rights reserved.
"""Export a model to ONNX or ``torch.export``, with height and width left open.

Detectors become ONNX whole, with NMS, for one image, as does Mask2Former; other models serve any
batch. Both formats start from one program of ``torch.export``. Adaptive pooling and, for ONNX,
attention are traced in another form of the same result: ONNX cannot take bins from an open size,
and its products need no values as wide as the keys. The written file is loaded again and compared
with PyTorch, which runs the usual form.
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
from mmengine.registry import DATASETS, MODELS, init_default_scope
from onnx_wrappers import Backbone, Classifier, DetectorMaps, Normalized, Segmentor
from torch import Tensor, nn
from torch.export import ExportedProgram

from mmscalablevit import cli
from mmscalablevit.checkpoint.reading import load_weights
from mmscalablevit.errors import UserError, config_errors
from mmscalablevit.models import attention

# Maps of one row or column may be traced as a case of their own; from 64 pixels on there are none.
MIN_SIZE, MAX_SIZE = 64, 8192
CHECK_SIZES = ['1x224x224', '2x185x331', '1x512x512']
MIN_OPSET = 18
TOLERANCE = 1e-4
MIN_EQUAL_LABELS = 0.999
SUFFIXES = {'onnx': '.onnx', 'torch-export': '.pt2'}
# Batch, height, width.
Size = tuple[int, int, int]
Run = Callable[[Tensor], list[Tensor]]


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        formatter_class=cli.HelpFormatter,
        description='Export a model, or its backbone alone, to ONNX or torch.export with open '
        'height and width, and check the file against PyTorch at sizes it has not seen. '
        'Inputs are normalized float32 images; mean and std are in the file. Needs the extra onnx.',
        epilog='example: python tools/deployment/export_onnx.py '
        'configs/segmentation/scalablevit-s_upernet_8xb2-160k_ade20k-512x512.py '
        '--checkpoint upernet.pth --out upernet.onnx',
    )
    parser.add_argument('config', help='config of the model')
    parser.add_argument('--checkpoint', help='weights of the whole model; else its initial ones')
    parser.add_argument('--out', required=True, help='file to write, .onnx or .pt2')
    help_ = 'the whole model, the default, its backbone, or maps of one stage before boxes'
    parts = ['model', 'backbone', 'maps']
    parser.add_argument('--part', choices=parts, default=parts[0], help=help_)
    help_ = 'of the file, default onnx'
    parser.add_argument('--format', choices=SUFFIXES, default='onnx', help=help_)
    help_ = f'of ONNX, default {MIN_OPSET}, the tested one'
    parser.add_argument('--opset', type=int, default=MIN_OPSET, help=help_)
    help_ = 'the one batch, height and width to serve; default: any'
    parser.add_argument('--static', metavar='BxHxW', help=help_)
    help_ = 'in the file, which then takes pixels of 0 to 255'
    parser.add_argument('--normalize', action='store_true', help=help_)
    help_ = f'to check and time at; default: {" ".join(CHECK_SIZES)}, or that of --static'
    parser.add_argument('--check-sizes', nargs='+', metavar='BxHxW', help=help_)
    parser.add_argument('--repeat', type=int, default=5, help='timed runs of each, default 5')
    cli.add_config_options(parser)
    return parser.parse_args()


def main() -> None:
    """Export, check, print the comparison."""
    args = parse_args()
    static = parse_size(args.static, '--static') if args.static else None
    sizes = args.check_sizes or ([args.static] if static else CHECK_SIZES)
    sizes = [parse_size(text, '--check-sizes') for text in sizes]
    if static and sizes != [static]:
        raise UserError(f'--check-sizes must be that of --static, {args.static}')
    check_arguments(args)
    cfg = cli.read_config(args.config, args.cfg_options)
    # Else every parameter's initialization is logged.
    MMLogger.get_current_instance().setLevel('WARNING')
    model = build_model(cfg, args.checkpoint)
    wrapped = wrap(model, args.part, args.format)
    if wrapped.one_image:
        if args.check_sizes is None and static is None:
            sizes = [(1, *size[1:]) for size in sizes]
        if any(size[0] > 1 for size in sizes):
            raise UserError(f'{type(model).__name__} takes one image here: sizes must be 1xHxW')
    if args.normalize:
        if not hasattr(model.data_preprocessor, 'mean'):
            raise UserError(f'--normalize: {args.config} has no mean and std in data_preprocessor')
        wrapped = Normalized(wrapped, model.data_preprocessor).eval()
    metadata = describe(model, wrapped, cfg, args)
    out = Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)

    print('Tracing (a minute or more for a large model) ...', flush=True)
    program = trace(wrapped, static, args.format)
    print(f'Writing {args.format} ...', flush=True)
    if args.format == 'onnx':
        save_onnx(program, wrapped, args.opset, metadata, out)
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
            raise UserError(f'{name} is missing: pip install -e ".[onnx]" in a clone') from error


def parse_size(text: str, option: str) -> Size:
    """Read ``BxHxW``."""
    found = re.fullmatch(r'([1-9]\d*)x(\d+)x(\d+)', text)
    if not found:
        raise UserError(f'{option} must be BxHxW such as 1x224x224, got {text}')
    batch, height, width = map(int, found.groups())
    if not MIN_SIZE <= min(height, width) <= max(height, width) <= MAX_SIZE:
        allowed = f'{MIN_SIZE} to {MAX_SIZE} pixels'
        raise UserError(f'{option}: height and width must be {allowed}, got {text}')
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


def wrap(model: nn.Module, part: str, file_format: str) -> nn.Module:
    """Give a part of a model plain tensors in and out, or say why it has none."""
    if part == 'backbone':
        return Backbone(model)
    name = type(model).__name__
    bases = {base.__name__ for base in type(model).__mro__}
    if part == 'model' and bases & {'RetinaNet', 'MaskRCNN', 'CascadeRCNN', 'DINO'}:
        # mmdet is needed for these alone.
        from onnx_detectors import WholeDetector, WholeDino

        if file_format != 'onnx':
            takes = 'torch-export takes --part backbone or maps'
            raise UserError(f'boxes are for --format onnx; {takes}')
        return (WholeDino if 'DINO' in bases else WholeDetector)(model).eval()
    if part == 'model' and type(getattr(model, 'decode_head', None)).__name__ == 'Mask2FormerHead':
        from onnx_mask2former import WholeMask2Former

        return WholeMask2Former(model).eval()
    whole = dict(EncoderDecoder=Segmentor, ImageClassifier=Classifier)
    kinds = whole if part == 'model' else dict(SingleStageDetector=DetectorMaps)
    ops = {type(m).__name__ for m in model.modules() if type(m).__module__.startswith('mmcv.ops')}
    for base, kind in kinds.items():
        if base in bases and not ops:
            return kind(model).eval()
    needs = f' (it needs {", ".join(sorted(ops))} of mmcv)' if ops else ''
    remedy = '--part backbone exports its backbone'
    raise UserError(f'--part {part} of {name} cannot be exported{needs}; {remedy}')


def describe(
    model: nn.Module, wrapped: nn.Module, cfg: Config, args: argparse.Namespace
) -> dict[str, str]:
    """What a user of the file must know, as text for its metadata."""
    preprocessor = model.data_preprocessor
    conversions = 'channel_conversion', '_channel_conversion', 'to_rgb'
    rgb = any(getattr(preprocessor, key, False) for key in conversions)
    metadata = dict(
        config=Path(args.config).name,
        part=args.part,
        weights=Path(args.checkpoint).name if args.checkpoint else 'initial, untrained',
        input=f'float32, ({1 if wrapped.one_image else "B"}, 3, H, W), '
        + (f'of {args.static}, ' if args.static else f'H and W of {MIN_SIZE} to {MAX_SIZE}, ')
        + ('value of 0 to 255' if args.normalize else '(value of 0 to 255 - mean) / std'),
        channels='RGB' if rgb else 'BGR',
    )
    # Those that are left to do outside of the file.
    for key, neutral in dict(mean=0.0, std=1.0).items() if hasattr(preprocessor, 'mean') else ():
        values = [round(x, 4) for x in getattr(preprocessor, key).flatten().tolist()]
        metadata[key] = json.dumps([neutral] * len(values) if args.normalize else values)
    for step in cfg.get('test_pipeline', []):
        if step.type == 'Resize' and 'scale' in step:
            metadata['scale'] = json.dumps(step.scale)
    if cfg.get('test_dataloader'):
        with config_errors(cfg):
            dataset = DATASETS.build(dict(cfg.test_dataloader.dataset, lazy_init=True))
        metadata['classes'] = json.dumps(dataset.metainfo.get('classes'))
    return metadata


def trace(
    model: nn.Module, static: Size | None = None, file_format: str = 'torch-export'
) -> ExportedProgram:
    """Trace a model in eval mode of images (B, 3, H, W) with ``torch.export``.

    All sizes are open but the batch of a model of one image, or none are with a ``static`` one.
    """
    dim = torch.export.Dim
    side = dict(min=MIN_SIZE, max=MAX_SIZE)
    sizes = {2: dim('height', **side), 3: dim('width', **side)}
    batch, sides = (1 if model.one_image else 3), model.example_sides
    if not model.one_image:
        sizes[0] = dim('batch', min=1)
    if static is not None:
        (batch, *sides), sizes = static, None
    with exportable(file_format), torch.no_grad():
        program = torch.export.export(
            model,
            (torch.zeros(batch, 3, *sides),),
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
def exportable(file_format: str) -> Iterator[None]:
    """Run parts in forms for any size and for ONNX, and leave sizes of one open."""
    import torch.fx.experimental._config as config

    attend = attend_by_products if file_format == 'onnx' else attention.fused_attention
    with (
        mock.patch.object(attention, 'fused_attention', attend),
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


def attend_by_products(
    query: Tensor, key: Tensor, value: Tensor, num_heads: int, scale: float, _: float = 0.0
) -> Tensor:
    """``fused_attention`` without padded values, and in a quarter of the operators of ONNX."""
    query, key, value = (
        x.unflatten(-1, (num_heads, -1)).transpose(1, 2) for x in (query * scale, key, value)
    )
    weights = (query @ key.transpose(2, 3)).softmax(-1)
    return (weights @ value).transpose(1, 2).flatten(2)


def bins(size: int, number: int, like: Tensor) -> Tensor:
    """Weights (number, size) that average ``size`` values into ``number`` bins, as torch does."""
    position = torch.arange(size, device=like.device)
    index = torch.arange(number, device=like.device)[:, None]
    start = index * size // number
    end = ((index + 1) * size + number - 1) // number
    inside = ((position >= start) & (position < end)).to(like.dtype)
    return inside / (end - start)


def save_onnx(
    program: ExportedProgram, wrapped: nn.Module, opset: int, metadata: dict[str, str], out: Path
) -> None:
    """Write a traced program as one ONNX file, weights and ``metadata_props`` included."""
    onnx_program = torch.onnx.export(
        program,
        dynamo=True,
        opset_version=opset,
        input_names=['images'],
        output_names=wrapped.output_names,
        custom_translation_table=wrapped.translations() if wrapped.translations else None,
        verbose=False,
    )
    onnx_program.model.metadata_props.update(metadata)
    onnx_program.save(out, external_data=False)


def onnx_runner(path: Path) -> Run:
    """Load a file into onnxruntime on CPU, with as many threads as PyTorch uses."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=['CPUExecutionProvider'])
    return lambda images: [*map(torch.from_numpy, session.run(None, {'images': images.numpy()}))]


@torch.no_grad()
def compare(model: nn.Module, run: Run, sizes: list[Size], args: argparse.Namespace) -> None:
    """Print difference and time of model and exported model at each batch, height and width.

    Fails where outputs differ by more than ``TOLERANCE``, relative to the larger of 1 and their
    largest value, or labels at more than 0.1% of the pixels. A detector's boxes are compared with
    those of mmdet's own code.
    """
    eager = getattr(model, 'reference', model)
    judge = getattr(model, 'judge', lambda *outputs: f'{largest_difference(*outputs):.1e}')
    exported = 'onnxruntime' if args.format == 'onnx' else 'exported'
    print(f'{torch.get_num_threads()} CPU thread(s), median of {args.repeat} runs in turns')
    header = ('B x H x W', 'difference', 'PyTorch (s)', f'{exported} (s)', 'ratio')
    rows = []
    torch.manual_seed(0)
    for batch, height, width in sizes:
        images = torch.randn(batch, 3, height, width)
        images = images * 60 + 120 if args.normalize else images
        difference = judge(eager(images), run(images))
        times = {eager: [], run: []}
        for function in [eager, run] * args.repeat:
            start = time.perf_counter()
            function(images)
            times[function].append(time.perf_counter() - start)
        before, after = map(statistics.median, times.values())
        seconds = f'{before:.3f}', f'{after:.3f}', f'{before / after:.2f}'
        rows.append((f'{batch} x {height} x {width}', difference, *seconds))
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
