"""The router's choice, and the experts: tokens sorted by expert, products for those that have any."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dsv4.ops.blocked.blocks import dot
from dsv4.ops.blocked.choose import topk_lowest
from dsv4.ops.reference import gate_scores, gate_weights, swiglu, unpacked_experts
from dsv4.ops.weights import PackedMatrix


def gate(
    x: Tensor, weight: Tensor, bias: Tensor | None, chosen: Tensor | None, k: int, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """A top-k of 64-bit keys in place of the whole sort."""
    scores = gate_scores(x, weight)
    if chosen is None:
        assert bias is not None, "experts are chosen by biased scores, or given"
        chosen = topk_lowest((scores + bias).detach(), k)
    return scores, chosen, gate_weights(scores, chosen, scale)


class _Experts(torch.autograd.Function):
    """Tokens sorted by expert, one pair of matrix products per expert that has any."""

    @staticmethod
    def forward(ctx: Any, x, chosen, weights, w13, w2, limit: float):
        k = chosen.shape[1]
        order = chosen.flatten().argsort(stable=True)
        counts = torch.bincount(chosen.flatten(), minlength=len(w13)).tolist()
        xs, ws = x[order // k], weights.flatten()[order, None]
        hidden = xs.new_empty(len(order), 2 * w13.shape[2])
        ys = xs.new_empty(len(order), x.shape[1])
        for e, lo, hi in _ranges(counts):
            torch.mm(xs[lo:hi], w13[e].flatten(0, 1).to(x.dtype).T, out=hidden[lo:hi])
            gate, up = hidden[lo:hi].chunk(2, dim=1)
            act = swiglu(gate, up, limit).mul_(ws[lo:hi])
            torch.mm(act.to(x.dtype), w2[e].to(x.dtype).T, out=ys[lo:hi])
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order), device=order.device)
        ctx.save_for_backward(x, weights, w13, w2, hidden, order, back)
        ctx.counts, ctx.limit, ctx.k = counts, limit, k
        return ys[back].view(len(x), k, -1).float().sum(dim=1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any):
        x, weights, w13, w2, hidden, order, back = ctx.saved_tensors
        k, limit, token = ctx.k, ctx.limit, order // ctx.k
        xs, ws, dy = x[token], weights.flatten()[order, None], grads[0][token].to(x.dtype)
        d_xs = torch.empty_like(xs)
        d_ws = weights.new_empty(len(order))
        d_w13, d_w2 = torch.zeros_like(w13), torch.zeros_like(w2)
        for e, lo, hi in _ranges(ctx.counts):
            gate, up = (t.float() for t in hidden[lo:hi].chunk(2, dim=1))
            g, u = gate.clamp(max=limit), up.clamp(-limit, limit)
            sig = torch.sigmoid(g)
            silu = g * sig
            act = silu * u
            d_w2[e] = dot(dy[lo:hi].T, (ws[lo:hi] * act).to(x.dtype))
            da = (dy[lo:hi] @ w2[e].to(x.dtype)).float()
            d_ws[lo:hi] = (da * act).sum(dim=1)
            da = da * ws[lo:hi]
            # a clamped input carries no gradient; on the bound itself it does, as in torch.clamp
            d_gate = da * u * (sig + silu * (1 - sig)) * (gate <= limit)
            d_up = da * silu * (up.abs() <= limit)
            d_hidden = torch.cat([d_gate, d_up], dim=1).to(x.dtype)
            d_w13[e] = dot(d_hidden.T, xs[lo:hi]).view_as(d_w13[e])
            torch.mm(d_hidden, w13[e].flatten(0, 1).to(x.dtype), out=d_xs[lo:hi])
        d_x = d_xs[back].view(len(x), k, -1).float().sum(dim=1).to(x.dtype)
        return d_x, None, d_ws[back].view_as(weights), d_w13, d_w2, None


def _ranges(counts: list[int]):
    """(expert, first row, last row + 1) of every expert that has rows."""
    lo = 0
    for expert, count in enumerate(counts):
        if count:
            yield expert, lo, lo + count
        lo += count


def experts(
    x: Tensor, chosen: Tensor, weights: Tensor, w13: Tensor | PackedMatrix, w2: Tensor | PackedMatrix, limit: float
) -> Tensor:
    w13, w2 = unpacked_experts(w13, w2, x.dtype)
    return _Experts.apply(x, chosen, weights, w13, w2, limit)  # type: ignore[return-value]
