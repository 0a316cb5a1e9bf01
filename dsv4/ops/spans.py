"""Which rows of a pool each query may read, when those rows are consecutive.

Window keys and compressed entries are laid out in the order of their tokens, so what a query sees of either is one
interval [start, stop) of a pool. `Spans` holds the n intervals on the host, where block loops are planned without
waiting for a device, and makes masks of single blocks only: nothing of shape queries x pool is ever held.
"""

from collections.abc import Iterator

import torch
from torch import Tensor


class Spans:
    """n intervals [start_i, stop_i) of pool rows, int64, non-decreasing in both ends; empty ones are allowed."""

    def __init__(self, start: Tensor, stop: Tensor):
        assert start.dtype == stop.dtype == torch.int64 and start.shape == stop.shape
        assert start.device.type == stop.device.type == "cpu", "spans are planned on the host"
        self.start, self.stop = start, stop
        self._on: dict[torch.device, tuple[Tensor, Tensor]] = {}
        self._starts, self._stops = (
            start.numpy(),
            stop.numpy(),
        )  # plain numbers are read from these at a tenth of the cost
        self.longest = int((self._stops - self._starts).max(initial=0))

    def __len__(self) -> int:
        return len(self._starts)

    def of(self, rows: Tensor) -> "Spans":
        """The intervals of some queries, int64 [m] on the host, in ascending order."""
        return Spans(self.start[rows], self.stop[rows])

    def blocks(self, size: int) -> Iterator[tuple[int, int]]:
        """Query blocks [i, j) of at most `size` rows."""
        for i in range(0, len(self), size):
            yield i, min(i + size, len(self))

    def union(self, i: int, j: int) -> tuple[int, int]:
        """The smallest interval that holds the intervals of queries i..j-1."""
        start = int(self._starts[i])
        return start, max(start, int(self._stops[j - 1]))

    def longest_of(self, i: int, j: int) -> int:
        """The length of the longest of the intervals of queries i..j-1."""
        return int((self._stops[i:j] - self._starts[i:j]).max())

    def on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """(start, stop) on `device`, copied once."""
        if device not in self._on:
            self._on[device] = (self.start.to(device), self.stop.to(device))
        return self._on[device]

    def hidden(self, i: int, j: int, lo: int, hi: int, device: torch.device) -> Tensor:
        """bool [j-i, hi-lo]: True where query i+a must not read pool row lo+b."""
        start, stop = self.on(device)
        row = torch.arange(lo, hi, device=device)
        return (row < start[i:j, None]) | (row >= stop[i:j, None])
