"""Cores of this machine, and memory of its devices."""

from __future__ import annotations

import ctypes
import errno
import gc
import os
import platform
import sys
from contextlib import suppress
from pathlib import Path

import psutil
import torch

GIB = 2**30
_CGROUP = Path("/sys/fs/cgroup/memory.max")


def free_bytes(device: torch.device) -> int:
    """Return the free bytes of a GPU, or of main memory within the process's limits."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(free + unused)
    free = psutil.virtual_memory().available
    if _CGROUP.exists() and (limit := _CGROUP.read_text().strip()) != "max":
        free = min(free, int(limit) - resident_bytes())
    return int(free)


def taken_bytes(device: torch.device) -> int:
    """Return the bytes of a device's memory that this process holds."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else resident_bytes()


def resident_bytes() -> int:
    """Return the main memory of this process."""
    return int(psutil.Process().memory_info().rss)


def out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out: on a GPU, in main memory, or by the process's limit."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    # torch's allocator for the CPU, the system, safetensors, C++.
    signs = (
        "can't allocate memory",
        "can't start new thread",
        "Cannot allocate memory",
        "os error 12",
        "bad_alloc",
    )
    return any(sign in str(error) for sign in signs)


def release_memory() -> None:
    """Give memory that was freed back to the system.

    The C library keeps what it was asked for in small pieces: gigabytes after a pass of statistics,
    which would count in every later run of the process.
    """
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):  # Another C library than glibc.
            ctypes.CDLL(None).malloc_trim(0)


def device_name(device: torch.device) -> str:
    """Return the model of a GPU, or of this machine's CPU as far as the system tells."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    described = Path("/proc/cpuinfo")
    lines = described.read_text().splitlines() if described.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "cpu"


def cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
