"""A row of documents that several processes read together, each a contiguous part of it (context parallelism).

A part may begin and end anywhere: in the middle of a document, of a window, of a group that is being compressed. So a
layer asks its neighbours for two things, with gradients flowing back: what comes `before` its own rows (window rows,
and the rows of a group that is still open where the part begins), and the entries of `everyone`, which each process
makes of the groups that close in its part (of s tokens they are few: s/4 or s/128). What a token may see of either is
planned on the host from the lengths of all documents, as in segments.py; nothing is padded.

How rows travel is left to the `Neighbours` that a shard is given (train/parallel/context.py).
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from dsv4.config import LayerKind, ModelConfig
from dsv4.model.parts import Groups, Part, ragged, rows_before, spans
from dsv4.model.rope import frequencies, turns
from dsv4.model.segments import IndexPhase, Run, Segment, check_segments


class Neighbours(Protocol):
    """The processes that read the same row. Every one of them makes the same calls, in the same order."""

    def before(self, rows: Tensor, count: int) -> Tensor:
        """The `count` rows that lie before this process's own `rows` [n, ...] in the whole row, or as many as there
        are: [m, ...]. Their gradients go to those who have them."""
        ...

    def everyone(self, rows: Tensor, counts: list[int]) -> Tensor:
        """The rows of all processes, in order; counts: how many each has. Gradients are summed where the rows are."""
        ...

    def summed(self, numbers: Tensor) -> Tensor:
        """The sum over the processes, without a gradient."""
        ...


@dataclass(frozen=True)
class Row:
    """A whole row: its documents, and how it is cut. borders: the first token of each part, then the row's end."""

    lengths: list[int]
    borders: list[int]

    @cached_property
    def starts(self) -> np.ndarray:
        """int64 [documents]: the first token of each."""
        return rows_before(np.array(self.lengths))

    def document_of(self, first: int, stop: int) -> np.ndarray:
        """The document of each token from `first` to `stop`, int64."""
        return np.searchsorted(self.starts, np.arange(first, stop), side="right") - 1


class Shard(list[Segment]):
    """The segments of one process's part of a row: pieces of documents, of which the first may have begun before.

    place: which part. following, targets_after: int64 [n], for each own token the token after it and that one's target,
    which may be the next process's; where a document ends, anything and -100. counted: how many documents, from the
    first on, count; those after them are there for a process that would have nothing to do.
    """

    def __init__(
        self,
        row: Row,
        place: int,
        following: Tensor,
        targets_after: Tensor,
        neighbours: Neighbours | None,
        counted: int,
    ):
        self.row, self.place, self.neighbours, self.counted = row, place, neighbours, counted
        self.following, self.targets_after = following, targets_after
        self.first, self.stop = row.borders[place], row.borders[place + 1]
        assert self.first < self.stop, "every process has at least one token"
        documents = row.document_of(self.first, self.stop)
        self.documents = torch.from_numpy(documents)  # int64 [n], on the host
        _, counts = np.unique(documents, return_counts=True)
        self.started = self.first - int(row.starts[documents[0]])  # tokens of the first document before this part
        super().__init__(Segment(int(n)) for n in counts)

    @property
    def is_whole(self) -> bool:
        """Whether there is nobody to share the row with."""
        return len(self.row.borders) == 2

    def summed(self, numbers: Tensor) -> Tensor:
        """The sum over all that have parts of the row, without a gradient."""
        return numbers if self.neighbours is None else self.neighbours.summed(numbers)

    @cached_property
    def ends(self) -> Tensor:
        """bool [n], on the host: where a document ends."""
        stops = self.row.starts + np.array(self.row.lengths) - 1
        return torch.from_numpy(np.isin(np.arange(self.first, self.stop), stops))


@dataclass(frozen=True)
class Joined:
    """`Part.shared` of a part of a row. reach: window rows before a token; counts: entries of each process, by kind."""

    neighbours: Neighbours
    reach: int
    counts: dict[str, list[int]]

    def window(self, own: Tensor) -> Tensor:
        return self._joined(own, self.reach)

    def rows(self, own: Tensor, kind: LayerKind) -> Tensor:
        return self._joined(own, _open_rows(kind))

    def entries(self, own: Tensor, kind: LayerKind) -> Tensor:
        return self.neighbours.everyone(own, self.counts[kind.name])

    def _joined(self, own: Tensor, count: int) -> Tensor:
        return torch.cat([self.neighbours.before(own, count), own])


class ShardRun(Run):
    """A planned run of one process's part of a row."""

    is_causal = False  # whole blocks in one call plan for themselves, and know nothing of neighbours
    is_shared = True

    def __init__(self, config: ModelConfig, shard: Shard, device: torch.device, phase: IndexPhase):
        super().__init__(config, shard, device, phase)
        self.shard = shard
        self.starts[0] = shard.started

    @cached_property
    def parts(self) -> list[Part]:
        shard, row, config = self.shard, self.shard.row, self.config
        assert shard.neighbours is not None
        reach = config.sliding_window - 1  # the window counts the token itself
        token = np.arange(shard.first, shard.stop)
        begins = row.starts[shard.documents.numpy()]
        base = max(0, shard.first - reach)  # the first row that is there
        window = spans(np.maximum(token - reach, begins) - base, token + 1 - base)
        groups, counts = {}, {}
        for kind in config.compressed_kinds:
            groups[kind.name], counts[kind.name] = self._groups(kind)
        shared = Joined(shard.neighbours, reach, counts)
        nothing = np.zeros(0, dtype=np.int64)
        return [Part(None, None, [], window, None, None, nothing, groups, None, shared)]

    def _groups(self, kind: LayerKind) -> tuple[Groups, list[int]]:
        """The groups of a kind that close in this part, and how many close in each part."""
        shard, row, r = self.shard, self.shard.row, kind.ratio
        number = np.array(row.lengths) // r  # of groups in each document
        group = ragged(np.zeros_like(number), number)
        begins = np.repeat(row.starts, number) + group * r  # the first token of each group of the whole row
        cuts = np.searchsorted(begins + r - 1, row.borders)
        own = slice(*cuts[shard.place : shard.place + 2].tolist())
        base = max(0, shard.first - _open_rows(kind))
        of_token = shard.documents.numpy()
        entry = rows_before(number)[of_token]  # the first entry of each token's document
        closed = (np.arange(shard.first, shard.stop) - row.starts[of_token] + 1) // r
        position = self._to_device(group[own] * r)
        found = Groups(
            kind=kind,
            closing=len(group[own]),
            first_row=self._to_device(begins[own] - base),
            has_previous=self._to_device(group[own] > 0),
            turn=turns(frequencies(self.config, "compressed"), position),
            visible=spans(entry, entry + closed),
            rows=None,
            entry=None,
        )
        return found, np.diff(cuts).tolist()


def _open_rows(kind: LayerKind) -> int:
    """How many rows before a token may belong to the group that it closes, or to the one before that."""
    return kind.ratio - 1 + (kind.ratio if kind.overlap else 0)


def plan_shard(config: ModelConfig, shard: Shard, device: torch.device, phase: IndexPhase = "off") -> ShardRun:
    """Plan a run of one process's part of a row. UserError as `check_segments` says."""
    check_segments(config, [Segment(n) for n in shard.row.lengths])
    assert config.attention == "compressed", "settings are refused that share rows of other attention"
    return ShardRun(config, shard, device, phase)
