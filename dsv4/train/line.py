"""The endless line of one source's tokens, of which batches take one run after another.

In each pass over the source, every token stands in the line once, in an order drawn from (seed, number of the pass). A
line may serve a part of a run alone, where sequences have one length; the parts of a pass that fall to several lengths
are made of different documents, so that each length gets documents as long as there are, and none gets leftovers.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from dsv4.train.packed import Packed, cut

Span = tuple[int, int, bool]  # first token, end, whether a document ends there

Pieces = tuple[np.ndarray, np.ndarray, np.ndarray]  # first, end, closes: each [P]


@dataclass(frozen=True)
class _Pass:
    """What a line has of one pass: pieces, which of them stands where, the number of tokens up to its end, each [P];
    the first token of the pass that is the line's."""

    pieces: Pieces
    order: np.ndarray
    ends: np.ndarray
    begin: int


class Line:
    """Tokens `begin` to `end` (None: no end) of a source's endless line, in pieces of at most seq_len.

    Of a pass that is the line's from beginning to end, all pieces are shuffled. Of another one the documents stand in a
    drawn order, which all lines of the source share; the line has those between its ends (of the first and the last
    one perhaps a part), and shuffles their pieces. Pieces are shuffled and not whole documents alone, since a document
    may be longer than many batches, which would then all be alike.
    """

    def __init__(self, packed: Packed, seed: int, seq_len: int, begin: int = 0, end: int | None = None):
        self.packed, self.seed, self.seq_len, self.begin, self.end = packed, seed, seq_len, begin, end
        self._all = lru_cache(maxsize=1)(lambda: packed.pieces(seq_len))
        self._pass = lru_cache(maxsize=2)(self._draw_pass)  # a batch may span two

    def _draw_pass(self, number: int) -> _Pass:
        size = self.packed.num_tokens
        begin = max(0, self.begin - number * size)
        end = size if self.end is None else min(size, self.end - number * size)
        whole = (begin, end) == (0, size)
        pieces = self._all() if whole else self._between(number, begin, end)
        order = self._shuffled(number, len(pieces[0]), (0, 0) if whole else (begin, 2))
        return _Pass(pieces, order, np.cumsum(pieces[1][order] - pieces[0][order]), begin)

    def _between(self, number: int, begin: int, end: int) -> Pieces:
        """The pieces of tokens `begin` to `end` of a pass whose documents stand in a drawn order."""
        bounds = self.packed.ends
        order = self._shuffled(number, len(bounds) - 1, (0, 1))
        ends = np.cumsum(np.diff(bounds)[order])
        some = slice(int(np.searchsorted(ends, begin, side="right")), int(np.searchsorted(ends, end, side="left")) + 1)
        order, ends = order[some], ends[some]
        before = ends - np.diff(bounds)[order]
        first = bounds[order] + np.maximum(begin - before, 0)
        last = bounds[order] + np.minimum(end, ends) - before
        first, last, closes = cut(first, last, self.seq_len)
        return first, last, closes & np.isin(last, bounds[order + 1])

    def _shuffled(self, number: int, count: int, kind: tuple[int, int]) -> np.ndarray:
        """An order of `count` things, of a pass and a kind of things.

        Sorting the raw output of a counter-based generator: numpy promises it never changes, unlike shuffles.
        """
        key, counter = np.array([self.seed, number], dtype=np.uint64), np.array([0, 0, *kind], dtype=np.uint64)
        return np.argsort(np.random.Philox(key=key, counter=counter).random_raw(count), kind="stable")

    def spans(self, position: int, count: int) -> Iterator[Span]:
        """The spans of `count` tokens from `position`; the first and the last piece may be cut."""
        assert self.begin <= position and (self.end is None or position + count <= self.end), "tokens of another line"
        while count > 0:
            number, offset = divmod(position, self.packed.num_tokens)
            part = self._pass(number)
            (_, ends, closes), offset = part.pieces, offset - part.begin
            place = int(np.searchsorted(part.ends, offset, side="right"))
            while count > 0 and place < len(part.order):
                piece, left = part.order[place], int(part.ends[place]) - offset
                end, take = int(ends[piece]), min(left, count)
                yield end - left, end - left + take, bool(closes[piece]) and take == left
                offset, position, count, place = offset + take, position + take, count - take, place + 1

    def whole(self, position: int, count: int) -> Iterator[Span]:
        """The pieces whose first token is among the `count` tokens from `position`, each whole."""
        stop = position + count
        while position < stop:
            number, offset = divmod(position, self.packed.num_tokens)
            part = self._pass(number)
            (first, ends, closes), offset = part.pieces, offset - part.begin
            place = int(np.searchsorted(part.ends, offset, side="right"))
            before = int(part.ends[place - 1]) if place else 0
            position += before - offset  # where the piece that stands here begins
            for piece, end in zip(part.order[place:].tolist(), part.ends[place:].tolist(), strict=True):
                if position >= stop:
                    return
                if before >= offset:
                    yield int(first[piece]), int(ends[piece]), bool(closes[piece])
                position, before = position + end - before, end
