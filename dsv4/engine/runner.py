"""Scheduled work -> one call of the model: chunks of prompts and single tokens side by side, nothing padded."""

from collections.abc import Sequence

import torch
from torch import Tensor

from dsv4.cache import SequenceMemory
from dsv4.engine.scheduler import Work
from dsv4.engine.types import Request
from dsv4.model import Segment, Transformer


class Runner:
    """Holds the model and makes the memories that it fills."""

    def __init__(self, model: Transformer, memory_format: torch.dtype | str | None, max_rewind: int):
        self.model, self.memory_format, self.max_rewind = model, memory_format, max_rewind

    @torch.no_grad()
    def run(self, work: Sequence[Work]) -> tuple[list[Request], Tensor]:
        """Compute the work. Returns the n requests of which nothing is pending now, and the logits fp32 [n, vocab] of
        their last tokens. Memories are made on first use; an exception leaves all those of the work unusable.
        """
        if not work:
            return [], torch.empty(0, self.model.config.vocab_size)
        ids, segments = [], []
        for w in work:
            memory = w.request.memory = w.request.memory or self._new_memory(w.request)
            ids += w.request.ids[memory.length : memory.length + w.count]
            segments.append(Segment(w.count, memory))
        logits = self.model(torch.tensor(ids), segments=segments, rows="last")
        ready = [row for row, w in enumerate(work) if not w.request.pending]
        return [work[row].request for row in ready], logits[ready]

    def _new_memory(self, request: Request) -> SequenceMemory:
        """Room for what is known of the request; it grows with the text."""
        capacity, rewind = len(request.ids), self.max_rewind
        return self.model.new_cache(1, format=self.memory_format, capacity=capacity, max_rewind=rewind)[0]
