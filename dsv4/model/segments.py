"""The one shape of work: a flat run of T tokens cut into segments.

A segment starts a document (no memory) or continues a memory. Packed training rows, ragged prompts, a chunk of prefill
beside decoding sequences are all runs. The segments of one pool are one `Part`, those without memory another: a layer
makes one call of each op for a part, and nearly every run is a single part. What a part's tokens may see is planned
once per call, on the host (parts.py), and shared by all layers.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from dsv4.cache import Pages, SequenceMemory
from dsv4.config import AnyConfig, ModelConfig
from dsv4.errors import UserError
from dsv4.model.parts import Part, part_of, ragged
from dsv4.model.rope import TABLES, frequencies, turns

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
            part = part_of(self.config, tokens, held, start[rows], count[rows], freq, self._to_device)
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
