"""How tokens are routed to experts: scores, choice and weights in one pass."""

import torch
from torch import Tensor

from dsv4.ops.cpu.library import Kernel, address, values_only

_gate = Kernel("gate", "pillpillpplfppp")


def gate(
    x: Tensor, weight: Tensor, bias: Tensor | None, chosen: Tensor | None, k: int, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    x = x.contiguous()
    n, width = x.shape
    num = weight.shape[0]
    given = None if chosen is None else chosen.contiguous()
    picked = x.new_empty(n, k, dtype=torch.int64) if chosen is None else chosen
    scores, weights = x.new_empty(n, num, dtype=torch.float32), x.new_empty(n, k, dtype=torch.float32)
    _gate(
        x.data_ptr(), x.dtype == torch.bfloat16, n, width, weight.data_ptr(), weight.dtype == torch.bfloat16,
        weight.stride(0), num, address(bias), address(given), k, scale, scores.data_ptr(), picked.data_ptr(),
        weights.data_ptr(),
    )  # fmt: skip
    return scores, picked, weights


def _routes(x: Tensor, weight: Tensor, bias: Tensor | None, chosen: Tensor | None, k: int, scale: float) -> str:
    if weight.shape[1] != x.shape[1] or (bias is not None and len(bias) != len(weight)):
        return "shapes that do not fit"
    if weight.stride(1) != 1:
        return "a weight whose rows are not contiguous"
    if chosen is not None:
        return "" if chosen.shape == (len(x), k) else "another number of given experts than k"
    if bias is None or bias.dtype != torch.float32 or not bias.is_contiguous():
        return "no bias, or one that is not contiguous fp32"
    return "" if k <= weight.shape[0] else "more choices than experts"


LIMITS = {"gate": values_only(_routes)}
