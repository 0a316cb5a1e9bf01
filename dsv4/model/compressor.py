"""Tokens -> compressed entries: CSA pools with overlap (ratio 4), HCA without (ratio 128).

One method serves whole sequences and streams: the rows of the open group come from the memory, or there are none. The
arithmetic is ops.compress. A tail shorter than a group emits nothing and is not attended.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsv4 import ops
from dsv4.cache import Compressed
from dsv4.config import ModelConfig
from dsv4.model.layers import Linear, RMSNorm
from dsv4.model.segments import Groups, Piece, Run


class EntryNorm(RMSNorm):
    """The norm of entries, which are pooled before it and rotated after it: one op. weight [d] fp32."""

    def forward(self, values: Tensor, scores: Tensor, groups: Groups, overlap: bool, dtype: torch.dtype) -> Tensor:
        """Rows [R, c*d] fp32, scores with the positional bias -> the entries [G, d] of the groups that close."""
        return ops.compress(
            values, scores, groups.first_row, groups.has_previous, groups.ratio, overlap, self.weight, self.eps,
            groups.turn, dtype,
        )  # fmt: skip


class Compressor(nn.Module):
    """wkv, wgate [c*d, M], ape [r, c*d] (a bias per place in the group), norm [d]; c = 2 with overlap."""

    def __init__(self, config: ModelConfig, ratio: int, width: int, dtype: torch.dtype):
        super().__init__()
        self.ratio, self.overlap = ratio, ratio == 4
        rows = width * (2 if self.overlap else 1)
        self.wkv = Linear(config.hidden_size, rows, dtype, fp32=True)
        self.wgate = Linear(config.hidden_size, rows, dtype, fp32=True)
        self.ape = nn.Parameter(torch.empty(ratio, rows, dtype=torch.float32))
        self.norm = EntryNorm(width, config.rms_norm_eps)

    def forward(self, x: Tensor, run: Run, stores: list[Compressed | None]) -> list[ops.Pool]:
        """For each piece of the run its pool of entries [existing + new, d]; `stores` (None: no memory) remember them.

        x [T, M] is the sublayer's input. Values and gate scores (bias added) are fp32 [T, c*d].
        """
        values, scores = self.wkv(x), self.wgate(x) + F.embedding(run.positions % self.ratio, self.ape.float())
        return [
            self._pool(values[p.tokens], scores[p.tokens], p, store, x.dtype)
            for p, store in zip(run.pieces, stores, strict=True)
        ]

    def _pool(
        self, values: Tensor, scores: Tensor, piece: Piece, store: Compressed | None, dtype: torch.dtype
    ) -> ops.Pool:
        """The pool of one piece from its tokens' rows [n, c*d]."""
        groups = piece.groups[self.ratio]
        if store is not None:
            rows = torch.stack([values, scores], dim=1)
            both = torch.cat([store.rows.last(groups.carried, piece.start), rows])
            store.rows.write(rows, piece.start)
            values, scores = both.unbind(1)
        entries = self.norm(values, scores, groups, self.overlap, dtype)
        if store is None:
            return entries
        store.entries.write(entries, groups.existing)
        return store.entries.view(groups.existing + len(entries))
