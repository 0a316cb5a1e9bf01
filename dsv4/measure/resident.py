"""How much of the machine's memory this process has: now, and at most since a moment.

Linux says both in /proc and forgets the peak when it is asked to. Elsewhere only the peak since the start is known.
"""

import os
import resource
import sys
from pathlib import Path

_ME = Path("/proc/self")


def resident_bytes() -> int | None:
    """Bytes of this process that are in memory now; None where that is not told."""
    try:
        return int((_ME / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return None


def forget_peak() -> bool:
    """Let the peak begin anew; False where it counts from the start of the process."""
    try:
        (_ME / "clear_refs").write_text("5")
    except OSError:
        return False
    return True


def peak_bytes() -> int:
    """The most bytes that this process had in memory, since `forget_peak` or its start."""
    try:
        lines = (_ME / "status").read_text().splitlines()
    except OSError:
        unit = 1 if sys.platform == "darwin" else 1024
        return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
