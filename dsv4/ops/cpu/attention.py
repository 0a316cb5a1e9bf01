"""Attention over rows that are keys and values at once, which are read from their pools in place."""

import torch
from torch import Tensor

from dsv4.ops.cpu.library import Kernel, address, values_only
from dsv4.ops.cpu.pools import described, refused
from dsv4.ops.formats import PackedRows
from dsv4.ops.spans import Spans

_attend = Kernel("sparse_attention", "pilllppppppplpfpp")


def sparse_attention(
    q: Tensor,
    window_kv: Tensor | PackedRows,
    window: Spans,
    entries: Tensor | PackedRows | None,
    visible: Spans | None,
    chosen: Tensor | None,
    sink: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    q, sink = q.contiguous(), sink.float().contiguous()
    n, heads, width = q.shape
    out, lse = torch.empty_like(q), q.new_empty(n, heads, dtype=torch.float32)
    pool = described(window_kv)
    rows, first, last, picked, count = pool, None, None, None, 0
    if entries is not None:
        rows = described(entries)
        if chosen is not None:
            picked, count = chosen.contiguous(), chosen.shape[1]
        else:
            assert visible is not None, "entries are read by interval or as chosen rows"
            first, last = visible.start.contiguous(), visible.stop.contiguous()
    start, stop = window.start.contiguous(), window.stop.contiguous()
    _attend(
        q.data_ptr(), q.dtype == torch.bfloat16, n, heads, width, pool, rows, start.data_ptr(), stop.data_ptr(),
        address(first), address(last), address(picked), count, sink.data_ptr(), scale, out.data_ptr(), lse.data_ptr(),
    )  # fmt: skip
    return out, lse


def _pools(
    q: Tensor,
    window_kv: Tensor | PackedRows,
    window: Spans,
    entries: Tensor | PackedRows | None,
    visible: Spans | None,
    chosen: Tensor | None,
    *rest: object,
) -> str:
    if chosen is not None and chosen.dtype != torch.int64:
        return "chosen rows that are not int64"
    return refused(window_kv, q.shape[2]) or ("" if entries is None else refused(entries, q.shape[2]))


LIMITS = {"sparse_attention": values_only(_pools)}
