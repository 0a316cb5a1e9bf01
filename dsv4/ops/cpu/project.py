"""What stands before and after attention, and the rows of a compressor: one call each. Where a gradient is needed:
project_gradients.py."""

import torch
from torch import Tensor

from dsv4.ops.cpu.library import DTYPES, PLAIN, Kernel, address, needs_gradient, values_only
from dsv4.ops.cpu.project_gradients import ProjectIn, ProjectOut
from dsv4.ops.limits import Limits
from dsv4.ops.weights import PackedMatrix

Weight = Tensor | PackedMatrix
_W = "ppill"  # a weight
_project_in = Kernel("project_in", f"pil{_W}p{_W}{_W}plfplpppp")
_project_out = Kernel("project_out", f"pilllpl{_W}l{_W}pp")
_compressor_rows = Kernel("compressor_rows", "pillpplplpp")


def _described(w: Weight) -> tuple[int, int | None, int, int, int]:
    """A weight as the library takes it: numbers, scales, format, rows, columns."""
    if isinstance(w, PackedMatrix):
        return w.codes.data_ptr(), address(w.scales), DTYPES[w.code], *w.shape
    return w.data_ptr(), None, DTYPES[w.dtype], w.shape[0], w.shape[1]


def project_in(
    x: Tensor,
    wq_a: Weight,
    q_gain: Tensor,
    wq_b: Weight,
    wkv: Weight,
    kv_gain: Tensor,
    heads: int,
    eps: float,
    turn: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if needs_gradient(x, wq_a, q_gain, wq_b, wkv, kv_gain):
        return ProjectIn.apply(x.contiguous(), wq_a, q_gain, wq_b, wkv, kv_gain, heads, eps, turn)  # type: ignore[return-value]
    x, n, width = x.contiguous(), len(x), wkv.shape[0]
    qr, q = x.new_empty(n, wq_a.shape[0]), x.new_empty(n, heads, width)
    kv, row = x.new_empty(2, n, width)
    _project_in(
        x.data_ptr(), x.dtype == torch.bfloat16, n, *_described(wq_a), q_gain.data_ptr(), *_described(wq_b),
        *_described(wkv), kv_gain.data_ptr(), heads, eps, turn.data_ptr(), turn.shape[1], qr.data_ptr(), q.data_ptr(),
        kv.data_ptr(), row.data_ptr(),
    )  # fmt: skip
    return qr, q, kv, row


def project_out(o: Tensor, turn: Tensor, wo_a: Weight, groups: int, wo_b: Weight) -> Tensor:
    if needs_gradient(o, wo_a, wo_b):
        return ProjectOut.apply(o, turn, wo_a, groups, wo_b)  # type: ignore[return-value]
    o = o.clone(memory_format=torch.contiguous_format)  # rotated in place
    n, heads, width = o.shape
    low, out = o.new_empty(n, wo_a.shape[0]), o.new_empty(n, wo_b.shape[0])
    _project_out(
        o.data_ptr(), o.dtype == torch.bfloat16, n, heads, width, turn.data_ptr(), turn.shape[1], *_described(wo_a),
        groups, *_described(wo_b), low.data_ptr(), out.data_ptr(),
    )  # fmt: skip
    return out


def compressor_rows(x: Tensor, wkv: Tensor, wgate: Tensor, ape: Tensor, positions: Tensor) -> Tensor:
    x, n, width = x.contiguous(), len(x), wkv.shape[0]
    out = x.new_empty(n, 2, width, dtype=torch.float32)
    _compressor_rows(
        x.data_ptr(), x.dtype == torch.bfloat16, n, x.shape[1], wkv.data_ptr(), wgate.data_ptr(), width, ape.data_ptr(),
        len(ape), positions.data_ptr(), out.data_ptr(),
    )  # fmt: skip
    return out


def _unfit(x: Tensor, *weights: Weight) -> str:
    """Why a kernel does not take these weights for x, or ""."""
    trains = needs_gradient(x, *weights)
    for w in weights:
        if isinstance(w, PackedMatrix):
            if trains:
                return "a gradient through packed weights"
            continue
        if x.dtype == torch.bfloat16 != w.dtype and not trains:
            return "a weight in more precision than what it multiplies"
        if not w.is_contiguous():
            return "a weight that is not contiguous"
    return ""


def _plain(*numbers: Tensor) -> str:
    fit = all(t.dtype in (torch.float32, torch.complex64) and t.is_contiguous() and not t.is_conj() for t in numbers)
    return "" if fit else "gains, rotations or biases that are not contiguous fp32"


def _in(x: Tensor, wq_a: Weight, q_gain: Tensor, wq_b: Weight, wkv: Weight, kv_gain: Tensor, *rest: object) -> str:
    return _unfit(x, wq_a, wq_b, wkv) or _plain(q_gain, kv_gain, *(t for t in rest if isinstance(t, Tensor)))


def _out(o: Tensor, turn: Tensor, wo_a: Weight, groups: int, wo_b: Weight) -> str:
    if isinstance(wo_a, PackedMatrix) and wo_a.code == "fp8" and wo_a.shape[0] // groups % 128:
        return "groups that share a scale"
    return _unfit(o, wo_a, wo_b) or _plain(turn)


def _rows(x: Tensor, wkv: Tensor, wgate: Tensor, ape: Tensor, positions: Tensor) -> str:
    return _plain(wkv, wgate, ape) or ("" if positions.is_contiguous() else "positions that are not contiguous")


LIMITS = {
    "project_in": Limits(devices=("cpu",), dtypes=PLAIN, also=_in),
    "project_out": Limits(devices=("cpu",), dtypes=PLAIN, also=_out),
    "compressor_rows": values_only(_rows),
}
