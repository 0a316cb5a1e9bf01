"""A flat run of T tokens cut into parts, one for each segment: what is computed with a weight runs once over all T
tokens, and only attention goes from part to part.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dsv4.controls.memory import ControlMemory, Stores
from dsv4.model.segments import Segment


@dataclass(frozen=True)
class Part:
    """One segment as one layer sees it: its tokens of the run, the position of the first, its rows in that layer."""

    tokens: slice
    start: int
    stores: Stores | None

    @property
    def end(self) -> int:
        """Rows that its last token sees."""
        return self.start + self.tokens.stop - self.tokens.start

    def beyond(self, count: int) -> int:
        """How many of its tokens see more than `count` rows: its last ones, as the token at position p sees p + 1."""
        return min(self.tokens.stop - self.tokens.start, max(0, self.end - count))


@dataclass(frozen=True)
class Run:
    """The segments of a run, the row of each one's last token int64 [segments], and its memories."""

    segments: list[Segment]
    last: Tensor
    memories: Sequence[ControlMemory]

    @staticmethod
    def of(segments: Sequence[Segment], device: torch.device) -> "Run":
        lengths = torch.tensor([s.length for s in segments], device="cpu")
        memories = [s.memory for s in segments if isinstance(s.memory, ControlMemory)]
        return Run(list(segments), (lengths.cumsum(0) - 1).to(device), memories)

    def positions(self) -> Tensor:
        """int64 [T], on the host."""
        return torch.cat([torch.arange(s.start, s.start + s.length, device="cpu") for s in self.segments])

    def parts(self, layer: int) -> list[Part]:
        """The segments as a layer sees them."""
        parts, at = [], 0
        for s in self.segments:
            memory: Any = s.memory
            stores = memory.layers[layer] if isinstance(memory, ControlMemory) else None
            parts.append(Part(slice(at, at + s.length), s.start, stores))
            at += s.length
        return parts
