"""The one shape of work: a flat run of T tokens cut into segments, and where each token may look.

A segment starts a document (no memory) or continues a memory. Packed training rows, ragged prompts, a chunk of prefill
beside decoding sequences are all runs. Consecutive segments without memory form one `Piece`, a segment with memory is
a piece of its own; within a piece keys lie in the order of their tokens, so what a token sees is an interval (`Spans`).
All of this is planned once per call, on the host, and shared by all layers.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dsv4.cache import SequenceMemory
from dsv4.config import ModelConfig
from dsv4.errors import UserError
from dsv4.model.rope import frequencies, turns
from dsv4.ops import Spans


@dataclass(frozen=True)
class Segment:
    """`length` tokens of the run; they start a document, or continue `memory`."""

    length: int
    memory: SequenceMemory | None = None

    @property
    def start(self) -> int:
        return 0 if self.memory is None else self.memory.length


@dataclass(frozen=True)
class Groups:
    """The compression groups of ratio r that close inside a piece, and what its tokens see of the entries.

    `carried` rows of earlier tokens precede the piece's own rows (the open group, with overlap also the group before).
    first_row, has_previous [G], turn complex64 [G, pairs] are on the device; `visible` counts in the pool
    [existing entries | new entries].
    """

    ratio: int
    carried: int
    existing: int
    first_row: Tensor
    has_previous: Tensor
    turn: Tensor
    visible: Spans


@dataclass(frozen=True)
class Piece:
    """Consecutive tokens of a run that share one pool of rows. `history` window rows of a memory precede its own."""

    tokens: slice
    start: int  # position of the first token
    memory: SequenceMemory | None
    history: int
    window: Spans
    groups: dict[int, Groups]


@dataclass(frozen=True)
class Run:
    """A planned run: positions int64 [T] and rotations on the device, and its pieces."""

    segments: list[Segment]
    positions: Tensor
    turn: dict[str, Tensor]  # "window" and "compressed": complex64 [T, pairs]
    pieces: list[Piece]
    last: Tensor = field(repr=False)  # int64 [segments]: row of each segment's last token

    def memories(self) -> list[SequenceMemory]:
        return [s.memory for s in self.segments if s.memory is not None]


def plan(config: ModelConfig, segments: Sequence[Segment], device: torch.device) -> Run:
    """Plan a run; UserError for an empty or too long segment, or a memory that appears twice."""
    _check(config, segments)
    starts = [s.start for s in segments]
    positions = torch.cat([_range(a, a + s.length) for a, s in zip(starts, segments, strict=True)]).to(device)
    freq = {"window": frequencies(config, "window"), "compressed": frequencies(config, "csa")}
    ratios = sorted(set(config.trunk_ratios) - {0})
    pieces, i, offset = [], 0, 0
    while i < len(segments):
        j = i + 1
        while segments[i].memory is None and j < len(segments) and segments[j].memory is None:
            j += 1
        lengths = [s.length for s in segments[i:j]]
        tokens = slice(offset, offset + sum(lengths))
        pieces.append(
            _piece(config, ratios, tokens, segments[i].memory, starts[i], lengths, freq["compressed"], device)
        )
        i, offset = j, tokens.stop
    last = _tensor([s.length for s in segments]).cumsum(0) - 1
    turn = {name: turns(f, positions) for name, f in freq.items()}
    return Run(list(segments), positions, turn, pieces, last.to(device))


def _check(config: ModelConfig, segments: Sequence[Segment]) -> None:
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


def _piece(
    config: ModelConfig,
    ratios: list[int],
    tokens: slice,
    memory: SequenceMemory | None,
    start: int,
    lengths: list[int],
    freq: Tensor,
    device: torch.device,
) -> Piece:
    reach = config.sliding_window - 1  # the window counts the token itself
    history = min(start, reach)
    counts = _tensor(lengths)
    first = counts.cumsum(0) - counts  # each document's first row in the piece
    own = _range(0, sum(lengths))
    document_first = torch.repeat_interleave(first, counts)
    positions = own - document_first + start
    row = own + history
    # only a piece with memory has rows before its document's first own row, and it is a single document
    window = Spans((row - reach).clamp_min(0).maximum(document_first), row + 1)
    groups = {r: _groups(r, start, lengths, first, positions, freq, device) for r in ratios}
    return Piece(tokens, start, memory, history, window, groups)


def _groups(
    r: int, start: int, lengths: list[int], first: Tensor, positions: Tensor, freq: Tensor, device: torch.device
) -> Groups:
    existing = start // r
    carried = start % r + (r if r == 4 and existing else 0)
    documents = list(zip(first.tolist(), lengths, strict=True))
    group = [_range(existing, (start + n) // r) for _, n in documents]
    rows = [carried + a + w * r - start for (a, _), w in zip(documents, group, strict=True)]
    count = _tensor([len(w) for w in group])
    base = torch.repeat_interleave(count.cumsum(0) - count, _tensor(lengths))
    index = torch.cat(group)
    return Groups(
        ratio=r,
        carried=carried,
        existing=existing,
        first_row=torch.cat(rows).to(device),
        has_previous=(index > 0).to(device),
        turn=turns(freq, (index * r).to(device)),  # an entry rotates at the position of its group's first token
        visible=Spans(base, base + (positions + 1) // r),  # a group is visible from its last token on
    )


def _range(start: int, stop: int) -> Tensor:
    """start .. stop-1 on the host, whatever torch's default device is."""
    return torch.arange(start, stop, device="cpu")


def _tensor(numbers: list[int]) -> Tensor:
    """int64 on the host, whatever torch's default device is."""
    return torch.tensor(numbers, dtype=torch.int64, device="cpu")
