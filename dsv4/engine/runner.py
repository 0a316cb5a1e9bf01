"""Scheduled shares -> one call of the model: chunks of prompts and single tokens side by side, nothing padded."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dsv4.engine.scheduler import Share
from dsv4.engine.types import Request
from dsv4.model import LanguageModel, Segment


def segment_of(share: Share) -> Segment:
    """The piece of a run that a share is."""
    memory: Any = share.memory
    return Segment(share.count, memory, share.request.params.pinned)


class Runner:
    """Holds the model."""

    def __init__(self, model: LanguageModel):
        self.model = model

    @torch.no_grad()
    def run(self, shares: Sequence[Share]) -> tuple[list[Request], Tensor]:
        """Compute the shares. Returns the n requests of which nothing is pending now, and the logits fp32 [n, vocab] of
        their last tokens. An exception leaves all memories of the shares unusable.
        """
        if not shares:
            return [], torch.empty(0, self.model.config.vocab_size)
        ids, segments = [], []
        for share in shares:
            ids += share.request.ids[share.memory.length : share.memory.length + share.count]
            segments.append(segment_of(share))
        logits = self.model(torch.tensor(ids), segments=segments, rows="last")
        ready = [row for row, share in enumerate(shares) if not share.request.pending]
        return [shares[row].request for row in ready], logits[ready]
