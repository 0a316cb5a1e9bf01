"""Experts under autograd. Of a call are kept its arguments and the products before the activation, which is computed
again in the backward pass.

Where experts keep all threads busy, each is left to one thread (src/expert_gradients.cpp). Else products are torch's,
of all tokens of an expert at once, and between them is a pass over rows.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dsv4.ops.cpu.library import Kernel, address
from dsv4.ops.cpu.products import add_mm, into_gradient, mm

_swiglu = Kernel("swiglu", "pipllfp")
_swiglu_backward = Kernel("swiglu_backward", "pippllfppp")
_forward = Kernel("experts_forward", "pilllppllpppfppp")
_backward = Kernel("experts_backward", "pilllppllpppfppppppp")

# Numbers of a row, in an expert or before it, that one thread takes: of wider ones too much leaves its cache.
WIDEST = 1024


def routed_experts(x: Tensor, chosen: Tensor, weights: Tensor, w13: Tensor, w2: Tensor, limit: float) -> Tensor:
    """As ops.experts, of plain weights. Pairs of tokens and experts are sorted by expert; a token's experts are added
    in the order in which it chose them."""
    counts = torch.bincount(chosen.flatten(), minlength=len(w13))
    plain = x.is_contiguous() and all(t.dtype == torch.float32 and t.is_contiguous() for t in (weights, w13, w2))
    alone = plain and max(x.shape[1], 2 * w13.shape[2]) <= WIDEST
    alone = alone and int((counts > 0).sum()) >= 4 * torch.get_num_threads()
    form = ExpertsInThreads if alone else ExpertsByTorch
    return form.apply(x, chosen, weights, w13, w2, counts, limit)  # type: ignore[return-value]


def _activated(hidden: Tensor, weights: Tensor | None, limit: float) -> Tensor:
    """weight * clamped SwiGLU of hidden [n, 2 * I] -> [n, I]."""
    n, wide = hidden.shape
    act = hidden.new_empty(n, wide // 2)
    _swiglu(
        hidden.data_ptr(), hidden.dtype == torch.bfloat16, address(weights), n, wide // 2, limit, act.data_ptr()
    )  # fmt: skip
    return act


def _activated_backward(
    hidden: Tensor, weights: Tensor | None, d_act: Tensor, limit: float
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The activations again, the gradients of hidden and of the weights."""
    act, d_hidden = torch.empty_like(d_act), torch.empty_like(hidden)
    d_weights = None if weights is None else torch.empty_like(weights)
    _swiglu_backward(
        hidden.data_ptr(), hidden.dtype == torch.bfloat16, address(weights), d_act.data_ptr(), *d_act.shape, limit,
        act.data_ptr(), d_hidden.data_ptr(), address(d_weights),
    )  # fmt: skip
    return act, d_hidden, d_weights


class ExpertsInThreads(torch.autograd.Function):
    """Each expert by one thread; weights and their gradients in fp32. counts int64 [experts]: pairs of each."""

    @staticmethod
    def forward(ctx: Any, x, chosen, weights, w13, w2, counts: Tensor, limit: float):
        ctx.limit, ctx.k = limit, chosen.shape[1]
        order = chosen.flatten().argsort(stable=True)
        ws, out = weights.flatten()[order], x.new_empty(x.shape, dtype=torch.float32)
        hidden, rows = x.new_empty(len(order), 2 * w13.shape[2]), x.new_empty(len(order), x.shape[1])
        given = ExpertsInThreads._given(ctx, x, ws, w13, w2, order, counts)
        _forward(*given, hidden.data_ptr(), rows.data_ptr(), out.data_ptr())
        ctx.save_for_backward(x, ws, w13, w2, hidden, order, counts)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any):
        x, ws, w13, w2, hidden, order, counts = ctx.saved_tensors
        d_out, d_x, rows = grads[0].float().contiguous(), torch.empty_like(x), x.new_empty(len(order), x.shape[1])
        d_ws, d_w13, d_w2 = torch.empty_like(ws), torch.empty_like(w13), torch.empty_like(w2)
        _backward(
            *ExpertsInThreads._given(ctx, x, ws, w13, w2, order, counts), hidden.data_ptr(), d_out.data_ptr(),
            rows.data_ptr(), d_x.data_ptr(), d_ws.data_ptr(), d_w13.data_ptr(), d_w2.data_ptr(),
        )  # fmt: skip
        d_weights = torch.empty_like(d_ws)
        d_weights[order] = d_ws
        return d_x, None, d_weights.view(len(x), ctx.k), d_w13, d_w2, None, None

    @staticmethod
    def _given(ctx: Any, x, ws, w13, w2, order, counts) -> tuple[Any, ...]:
        """What both directions take."""
        return (
            x.data_ptr(), x.dtype == torch.bfloat16, *x.shape, w13.shape[2], order.data_ptr(), counts.data_ptr(),
            len(counts), ctx.k, ws.data_ptr(), w13.data_ptr(), w2.data_ptr(), ctx.limit,
        )  # fmt: skip


class ExpertsByTorch(torch.autograd.Function):
    """Each expert by all threads. counts as above."""

    @staticmethod
    def forward(ctx: Any, x, chosen, weights, w13, w2, counts: Tensor, limit: float):
        k, dtype, ctx.counts = chosen.shape[1], x.dtype, counts.tolist()
        order = chosen.flatten().argsort(stable=True)
        ws, token = weights.flatten()[order], order // k
        hidden, ys = x.new_empty(len(order), 2 * w13.shape[2]), x.new_empty(len(order), x.shape[1])
        for e, rows in _of_experts(ctx.counts):
            mm(x[token[rows]], w13[e].flatten(0, 1).to(dtype).T, out=hidden[rows])
            mm(_activated(hidden[rows], ws[rows], limit), w2[e].to(dtype).T, out=ys[rows])
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order))
        ctx.save_for_backward(x, ws, w13, w2, hidden, order, back)
        ctx.limit, ctx.k = limit, k
        return _added(ys, back, k)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any):
        x, ws, w13, w2, hidden, order, back = ctx.saved_tensors
        k, dtype, token = ctx.k, x.dtype, order // ctx.k
        d_out, d_xs = grads[0].to(dtype), x.new_empty(len(order), x.shape[1])
        d_ws, d_w13, d_w2 = torch.empty_like(ws), torch.empty_like(w13), torch.empty_like(w2)
        for e, count in enumerate(ctx.counts):
            if not count:  # no token came: nothing flows
                d_w13[e].zero_()
                d_w2[e].zero_()
        for e, rows in _of_experts(ctx.counts):  # of one expert at a time: what it needs stays in the caches
            mine = token[rows]
            dy = d_out[mine]
            act, d_hidden, found = _activated_backward(hidden[rows], ws[rows], mm(dy, w2[e].to(dtype)), ctx.limit)
            assert found is not None
            d_ws[rows] = found
            into_gradient(dy.T, act, d_w2[e])
            into_gradient(d_hidden.T, x[mine], d_w13[e].view(-1, x.shape[1]))
            mm(d_hidden, w13[e].flatten(0, 1).to(dtype), out=d_xs[rows])
        return _added(d_xs, back, k).to(dtype), None, d_ws[back].view(len(x), k), d_w13, d_w2, None, None


def _added(rows: Tensor, back: Tensor, k: int) -> Tensor:
    """The sums of each token's k rows, fp32 [n, M]; back: where the rows of a token lie."""
    places = back.view(-1, k)
    total = rows[places[:, 0]].float()
    for slot in range(1, k):
        total += rows[places[:, slot]]
    return total


def _of_experts(counts: list[int]) -> Iterator[tuple[int, slice]]:
    """(expert, its rows) of every expert that has any."""
    first = 0
    for expert, count in enumerate(counts):
        if count:
            yield expert, slice(first, first + count)
        first += count


class OneExpert(torch.autograd.Function):
    """As ops.mlp, of plain weights and rows x [n, M]."""

    @staticmethod
    def forward(ctx: Any, x, w1, w3, w2, limit: float):
        hidden, inner = x.new_empty(len(x), 2 * len(w1)), len(w1)
        for at, w in ((slice(0, inner), w1), (slice(inner, None), w3)):
            mm(x, w.to(x.dtype).T, out=hidden[:, at])
        ctx.save_for_backward(x, w1, w3, w2, hidden)
        ctx.limit = limit
        return mm(_activated(hidden, None, limit), w2.to(x.dtype).T)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any):
        x, w1, w3, w2, hidden = ctx.saved_tensors
        dy, inner = grads[0], len(w1)
        act, d_hidden, _ = _activated_backward(hidden, None, mm(dy, w2.to(dy.dtype)), ctx.limit)
        d_w1, d_w3, d_w2 = (torch.empty_like(w) for w in (w1, w3, w2))
        into_gradient(dy.T, act, d_w2)
        d_gate, d_up = d_hidden[:, :inner], d_hidden[:, inner:]
        into_gradient(d_gate.T, x, d_w1)
        into_gradient(d_up.T, x, d_w3)
        return add_mm(mm(d_gate, w1.to(x.dtype)), d_up, w3.to(x.dtype)), d_w1, d_w3, d_w2, None
