"""Do the ops on a device agree with the reference on the CPU, in values and in gradients?

Truth is the reference backend in fp32 on the CPU. In a bf16 run the reference gets the same rounded arguments, so what
is measured is the arithmetic and not the rounding of what goes in. Whole models: see whole.py.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from dsv4 import ops
from dsv4.bench.cases import SINGLE, Case
from dsv4.bench.report import Row

# fp32: the largest difference over the largest number, a few hundred roundings of 6e-8 with room for another order of
# the sums. bf16: the root mean square of the difference over that of the numbers; one rounding is 2e-3 of a number.
MEASURES = ("max_abs", "max_rel", "rms_rel", "typical_rel")
MEASURE = {torch.float32: "max_rel", torch.bfloat16: "rms_rel"}
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}


def op_rows(case: Case, device: torch.device, dtype: torch.dtype) -> Iterator[Row]:
    """Rows of one case for every backend but the reference: values, and gradients where there are any."""
    if dtype != torch.float32 and (not case.low or case.fp32_only):
        return
    table = ops.TABLE.get(case.op)
    reference = table["reference"] if table else SINGLE[case.op]
    backends = {n: f for n, f in table.items() if n != "reference"} if table else {"only form": reference}
    want, want_grads = _evaluate(reference, case, torch.device("cpu"), dtype, torch.float32)
    for backend, op in backends.items():
        got, got_grads = _evaluate(op, case, device, dtype, dtype)
        name = f"{case.name}, {backend}"
        yield row(f"{name}: values", dtype, got, want, 0.0 if case.exact else case.tolerance)
        if case.grads:
            yield row(f"{name}: gradients", dtype, got_grads, want_grads, case.tolerance)


def row(
    name: str,
    dtype: torch.dtype,
    got: Sequence[Tensor],
    want: Sequence[Tensor],
    tolerance: float | None = None,
    measure: str | None = None,
) -> Row:
    """One parity row: the largest of each difference over all pairs, and whether `measure` is within the tolerance."""
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


def _row(name: str, dtype: torch.dtype, **rest) -> Row:
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


def _evaluate(
    op: Callable, case: Case, device: torch.device, rounding: torch.dtype, dtype: torch.dtype
) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs and gradients of a case. Its `low` arguments are rounded to `rounding` and handed over in `dtype`."""
    args = [_place(arg, device, rounding if i in case.low else None, dtype) for i, arg in enumerate(case.args)]
    for i in case.grads:
        args[i] = args[i].requires_grad_()
    given = op(*args)
    outputs = [given] if isinstance(given, Tensor) else list(given)
    if not case.grads:
        return outputs, []
    total = torch.zeros((), device=device)
    for i, out in enumerate(outputs[: case.through]):
        # a weighted sum, so that no symmetry of the plain sum hides an error; rounded alike for every dtype
        weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(900 + i)).to(rounding)
        total = total + (out.float() * weight.float().to(device)).sum()
    total.backward()
    return [out.detach() for out in outputs], [g for i in case.grads if (g := args[i].grad) is not None]


def _place(arg, device: torch.device, rounding: torch.dtype | None, dtype: torch.dtype):
    """An argument on the device; `Spans` stay on the host, where they belong."""
    if not isinstance(arg, Tensor):
        return arg
    arg = arg if rounding is None else arg.to(rounding).to(dtype)
    return arg.detach().clone().to(device)
