"""What V4's attention is compared with: the same projections, sink and output, but other rows in place of CSA and HCA.

dense: every token's row. anchors: the window, and about the square root of the number of tokens, those with the best
learned score. lowrank: the window, and every older token rebuilt from few numbers. All keep a row for every token
(cache/layer.py), in pages as entries are.
"""

import math

import torch
from torch import Tensor

from dsv4 import ops
from dsv4.cache import Entries, LayerMemory
from dsv4.config import ModelConfig
from dsv4.model.attention import Attention, Read
from dsv4.model.layers import Linear
from dsv4.model.parts import Part, TokenRows
from dsv4.model.segments import Run


def attention(config: ModelConfig, layer: int, dtype: torch.dtype) -> Attention:
    """The attention of a layer, of the kind that the configuration says."""
    kinds = {"dense": DenseAttention, "anchors": AnchorAttention, "lowrank": LowRankAttention}
    return kinds.get(config.layer_kind(layer).name, Attention)(config, layer, dtype)


def remembered(own: Tensor, part: Part, store: Entries | None) -> ops.Pool:
    """A part's own rows [n, d] go into the store; all rows of its pages. Without a store its own are all there are."""
    if store is None:
        return own
    assert part.every is not None and part.every.entry is not None and part.table is not None
    store.data[part.every.entry] = store.format.pack(own)
    return store.view(part.table, part.pages)


def every(part: Part) -> TokenRows:
    assert part.every is not None, "the run was planned for another attention"
    return part.every


class DenseAttention(Attention):
    """A window without an end."""

    def read(
        self, x: Tensor, qr: Tensor, kv: Tensor, row: Tensor, run: Run, views: list[LayerMemory | None]
    ) -> list[Read]:
        return [
            Read(remembered(part.of(row), part, view.rows if view else None), every(part).visible, None, None, None)
            for part, view in zip(run.parts, views, strict=True)
        ]


class AnchorAttention(Attention):
    """anchor_score [1, M] fp32: token j has the score s_j = w . x_j, and as an anchor its row times 2 sigmoid(s_j), by
    which the score learns. The token at position p reads ceil(sqrt(p + 1)) anchors, of all up to its own."""

    def __init__(self, config: ModelConfig, layer: int, dtype: torch.dtype):
        super().__init__(config, layer, dtype)
        self.anchor_score = Linear(config.hidden_size, 1, dtype, fp32=True)

    def read(
        self, x: Tensor, qr: Tensor, kv: Tensor, row: Tensor, run: Run, views: list[LayerMemory | None]
    ) -> list[Read]:
        score = self.anchor_score(x)
        scaled = row * (2 * torch.sigmoid(score)).to(row.dtype)
        read = []
        for part, view in zip(run.parts, views, strict=True):
            visible = every(part).visible
            rows = remembered(part.of(scaled), part, view.rows if view else None)
            scores = remembered(part.of(score), part, view.scores if view else None)
            most = math.isqrt(visible.longest - 1) + 1
            chosen = ops.best_rows(scores[:].detach().flatten(), visible, part.of(anchors(run)), most)
            read.append(Read(self.window(row, part, view), part.window, rows, visible, chosen))
        return read


def anchors(run: Run) -> Tensor:
    """The number of anchors of each token of a run: the square root of what it sees, rounded up, int64 [T]."""
    seen = run.positions + 1
    root = seen.double().sqrt().long()  # exact for squares: doubles hold them, and their roots
    return root + (root * root < seen)


class LowRankAttention(Attention):
    """far_down [rank, D - R] and far_up [D - R, rank]: of a token that has left the window remains far_down of its row
    before the rotation, and its R rotated numbers. It is rebuilt where it is read, once for all queries of a call."""

    def __init__(self, config: ModelConfig, layer: int, dtype: torch.dtype):
        super().__init__(config, layer, dtype)
        self.plain = config.head_dim - config.qk_rope_head_dim
        self.rank = config.attention_rank
        self.far_down = Linear(self.plain, self.rank, dtype)
        self.far_up = Linear(self.rank, self.plain, dtype)

    def read(
        self, x: Tensor, qr: Tensor, kv: Tensor, row: Tensor, run: Run, views: list[LayerMemory | None]
    ) -> list[Read]:
        low = torch.cat([self.far_down(kv[:, : self.plain]), row[:, self.plain :]], dim=1)
        read = []
        for part, view in zip(run.parts, views, strict=True):
            own, store, place = part.of(low), view.rows if view else None, every(part).read
            if store is not None:
                remembered(own, part, store)
                own = store.format.unpack(store.data[place]).to(low.dtype)
            else:
                own = own[place]
            rebuilt = torch.cat([self.far_up(own[:, : self.rank]), own[:, self.rank :]], dim=1)
            read.append(Read(self.window(row, part, view), part.window, rebuilt, every(part).visible, None))
        return read
