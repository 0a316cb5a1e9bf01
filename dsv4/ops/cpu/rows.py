"""Rows of a memory: pooled from closed groups, rotated, packed into bytes and unpacked."""

import torch
from torch import Tensor

from dsv4.ops.cpu.library import PLAIN, Kernel, values_only
from dsv4.ops.formats import Packed
from dsv4.ops.limits import Limits

MISFIT = "shapes that do not fit"  # another form says what is wrong
_compress = Kernel("compress", "plpllppllilpfpliip")
_rotate = Kernel("rotate", "pilllplip")
_pack = Kernel("pack_rows", "pillllliiip")
_unpack = Kernel("unpack_rows", "pllllliiip")


def compress(
    values: Tensor,
    scores: Tensor,
    first_row: Tensor,
    has_previous: Tensor,
    r: int,
    overlap: bool,
    gain: Tensor,
    norm_eps: float,
    turn: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    turn = turn.contiguous()
    count, d = len(first_row), gain.shape[0]
    out = values.new_empty(count, d, dtype=dtype)
    _compress(
        values.data_ptr(), values.stride(0), scores.data_ptr(), scores.stride(0), len(values), first_row.data_ptr(),
        has_previous.data_ptr(), count, r, overlap, d, gain.data_ptr(), norm_eps, turn.data_ptr(), turn.shape[-1],
        turn.is_conj(), dtype == torch.bfloat16, out.data_ptr(),
    )  # fmt: skip
    return out


def rotate(x: Tensor, turn: Tensor) -> Tensor:
    x, turn = x.contiguous(), turn.contiguous()
    out = torch.empty_like(x)
    width = x.shape[-1]
    rows = x.numel() // width
    _rotate(
        x.data_ptr(), x.dtype == torch.bfloat16, rows, rows // len(turn), width, turn.data_ptr(),
        turn.shape[1], turn.is_conj(), out.data_ptr(),
    )  # fmt: skip
    return out


def pack_rows(rows: Tensor, format: Packed) -> Tensor:
    rows = rows.contiguous()
    n, width = rows.shape
    row_bytes = format.row_bytes
    out = rows.new_empty(n, row_bytes, dtype=torch.uint8)
    _pack(
        rows.data_ptr(), rows.dtype == torch.bfloat16, n, width, format.block, format.tail, row_bytes,
        format.code == "fp4", format.fp32_scales, format.rotated, out.data_ptr(),
    )  # fmt: skip
    return out


def unpack_rows(data: Tensor, format: Packed) -> Tensor:
    data = data.contiguous()
    row_bytes, width = data.shape[-1], format.width
    out = data.new_empty(*data.shape[:-1], width, dtype=format.numbers)
    _unpack(
        data.data_ptr(), data.numel() // row_bytes, width, format.block, format.tail, row_bytes, format.code == "fp4",
        format.fp32_scales, format.numbers == torch.bfloat16, out.data_ptr(),
    )  # fmt: skip
    return out


def _groups(
    values: Tensor,
    scores: Tensor,
    first_row: Tensor,
    has_previous: Tensor,
    r: int,
    overlap: bool,
    gain: Tensor,
    norm_eps: float,
    turn: Tensor,
    dtype: torch.dtype,
) -> str:
    if dtype not in PLAIN:
        return f"entries of dtype {str(dtype).removeprefix('torch.')}"
    if not values.dtype == scores.dtype == gain.dtype == torch.float32:
        return "rows or a gain that are not fp32"
    if values.stride(1) != 1 or scores.stride(1) != 1:
        return "rows that are not contiguous"
    if not (first_row.is_contiguous() and has_previous.is_contiguous() and gain.is_contiguous()):
        return "rows of groups or a gain that are not contiguous"
    count, d = len(first_row), gain.shape[0]
    if not values.shape == scores.shape == (len(values), 2 * d if overlap else d):
        return MISFIT
    return MISFIT if len(has_previous) != count else _turn(turn, count, d)


def _turn(turn: Tensor, count: int, width: int) -> str:
    if turn.dtype != torch.complex64:
        return "turns that are not complex64"
    return "" if turn.ndim == 2 and len(turn) == count and 2 * turn.shape[1] <= width else MISFIT


def _rotates(x: Tensor, turn: Tensor) -> str:
    return _turn(turn, len(x), x.shape[-1]) if x.numel() else "nothing to rotate"


def _packs(rows: Tensor, format: Packed) -> str:
    return "" if rows.shape[-1] == format.width else MISFIT


def _unpacks(data: Tensor, format: Packed) -> str:
    if format.numbers not in PLAIN:
        return "unpacked rows that are neither fp32 nor bf16"
    return "" if data.dtype == torch.uint8 and data.shape[-1] == format.row_bytes else MISFIT


LIMITS = {
    "compress": values_only(_groups),
    "rotate": values_only(_rotates),
    "pack_rows": values_only(_packs),
    "unpack_rows": Limits(devices=("cpu",), gradient=False, also=_unpacks),
}
