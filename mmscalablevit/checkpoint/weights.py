# Copyright (c) mmscalablevit contributors. All rights reserved.
"""Where checkpoints come from: paths and addresses, and the released weights by name.

``scalablevit://small``, ``scalablevit://base`` and ``scalablevit://large`` are the ImageNet-1K
weights of the authors, which their README links on Google Drive. ``scalablevit://small?sha256=HEX``
takes a file of that hash alone.
"""

import hashlib
import os
import os.path as osp
import re
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlparse
from urllib.request import url2pathname

import torch
from filelock import FileLock
from mmengine.fileio import get_local_path
from mmengine.logging import print_log
from mmengine.runner import CheckpointLoader
from mmengine.runner.checkpoint import get_external_models, get_torchvision_models

from ..errors import CheckpointError, one_line
from .reading import find_weights, read_checkpoint


class Released(NamedTuple):
    """A released file: its Drive id, that of its training log, and the published top-1 in %."""

    weights: str
    log: str
    top1: float

    @property
    def link(self) -> str:
        """The page to open in a browser."""
        return f'https://drive.google.com/file/d/{self.weights}/view'


# Of image_classification/README.md in the authors' repository.
RELEASED = dict(
    small=Released('1gCWsATBJmW3xwJaoCcxGO1Wbg51cPtzk', '1QcvWak1fKplbxF7FuwugUaBaCLOxMNVb', 83.1),
    base=Released('16MVmK4BGQpRH3Wz2VCOVzhTh2PFUFozH', '1MBInNLsxJhJKkZUatDwEh6o32exmM0Sq', 84.1),
    large=Released('17LLK5PSssMpepxeAt6-uKSd4aaV99u5X', '1lDYQPm2FAGvzYcneJaR_x-UZ6kd3Tho_', 84.4),
)
# Further attempts to download, after 60 seconds without a byte.
_RETRIES = 2
_ZOOS = dict.fromkeys(('torchvision', 'modelzoo'), get_torchvision_models)
_ZOOS |= dict.fromkeys(('open-mmlab', 'openmmlab'), get_external_models)
# All that mmengine registers.
_PREFIXES = ['', 'http://', 'https://', *(f'{zoo}://' for zoo in _ZOOS), 'mmcls://', 'pavi://']
_PREFIXES += [r'(\S+\:)?s3://', r'(\S+\:)?petrel://']


def use_safe_loader() -> None:
    """Make mmengine read every checkpoint of this process without running pickled code."""
    CheckpointLoader.register_scheme(_PREFIXES, load_from_address, force=True)


# mmengine's log line shows the name of a loader without its first ten letters.
def load_from_address(address: str, map_location: str | torch.device | None = None) -> dict:
    """Read a checkpoint from a path or an address with :func:`read_checkpoint`."""
    scheme, _, name = address.rpartition('://')
    if scheme in _ZOOS:
        url = _ZOOS[scheme]().get(name)
        if url is None:
            raise CheckpointError(f'checkpoint {address}: mmengine knows no such model')
        return load_from_address(url, map_location)
    if scheme in ('http', 'https'):
        checkpoint = read_checkpoint(download(address), map_location)
    elif scheme in ('', 'file'):
        path = url2pathname(urlparse(address).path) if scheme else address
        checkpoint = read_checkpoint(path, map_location)
    else:
        try:
            with get_local_path(address) as path:
                checkpoint = read_checkpoint(str(path), map_location)
        except (KeyError, ImportError) as error:
            raise CheckpointError(
                f'checkpoint {address}: no file backend of mmengine reads such an address ({error})'
            ) from error
    if isinstance(checkpoint.get('state_dict'), dict):
        checkpoint['state_dict'] = find_weights(checkpoint, address)
    return checkpoint


def download(url: str) -> str:
    """Download a checkpoint, once for all processes of this machine."""
    return _cached(osp.basename(urlparse(url).path), partial(_download, url))


def _cached(name: str, fetch: Callable[[str], None]) -> str:
    """A file of torch hub's cache, into which one process fetches what is not there."""
    path = osp.join(torch.hub.get_dir(), 'checkpoints', name)
    if not osp.isfile(path):
        os.makedirs(osp.dirname(path), exist_ok=True)
        with FileLock(f'{path}.lock'):
            if not osp.isfile(path):
                fetch(path)
    return path


def _download(url: str, path: str) -> None:
    # Published files carry eight or more digits of their hash; fewer may be a word's end.
    digits = re.search(r'-([0-9a-f]{8,})\.', osp.basename(path))
    print_log(f'Downloading {url} to {path}', logger='current')
    try:
        torch.hub.download_url_to_file(url, path, digits and digits[1], progress=False)
    # A wrong hash is a RuntimeError, a network failure an OSError.
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f'checkpoint {url} cannot be downloaded ({error})') from error


def fetch_released(address: str) -> str:
    """Download released weights, once, to the cache of torch hub, and return the whole file's path.

    Args:
        address (str): ``scalablevit://SIZE`` or ``scalablevit://SIZE?sha256=HEX``, where SIZE is
            'small', 'base' or 'large', and HEX eight or more digits of the file's SHA-256.

    Raises:
        CheckpointError: If it cannot be downloaded or has another hash; the message says where
            the file is and where to put it.

    Example:
        >>> fetch_released('scalablevit://small')  # doctest: +SKIP
        '~/.cache/torch/hub/checkpoints/scalablevit-small_in1k.pth'
    """
    parts = re.fullmatch(r'scalablevit://(\w+)(\?sha256=([0-9a-fA-F]{8,64})?)?', address)
    if not parts or parts[1] not in RELEASED:
        raise CheckpointError(
            f'checkpoint {address}: released weights are '
            f'{", ".join(f"scalablevit://{name}" for name in RELEASED)}, with ?sha256=HEX of 8 to '
            '64 digits to take that file alone'
        )
    size = parts[1]
    path = _cached(f'scalablevit-{size}_in1k.pth', partial(_download_released, size))
    digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    if not digest.startswith((parts[3] or '').lower()):
        raise CheckpointError(
            f'checkpoint {address}: the SHA-256 of {path} is {digest}; remove the file to download '
            'it again, or the hash from the address'
        )
    print_log(f'{address} is {path}, SHA-256 {digest}', logger='current')
    return path


def _download_released(size: str, path: str) -> None:
    """Put a released file in its place, or nothing."""
    released = RELEASED[size]
    by_hand = f'open {released.link} in a browser and save the file as {path}'
    try:
        import gdown
    except ImportError as error:
        raise CheckpointError(
            f'checkpoint scalablevit://{size} needs the package gdown (pip install gdown), or '
            f'{by_hand}'
        ) from error
    with tempfile.TemporaryDirectory(dir=osp.dirname(path), prefix='scalablevit-') as folder:
        part = osp.join(folder, 'download.pth')
        try:
            limits = dict(timeout=60, retries=_RETRIES)
            gdown.download(id=released.weights, output=part, use_cookies=False, **limits)
            read_checkpoint(part, map_location='cpu')
        # The errors of requests are OSErrors.
        except (CheckpointError, gdown.DownloadError, OSError) as error:
            reason = one_line(str(error).replace(part, 'that was downloaded'), 200)
            raise CheckpointError(
                f'checkpoint scalablevit://{size} cannot be downloaded ({reason}); {by_hand}'
            ) from error
        # gdown's is for its owner alone.
        os.chmod(part, 0o644)
        os.replace(part, path)
