# Copyright (c) mmscalablevit contributors. All rights reserved.
"""Convert colored masks, or label maps with another ignored value, to label maps with 255 ignored.

Writes ``OUT/images/{train,val}``, ``OUT/annotations/{train,val}`` and ``OUT/classes.txt``.
"""

import argparse
import shutil
from pathlib import Path

import coco_writer as writer
import numpy as np
from PIL import Image

from mmscalablevit import cli
from mmscalablevit.checks.findings import Findings
from mmscalablevit.errors import UserError

IGNORED = 255
UNKNOWN = -1


def read_colors(path: Path) -> dict[tuple[int, ...], str]:
    """The class of each color, from lines of red, green, blue and a name."""
    colors = {}
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        fields = line.replace(',', ' ').split(maxsplit=3)
        if not fields or line.startswith('#'):
            continue
        if len(fields) < 4 or not all(x.isdigit() and int(x) < 256 for x in fields[:3]):
            raise UserError(f'{path} line {number} is not of the form RED GREEN BLUE NAME: {line}')
        colors[tuple(map(int, fields[:3]))] = fields[3].strip()
    return colors


def color_table(args: argparse.Namespace) -> tuple[dict[int, int], list[str]]:
    """Label by color, as one number, and the classes; ignored are the names of ``--ignore``."""
    colors = read_colors(args.colors)
    found = list(dict.fromkeys(name for name in colors.values() if name not in args.ignore))
    classes = args.classes.split(',') if args.classes else found
    unknown = {*args.ignore, *classes} - {*colors.values()}
    if unknown:
        raise UserError(f'{args.colors} has no {", ".join(sorted(unknown))}')
    table = {
        (red << 16) + (green << 8) + blue: IGNORED if name in args.ignore else classes.index(name)
        for (red, green, blue), name in colors.items()
        if name in args.ignore or name in classes
    }
    return table, classes


def value_table(args: argparse.Namespace) -> tuple[dict[int, int], list[str]]:
    """Label by value of a label map, and the classes."""
    if not args.classes:
        raise UserError('--classes must name the classes of label maps, in the order of the values')
    classes = args.classes.split(',')
    if not all(value.isdigit() for value in args.ignore):
        raise UserError(f'--ignore must be values of label maps, got {" ".join(args.ignore)}')
    ignored = set(map(int, args.ignore)) or {IGNORED}
    values = range(args.first, args.first + len(classes))
    if ignored & {*values}:
        raise UserError(f'--ignore {min(ignored & {*values})} is the value of a class')
    return {value: i for i, value in enumerate(values)} | dict.fromkeys(ignored, IGNORED), classes


def convert_mask(path: Path, args: argparse.Namespace, findings: Findings) -> np.ndarray:
    """A label map of 8 bits."""
    colored = args.colors is not None
    with Image.open(path) as image:
        mask = np.array(image.convert('RGB') if colored else image).astype(np.int64)
    if mask.ndim == 3 and not colored:
        raise UserError(f'{path} is a colored mask; --colors must name a file of its colors')
    if colored:
        mask = (mask[..., 0] << 16) + (mask[..., 1] << 8) + mask[..., 2]
    values, inverse = np.unique(mask, return_inverse=True)
    labels = np.array([args.table.get(int(value), UNKNOWN) for value in values])
    for value in values[labels == UNKNOWN]:
        color = f'color {value >> 16} {value >> 8 & 255} {value & 255}'
        shown = color if colored else f'value {value}'
        findings.error(f'{shown} is neither a class nor ignored', path)
    labels[labels == UNKNOWN] = IGNORED
    return labels[inverse].reshape(mask.shape).astype(np.uint8)


def find_pairs(args: argparse.Namespace) -> dict[str, list[tuple[Path, Path, Path]]]:
    """Image, mask and the name of both, without suffix, by split."""
    masks = writer.split_folders(args, args.masks)
    pairs = {
        split: [
            (folder / x, masks[split] / x.with_name(x.stem + args.mask_suffix), x.with_suffix(''))
            for x in writer.list_images(folder)
        ]
        for split, folder in writer.split_folders(args, args.images).items()
    }
    return writer.split_at_random(args, pairs['']) if '' in pairs else pairs


def convert_split(
    args: argparse.Namespace, split: str, pairs: list, folder: Path, findings: Findings
) -> list[tuple[Path, Path]]:
    """Write the label maps of a split into a folder; return the images of the sound ones."""
    sound = []
    for image, mask, name in writer.progress(pairs, len(pairs), f'masks of {split}'):
        if not mask.is_file():
            findings.error('mask does not exist', mask)
            continue
        try:
            labels, size = convert_mask(mask, args, findings), writer.image_size(image)
        # Damaged files raise errors of many types.
        except (OSError, SyntaxError, ValueError) as error:
            findings.error('image or mask cannot be read', f'{mask} ({error})')
            continue
        if labels.shape != size[::-1]:
            findings.error(
                'mask does not have the size of its image',
                f'{mask} is {labels.shape[1]}x{labels.shape[0]} and not {size[0]}x{size[1]}',
            )
            continue
        target = folder / split / name.with_name(f'{name.name}.png')
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(labels).save(target)
        sound.append((image, Path(split) / f'{name}{image.suffix}'))
    return sound


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = writer.make_parser(
        'Convert colored masks or label maps to label maps that ignore 255.',
        "data/camvid data/streets --images '{split}' --masks '{split}annot' --ignore 11 "
        '--classes Sky,Building,...',
        'folder of the images and the masks',
    )
    help_ = 'folder in DATA; default: %(default)s'
    parser.add_argument('--images', default='images/{split}', help=help_)
    parser.add_argument('--masks', default='masks/{split}', help=help_)
    help_ = 'end of the names of masks, in place of .jpg; default: .png'
    parser.add_argument('--mask-suffix', default='.png', help=help_)
    help_ = 'file with a line RED GREEN BLUE NAME for each class'
    parser.add_argument('--colors', type=Path, help=help_)
    help_ = 'names in --colors, or values, to ignore'
    parser.add_argument('--ignore', nargs='+', default=[], help=help_)
    help_ = 'value of the first class of label maps; default: 0'
    parser.add_argument('--first', type=int, default=0, help=help_)
    return parser.parse_args()


def main() -> None:
    """Convert."""
    args = parse_args()
    if ('{split}' in args.images) != ('{split}' in args.masks):
        raise UserError('--images and --masks must both hold {split}, or neither')
    args.table, args.class_names = color_table(args) if args.colors else value_table(args)
    final, part = args.out / 'annotations', args.out / 'annotations.part'
    writer.check_out(args, final)
    findings = Findings()
    shutil.rmtree(part, ignore_errors=True)
    try:
        sound = {
            split: convert_split(args, split, pairs, part, findings)
            for split, pairs in find_pairs(args).items()
        }
        writer.refuse_faults(args, findings)
        for split, images in sound.items():
            for image, name in writer.progress(images, len(images), f'images of {split}'):
                writer.place_image(image, args.out / 'images' / name, args.copy)
        (args.out / 'classes.txt').write_text('\n'.join(args.class_names) + '\n')
        part.rename(final)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    for split, images in sound.items():
        print(f'{final / split}: {len(images)} label maps of {len(args.class_names)} classes')


if __name__ == '__main__':
    cli.run(main)
