"""Cores of this machine, and memory of its devices."""

from __future__ import annotations

import os
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


def cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
