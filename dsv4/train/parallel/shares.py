"""Which part of a batch a process reads: whole documents of its own, or with others a part of a row of documents.

Every process has the whole batch (ids are few), so that all know how it is cut without asking each other, and the mean
that a loss is a share of. A process for which there is no document gets idle ones, of a single token that predicts
nothing: it has to take part in everything that the others do together.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dsv4.model.head import IGNORE
from dsv4.model.shards import Neighbours, Row, Shard
from dsv4.train.batches import Batch, split


class Share(NamedTuple):
    """What a process computes of a batch: ids, targets int64 [n], and the documents or pieces that they are. rows:
    which tokens of the batch these are, from the first on; those after them are idle."""

    ids: Tensor
    targets: Tensor
    segments: list[int] | Shard
    rows: range

    @property
    def has_neighbours(self) -> bool:
        """Whether other processes read other parts of the same row."""
        return isinstance(self.segments, Shard) and not self.segments.is_whole

    @property
    def ends(self) -> Tensor:
        """bool [n], on the host: where a document ends."""
        if isinstance(self.segments, Shard):
            return self.segments.ends
        return ends_of(self.segments)


def ends_of(lengths: list[int]) -> Tensor:
    """bool [sum of lengths]: where a document ends."""
    found = torch.zeros(sum(lengths), dtype=torch.bool)
    found[torch.tensor(lengths).cumsum(0) - 1] = True
    return found


class Rows(NamedTuple):
    """Where rows of a process stand among those of all: places int64 [n], of `count`."""

    places: Tensor
    count: int


def rows_of(lengths: list[int], shares: Sequence[Share]) -> tuple[Rows, Rows]:
    """Where the tokens of a process's shares stand in a batch of documents of `lengths`, and those of them that are
    followed by another of their document, which alone the MTP block predicts from, among all such."""
    ends = ends_of(lengths)
    tokens = torch.cat([torch.arange(share.rows.start, share.rows.stop) for share in shares])
    followed = (~ends).cumsum(0) - 1
    return Rows(tokens, len(ends)), Rows(followed[tokens[~ends[tokens]]], len(ends) - len(lengths))


def share_of(
    batch: Batch, number: int, count: int, place: int, parts: int, neighbours: Callable[[list[int]], Neighbours | None]
) -> Share:
    """Part `place` of `parts` of row `number` of the `count` rows that a batch is cut into."""
    rows = split(batch, count)
    lengths = rows[number].lengths if number < len(rows) else []
    begin, real = sum(len(row.ids) for row in rows[:number]), sum(lengths)
    idle = max(0, parts - real)
    ids, targets = torch.zeros(idle, dtype=torch.int64), torch.full((idle,), IGNORE)
    if lengths:
        ids, targets = torch.cat([rows[number].ids, ids]), torch.cat([rows[number].targets, targets])
    counted, lengths = len(lengths), [*lengths, *[1] * idle]
    borders = [len(ids) * part // parts for part in range(parts + 1)]
    row = Row(lengths, borders)
    last = torch.tensor(lengths).cumsum(0) - 1
    after = targets.roll(-1)
    after[last] = IGNORE  # nothing is predicted across a document's end
    own = slice(*borders[place : place + 2])
    shard = Shard(row, place, ids.roll(-1)[own], after[own], neighbours(borders), counted)
    told = range(begin + min(own.start, real), begin + min(own.stop, real))
    return Share(ids[own], targets[own], shard, told)
