"""Result rows: how far apart two lists of tensors are, and whether that is allowed, as plain data for any report."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

Row = dict[str, Any]

# fp32: the largest difference over the largest number, a few hundred roundings of 6e-8 with room for another order of
# the sums. bf16: the root mean square of the difference over that of the numbers; one rounding is 2e-3 of a number.
MEASURES = ("max_abs", "max_rel", "rms_rel", "typical_rel")
MEASURE = {torch.float32: "max_rel", torch.bfloat16: "rms_rel"}
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}


def parity_row(
    name: str,
    dtype: torch.dtype,
    got: Sequence[Tensor],
    want: Sequence[Tensor],
    tolerance: float | None = None,
    measure: str | None = None,
) -> Row:
    """The largest of each difference over all pairs, and whether `measure` is within the tolerance."""
    measure, allowed = measure or MEASURE[dtype], TOLERANCE[dtype] if tolerance is None else tolerance
    differences = [difference(a, b) for a, b in zip(got, want, strict=True)]
    worst = {key: max(d[key] for d in differences) for key in MEASURES}
    error = None if worst["max_abs"] < float("inf") else "not finite, or of another shape"
    passed = worst[measure] <= allowed
    return _row(name, dtype, **worst, measure=measure, tolerance=allowed, passed=passed, error=error)


def broken_row(name: str, dtype: torch.dtype, error: str) -> Row:
    """The row of a comparison that raised."""
    measured = {**dict.fromkeys(MEASURES), "measure": MEASURE[dtype], "tolerance": TOLERANCE[dtype]}
    return _row(name, dtype, **measured, passed=False, error=error)


def _row(name: str, dtype: torch.dtype, **rest: Any) -> Row:
    return {"name": name, "dtype": str(dtype).removeprefix("torch."), **rest}


def difference(got: Tensor, want: Tensor) -> dict[str, float]:
    """max_abs; max_rel = that over the largest |want|; rms_rel = the 2-norm of got - want over that of want;
    typical_rel = the median of such ratios over the rows (the last dimension).

    Infinite for another shape or anything that is not a number; relative to 1 where `want` is all zero.
    """
    a, b = got.detach().cpu().double(), want.detach().cpu().double()
    if a.shape != b.shape or not (a.isfinite().all() and b.isfinite().all()):
        return dict.fromkeys(MEASURES, float("inf"))
    if not a.numel():
        return dict.fromkeys(MEASURES, 0.0)
    largest, norm = b.abs().max().item(), b.norm().item()
    max_abs = (a - b).abs().max().item()
    rows = (torch.atleast_1d(a - b).norm(dim=-1) / torch.atleast_1d(b).norm(dim=-1).clamp_min(1e-300)).flatten()
    return {
        "max_abs": max_abs,
        "max_rel": max_abs / (largest or 1.0),
        "rms_rel": (a - b).norm().item() / (norm or b.numel() ** 0.5),
        "typical_rel": rows.median().item(),
    }
