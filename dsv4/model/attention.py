"""V4's attention, all three kinds: a sliding window, and with it nothing (ratio 0), CSA (4) or HCA (128).

One shared key = value head serves every query head. One softmax covers the window, the compressed entries and a sink;
because keys are also values, the output is rotated back by the query's position. Legend: T tokens, M model width,
H heads, D head width, G output groups.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from dsv4 import ops
from dsv4.cache import LayerMemory
from dsv4.config import ModelConfig
from dsv4.model.compressor import Compressor
from dsv4.model.indexer import ALL, Asked, Choice, Indexed, Indexer
from dsv4.model.layers import Weight, with_unused
from dsv4.model.parts import Part
from dsv4.model.segments import Run

SAMPLED = 256  # queries of a part whose choice is compared with the best one, to be reported


class Read(NamedTuple):
    """What ops.sparse_attention reads; asked: what the indexer is to learn from besides."""

    window_kv: ops.Pool
    window: ops.Spans
    entries: ops.Pool | None
    visible: ops.Spans | None
    chosen: Tensor | None
    asked: Asked | None = None


class Attention(nn.Module):
    """Published names: wq_a, q_norm, wq_b, wkv, kv_norm, attn_sink, wo_a, wo_b, and compressor, indexer where used."""

    def __init__(self, config: ModelConfig, layer: int, dtype: torch.dtype):
        super().__init__()
        c = config
        self.heads, self.width, self.groups, self.eps = c.num_attention_heads, c.head_dim, c.o_groups, c.rms_norm_eps
        self.kind = c.layer_kind(layer)
        self.wq_a = Weight(c.q_lora_rank, c.hidden_size, dtype=dtype)
        self.q_norm = Weight(c.q_lora_rank, dtype=torch.float32)
        self.wq_b = Weight(self.heads * self.width, c.q_lora_rank, dtype=dtype)
        self.wkv = Weight(self.width, c.hidden_size, dtype=dtype)
        self.kv_norm = Weight(self.width, dtype=torch.float32)
        self.attn_sink = nn.Parameter(torch.empty(self.heads, dtype=torch.float32))
        self.wo_a = Weight(self.groups * c.o_lora_rank, self.heads * self.width // self.groups, dtype=dtype)
        self.wo_b = Weight(c.hidden_size, self.groups * c.o_lora_rank, dtype=dtype)
        self.compressor = Compressor(c, self.kind, self.width, dtype) if self.kind.ratio > 1 else None
        self.indexer = Indexer(c, self.kind, dtype) if self.kind.indexed else None

    def forward(
        self, x_TM: Tensor, run: Run, views: list[LayerMemory | None], indexed: list[Indexed] | None = None
    ) -> Tensor:
        """[T, M] -> [T, M]; `views` holds this layer's stores for each part of the run, None without memory.

        indexed: gets what the indexer came to, where the run is one in which it learns.
        """
        turn = run.turn["compressed" if self.kind.ratio else "window"]
        qr, q_THD, kv_TD, row_TD = ops.project_in(
            x_TM, self.wq_a.weight, self.q_norm.weight, self.wq_b.weight, self.wkv.weight, self.kv_norm.weight,
            self.heads, self.eps, turn,
        )  # fmt: skip
        read, out, learned = self.read(x_TM, qr, kv_TD, row_TD, run, views), [], False
        for part, rows in zip(run.parts, read, strict=True):
            q = part.of(q_THD)
            o, lse = ops.sparse_attention(q, *rows[:5], self.attn_sink, self.width**-0.5)
            out.append(o)
            if rows.asked is not None and indexed is not None:
                indexed.append(self.learn(q.detach(), rows, lse))
                learned = True
        # heads in G groups, each through its own low-rank matrix, then one projection to M (paper 2.3.1)
        y_TM = ops.project_out(run.merge(out), turn, self.wo_a.weight, self.groups, self.wo_b.weight)
        return y_TM if self.indexer is None or learned else with_unused(y_TM, self.indexer.parameters())

    def learn(self, q: Tensor, read: Read, lse: Tensor) -> Indexed:
        """The indexer's loss for queries q [n, H, D], whose attention had the log-sum-exp lse [n, H]; and how well its
        choice would be, for some of the queries that see more entries than it may choose."""
        asked, entries, visible, scale = read.asked, read.entries, read.visible, self.width**-0.5
        assert self.indexer is not None and asked is not None and isinstance(entries, Tensor) and visible is not None
        kl = ops.index_kl(*asked, q, entries.detach(), lse, visible, read.chosen, scale)
        with torch.no_grad():
            more = (visible.stop - visible.start > self.indexer.topk).nonzero()[:, 0]
            if not len(more):
                return Indexed(kl, torch.zeros(3, dtype=torch.float64, device=q.device))
            some = more[torch.arange(min(SAMPLED, len(more))) * len(more) // min(SAMPLED, len(more))]
            rows, seen = some.to(q.device), visible.of(some)
            window = read.window.of(some)
            _, lse = ops.sparse_attention(
                q[rows], read.window_kv, window, entries, seen, None, self.attn_sink, scale
            )  # of all entries that a query sees, which may be more than it has read
            found = ops.index_recall(
                asked.q[rows], asked.weights[rows], asked.keys, q[rows], entries, lse, seen, self.indexer.topk, scale
            )
        return Indexed(kl, found)

    def read(
        self, x: Tensor, qr: Tensor, kv: Tensor, row: Tensor, run: Run, views: list[LayerMemory | None]
    ) -> list[Read]:
        """What the tokens of each part read. kv [T, D]: their key = value rows, row: these rotated."""
        read = []
        for part, view, (pool, choice) in zip(run.parts, views, self.compressed(x, qr, run, views), strict=True):
            visible = part.groups[self.kind.name].visible if self.kind.ratio else None
            read.append(Read(self.window(row, part, view), part.window, pool, visible, *choice))
        return read

    def window(self, row: Tensor, part: Part, view: LayerMemory | None) -> Tensor:
        """The part's window rows: those of its memories or of other processes, and its own, which are remembered."""
        own = part.of(row)
        if view is None:
            return own if part.shared is None else part.shared.window(own)
        assert part.ring is not None and view.window is not None
        kept = view.window.format.pack(own)
        # a query reads its own tokens as later ones will: rounded to the memory's format
        joined = part.ring.join(view.window, view.window.format.unpack(kept))
        part.ring.store(view.window, kept)
        return joined

    def compressed(
        self, x: Tensor, qr: Tensor, run: Run, views: list[LayerMemory | None]
    ) -> list[tuple[ops.Pool | None, Choice]]:
        """For each part its pool of entries [E, D] and which of them each token reads."""
        if self.compressor is None:
            return [(None, ALL)] * len(run.parts)
        pools = self.compressor(x, run, [v.attention if v else None for v in views])
        if self.indexer is None:
            return [(pool, ALL) for pool in pools]
        return list(zip(pools, self.indexer(x, qr, run, [v.index if v else None for v in views]), strict=True))
