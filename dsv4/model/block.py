"""One block: attention, then the mixture of experts, each between a read and a write of the residual streams."""

import torch
from torch import Tensor, nn

from dsv4 import ops
from dsv4.cache import LayerMemory
from dsv4.config import ModelConfig
from dsv4.model import hyper
from dsv4.model.attention import Attention
from dsv4.model.moe import MoE, Routing
from dsv4.model.segments import Run


class Block(nn.Module):
    def __init__(self, config: ModelConfig, layer: int, dtype: torch.dtype):
        super().__init__()
        self.config = config
        self.attn_norm = hyper.Enter(config)
        self.attn = Attention(config, layer, dtype)
        self.ffn_norm = hyper.Enter(config)
        self.ffn = MoE(config, layer, dtype)
        self.hc_attn_fn, self.hc_attn_base, self.hc_attn_scale = hyper.parameters(config)
        self.hc_ffn_fn, self.hc_ffn_base, self.hc_ffn_scale = hyper.parameters(config)

    def forward(
        self, x_TNM: Tensor, ids_T: Tensor, run: Run, views: list[LayerMemory | None]
    ) -> tuple[Tensor, Routing]:
        """Streams [T, N, M] -> streams, and the gate's decision; `views` as in Attention."""
        attn_hyper = (self.hc_attn_fn, self.hc_attn_base, self.hc_attn_scale)
        h_TM, post, comb = self.attn_norm(x_TNM, attn_hyper)  # N streams -> 1
        x_TNM = ops.hyper_write(x_TNM, self.attn(h_TM, run, views), post, comb)  # 1 -> N, mixed by the Sinkhorn matrix
        ffn_hyper = (self.hc_ffn_fn, self.hc_ffn_base, self.hc_ffn_scale)
        h_TM, post, comb = self.ffn_norm(x_TNM, ffn_hyper)
        y_TM, routing = self.ffn(h_TM, ids_T)  # ids: the first layers route by token id
        return ops.hyper_write(x_TNM, y_TM, post, comb), routing
