# Copyright (c) mmscalablevit contributors. All rights reserved.
"""Convert a checkpoint of an OpenMMLab toolbox to the authors' naming."""

import argparse
from pathlib import Path

import torch

from mmscalablevit import ScalableViT, cli
from mmscalablevit.checkpoint import released
from mmscalablevit.checkpoint.reading import check_values


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        formatter_class=cli.HelpFormatter,
        description='Convert a backbone, or the backbone of a detector, segmentor or classifier, '
        "to the authors' naming. Of a classifier the head is converted, too.",
        epilog='example: python tools/model_converters/mm_to_scalablevit.py '
        'work_dirs/scalablevit-s_8xb128_in1k/epoch_300.pth scalablevit-s.pth',
    )
    parser.add_argument('src', help='checkpoint of a toolbox')
    parser.add_argument('dst', help='where the converted checkpoint is written')
    help_ = (
        'released: that of the classification code, weights under the key model (default); '
        'detection: that of the earlier detection code, weights under the key state_dict'
    )
    namings = ['released', 'detection']
    parser.add_argument('--naming', choices=namings, default='released', help=help_)
    return parser.parse_args()


def convert(src: str, naming: str) -> tuple[dict, str, list[str]]:
    """Convert a checkpoint."""
    backbone, outside = released.split_backbone(released.read_weights(src), src)
    arch = released.recognize(ScalableViT, backbone, src)
    if naming == 'detection':
        left_out = [name for name in backbone if name.startswith('norm.')]
        kept = backbone.keys() - left_out
        state = {released.detection_name(k): v for k, v in backbone.items() if k in kept}
        return dict(state_dict=state), arch, released.module_names([*left_out, *outside])

    head = {
        name.replace('head.fc.', 'head.', 1): tensor
        for name, tensor in outside.items()
        if name.startswith('head.fc.')
    }
    check_values(head, src)
    left_out = [name for name in outside if not name.startswith('head.fc.')]
    return dict(model={**backbone, **head}), arch, released.module_names(left_out)


def main() -> None:
    """Convert the checkpoint and say what it holds."""
    args = parse_args()
    checkpoint, arch, left_out = convert(args.src, args.naming)
    Path(args.dst).parent.mkdir(parents=True, exist_ok=True)
    torch.save(checkpoint, args.dst)
    (weights,) = checkpoint.values()
    rest = f'; left out: {", ".join(left_out)}' if left_out else ''
    print(f'{args.dst}: {args.naming} naming, arch {arch!r}, {len(weights)} tensors{rest}')


if __name__ == '__main__':
    cli.run(main)
