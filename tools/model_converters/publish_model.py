# Copyright (c) mmscalablevit contributors. All rights reserved.
"""Strip a training checkpoint for publishing and put its hash into its name."""

import argparse
import hashlib
from pathlib import Path

import torch

from mmscalablevit import cli
from mmscalablevit.checkpoint.reading import check_values, find_weights, read_checkpoint
from mmscalablevit.errors import CheckpointError, shorten


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        formatter_class=cli.HelpFormatter,
        description='Strip a training checkpoint of optimizer and training state, and put the '
        'first eight digits of the SHA-256 of the result into its name.',
        epilog='example: python tools/model_converters/publish_model.py '
        'work_dirs/mask-rcnn_scalablevit-s_fpn_1x_coco/epoch_12.pth '
        'mask-rcnn_scalablevit-s_fpn_1x_coco.pth',
    )
    parser.add_argument('in_file', help='checkpoint of a training')
    parser.add_argument('out_file', help='name of the published file, before the hash is put in')
    keys = ['meta', 'state_dict']
    help_ = 'keys to keep (default: meta state_dict)'
    parser.add_argument('--save-keys', nargs='+', default=keys, metavar='KEY', help=help_)
    parser.add_argument('--half', action='store_true', help='weights in half precision')
    return parser.parse_args()


def publish(
    in_file: str, out_file: str, save_keys: list[str], half: bool = False
) -> tuple[Path, list[str]]:
    """Write the published file."""
    checkpoint = read_checkpoint(in_file, map_location='cpu')
    if 'state_dict' not in checkpoint or 'state_dict' not in save_keys:
        raise CheckpointError(
            f'checkpoint {in_file} would be published without state_dict; it holds '
            f'{shorten(list(checkpoint))}, of which --save-keys keeps {", ".join(save_keys)}'
        )
    weights = find_weights(checkpoint, in_file)
    # Buffers may hold integers.
    check_values(weights, in_file, parameters=weights)
    if half:
        checkpoint['state_dict'] = {
            key: value.half() if value.is_floating_point() else value
            for key, value in weights.items()
        }
    removed = [key for key in checkpoint if key not in save_keys]
    out = Path(f'{out_file.removesuffix(".pth")}.pth')
    out.parent.mkdir(parents=True, exist_ok=True)
    torch.save({key: value for key, value in checkpoint.items() if key in save_keys}, out)
    digest = hashlib.sha256(out.read_bytes()).hexdigest()
    return out.rename(out.with_name(f'{out.stem}-{digest[:8]}.pth')), removed


def main() -> None:
    """Publish the checkpoint and say under which name."""
    args = parse_args()
    published, removed = publish(args.in_file, args.out_file, args.save_keys, args.half)
    print(f'{published}' + (f' (removed: {", ".join(removed)})' if removed else ''))


if __name__ == '__main__':
    cli.run(main)
