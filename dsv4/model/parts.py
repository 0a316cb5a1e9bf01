"""Where the rows of a part of a run lie, and where each of its tokens may look: planned on the host, in numpy.

The rows of a part's segments lie one after the other, in the order of their tokens, so what a token sees is an interval
(`Spans`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from dsv4.cache import Pages, Ring, SequenceMemory
from dsv4.config import LayerKind, ModelConfig
from dsv4.model.rope import turns
from dsv4.ops import Spans

ToDevice = Callable[[np.ndarray], Tensor]


@dataclass(frozen=True)
class RingRows:
    """Where a call reads and writes a ring, int64 on the device, as rows of its data.

    read: the rows before the part's own ones. order: [read | own rows] in the order of sequences and positions, or None
    if they are in it already. write: where own rows go, and which of them (None: all; a long segment's last ones).
    """

    read: Tensor
    order: Tensor | None
    write: Tensor
    kept: Tensor | None

    def join(self, ring: Ring, own: Tensor) -> Tensor:
        """The rows of a ring before the part's own ones, and its own, in order; `own` rows as they are read."""
        both = torch.cat([ring.format.unpack(ring.data[self.read]), own])
        return both if self.order is None else both[self.order]

    def store(self, ring: Ring, rows: Tensor) -> None:
        """Write a part's rows, in the ring's format."""
        ring.data[self.write] = rows if self.kept is None else rows[self.kept]


@dataclass(frozen=True)
class Groups:
    """The compression groups of one kind that close inside a part, and what its tokens see of the entries.

    first_row, has_previous [G], turn complex64 [G, pairs] are on the device; first_row counts in the rows that the
    part's groups are made of: its own rows, or with memories those of the sequences in which a group closes, `rows`.
    entry: the row of the entries' store where each new one goes. `visible` counts in the pool of entries: the new ones,
    or with memories those of the part's pages.
    """

    kind: LayerKind
    closing: int
    first_row: Tensor
    has_previous: Tensor
    turn: Tensor
    visible: Spans
    rows: RingRows | None
    entry: Tensor | None


@dataclass(frozen=True)
class TokenRows:
    """Where the rows lie of layers that keep one for every token, in their store or, without memory, as they come.

    entry: where the part's own rows go, int64 [n]. visible: what each token sees, of all rows of the part's pages, or
    of the rows `read` (lowrank: those that have left a window, int64 on the device).
    """

    entry: Tensor | None
    visible: Spans
    read: Tensor | None


class Shared(Protocol):
    """What the rows of a part are joined with that other processes have, which read other parts of the same row."""

    def window(self, own: Tensor) -> Tensor:
        """The window rows that the part's tokens may see: those before it, and its own."""
        ...

    def rows(self, own: Tensor, kind: LayerKind) -> Tensor:
        """The rows that the groups are made of which close in the part."""
        ...

    def entries(self, own: Tensor, kind: LayerKind) -> Tensor:
        """The entries of the whole row."""
        ...


@dataclass(frozen=True)
class Part:
    """The segments of a run whose memories lie in one pool, or those without memory.

    tokens: their rows of the run, int64 on the device; None if they are all of it. window: what each token sees of the
    part's window rows, which are those of `ring` before its own, and its own. table, pages: the numbers of the pages
    that the part's sequences have, on the device and on the host. every: for layers that keep a row of every token.
    shared: what the rows are joined with that other processes have, where they read other parts of the same row.
    """

    pool: Pages | None
    tokens: Tensor | None
    memories: list[SequenceMemory]
    window: Spans
    ring: RingRows | None
    table: Tensor | None
    pages: np.ndarray
    groups: dict[str, Groups]
    every: TokenRows | None
    shared: Shared | None = None
    pinned: Tensor | None = None

    def of(self, rows: Tensor) -> Tensor:
        """The part's rows of what has one for each token of the run."""
        return rows if self.tokens is None else rows[self.tokens]


def part_of(
    config: ModelConfig,
    tokens: Tensor | None,
    held: list[tuple[SequenceMemory, np.ndarray]],
    start: np.ndarray,
    count: np.ndarray,
    freq: Tensor,
    to_device: ToDevice,
) -> Part:
    """held: the memories, with the pages that they had when the run was planned."""
    memories = [memory for memory, _ in held]
    pool = memories[0].pool if memories else None
    slot = np.array([m.slot for m in memories])
    reach = config.sliding_window - 1  # the window counts the token itself
    history = np.minimum(start, reach)
    base = rows_before(history + count)  # where each sequence's rows begin in the part's window rows
    row = ragged(base + history, count)
    window = spans(np.maximum(row - reach, np.repeat(base, count)), row + 1)
    ring = (
        None
        if pool is None
        else ring_rows(config.sliding_window + pool.max_rewind, slot, start, count, history, to_device)
    )
    pages = np.zeros(0, dtype=np.int64)
    page_base = np.zeros_like(start)
    if pool is not None and pool.paged:
        filled = -(-(start + count) // pool.page_tokens)
        pages = np.concatenate([table[:n] for (_, table), n in zip(held, filled.tolist(), strict=True)])
        page_base = rows_before(filled)
    every = None
    if any(kind.ratio == 1 for kind in config.trunk_kinds):
        every = _token_rows(config, pool, pages, start, count, page_base, to_device)
    part = Part(pool, tokens, memories, window, ring, None if pool is None else to_device(pages), pages, {}, every)
    for kind in config.compressed_kinds:
        part.groups[kind.name] = _groups(kind, part, slot, start, count, page_base, freq, to_device)
    return part


def _groups(
    kind: LayerKind,
    part: Part,
    slot: np.ndarray,
    start: np.ndarray,
    count: np.ndarray,
    page_base: np.ndarray,
    freq: Tensor,
    to_device: ToDevice,
) -> Groups:
    r, pool = kind.ratio, part.pool
    existing = start // r
    closing = (start + count) // r - existing
    group = ragged(existing, closing)
    stop = (ragged(start, count) + 1) // r  # a group is visible from its last token on
    if pool is None:
        base, first, rows, entry = rows_before(closing), rows_before(count), None, None
    else:
        per_page = pool.page_tokens // r
        base = page_base * per_page
        entry = group  # none, most often
        if len(group):
            entry = part.pages[np.repeat(page_base, closing) + group // per_page] * per_page + group % per_page
        carried = np.where(closing > 0, start % r + np.where(existing > 0, r if kind.overlap else 0, 0), 0)
        own = np.where(closing > 0, count, 0)
        first = rows_before(carried + own) + carried
        size = r * (2 if kind.overlap else 1) + pool.max_rewind
        rows = ring_rows(size, slot, start, count, carried, to_device, own)
    base = np.repeat(base, count)
    token = group * r  # the first of each group, by whose position an entry rotates
    return Groups(
        kind=kind,
        closing=len(group),
        first_row=to_device(token + np.repeat(first - start, closing) if len(group) else token),
        has_previous=to_device(group > 0),
        turn=turns(freq, to_device(token)),
        visible=spans(base, base + stop),
        rows=rows,
        entry=None if entry is None else to_device(entry),
    )


def _token_rows(
    config: ModelConfig,
    pool: Pages | None,
    pages: np.ndarray,
    start: np.ndarray,
    count: np.ndarray,
    page_base: np.ndarray,
    to_device: ToDevice,
) -> TokenRows:
    base = rows_before(count) if pool is None else page_base * pool.page_tokens  # each sequence's first row
    seen = ragged(start, count) + 1

    def place(rows: np.ndarray) -> np.ndarray:
        """Rows of the part's sequences -> rows of the store."""
        return rows if pool is None else pages[rows // pool.page_tokens] * pool.page_tokens + rows % pool.page_tokens

    entry = None if pool is None else to_device(place(ragged(base + start, count)))
    if config.attention != "lowrank":
        return TokenRows(entry, spans(np.repeat(base, count), np.repeat(base, count) + seen), None)
    left = np.maximum(start + count - config.sliding_window, 0)  # have left the window of the last token
    read, base = to_device(place(ragged(base, left))), np.repeat(rows_before(left), count)
    return TokenRows(entry, spans(base, base + np.maximum(seen - config.sliding_window, 0)), read)


def ring_rows(
    size: int,
    slot: np.ndarray,
    start: np.ndarray,
    count: np.ndarray,
    before: np.ndarray,
    to_device: ToDevice,
    own: np.ndarray | None = None,
) -> RingRows:
    """A ring of `size` rows: `before` rows of each sequence precede its own, of which `own` are joined to them."""
    own = count if own is None else own
    read = ragged(start - before, before)
    order = None
    if len(start) > 1:
        order = np.empty(int(before.sum() + own.sum()), dtype=np.int64)
        at = rows_before(before + own)
        order[ragged(at, before)] = np.arange(len(read))
        order[ragged(at + before, own)] = len(read) + ragged(rows_before(count), own)
        order = to_device(order)
    kept, at = None, start
    if int(count.max()) > size:
        stay = np.minimum(count, size)
        kept, at, count = to_device(ragged(rows_before(count) + count - stay, stay)), start + count - stay, stay
    return RingRows(
        read=to_device(np.repeat(slot * size, before) + read % size),
        order=order,
        write=to_device(np.repeat(slot * size, count) + ragged(at, count) % size),
        kept=kept,
    )


def ragged(start: np.ndarray, count: np.ndarray) -> np.ndarray:
    """start_i .. start_i + count_i - 1 for every i, one after the other, int64."""
    if len(count) == 1:  # one sequence: nothing to spread
        return np.arange(first := int(start[0]), first + int(count[0]))
    return np.repeat(start - rows_before(count), count) + np.arange(int(count.sum()))


def rows_before(count: np.ndarray) -> np.ndarray:
    """For every i the sum of the counts before it."""
    if len(count) == 1:
        return np.zeros(1, dtype=np.int64)
    return count.cumsum() - count


def spans(start: np.ndarray, stop: np.ndarray) -> Spans:
    return Spans(torch.from_numpy(start), torch.from_numpy(stop))
