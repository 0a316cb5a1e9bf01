"""What the indexer learns from: how far its distribution over entries is from that of the attention.

The attention's is the target: its probabilities, in whose denominator window and sink are, summed over the heads and
then normalised over the entries, so that a head which mostly looks elsewhere has little say. The indexer's is the
softmax of its scores. Both live for one block of queries at a time. The paper does not say how V4's indexer was
trained; this is the loss of V3.2 (its report, section 2.1.1) over V4's entries.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dsv4.ops.blocked import blocks
from dsv4.ops.blocked.blocks import NEG_INF, Piece, entry_piece
from dsv4.ops.blocked.choose import topk_lowest
from dsv4.ops.spans import Spans


def _blocks(visible: Spans, chosen: Tensor | None, num: int, heads: int) -> Iterator[tuple[int, int]]:
    """Blocks of queries whose scores of `heads` heads in all and at most `num` entries are held at once."""
    width = min(num, 4 * chosen.shape[1] if chosen is not None else max(blocks.FEW, 4 * visible.longest))
    return visible.blocks(max(1, min(64, blocks.BLOCK_NUMBERS // (heads * max(1, width)))))


def _log_softmax(scores: Tensor) -> Tensor:
    """Over the last dimension; a row of -inf alone stays so."""
    total = scores.logsumexp(dim=-1, keepdim=True)
    return scores - total.masked_fill_(total == NEG_INF, 0.0)


def _target(q: Tensor, lse: Tensor, entries: Piece, scale: float) -> Tensor:
    """log of the attention's distribution over entries, fp32 [b, K], -inf where hidden."""
    return _log_softmax(entries.scores(q, scale).sub_(lse[..., None]).logsumexp(dim=1))


def _scored(q: Tensor, weights: Tensor, keys: Piece) -> tuple[Tensor, Tensor]:
    """relu(q . key) [b, Hi, K], 0 where hidden, and the scores [b, K], -inf where hidden; fp32."""
    lit = torch.relu_(keys.scores(q, 1.0))
    return lit, torch.bmm(weights[:, None], lit)[:, 0].masked_fill_(keys.hidden, NEG_INF)


class _IndexKL(torch.autograd.Function):
    """The gradients are taken in the forward pass, where the scores are: a sum's gradient only has to be scaled."""

    @staticmethod
    def forward(ctx: Any, q, weights, keys, attn_q, entries, lse, visible: Spans, chosen, scale: float):
        loss = q.new_zeros((), dtype=torch.float32)
        d_q, d_weights, d_keys = (torch.zeros_like(t, dtype=torch.float32) for t in (q, weights, keys))
        for i, j in _blocks(visible, chosen, len(keys), q.shape[1] + attn_q.shape[1]):
            piece = entry_piece(i, j, visible, chosen, keys, torch.float32)
            read = entry_piece(i, j, visible, chosen, entries, torch.promote_types(attn_q.dtype, entries.dtype))
            if piece is None or read is None:
                continue
            qb, w = q[i:j].float(), weights[i:j].float()
            lit, scores = _scored(qb, w, piece)
            log_t, log_s = _target(attn_q[i:j], lse[i:j], read, scale), _log_softmax(scores)
            t = log_t.exp()
            loss += (t * (log_t - log_s).masked_fill_(piece.hidden, 0.0)).sum()
            g = log_s.exp_().sub_(t)  # d KL / d score
            d_weights[i:j] = torch.bmm(lit, g[..., None])[..., 0]
            d = (lit > 0).float().mul_(g[:, None]).mul_(w[..., None])
            d_q[i:j] = piece.mix(d)
            if isinstance(piece.rows, slice):
                d_keys[piece.rows].addmm_(d.flatten(0, 1).T, qb.flatten(0, 1))
            else:
                each = torch.bmm(d.transpose(1, 2), qb)  # zero where hidden: it may be added anywhere
                d_keys.index_add_(0, piece.rows.clamp_min(0).flatten(), each.flatten(0, 1))
        ctx.save_for_backward(d_q, d_weights, d_keys)
        ctx.dtypes = q.dtype, weights.dtype, keys.dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any):
        scaled = ((d * grads[0]).to(dtype) for d, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True))
        return *scaled, None, None, None, None, None, None


def index_kl(
    q: Tensor,
    weights: Tensor,
    keys: Tensor,
    attn_q: Tensor,
    entries: Tensor,
    lse: Tensor,
    visible: Spans,
    chosen: Tensor | None,
    scale: float,
) -> Tensor:
    """Blocks of queries; gradients are analytic."""
    return _IndexKL.apply(q, weights, keys, attn_q.detach(), entries.detach(), lse, visible, chosen, scale)  # type: ignore[return-value]


@torch.no_grad()
def index_recall(
    q: Tensor,
    weights: Tensor,
    keys: Tensor,
    attn_q: Tensor,
    entries: Tensor,
    lse: Tensor,
    visible: Spans,
    k: int,
    scale: float,
) -> Tensor:
    """How well the index scores choose, fp64 [3]: over the queries that see more than k entries, their number, the sum
    of their recalls and the sum of their shares of mass.

    recall: which part of the k entries that the attention gives most to are among the k of the best index scores. mass:
    what the attention gives to the latter, relative to what it gives to its own best k. Arguments as in `index_kl`;
    lse must be that over all visible entries.
    """
    found = torch.zeros(3, dtype=torch.float64, device=q.device)
    for i, j in _blocks(visible, None, len(keys), q.shape[1] + attn_q.shape[1]):
        if visible.longest_of(i, j) <= k:
            continue
        piece = entry_piece(i, j, visible, None, keys, torch.float32)
        read = entry_piece(i, j, visible, None, entries, torch.promote_types(attn_q.dtype, entries.dtype))
        assert piece is not None and read is not None
        scores = _scored(q[i:j].float(), weights[i:j].float(), piece)[1]
        target = _target(attn_q[i:j], lse[i:j], read, scale)
        mine, best = topk_lowest(scores, k), topk_lowest(target, k)
        marks = torch.zeros_like(piece.hidden).scatter_(1, best, True)
        more = (~piece.hidden).sum(dim=1) > k
        share = target.gather(1, mine).logsumexp(1) - target.gather(1, best).logsumexp(1)
        recall = marks.gather(1, mine).double().mean(dim=1)
        found += torch.stack([more.double(), recall * more, share.exp().double().where(more, 0.0)]).sum(dim=1)
    return found
