"""Experts: the routed ones, sorted by expert, and the shared one. Where a gradient is needed: expert_gradients.py."""

import torch
from torch import Tensor

from dsv4.ops.cpu.expert_gradients import OneExpert, routed_experts
from dsv4.ops.cpu.library import DTYPES, PLAIN, Kernel, address, needs_gradient
from dsv4.ops.limits import Limits
from dsv4.ops.weights import PackedMatrix

_experts = Kernel("experts", "pilllppllppppppilllfp")

Weight = Tensor | PackedMatrix


# The six addresses of three matrices and their scales, their format, and the rows from expert to expert, from gate to
# up, and from expert to expert of the third (src/experts.cpp)
Laid = tuple[tuple[int | None, ...], int, tuple[int, int, int]]


def laid_experts(w13: Weight, w2: Weight) -> Laid:
    """All routed experts, as the library takes them."""
    inner = w2.shape[-1]
    if isinstance(w13, PackedMatrix) and isinstance(w2, PackedMatrix):
        gate, scales, down, down_scales = (address(t) for t in (w13.codes, w13.scales, w2.codes, w2.scales))
        steps = 2 * inner, inner, w13.shape[1]
        return (gate, scales, gate, scales, down, down_scales), DTYPES[w13.code], steps
    assert isinstance(w13, Tensor) and isinstance(w2, Tensor)
    gate, down = address(w13), address(w2)
    steps = w13.stride(0) // w13.shape[-1], inner, w2.stride(0) // inner
    return (gate, None, gate, None, down, None), DTYPES[w13.dtype], steps


def laid_mlp(w1: Weight, w3: Weight, w2: Weight) -> Laid:
    """One expert for all tokens, in the same way."""
    places: list[int | None] = []
    for w in (w1, w3, w2):
        places += [address(w.codes), address(w.scales)] if isinstance(w, PackedMatrix) else [address(w), None]
    return tuple(places), DTYPES[w1.code if isinstance(w1, PackedMatrix) else w1.dtype], (0, 0, 0)


def experts(x: Tensor, chosen: Tensor, weights: Tensor, w13: Weight, w2: Weight, limit: float) -> Tensor:
    if needs_gradient(x, weights, w13, w2):
        return routed_experts(x, chosen, weights, w13, w2, limit)  # type: ignore[arg-type]
    x, chosen, weights = x.contiguous(), chosen.contiguous(), weights.contiguous()
    n, width = x.shape
    inner, out = w2.shape[-1], x.new_empty(n, width, dtype=torch.float32)
    count = w13.shape[0] // (2 * inner) if isinstance(w13, PackedMatrix) else w13.shape[0]
    places, kind, steps = laid_experts(w13, w2)
    _experts(
        x.data_ptr(), x.dtype == torch.bfloat16, n, width, inner, chosen.data_ptr(), weights.data_ptr(),
        chosen.shape[1], count, *places, kind, *steps, limit, out.data_ptr(),
    )  # fmt: skip
    return out


def mlp(x: Tensor, w1: Weight, w3: Weight, w2: Weight, limit: float) -> Tensor:
    if needs_gradient(x, w1, w3, w2):
        return OneExpert.apply(x.flatten(0, -2), w1, w3, w2, limit).view(x.shape)  # type: ignore[union-attr]
    x = x.contiguous()
    inner, width = w1.shape
    n = x.numel() // width
    out = torch.empty(x.shape, dtype=torch.float32)
    places, kind, steps = laid_mlp(w1, w3, w2)
    every = _zeros(n)
    _experts(
        x.data_ptr(), x.dtype == torch.bfloat16, n, width, inner, every.data_ptr(), None, 1, 1, *places, kind, *steps,
        limit, out.data_ptr(),
    )  # fmt: skip
    return out.to(x.dtype)


_chosen = torch.zeros(64, dtype=torch.int64)


def _zeros(n: int) -> Tensor:
    """Expert 0 for n tokens."""
    global _chosen
    if len(_chosen) < n:
        _chosen = torch.zeros(n, dtype=torch.int64)
    return _chosen


def _experts_shape(x: Tensor, chosen: Tensor, weights: Tensor, w13: Weight, w2: Weight, limit: float) -> str:
    if isinstance(w13, PackedMatrix):
        if needs_gradient(x, weights):
            return "a gradient through packed weights"
        alike = isinstance(w2, PackedMatrix) and w2.code == w13.code
        aligned = w13.code == "fp4" or (w2.shape[1] % 128 == 0 and w13.shape[1] % 128 == 0)
        return "" if alike and aligned else "packed experts of two formats, or that share a scale"
    if not isinstance(w2, Tensor) or w2.dtype != w13.dtype:
        return "experts of two formats"
    if x.dtype == torch.bfloat16 != w13.dtype and not needs_gradient(x, weights, w13, w2):
        return "a weight in more precision than what it multiplies"
    _, _, inner, width = w13.shape
    laid = w13.stride()[1:] == (inner * width, width, 1) and w2.stride()[1:] == (inner, 1)
    whole = w13.stride(0) % width == 0 and w2.stride(0) % inner == 0
    return "" if laid and whole else "experts that are not contiguous"


def _mlp_shape(x: Tensor, w1: Weight, w3: Weight, w2: Weight, limit: float) -> str:
    kinds = {w.code if isinstance(w, PackedMatrix) else w.dtype for w in (w1, w3, w2)}
    if len(kinds) > 1:
        return "weights of two formats"
    if isinstance(w1, PackedMatrix):
        return "a gradient through packed weights" if needs_gradient(x) else ""
    if x.dtype == torch.bfloat16 != w1.dtype and not needs_gradient(x, w1, w3, w2):
        return "a weight in more precision than what it multiplies"
    whole = all(isinstance(w, Tensor) and w.is_contiguous() for w in (w1, w3, w2))
    return "" if whole else "weights that are not contiguous"


LIMITS = {
    "experts": Limits(devices=("cpu",), dtypes=PLAIN, also=_experts_shape),
    "mlp": Limits(devices=("cpu",), dtypes=PLAIN, also=_mlp_shape),
}
