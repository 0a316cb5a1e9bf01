"""Multi-token prediction: one more block that, from the streams at t and the token at t+1, predicts token t+2."""

import torch
from torch import Tensor, nn

from dsv4.cache import LayerMemory
from dsv4.config import ModelConfig
from dsv4.model import hyper
from dsv4.model.block import Block
from dsv4.model.layers import Linear, RMSNorm
from dsv4.model.moe import Routing
from dsv4.model.segments import Run


class MTP(nn.Module):
    """A window-only block (layer number n_layers) between its own input projections, head collapse and norm.

    Embedding and output head are the trunk's: the embedded token comes in, the normed hidden state goes out.
    """

    def __init__(self, config: ModelConfig, dtype: torch.dtype):
        super().__init__()
        self.config = config
        m, eps = config.hidden_size, config.rms_norm_eps
        self.block = Block(config, config.num_hidden_layers, dtype)
        self.e_proj, self.h_proj = Linear(m, m, dtype), Linear(m, m, dtype)
        self.enorm, self.hnorm, self.norm = RMSNorm(m, eps), RMSNorm(m, eps), RMSNorm(m, eps)
        hyper.add_parameters(self, "hc_head", config, head=True)

    def forward(
        self, streams: Tensor, embedded: Tensor, ids: Tensor, run: Run, views: list[LayerMemory | None]
    ) -> tuple[Tensor, Tensor, Routing]:
        """Streams [T, N, M] of positions t (before the trunk's head collapse), embedding [T, M] and ids [T] of t+1.

        views: the block's own memory for each piece of the run, None where there is none. Returns the normed hidden
        state [T, M], for the shared head; the block's streams, for deeper drafts; routing.
        """
        x = self.e_proj(self.enorm(embedded))[:, None] + self.h_proj(self.hnorm(streams))
        x, routing = self.block(x, ids, run, views)
        return self.norm(hyper.collapse(x, hyper.parameters_of(self, "hc_head"), self.config)), x, routing
