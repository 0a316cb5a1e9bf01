"""Packed tokens -> batches that any step can ask for.

A document is cut into pieces of at most seq_len tokens. Each piece is a segment of its own, so the model
sees it as the start of a document. A batch is a flat run of pieces without padding. Which tokens stand in
batch n is a function of (n, seed, sizes) alone, so that resuming a run needs no more than the number of the
step.

T tokens of a batch
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from dsv4.errors import UserError
from dsv4.model.head import IGNORE
from dsv4.train.packed import Packed

Span = tuple[int, int, bool]  # first token, end, whether a document ends there


@dataclass(frozen=True)
class Batch:
    """A flat run of T tokens: segments one after another, each the start of a document for the model.

    ids: int64 [T]. targets: int64 [T], the token that follows in the document, or -100 after its last
    token; where a piece ends inside a document, the next token is known and is the target. lengths: of the
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


class Batches:
    """Endless training batches; batch(step) is any of them, iterating goes on from `step`.

    In each epoch the pieces of all documents, in an order drawn from (seed, epoch), stand one after
    another, and epoch follows epoch; batch n is tokens n*T to (n+1)*T of that line. So a row may cut its
    last piece, whose rest begins the next row as a piece of its own; in an epoch every token occurs exactly
    once. Pieces are shuffled and not whole documents, since a document may be longer than many batches,
    which would then all be alike.
    """

    def __init__(self, packed: Packed, tokens_per_batch: int, seed: int, seq_len: int):
        for name, value in (("tokens_per_batch", tokens_per_batch), ("seq_len", seq_len)):
            if value < 1:
                raise UserError(f"{name} is {value}: a batch needs at least 1 token")
        if not 0 <= seed < 1 << 64:
            raise UserError(f"seed {seed} is out of range: choose one from 0 to 2**64 - 1")
        self.packed, self.tokens_per_batch, self.seed, self.seq_len = packed, tokens_per_batch, seed, seq_len
        self.step = 0
        self._first, self._end, self._closes = packed.pieces(seq_len)
        self._epoch = lru_cache(maxsize=2)(self._draw_epoch)  # a batch may span two

    def batch(self, step: int) -> Batch:
        """Batch number `step`, from 0; leaves the iteration where it is."""
        if step < 0:
            raise IndexError(f"there is no batch {step}: steps count from 0")
        return _batch(self.packed, list(self._line(step * self.tokens_per_batch, self.tokens_per_batch)))

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        self.step += 1
        return self.batch(self.step - 1)

    @property
    def epochs(self) -> float:
        """How often the data has been gone through up to `step`."""
        return self.step * self.tokens_per_batch / self.packed.num_tokens

    def state_dict(self) -> dict[str, int | str]:
        """What a checkpoint must keep: the step, and what must not change for it to mean the same."""
        return {"step": self.step, **self._identity()}

    def load_state_dict(self, state: dict[str, int | str]) -> None:
        """Go on where another run stood. UserError if the data, the seed or a size differ from that run's."""
        for name, ours in self._identity().items():
            if state.get(name) != ours:
                raise UserError(
                    f"the run to resume has {name} {state.get(name)}, this one {ours}: "
                    "resume with the same data and settings, or start a new run"
                )
        self.step = int(state["step"])

    def _identity(self) -> dict[str, int | str]:
        sizes = {"tokens_per_batch": self.tokens_per_batch, "seq_len": self.seq_len}
        return {"data": self.packed.facts["sha256"], "seed": self.seed, **sizes}

    def _draw_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """(which piece stands where, the number of tokens up to its end), each int64 [P].

        Sorting the raw output of a counter-based generator: numpy promises it never changes, unlike shuffles.
        """
        key = np.array([self.seed, epoch], dtype=np.uint64)
        draws = np.random.Philox(key=key).random_raw(len(self._first))
        order = np.argsort(draws, kind="stable")
        return order, np.cumsum(self._end[order] - self._first[order])

    def _line(self, position: int, count: int) -> Iterator[Span]:
        """The spans of `count` tokens from `position` in the endless line of epochs."""
        while count > 0:
            epoch, offset = divmod(position, self.packed.num_tokens)
            order, line_ends = self._epoch(epoch)
            place = int(np.searchsorted(line_ends, offset, side="right"))
            while count > 0 and place < len(order):
                piece, left = order[place], int(line_ends[place]) - offset
                end, take = int(self._end[piece]), min(left, count)
                yield end - left, end - left + take, bool(self._closes[piece]) and take == left
                offset, position, count, place = offset + take, position + take, count - take, place + 1


def heldout_batches(
    packed: Packed, tokens_per_batch: int, seq_len: int, limit_tokens: int | None = None
) -> Iterator[Batch]:
    """Batches for evaluation: all pieces in order, each token once; the last batch may be short.

    With limit_tokens, pieces at even distances over the whole split are taken, at most that many tokens in
    all. Pieces are cut at the ends of batches as in training.
    """
    if min(tokens_per_batch, seq_len) < 1 or (limit_tokens is not None and limit_tokens < 1):
        raise UserError(
            f"tokens_per_batch {tokens_per_batch}, seq_len {seq_len}, limit_tokens {limit_tokens}: "
            "evaluation needs at least 1 of each"
        )
    return _heldout(packed, tokens_per_batch, seq_len, min(limit_tokens or packed.num_tokens, packed.num_tokens))


def _heldout(packed: Packed, tokens_per_batch: int, seq_len: int, budget: int) -> Iterator[Batch]:
    first, end, closes = packed.pieces(seq_len)
    num_chosen = -(-len(first) * budget // packed.num_tokens)
    chosen = np.arange(num_chosen) * len(first) // num_chosen
    row: list[Span] = []
    room = min(tokens_per_batch, budget)
    for piece in chosen:
        at, stop, closing = int(first[piece]), int(end[piece]), bool(closes[piece])
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
        targets[at : at + known] = packed.tokens[first + 1 : first + 1 + known]
        segment_bytes.append(int(packed.token_bytes[targets[at : at + known]].sum()))
        at += length
    found = torch.from_numpy(ids), torch.from_numpy(targets)
    return Batch(*found, lengths, sum(segment_bytes), tuple(segment_bytes))
