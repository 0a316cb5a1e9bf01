"""Attention: scores exist for one block of queries at a time, and once more in the backward pass."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dsv4.ops.blocked import blocks
from dsv4.ops.blocked.blocks import Piece, dot, entry_piece, interval_piece
from dsv4.ops.formats import PackedRows
from dsv4.ops.spans import Spans


class _Plan:
    """How one call is cut: for each block of queries, the window piece and the entry piece."""

    def __init__(
        self,
        q: Tensor,
        window_kv: Tensor | PackedRows,
        window: Spans,
        entries: Tensor | PackedRows | None,
        visible: Spans | None,
        chosen: Tensor | None,
    ):
        self.window, self.visible, self.chosen = window, visible, chosen
        self.dtype = torch.promote_types(q.dtype, window_kv.dtype)  # fp32 queries may read a bf16 memory
        num_entries, heads = 0 if entries is None else len(entries), q.shape[1]
        if chosen is not None:
            width = window.longest + min(num_entries, 4 * chosen.shape[1])
        else:
            width = window.longest + (0 if visible is None else min(num_entries, max(blocks.FEW, 4 * visible.longest)))
        self.rows = max(1, min(64, blocks.BLOCK_NUMBERS // (heads * max(width, 1))))

    def pieces(self, i: int, j: int, kv: Tensor | PackedRows, entries: Tensor | PackedRows | None) -> list[Piece]:
        pieces = [interval_piece(i, j, self.window, kv, self.dtype)]
        entry = None if entries is None else entry_piece(i, j, self.visible, self.chosen, entries, self.dtype)
        return pieces if entry is None else [*pieces, entry]


def _attend(
    q: Tensor,
    window_kv: Tensor | PackedRows,
    entries: Tensor | PackedRows | None,
    sink: Tensor,
    plan: _Plan,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Out [n, H, D] and log-sum-exp [n, H] fp32, block by block."""
    out, lse = torch.empty_like(q), q.new_empty(q.shape[:2], dtype=torch.float32)
    for i, j in plan.window.blocks(plan.rows):
        pieces = plan.pieces(i, j, window_kv, entries)
        scores = [piece.scores(q[i:j], scale) for piece in pieces]
        top = sink.float().expand(j - i, -1)
        for s in scores:
            if s.shape[-1]:  # else no query of the block sees a row
                top = torch.maximum(top, s.amax(dim=-1))
        total = (sink.float() - top).exp()
        mixed: Tensor | None = None
        for piece, s in zip(pieces, scores, strict=True):
            p = s.sub_(top[..., None]).exp_()
            total = total + p.sum(dim=-1)
            mixed = piece.mix(p) if mixed is None else mixed + piece.mix(p)
        assert mixed is not None
        out[i:j] = (mixed / total[..., None]).to(q.dtype)
        lse[i:j] = top + total.log()
    return out, lse


class _SparseAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q, window_kv, entries, sink, plan: _Plan, scale: float):
        out, lse = _attend(q, window_kv, entries, sink, plan, scale)
        ctx.save_for_backward(q, window_kv, entries, sink, out, lse)
        ctx.plan, ctx.scale = plan, scale
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any):
        q, window_kv, entries, sink, out, lse = ctx.saved_tensors
        d_out, plan, scale = grads[0], ctx.plan, ctx.scale
        d_q = torch.empty_like(q)
        d_kv = torch.zeros_like(window_kv, dtype=torch.float32)
        d_entries = None if entries is None else torch.zeros_like(entries, dtype=torch.float32)
        d_sink = torch.zeros_like(sink, dtype=torch.float32)
        for i, j in plan.window.blocks(plan.rows):
            qb, do = q[i:j], d_out[i:j]
            delta = (do.float() * out[i:j].float()).sum(dim=-1)
            d_sink -= ((sink.float() - lse[i:j]).exp() * delta).sum(dim=0)
            d_qb: Tensor | None = None
            for piece, grad in zip(plan.pieces(i, j, window_kv, entries), (d_kv, d_entries), strict=False):
                p = piece.scores(qb, scale).sub_(lse[i:j, :, None]).exp_()
                keys_t = piece.keys.T if piece.keys.ndim == 2 else piece.keys.transpose(1, 2)
                dp = dot(do.flatten(0, 1), keys_t).view_as(p) if piece.keys.ndim == 2 else dot(do, keys_t)
                ds = dp.sub_(delta[..., None]).mul_(p).mul_(scale)
                part = piece.mix(ds)
                d_qb = part if d_qb is None else d_qb + part
                assert grad is not None
                piece.add_grad(grad, ds, qb.float(), p, do.float())
            assert d_qb is not None
            d_q[i:j] = d_qb.to(q.dtype)
        if entries is not None and d_entries is not None:
            d_entries = d_entries.to(entries.dtype)
        return d_q, d_kv.to(window_kv.dtype), d_entries, d_sink.to(sink.dtype), None, None


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
    """Blocks of queries; within a block the pools are read as intervals, so one matrix product serves all heads."""
    plan = _Plan(q, window_kv, window, entries, visible, chosen)
    if isinstance(window_kv, PackedRows) or isinstance(entries, PackedRows):  # a memory, so there is no gradient
        return _attend(q, window_kv, entries, sink, plan, scale)
    return _SparseAttention.apply(q, window_kv, entries, sink, plan, scale)  # type: ignore[return-value]
