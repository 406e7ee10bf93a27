# Copyright (c) mmscalablevit contributors. All rights reserved.
"""Download data sets from their owners, continue where it stopped, unpack and check.

COCO and ADE20K are unpacked as the configs read them, BCCD, nuclei and CamVid as
``train_all.py --raw`` does.
"""

import argparse
import hashlib
import http.client
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
import zipfile
from pathlib import Path

import small_data
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn

from mmscalablevit import cli
from mmscalablevit.errors import UserError

# By data set: addresses with size in bytes (0: unknown) and SHA-256 or SHA-1, as TensorFlow
# Datasets publishes them of COCO and GluonCV of ADE20K ('': none is published).
ARCHIVES = dict(
    coco={
        'http://images.cocodataset.org/annotations/annotations_trainval2017.zip': (
            252907541,
            '113a836d90195ee1f884e704da6304dfaaecff1f023f49b6ca93c4aaae470268',
        ),
        'http://images.cocodataset.org/zips/val2017.zip': (
            815585330,
            '4f7e2ccb2866ec5041993c9cf2a952bbed69647b115d0f74da7ce8f4bef82f05',
        ),
        'http://images.cocodataset.org/zips/train2017.zip': (
            19336861798,
            '69a8bb58ea5f8f99d24875f21416de2e9ded3178e903f1f7603e283b9e06d929',
        ),
    },
    ade20k={
        'http://data.csail.mit.edu/places/ADEchallenge/ADEChallengeData2016.zip': (
            0,
            '219e1696abb36c8ba3a3afe7fb2f4b4606a897c7',
        ),
    },
)
ARCHIVES |= {
    name: {f'https://github.com/{repository}/archive/{commit}.zip': (0, '')}
    for name, (repository, commit) in small_data.SOURCES.items()
}
FOLDERS = dict(coco='data/coco', ade20k='data/ade') | {
    name: f'data/raw/{name}' for name in small_data.SOURCES
}
CHECK = Path(__file__).parents[1] / 'check_data.py'
AGAIN = 'it was removed, and the same command downloads it again'
BLOCK = 2**20
TRIES = 5
TIMEOUT = 60
WAIT = 5


def progress() -> Progress:
    """A progress bar of bytes, on stderr."""
    columns = ('{task.description}', BarColumn(), DownloadColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True))


def download(address: str, path: Path, size: int) -> None:
    """Download a file, from where an earlier call stopped; broken connections are tried again."""
    part = path.with_name(f'{path.name}.part')
    for left in reversed(range(TRIES)):
        try:
            expected = _fetch(address, part, size)
            break
        except urllib.error.HTTPError as error:
            raise UserError(f'{address} cannot be downloaded: {error}') from error
        except (http.client.HTTPException, urllib.error.URLError, OSError) as error:
            if not left or isinstance(error, FileNotFoundError | PermissionError):
                remedy = 'the same command continues it'
                raise UserError(f'{address} cannot be downloaded: {error}; {remedy}') from error
            time.sleep(WAIT)
    found = part.stat().st_size
    if expected and found != expected:
        part.unlink()
        raise UserError(f'{address} has {found} bytes and not {expected}; it was removed')
    part.rename(path)


def _fetch(address: str, part: Path, size: int) -> int:
    """Append to a file what it lacks; return the size that it should have."""
    start = part.stat().st_size if part.exists() else 0
    if size and start >= size:
        return size
    request = urllib.request.Request(address, headers={'Range': f'bytes={start}-'} if start else {})
    with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
        # A server without ranges sends the whole file.
        start = start if answer.status == http.client.PARTIAL_CONTENT else 0
        length = answer.headers.get('Content-Length')
        total = start + int(length) if length else size
        if size and total != size:
            raise UserError(f'{address} has {total} bytes and not the published {size}')
        # The archive and about as much unpacked.
        free, needed = shutil.disk_usage(part.parent).free, 2 * total - start
        if free < needed:
            lack = f'{free / 1e9:.1f} GB free; {part.stem} needs {needed / 1e9:.1f}'
            raise UserError(f'{part.parent} has {lack}')
        with part.open('ab' if start else 'wb') as file, progress() as bar:
            task = bar.add_task(part.stem, total=total, completed=start)
            while block := answer.read(BLOCK):
                file.write(block)
                bar.advance(task, len(block))
            if total and file.tell() < total:
                raise http.client.IncompleteRead(b'', total - file.tell())
    return total


def verify(path: Path, digest: str) -> None:
    """Compare an archive with the published checksum."""
    found = hashlib.new('sha256' if len(digest) == 64 else 'sha1')
    with progress() as bar, bar.open(path, 'rb', description=f'checksum of {path.name}') as file:
        while block := file.read(BLOCK):
            found.update(block)
    if found.hexdigest() != digest:
        path.unlink()
        fault = f'its checksum is {found.hexdigest()} and not the published {digest}'
        raise UserError(f'{path} is damaged: {fault}; {AGAIN}')


def unpack(path: Path, folder: Path) -> None:
    """Unpack an archive; files that are there with their size are kept."""
    try:
        with zipfile.ZipFile(path) as archive, progress() as bar:
            members = archive.infolist()
            task = bar.add_task(f'unpack {path.name}', total=sum(x.file_size for x in members))
            for member in members:
                target = folder / member.filename
                if not target.is_file() or target.stat().st_size != member.file_size:
                    archive.extract(member, folder)
                bar.advance(task, member.file_size)
    except zipfile.BadZipFile as error:
        path.unlink()
        raise UserError(f'{path} is damaged ({error}); {AGAIN}') from error


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        formatter_class=cli.HelpFormatter,
        description='Download a data set; the same command continues after an interruption.',
        epilog='example: python tools/dataset_converters/download_data.py coco --dir data/coco',
    )
    parser.add_argument('name', choices=ARCHIVES, help='the data set')
    help_ = 'folder; default: data/coco, data/ade or data/raw/NAME'
    parser.add_argument('--dir', type=Path, help=help_)
    parser.add_argument('--keep', action='store_true', help='keep the archives once unpacked')
    return parser.parse_args()


def main() -> None:
    """Download, verify, unpack, check."""
    args = parse_args()
    folder = args.dir or Path(FOLDERS[args.name])
    folder.mkdir(parents=True, exist_ok=True)
    for address, (size, digest) in ARCHIVES[args.name].items():
        path = folder / address.rsplit('/', 1)[1]
        done = path.with_name(f'.{path.name}.unpacked')
        if done.exists():
            continue
        if not path.exists():
            download(address, path, size)
        if digest:
            verify(path, digest)
        if args.name in small_data.SOURCES:
            unpack(path, folder / 'archive')
            small_data.lay_out(args.name, folder / 'archive', folder)
        else:
            unpack(path, folder)
        done.touch()
        if not args.keep:
            path.unlink()
    if args.name in small_data.SOURCES:
        return
    root = folder / 'ADEChallengeData2016' if args.name == 'ade20k' else folder
    sys.exit(subprocess.call([sys.executable, str(CHECK), args.name, '--root', str(root)]))


if __name__ == '__main__':
    cli.run(main)
