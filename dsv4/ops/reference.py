"""Every op in plain differentiable torch: this file defines what is correct. It is for reading and for testing.

What an op means, with shapes, dtypes and the paper's equations, stands with its signature in ops/__init__.py, which
also has the legend. It serves every call.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from dsv4.ops.formats import PackedRows, pack_rows, unpack_rows
from dsv4.ops.spans import Spans
from dsv4.ops.weights import PackedMatrix

__all__ = [
    "best_rows", "compress", "compressor_rows", "cross_entropy", "experts", "gate", "head_collapse", "hyper_enter",
    "hyper_logits", "hyper_maps", "hyper_read", "hyper_write", "index_kl", "index_scores", "index_scores_topk",
    "linear", "mlp", "pack_rows", "project_in", "project_out", "rotate", "sinkhorn", "sparse_attention", "swiglu",
    "topk_lowest", "unpack_rows",
]  # fmt: skip

NEG_INF = float("-inf")


# --- choosing with a fixed tie rule ----------------------------------------------------------------------------------


def topk_lowest(scores: Tensor, k: int) -> Tensor:
    return torch.sort(scores, dim=-1, descending=True, stable=True).indices[..., :k]


def index_scores(q: Tensor, weights: Tensor, keys: Tensor) -> Tensor:
    """Indexer scores [n, E] = sum_h weights_h relu(q_h . key), fp32 (paper eq. 16). q [n, Hi, Di], keys [E, Di].

    Added up one by one: a matrix product's order of summation depends on where a key lies, and equal keys must tie.
    """
    q, weights, keys = q.float(), weights.float(), keys.float()
    dots = q.new_zeros(*q.shape[:2], len(keys))
    for channel in range(q.shape[2]):
        dots = dots + q[:, :, channel, None] * keys[:, channel]
    scores = q.new_zeros(len(q), len(keys))
    for head in range(q.shape[1]):
        scores = scores + weights[:, head, None] * dots[:, head].relu()
    return scores


def index_scores_topk(q: Tensor, weights: Tensor, keys: Tensor | PackedRows, visible: Spans, k: int) -> Tensor:
    with torch.no_grad():
        scores = index_scores(q, weights, keys[:]) + 0.0  # -0.0 becomes 0.0, so that the two tie
        if not len(keys):
            return torch.full((len(q), k), -1, device=q.device)
        hidden = visible.hidden(0, len(q), 0, len(keys), q.device)
        scores = scores.masked_fill(hidden, NEG_INF)
        chosen = topk_lowest(scores, min(k, len(keys)))
        chosen = chosen.masked_fill(scores.gather(1, chosen) == NEG_INF, -1)
        return F.pad(chosen, (0, k - chosen.shape[1]), value=-1).sort(dim=1).values


def best_rows(scores: Tensor, visible: Spans, counts: Tensor, k: int) -> Tensor:
    with torch.no_grad():
        n, rows = len(visible), len(scores)
        seen = (scores + 0.0).expand(n, rows).masked_fill(visible.hidden(0, n, 0, rows, scores.device), NEG_INF)
        chosen = topk_lowest(seen, min(k, rows))
        beyond = torch.arange(chosen.shape[1], device=scores.device) >= counts[:, None]
        chosen = chosen.masked_fill(beyond | (seen.gather(1, chosen) == NEG_INF), -1)
        return F.pad(chosen, (0, k - chosen.shape[1]), value=-1).sort(dim=1).values


# --- attention -------------------------------------------------------------------------------------------------------


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
    keys, masks = [window_kv[:]], [window.hidden(0, len(q), 0, len(window_kv), q.device)]
    if entries is not None:
        masks.append(_unread(len(q), len(entries), visible, chosen, q.device))
        keys.append(entries[:])
    key = torch.cat(keys).float()
    scores = torch.einsum("nhd,kd->nhk", q.float(), key) * scale
    scores = scores.masked_fill(torch.cat(masks, dim=1)[:, None], NEG_INF)
    logits = torch.cat([scores, sink.float()[None, :, None].expand(len(q), -1, 1)], dim=-1)
    lse = logits.logsumexp(-1)
    out = torch.einsum("nhk,kd->nhd", (scores - lse[..., None]).exp(), key)
    return out.to(q.dtype), lse.detach()


def _unread(n: int, num: int, visible: Spans | None, chosen: Tensor | None, device: torch.device) -> Tensor:
    """bool [n, num]: the entries that each query does not read."""
    if chosen is not None:
        hidden = torch.ones(n, num + 1, dtype=torch.bool, device=device)
        hidden.scatter_(1, chosen + 1, False)  # -1 lands on column 0, which is dropped
        return hidden[:, 1:]
    assert visible is not None
    return visible.hidden(0, n, 0, num, device)


# --- compression and rotation ----------------------------------------------------------------------------------------


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
    pooled = pool_groups(values, scores, first_row, has_previous, r, overlap).to(dtype)
    return rotate(rms_norm(pooled, gain, norm_eps), turn)


def pool_groups(
    values: Tensor, scores: Tensor, first_row: Tensor, has_previous: Tensor, r: int, overlap: bool
) -> Tensor:
    """The groups' entries [G, d] fp32 before norm and rotation."""
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


def rotate(x: Tensor, turn: Tensor) -> Tensor:
    pairs = turn.shape[-1]
    turn = turn.view(len(turn), *[1] * (x.ndim - 2), pairs)
    tail = torch.view_as_complex(x[..., -2 * pairs :].float().unflatten(-1, (pairs, 2)))
    return torch.cat([x[..., : -2 * pairs], torch.view_as_real(tail * turn).flatten(-2).to(x.dtype)], dim=-1)


def rms_norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """x / rms(x) * gain over the last dimension, in fp32, cast back to x's dtype; gain [dim]."""
    return cast(F.rms_norm(cast(x, torch.float32), gain.shape, cast(gain, torch.float32), eps), x.dtype)


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in this dtype: itself, if it is. A call of torch that changes nothing takes its time, and a token has many."""
    return x if x.dtype == dtype else x.to(dtype)


# --- hyper-connections -----------------------------------------------------------------------------------------------


def sinkhorn(logits: Tensor, iters: int, eps: float) -> Tensor:
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
    flat = x.flatten(1).float()
    rho = torch.rsqrt(flat.square().mean(dim=1, keepdim=True) + norm_eps)
    pre, post, comb = hyper_logits(F.linear(flat, fn.float()) * rho, base, scale, x.shape[1])
    return torch.sigmoid(pre) + eps, 2 * torch.sigmoid(post), sinkhorn(comb, iters, eps)


def hyper_enter(
    x: Tensor, fn: Tensor, base: Tensor, scale: Tensor, gain: Tensor, iters: int, eps: float, norm_eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    pre, post, comb = hyper_maps(x, fn, base, scale, iters, eps, norm_eps)
    return rms_norm(hyper_read(x, pre), gain, norm_eps), post, comb


def head_collapse(x: Tensor, fn: Tensor, base: Tensor, scale: Tensor, eps: float, norm_eps: float) -> Tensor:
    flat = x.flatten(1).float()
    rho = torch.rsqrt(flat.square().mean(dim=1, keepdim=True) + norm_eps)
    return hyper_read(x, torch.sigmoid(scale * (F.linear(flat, fn.float()) * rho) + base) + eps)


def hyper_read(x: Tensor, pre: Tensor) -> Tensor:
    """A sublayer's input [n, M] = sum_j pre_j x_j, summed in fp32, cast once. x [n, N, M], pre [n, N]."""
    return torch.einsum("nj,njm->nm", pre, x.float()).to(x.dtype)


def hyper_write(x: Tensor, y: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    return (post[:, :, None] * y.float()[:, None] + torch.einsum("njk,njm->nkm", comb, x.float())).to(x.dtype)


# --- linear ----------------------------------------------------------------------------------------------------------


def linear(x: Tensor, weight: Tensor | PackedMatrix) -> Tensor:
    if isinstance(weight, PackedMatrix):
        return F.linear(weight.as_input(x), weight.unpack(x.dtype))
    return F.linear(x, weight.to(x.dtype))


def project_in(
    x: Tensor,
    wq_a: Tensor | PackedMatrix,
    q_gain: Tensor,
    wq_b: Tensor | PackedMatrix,
    wkv: Tensor | PackedMatrix,
    kv_gain: Tensor,
    heads: int,
    eps: float,
    turn: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    qr = rms_norm(linear(x, wq_a), q_gain, eps)
    q = linear(qr, wq_b).unflatten(1, (heads, -1))
    q = rotate(F.rms_norm(q.float(), q.shape[-1:], None, eps).to(x.dtype), turn)
    kv = rms_norm(linear(x, wkv), kv_gain, eps)
    return qr, q, kv, rotate(kv, turn)


def project_out(
    o: Tensor, turn: Tensor, wo_a: Tensor | PackedMatrix, groups: int, wo_b: Tensor | PackedMatrix
) -> Tensor:
    grouped = rotate(o, turn.conj()).reshape(len(o), groups, -1)
    wide = wo_a.unpack(o.dtype) if isinstance(wo_a, PackedMatrix) else wo_a.to(o.dtype)
    low = torch.einsum("tgi,gri->tgr", grouped, wide.view(groups, -1, grouped.shape[-1]))
    return linear(low.flatten(1), wo_b)


def compressor_rows(x: Tensor, wkv: Tensor, wgate: Tensor, ape: Tensor, positions: Tensor) -> Tensor:
    x = x.float()
    bias = F.embedding(positions % len(ape), ape.float())
    return torch.stack([linear(x, wkv), linear(x, wgate) + bias], dim=1)


# --- mixture of experts ----------------------------------------------------------------------------------------------


def gate(
    x: Tensor, weight: Tensor, bias: Tensor | None, chosen: Tensor | None, k: int, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    scores = gate_scores(x, weight)
    if chosen is None:
        assert bias is not None, "experts are chosen by biased scores, or given"
        chosen = topk_lowest((scores + bias).detach(), k)
    return scores, chosen, gate_weights(scores, chosen, scale)


def gate_scores(x: Tensor, weight: Tensor) -> Tensor:
    """sqrt(softplus(weight x)) of every expert, fp32 [n, X]."""
    logits = F.linear(x.float(), weight.float())
    # the floor keeps sqrt's gradient finite where softplus underflows (logits below -87)
    return F.softplus(logits).clamp_min(torch.finfo(torch.float32).tiny).sqrt()


def gate_weights(scores: Tensor, chosen: Tensor, scale: float) -> Tensor:
    """The chosen experts' scores, normalised to sum to `scale`."""
    weights = scores.gather(1, chosen)
    return weights / weights.sum(dim=1, keepdim=True) * scale


def experts(
    x: Tensor, chosen: Tensor, weights: Tensor, w13: Tensor | PackedMatrix, w2: Tensor | PackedMatrix, limit: float
) -> Tensor:
    packed = isinstance(w13, PackedMatrix)
    inputs = w13.as_input(x) if packed else x
    out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for expert in range(w13.shape[0] // (2 * w2.shape[1]) if packed else len(w13)):
        token, slot = torch.where(chosen == expert)
        if packed and not len(token):
            continue
        w1, w3, down = _expert(w13, w2, expert, x.dtype)
        act = weights[token, slot, None] * swiglu(F.linear(inputs[token], w1), F.linear(inputs[token], w3), limit)
        act = act.to(x.dtype)
        act = w2.as_input(act) if isinstance(w2, PackedMatrix) else act
        out = out.index_add(0, token, F.linear(act, down).float())
    return out


def _expert(
    w13: Tensor | PackedMatrix, w2: Tensor | PackedMatrix, expert: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """The three matrices of one of the stacked experts, as numbers."""
    if isinstance(w13, Tensor):
        assert isinstance(w2, Tensor), "either both are packed or none"
        w1, w3 = w13[expert].to(dtype)
        return w1, w3, w2[expert].to(dtype)
    assert isinstance(w2, PackedMatrix), "either both are packed or none"
    width, inner = w13.shape[1], w2.shape[1]
    w1, w3 = w13.unpack(dtype, range(2 * inner * expert, 2 * inner * (expert + 1))).view(2, inner, width)
    return w1, w3, w2.unpack(dtype, range(width * expert, width * (expert + 1)))


def unpacked_experts(
    w13: Tensor | PackedMatrix, w2: Tensor | PackedMatrix, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Stacks of experts [X, 2, I, M] and [X, M, I] as numbers; plain ones as they are."""
    if isinstance(w13, Tensor):
        assert isinstance(w2, Tensor), "either both are packed or none"
        return w13, w2
    assert isinstance(w2, PackedMatrix), "either both are packed or none"
    width, inner = w13.shape[1], w2.shape[1]
    return w13.unpack(dtype).view(-1, 2, inner, width), w2.unpack(dtype).view(-1, width, inner)


def mlp(
    x: Tensor, w1: Tensor | PackedMatrix, w3: Tensor | PackedMatrix, w2: Tensor | PackedMatrix, limit: float
) -> Tensor:
    return linear(swiglu(linear(x, w1), linear(x, w3), limit).to(x.dtype), w2)


def swiglu(gate: Tensor, up: Tensor, limit: float) -> Tensor:
    """silu(min(gate, limit)) * clamp(up, -limit, limit), fp32: the gate is cut on its upper side only."""
    return F.silu(gate.float().clamp(max=limit)) * up.float().clamp(-limit, limit)


# --- loss ------------------------------------------------------------------------------------------------------------


def cross_entropy(hidden: Tensor, head: Tensor, targets: Tensor, ignore: int = -100) -> Tensor:
    logits = F.linear(hidden.float(), head.float())
    return F.cross_entropy(logits, targets, ignore_index=ignore, reduction="sum")


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
    hidden = _unread(len(q), len(keys), visible, chosen, q.device)
    with torch.no_grad():
        heads = torch.einsum("nhd,ed->nhe", attn_q.float(), entries.float()) * scale - lse[..., None]
        target = heads.logsumexp(dim=1).masked_fill(hidden, NEG_INF)
    some = ~hidden.all(dim=1)  # queries that read anything
    log_t = target[some].log_softmax(dim=1)
    log_s = index_scores(q, weights, keys).masked_fill(hidden, NEG_INF)[some].log_softmax(dim=1)
    return (log_t.exp() * (log_t - log_s).masked_fill(hidden[some], 0.0)).sum()
