"""One block: attention, then the mixture of experts, each between a read and a write of the residual streams."""

from typing import Any

import torch
from torch import Tensor, nn

from dsv4.cache import LayerMemory
from dsv4.config import ModelConfig
from dsv4.model import hyper
from dsv4.model.indexer import Indexed
from dsv4.model.moe import MoE
from dsv4.model.segments import Run
from dsv4.model.step import run_blocks
from dsv4.model.variants import attention


class Block(nn.Module):
    def __init__(self, config: ModelConfig, layer: int, dtype: torch.dtype):
        super().__init__()
        self.config = config
        self.attn_norm = hyper.Enter(config)
        self.attn = attention(config, layer, dtype)
        self.ffn_norm = hyper.Enter(config)
        self.ffn = MoE(config, layer, dtype)
        hyper.add_parameters(self, "hc_attn", config)
        hyper.add_parameters(self, "hc_ffn", config)

    def forward(self, x_TNM: Tensor, ids_T: Tensor, run: Run, views: list[LayerMemory | None]) -> tuple[Any, ...]:
        """Streams [T, N, M] -> streams, and the gate's decision (Routing); `views` as in Attention. Where the run is
        one in which the indexer learns, and there is one, what it came to (Indexed) is third."""
        if len(views) == 1 and (done := run_blocks(self, [self], x_TNM, ids_T, run, views)) is not None:
            return done.streams, done.routing[0]  # the same in one call, for a few tokens
        h_TM, mix = self.attn_norm(x_TNM, hyper.parameters_of(self, "hc_attn"))  # N streams -> 1
        indexed: list[Indexed] = []
        x_TNM = hyper.write(x_TNM, self.attn(h_TM, run, views, indexed), mix)  # 1 -> N, mixed by the Sinkhorn matrix
        h_TM, mix = self.ffn_norm(x_TNM, hyper.parameters_of(self, "hc_ffn"))
        y_TM, routing = self.ffn(h_TM, ids_T)  # ids: the first layers route by token id
        return hyper.write(x_TNM, y_TM, mix), routing, *indexed
