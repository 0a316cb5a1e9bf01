"""Manifold-constrained hyper-connections: N residual streams, read into one, written back and mixed.

The arithmetic is in ops (hyper_maps, hyper_read, hyper_write); the parameters lie flat on the block that uses them,
under their published names (`hc_attn_fn`, ...). All of it is fp32.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsv4 import ops
from dsv4.config import ModelConfig

Hyper = tuple[nn.Parameter, nn.Parameter, nn.Parameter]  # fn, base, scale


def parameters(config: ModelConfig, *, head: bool = False) -> Hyper:
    """fn [rows, N*M], base [rows], scale [3]: rows = (2+N)*N; for a head collapse N rows and one scale."""
    num = config.hc_mult
    rows, scales = (num, 1) if head else ((2 + num) * num, 3)
    shapes = ((rows, num * config.hidden_size), (rows,), (scales,))
    fn, base, scale = (nn.Parameter(torch.empty(shape, dtype=torch.float32)) for shape in shapes)
    return fn, base, scale


def read(x_TNM: Tensor, hyper: Hyper, config: ModelConfig) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """N streams -> the sublayer's input [T, M], and the function that writes its output back (1 -> N, mixed).

    All three maps come from the streams as they are before the sublayer.
    """
    fn, base, scale = hyper
    c = config
    pre, post, comb = ops.hyper_maps(x_TNM, fn, base, scale, c.hc_sinkhorn_iters, c.hc_eps, c.rms_norm_eps)
    return ops.hyper_read(x_TNM, pre), lambda y_TM: ops.hyper_write(x_TNM, y_TM, post, comb)


def collapse(x_TNM: Tensor, hyper: Hyper, config: ModelConfig) -> Tensor:
    """The head's weighted sum of the streams [T, M]: sigmoid weights, no Sinkhorn, no normalisation."""
    fn, base, scale = hyper
    flat = x_TNM.flatten(1).float()
    rho = torch.rsqrt(flat.square().mean(dim=1, keepdim=True) + config.rms_norm_eps)
    pre = torch.sigmoid(scale * (F.linear(flat, fn.float()) * rho) + base) + config.hc_eps
    return ops.hyper_read(x_TNM, pre)
