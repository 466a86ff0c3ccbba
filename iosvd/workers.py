"""Processes side by side on one machine: a GPU for each."""

from __future__ import annotations

import functools
import getpass
import logging
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from iosvd.errors import ConfigError

log = logging.getLogger(__name__)
VISIBLE = "CUDA_VISIBLE_DEVICES"
# Lets torch count GPUs without starting CUDA, which would no longer heed the variable above.
COUNT_ONLY = "PYTORCH_NVML_BASED_CUDA_CHECK"


def cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@functools.cache
def take_gpu() -> FileLock | None:
    """Give this process one of the machine's GPUs until it ends; None where there is no GPU.

    The lease is a locked file, which the system lets go of however the process ends.

    Raises:
        ConfigError: other processes have them all.
    """
    named = os.environ.get(VISIBLE)
    gpus = named.split(",") if named else [str(i) for i in range(torch.cuda.device_count())]
    if not gpus:
        return None
    folder = Path(tempfile.gettempdir()) / f"iosvd-gpus-{getpass.getuser()}"
    lease, gpu = lease_one(gpus, folder)
    os.environ[VISIBLE] = gpu
    log.info("this process has GPU %s", gpu)
    return lease


def lease_one(gpus: Sequence[str], folder: Path) -> tuple[FileLock, str]:
    """Return the first GPU that nobody has, and the lock that says so."""
    folder.mkdir(parents=True, exist_ok=True)
    for gpu in gpus:
        lock = FileLock(folder / f"{gpu}.lock", timeout=0)
        try:
            lock.acquire()
        except Timeout:
            continue
        return lock, gpu
    raise ConfigError(
        f"all {len(gpus)} GPUs of this machine are taken by other workers; lower runtime.workers"
    )
