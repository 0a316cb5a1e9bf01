"""The output head: hidden states -> logits in fp32, or straight to the loss without ever holding the logits."""

import torch
from torch import Tensor, nn

from dsv4 import ops

IGNORE = -100  # the target where there is nothing to predict


class Head(nn.Module):
    """weight [V, M]; logits and losses are fp32 whatever it is held in."""

    def __init__(self, hidden_size: int, vocab_size: int, dtype: torch.dtype):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, hidden_size, dtype=dtype))

    def forward(self, hidden: Tensor, targets: Tensor | None = None) -> Tensor:
        """hidden [n, M] -> logits fp32 [n, V]; with targets int64 [n] the sum of -log p(target) over those not IGNORE.

        The sum is taken block by block over the rows (ops.cross_entropy): no [n, V] is held, forward or backward.
        """
        if targets is None:
            return ops.linear(ops.cast(hidden, torch.float32), self.weight)
        return ops.cross_entropy(hidden, self.weight, targets, IGNORE)
