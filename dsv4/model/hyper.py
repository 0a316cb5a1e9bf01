"""Manifold-constrained hyper-connections: N residual streams, read into one, written back and mixed.

The arithmetic is in ops (hyper_enter, hyper_write, head_collapse); the parameters lie flat on the block that uses them,
under their published names (`hc_attn_fn`, ...). All of it is fp32.
"""

import torch
from torch import Tensor, nn

from dsv4 import ops
from dsv4.config import ModelConfig
from dsv4.model.layers import RMSNorm

Hyper = tuple[nn.Parameter, nn.Parameter, nn.Parameter]  # fn, base, scale


def parameters(config: ModelConfig, *, head: bool = False) -> Hyper:
    """fn [rows, N*M], base [rows], scale [3]: rows = (2+N)*N; for a head collapse N rows and one scale."""
    num = config.hc_mult
    rows, scales = (num, 1) if head else ((2 + num) * num, 3)
    shapes = ((rows, num * config.hidden_size), (rows,), (scales,))
    fn, base, scale = (nn.Parameter(torch.empty(shape, dtype=torch.float32)) for shape in shapes)
    return fn, base, scale


class Enter(RMSNorm):
    """The norm of a sublayer's input, which it reads out of the N streams itself: one op. weight [M] fp32."""

    def __init__(self, config: ModelConfig):
        super().__init__(config.hidden_size, config.rms_norm_eps)
        self.iters, self.hc_eps = config.hc_sinkhorn_iters, config.hc_eps

    def forward(self, x_TNM: Tensor, hyper: Hyper) -> tuple[Tensor, Tensor, Tensor]:
        """N streams -> the sublayer's normed input [T, M], and post [T, N], comb [T, N, N] for ops.hyper_write.

        All three maps come from the streams as they are before the sublayer.
        """
        return ops.hyper_enter(x_TNM, *hyper, self.weight, self.iters, self.hc_eps, self.eps)


def collapse(x_TNM: Tensor, hyper: Hyper, config: ModelConfig) -> Tensor:
    """The head's weighted sum of the streams [T, M]."""
    return ops.head_collapse(x_TNM, *hyper, config.hc_eps, config.rms_norm_eps)
