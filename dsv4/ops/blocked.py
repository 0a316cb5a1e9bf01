"""The ops that need care with memory, computed in blocks with analytic backward passes; same values as reference.py.

Runs on any device torch runs on and serves every call. Nothing here grows faster than linearly with the sequence:
scores and masks exist for one block of queries at a time and are computed again in the backward pass. What an op means,
and the legend: see ops/__init__.py.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from dsv4.ops.exact import whole_numbers
from dsv4.ops.formats import PackedRows
from dsv4.ops.limits import Limits
from dsv4.ops.reference import gate_scores, gate_weights, hyper_logits, hyper_read, rms_norm, unpacked_experts
from dsv4.ops.spans import Spans
from dsv4.ops.weights import PackedMatrix

NEG_INF = float("-inf")
_INT64_MIN = torch.iinfo(torch.int64).min
_LOW32 = 0xFFFFFFFF
BLOCK_NUMBERS = 1 << 23  # numbers that one block of scores may hold: 32 MiB in fp32
FEW = 512  # rows that a block of queries may read as one, whether or not each of them needs most of these


# --- choosing with a fixed tie rule ----------------------------------------------------------------------------------


def order_keys(scores: Tensor, index: Tensor) -> Tensor:
    """Distinct int64 keys that sort like (score, then lowest index): 32 bits of ordered float over 32 of index."""
    bits = (scores.float() + 0.0).view(torch.int32)  # + 0.0: -0.0 becomes 0.0, so that the two tie
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (ordered.to(torch.int64) << 32) | (_LOW32 - index)


def topk_lowest(scores: Tensor, k: int) -> Tensor:
    """Indices [..., k] of the k largest, by score, then by lowest index."""
    keys = order_keys(scores, torch.arange(scores.shape[-1], device=scores.device))
    return _LOW32 - (torch.topk(keys, k, dim=-1).values & _LOW32)


@torch.no_grad()
def index_scores_topk(q: Tensor, weights: Tensor, keys: Tensor | PackedRows, visible: Spans, k: int) -> Tensor:
    """Streaming form: blocks of queries x blocks of keys, merging the best k so far.

    Equal keys have equal scores wherever they lie: products are exact (ops/exact.py), heads are added one by one.
    """
    n, heads, _ = q.shape
    chosen = torch.full((n, k), -1, dtype=torch.int64, device=q.device)
    rows = max(1, min(128, BLOCK_NUMBERS // (heads * 512)))
    for i, j in visible.blocks(rows):
        lo, hi = visible.union(i, j)
        if hi == lo:
            continue
        apart = _apart(visible, i, j)
        if apart:  # every query has keys of its own
            lo, hi = 0, visible.longest_of(i, j)
        queries, unit = whole_numbers(q[i:j])
        w = weights[i:j, :, None].double() * unit
        width = max(k, BLOCK_NUMBERS // (2 * (heads + (keys.shape[1] if apart else 0)) * (j - i)))  # 2: in fp64
        best: Tensor | None = None
        for a in range(lo, hi, width):
            b = min(a + width, hi)
            if apart:
                index, hidden = _rows_of(visible, i, j, a, b, q.device)
                block, unit = whole_numbers(keys[index])
                scores = torch.bmm(queries, block.transpose(1, 2))
            else:
                index, hidden = torch.arange(a, b, device=q.device), visible.hidden(i, j, a, b, q.device)
                block, unit = whole_numbers(keys[a:b])
                scores = (queries.flatten(0, 1) @ block.T).view(j - i, heads, b - a)
            score = _folded(scores.relu_().mul_(w)) * unit[..., 0]
            order = order_keys(score, index).masked_fill_(hidden, _INT64_MIN)
            order = order if best is None else torch.cat([best, order], dim=1)
            best = torch.topk(order, min(k, order.shape[1]), dim=1).values
        assert best is not None
        row = (_LOW32 - (best & _LOW32)).masked_fill_(best == _INT64_MIN, -1)
        chosen[i:j, k - row.shape[1] :] = row.sort(dim=1).values
    return chosen


def _folded(x: Tensor) -> Tensor:
    """The sum [n, K] over the middle of x [n, heads, K], which is used up: halves upon halves, so that each column is
    added up in the same order (a reduction adds its last columns otherwise)."""
    heads = x.shape[1]
    while heads > 1:
        half = (heads + 1) // 2
        x[:, : heads - half] += x[:, half:heads]
        heads = half
    return x[:, 0]


@torch.no_grad()
def best_rows(scores: Tensor, visible: Spans, counts: Tensor, k: int) -> Tensor:
    """Blocks of intervals x blocks of rows, merging the best k so far."""
    chosen = torch.full((len(visible), k), -1, dtype=torch.int64, device=scores.device)
    for i, j in visible.blocks(64):
        lo, hi = visible.union(i, j)
        if hi == lo:
            continue
        apart = _apart(visible, i, j)
        if apart:
            lo, hi = 0, visible.longest_of(i, j)
        width = max(k, BLOCK_NUMBERS // (4 * (j - i)))
        best: Tensor | None = None
        for a in range(lo, hi, width):
            b = min(a + width, hi)
            if apart:
                index, hidden = _rows_of(visible, i, j, a, b, scores.device)
                order = order_keys(scores[index], index)
            else:
                index, hidden = torch.arange(a, b, device=scores.device), visible.hidden(i, j, a, b, scores.device)
                order = order_keys(scores[a:b], index).expand(j - i, b - a)
            order = order.masked_fill(hidden, _INT64_MIN)
            order = order if best is None else torch.cat([best, order], dim=1)
            best = torch.topk(order, min(k, order.shape[1]), dim=1).values
        assert best is not None
        beyond = torch.arange(best.shape[1], device=scores.device) >= counts[i:j, None]
        row = (_LOW32 - (best & _LOW32)).masked_fill_(beyond | (best == _INT64_MIN), -1)
        chosen[i:j, k - row.shape[1] :] = row.sort(dim=1).values
    return chosen


# --- attention -------------------------------------------------------------------------------------------------------


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """a @ b with an fp32 result: low-precision operands are multiplied as they are and summed in fp32."""
    if a.is_cuda and a.dtype == b.dtype != torch.float32:
        return torch.bmm(a, b, out_dtype=torch.float32) if a.ndim == 3 else torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


class Piece:
    """What one block of queries reads of one pool: keys [K, D] shared by the block, or [b, K, D] per query."""

    def __init__(self, keys: Tensor, hidden: Tensor, rows: slice | Tensor):
        self.keys, self.hidden, self.rows = keys, hidden, rows

    def scores(self, q: Tensor, scale: float) -> Tensor:
        """fp32 [b, H, K] from q [b, H, D], -inf where hidden."""
        b, heads, _ = q.shape
        if self.keys.ndim == 2:
            s = _dot(q.flatten(0, 1), self.keys.T).view(b, heads, -1)
        else:
            s = _dot(q, self.keys.transpose(1, 2))
        return s.mul_(scale).masked_fill_(self.hidden[:, None], NEG_INF)

    def mix(self, p: Tensor) -> Tensor:
        """sum_k p[b, H, k] keys[k] -> fp32 [b, H, D]."""
        p = p.to(self.keys.dtype)
        if self.keys.ndim == 2:
            return _dot(p.flatten(0, 1), self.keys).view(*p.shape[:2], -1)
        return _dot(p, self.keys)

    def add_grad(self, grad: Tensor, ds: Tensor, q: Tensor, p: Tensor, do: Tensor) -> None:
        """grad[rows] += ds^T q + p^T do: a row is a key and a value at once."""
        if isinstance(self.rows, slice):
            left = torch.cat([ds.flatten(0, 1), p.flatten(0, 1)])
            grad[self.rows].addmm_(left.T, torch.cat([q.flatten(0, 1), do.flatten(0, 1)]))
        else:
            g = torch.bmm(torch.cat([ds, p], dim=1).transpose(1, 2), torch.cat([q, do], dim=1))
            # a hidden row's gradient is exactly zero: adding it somewhere spares a device the wait for a count
            grad.index_add_(0, self.rows.clamp_min(0).flatten(), g.flatten(0, 1))


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
            width = window.longest + (0 if visible is None else min(num_entries, max(FEW, 4 * visible.longest)))
        self.rows = max(1, min(64, BLOCK_NUMBERS // (heads * max(width, 1))))

    def pieces(self, i: int, j: int, kv: Tensor | PackedRows, entries: Tensor | PackedRows | None) -> list[Piece]:
        pieces = [interval_piece(i, j, self.window, kv, self.dtype)]
        entry = None if entries is None else entry_piece(i, j, self.visible, self.chosen, entries, self.dtype)
        return pieces if entry is None else [*pieces, entry]


def entry_piece(
    i: int, j: int, visible: Spans | None, chosen: Tensor | None, pool: Tensor | PackedRows, dtype: torch.dtype
) -> Piece | None:
    """What queries i..j-1 read of the compressed entries, or of another pool with a row for each; None: nothing."""
    lo, hi = (0, len(pool)) if visible is None else visible.union(i, j)
    if hi == lo:
        return None
    if chosen is None:
        assert visible is not None, "entries are read by interval or as chosen rows"
        return interval_piece(i, j, visible, pool, dtype)
    rows = chosen[i:j]
    # few entries and several queries: one dense product is cheaper than gathering for each
    if j - i > 1 and hi - lo <= 4 * rows.shape[1]:
        hidden = torch.ones(j - i, hi - lo + 1, dtype=torch.bool, device=pool.device)
        hidden.scatter_(1, torch.where(rows < 0, 0, rows - lo + 1), False)
        return Piece(pool[lo:hi].to(dtype), hidden[:, 1:], slice(lo, hi))
    return Piece(pool[rows.clamp_min(0)].to(dtype), rows < 0, rows)


def interval_piece(i: int, j: int, spans: Spans, pool: Tensor | PackedRows, dtype: torch.dtype) -> Piece:
    """What queries i..j-1 read of a pool in which each has its interval."""
    lo, hi = spans.union(i, j)
    if not _apart(spans, i, j):
        return Piece(pool[lo:hi].to(dtype), spans.hidden(i, j, lo, hi, pool.device), slice(lo, hi))
    rows, hidden = _rows_of(spans, i, j, 0, spans.longest_of(i, j), pool.device)
    return Piece(pool[rows].to(dtype), hidden, rows)


def _apart(spans: Spans, i: int, j: int) -> bool:
    """Whether the intervals of queries i..j-1, those of different sequences, are better gathered than read as one."""
    lo, hi = spans.union(i, j)
    return j - i > 1 and hi - lo > max(FEW, 4 * spans.longest_of(i, j))


def _rows_of(spans: Spans, i: int, j: int, a: int, b: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows a..b-1 of each interval of queries i..j-1, int64 [j-i, b-a], and where the interval has no such row."""
    start, stop = spans.on(device)
    rows = start[i:j, None] + torch.arange(a, b, device=device)
    hidden = rows >= stop[i:j, None]
    return rows.masked_fill_(hidden, 0), hidden


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
                dp = _dot(do.flatten(0, 1), keys_t).view_as(p) if piece.keys.ndim == 2 else _dot(do, keys_t)
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


# --- hyper-connections -----------------------------------------------------------------------------------------------


def _normalise_(c: Tensor, dim: int, eps: float) -> Tensor:
    """c / (sum over dim + eps), in place; returns the divisor."""
    total = c.sum(dim=dim, keepdim=True).add_(eps)
    c.div_(total)
    return total


class _Sinkhorn(torch.autograd.Function):
    """Tokens run along the last, contiguous dimension, so that every step is one wide vector operation."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, iters: int, eps: float):
        ctx.save_for_backward(logits)
        ctx.iters, ctx.eps = iters, eps
        c = logits.detach().float().softmax(dim=-1).permute(1, 2, 0).contiguous().add_(eps)
        _normalise_(c, 0, eps)
        for _ in range(iters - 1):
            _normalise_(c, 1, eps)
            _normalise_(c, 0, eps)
        return c.permute(2, 0, 1).contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any):
        (logits,) = ctx.saved_tensors
        iters, eps = ctx.iters, ctx.eps
        out = torch.empty_like(logits)
        for i in range(0, len(logits), 4096):  # the 39 steps are replayed for a bounded number of tokens at a time
            out[i : i + 4096] = _sinkhorn_backward(logits[i : i + 4096], grads[0][i : i + 4096], iters, eps)
        return out, None, None


def _sinkhorn_backward(logits: Tensor, grad: Tensor, iters: int, eps: float) -> Tensor:
    """Every step is y = x / (sum x + eps), so dx = (dy - sum(dy y)) / (sum x + eps): bounded, nothing to overflow."""
    soft = logits.float().softmax(dim=-1).permute(1, 2, 0).contiguous()
    steps: list[tuple[int, Tensor, Tensor]] = []
    c = soft + eps
    for dim in [0] + [1, 0] * (iters - 1):
        total = c.sum(dim=dim, keepdim=True).add_(eps)
        c = c / total
        steps.append((dim, c, total))
    g = grad.permute(1, 2, 0).float().contiguous()
    for dim, y, total in reversed(steps):
        g = (g - (g * y).sum(dim=dim, keepdim=True)).div_(total)
    g = soft * (g - (g * soft).sum(dim=1, keepdim=True))
    return g.permute(2, 0, 1).to(logits.dtype).contiguous()


def sinkhorn(logits: Tensor, iters: int, eps: float) -> Tensor:
    return _Sinkhorn.apply(logits, iters, eps)  # type: ignore[return-value]


class _HyperProject(torch.autograd.Function):
    """fn . (x / rms(x)) for x [n, N*M]; the norm is applied to the 24 results, and its gradient in one pass over x."""

    @staticmethod
    def forward(ctx: Any, flat: Tensor, fn: Tensor, norm_eps: float):
        rho = (torch.linalg.vector_norm(flat, dim=1, keepdim=True).square() / flat.shape[1] + norm_eps).rsqrt()
        product = flat @ fn.T
        ctx.save_for_backward(flat, fn, rho, product)
        return product * rho

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any):
        flat, fn, rho, product = ctx.saved_tensors
        d_product = grads[0] * rho
        # d rho / d x = -rho^3 x / (N*M)
        pull = (grads[0] * product).sum(dim=1, keepdim=True) * rho.pow(3) / -flat.shape[1]
        return torch.addcmul(d_product @ fn, flat, pull), d_product.T @ flat, None


def hyper_maps(
    x: Tensor, fn: Tensor, base: Tensor, scale: Tensor, iters: int, eps: float, norm_eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    projected: Tensor = _HyperProject.apply(x.flatten(1).float(), fn.float(), norm_eps)  # type: ignore[assignment]
    pre, post, comb = hyper_logits(projected, base, scale, x.shape[1])
    return torch.sigmoid(pre) + eps, 2 * torch.sigmoid(post), sinkhorn(comb, iters, eps)


def hyper_enter(
    x: Tensor, fn: Tensor, base: Tensor, scale: Tensor, gain: Tensor, iters: int, eps: float, norm_eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    pre, post, comb = hyper_maps(x, fn, base, scale, iters, eps, norm_eps)
    return rms_norm(hyper_read(x, pre), gain, norm_eps), post, comb


class _HyperWrite(torch.autograd.Function):
    """The batched products of tiny matrices are fast only when the tiny matrix is contiguous."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, post: Tensor, comb: Tensor):
        ctx.save_for_backward(x, y, post, comb)
        out = torch.bmm(comb.transpose(1, 2).contiguous(), x.float())
        return out.addcmul_(post[:, :, None], y.float()[:, None]).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any):
        x, y, post, comb = ctx.saved_tensors
        g = grads[0].float()
        d_x = torch.bmm(comb, g).to(x.dtype)
        d_y = torch.bmm(post[:, None], g)[:, 0].to(y.dtype)
        return d_x, d_y, (g * y.float()[:, None]).sum(dim=2), torch.bmm(x.float(), g.transpose(1, 2))


def hyper_write(x: Tensor, y: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    return _HyperWrite.apply(x, y, post, comb)  # type: ignore[return-value]


# --- mixture of experts ----------------------------------------------------------------------------------------------


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
            act = F.silu(gate.float().clamp(max=limit)).mul_(up.float().clamp(-limit, limit)).mul_(ws[lo:hi])
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
            d_w2[e] = _dot(dy[lo:hi].T, (ws[lo:hi] * act).to(x.dtype))
            da = (dy[lo:hi] @ w2[e].to(x.dtype)).float()
            d_ws[lo:hi] = (da * act).sum(dim=1)
            da = da * ws[lo:hi]
            # a clamped input carries no gradient; on the bound itself it does, as in torch.clamp
            d_gate = da * u * (sig + silu * (1 - sig)) * (gate <= limit)
            d_up = da * silu * (up.abs() <= limit)
            d_hidden = torch.cat([d_gate, d_up], dim=1).to(x.dtype)
            d_w13[e] = _dot(d_hidden.T, xs[lo:hi]).view_as(d_w13[e])
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


# --- loss ------------------------------------------------------------------------------------------------------------


class _CrossEntropy(torch.autograd.Function):
    """Logits exist for one block of tokens at a time; their gradients are taken at once, while they are there."""

    @staticmethod
    def forward(ctx: Any, hidden, head, targets, ignore: int):
        rows = max(1, BLOCK_NUMBERS // len(head))
        loss = hidden.new_zeros((), dtype=torch.float32)
        need = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        d_hidden = torch.empty_like(hidden) if need else None
        d_head = torch.zeros_like(head, dtype=torch.float32) if need else None
        for i in range(0, len(hidden), rows):
            h, t = hidden[i : i + rows], targets[i : i + rows]
            logits = _dot(h, head.to(h.dtype).T)
            keep = t != ignore
            at = t.clamp_min(0)[:, None]
            lse = logits.logsumexp(dim=-1)
            loss = loss + ((lse - logits.gather(1, at)[:, 0]) * keep).sum()
            if d_hidden is not None and d_head is not None:
                p = logits.sub_(lse[:, None]).exp_()
                p.scatter_add_(1, at, torch.full_like(at, -1, dtype=torch.float32)).mul_(keep[:, None])
                p = p.to(h.dtype)
                d_hidden[i : i + rows] = p @ head.to(h.dtype)
                d_head += _dot(p.T, h)
        ctx.save_for_backward(d_hidden, d_head)
        ctx.dtypes = hidden.dtype, head.dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any):
        d_hidden, d_head = ctx.saved_tensors
        return (d_hidden * grads[0]).to(ctx.dtypes[0]), (d_head * grads[0]).to(ctx.dtypes[1]), None, None


def cross_entropy(hidden: Tensor, head: Tensor, targets: Tensor, ignore: int = -100) -> Tensor:
    return _CrossEntropy.apply(hidden, head, targets, ignore)  # type: ignore[return-value]


LIMITS = {"experts": Limits()}
