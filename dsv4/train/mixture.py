"""Several packed sources in stated shares: which of them each token of an endless mixed line comes from.

The mixed line is made of units of equal length. A period of PERIOD units holds each source as often as its weight
says, each as evenly spread as can be, and period follows period. So the tokens of each source up to any place are
known without looking at what came before, and a batch takes from each source a run of tokens that goes on where its
last one ended.
"""

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from dsv4.train.packed import Packed

PERIOD = 1 << 14


class Mixture:
    """Packed sources by name, with the share of the tokens that each is to have; `shares` sum to 1."""

    def __init__(self, names: Sequence[str], weights: Sequence[float], parts: Sequence[Packed]):
        total = sum(weights)
        self.names, self.parts, self.shares = tuple(names), tuple(parts), tuple(w / total for w in weights)

    @property
    def num_tokens(self) -> int:
        """Ids in all sources together."""
        return sum(part.num_tokens for part in self.parts)

    @property
    def facts(self) -> dict[str, Any]:
        """sha256: what identifies sources and shares."""
        told = [[n, s, p.facts["sha256"]] for n, s, p in zip(self.names, self.shares, self.parts, strict=True)]
        return {"sha256": hashlib.sha256(json.dumps(told).encode()).hexdigest()}


def sources_of(packed: "Packed | Mixture") -> Mixture:
    """The mixture itself, or one split as a mixture of one."""
    return packed if isinstance(packed, Mixture) else Mixture([""], [1.0], [packed])


class Shares:
    """How many of the first tokens of the mixed line are each source's. unit: tokens in a row from one source.

    A source's tokens never differ by more than about one unit from its share of those so far.
    """

    def __init__(self, shares: Sequence[float], unit: int):
        counts = _apportioned(shares, PERIOD)
        when = np.concatenate([(np.arange(n) + 0.5) / n for n in counts])
        source = np.repeat(np.arange(len(counts)), counts)
        self.unit, self.counts, self._order = unit, counts, source[np.argsort(when, kind="stable")]
        taken = np.eye(len(counts), dtype=np.int64)[self._order].cumsum(axis=0)
        self._before = np.concatenate([np.zeros((1, len(counts)), dtype=np.int64), taken])  # [PERIOD + 1, sources]

    def taken(self, position: int) -> list[int]:
        """Tokens of each source among the first `position` of the mixed line; they sum to it."""
        units, rest = divmod(position, self.unit)
        periods, place = divmod(units, PERIOD)
        found = [(periods * int(n) + int(b)) * self.unit for n, b in zip(self.counts, self._before[place], strict=True)]
        found[int(self._order[place])] += rest
        return found


def _apportioned(shares: Sequence[float], seats: int) -> np.ndarray:
    """Whole numbers that sum to `seats`, each at least 1, as near to its share as that allows: largest remainders."""
    exact = np.array(shares) * seats
    counts = np.maximum(1, np.floor(exact)).astype(np.int64)
    while (missing := seats - int(counts.sum())) != 0:
        best = np.argmax(exact - counts) if missing > 0 else np.argmax(np.where(counts > 1, counts - exact, -np.inf))
        counts[best] += 1 if missing > 0 else -1
    return counts
