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
    """Rows of one case for every backend but the reference that serves it: values, and gradients where it has any."""
    if dtype != torch.float32 and (not case.low or case.fp32_only):
        return
    if case.op in ops.TABLE:
        ops.explain(case.op, device.type)  # imports what is built for this device
    table = ops.TABLE.get(case.op)
    reference = table["reference"] if table else SINGLE[case.op]
    backends = {n: f for n, f in (table or {}).items() if n != "reference"} or {"only form": reference}
    want, want_grads = _evaluate(reference, case, case.grads, torch.device("cpu"), dtype, torch.float32)
    for backend, op in backends.items():
        grads = case.grads
        if _refusal(case, backend, grads, device, dtype):
            grads = ()
            if _refusal(case, backend, grads, device, dtype):
                continue
        got, got_grads = _evaluate(op, case, grads, device, dtype, dtype)
        name = f"{case.name}, {backend}"
        yield parity_row(f"{name}: values", dtype, got, want, 0.0 if case.exact else case.tolerance)
        if grads:
            yield parity_row(f"{name}: gradients", dtype, got_grads, want_grads, case.tolerance)


def _refusal(case: Case, backend: str, grads: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> str:
    """Why a form does not serve the case, with these gradients."""
    return ops.refusal(case.op, backend, *_arguments(case, grads, device, dtype, dtype))


def _evaluate(
    op: Callable,
    case: Case,
    grads: tuple[int, ...],
    device: torch.device,
    rounding: torch.dtype,
    dtype: torch.dtype,
) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs of a case, and gradients of the arguments at `grads`."""
    args = _arguments(case, grads, device, rounding, dtype)
    given = op(*args)
    outputs = [given] if isinstance(given, Tensor) else list(given)
    if not grads:
        return outputs, []
    total = torch.zeros((), device=device)
    for i, out in enumerate(outputs[: case.through]):
        # a weighted sum, so that no symmetry of the plain sum hides an error; rounded alike for every dtype
        weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(900 + i)).to(rounding)
        total = total + (out.float() * weight.float().to(device)).sum()
    total.backward()
    return [out.detach() for out in outputs], [g for i in grads if (g := args[i].grad) is not None]


def _arguments(
    case: Case, grads: tuple[int, ...], device: torch.device, rounding: torch.dtype, dtype: torch.dtype
) -> list[Any]:
    """A case's arguments: the `low` ones are rounded to `rounding` and handed over in `dtype`."""
    args = [_place(arg, device, rounding if i in case.low else None, dtype) for i, arg in enumerate(case.args)]
    for i in grads:
        args[i] = args[i].requires_grad_()
    return args


def _place(arg: Any, device: torch.device, rounding: torch.dtype | None, dtype: torch.dtype) -> Any:
    """An argument on the device; `Spans` stay on the host, where they belong."""
    if not isinstance(arg, Tensor):
        return arg
    arg = arg if rounding is None else arg.to(rounding).to(dtype)
    return arg.detach().clone().to(device)
