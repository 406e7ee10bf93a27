# Copyright (c) mmscalablevit contributors. All rights reserved.
"""Pictures of what a ScalableViT backbone computes for an image, beside Swin-T if wanted."""

import argparse
from pathlib import Path

import cv2
import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from mmengine.registry import MODELS
from torch import Tensor, nn

from mmscalablevit import ScalableViT, cli
from mmscalablevit.checkpoint.reading import check_values, find_weights, read_checkpoint
from mmscalablevit.checkpoint.released import load_backbone_checkpoint
from mmscalablevit.errors import CheckpointError
from mmscalablevit.models.attention import (
    InteractiveWindowSelfAttention,
    ScalableSelfAttention,
)
from mmscalablevit.models.layers import conv_channels_last

matplotlib.use('Agg')
import matplotlib.pyplot as plt

MEAN = np.array([123.675, 116.28, 103.53], np.float32)
STD = np.array([58.395, 57.12, 57.375], np.float32)
SWIN_T = dict(type='mmdet.SwinTransformer', embed_dims=96, depths=[2, 2, 6, 2])
# Longer side of an image in the pictures, whatever the input's.
DRAWN_SIDE = 480
Panel = tuple[str, np.ndarray]


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description='Draw what a backbone computes for an image: feature maps, where SSA looks '
        'from a point, the windows of IWSA and the share of LIM, effective receptive fields.',
        epilog='example: python tools/analysis_tools/visualize_backbone.py demo.jpg '
        '--config configs/detection/mask-rcnn_scalablevit-s_fpn_1x_coco.py '
        '--checkpoint mask-rcnn.pth --point 320,200 --compare swin-t --out-dir pictures',
    )
    parser.add_argument('image', help='image file')
    source = parser.add_mutually_exclusive_group()
    source.add_argument('--config', help='config of a model with a ScalableViT backbone')
    source.add_argument('--arch', help='name of an arch, default small')
    parser.add_argument('--checkpoint', help='checkpoint of that model; else random weights')
    parser.add_argument('--out-dir', required=True, help='folder of the pictures')
    parser.add_argument('--point', metavar='X,Y', help='query in pixels of the image; else center')
    parser.add_argument('--compare', choices=['swin-t'], help="draw mmdet's Swin-T beside it")
    parser.add_argument(
        '--compare-checkpoint', help='checkpoint of an mmdet detector with Swin-T; else random'
    )
    parser.add_argument(
        '--max-size', type=int, default=1333, help='longer side is reduced to this, default 1333'
    )
    parser.add_argument(
        '--erf-images', type=int, default=4, help='random images of the receptive fields, default 4'
    )
    parser.add_argument('--erf-size', type=int, default=448, help='their side, default 448')
    parser.add_argument('--dpi', type=int, default=100, help='of the pictures, default 100')
    parser.add_argument('--cfg-options', nargs='+', action=cli.DictAction, metavar='KEY=VALUE')
    args = parser.parse_args()
    args.work_dir, args.launcher = None, 'none'
    return args


def main() -> None:
    """Compute and write the pictures."""
    args = parse_args()
    check_arguments(args)
    image = read_image(args.image, args.max_size)
    point = parse_point(args, image)
    models = {label(args.checkpoint, 'ScalableViT'): build_scalablevit(args)}
    if args.compare:
        models[label(args.compare_checkpoint, 'Swin-T')] = build_swin(args.compare_checkpoint)
    out_dir = Path(args.out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    name, backbone = next(iter(models.items()))
    images = normalize(image)

    def write(file: str, title: str, rows: list[list[Panel]]) -> None:
        save_grid(out_dir / file, title, rows, args.dpi)
        print(f'wrote {out_dir / file}', flush=True)

    with torch.no_grad():
        rows = [row for key, model in models.items() for row in feature_rows(key, model, images)]
        write('features.png', 'Feature maps of the stages', rows)
        inputs = attention_inputs(backbone, images)
    rows = [attention_row(inputs, image, point)]
    write('attention.png', f'{name}: where the last SSA of each stage looks from the cross', rows)
    rows = window_rows(inputs, image)
    write('windows.png', f'{name}: windows of IWSA and share of LIM, last IWSA of each stage', rows)
    rows = []
    for key, model in models.items():
        print(f'Receptive fields of {key} ...', flush=True)
        fields = receptive_fields(model, args.erf_images, args.erf_size)
        rows.append(field_row(key, fields))
    title = f'Effective receptive fields, {args.erf_images} random images (brightness: fourth root)'
    write('receptive_fields.png', title, rows)


def check_arguments(args: argparse.Namespace) -> None:
    """Raise where the arguments do not fit each other."""
    if args.compare_checkpoint and not args.compare:
        raise cli.UserError('--compare-checkpoint needs --compare')
    for name, low in (('max_size', 1), ('erf_images', 1), ('erf_size', 1), ('dpi', 20)):
        if getattr(args, name) < low:
            raise cli.UserError(f'--{name.replace("_", "-")} must be at least {low}')


def label(checkpoint: str | None, name: str) -> str:
    """Name of a model with where its weights are from."""
    return f'{name} ({Path(checkpoint).name if checkpoint else "random weights"})'


def read_image(path: str, max_size: int) -> np.ndarray:
    """Read an image as RGB (H, W, 3), reduced to ``max_size`` pixels at its longer side."""
    if not Path(path).is_file():
        raise cli.UserError(f'image {path} does not exist')
    image = cv2.imread(path)
    if image is None:
        raise cli.UserError(f'image {path} cannot be read')
    return reduced(image, max_size)[..., ::-1].copy()


def reduced(image: np.ndarray, side: int) -> np.ndarray:
    """Reduce an image to ``side`` pixels at its longer side; a smaller one stays."""
    factor = side / max(image.shape[:2])
    if factor >= 1:
        return image
    size = [max(round(x * factor), 1) for x in image.shape[1::-1]]
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA)


def at_drawn_size(image: np.ndarray) -> np.ndarray:
    """Reduce or enlarge an image for the lines on it to be equally thin."""
    factor = max(DRAWN_SIDE / max(image.shape[:2]), 1)
    image = cv2.resize(image, None, fx=factor, fy=factor, interpolation=cv2.INTER_NEAREST)
    return reduced(image, DRAWN_SIDE)


def parse_point(args: argparse.Namespace, image: np.ndarray) -> tuple[float, float]:
    """The query as fractions of width and height."""
    if args.point is None:
        return 0.5, 0.5
    height, width = cv2.imread(args.image).shape[:2]
    try:
        x, y = (int(part) for part in args.point.split(','))
    except ValueError as error:
        raise cli.UserError(f'--point must be X,Y in pixels, got {args.point}') from error
    if not (0 <= x < width and 0 <= y < height):
        raise cli.UserError(f'--point {args.point} is outside of the image of {width}x{height}')
    return x / width, y / height


def normalize(image: np.ndarray) -> Tensor:
    """RGB (H, W, 3) to a batch of one as the configs normalize it."""
    return torch.from_numpy((image - MEAN) / STD).permute(2, 0, 1)[None]


def build_scalablevit(args: argparse.Namespace) -> ScalableViT:
    """Build the backbone of the config, or of the arch, with all stages as outputs."""
    if args.config:
        cfg = cli.load_config(args)
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
    prefix = 'backbone.'
    weights = find_weights(read_checkpoint(checkpoint, 'cpu'), checkpoint)
    weights = {k[len(prefix) :]: v for k, v in weights.items() if k.startswith(prefix)}
    check_values(weights, checkpoint, model.state_dict())
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        found = '; '.join(line.strip()[:120] for line in str(error).splitlines()[1:3])
        raise CheckpointError(
            f"checkpoint {checkpoint} has no {prefix}* weights of mmdet's Swin-T: {found}"
        ) from error
    return model


def attention_inputs(backbone: ScalableViT, images: Tensor) -> list[dict[type, tuple]]:
    """Run a backbone and keep the last attention of each kind and stage with its input.

    Args:
        backbone (ScalableViT): The backbone.
        images (Tensor): Images of shape (B, 3, H, W).

    Returns:
        list[dict[type, tuple]]: For each stage, by class of attention: module, and its input map of
        shape (B, H, W, C).
    """
    kept: list[dict[type, tuple]] = []
    handles = []
    for stage in backbone.stages:
        last = {type(block.attn): block.attn for block in stage}
        found: dict[type, tuple] = {}
        kept.append(found)
        for kind, attn in last.items():

            def keep(module, inputs, kind=kind, found=found):
                found[kind] = (module, inputs[0].detach())

            handles.append(attn.register_forward_pre_hook(keep))
    try:
        backbone(images)
    finally:
        for handle in handles:
            handle.remove()
    return kept


@torch.no_grad()
def attention_at(
    attn: ScalableSelfAttention, x: Tensor, row: int, column: int
) -> tuple[Tensor, Tensor]:
    """SSA for one query only, without the matrix of all of them.

    Args:
        attn (ScalableSelfAttention): The attention.
        x (Tensor): Its input map of shape (1, H, W, C).
        row (int): Row of the query.
        column (int): Column of the query.

    Returns:
        tuple[Tensor, Tensor]: Weights over the reduced map, (heads, rows, columns), and what the
        module puts out at the query, (C,).
    """
    query = attn.q(x[:, row, column]).view(attn.num_heads, 1, -1)
    key, value = (part[0] for part in attn._key_value(x))
    weights = (query @ key.transpose(1, 2) * attn.scale).softmax(-1)
    out = attn.proj((weights @ value).flatten())
    rows, columns = (max(side // attn.sr_ratio, 1) for side in x.shape[1:3])
    return weights.view(attn.num_heads, rows, columns), out


@torch.no_grad()
def window_parts(attn: InteractiveWindowSelfAttention, x: Tensor) -> tuple[Tensor, Tensor]:
    """The two summands of IWSA before its projection.

    Args:
        attn (InteractiveWindowSelfAttention): The attention.
        x (Tensor): Its input map of shape (1, H, W, C).

    Returns:
        tuple[Tensor, Tensor]: Attention inside windows and LIM, both of shape (1, H, W, C).
    """
    _, height, width, channels = x.shape
    size, heads = attn.window_size, attn.num_heads
    x = F.pad(x, (0, 0, 0, -width % size, 0, -height % size))
    rows, columns = x.shape[1] // size, x.shape[2] // size
    qkv = attn.qkv(x)
    lim = conv_channels_last(attn.lim_func, qkv[..., 2 * channels :])
    windows = qkv.reshape(rows, size, columns, size, 3, heads, -1).permute(4, 0, 2, 5, 1, 3, 6)
    query, key, value = windows.flatten(4, 5)
    out = (query @ key.transpose(-1, -2) * attn.scale).softmax(-1) @ value
    out = out.unflatten(3, (size, size)).permute(0, 3, 1, 4, 2, 5).reshape(1, *x.shape[1:])
    return out[:, :height, :width], lim[:, :height, :width]


def receptive_fields(model: nn.Module, num_images: int, side: int) -> list[np.ndarray]:
    """Mean gradient of the center of each stage's map with respect to random images.

    The scalar that is derived is a sum over channels with random signs, others in each image.

    Args:
        model (nn.Module): A backbone.
        num_images (int): Number of images, of standard normal noise.
        side (int): Their side in pixels.

    Returns:
        list[np.ndarray]: For each stage the sum of absolute gradients over colors, (side, side).
    """
    generator = torch.Generator().manual_seed(0)
    totals: list[Tensor] = []
    for _ in range(num_images):
        image = torch.randn(1, 3, side, side, generator=generator).requires_grad_()
        outs = model(image)
        for i, out in enumerate(outs):
            center = out[0, :, out.shape[2] // 2, out.shape[3] // 2]
            # LayerNorm makes the plain sum of an untrained model a constant.
            signs = torch.randint(2, center.shape, generator=generator) * 2 - 1
            center = (signs * center).sum()
            (gradient,) = torch.autograd.grad(center, image, retain_graph=i < len(outs) - 1)
            gradient = gradient[0].abs().sum(0)
            if i == len(totals):
                totals.append(torch.zeros_like(gradient))
            totals[i] += gradient / num_images
    return [total.numpy() for total in totals]


def side_holding(field: np.ndarray, share: float) -> int:
    """Side in pixels of the smallest centered square that holds a share of a field's sum."""
    center_y, center_x = (size // 2 for size in field.shape)
    total = field.sum()
    for radius in range(max(field.shape)):
        square = field[
            max(center_y - radius, 0) : center_y + radius + 1,
            max(center_x - radius, 0) : center_x + radius + 1,
        ]
        if square.sum() >= share * total:
            return min(2 * radius + 1, max(field.shape))
    return max(field.shape)


def feature_rows(name: str, model: nn.Module, images: Tensor) -> list[list[Panel]]:
    """Principal components of a model's maps of one image, and norms before the last LayerNorm."""
    before: dict[int, Tensor] = {}
    handles = []
    for i, norm in enumerate(stage_norms(model)):

        def keep(module, inputs, i=i):
            before[i] = inputs[0].detach()

        handles.append(norm.register_forward_pre_hook(keep))
    try:
        maps = model(images)
    finally:
        for handle in handles:
            handle.remove()
    colors, norms = [], []
    for i, x in enumerate(maps):
        channels, height, width = x.shape[1:]
        title = f'{name}\nstage {i}: {channels} x {height} x {width}'
        colors.append((title, principal_components(x[0])))
        norm = before[i].norm(dim=-1).view(height, width) if i in before else x[0].norm(dim=0)
        norm = norm.numpy()
        norms.append((f'norm {norm.min():.2g} to {norm.max():.2g}', heat(norm)))
    return [colors, norms]


def stage_norms(model: nn.Module) -> list[nn.Module]:
    """The LayerNorms through which maps leave a backbone; after them, all norms are alike."""
    if isinstance(model, ScalableViT):
        return list(getattr(model, 'norm_list', []))
    return [getattr(model, f'norm{i}') for i in range(4)]


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


def heat(values: np.ndarray, low: float | None = None, high: float | None = None) -> np.ndarray:
    """Values (H, W) as colors (H, W, 3) in 0 to 1."""
    low = values.min() if low is None else low
    high = values.max() if high is None else high
    return plt.get_cmap('viridis')((values - low) / max(high - low, 1e-12))[..., :3]


def overlay(image: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Values (h, w) in 0 to 1 as colors over a gray image (H, W, 3)."""
    height, width = image.shape[:2]
    spread = cv2.resize(values.astype(np.float32), (width, height), interpolation=cv2.INTER_LINEAR)
    return 0.4 * gray(image) + 0.6 * heat(spread, 0, 1)


def gray(image: np.ndarray) -> np.ndarray:
    """An image (H, W, 3) without its colors, in 0 to 1."""
    return image.mean(2, keepdims=True).repeat(3, 2) / 255


def attention_row(
    inputs: list[dict[type, tuple]], image: np.ndarray, point: tuple[float, float]
) -> list[Panel]:
    """The image, and where each stage's SSA looks, over the image."""
    drawn = at_drawn_size(image)
    row = [(f'image {image.shape[1]} x {image.shape[0]}', marked(drawn / 255, point))]
    for i, found in enumerate(inputs):
        if ScalableSelfAttention not in found:
            row.append((f'stage {i}: no SSA', drawn / 255))
            continue
        attn, x = found[ScalableSelfAttention]
        column, line = (int(part * side) for part, side in zip(point, x.shape[2:0:-1], strict=True))
        weights = attention_at(attn, x, line, column)[0].mean(0).numpy()
        rows, columns = weights.shape
        title = (
            f'stage {i}: {columns} x {rows} keys, up to {weights.max() * weights.size:.1f}x mean'
        )
        # Keys do not see rows and columns left over by the reduction.
        seen = [s // attn.sr_ratio * attn.sr_ratio / s or 1 for s in x.shape[1:3]]
        height, width = (round(s * side) for s, side in zip(seen, drawn.shape, strict=False))
        picture = 0.4 * gray(drawn)
        values = weights / weights.max()
        picture[:height, :width] = overlay(drawn[:height, :width], values)
        row.append((title, marked(picture, point)))
    return row


def marked(picture: np.ndarray, point: tuple[float, float]) -> np.ndarray:
    """A cross on a picture (H, W, 3) in 0 to 1."""
    height, width = picture.shape[:2]
    position = int(point[0] * width), int(point[1] * height)
    size = max(min(height, width) // 20, 5)
    picture = np.ascontiguousarray(picture, np.float32)
    for color, thickness in (((0, 0, 0), 4), ((1, 0.2, 0.2), 2)):
        cv2.drawMarker(picture, position, color, cv2.MARKER_CROSS, size, thickness)
    return picture


def window_rows(inputs: list[dict[type, tuple]], image: np.ndarray) -> list[list[Panel]]:
    """Windows over the image, and the share of LIM in what leaves IWSA."""
    drawn = at_drawn_size(image)
    grids, shares = [], []
    for i, found in enumerate(inputs):
        attn, x = found[InteractiveWindowSelfAttention]
        height, width = x.shape[1:3]
        size = attn.window_size
        rows, columns = -(-height // size), -(-width // size)
        title = f'stage {i}: {columns} x {rows} windows of {size} x {size}'
        grids.append((title, with_grid(drawn, size / height, size / width)))
        attended, lim = (part[0].norm(dim=-1).numpy() for part in window_parts(attn, x))
        share = lim / np.maximum(lim + attended, 1e-12)
        title = f'|LIM| / (|LIM| + |attention|)\nmean {share.mean():.2f}, colors 0 to 1'
        shares.append((title, heat(share, 0, 1)))
    return [grids, shares]


def with_grid(image: np.ndarray, step_y: float, step_x: float) -> np.ndarray:
    """Lines on an image (H, W, 3), every fraction ``step`` of its height and width."""
    picture = np.ascontiguousarray(image / 255, np.float32)
    height, width = picture.shape[:2]
    for y in np.arange(step_y, 1, step_y):
        picture[round(y * height) : round(y * height) + 2] = (1, 0.9, 0)
    for x in np.arange(step_x, 1, step_x):
        picture[:, round(x * width) : round(x * width) + 2] = (1, 0.9, 0)
    return picture


def field_row(name: str, fields: list[np.ndarray]) -> list[Panel]:
    """Receptive fields as pictures, with the squares that hold half and 90% of them."""
    return [
        (
            f'{name}\nstage {i}: half in {side_holding(field, 0.5)} px, '
            f'90% in {side_holding(field, 0.9)} px',
            heat((field / max(field.max(), 1e-30)) ** 0.25, 0, 1),
        )
        for i, field in enumerate(fields)
    ]


def save_grid(path: Path, title: str, rows: list[list[Panel]], dpi: int) -> None:
    """Write titled pictures in rows and columns as one file.

    Args:
        path (Path): The png file.
        title (str): Title of the whole.
        rows (list[list[Panel]]): Title and picture (H, W, 3) in 0 to 1 of each cell.
        dpi (int): Dots an inch; a cell is 3.2 inches wide.
    """
    height, width = rows[0][0][1].shape[:2]
    cell = 3.2 * min(max(height / width, 0.4), 2)
    size = (3.2 * len(rows[0]), (cell + 0.6) * len(rows) + 0.5)
    figure, axes = plt.subplots(len(rows), len(rows[0]), figsize=size, squeeze=False)
    for line, panels in zip(axes, rows, strict=True):
        for axis, (name, picture) in zip(line, panels, strict=True):
            axis.imshow(np.clip(picture, 0, 1))
            axis.set_title(name, fontsize=8)
            axis.axis('off')
    figure.suptitle(title, fontsize=11)
    figure.tight_layout()
    figure.savefig(path, dpi=dpi)
    plt.close(figure)


if __name__ == '__main__':
    cli.run(main)
