"""The one shape of work: a flat run of T tokens cut into segments, and where each token may look.

A segment starts a document (no memory) or continues a memory. Packed training rows, ragged prompts, a chunk of prefill
beside decoding sequences are all runs. The segments of one pool are one `Part`, those without memory another: a layer
makes one call of each op for a part, and nearly every run is a single part. Within a part the rows of its segments lie
one after the other, in the order of their tokens, so what a token sees is an interval (`Spans`).
All of this is planned once per call, on the host in numpy, and shared by all layers.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dsv4.cache import Pages, Ring, SequenceMemory
from dsv4.config import AnyConfig, LayerKind, ModelConfig
from dsv4.errors import UserError
from dsv4.model.rope import TABLES, frequencies, turns
from dsv4.ops import Spans

ToDevice = Callable[[np.ndarray], Tensor]


@dataclass(frozen=True)
class Segment:
    """`length` tokens of the run; they start a document, or continue `memory`."""

    length: int
    memory: SequenceMemory | None = None

    @property
    def start(self) -> int:
        return 0 if self.memory is None else self.memory.length


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


@dataclass(frozen=True)
class Part:
    """The segments of a run whose memories lie in one pool, or those without memory.

    tokens: their rows of the run, int64 on the device; None if they are all of it. window: what each token sees of the
    part's window rows, which are those of `ring` before its own, and its own. table, pages: the numbers of the pages
    that the part's sequences have, on the device and on the host. every: for layers that keep a row of every token.
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
    derived: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    def of(self, rows: Tensor) -> Tensor:
        """The part's rows of what has one for each token of the run."""
        return rows if self.tokens is None else rows[self.tokens]


@dataclass(frozen=True)
class Run:
    """A planned run: positions int64 [T] and rotations on the device, and its parts."""

    segments: list[Segment]
    starts: list[int]  # position of each segment's first token
    positions: Tensor
    turn: dict[str, Tensor]  # "window" and "compressed": complex64 [T, pairs]
    parts: list[Part]
    last: Tensor = field(repr=False)  # int64 [segments]: row of each segment's last token

    def memories(self) -> list[SequenceMemory]:
        return [s.memory for s in self.segments if s.memory is not None]

    def merge(self, rows: list[Tensor]) -> Tensor:
        """Rows of the parts' tokens -> rows of the run."""
        if len(rows) == 1:
            return rows[0]
        out = rows[0].new_empty(len(self.positions), *rows[0].shape[1:])
        for part, own in zip(self.parts, rows, strict=True):
            assert part.tokens is not None
            out[part.tokens] = own
        return out


def check_segments(config: AnyConfig, segments: Sequence[Segment]) -> None:
    """UserError for an empty or too long segment, a memory that appears twice, was torn, or is of another model."""
    memories = [id(s.memory) for s in segments if s.memory is not None]
    if len(set(memories)) != len(memories):
        raise UserError("one memory appears in two segments of a call: join the segments or fork the memory")
    for s in segments:
        if s.length < 1:
            raise UserError(f"a segment has {s.length} tokens: every segment needs at least 1")
        if s.memory is not None and s.memory.config is not config and s.memory.config != config:
            raise UserError("a memory was made for another configuration: make it with this model's new_cache")
        if s.start + s.length > config.max_position_embeddings:
            raise UserError(
                f"{s.start + s.length} tokens do not fit: max_position_embeddings={config.max_position_embeddings}; "
                "shorten the text or use a model with a longer context"
            )
        if s.memory is not None:
            s.memory.refuse_torn()


def _reserve(segments: Sequence[Segment]) -> None:
    """Give the memories of a call the pages that it will write; OutOfPages, and nothing given, if there are too few."""
    wanted: dict[int, tuple[Pages, list[tuple[SequenceMemory, int]]]] = {}
    for s in segments:
        if s.memory is not None:
            wanted.setdefault(id(s.memory.pool), (s.memory.pool, []))[1].append((s.memory, s.length))
    short = [(pool, memories) for pool, memories in wanted.values() if pool.shortage(memories)]
    for pool, memories in [*short, *wanted.values()]:  # one that will refuse does so before others have given
        pool.reserve(memories)


def plan(config: ModelConfig, segments: Sequence[Segment], device: torch.device) -> Run:
    """Plan a run and give its memories the pages that it will write. UserError as `check_segments` says, OutOfPages if
    there are too few; nothing has changed then."""
    check_segments(config, segments)
    _reserve(segments)
    count = np.array([s.length for s in segments])
    start = np.array([s.start for s in segments])

    def to_device(numbers: np.ndarray) -> Tensor:
        return torch.from_numpy(numbers).to(device)

    positions = to_device(ragged(start, count))
    freq = {table: frequencies(config, table) for table in TABLES}
    places: dict[int, list[int]] = {}  # pool -> its segments
    for i, s in enumerate(segments):
        places.setdefault(0 if s.memory is None else id(s.memory.pool), []).append(i)
    first = count.cumsum() - count
    parts = []
    for rows in places.values():
        memories = [m for i in rows if (m := segments[i].memory) is not None]
        tokens = None if len(places) == 1 else to_device(ragged(first[rows], count[rows]))
        parts.append(_part(config, tokens, memories, start[rows], count[rows], freq["compressed"], to_device))
    turn = {name: turns(f, positions) for name, f in freq.items()}
    return Run(list(segments), start.tolist(), positions, turn, parts, to_device(first + count - 1))


def _part(
    config: ModelConfig,
    tokens: Tensor | None,
    memories: list[SequenceMemory],
    start: np.ndarray,
    count: np.ndarray,
    freq: Tensor,
    to_device: ToDevice,
) -> Part:
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
        held = -(-(start + count) // pool.page_tokens)
        pages = np.concatenate([m.table[:n] for m, n in zip(memories, held.tolist(), strict=True)])
        page_base = rows_before(held)
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
