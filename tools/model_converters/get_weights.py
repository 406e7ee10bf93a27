# Copyright (c) mmscalablevit contributors. All rights reserved.
"""Download the released ImageNet-1K weights, or list them."""

import argparse
import hashlib
from pathlib import Path

from mmscalablevit import ScalableViT, cli
from mmscalablevit.checkpoint.released import nearest_arch, read_weights, split_backbone
from mmscalablevit.checkpoint.weights import RELEASED, fetch_released


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        formatter_class=cli.HelpFormatter,
        description="Download the authors' ImageNet-1K weights into torch hub's cache, where "
        'scalablevit://SIZE finds them.',
        epilog='example: python tools/model_converters/get_weights.py small',
    )
    parser.add_argument('size', nargs='?', choices=RELEASED, help='which to download')
    parser.add_argument('--list', action='store_true', help='show the sizes and their links')
    args = parser.parse_args()
    if not (args.size or args.list):
        parser.error('give a SIZE, or --list')
    return args


def main() -> None:
    """List the weights, download one file and say what it holds."""
    args = parse_args()
    if args.list:
        for size, released in RELEASED.items():
            print(
                f'scalablevit://{size}: ImageNet-1K top-1 {released.top1}%\n'
                f'  weights {released.link}\n'
                f'  log     https://drive.google.com/file/d/{released.log}/view'
            )
    if args.size:
        address = f'scalablevit://{args.size}'
        path = fetch_released(address)
        backbone, _ = split_backbone(read_weights(path), path)
        arch, exact = nearest_arch(ScalableViT, backbone)
        held = f'arch {arch!r}' if exact else f'no named arch; {arch!r} is nearest'
        digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()
        print(f'{path}: {held}, SHA-256 {digest}')


if __name__ == '__main__':
    cli.run(main)
