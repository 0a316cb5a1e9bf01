"""Packed tokens -> batches that any step can ask for.

A document is cut into pieces of at most seq_len tokens. Each piece is a segment of its own, so the model
sees it as the start of a document. A batch is a flat run of pieces without padding. Which tokens stand in
batch n is a function of (n, seed, sizes) alone, so that resuming a run needs no more than the number of the
step. Of several sources (mixture.py) a batch takes from each what its share is, one source after another. Where the
length of sequences changes on the way (stages.py), each length has documents of its own in a pass (line.py).

T tokens of a batch
"""

import heapq
import itertools
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from dsv4.errors import UserError
from dsv4.model.head import IGNORE
from dsv4.train.line import Line, Span
from dsv4.train.mixture import Mixture, Shares, sources_of
from dsv4.train.packed import Packed
from dsv4.train.stages import Course, Stage

BLOCK = 64  # batches that share out their pieces among themselves where none is to be cut


@dataclass(frozen=True)
class Batch:
    """A flat run of T tokens: segments one after another, each the start of a document for the model.

    ids: int64 [T]. targets: int64 [T], the token that follows in the document, or -100 after its last
    token and where that token is not to be learned; where a piece ends inside a document, the next token is known and
    is the target. lengths: of the
    segments, summing to T. num_bytes: UTF-8 bytes of the targets, so that bits per byte = (sum of losses in
    nats) / ln 2 / num_bytes; eos is a target of 0 bytes, whose loss counts. segment_bytes: the same for each
    segment, for `split`.
    """

    ids: Tensor
    targets: Tensor
    lengths: list[int]
    num_bytes: int
    segment_bytes: tuple[int, ...] = ()


def split(batch: Batch, count: int) -> list[Batch]:
    """The batch as at most `count` batches of whole segments, in order, about equally long; none is empty.

    Each cut falls on the border between segments that is nearest to its share of the tokens (the earlier of two);
    where two cuts would fall on the same border there is one. Together they are the batch, in every field.
    """
    assert count >= 1, f"a batch cannot be split into {count}"
    borders = np.cumsum([0, *batch.lengths])
    shares = len(batch.ids) * np.arange(1, count) / count
    nearest = (int(np.abs(borders - share).argmin()) for share in shares)
    cuts = sorted({0, len(batch.lengths), *nearest})
    if len(cuts) == 2:
        return [batch]
    assert len(batch.segment_bytes) == len(batch.lengths), "only batches of this module can be split"
    return [
        Batch(
            batch.ids[borders[a] : borders[b]],
            batch.targets[borders[a] : borders[b]],
            batch.lengths[a:b],
            sum(batch.segment_bytes[a:b]),
            batch.segment_bytes[a:b],
        )
        for a, b in itertools.pairwise(cuts)
    ]


@dataclass(frozen=True)
class _Stretch:
    """Batches of one seq_len: from token `begin` of the mixed line on, before which each source has given `before`."""

    begin: int
    before: list[int]
    shares: Shares | None
    lines: list[Line] = field(default_factory=list)

    def taken(self, position: int) -> list[int]:
        """Tokens of each source before `position` of the mixed line."""
        since = position - self.begin
        return [b + n for b, n in zip(self.before, self.shares.taken(since) if self.shares else [since], strict=True)]


class Batches:
    """Endless training batches; batch(step) is any of them, iterating goes on from `step`.

    The line of each source (`Line`) is endless; of one source, batch n is tokens n*T to (n+1)*T of that line, of
    several those of the mixed line (`Shares`, in units of seq_len). So a row may cut the last piece of a source, whose
    rest begins the next row as a piece of its own; in an epoch every token occurs exactly once.

    whole: no piece is cut. Those that begin in the tokens of BLOCK batches are shared out among them, the longest
    first, each to the batch that has the fewest tokens, so that a batch has about T tokens and none is lost.
    stages: later lengths and sizes, in order. Those of one length have lines of their own, which begin where the ones
    of the length before ended; not together with `whole`, since a document would be cut there.
    """

    def __init__(
        self, packed: Packed | Mixture, tokens_per_batch: int, seed: int, seq_len: int, *, whole: bool = False,
        stages: Sequence[Stage] = (),
    ):  # fmt: skip
        for name, value in (("tokens_per_batch", tokens_per_batch), ("seq_len", seq_len)):
            if value < 1:
                raise UserError(f"{name} is {value}: a batch needs at least 1 token")
        if not 0 <= seed < 1 << 64:
            raise UserError(f"seed {seed} is out of range: choose one from 0 to 2**64 - 1")
        self.packed, self.tokens_per_batch, self.seed, self.seq_len = packed, tokens_per_batch, seed, seq_len
        self.sources, self.whole = sources_of(packed), whole
        several = len(self.sources.parts) > 1
        if whole and tokens_per_batch < seq_len * (1 + several):
            raise UserError(
                f"batches of whole pieces need tokens_per_batch={tokens_per_batch} to be at least "
                f"{'twice ' if several else ''}seq_len={seq_len}: raise the one or lower the other"
            )
        assert not (whole and stages), "stages would cut a piece"
        self.course = Course(seq_len, tokens_per_batch, stages)
        self.course.check()
        self.step = 0
        self._stretches = self._lay_out()
        self._block = lru_cache(maxsize=2)(self._shared_out)
        self._newest = lru_cache(maxsize=1)(self._read)  # who trains on a batch asks for it again, to say what it was

    def batch(self, step: int) -> Batch:
        """Batch number `step`, from 0; leaves the iteration where it is."""
        if step < 0:
            raise IndexError(f"there is no batch {step}: steps count from 0")
        return self._newest(step)

    def _read(self, step: int) -> Batch:
        if self.whole:
            found = self._block(step // BLOCK)[step % BLOCK]
            by_source = [[span for n, span in found if n == source] for source in range(len(self.sources.parts))]
        else:
            lines, ranges = self._stretch(self.course.tokens(step)).lines, self._ranges(step, step + 1)
            by_source = [list(line.spans(*some)) for line, some in zip(lines, ranges, strict=True)]
        parts = [_batch(part, spans) for part, spans in zip(self.sources.parts, by_source, strict=True) if spans]
        return parts[0] if len(parts) == 1 else _joined(parts)

    def num_tokens(self, step: int) -> int:
        """Tokens of batch `step`."""
        if not self.whole:
            return self.course.at(step).tokens_per_step
        return sum(end - first for _, (first, end, _) in self._block(step // BLOCK)[step % BLOCK])

    @property
    def num_conversations_cut(self) -> int:
        """Documents of which not all is learned that are longer than seq_len."""
        masked = (part for part in self.sources.parts if part.num_learned < part.num_tokens)
        return sum(int((np.diff(part.ends) > self.seq_len).sum()) for part in masked)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        self.step += 1
        return self.batch(self.step - 1)

    @property
    def epochs(self) -> float:
        """How often the data has been gone through up to `step`; of several sources the one most gone through."""
        return max(self.epochs_at(self.step).values())

    def epochs_at(self, step: int) -> dict[str, float]:
        """How often each source, by name, has been gone through before batch `step`."""
        taken = self._taken(self.course.tokens(step))
        sizes = (part.num_tokens for part in self.sources.parts)
        return {name: t / n for name, t, n in zip(self.sources.names, taken, sizes, strict=True)}

    def state_dict(self) -> dict[str, int | str]:
        """What a checkpoint must keep: the step, and what must not change for it to mean the same."""
        return {"step": self.step, **self._identity()}

    def load_state_dict(self, state: dict[str, int | str]) -> None:
        """Go on where another run stood. UserError if the data, the seed or a size differ from that run's."""
        mine = self._identity()
        for name in [*mine, *(n for n in state if n not in mine and n != "step")]:
            ours = mine.get(name)
            if state.get(name) != ours:
                raise UserError(
                    f"the run to resume has {name} {state.get(name)}, this one {ours}: "
                    "resume with the same data and settings, or start a new run"
                )
        self.step = int(state["step"])

    def _identity(self) -> dict[str, int | str]:
        sizes = {"tokens_per_batch": self.tokens_per_batch, "seq_len": self.seq_len}
        packing = {"packing": "whole"} if self.whole else {}
        later = [(s.start, s.seq_len, s.tokens_per_step) for s in self.course.stages[1:]]
        stages = {"stages": ", ".join(map(str, later))} if later else {}
        return {"data": self.packed.facts["sha256"], "seed": self.seed, **sizes, **packing, **stages}

    def _lay_out(self) -> list[_Stretch]:
        """The stages, those of one length after another as one."""
        found: list[_Stretch] = []
        stages = self.course.stages
        firsts = [s for n, s in enumerate(stages) if n == 0 or stages[n - 1].seq_len != s.seq_len]
        for stage, following in itertools.zip_longest(firsts, firsts[1:]):
            begin, seq_len = self.course.tokens(stage.start), stage.seq_len
            shares = Shares(self.sources.shares, seq_len) if len(self.sources.parts) > 1 else None
            taken = found[-1].taken(begin) if found else [0] * len(self.sources.parts)
            stretch = _Stretch(begin, taken, shares)
            ends = [None] * len(taken) if following is None else stretch.taken(self.course.tokens(following.start))
            for part, first, end in zip(self.sources.parts, taken, ends, strict=True):
                stretch.lines.append(Line(part, self.seed, seq_len, first, end))
            found.append(stretch)
        return found

    def _stretch(self, position: int) -> _Stretch:
        return self._stretches[bisect_right(self._stretches, position, key=lambda s: s.begin) - 1]

    def _taken(self, position: int) -> list[int]:
        return self._stretch(position).taken(position)

    def _ranges(self, step: int, end: int) -> list[tuple[int, int]]:
        """(first token, count) in the line of each source of batches `step` to `end`."""
        before, after = (self._taken(self.course.tokens(n)) for n in (step, end))
        return [(a, b - a) for a, b in zip(before, after, strict=True)]

    def _shared_out(self, block: int) -> list[list[tuple[int, Span]]]:
        """The pieces of BLOCK batches, each with the number of its source, in the order of the lines."""
        ranges = self._ranges(block * BLOCK, (block + 1) * BLOCK)
        lines = enumerate(zip(self._stretches[0].lines, ranges, strict=True))
        pieces = [(n, span) for n, (line, some) in lines for span in line.whole(*some)]
        room = [(0, n) for n in range(BLOCK)]
        chosen: list[list[int]] = [[] for _ in room]
        sizes = [end - first for _, (first, end, _) in pieces]
        for piece in sorted(range(len(pieces)), key=lambda i: (-sizes[i], i)):
            tokens, batch = heapq.heappop(room)
            chosen[batch].append(piece)
            heapq.heappush(room, (tokens + sizes[piece], batch))
        assert all(chosen), "a batch has no piece"
        return [[pieces[piece] for piece in sorted(batch)] for batch in chosen]


def heldout_batches(
    packed: Packed, tokens_per_batch: int, seq_len: int, limit_tokens: int | None = None, *, whole: bool = False
) -> Iterator[Batch]:
    """Batches for evaluation: all pieces in order, each token once; the last batch may be short.

    With limit_tokens, pieces at even distances over the whole split are taken, at most that many tokens in
    all. Pieces are cut at the ends of batches as in training; with `whole` only where the limit ends or where one is
    longer than a batch.
    """
    if min(tokens_per_batch, seq_len) < 1 or (limit_tokens is not None and limit_tokens < 1):
        raise UserError(
            f"tokens_per_batch {tokens_per_batch}, seq_len {seq_len}, limit_tokens {limit_tokens}: "
            "evaluation needs at least 1 of each"
        )
    budget = min(limit_tokens or packed.num_tokens, packed.num_tokens)
    return _heldout(packed, tokens_per_batch, seq_len, budget, whole)


def _heldout(packed: Packed, tokens_per_batch: int, seq_len: int, budget: int, whole: bool) -> Iterator[Batch]:
    first, end, closes = packed.pieces(seq_len)
    num_chosen = -(-len(first) * budget // packed.num_tokens)
    chosen = np.arange(num_chosen) * len(first) // num_chosen
    row: list[Span] = []
    room = min(tokens_per_batch, budget)
    for piece in chosen:
        at, stop, closing = int(first[piece]), int(end[piece]), bool(closes[piece])
        if whole and row and stop - at > room:
            yield _batch(packed, row)
            row, room = [], min(tokens_per_batch, budget)
        while at < stop and budget > 0:
            take = min(stop - at, room)
            row.append((at, at + take, closing and at + take == stop))
            at, room, budget = at + take, room - take, budget - take
            if room == 0:
                yield _batch(packed, row)
                row, room = [], min(tokens_per_batch, budget)
    if row:
        yield _batch(packed, row)


def _batch(packed: Packed, spans: list[Span]) -> Batch:
    """Read the spans of a batch from the mapped file."""
    lengths = [end - first for first, end, _ in spans]
    ids = np.empty(sum(lengths), dtype=np.int64)
    targets = np.full(len(ids), IGNORE, dtype=np.int64)
    at, segment_bytes = 0, []
    for (first, end, closes), length in zip(spans, lengths, strict=True):
        known = length - closes
        ids[at : at + length] = packed.tokens[first:end]
        following = packed.tokens[first + 1 : first + 1 + known].astype(np.int64)
        learned = packed.learned(first + 1, first + 1 + known)
        targets[at : at + known] = following if learned is None else np.where(learned, following, IGNORE)
        counted = following if learned is None else following[learned]
        segment_bytes.append(int(packed.token_bytes[counted].sum()))
        at += length
    found = torch.from_numpy(ids), torch.from_numpy(targets)
    return Batch(*found, lengths, sum(segment_bytes), tuple(segment_bytes))


def _joined(parts: list[Batch]) -> Batch:
    """Batches one after another as one."""
    return Batch(
        torch.cat([part.ids for part in parts]),
        torch.cat([part.targets for part in parts]),
        [n for part in parts for n in part.lengths],
        sum(part.num_bytes for part in parts),
        tuple(n for part in parts for n in part.segment_bytes),
    )
