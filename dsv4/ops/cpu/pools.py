"""Pools as the kernels take them: where rows lie and in which format, read there and not copied (src/pool.h)."""

from struct import Struct

import torch
from torch import Tensor

from dsv4.ops.cpu.library import DTYPES, PLAIN
from dsv4.ops.formats import Packed, PackedRows, PagedRows

_LANES = 16  # at most, in a vector
_NUMBERS = Struct("10q").pack  # in a third of the time of a ctypes array


def described(pool: Tensor | PackedRows) -> bytes:
    """A pool's place and format; it holds no reference, so the pool must outlive the call."""
    if isinstance(pool, Tensor):
        rows, width = pool.shape
        kind = DTYPES[pool.dtype]
        return _NUMBERS(pool.data_ptr(), 0, rows, 1, pool.stride(0) * (2 if kind else 4), kind, width, 0, width, 0)
    data, format = pool.data, pool.format
    table, per_page = (pool.table.data_ptr(), pool.per_page) if isinstance(pool, PagedRows) else (0, 1)
    place = (data.data_ptr(), table, len(pool), per_page, data.stride(0) * data.element_size())
    if isinstance(format, Packed):
        coded, tail = format.width - format.tail, format.tail
        return _NUMBERS(*place, DTYPES[format.code], coded, tail, format.block, format.fp32_scales)
    width = data.shape[1]
    return _NUMBERS(*place, DTYPES[data.dtype], width, 0, width, 0)


def refused(pool: Tensor | PackedRows, width: int) -> str:
    """ "" or why the kernels do not read a pool of rows of this width."""
    if isinstance(pool, Tensor):
        rows, found = pool, pool.shape[1]
    else:
        rows, format = pool.data, pool.format
        found = format.width if isinstance(format, Packed) else rows.shape[1]
        if isinstance(format, Packed):
            if format.fp32_scales and format.numbers != torch.float32:
                return "packed rows with FP32 scales that are read in less than FP32"
            if format.block % (2 * _LANES):
                return f"blocks of {format.block} numbers"
        elif rows.dtype not in PLAIN:
            return f"a memory in {str(rows.dtype).removeprefix('torch.')}"
        if isinstance(pool, PagedRows) and not pool.table.is_contiguous():
            return "a page table with gaps"
    if found != width:
        return f"rows of {found} numbers for queries of {width}"
    return "" if rows.stride(1) == 1 or width < 2 else "a pool whose rows are not contiguous"
