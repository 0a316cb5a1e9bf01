"""V4's attention, all three kinds: a sliding window, and with it nothing (ratio 0), CSA (4) or HCA (128).

One shared key = value head serves every query head. One softmax covers the window, the compressed entries and a sink;
because keys are also values, the output is rotated back by the query's position. Legend: T tokens, M model width,
H heads, D head width, G output groups.
"""

import torch
from torch import Tensor, nn

from dsv4 import ops
from dsv4.cache import LayerMemory
from dsv4.config import ModelConfig
from dsv4.model.compressor import Compressor
from dsv4.model.indexer import Indexer
from dsv4.model.layers import Weight
from dsv4.model.segments import Part, Run

# window rows and their intervals, entries and theirs, chosen rows: what ops.sparse_attention reads
Read = tuple[ops.Pool, ops.Spans, ops.Pool | None, ops.Spans | None, Tensor | None]


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

    def forward(self, x_TM: Tensor, run: Run, views: list[LayerMemory | None]) -> Tensor:
        """[T, M] -> [T, M]; `views` holds this layer's stores for each part of the run, None without memory."""
        turn = run.turn["compressed" if self.kind.ratio else "window"]
        qr, q_THD, kv_TD, row_TD = ops.project_in(
            x_TM, self.wq_a.weight, self.q_norm.weight, self.wq_b.weight, self.wkv.weight, self.kv_norm.weight,
            self.heads, self.eps, turn,
        )  # fmt: skip
        read = self.read(x_TM, qr, kv_TD, row_TD, run, views)
        out = [
            ops.sparse_attention(part.of(q_THD), *rows, self.attn_sink, self.width**-0.5)[0]
            for part, rows in zip(run.parts, read, strict=True)
        ]
        # heads in G groups, each through its own low-rank matrix, then one projection to M (paper 2.3.1)
        return ops.project_out(run.merge(out), turn, self.wo_a.weight, self.groups, self.wo_b.weight)

    def read(
        self, x: Tensor, qr: Tensor, kv: Tensor, row: Tensor, run: Run, views: list[LayerMemory | None]
    ) -> list[Read]:
        """What the tokens of each part read. kv [T, D]: their key = value rows, row: these rotated."""
        read = []
        for part, view, (pool, chosen) in zip(run.parts, views, self.compressed(x, qr, run, views), strict=True):
            visible = part.groups[self.kind.name].visible if self.kind.ratio else None
            read.append((self.window(row, part, view), part.window, pool, visible, chosen))
        return read

    def window(self, row: Tensor, part: Part, view: LayerMemory | None) -> Tensor:
        """The part's window rows: those of its memories, and its own, which are remembered."""
        own = part.of(row)
        if view is None:
            return own
        assert part.ring is not None and view.window is not None
        kept = view.window.format.pack(own)
        # a query reads its own tokens as later ones will: rounded to the memory's format
        joined = part.ring.join(view.window, view.window.format.unpack(kept))
        part.ring.store(view.window, kept)
        return joined

    def compressed(
        self, x: Tensor, qr: Tensor, run: Run, views: list[LayerMemory | None]
    ) -> list[tuple[ops.Pool | None, Tensor | None]]:
        """For each part its pool of entries [E, D] and the rows that each token reads (None = all visible)."""
        if self.compressor is None:
            return [(None, None)] * len(run.parts)
        pools = self.compressor(x, run, [v.attention if v else None for v in views])
        if self.indexer is None:
            return [(pool, None) for pool in pools]
        return list(zip(pools, self.indexer(x, qr, run, [v.index if v else None for v in views]), strict=True))
