"""The machine's memory: how much there is, and keeping freed blocks in the process, since training on a CPU allocates
and frees the same large ones in every step.
"""

import ctypes
import os
import sys
from pathlib import Path

import torch

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # glibc's malloc.h


def keep_freed_memory() -> bool:
    """Ask glibc not to hand large freed blocks back to the kernel, which would fault every page in again.

    For the whole process, and only where there is glibc; True if it took effect. It changes no result.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, 2**31 - 4096) and mallopt(M_TOP_PAD, 64 << 20))


def machine_bytes(device: torch.device) -> int:
    """All the memory that there is for a process: of its GPU, or of the machine, or of the container it is in."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            said = Path(path).read_text(encoding="ascii").strip()
        except OSError:
            continue
        limits += [int(said)] if said.isdecimal() else []  # "max": no limit
    return min(limits)
