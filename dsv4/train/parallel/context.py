"""Context parallelism: how the processes that read one row give each other rows (model/shards.py says which)."""

import torch
import torch.distributed as dist
from torch import Tensor

from dsv4.train.parallel.exchange import exchange


class RowGroup:
    """The neighbours in one row. borders: the first token of each process's part, then the row's end."""

    def __init__(self, group: dist.ProcessGroup, borders: list[int]):
        self.group, self.borders, self.place = group, borders, group.rank()

    def before(self, rows: Tensor, count: int) -> Tensor:
        """The last `count` rows before this process's own, from whoever has them: parts may be shorter than that."""
        first, parts = self.borders[self.place], range(len(self.borders) - 1)
        mine = [self._rows(self.place, reader, count) for reader in parts]
        theirs = [self._rows(owner, self.place, count) for owner in parts]
        sent = torch.cat([rows[start - first : stop - first] for start, stop in mine])
        return exchange(sent, [b - a for a, b in mine], [b - a for a, b in theirs], self.group)

    def everyone(self, rows: Tensor, counts: list[int]) -> Tensor:
        """All to everyone: an all-gather of unequal shares, whose gradient is a reduce-scatter."""
        assert len(rows) == counts[self.place]
        return exchange(torch.cat([rows] * len(counts)), [len(rows)] * len(counts), counts, self.group)

    def summed(self, numbers: Tensor) -> Tensor:
        """The sum over the processes, without a gradient."""
        total = numbers.detach().clone()
        dist.all_reduce(total, group=self.group)
        return total

    def _rows(self, owner: int, reader: int, count: int) -> tuple[int, int]:
        """Which rows of the whole row go from one process to another: an interval, often an empty one."""
        wanted = max(0, self.borders[reader] - count), self.borders[reader]
        start = max(wanted[0], self.borders[owner])
        return start, max(start, min(wanted[1], self.borders[owner + 1]))
