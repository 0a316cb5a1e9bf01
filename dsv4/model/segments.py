"""The one shape of work: a flat run of T tokens cut into segments, and where each token may look.

A segment starts a document (no memory) or continues a memory. Packed training rows, ragged prompts, a chunk of prefill
beside decoding sequences are all runs. The segments of one pool are one `Part`, those without memory another: a layer
makes one call of each op for a part, and nearly every run is a single part. Within a part the rows of its segments lie
one after the other, in the order of their tokens, so what a token sees is an interval (`Spans`).
All of this is planned once per call, on the host in numpy, and shared by all layers.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from dsv4.cache import Pages, Ring, SequenceMemory
from dsv4.config import AnyConfig, LayerKind, ModelConfig
from dsv4.errors import UserError
from dsv4.model.rope import TABLES, frequencies, turns
from dsv4.ops import Spans

ToDevice = Callable[[np.ndarray], Tensor]

# How CSA reads in training, without memories, and whether its indexer has a loss. off: the entries that the indexer
# chooses, no loss, as in use. dense: all visible entries, no loss. warmup: these, with it. sparse: chosen, with it.
IndexPhase = Literal["off", "dense", "warmup", "sparse"]


@dataclass(frozen=True)
class Segment:
    """`length` tokens of the run; they start a document, or continue `memory`.

    pinned: the first tokens of the sequence whose entries CSA reads whatever their scores are (model/indexer.py).
    """

    length: int
    memory: SequenceMemory | None = None
    pinned: int = 0

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


class Run:
    """A planned run. What each of its tokens reads is planned when it is first asked for, from what the memories were
    when it was made: whole blocks in one call plan for themselves (model/step.py).

    starts: the position of each segment's first token. derived: what others have made of it, to keep. is_causal: a
    token sees itself and those before it, which the library knows how to plan; else `parts` alone say what it sees.
    reads_all, index_learns: what its phase means for CSA.
    """

    is_causal = True
    is_shared = False  # with other processes: shards.py

    def __init__(
        self, config: ModelConfig, segments: Sequence[Segment], device: torch.device, phase: IndexPhase = "off"
    ):
        self.config, self.segments, self.device = config, list(segments), device
        self.reads_all, self.index_learns = phase in ("dense", "warmup"), phase in ("warmup", "sparse")
        self.starts = [s.start for s in segments]
        self.lengths = [s.length for s in segments]
        self.tables = [None if s.memory is None else s.memory.table for s in segments]
        self.derived: dict[str, Any] = {}

    @property
    def pinned(self) -> bool:
        """Whether any of its sequences has tokens that CSA is to read whatever their scores are."""
        return any(s.pinned for s in self.segments)

    def memories(self) -> list[SequenceMemory]:
        return [s.memory for s in self.segments if s.memory is not None]

    @property
    def pools(self) -> list[Pages | None]:
        """The pool of each part: those of the memories, and None for segments without one."""
        found = {id(pool): pool for s in self.segments for pool in [None if s.memory is None else s.memory.pool]}
        return list(found.values())

    @cached_property
    def positions(self) -> Tensor:
        """int64 [T], on the device."""
        return self._to_device(ragged(np.array(self.starts), np.array(self.lengths)))

    @cached_property
    def turn(self) -> dict[str, Tensor]:
        """Rotations "window" and "compressed": complex64 [T, pairs], on the device."""
        return {table: turns(frequencies(self.config, table), self.positions) for table in TABLES}

    @cached_property
    def last(self) -> Tensor:
        """int64 [segments]: the row of each segment's last token, on the device."""
        return self._to_device(np.array(self.lengths).cumsum() - 1)

    @cached_property
    def parts(self) -> list[Part]:
        """The segments of each pool, in the order of `pools`."""
        start, count = np.array(self.starts), np.array(self.lengths)
        places: dict[int, list[int]] = {}  # pool -> its segments
        for i, s in enumerate(self.segments):
            places.setdefault(0 if s.memory is None else id(s.memory.pool), []).append(i)
        first = count.cumsum() - count
        freq = frequencies(self.config, "compressed")
        parts = []
        for rows in places.values():
            held = [(m, t) for i in rows if (m := self.segments[i].memory) and (t := self.tables[i]) is not None]
            tokens = None if len(places) == 1 else self._to_device(ragged(first[rows], count[rows]))
            part = _part(self.config, tokens, held, start[rows], count[rows], freq, self._to_device)
            if self.pinned:
                first_tokens = np.array([self.segments[i].pinned for i in rows])
                part = replace(part, pinned=torch.from_numpy(np.repeat(first_tokens, count[rows])))
            parts.append(part)
        return parts

    def merge(self, rows: list[Tensor]) -> Tensor:
        """Rows of the parts' tokens -> rows of the run."""
        if len(rows) == 1:
            return rows[0]
        out = rows[0].new_empty(sum(self.lengths), *rows[0].shape[1:])
        for part, own in zip(self.parts, rows, strict=True):
            assert part.tokens is not None
            out[part.tokens] = own
        return out

    def _to_device(self, numbers: np.ndarray) -> Tensor:
        return torch.from_numpy(numbers).to(self.device)


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
        if s.pinned:
            check_pinned(config, s.pinned)
        if s.memory is not None:
            s.memory.refuse_torn()


def check_pinned(config: AnyConfig, tokens: int) -> None:
    """UserError unless CSA has entries for so many tokens to pin, and room to choose them all."""
    kinds = config.trunk_kinds if isinstance(config, ModelConfig) else ()
    indexed = [kind for kind in kinds if kind.indexed]
    if tokens < 0 or not indexed:
        why = "must not be negative" if tokens < 0 else "is for CSA layers, and the model has none: leave it out"
        raise UserError(f"pinned={tokens} {why}")
    most = min(config.index_topk * kind.ratio for kind in indexed)  # type: ignore[union-attr]
    if tokens > most:
        raise UserError(
            f"pinned={tokens} tokens have more entries than a query reads: at most {most} can be pinned "
            "(index_topk times the tokens of an entry)"
        )


def _reserve(segments: Sequence[Segment]) -> None:
    """Give the memories of a call the pages that it will write; OutOfPages, and nothing given, if there are too few."""
    wanted: dict[int, tuple[Pages, list[tuple[SequenceMemory, int]]]] = {}
    for s in segments:
        if s.memory is not None:
            wanted.setdefault(id(s.memory.pool), (s.memory.pool, []))[1].append((s.memory, s.length))
    short = [(pool, memories) for pool, memories in wanted.values() if pool.shortage(memories)]
    for pool, memories in [*short, *wanted.values()]:  # one that will refuse does so before others have given
        pool.reserve(memories)


def plan(config: ModelConfig, segments: Sequence[Segment], device: torch.device, phase: IndexPhase = "off") -> Run:
    """Plan a run and give its memories the pages that it will write. UserError as `check_segments` says, OutOfPages if
    there are too few; nothing has changed then."""
    check_segments(config, segments)
    assert phase == "off" or all(s.memory is None for s in segments), "phases are for training"
    _reserve(segments)
    return Run(config, segments, device, phase)


def _part(
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
