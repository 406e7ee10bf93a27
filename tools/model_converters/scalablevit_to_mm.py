# Copyright (c) mmscalablevit contributors. All rights reserved.
"""Convert a checkpoint of the authors' code to one of the OpenMMLab toolboxes."""

import argparse
from pathlib import Path

import torch

from mmscalablevit import ScalableViT, cli
from mmscalablevit.checkpoint import released


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        formatter_class=cli.HelpFormatter,
        description="Convert a checkpoint of the authors' code, in the naming of their "
        'classification or of their detection code, to one of the OpenMMLab toolboxes.',
        epilog='example: python tools/model_converters/scalablevit_to_mm.py checkpoint_best.pth '
        'scalablevit-s.pth --task backbone',
    )
    parser.add_argument('src', help="checkpoint of the authors' code, or scalablevit://SIZE")
    parser.add_argument('dst', help='where the converted checkpoint is written')
    help_ = (
        'backbone: the bare backbone, for init_cfg (default); classifier: backbone and head, for '
        'the configs in configs/classification'
    )
    tasks = ['backbone', 'classifier']
    parser.add_argument('--task', choices=tasks, default='backbone', help=help_)
    return parser.parse_args()


def convert(src: str, task: str) -> tuple[dict, list[str]]:
    """Convert a checkpoint."""
    weights = released.read_weights(src)
    if task == 'classifier':
        state, arch = released.as_classifier(ScalableViT, weights, src)
        return dict(meta=dict(arch=arch), state_dict=state), []
    inside, outside = released.split_backbone(weights, src)
    head = [name for name in inside if name.startswith('head.')]
    backbone = {name: tensor for name, tensor in inside.items() if name not in head}
    arch = released.recognize(ScalableViT, backbone, src)
    return dict(meta=dict(arch=arch), state_dict=backbone), released.module_names([*head, *outside])


def main() -> None:
    """Convert the checkpoint and say what it holds."""
    args = parse_args()
    checkpoint, left_out = convert(args.src, args.task)
    Path(args.dst).parent.mkdir(parents=True, exist_ok=True)
    torch.save(checkpoint, args.dst)
    arch, weights = checkpoint['meta']['arch'], checkpoint['state_dict']
    rest = f'; left out: {", ".join(left_out)}' if left_out else ''
    print(f'{args.dst}: {args.task} of arch {arch!r}, {len(weights)} tensors{rest}')


if __name__ == '__main__':
    cli.run(main)
