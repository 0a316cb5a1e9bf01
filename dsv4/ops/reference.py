"""Every op in plain differentiable torch: this file defines what is correct. It is for reading and for testing.

Legend: n queries / tokens, H heads, D head width, P window rows, E compressed entries, K chosen entries, N streams,
M model width, G groups that close (new entries), r compress ratio. `Spans` (ops/spans.py) are row intervals.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from dsv4.ops.formats import PackedRows
from dsv4.ops.spans import Spans

NEG_INF = float("-inf")


# --- choosing with a fixed tie rule ----------------------------------------------------------------------------------


def topk_lowest(scores: Tensor, k: int) -> Tensor:
    """Indices [..., k] of the k largest of `scores` [..., n], by score, then by lowest index (contract 2)."""
    return torch.sort(scores, dim=-1, descending=True, stable=True).indices[..., :k]


def index_scores(q: Tensor, weights: Tensor, keys: Tensor) -> Tensor:
    """Indexer scores [n, E] = sum_h weights_h relu(q_h . key), fp32 (paper eq. 16). q [n, Hi, Di], keys [E, Di]."""
    scores = torch.relu(torch.einsum("nhd,ed->nhe", q.float(), keys.float()))
    return torch.einsum("nh,nhe->ne", weights.float(), scores)


def index_scores_topk(q: Tensor, weights: Tensor, keys: Tensor | PackedRows, visible: Spans, k: int) -> Tensor:
    """Which entries each query reads: int64 [n, k] pool rows in ascending order, -1 (first) where fewer are visible.

    q [n, Hi, Di], weights [n, Hi], keys [E, Di]. Order of choice: score, then lowest row. Not differentiable: the
    choice carries no gradient (the indexer has a loss of its own).
    """
    with torch.no_grad():
        scores = index_scores(q, weights, keys[:]) + 0.0  # -0.0 becomes 0.0, so that the two tie
        if not len(keys):
            return torch.full((len(q), k), -1, device=q.device)
        hidden = visible.hidden(0, len(q), 0, len(keys), q.device)
        scores = scores.masked_fill(hidden, NEG_INF)
        chosen = topk_lowest(scores, min(k, len(keys)))
        chosen = chosen.masked_fill(scores.gather(1, chosen) == NEG_INF, -1)
        return F.pad(chosen, (0, k - chosen.shape[1]), value=-1).sort(dim=1).values


# --- attention -------------------------------------------------------------------------------------------------------


def sparse_attention(
    q: Tensor,
    window_kv: Tensor,
    window: Spans,
    entries: Tensor | PackedRows | None,
    visible: Spans | None,
    chosen: Tensor | None,
    sink: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """One softmax over a query's window rows, its compressed entries and the sink; key = value (paper eq. 19-21).

    q [n, H, D]; window_kv [P, D] with one interval per query; entries [E, D] read either whole by interval (`visible`)
    or as rows `chosen` int64 [n, K] (-1 = none); sink [H] fp32, a logit whose value is zero, not scaled.
    Returns out [n, H, D] in q's dtype and the log-sum-exp [n, H] fp32 (sink included; it carries no gradient).
    """
    keys, masks = [window_kv], [window.hidden(0, len(q), 0, len(window_kv), q.device)]
    if entries is not None and len(entries):
        if chosen is not None:
            hidden = torch.ones(len(q), len(entries) + 1, dtype=torch.bool, device=q.device)
            hidden.scatter_(1, chosen + 1, False)  # -1 lands on column 0, which is dropped
            masks.append(hidden[:, 1:])
        else:
            assert visible is not None
            masks.append(visible.hidden(0, len(q), 0, len(entries), q.device))
        keys.append(entries[:])
    key = torch.cat(keys).float()
    scores = torch.einsum("nhd,kd->nhk", q.float(), key) * scale
    scores = scores.masked_fill(torch.cat(masks, dim=1)[:, None], NEG_INF)
    logits = torch.cat([scores, sink.float()[None, :, None].expand(len(q), -1, 1)], dim=-1)
    lse = logits.logsumexp(-1)
    out = torch.einsum("nhk,kd->nhd", (scores - lse[..., None]).exp(), key)
    return out.to(q.dtype), lse.detach()


# --- compression -----------------------------------------------------------------------------------------------------


def compress(values: Tensor, scores: Tensor, first_row: Tensor, has_previous: Tensor, r: int, overlap: bool) -> Tensor:
    """Pool closed groups of tokens into entries [G, d] fp32, before norm and rotation (paper eq. 11-12, 22-23).

    values, scores [R, c*d] fp32 rows (c = 2 with overlap, the positional bias already in the scores); first_row [G]
    int64: the row of each group's first token. Without overlap an entry is a per-channel softmax over its r rows.
    With overlap the FIRST half of a row's channels speaks for the next group and the second half for its own, so an
    entry pools 2r rows; has_previous [G] bool is False where there is no group before (a document's first).
    """
    rows = first_row[:, None] + torch.arange(r, device=values.device)
    if not overlap:
        return (scores[rows].softmax(dim=1) * values[rows]).sum(dim=1)
    d = values.shape[1] // 2
    before = (rows - r).clamp_min(0)
    absent = ~has_previous[:, None, None]
    old_scores = scores[:, :d][before].masked_fill(absent, NEG_INF)
    old_values = values[:, :d][before].masked_fill(absent, 0.0)
    all_scores = torch.cat([old_scores, scores[:, d:][rows]], dim=1)
    all_values = torch.cat([old_values, values[:, d:][rows]], dim=1)
    return (all_scores.softmax(dim=1) * all_values).sum(dim=1)


# --- hyper-connections -----------------------------------------------------------------------------------------------


def sinkhorn(logits: Tensor, iters: int, eps: float) -> Tensor:
    """Nearly doubly stochastic matrices [n, N, N] from logits [n, N, N], fp32; the columns sum to 1 exactly.

    Row softmax + eps, a column step, then iters - 1 rounds of row step and column step (paper eq. 8; the matrix is the
    transpose of the paper's B, see docs/names.md).
    """
    c = logits.float().softmax(dim=-1) + eps
    c = c / (c.sum(dim=-2, keepdim=True) + eps)
    for _ in range(iters - 1):
        c = c / (c.sum(dim=-1, keepdim=True) + eps)
        c = c / (c.sum(dim=-2, keepdim=True) + eps)
    return c


def hyper_logits(projected: Tensor, base: Tensor, scale: Tensor, num: int) -> tuple[Tensor, Tensor, Tensor]:
    """The raw numbers of pre [n, N], post [n, N] and comb [n, N, N] from their dynamic parts `projected` [n, (2+N)*N].

    Each part is scaled by its own learned scalar and added to its static base (paper eq. 3-5).
    """
    pre, post, comb = projected.split([num, num, num * num], dim=1)
    b_pre, b_post, b_comb = base.float().split([num, num, num * num])
    comb = (scale[2] * comb + b_comb).view(-1, num, num)
    return scale[0] * pre + b_pre, scale[1] * post + b_post, comb


def hyper_maps(
    x: Tensor, fn: Tensor, base: Tensor, scale: Tensor, iters: int, eps: float, norm_eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """How one sublayer reads and writes the streams (paper eq. 6-8): pre [n, N], post [n, N], comb [n, N, N], fp32.

    x [n, N, M]; fn [(2+N)*N, N*M], base [(2+N)*N], scale [3], all fp32. The RMS runs over all N*M numbers, no gain.
    pre lies in (0, 1), post in (0, 2), comb is nearly doubly stochastic.
    """
    flat = x.flatten(1).float()
    rho = torch.rsqrt(flat.square().mean(dim=1, keepdim=True) + norm_eps)
    pre, post, comb = hyper_logits(F.linear(flat, fn.float()) * rho, base, scale, x.shape[1])
    return torch.sigmoid(pre) + eps, 2 * torch.sigmoid(post), sinkhorn(comb, iters, eps)


def hyper_read(x: Tensor, pre: Tensor) -> Tensor:
    """A sublayer's input [n, M] = sum_j pre_j x_j, summed in fp32, cast once. x [n, N, M], pre [n, N]."""
    return torch.einsum("nj,njm->nm", pre, x.float()).to(x.dtype)


def hyper_write(x: Tensor, y: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    """New streams [n, N, M]: x'_k = post_k y + sum_j comb[j, k] x_j - the sum runs over the FIRST index of comb."""
    return (post[:, :, None] * y.float()[:, None] + torch.einsum("njk,njm->nkm", comb, x.float())).to(x.dtype)


# --- mixture of experts ----------------------------------------------------------------------------------------------


def experts(x: Tensor, chosen: Tensor, weights: Tensor, w13: Tensor, w2: Tensor, limit: float) -> Tensor:
    """Routed experts: sum over a token's chosen experts of w2 (weight * clamped-SwiGLU(x)), fp32 [n, M].

    x [n, M]; chosen int64 [n, k]; weights fp32 [n, k]; w13 [X, 2, I, M] (gate over up), w2 [X, M, I].
    """
    out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for expert in range(len(w13)):
        token, slot = torch.where(chosen == expert)
        w1, w3 = w13[expert].to(x.dtype)
        act = weights[token, slot, None] * swiglu(F.linear(x[token], w1), F.linear(x[token], w3), limit)
        act = act.to(x.dtype)
        out = out.index_add(0, token, F.linear(act, w2[expert].to(x.dtype)).float())
    return out


def swiglu(gate: Tensor, up: Tensor, limit: float) -> Tensor:
    """silu(min(gate, limit)) * clamp(up, -limit, limit), fp32: the gate is cut on its upper side only."""
    return F.silu(gate.float().clamp(max=limit)) * up.float().clamp(-limit, limit)


# --- loss ------------------------------------------------------------------------------------------------------------


def cross_entropy(hidden: Tensor, head: Tensor, targets: Tensor, ignore: int = -100) -> Tensor:
    """Sum over tokens of -log p(target), fp32 scalar; hidden [n, M], head [V, M], targets int64 [n] (ignore: none)."""
    logits = F.linear(hidden.float(), head.float())
    return F.cross_entropy(logits, targets, ignore_index=ignore, reduction="sum")
