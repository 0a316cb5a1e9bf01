"""Do the ops on a device agree with the reference on the CPU, in values and in gradients?

Truth is the reference backend in fp32 on the CPU. In a bf16 run the reference gets the same rounded arguments, so what
is measured is the arithmetic and not the rounding of what goes in. Whole models: see whole.py.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from dsv4 import ops
from dsv4.measure.cases import SINGLE, Case
from dsv4.measure.rows import Row, parity_row


def op_rows(case: Case, device: torch.device, dtype: torch.dtype) -> Iterator[Row]:
    """Rows of one case for every backend but the reference: values, and gradients where there are any."""
    if dtype != torch.float32 and (not case.low or case.fp32_only):
        return
    table = ops.TABLE.get(case.op)
    reference = table["reference"] if table else SINGLE[case.op]
    backends = {n: f for n, f in (table or {}).items() if n != "reference"} or {"only form": reference}
    want, want_grads = _evaluate(reference, case, torch.device("cpu"), dtype, torch.float32)
    for backend, op in backends.items():
        got, got_grads = _evaluate(op, case, device, dtype, dtype)
        name = f"{case.name}, {backend}"
        yield parity_row(f"{name}: values", dtype, got, want, 0.0 if case.exact else case.tolerance)
        if case.grads:
            yield parity_row(f"{name}: gradients", dtype, got_grads, want_grads, case.tolerance)


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


def _place(arg: Any, device: torch.device, rounding: torch.dtype | None, dtype: torch.dtype) -> Any:
    """An argument on the device; `Spans` stay on the host, where they belong."""
    if not isinstance(arg, Tensor):
        return arg
    arg = arg if rounding is None else arg.to(rounding).to(dtype)
    return arg.detach().clone().to(device)
