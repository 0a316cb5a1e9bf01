"""Weights on large pages: a decoded token reads all weights that it uses once, and the processor has to find each page.

The pages of a model that is going to serve are put together where they lie, without another buffer: Linux moves those
of an aligned block (2 MiB on most machines) into one, from 6.1 on at once. It is asked for blocks alone that are
weights for the most part; what else lies in them is moved as well, and no address changes. Elsewhere nothing happens.
"""

import ctypes
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path

from torch import Tensor, nn

LEAST = 32 << 20  # bytes of weights: fewer stay in the processor's own memory
COVERED = 7 / 8  # of a block, at least, are weights: a model grows by a seventh at most, where there are gaps
AT_ONCE = 32  # blocks
SECONDS = 10.0  # some gigabytes a second are moved; the rest is left to Linux, which does so by and by

_HUGEPAGE, _COLLAPSE = 14, 25  # Linux' numbers of advice
_SETTINGS = Path("/sys/kernel/mm/transparent_hugepage")


def lay_on_large_pages(tensors: Iterable[Tensor]) -> int:
    """Move tensors on the CPU; how many bytes, theirs for the most part, now lie so, moved by this call or before."""
    lies = {}
    for t in tensors:
        if type(t) in (Tensor, nn.Parameter) and t.device.type == "cpu":
            lies[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
    if sum(lies.values()) < LEAST or not (size := block_size()):
        return 0
    covered = Counter[int]()
    for start, count in lies.items():
        for block in range(start // size, -(-(start + count) // size)):
            covered[block] += min(start + count, (block + 1) * size) - max(start, block * size)
    until = time.monotonic() + SECONDS
    moved = 0
    for first, stop in _runs(sorted(block for block, count in covered.items() if count >= COVERED * size)):
        place = first * size, (stop - first) * size
        _advise(*place, _HUGEPAGE)
        if time.monotonic() < until and _advise(*place, _COLLAPSE):
            moved += place[1]
    return moved


def _runs(blocks: Sequence[int]) -> Iterator[tuple[int, int]]:
    """(first, stop) of blocks that follow each other, some at a time: each time is one call, which nothing can stop."""
    first = 0
    for i in range(1, len(blocks) + 1):
        if i == len(blocks) or blocks[i] != blocks[i - 1] + 1 or i - first == AT_ONCE:
            yield blocks[first], blocks[i - 1] + 1
            first = i


@cache
def block_size() -> int:
    """Bytes of a large page; 0 where there are none, or nobody is to have any."""
    try:
        if not sys.platform.startswith("linux") or "[never]" in (_SETTINGS / "enabled").read_text():
            return 0
        return int((_SETTINGS / "hpage_pmd_size").read_text())
    except (OSError, ValueError):
        return 0


@cache
def _madvise() -> Callable[[int, int, int], int]:
    function = ctypes.CDLL(None).madvise
    function.argtypes, function.restype = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int], ctypes.c_int
    return function


def _advise(start: int, size: int, advice: int) -> bool:
    """Whether it was taken: Linux refuses what it does not know, and memory that is a file's or someone else's too."""
    return _madvise()(start, size, advice) == 0
