# Copyright (c) mmscalablevit contributors. All rights reserved.
"""Faults of image files: missing, damaged, of another size than annotated, too large."""

import os
import os.path as osp
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

from PIL import Image
from rich.console import Console
from rich.progress import track

from .findings import Findings

SAMPLE = 200
# An image of this many pixels takes 1.2 GB as float32, and more in every worker.
_HUGE = 100_000_000
_EXIF_ORIENTATION = 0x0112
_QUARTER_TURNS = (5, 6, 7, 8)


def sample(items: list, full: bool) -> list:
    """All items, or some spread evenly over them."""
    if full or len(items) <= SAMPLE:
        return items
    return [items[i * len(items) // SAMPLE] for i in range(SAMPLE)]


def progress(items: Iterable, total: int, what: str) -> Iterable:
    """A progress bar on stderr, where that is a terminal."""
    console = Console(stderr=True)
    hidden = not console.is_terminal
    return track(items, what, total=total, console=console, transient=True, disable=hidden)


def in_threads(function: Callable, items: list, what: str) -> Iterator:
    """``function`` of every item, in order, with a progress bar."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        yield from progress(pool.map(function, items), len(items), what)


def all_exist(needed: list[tuple[Callable, str]], findings: Findings) -> bool:
    """Whether all paths exist, each of its kind; the absent ones are added to the findings."""
    absent = [(test, path) for test, path in needed if not test(path)]
    for test, path in absent:
        kind = 'folder' if test is osp.isdir else 'file'
        findings.error(f'{kind} does not exist', path or 'none is named in the config')
    return not absent


def warn_of_huge(width: float, height: float, path: str, findings: Findings) -> bool:
    """Warn of an image that is too large to be read as a whole; whether it is."""
    if width * height < _HUGE:
        return False
    findings.warn(
        f'image of more than {_HUGE // 10**6} million pixels is read as a whole for every sample; '
        'cut it into tiles',
        f'{path} ({width:g}x{height:g})',
    )
    return True


def read_size(path: str) -> tuple[int, int] | str:
    """Width and height as the toolboxes load an image, or why it cannot be read."""
    try:
        with Image.open(path) as image:
            width, height = image.size
            if width * height < _HUGE:
                image.load()
            turned = image.getexif().get(_EXIF_ORIENTATION) in _QUARTER_TURNS
    except Image.DecompressionBombError:
        return 'of more pixels than Pillow and OpenCV read; cut it into tiles'
    # Damaged files raise errors of many types.
    except Exception as error:
        return str(error)
    return (height, width) if turned else (width, height)


def check_images(
    images: list[tuple[str, tuple[int, int]]], source: str, full: bool, findings: Findings
) -> None:
    """Check that images exist and have their annotated sizes."""
    there = []
    for path, size in progress(images, len(images), 'images listed'):
        if not osp.isfile(path):
            findings.error(f'image of {source} does not exist', path)
        else:
            there.append((path, size))
    chosen = sample(there, full)
    sizes = in_threads(read_size, [path for path, _ in chosen], 'image sizes')
    for (path, annotated), size in zip(chosen, sizes, strict=True):
        if isinstance(size, str):
            findings.error('image cannot be read', f'{path} ({size})')
        elif size != annotated:
            findings.error(
                f'image has another size (EXIF rotation applied) than in {source}',
                f'{path} is {size[0]}x{size[1]} and not {annotated[0]}x{annotated[1]}',
            )
