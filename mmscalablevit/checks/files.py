# Copyright (c) mmscalablevit contributors. All rights reserved.
"""Faults of image files: missing, damaged, of another size than annotated."""

import os
import os.path as osp
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from PIL import ExifTags, Image
from rich.console import Console
from rich.progress import track

from .findings import Findings

SAMPLE = 200


def sample(items: list, full: bool) -> list:
    """All items, or some spread evenly over them."""
    if full or len(items) <= SAMPLE:
        return items
    return [items[i * len(items) // SAMPLE] for i in range(SAMPLE)]


def all_exist(needed: list[tuple[Callable, str]], findings: Findings) -> bool:
    """Whether all paths exist, each of its kind; the absent ones are added to the findings."""
    absent = [(test, path) for test, path in needed if not test(path)]
    for test, path in absent:
        kind = 'folder' if test is osp.isdir else 'file'
        findings.error(f'{kind} does not exist', path or 'none is named in the config')
    return not absent


def read_size(path: str, decode: bool = True) -> tuple[int, int]:
    """Width and height of an image as the toolboxes load it; its errors are Pillow's."""
    with Image.open(path) as image:
        if decode:
            image.load()
        quarter_turn = image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
        return image.size[::-1] if quarter_turn else image.size


def read_sizes(
    images: list[tuple[str, Any]], what: str, findings: Findings
) -> Iterator[tuple[str, Any, tuple[int, int]]]:
    """Add to each pair of an image and something else its size; unreadable images are findings."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        try:
            sizes = [pool.submit(read_size, path) for path, _ in images]
            shown = track(sizes, what, console=Console(stderr=True), transient=True)
            for (path, other), size in zip(images, shown, strict=True):
                # Damaged files raise errors of many types.
                if size.exception():
                    findings.error('image cannot be read', f'{path} ({size.exception()})')
                else:
                    yield path, other, size.result()
        finally:
            pool.shutdown(cancel_futures=True)


def check_images(
    images: list[tuple[str, tuple[int, int]]], source: str, full: bool, findings: Findings
) -> None:
    """Check that images exist and have their annotated sizes."""
    for path, _ in images:
        if not osp.isfile(path):
            findings.error(f'image of {source} does not exist', path)
    there = [(path, size) for path, size in images if osp.isfile(path)]
    for path, annotated, size in read_sizes(sample(there, full), 'image sizes', findings):
        if size != annotated:
            findings.error(
                f'image has another size (EXIF rotation applied) than in {source}',
                f'{path} is {size[0]}x{size[1]} and not {annotated[0]}x{annotated[1]}',
            )
