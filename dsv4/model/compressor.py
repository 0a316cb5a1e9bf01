"""Tokens -> compressed entries: CSA pools with overlap (ratio 4), HCA without (ratio 128).

One method serves whole sequences and streams: the rows of the open group come from the memory, or there are none. The
arithmetic is ops.compress. A tail shorter than a group emits nothing and is not attended.
"""

import torch
from torch import Tensor, nn

from dsv4 import ops
from dsv4.cache import Compressed
from dsv4.config import LayerKind, ModelConfig
from dsv4.model.layers import RMSNorm, Weight
from dsv4.model.parts import Groups, Part
from dsv4.model.segments import Run


class EntryNorm(RMSNorm):
    """The norm of entries, which are pooled before it and rotated after it: one op. weight [d] fp32."""

    def forward(self, values: Tensor, scores: Tensor, groups: Groups, dtype: torch.dtype) -> Tensor:
        """Rows [R, c*d] fp32, scores with the positional bias -> the entries [G, d] of the groups that close."""
        return ops.compress(
            values, scores, groups.first_row, groups.has_previous, groups.kind.ratio, groups.kind.overlap,
            self.weight, self.eps, groups.turn, dtype,
        )  # fmt: skip


class Compressor(nn.Module):
    """wkv, wgate [c*d, M], ape [r, c*d] (a bias per place in the group), norm [d]; c = 2 with overlap."""

    def __init__(self, config: ModelConfig, kind: LayerKind, width: int, dtype: torch.dtype):
        super().__init__()
        self.kind = kind
        rows = width * (2 if kind.overlap else 1)
        self.wkv = Weight(rows, config.hidden_size, dtype=torch.float32)
        self.wgate = Weight(rows, config.hidden_size, dtype=torch.float32)
        self.ape = nn.Parameter(torch.empty(kind.ratio, rows, dtype=torch.float32))
        self.norm = EntryNorm(width, config.rms_norm_eps)

    def forward(self, x: Tensor, run: Run, stores: list[Compressed | None]) -> list[ops.Pool]:
        """For each part of the run its pool of entries [E, d]; `stores` (None: no memory) remember them.

        x [T, M] is the sublayer's input. Values and gate scores (bias added) are fp32 [T, c*d].
        """
        rows = ops.compressor_rows(x, self.wkv.weight, self.wgate.weight, self.ape, run.positions)
        return [self._pool(part.of(rows), part, store, x.dtype) for part, store in zip(run.parts, stores, strict=True)]

    def _pool(self, own: Tensor, part: Part, store: Compressed | None, dtype: torch.dtype) -> ops.Pool:
        """The pool of one part from its tokens' rows [n, 2, c*d]."""
        groups = part.groups[self.kind.name]
        if store is None:
            rows = own if part.shared is None else part.shared.rows(own, self.kind)
            entries = self.norm(rows[:, 0], rows[:, 1], groups, dtype)
            return entries if part.shared is None else part.shared.entries(entries, self.kind)
        assert groups.rows is not None and part.table is not None
        if groups.closing:
            rows = groups.rows.join(store.rows, own)
            groups.rows.store(store.rows, own)
            entries = self.norm(rows[:, 0], rows[:, 1], groups, dtype)
            store.entries.data[groups.entry] = store.entries.format.pack(entries)
        else:
            groups.rows.store(store.rows, own)
        return store.entries.view(part.table, part.pages)
