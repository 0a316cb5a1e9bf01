"""Attention over rows that are keys and values at once, which are read from their pools in place; and its gradients.

Of a call nothing is kept for the backward pass but its arguments and the log-sum-exp.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dsv4.ops.cpu.library import PLAIN, Kernel, address, needs_gradient
from dsv4.ops.cpu.pools import described, refused
from dsv4.ops.formats import PackedRows
from dsv4.ops.limits import Limits
from dsv4.ops.spans import Spans

_attend = Kernel("sparse_attention", "pilllppppppplpfpp")
_backward = Kernel("sparse_attention_backward", "ppilllppppppplppfpppp")


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
    packed = isinstance(window_kv, PackedRows) or isinstance(entries, PackedRows)  # a memory, so there is no gradient
    if not packed and needs_gradient(q, window_kv, entries, sink):
        return _Attention.apply(q, window_kv, entries, sink, window, visible, chosen, scale)  # type: ignore[return-value]
    return _values(q, window_kv, window, entries, visible, chosen, sink, scale)


def _values(
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
    read = _Read(window_kv, window, entries, visible, chosen)
    _attend(
        q.data_ptr(), q.dtype == torch.bfloat16, n, heads, width, *read.places, sink.data_ptr(), scale, out.data_ptr(),
        lse.data_ptr(),
    )  # fmt: skip
    return out, lse


class _Read:
    """What queries read, as the library takes it; it must outlive the call."""

    def __init__(
        self,
        window_kv: Tensor | PackedRows,
        window: Spans,
        entries: Tensor | PackedRows | None,
        visible: Spans | None,
        chosen: Tensor | None,
    ):
        pool = rows = described(window_kv)
        first, last, picked, count = None, None, None, 0
        if entries is not None:
            rows = described(entries)
            if chosen is not None:
                picked, count = chosen.contiguous(), chosen.shape[1]
            else:
                assert visible is not None, "entries are read by interval or as chosen rows"
                first, last = visible.start.contiguous(), visible.stop.contiguous()
        start, stop = window.start.contiguous(), window.stop.contiguous()
        self.held = start, stop, first, last, picked
        self.places = pool, rows, *map(address, self.held), count


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q, window_kv, entries, sink, window: Spans, visible, chosen, scale: float):
        q = q.contiguous()
        out, lse = _values(q, window_kv, window, entries, visible, chosen, sink, scale)
        ctx.save_for_backward(q, window_kv, entries, sink, lse, chosen)
        ctx.window, ctx.visible, ctx.scale = window, visible, scale
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any):
        q, window_kv, entries, sink, lse, chosen = ctx.saved_tensors
        d_out, (n, heads, width) = grads[0].contiguous(), q.shape
        d_q, d_window = torch.empty_like(q), _zeros(window_kv)
        d_entries = None if entries is None else _zeros(entries)
        logit = sink.float().contiguous()
        d_sink = torch.empty_like(logit)
        read = _Read(window_kv, ctx.window, entries, ctx.visible, chosen)
        _backward(
            q.data_ptr(), d_out.data_ptr(), q.dtype == torch.bfloat16, n, heads, width, *read.places, logit.data_ptr(),
            lse.data_ptr(), ctx.scale, d_q.data_ptr(), d_window.data_ptr(), address(d_entries), d_sink.data_ptr(),
        )  # fmt: skip
        if entries is not None and d_entries is not None:
            d_entries = d_entries.to(entries.dtype)
        return d_q, d_window.to(window_kv.dtype), d_entries, d_sink.to(sink.dtype), None, None, None, None


def _zeros(rows: Tensor) -> Tensor:
    return torch.zeros(rows.shape, dtype=torch.float32)


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


LIMITS = {"sparse_attention": Limits(devices=("cpu",), dtypes=PLAIN, also=_pools)}
