# Copyright (c) mmscalablevit contributors. All rights reserved.
"""Pictures of what a ScalableViT backbone computes for an image, beside Swin-T if wanted."""

import argparse
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import cv2
import matplotlib
import numpy as np
import torch
from mmengine.registry import MODELS
from torch import Tensor, nn

from mmscalablevit import ScalableViT, cli
from mmscalablevit.checkpoint.reading import check_values, find_weights, read_checkpoint
from mmscalablevit.checkpoint.released import load_backbone_checkpoint
from mmscalablevit.errors import CheckpointError
from mmscalablevit.models import ScalableSelfAttention

matplotlib.use('Agg')
import matplotlib.pyplot as plt

MEAN = np.array([123.675, 116.28, 103.53], np.float32)
STD = np.array([58.395, 57.12, 57.375], np.float32)
SWIN_T = dict(type='mmdet.SwinTransformer', embed_dims=96, depths=[2, 2, 6, 2])
# Input and output of layers, by name.
Maps = dict[str, tuple[Tensor, Tensor]]


@dataclass
class Panel:
    """A picture (H, W, 3) of 0 to 1; place of a cross, steps of a grid, as (x, y) of 0 to 1."""

    title: str
    picture: np.ndarray
    point: tuple[float, float] | None = None
    step: tuple[float, float] | None = None


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        formatter_class=cli.HelpFormatter,
        description='Draw what a backbone computes for an image: feature maps, where SSA looks '
        'from a point, the windows of IWSA and the share of LIM, effective receptive fields.',
        epilog='example: python tools/analysis_tools/visualize_backbone.py demo.jpg '
        '--config configs/detection/mask-rcnn_scalablevit-s_fpn_1x_coco.py '
        '--checkpoint mask-rcnn.pth --point 320,200 --compare swin-t --out-dir pictures',
    )
    parser.add_argument('image', help='image file')
    source = parser.add_mutually_exclusive_group()
    source.add_argument('--config', help='config of a model with a ScalableViT backbone')
    source.add_argument('--arch', help='name of an arch; default: small')
    parser.add_argument('--checkpoint', help='checkpoint of that model; default: random weights')
    parser.add_argument('--out-dir', required=True, help='folder for the pictures')
    parser.add_argument('--point', metavar='X,Y', help='query, in pixels; default: center')
    parser.add_argument('--compare', choices=['swin-t'], help="draw mmdet's Swin-T beside it")
    help_ = 'checkpoint of an mmdet detector with Swin-T; default: random weights'
    parser.add_argument('--compare-checkpoint', help=help_)
    for name, default, meaning in (
        ('--max-size', 1333, 'longer side is reduced to this many pixels'),
        ('--erf-images', 4, 'random images of the receptive fields'),
        ('--erf-size', 448, 'side of these images in pixels'),
        ('--dpi', 100, 'dots per inch'),
    ):
        help_ = f'{meaning}; default: {default}'
        parser.add_argument(name, type=positive, default=default, help=help_)
    cli.add_config_options(parser)
    return parser.parse_args()


def main() -> None:
    """Compute and write the pictures."""
    args = parse_args()
    image = read_image(args.image, args.max_size)
    point = parse_point(args)
    models = {label(args.checkpoint, 'ScalableViT'): build_scalablevit(args)}
    if args.compare or args.compare_checkpoint:
        models[label(args.compare_checkpoint, 'Swin-T')] = build_swin(args.compare_checkpoint)
    out_dir = Path(args.out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    name, backbone = next(iter(models.items()))
    images = torch.from_numpy((image - MEAN) / STD).permute(2, 0, 1)[None]

    def write(file: str, title: str, rows: list[list[Panel]]) -> None:
        save_grid(out_dir / file, title, rows, args.dpi)
        print(f'wrote {out_dir / file}', flush=True)

    rows = [row for key, model in models.items() for row in feature_rows(key, model, images)]
    write('features.png', 'Feature maps of the stages', rows)
    maps = record(backbone, last_attentions(backbone), images)[1]
    rows = [attention_row(backbone, maps, image, point)]
    write('attention.png', f'{name}: where the last SSA of each stage looks from the cross', rows)
    rows = window_rows(backbone, maps, image)
    write('windows.png', f'{name}: windows of IWSA and share of LIM, last IWSA of each stage', rows)
    erf = args.erf_images, args.erf_size
    rows = [field_row(key, receptive_fields(model, *erf)) for key, model in models.items()]
    title = f'Effective receptive fields, {args.erf_images} random images (brightness: fourth root)'
    write('receptive_fields.png', title, rows)


def positive(text: str) -> int:
    """Read a positive integer."""
    if int(text) < 1:
        raise ValueError
    return int(text)


def label(checkpoint: str | None, name: str) -> str:
    """Name of a model with where its weights are from."""
    return f'{name} ({Path(checkpoint).name if checkpoint else "random weights"})'


def read_image(path: str, max_size: int) -> np.ndarray:
    """Read an image as RGB (H, W, 3), reduced to ``max_size`` pixels at its longer side."""
    if not Path(path).is_file():
        raise cli.UserError(f'image {path} does not exist')
    if (image := cv2.imread(path)) is None:
        raise cli.UserError(f'image {path} cannot be read')
    factor = max_size / max(image.shape[:2])
    if factor < 1:
        size = [max(round(x * factor), 1) for x in image.shape[1::-1]]
        image = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    return image[..., ::-1].copy()


def parse_point(args: argparse.Namespace) -> tuple[float, float]:
    """The query as fractions of width and height."""
    if args.point is None:
        return 0.5, 0.5
    height, width = cv2.imread(args.image).shape[:2]
    try:
        x, y = map(int, args.point.split(','))
    except ValueError as error:
        raise cli.UserError(f'--point must be X,Y in pixels, got {args.point}') from error
    if not (0 <= x < width and 0 <= y < height):
        raise cli.UserError(f'--point {args.point} is outside of the image of {width}x{height}')
    return x / width, y / height


def build_scalablevit(args: argparse.Namespace) -> ScalableViT:
    """Build the backbone of the config, or of the arch, with all stages as outputs."""
    if args.config:
        cfg = cli.read_config(args.config, args.cfg_options)
        settings = dict((cfg.get('model') or {}).get('backbone') or {})
        if settings.get('type') != 'ScalableViT':
            raise cli.UserError(f'config {args.config} has no model.backbone of type ScalableViT')
        settings.update(out_indices=(0, 1, 2, 3))
        if not args.checkpoint:
            settings.pop('init_cfg', None)
    else:
        settings = dict(type='ScalableViT', arch=args.arch or 'small')
    torch.manual_seed(0)
    try:
        backbone = MODELS.build(settings)
    except (TypeError, ValueError) as error:
        raise cli.UserError(str(error)) from error
    if args.checkpoint:
        load_backbone_checkpoint(backbone, args.checkpoint)
    else:
        backbone.init_weights()
    return backbone.eval().requires_grad_(False)


def build_swin(checkpoint: str | None) -> nn.Module:
    """Build mmdet's Swin-T, with the backbone of a detector's checkpoint."""
    try:
        import mmdet.models  # noqa: F401
    except ImportError as error:
        raise cli.UserError(f'--compare swin-t needs mmdet, which fails: {error}') from error
    torch.manual_seed(0)
    model = MODELS.build(dict(SWIN_T, num_heads=[3, 6, 12, 24]))
    # Its train(), and so eval(), returns nothing.
    model.eval()
    model.requires_grad_(False)
    if checkpoint is None:
        model.init_weights()
        return model
    weights = find_weights(read_checkpoint(checkpoint, 'cpu'), checkpoint)
    prefix = 'backbone.'
    weights = {k[len(prefix) :]: v for k, v in weights.items() if k.startswith(prefix)}
    check_values(weights, checkpoint, model.state_dict())
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        missing = f"{prefix}* weights of mmdet's Swin-T"
        raise CheckpointError(f'checkpoint {checkpoint} has no {missing}: {error}') from error
    return model


@torch.no_grad()
def record(model: nn.Module, layers: dict[str, nn.Module], images: Tensor) -> tuple[object, Maps]:
    """Run a model; return its outputs, and input and output of some of its layers by name."""
    kept = {}
    with ExitStack() as hooks:
        for name, layer in layers.items():
            hook = layer.register_forward_hook(
                lambda _, inputs, out, name=name: kept.update({name: (inputs[0], out)})
            )
            hooks.callback(hook.remove)
        return model(images), kept


def last_attentions(backbone: ScalableViT) -> dict[str, nn.Module]:
    """The last IWSA and SSA of each stage as '0.iwsa' and '0.ssa', and layers of them."""
    found = {}
    for i, stage in enumerate(backbone.stages):
        for block in stage:
            kind = 'ssa' if isinstance(block.attn, ScalableSelfAttention) else 'iwsa'
            found[f'{i}.{kind}'] = block.attn
    layers = ('q', 'k', 'kv', 'lim_func', 'proj')
    return found | {
        f'{name}.{layer}': getattr(attn, layer)
        for name, attn in found.items()
        for layer in layers
        if hasattr(attn, layer)
    }


def attention_at(query: Tensor, key: Tensor, attn: ScalableSelfAttention) -> Tensor:
    """Weights of SSA of one query (heads * D,) over a map of keys (rows, columns, heads * D).

    Without the matrix of all queries, which grows with the image squared.
    """
    query, key = (x.unflatten(-1, (attn.num_heads, -1)) for x in (query, key))
    logits = attn.scale * torch.einsum('hd,yxhd->hyx', query, key)
    return logits.flatten(1).softmax(-1).view_as(logits)


def receptive_fields(model: nn.Module, num_images: int, side: int) -> list[np.ndarray]:
    """Mean absolute gradient (side, side) of the center of each stage's map by random images.

    The scalar that is derived is a sum over channels with random signs, others in each image.
    """
    generator = torch.Generator().manual_seed(0)
    fields = []
    for _ in range(num_images):
        image = torch.randn(1, 3, side, side, generator=generator).requires_grad_()
        gradients = []
        for out in model(image):
            center = out[0, :, out.shape[2] // 2, out.shape[3] // 2]
            # LayerNorm makes the plain sum of an untrained model a constant.
            signs = torch.randint(2, center.shape, generator=generator) * 2 - 1
            (gradient,) = torch.autograd.grad((signs * center).sum(), image, retain_graph=True)
            gradients.append(gradient[0].abs().sum(0))
        fields.append(torch.stack(gradients))
    return list(torch.stack(fields).mean(0).numpy())


def side_holding(field: np.ndarray, share: float) -> int:
    """Side in pixels of the smallest centered square that holds a share of a field's sum."""
    rows, columns = (np.abs(np.arange(size) - size // 2) for size in field.shape)
    radii = np.maximum(rows[:, None], columns)
    held = np.cumsum(np.bincount(radii.ravel(), field.ravel()))
    return min(2 * int(np.argmax(held >= share * held[-1])) + 1, max(field.shape))


def feature_rows(name: str, model: nn.Module, images: Tensor) -> list[list[Panel]]:
    """Principal components of a model's maps of one image, and norms before the last LayerNorm."""
    maps, kept = record(model, stage_norms(model), images)
    colors, norms = [], []
    for i, x in enumerate(maps):
        channels, height, width = x.shape[1:]
        title = f'{name}\nstage {i + 1}: {channels} x {height} x {width}'
        colors.append(Panel(title, principal_components(x[0])))
        before = kept[str(i)][0] if str(i) in kept else x.permute(0, 2, 3, 1)
        norm = before.norm(dim=-1).view(height, width).numpy()
        title = f'norm {norm.min():.2g} to {norm.max():.2g}'
        norms.append(Panel(title, heat((norm - norm.min()) / max(np.ptp(norm), 1e-12))))
    return [colors, norms]


def stage_norms(model: nn.Module) -> dict[str, nn.Module]:
    """The LayerNorms through which maps leave a backbone; after them, all norms are alike."""
    if isinstance(model, ScalableViT):
        return dict(model.norm_list.named_children()) if hasattr(model, 'norm_list') else {}
    return {str(i): getattr(model, f'norm{i}') for i in range(4)}


def principal_components(x: Tensor) -> np.ndarray:
    """The first three principal components of a map (C, H, W) as RGB (H, W, 3) in 0 to 1."""
    rows = x.flatten(1).T.double()
    rows = rows - rows.mean(0)
    directions = torch.linalg.eigh(rows.T @ rows).eigenvectors[:, -3:].flip(1)
    # An eigenvector has no sign of its own.
    largest = directions.abs().argmax(0, keepdim=True)
    values = (rows @ (directions * directions.gather(0, largest).sign())).numpy()
    low, high = np.percentile(values, [1, 99], axis=0)
    colors = np.clip((values - low) / np.maximum(high - low, 1e-12), 0, 1)
    return colors.reshape(*x.shape[1:], -1)


def heat(values: np.ndarray) -> np.ndarray:
    """Values (H, W) in 0 to 1 as colors (H, W, 3) in 0 to 1."""
    return plt.get_cmap('viridis')(values)[..., :3]


def attention_row(
    backbone: ScalableViT, maps: Maps, image: np.ndarray, point: tuple[float, float]
) -> list[Panel]:
    """The image, and where each stage's SSA looks, over the image."""
    row = [Panel(f'image {image.shape[1]} x {image.shape[0]}', image / 255, point)]
    attentions = last_attentions(backbone)
    for i in range(len(backbone.stages)):
        name = f'{i}.ssa'
        if name not in maps:
            row.append(Panel(f'stage {i + 1}: no SSA', image / 255))
            continue
        attn, queries = attentions[name], maps[f'{name}.q'][1][0]
        merged = f'{name}.kv' in maps
        keys = maps[f'{name}.kv'][1].chunk(2, dim=-1)[0] if merged else maps[f'{name}.k'][1]
        sides = queries.shape[:2]
        x, y = (int(part * side) for part, side in zip(point, sides[::-1], strict=True))
        weights = attention_at(queries[y, x], keys[0], attn).mean(0).numpy()
        rows, columns = weights.shape
        peak = weights.max() * weights.size
        title = f'stage {i + 1}: {columns} x {rows} keys, up to {peak:.1f}x mean'
        # Keys do not see rows and columns left over by the reduction.
        seen = [s // attn.sr_ratio * attn.sr_ratio / s or 1 for s in sides]
        height, width = (round(s * side) for s, side in zip(seen, image.shape, strict=False))
        spread = cv2.resize(weights / weights.max(), (width, height))
        picture = 0.4 * image.mean(2, keepdims=True).repeat(3, 2) / 255
        picture[:height, :width] += 0.6 * heat(spread)
        row.append(Panel(title, picture, point))
    return row


def window_rows(backbone: ScalableViT, maps: Maps, image: np.ndarray) -> list[list[Panel]]:
    """Windows over the image, and the share of LIM in what leaves IWSA."""
    grids, shares = [], []
    for i in range(len(backbone.stages)):
        size = last_attentions(backbone)[f'{i}.iwsa'].window_size
        height, width = maps[f'{i}.iwsa'][0].shape[1:3]
        rows, columns = -(-height // size), -(-width // size)
        title = f'stage {i + 1}: {columns} x {rows} windows of {size} x {size}'
        grids.append(Panel(title, image / 255, step=(size / width, size / height)))
        attended, lim = (part.norm(dim=-1).numpy() for part in window_parts(maps, f'{i}.iwsa'))
        share = lim[:height, :width] / np.maximum(lim + attended, 1e-12)[:height, :width]
        title = f'|LIM| / (|LIM| + |attention|)\nmean {share.mean():.2f}, colors 0 to 1'
        shares.append(Panel(title, heat(share)))
    return [grids, shares]


def window_parts(maps: Maps, name: str) -> tuple[Tensor, Tensor]:
    """Attention inside windows and LIM (H, W, C), whose sum enters the projection of IWSA."""
    lim = maps[f'{name}.lim_func'][1][0].permute(1, 2, 0)
    return maps[f'{name}.proj'][0][0] - lim, lim


def field_row(name: str, fields: list[np.ndarray]) -> list[Panel]:
    """Receptive fields as pictures, with the squares that hold half and 90% of them."""
    row = []
    for i, field in enumerate(fields, start=1):
        half, most = (side_holding(field, share) for share in (0.5, 0.9))
        title = f'{name}\nstage {i}: half in {half} px, 90% in {most} px'
        row.append(Panel(title, heat((field / max(field.max(), 1e-30)) ** 0.25)))
    return row


def save_grid(path: Path, title: str, rows: list[list[Panel]], dpi: int) -> None:
    """Write titled pictures in rows and columns, 3.2 inches wide each, as one png file."""
    height, width = rows[0][0].picture.shape[:2]
    cell = 3.2 * min(max(height / width, 0.4), 2)
    size = (3.2 * len(rows[0]), (cell + 0.6) * len(rows) + 0.5)
    figure, axes = plt.subplots(len(rows), len(rows[0]), figsize=size, squeeze=False)
    for axis, panel in zip(axes.flat, (panel for row in rows for panel in row), strict=True):
        height, width = panel.picture.shape[:2]
        # In fractions of the picture, from its upper left corner.
        axis.imshow(np.clip(panel.picture, 0, 1), extent=(0, 1, 1, 0), aspect=height / width)
        axis.set_title(panel.title, fontsize=8)
        axis.axis('off')
        if panel.point:
            axis.plot(*panel.point, '+', color='red', markersize=12, markeredgewidth=2)
        for lines, step in zip((axis.vlines, axis.hlines), panel.step or (), strict=False):
            lines(np.arange(step, 1, step), 0, 1, 'gold', linewidth=0.5)
    figure.suptitle(title, fontsize=11)
    figure.tight_layout()
    figure.savefig(path, dpi=dpi)
    plt.close(figure)


if __name__ == '__main__':
    cli.run(main)
