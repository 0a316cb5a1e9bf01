"""Which compressed entries a CSA query reads: small heads score every visible entry, the top k are chosen.

The scores only select; they do not enter the attention softmax, so they carry no gradient. The published model also
applies a Hadamard rotation to queries and keys: orthogonal, so without the FP4 rounding after it it changes nothing. In
a packed memory both are there, on keys when they are written and on queries by `as_query`.
"""

import torch
from torch import Tensor, nn

from dsv4 import ops
from dsv4.cache import Compressed
from dsv4.config import LayerKind, ModelConfig
from dsv4.model.compressor import Compressor
from dsv4.model.layers import Linear
from dsv4.model.segments import Part, Run
from dsv4.ops import rotate


class Indexer(nn.Module):
    """wq_b [heads*width, q_lora], weights_proj [heads, M] and a compressor of its own for the keys."""

    def __init__(self, config: ModelConfig, kind: LayerKind, dtype: torch.dtype):
        super().__init__()
        self.heads, self.width, self.topk = config.index_n_heads, config.index_head_dim, config.index_topk
        self.kind = kind
        self.wq_b = Linear(config.q_lora_rank, self.heads * self.width, dtype)
        self.weights_proj = Linear(config.hidden_size, self.heads, dtype)
        self.compressor = Compressor(config, kind, self.width, dtype)

    @torch.no_grad()
    def forward(self, x: Tensor, qr: Tensor, run: Run, stores: list[Compressed | None]) -> list[Tensor | None]:
        """For each part the chosen entries int64 [n, topk] (-1 = none), or None where all visible ones are read.

        x [T, M] is the sublayer's input, qr [T, q_lora] the normed query latent, stores one per part. While no
        query sees more than topk entries there is nothing to choose; the keys are remembered for queries to come.
        """
        wanted = [part.groups[self.kind.name].visible.longest > self.topk for part in run.parts]
        if not any(wanted) and not run.memories():
            return [None] * len(run.parts)
        keys = self.compressor(x, run, stores)
        if not any(wanted):
            return [None] * len(run.parts)
        q = rotate(self.wq_b(qr).view(len(x), self.heads, self.width), run.turn["compressed"])
        weights = self.weights_proj(x).float() * (self.width * self.heads) ** -0.5
        return [
            self._choose(part.of(q), part.of(weights), pool, part, store) if want else None
            for part, pool, store, want in zip(run.parts, keys, stores, wanted, strict=True)
        ]

    def _choose(self, q: Tensor, weights: Tensor, keys: ops.Pool, part: Part, store: Compressed | None) -> Tensor:
        """The entries int64 [n, topk] that a part's queries choose."""
        if store is not None:
            q = store.entries.format.as_query(q)
        return ops.index_scores_topk(q, weights, keys, part.groups[self.kind.name].visible, self.topk)
