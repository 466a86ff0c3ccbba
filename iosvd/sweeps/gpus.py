"""Parallel processes on one machine: each leases a GPU, and none outlives its launcher."""

from __future__ import annotations

import functools
import getpass
import logging
import os
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path

import psutil
import torch
from filelock import FileLock, Timeout

from iosvd.errors import ConfigError, plain, shortened
from iosvd.system.files import process_lock, write_text

log = logging.getLogger(__name__)
VISIBLE = "CUDA_VISIBLE_DEVICES"
# Lets torch count GPUs without starting CUDA, which would ignore later changes of the variable.
COUNT_ONLY = "PYTORCH_NVML_BASED_CUDA_CHECK"
# CUDA's names of devices: an index, or the UUID of a GPU or of a MIG slice.
_DEVICE = re.compile(r"[0-9]+|(GPU|MIG)-[\w/-]+")


@functools.cache
def take_gpu() -> FileLock | None:
    """Lease one of the machine's GPUs to this process until it ends; None if there is no GPU.

    The lease is a locked file, which the system releases however the process ends.

    Raises:
        ConfigError: other processes hold all GPUs.
    """
    gpus = visible_gpus()
    if not gpus:
        return None
    lease, gpu = lease_one(gpus, Path(tempfile.gettempdir()) / f"iosvd-gpus-{_user()}")
    os.environ[VISIBLE] = gpu
    log.info("this process has GPU %s", gpu)
    return lease


def visible_gpus() -> list[str]:
    """Return the GPUs that this process may use, by index or by name.

    Like CUDA, it reads CUDA_VISIBLE_DEVICES up to the first entry that is no device, such as -1.
    """
    named = os.environ.get(VISIBLE)
    if named is None:
        return [str(index) for index in range(torch.cuda.device_count())]
    found = []
    for name in map(str.strip, named.split(",")):
        if not _DEVICE.fullmatch(name):
            break
        found.append(name)
    return found


def lease_one(gpus: Sequence[str], folder: Path) -> tuple[FileLock, str]:
    """Return the first free GPU, and the lock that is its lease.

    Raises:
        ConfigError: other processes hold all GPUs; they are named.
    """
    _make_private(folder)
    taken = []
    with process_lock(folder / "all.lock"):  # One process at a time looks for a GPU.
        for gpu in gpus:
            name = re.sub(r"[^\w-]", "_", gpu)  # A MIG's name has slashes.
            path, note = folder / f"{name}.lock", folder / f"{name}.holder"
            lock = process_lock(path, timeout=0)
            try:
                lock.acquire()
            except Timeout:
                holder = _holder(note)
                if holder is not None:
                    taken.append(f"{gpu} by process {holder}")
                    continue
                # Its process has ended, but a fork of it has inherited the lock.
                path.unlink(missing_ok=True)
                lock.acquire()
            write_text(note, str(os.getpid()))
            return lock, gpu
    raise ConfigError(
        f"all {len(gpus)} GPUs of this machine are taken: {', '.join(taken)}; wait for them, end"
        " them, or lower runtime.workers"
    )


def _holder(note: Path) -> str | None:
    """Return the process that wrote the note and its command, None if it has ended."""
    try:
        process = psutil.Process(int(note.read_text(encoding="utf-8")))
        return f"{process.pid} ({shortened(plain(' '.join(process.cmdline())), 60)})"
    except psutil.AccessDenied as error:
        return str(error.pid)
    except psutil.NoSuchProcess:
        return None
    except (OSError, ValueError):
        return "unknown"


def _make_private(folder: Path) -> None:
    """Make a folder of this user in a place where all users write."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    owner = folder.lstat().st_uid
    if folder.is_symlink() or (hasattr(os, "getuid") and owner != os.getuid()):
        raise ConfigError(f"{folder} belongs to somebody else; set TMPDIR to a folder of your own")


def _user() -> str:
    # In containers a user may have no name.
    return str(os.getuid()) if hasattr(os, "getuid") else getpass.getuser()
