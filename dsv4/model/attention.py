"""V4's attention, all three kinds: a sliding window, and with it nothing (ratio 0), CSA (4) or HCA (128).

One shared key = value head serves every query head. One softmax covers the window, the compressed entries and a sink;
because keys are also values, the output is rotated back by the query's position. Legend: T tokens, M model width,
H heads, D head width, G output groups.
"""

from typing import Any

import torch
from torch import Tensor, nn

from dsv4 import ops
from dsv4.cache import LayerMemory
from dsv4.config import ModelConfig
from dsv4.model.compressor import Compressor
from dsv4.model.indexer import Indexer
from dsv4.model.layers import GroupedLinear, Linear, RMSNorm, rms_normalise
from dsv4.model.segments import Run
from dsv4.ops import rotate


class Attention(nn.Module):
    """Published names: wq_a, q_norm, wq_b, wkv, kv_norm, attn_sink, wo_a, wo_b, and compressor, indexer where used."""

    def __init__(self, config: ModelConfig, layer: int, dtype: torch.dtype):
        super().__init__()
        c = config
        self.heads, self.width, self.groups, self.eps = c.num_attention_heads, c.head_dim, c.o_groups, c.rms_norm_eps
        self.kind, self.ratio = c.layer_kind(layer), c.compress_ratios[layer]
        self.wq_a = Linear(c.hidden_size, c.q_lora_rank, dtype)
        self.q_norm = RMSNorm(c.q_lora_rank, c.rms_norm_eps)
        self.wq_b = Linear(c.q_lora_rank, self.heads * self.width, dtype)
        self.wkv = Linear(c.hidden_size, self.width, dtype)
        self.kv_norm = RMSNorm(self.width, c.rms_norm_eps)
        self.attn_sink = nn.Parameter(torch.empty(self.heads, dtype=torch.float32))
        self.wo_a = GroupedLinear(self.groups, self.heads * self.width // self.groups, c.o_lora_rank, dtype)
        self.wo_b = Linear(self.groups * c.o_lora_rank, c.hidden_size, dtype)
        self.compressor = Compressor(c, self.ratio, self.width, dtype) if self.ratio else None
        self.indexer = Indexer(c, dtype) if self.kind == "csa" else None

    def forward(self, x_TM: Tensor, run: Run, views: list[LayerMemory | None]) -> Tensor:
        """[T, M] -> [T, M]; `views` holds this layer's memory for each piece of the run, None where there is none."""
        turn = run.turn["window" if self.kind == "window" else "compressed"]
        qr = self.q_norm(self.wq_a(x_TM))
        q_THD = rms_normalise(self.wq_b(qr).view(-1, self.heads, self.width), self.eps)
        q_THD = rotate(q_THD, turn)
        kv_TD = rotate(self.kv_norm(self.wkv(x_TM)), turn)
        pools, chosen = self.compressed(x_TM, qr, run, views)
        out = []
        for piece, view, pool, rows in zip(run.pieces, views, pools, chosen, strict=True):
            window = kv_TD[piece.tokens]
            if view is not None:
                # a query reads its own piece as later ones will: rounded to the memory's format
                window = torch.cat([view.window.last(piece.history, piece.start), view.window.format.as_read(window)])
                view.window.write(kv_TD[piece.tokens], piece.start)
            visible = piece.groups[self.ratio].visible if self.ratio else None
            o, _ = ops.sparse_attention(
                q_THD[piece.tokens], window, piece.window, pool, visible, rows, self.attn_sink, self.width**-0.5
            )
            out.append(o)
        o_THD = rotate(out[0] if len(out) == 1 else torch.cat(out), turn.conj())
        return self.project_out(o_THD)

    def compressed(
        self, x: Tensor, qr: Tensor, run: Run, views: list[LayerMemory | None]
    ) -> tuple[list[ops.Pool | None], list[Tensor | None]]:
        """For each piece its pool of entries [E, D] and the rows that each token reads (None = all visible)."""
        nothing: list[Any] = [None] * len(run.pieces)
        if self.compressor is None:
            return nothing, nothing
        pools: list[ops.Pool | None] = [*self.compressor(x, run, [v.attention if v else None for v in views])]
        if self.indexer is None:
            return pools, nothing
        return pools, self.indexer(x, qr, run, [v.index if v else None for v in views])

    def project_out(self, o_THD: Tensor) -> Tensor:
        """Heads in G groups, each through its own low-rank matrix, then one projection to M (paper 2.3.1)."""
        return self.wo_b(self.wo_a(o_THD.reshape(len(o_THD), self.groups, -1)).flatten(1))
