"""Tokens -> compressed entries: CSA pools with overlap (ratio 4), HCA without (ratio 128).

One method serves whole sequences and streams: the rows of the open group come from the memory, or there are none.
Everything up to the norm is fp32. A tail shorter than a group emits nothing and is not attended.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsv4 import ops
from dsv4.cache import Compressed
from dsv4.config import ModelConfig
from dsv4.model.layers import Linear, RMSNorm
from dsv4.model.rope import rotate
from dsv4.model.segments import Piece, Run


class Compressor(nn.Module):
    """wkv, wgate [c*d, M], ape [r, c*d] (a bias per place in the group), norm [d]; c = 2 with overlap."""

    def __init__(self, config: ModelConfig, ratio: int, width: int, dtype: torch.dtype):
        super().__init__()
        self.ratio, self.overlap = ratio, ratio == 4
        rows = width * (2 if self.overlap else 1)
        self.wkv = Linear(config.hidden_size, rows, dtype, fp32=True)
        self.wgate = Linear(config.hidden_size, rows, dtype, fp32=True)
        self.ape = nn.Parameter(torch.empty(ratio, rows, dtype=torch.float32))
        self.norm = RMSNorm(width, config.rms_norm_eps)

    def project(self, x: Tensor, run: Run) -> tuple[Tensor, Tensor]:
        """Values and gate scores (bias added) of every token: fp32 [T, c*d] each."""
        return self.wkv(x), self.wgate(x) + F.embedding(run.positions % self.ratio, self.ape.float())

    def forward(
        self, values: Tensor, scores: Tensor, piece: Piece, store: Compressed | None, dtype: torch.dtype
    ) -> ops.Pool:
        """The pool of entries [existing + new, d] of a piece, from its tokens' rows [n, c*d]; remembers both."""
        groups = piece.groups[self.ratio]
        if store is not None:
            rows = torch.stack([values, scores], dim=1)
            both = torch.cat([store.rows.last(groups.carried, piece.start), rows])
            store.rows.write(rows, piece.start)
            values, scores = both.unbind(1)
        pooled = ops.compress(values, scores, groups.first_row, groups.has_previous, self.ratio, self.overlap)
        entries = rotate(self.norm(pooled.to(dtype)), groups.turn)
        if store is None:
            return entries
        store.entries.write(entries, groups.existing)
        return store.entries.view(groups.existing + len(entries))
