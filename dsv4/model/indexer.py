"""Which compressed entries a CSA query reads: small heads score every visible entry, the top k are chosen.

The scores only select; they do not enter the attention softmax, so nothing of the model's loss comes to them. They
learn from one of their own (ops.index_kl), and what they are made of is detached: it trains the indexer alone.

The published model also applies a Hadamard rotation to queries and keys: orthogonal, so without the FP4 rounding after
it it changes nothing. In a packed memory both are there, on keys when they are written and on queries by `as_query`.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from dsv4 import ops
from dsv4.cache import Compressed
from dsv4.config import LayerKind, ModelConfig
from dsv4.model.compressor import Compressor
from dsv4.model.layers import Linear
from dsv4.model.parts import Part
from dsv4.model.segments import Run
from dsv4.ops import rotate


class Asked(NamedTuple):
    """What a part's index scores are made of: q [n, Hi, Di], weights [n, Hi], keys [E, Di]. The graph leads to the
    indexer's parameters alone."""

    q: Tensor
    weights: Tensor
    keys: Tensor


# The entries int64 [n, topk] that a part's tokens read (-1 = none), or None: all visible ones; and what the scores are
# made of, where there is a loss for them.
Choice = tuple[Tensor | None, Asked | None]
ALL: Choice = (None, None)


class Indexed(NamedTuple):
    """What a layer's indexer came to in a run: `ops.index_kl` over all its tokens, with a graph, and the sums of
    `ops.index_recall` over a sample of them, fp64 [3]. (A tuple, so that wrappers of modules see the tensors.)"""

    kl: Tensor
    found: Tensor


class Indexer(nn.Module):
    """wq_b [heads*width, q_lora], weights_proj [heads, M] and a compressor of its own for the keys."""

    def __init__(self, config: ModelConfig, kind: LayerKind, dtype: torch.dtype):
        super().__init__()
        self.heads, self.width, self.topk = config.index_n_heads, config.index_head_dim, config.index_topk
        self.kind = kind
        self.wq_b = Linear(config.q_lora_rank, self.heads * self.width, dtype)
        self.weights_proj = Linear(config.hidden_size, self.heads, dtype)
        self.compressor = Compressor(config, kind, self.width, dtype)

    def forward(self, x: Tensor, qr: Tensor, run: Run, stores: list[Compressed | None]) -> list[Choice]:
        """What the tokens of each part choose.

        x [T, M] is the sublayer's input, qr [T, q_lora] the normed query latent, stores one per part. While no
        query sees more than topk entries there is nothing to choose; the keys are remembered for queries to come.
        """
        learns = run.index_learns and torch.is_grad_enabled()
        wanted = [not run.reads_all and p.groups[self.kind.name].visible.longest > self.topk for p in run.parts]
        # where a row is shared, others may want what this process alone has
        if not (any(wanted) or learns or run.memories() or run.is_shared):
            return [ALL] * len(run.parts)
        with torch.set_grad_enabled(learns):
            x, qr = x.detach(), qr.detach()
            keys = self.compressor(x, run, stores)
            if not (any(wanted) or learns):
                return [ALL] * len(run.parts)
            q, weights = self.queries(x, qr, run)
        found = []
        for part, pool, store, want in zip(run.parts, keys, stores, wanted, strict=True):
            asked = Asked(part.of(q), part.of(weights), pool) if learns else None
            chosen = self._choose(part.of(q), part.of(weights), pool, part, store) if want else None
            found.append((chosen, asked))
        return found

    def queries(self, x: Tensor, qr: Tensor, run: Run) -> tuple[Tensor, Tensor]:
        """What tokens ask with: q [T, Hi, Di] and the weights of the heads fp32 [T, Hi]."""
        q = rotate(self.wq_b(qr).view(len(x), self.heads, self.width), run.turn["compressed"])
        return q, self.weights_proj(x).float() * (self.width * self.heads) ** -0.5

    @torch.no_grad()
    def _choose(self, q: Tensor, weights: Tensor, keys: ops.Pool, part: Part, store: Compressed | None) -> Tensor:
        """The entries int64 [n, topk] that a part's queries choose."""
        if store is not None:
            q = store.entries.format.as_query(q)
        visible = part.groups[self.kind.name].visible
        if part.pinned is not None:
            return choose_with_pins(q, weights, keys, visible, -(-part.pinned // self.kind.ratio), self.topk)
        return ops.index_scores_topk(q, weights, keys, visible, self.topk)


def choose_with_pins(q: Tensor, weights: Tensor, keys: ops.Pool, visible: ops.Spans, pins: Tensor, k: int) -> Tensor:
    """As ops.index_scores_topk, but each query reads the first pins_i (int64 [n], on the host, at most k) entries that
    it sees, and the best of the others: what a text says later cannot push them out.

    The pinned entries are the first of an interval, so the others are an interval too, of which fewer are chosen.
    """
    chosen = torch.empty(len(q), k, dtype=torch.int64, device=q.device)
    for count in pins.unique().tolist():
        rows = (pins == count).nonzero()[:, 0]
        here, seen = rows.to(q.device), visible.of(rows)
        own = (seen.stop - seen.start).clamp(max=count)
        first = seen.start[:, None] + torch.arange(count)
        first = first.masked_fill(torch.arange(count) >= own[:, None], -1).to(q.device)
        rest = ops.Spans(seen.start + own, seen.stop)
        best = [ops.index_scores_topk(q[here], weights[here], keys, rest, k - count)] if count < k else []
        chosen[here] = torch.cat([first, *best], dim=1).sort(dim=1).values
    return chosen
