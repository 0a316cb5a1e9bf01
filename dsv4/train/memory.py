"""Keep freed memory in the process: training on a CPU allocates and frees the same large blocks in every step."""

import ctypes
import sys

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
