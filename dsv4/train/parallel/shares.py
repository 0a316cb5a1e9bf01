"""Which part of a batch a process reads: whole documents of its own, or with others a part of a row of documents.

Every process has the whole batch (ids are few), so that all know how it is cut without asking each other, and the mean
that a loss is a share of. A process for which there is no document gets idle ones, of a single token that predicts
nothing: it has to take part in everything that the others do together.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from dsv4.model.head import IGNORE
from dsv4.model.shards import Neighbours, Row, Shard
from dsv4.train.batches import Batch, split


class Share(NamedTuple):
    """What a process computes of a batch: ids, targets int64 [n], and the documents or pieces that they are."""

    ids: Tensor
    targets: Tensor
    segments: list[int] | Shard


def share_of(
    batch: Batch, number: int, count: int, place: int, parts: int, neighbours: Callable[[list[int]], Neighbours | None]
) -> Share:
    """Part `place` of `parts` of row `number` of the `count` rows that a batch is cut into."""
    rows = split(batch, count)
    lengths = rows[number].lengths if number < len(rows) else []
    idle = max(0, parts - sum(lengths))
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
    return Share(ids[own], targets[own], shard)
