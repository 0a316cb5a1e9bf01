"""Residual streams: N of them read into one, written back and mixed (mHC), and what that is compared with.

mhc: mixing by a matrix that Sinkhorn makes doubly stochastic. hc: unconstrained hyper-connections, the same read and
write but mixing by I + tanh(logits), which may grow without bound over depth. plain: a single stream, x + f(norm(x)),
without parameters of its own. The arithmetic is in ops (hyper_enter, hyper_write, head_collapse); the parameters lie
flat on the block that uses them, under their published names (`hc_attn_fn`, ...). All of it is fp32.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsv4 import ops
from dsv4.config import ModelConfig
from dsv4.model.layers import RMSNorm
from dsv4.ops.reference import hyper_logits

Hyper = tuple[nn.Parameter, nn.Parameter, nn.Parameter]  # fn, base, scale
Mix = tuple[Tensor, Tensor] | None  # post [T, N], comb [T, N, N]; None for a plain residual


def add_parameters(module: nn.Module, prefix: str, config: ModelConfig, *, head: bool = False) -> None:
    """Give a module prefix_fn [rows, N*M], prefix_base [rows], prefix_scale [3]: rows = (2+N)*N; for a head collapse N
    rows and one scale. A plain residual has none of them."""
    if config.residual == "plain":
        return
    num = config.hc_mult
    rows, scales = (num, 1) if head else ((2 + num) * num, 3)
    for leaf, shape in (("fn", (rows, num * config.hidden_size)), ("base", (rows,)), ("scale", (scales,))):
        module.register_parameter(f"{prefix}_{leaf}", nn.Parameter(torch.empty(shape, dtype=torch.float32)))


def parameters_of(module: nn.Module, prefix: str) -> Hyper | None:
    """What `add_parameters` gave it."""
    if not hasattr(module, f"{prefix}_fn"):
        return None
    fn, base, scale = (getattr(module, f"{prefix}_{leaf}") for leaf in ("fn", "base", "scale"))
    return fn, base, scale


class Enter(RMSNorm):
    """The norm of a sublayer's input, which it reads out of the N streams itself: one op. weight [M] fp32."""

    def __init__(self, config: ModelConfig):
        super().__init__(config.hidden_size, config.rms_norm_eps)
        self.iters, self.hc_eps, self.residual = config.hc_sinkhorn_iters, config.hc_eps, config.residual

    def forward(self, x_TNM: Tensor, hyper: Hyper | None) -> tuple[Tensor, Mix]:  # type: ignore[override]
        """N streams -> the sublayer's normed input [T, M], and what `write` needs.

        All three maps come from the streams as they are before the sublayer.
        """
        if hyper is None:
            return super().forward(x_TNM[:, 0]), None
        if self.residual == "hc":
            pre, post, comb = unconstrained_maps(x_TNM, *hyper, self.hc_eps, self.eps)
            return super().forward(ops.hyper_read(x_TNM, pre)), (post, comb)
        h_TM, post, comb = ops.hyper_enter(x_TNM, *hyper, self.weight, self.iters, self.hc_eps, self.eps)
        return h_TM, (post, comb)


def write(x_TNM: Tensor, y_TM: Tensor, mix: Mix) -> Tensor:
    """A sublayer's output [T, M] into the streams [T, N, M], which are mixed."""
    return x_TNM + y_TM[:, None] if mix is None else ops.hyper_write(x_TNM, y_TM, *mix)


def unconstrained_maps(
    x: Tensor, fn: Tensor, base: Tensor, scale: Tensor, eps: float, norm_eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """pre [T, N], post [T, N] as mHC has them, comb [T, N, N] = I + tanh of the logits that mHC gives to Sinkhorn."""
    num, flat = x.shape[1], x.flatten(1).float()
    rho = torch.rsqrt(flat.square().mean(dim=1, keepdim=True) + norm_eps)
    pre, post, comb = hyper_logits(F.linear(flat, fn.float()) * rho, base, scale, num)
    mixed = torch.eye(num, device=x.device) + torch.tanh(comb)
    return torch.sigmoid(pre) + eps, 2 * torch.sigmoid(post), mixed


def collapse(x_TNM: Tensor, hyper: Hyper | None, config: ModelConfig) -> Tensor:
    """The head's weighted sum of the streams [T, M]."""
    return x_TNM[:, 0] if hyper is None else ops.head_collapse(x_TNM, *hyper, config.hc_eps, config.rms_norm_eps)
