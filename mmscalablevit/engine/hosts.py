# Copyright (c) mmscalablevit contributors. All rights reserved.
"""Processes of one job: connecting them, noticing a lost host, closing what connects them."""

import contextlib
import gc
import logging
import os
import socket
import struct
import subprocess
import sys
import threading

import torch
from mmengine.dist import barrier, broadcast_object_list, get_rank, is_distributed
from mmengine.logging import print_log

_GET_ADDRESS = 0x8915  # Linux's SIOCGIFADDR.


def connect_cpus(launcher: str) -> None:
    """Connect the processes of a job by gloo; mmengine would select a CUDA device first."""
    if launcher == 'slurm':
        _read_slurm()
    interface = _interface(os.environ['MASTER_ADDR'])
    if interface:
        # By default gloo takes that of the host's name, which may be the loopback.
        os.environ.setdefault('GLOO_SOCKET_IFNAME', interface)
    torch.distributed.init_process_group('gloo')
    print_log('No accelerator: gloo on CPU, where BN layers are not synchronized', 'current')


def _read_slurm() -> None:
    names = dict(RANK='PROCID', WORLD_SIZE='NTASKS', LOCAL_RANK='LOCALID')
    os.environ.update({name: os.environ[f'SLURM_{of}'] for name, of in names.items()})
    if 'MASTER_ADDR' not in os.environ:
        command = ['scontrol', 'show', 'hostnames', os.environ['SLURM_NODELIST']]
        os.environ['MASTER_ADDR'] = subprocess.check_output(command, text=True).split()[0]
    os.environ.setdefault('MASTER_PORT', '29500')


def _interface(master: str) -> str | None:
    """Name of the network interface of this host from which it reaches the master."""
    import fcntl  # Of Unix alone.

    with contextlib.suppress(OSError), socket.socket(type=socket.SOCK_DGRAM) as probe:
        # Sends nothing, but finds the route.
        probe.connect((master, 9))
        address = socket.inet_aton(probe.getsockname()[0])
        for _, name in socket.if_nameindex():
            request = struct.pack('256s', name.encode())
            with contextlib.suppress(OSError):
                if fcntl.ioctl(probe, _GET_ADDRESS, request)[20:24] == address:
                    return name
    return None


def watch_hosts() -> None:
    """End this process a minute after its host or that of rank 0 was lost to the other."""
    count = int(os.environ.get('GROUP_WORLD_SIZE') or os.environ.get('SLURM_NNODES', 1))
    if count == 1:
        return
    links: list[socket.socket] = []
    server = socket.create_server(('', 0)) if get_rank() == 0 else None
    port = [server.getsockname()[1] if server else None]
    broadcast_object_list(port)
    if server:
        # Longer than it takes the others, which are there, to connect.
        server.settimeout(60)
        links = [server.accept()[0] for _ in range(count - 1)]
        server.close()
    elif os.environ['LOCAL_RANK'] == '0':
        links = [socket.create_connection((os.environ['MASTER_ADDR'], port[0]))]
    for link in links:
        link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in dict(KEEPIDLE=10, KEEPINTVL=10, KEEPCNT=5).items():
            link.setsockopt(socket.IPPROTO_TCP, getattr(socket, f'TCP_{option}'), value)
        threading.Thread(target=_watch, args=[link], daemon=True).start()


def _watch(link: socket.socket) -> None:
    try:
        # Nothing is sent: this ends with the process at the other end, or with the link.
        link.recv(1)
    except OSError as error:
        message = f'The link to another host of this job is broken ({error}); this process ends'
        print_log(message, 'current', logging.ERROR)
        # Its main thread may wait in a call that nothing interrupts.
        os._exit(1)


class Ending:
    """How this process ends in a distributed job."""

    _failed = False

    def __enter__(self) -> None:
        # Until it is known how what is begun here ends.
        self._failed = True

    def __exit__(self, kind: type[BaseException] | None, *_) -> None:
        self._failed = kind is not None

    def disconnect(self) -> None:
        """Close what connects the processes; where others may be gone, leave it to the system."""
        if not is_distributed():
            return
        if self._failed:
            # Else threads of gloo abort the process, in place of the exit code of its error.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(1)
        _close_group()


def disconnect() -> None:
    """Wait for the other processes of a distributed job, and close what connects them."""
    if is_distributed():
        barrier()
        _close_group()


def _close_group() -> None:
    # Threads of gloo need Python to release tensors, and abort a process in which it has ended.
    # They end with the group, which lives as long as a model that was wrapped with it.
    gc.collect()
    torch.distributed.destroy_process_group()
