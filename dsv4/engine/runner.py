"""Scheduled work -> one call of the model: chunks of prompts and single tokens side by side, nothing padded."""

from collections.abc import Sequence

import torch
from torch import Tensor

from dsv4.engine.scheduler import Work
from dsv4.engine.types import Request
from dsv4.model import LanguageModel


class Runner:
    """Holds the model."""

    def __init__(self, model: LanguageModel):
        self.model = model

    @torch.no_grad()
    def run(self, work: Sequence[Work]) -> tuple[list[Request], Tensor]:
        """Compute the work. Returns the n requests of which nothing is pending now, and the logits fp32 [n, vocab] of
        their last tokens. An exception leaves all memories of the work unusable.
        """
        if not work:
            return [], torch.empty(0, self.model.config.vocab_size)
        ids, segments = [], []
        for w in work:
            ids += w.request.ids[w.memory.length : w.memory.length + w.count]
            segments.append((w.count, w.memory))
        logits = self.model(torch.tensor(ids), segments=segments, rows="last")
        ready = [row for row, w in enumerate(work) if not w.request.pending]
        return [work[row].request for row in ready], logits[ready]
