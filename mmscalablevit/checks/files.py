# Copyright (c) mmscalablevit contributors. All rights reserved.
"""Faults of image files: missing, damaged, of another size than annotated."""

import os
import os.path as osp
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

from PIL import Image
from rich.console import Console
from rich.progress import track

from .findings import Findings

SAMPLE = 200
_EXIF_ORIENTATION = 0x0112
_QUARTER_TURNS = (5, 6, 7, 8)


def sample(items: list, full: bool) -> list:
    """All items, or some spread evenly over them."""
    if full or len(items) <= SAMPLE:
        return items
    return [items[i * len(items) // SAMPLE] for i in range(SAMPLE)]


def in_threads(function: Callable, items: list, what: str) -> Iterator:
    """``function`` of every item, in order; a progress bar where stderr is a terminal."""
    console = Console(stderr=True)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        results = pool.map(function, items)
        yield from track(results, what, len(items), console=console, transient=True)


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
        turned = image.getexif().get(_EXIF_ORIENTATION) in _QUARTER_TURNS
        return image.size[::-1] if turned else image.size


def size_or_fault(path: str) -> tuple[int, int] | str:
    """Width and height, or why the image cannot be read."""
    try:
        return read_size(path)
    # Damaged files raise errors of many types.
    except Exception as error:
        return str(error)


def check_images(
    images: list[tuple[str, tuple[int, int]]], source: str, full: bool, findings: Findings
) -> None:
    """Check that images exist and have their annotated sizes."""
    for path, _ in images:
        if not osp.isfile(path):
            findings.error(f'image of {source} does not exist', path)
    chosen = sample([(path, size) for path, size in images if osp.isfile(path)], full)
    sizes = in_threads(size_or_fault, [path for path, _ in chosen], 'image sizes')
    for (path, annotated), size in zip(chosen, sizes, strict=True):
        if isinstance(size, str):
            findings.error('image cannot be read', f'{path} ({size})')
        elif size != annotated:
            findings.error(
                f'image has another size (EXIF rotation applied) than in {source}',
                f'{path} is {size[0]}x{size[1]} and not {annotated[0]}x{annotated[1]}',
            )
