"""The ops: one name, one signature, one docstring, and as many forms as pay (ops/table.py chooses one at every call).

`reference` defines what is correct and serves every call; `blocked` keeps memory linear and has analytic gradients, on
any device; `cpu` and `triton` are imported when a tensor on their device comes by. DSV4_OPS=auto|reference|blocked|cpu|
triton in the environment chooses for the process, `with ops.using("reference"):` for a stretch of code.

Legend: n queries / tokens, H heads, D head width, P window rows, E compressed entries, K chosen entries, N streams,
M model width, G groups that close (new entries), r compress ratio, X experts, I their inner width. `Spans`
(ops/spans.py) are row intervals. Equations are the paper's.
"""

import torch
from torch import Tensor

from dsv4.ops import blocked, reference
from dsv4.ops.blocked.index_loss import index_recall
from dsv4.ops.formats import Packed, PackedRows
from dsv4.ops.newton_schulz import newton_schulz
from dsv4.ops.reference import cast, hyper_read, index_scores, rms_norm, swiglu
from dsv4.ops.spans import Spans
from dsv4.ops.table import (
    BACKENDS,
    TABLE,
    active,
    call,
    enrol,
    explain,
    keep_out_of_graphs,
    refusal,
    using,
    wanted,
    whole_blocks,
    whole_updates,
    wrapped,
)
from dsv4.ops.weights import PackedMatrix

__all__ = [
    "BACKENDS", "PackedMatrix", "Pool", "Spans", "TABLE", "active", "best_rows", "cast", "compress", "compressor_rows",
    "cross_entropy", "experts", "explain", "gate", "head_collapse", "hyper_enter", "hyper_maps", "hyper_read",
    "hyper_write", "index_kl", "index_recall", "index_scores", "index_scores_topk", "keep_out_of_graphs", "linear",
    "mlp", "newton_schulz", "pack_rows", "project_in", "project_out", "refusal", "rms_norm", "rotate", "sinkhorn",
    "sparse_attention", "swiglu", "topk_lowest", "unpack_rows", "using", "wanted", "whole_blocks", "whole_updates",
    "wrapped",
]  # fmt: skip

enrol("reference", reference)
enrol("blocked", blocked)

Pool = Tensor | PackedRows  # rows that attention reads: as numbers, or packed and unpacked where they are read


# --- choosing with a fixed tie rule ----------------------------------------------------------------------------------


def topk_lowest(scores: Tensor, k: int) -> Tensor:
    """Indices int64 [..., k] of the k largest of `scores` [..., n], by score, then by lowest index; no gradient.

    In order of the choice. 0.0 and -0.0 tie.
    """
    return call("topk_lowest", scores, k)


def index_scores_topk(q: Tensor, weights: Tensor, keys: Pool, visible: Spans, k: int) -> Tensor:
    """Which entries each query reads: int64 [n, k] pool rows in ascending order, -1 (first) where fewer are visible.

    q [n, Hi, Di], weights [n, Hi], keys [E, Di]. The score is that of `index_scores` (eq. 16), fp32; order of choice:
    score, then lowest row. No gradient (the indexer has a loss of its own).
    """
    return call("index_scores_topk", q, weights, keys, visible, k)


def best_rows(scores: Tensor, visible: Spans, counts: Tensor, k: int) -> Tensor:
    """For each of n intervals its counts_i best rows by score, in ascending order, -1 first where there are fewer.

    scores [E] fp32, counts int64 [n] (at most k) -> int64 [n, k]; ties to the lowest row. No gradient.
    """
    return call("best_rows", scores, visible, counts, k)


# --- attention -------------------------------------------------------------------------------------------------------


def sparse_attention(
    q: Tensor,
    window_kv: Pool,
    window: Spans,
    entries: Pool | None,
    visible: Spans | None,
    chosen: Tensor | None,
    sink: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """One softmax over a query's window rows, its compressed entries and the sink; key = value (eq. 19-21).

    q [n, H, D]; window_kv [P, D] with one interval per query; entries [E, D] read either whole by interval (`visible`)
    or as rows `chosen` int64 [n, K] (-1 = none); sink [H] fp32, a logit whose value is zero, not scaled.
    Returns out [n, H, D] in q's dtype and the log-sum-exp [n, H] fp32 (sink included; it carries no gradient).
    """
    return call("sparse_attention", q, window_kv, window, entries, visible, chosen, sink, scale)


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
    """Pool closed groups of tokens into finished entries [G, d] of `dtype`: pooled, normed, rotated (eq. 11-12, 22-23).

    values, scores [R, c*d] fp32 rows (c = 2 with overlap, the positional bias already in the scores); first_row [G]
    int64: the row of each group's first token. Without overlap an entry is a per-channel softmax over its r rows.
    With overlap the FIRST half of a row's channels speaks for the next group and the second half for its own, so an
    entry pools 2r rows; has_previous [G] bool is False where there is no group before (a document's first).
    Pooling is fp32, its result is cast to `dtype`; then RMSNorm with gain [d], then `rotate` by turn [G, pairs].
    """
    return call("compress", values, scores, first_row, has_previous, r, overlap, gain, norm_eps, turn, dtype)


def rotate(x: Tensor, turn: Tensor) -> Tensor:
    """Rotate the last channels of x [n, ..., D], D even, by turn complex64 [n, pairs], in fp32; in x's dtype.

    Channels D - 2 * pairs + 2i and the next become (a + ib) turn_i; pass turn.conj() for the inverse.
    """
    return call("rotate", x, turn)


# --- hyper-connections -----------------------------------------------------------------------------------------------


def sinkhorn(logits: Tensor, iters: int, eps: float) -> Tensor:
    """Nearly doubly stochastic matrices [n, N, N] from logits [n, N, N], fp32; the columns sum to 1 exactly.

    Row softmax + eps, a column step, then iters - 1 rounds of row step and column step (eq. 8; the matrix is the
    transpose of the paper's B, see docs/names.md).
    """
    return call("sinkhorn", logits, iters, eps)


def hyper_maps(
    x: Tensor, fn: Tensor, base: Tensor, scale: Tensor, iters: int, eps: float, norm_eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """How one sublayer reads and writes the streams (eq. 3-8): pre [n, N], post [n, N], comb [n, N, N], fp32.

    x [n, N, M]; fn [(2+N)*N, N*M], base [(2+N)*N], scale [3], all fp32. The RMS runs over all N*M numbers, no gain.
    pre lies in (0, 1), post in (0, 2), comb is nearly doubly stochastic.
    """
    return call("hyper_maps", x, fn, base, scale, iters, eps, norm_eps)


def hyper_enter(
    x: Tensor, fn: Tensor, base: Tensor, scale: Tensor, gain: Tensor, iters: int, eps: float, norm_eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """What precedes a sublayer: its normed input [n, M] in x's dtype, and post, comb for `hyper_write`.

    `hyper_maps` of x [n, N, M], then sum_j pre_j x_j (fp32, cast once), then RMSNorm with gain [M] (fp32, cast once).
    """
    return call("hyper_enter", x, fn, base, scale, gain, iters, eps, norm_eps)


def hyper_write(x: Tensor, y: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    """New streams [n, N, M]: x'_k = post_k y + sum_j comb[j, k] x_j - the sum runs over the FIRST index of comb.

    x [n, N, M] as they were before the sublayer, y [n, M] its output; post, comb fp32. Summed in fp32, in x's dtype.
    """
    return call("hyper_write", x, y, post, comb)


def head_collapse(x: Tensor, fn: Tensor, base: Tensor, scale: Tensor, eps: float, norm_eps: float) -> Tensor:
    """The streams x [n, N, M] before the output head: one weighted sum [n, M] in x's dtype, summed in fp32.

    Weights sigmoid(scale * (fn . x / rms(x)) + base) + eps: no Sinkhorn, no gain. fn [N, N*M], base [N], scale [1] are
    fp32.
    """
    return call("head_collapse", x, fn, base, scale, eps, norm_eps)


# --- linear ----------------------------------------------------------------------------------------------------------


def linear(x: Tensor, weight: Tensor | PackedMatrix) -> Tensor:
    """y = x W^T [..., out] in x's dtype; x [..., in], W [out, in] plain or packed (then it has no gradient).

    The weight is brought to x's dtype and multiplied there.
    """
    return call("linear", x, weight)


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
    """What attention begins with (eq. 13-15, 18): the query latent qr [n, L], queries q [n, H, D], and the key = value
    row of each token before and after its rotation, [n, D] each; all in x's dtype.

    x [n, M]; wq_a [L, M], wq_b [H*D, L], wkv [D, M] as in `linear`. qr and the row are RMS-normed with the gains, each
    head's query without one; queries and the second row are rotated by turn complex64 [n, pairs].
    """
    return call("project_in", x, wq_a, q_gain, wq_b, wkv, kv_gain, heads, eps, turn)


def project_out(
    o: Tensor, turn: Tensor, wo_a: Tensor | PackedMatrix, groups: int, wo_b: Tensor | PackedMatrix
) -> Tensor:
    """What attention ends with: o [n, H, D] rotated back by turn, heads in groups through wo_a [G*rank, H*D/G], each
    group through its own rows, then wo_b [M, G*rank] (paper 2.3.1) -> [n, M] in o's dtype.
    """
    return call("project_out", o, turn, wo_a, groups, wo_b)


def compressor_rows(x: Tensor, wkv: Tensor, wgate: Tensor, ape: Tensor, positions: Tensor) -> Tensor:
    """What a compressor keeps of tokens until their group closes: values and gate scores, fp32 [n, 2, c*d] (eq. 9-10).

    x [n, M]; wkv, wgate [c*d, M] fp32; to the scores is added the row of ape [r, c*d] of the token's place in its
    group, positions int64 [n] modulo r.
    """
    return call("compressor_rows", x, wkv, wgate, ape, positions)


# --- mixture of experts ----------------------------------------------------------------------------------------------


def gate(
    x: Tensor, weight: Tensor, bias: Tensor | None, chosen: Tensor | None, k: int, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """How tokens x [n, M] are routed: scores fp32 [n, X], chosen experts int64 [n, k], their weights fp32 [n, k].

    score = sqrt(softplus(weight x)), weight [X, M] fp32 (paper 2.1). The k best by score + bias [X] are chosen, ties to
    the lowest expert, without gradient; or `chosen` [n, k] is given (hash layers). Weights: the chosen scores without
    the bias, normalised to sum to `scale`.
    """
    return call("gate", x, weight, bias, chosen, k, scale)


def experts(
    x: Tensor, chosen: Tensor, weights: Tensor, w13: Tensor | PackedMatrix, w2: Tensor | PackedMatrix, limit: float
) -> Tensor:
    """Routed experts: sum over a token's chosen experts of w2 (weight * clamped-SwiGLU(x)), fp32 [n, M].

    x [n, M]; chosen int64 [n, k]; weights fp32 [n, k]; w13 [X, 2, I, M] (gate over up), w2 [X, M, I], or both packed,
    all experts one below the other: [X*2*I, M] and [X*M, I], without gradient.
    """
    return call("experts", x, chosen, weights, w13, w2, limit)


def mlp(
    x: Tensor, w1: Tensor | PackedMatrix, w3: Tensor | PackedMatrix, w2: Tensor | PackedMatrix, limit: float
) -> Tensor:
    """w2 (clamped-SwiGLU(w1 x, w3 x)) [n, M] in x's dtype: one expert for all tokens. w1, w3 [I, M], w2 [M, I].

    The activation is fp32 and cast to x's dtype once.
    """
    return call("mlp", x, w1, w3, w2, limit)


# --- loss ------------------------------------------------------------------------------------------------------------


def cross_entropy(hidden: Tensor, head: Tensor, targets: Tensor, ignore: int = -100) -> Tensor:
    """Sum over tokens of -log p(target), fp32 scalar; hidden [n, M], head [V, M], targets int64 [n] (ignore: none)."""
    return call("cross_entropy", hidden, head, targets, ignore)


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
    """What the indexer learns from: the sum over queries of KL(attention || indexer) over the entries that each reads,
    fp32 scalar. Gradient to q, weights and keys alone.

    q [n, Hi, Di], weights [n, Hi], keys [E, Di] are those of `index_scores`, whose softmax is the indexer's
    distribution. attn_q [n, H, D], entries [E, D], scale and lse [n, H] are those of `sparse_attention`, which gave the
    lse: window and sink are in it. The attention's distribution is sum_h exp(attn_q_h . entry * scale - lse_h),
    normalised over the entries. A query reads entries as there, all visible or the `chosen` ones; one that reads fewer
    than two adds nothing. The paper is silent; V3.2's report has this loss (section 2.1.1).
    """
    return call("index_kl", q, weights, keys, attn_q, entries, lse, visible, chosen, scale)


# --- rows of a packed memory -----------------------------------------------------------------------------------------


def pack_rows(rows: Tensor, format: Packed) -> Tensor:
    """Rows [n, width] of finite numbers as the format's bytes, uint8 [n, row_bytes] (see ops/formats.py)."""
    return call("pack_rows", rows, format)


def unpack_rows(data: Tensor, format: Packed) -> Tensor:
    """Bytes uint8 [..., row_bytes] as numbers [..., width] of the format's dtype; a rotated row stays rotated."""
    return call("unpack_rows", data, format)
