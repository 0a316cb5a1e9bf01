"""What stands before and after attention, under autograd: products by torch, norms and rotations by the library.

Of queries are kept what they have become, which attention keeps as well, and the length of each before its norm. Of the
query latent and the key = value row what comes out of the products; the norms are done again.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dsv4.ops.cpu.library import Kernel
from dsv4.ops.cpu.products import add_mm, into_gradient, mm
from dsv4.ops.cpu.rows import rotate

_norm = Kernel("norm", "pillpfp")
_norm_backward = Kernel("norm_backward", "ppillpfpp")
_turned_norm = Kernel("turned_norm", "pilllfplp")
_turned_norm_backward = Kernel("turned_norm_backward", "ppilllplpp")


def _normed(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """x [n, W] / rms * gain."""
    out = torch.empty_like(x)
    _norm(x.data_ptr(), x.dtype == torch.bfloat16, *x.shape, gain.data_ptr(), eps, out.data_ptr())
    return out


def _normed_backward(x: Tensor, d_out: Tensor, gain: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The gradients of x and of the gain."""
    d_out, d_x, d_gain = d_out.contiguous(), torch.empty_like(x), torch.empty_like(gain)
    _norm_backward(
        x.data_ptr(), d_out.data_ptr(), x.dtype == torch.bfloat16, *x.shape, gain.data_ptr(), eps, d_x.data_ptr(),
        d_gain.data_ptr(),
    )  # fmt: skip
    return d_x, d_gain


def _sum(*parts: Tensor | None) -> Tensor | None:
    """The sum of those that are there."""
    there = [part for part in parts if part is not None]
    return sum(there[1:], there[0]) if there else None


class ProjectIn(torch.autograd.Function):
    """As ops.project_in, of plain weights; rotations are by turns of length 1."""

    @staticmethod
    def forward(ctx: Any, x, wq_a, q_gain, wq_b, wkv, kv_gain, heads: int, eps: float, turn: Tensor):
        dtype = x.dtype
        latent = mm(x, wq_a.to(dtype).T)
        qr = _normed(latent, q_gain, eps)
        q = mm(qr, wq_b.to(dtype).T)
        n, width = len(x), q.shape[1] // heads
        rho = x.new_empty(n, heads, dtype=torch.float32)
        _turned_norm(
            q.data_ptr(), dtype == torch.bfloat16, n * heads, heads, width, eps, turn.data_ptr(), turn.shape[1],
            rho.data_ptr(),
        )  # fmt: skip
        q = q.view(n, heads, width)
        key = mm(x, wkv.to(dtype).T)
        kv = _normed(key, kv_gain, eps)
        ctx.save_for_backward(x, wq_a, q_gain, wq_b, wkv, kv_gain, latent, q, rho, key)
        ctx.eps, ctx.turn = eps, turn
        ctx.set_materialize_grads(False)
        return qr, q, kv, rotate(kv, turn) if n else kv.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any):
        x, wq_a, q_gain, wq_b, wkv, kv_gain, latent, q, rho, key = ctx.saved_tensors
        (n, heads, width), dtype, turn = q.shape, x.dtype, ctx.turn
        d_qr, d_q, d_kv, d_row = grads
        d_wq_a, d_wq_b, d_wkv = (torch.zeros_like(w) for w in (wq_a, wq_b, wkv))
        d_q_gain, d_kv_gain, d_x = torch.zeros_like(q_gain), torch.zeros_like(kv_gain), torch.zeros_like(x)
        if d_q is not None:
            d_q, d_rows = d_q.contiguous(), x.new_empty(n, heads * width)
            _turned_norm_backward(
                q.data_ptr(), d_q.data_ptr(), dtype == torch.bfloat16, n * heads, heads, width, turn.data_ptr(),
                turn.shape[1], rho.data_ptr(), d_rows.data_ptr(),
            )  # fmt: skip
            into_gradient(d_rows.T, _normed(latent, q_gain, ctx.eps), d_wq_b)
            d_qr = _sum(mm(d_rows, wq_b.to(dtype)), d_qr)
        if d_qr is not None:
            d_latent, d_q_gain = _normed_backward(latent, d_qr, q_gain, ctx.eps)
            into_gradient(d_latent.T, x, d_wq_a)
            mm(d_latent, wq_a.to(dtype), out=d_x)
        if d_row is not None:
            d_kv = _sum(rotate(d_row, turn.conj()) if n else d_row, d_kv)
        if d_kv is not None:
            d_key, d_kv_gain = _normed_backward(key, d_kv, kv_gain, ctx.eps)
            into_gradient(d_key.T, x, d_wkv)
            add_mm(d_x, d_key, wkv.to(dtype))
        return d_x, d_wq_a, d_q_gain, d_wq_b, d_wkv, d_kv_gain, None, None, None


class ProjectOut(torch.autograd.Function):
    """As ops.project_out, of plain weights: a product for each group, of its columns where they lie. What comes out of
    these is multiplied once more in the backward pass."""

    @staticmethod
    def forward(ctx: Any, o: Tensor, turn: Tensor, wo_a: Tensor, groups: int, wo_b: Tensor):
        turned = rotate(o, turn.conj()).flatten(1) if len(o) else o.flatten(1)
        ctx.save_for_backward(turned, turn, wo_a, wo_b)
        ctx.groups, ctx.shape = groups, o.shape
        return mm(_low(turned, wo_a, groups), wo_b.to(o.dtype).T)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any):
        turned, turn, wo_a, wo_b = ctx.saved_tensors
        dy, groups, dtype = grads[0], ctx.groups, turned.dtype
        d_low, d_wo_a, d_wo_b = mm(dy, wo_b.to(dtype)), torch.empty_like(wo_a), torch.empty_like(wo_b)
        into_gradient(dy.T, _low(turned, wo_a, groups), d_wo_b)
        d_turned = torch.empty_like(turned)
        d_wide = d_wo_a.view(groups, -1, wo_a.shape[1])
        for g, (of, to, w) in enumerate(_groups(turned, d_low, wo_a, groups)):
            into_gradient(to.T, of, d_wide[g])
            mm(to, w.to(dtype), out=_columns(d_turned, g, groups))
        d_o = d_turned.view(ctx.shape)
        return rotate(d_o, turn) if len(d_o) else d_o, None, d_wo_a, None, d_wo_b


def _low(turned: Tensor, wo_a: Tensor, groups: int) -> Tensor:
    """Each group through its own rows of wo_a: [n, G * rank]."""
    low = turned.new_empty(len(turned), len(wo_a))
    for of, to, w in _groups(turned, low, wo_a, groups):
        mm(of, w.to(turned.dtype).T, out=to)
    return low


def _columns(x: Tensor, g: int, groups: int) -> Tensor:
    """Those of a group."""
    size = x.shape[1] // groups
    return x[:, g * size : (g + 1) * size]


def _groups(turned: Tensor, low: Tensor, wo_a: Tensor, groups: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """For each group the columns of what it multiplies, those of what comes out, and its weight."""
    weights = wo_a.view(groups, -1, wo_a.shape[1])
    return [(_columns(turned, g, groups), _columns(low, g, groups), weights[g]) for g in range(groups)]
