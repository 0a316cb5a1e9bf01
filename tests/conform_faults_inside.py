"""Known mistakes of compression, indexer and experts; see conform_faults.py."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from conform_faults import FAULTS, LAYERS, RIGHT_ROTATE, Wraps, bf, fault, limits, remembering, weights, wrapping
from pytest import MonkeyPatch
from torch import Tensor

from dsv4 import ops
from dsv4.conform.adapters.ours import Ours
from dsv4.model import parts
from dsv4.model.rope import turns
from dsv4.ops import reference

# --- entries ---------------------------------------------------------------------------------------------------------

POOLED = ("compressor", *LAYERS)


def placing(name: str, components: tuple[str, ...], width: int, place: Callable[[Tensor, int], Tensor | None]) -> None:
    """Entries of `width` numbers rotate at place(position of the group's first token, ratio); None: not at all."""

    def apply(port: Ours, patch: MonkeyPatch) -> Wraps:
        of = remembering(patch, port)

        def compress(op: Callable) -> Callable:
            def call(values, scores, first, has, r, overlap, gain, eps, turn, dtype):
                if len(gain) == width:
                    f, positions = of(turn)
                    where = place(positions, r)
                    turn = torch.ones_like(turn) if where is None else turns(f, where)
                return op(values, scores, first, has, r, overlap, gain, eps, turn, dtype)

            return call

        return {"compress": compress}

    FAULTS[name] = apply, components


placing("entries rotated at the pool index", POOLED, 32, lambda p, r: p // r)
placing("entries rotated at the last token", POOLED, 32, lambda p, r: p + r - 1)
placing("entries not rotated", POOLED, 32, lambda p, r: None)
placing("index keys rotated at the pool index", ("indexer", *LAYERS), 16, lambda p, r: p // r)


def pooling(**change: Any) -> Callable[[Callable], Callable]:
    def wrap(op: Callable) -> Callable:
        def call(values, scores, first, has, r, overlap, gain, eps, turn, dtype):
            if "has" in change:
                has = change["has"](has)
            if change.get("unnormed") and len(gain) == 32:
                pooled = reference.pool_groups(values, scores, first, has, r, overlap)
                return RIGHT_ROTATE(pooled.to(dtype), turn)
            return op(values, scores, first, has, r, overlap, gain, eps, turn, dtype)

        return call

    return wrap


wrapping("entries not normed", POOLED, compress=pooling(unnormed=True))
wrapping("overlap lost", POOLED, compress=pooling(has=torch.zeros_like))
wrapping("overlap lost between calls", POOLED,
         compress=pooling(has=lambda has: has & (torch.arange(len(has)) > 0)))  # fmt: skip
weights("gate without position", POOLED, lambda n, w: torch.zeros_like(w) if n.endswith("ape") else None)
weights("overlap halves swapped", POOLED, lambda n, w: (
    w.roll(len(w) // 2, 0) if "layers.1." in n and n.endswith(("compressor.wkv.weight", "compressor.wgate.weight"))
    else w.roll(w.shape[1] // 2, 1) if n.startswith("layers.1.") and n.endswith("ape") else None))  # fmt: skip


def low_pool(values, scores, first, has, r, overlap, gain, eps, turn, dtype):
    """In BF16 but for the softmax, as an engine does that holds its compressor in the model's dtype."""
    width = len(gain)
    out = []
    for start, there in zip(first.tolist(), has.tolist(), strict=True):
        own = slice(start, start + r)
        if not overlap:
            v, s = values[own], scores[own]
        else:
            v, s = values[own, width:], scores[own, width:]
            if there:
                old = slice(start - r, start)
                v, s = torch.cat([values[old, :width], v]), torch.cat([scores[old, :width], s])
        out.append(bf(bf(bf(s.softmax(0)) * v).sum(0)))
    pooled = torch.stack(out) if out else values.new_zeros(0, width)
    return RIGHT_ROTATE(reference.rms_norm(pooled.to(dtype), gain, eps), turn)


def low_rows(x, wkv, wgate, ape, positions):
    return torch.stack([bf(F.linear(x.float(), wkv)), bf(F.linear(x.float(), wgate)) + ape[positions % len(ape)]], 1)


wrapping("compressor in BF16", POOLED, compress=lambda op: low_pool, compressor_rows=lambda op: low_rows)


def seeing(name: str, stop: Callable[[Any, int, Any], Any]) -> None:
    """stop(positions, ratio, entries there are) -> how many entries a query sees."""

    def apply(port: Ours, patch: MonkeyPatch) -> None:
        right = parts._groups

        def groups(kind, part, slot, start, count, *rest):
            found = right(kind, part, slot, start, count, *rest)
            t, there = parts.ragged(start, count), int(start[0] + count[0]) // kind.ratio
            seen = torch.from_numpy(stop(t, kind.ratio, there) + 0 * t).clamp_max(there)
            return replace(found, visible=ops.Spans(found.visible.start, found.visible.start + seen))

        patch.setattr(parts, "_groups", groups)

    FAULTS[name] = apply, LAYERS


seeing("entries visible a token early", lambda t, r, there: (t + 2) // r)
seeing("entries visible a token late", lambda t, r, there: t // r)
seeing("entries visible to all", lambda t, r, there: there)

# --- indexer ---------------------------------------------------------------------------------------------------------


@fault("indexer not asked", "indexer", *LAYERS)
def _(port: Ours, patch: MonkeyPatch) -> None:
    for block in port.model.layers:
        if block.attn.indexer is not None:
            block.attn.indexer.topk = 10_000


def scoring(name: str, score: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
    def apply(port: Ours, patch: MonkeyPatch) -> Wraps:
        patch.setattr(ops, "index_scores", score)
        return {"index_scores_topk": lambda op: lambda q, w, keys, visible, k: chosen(
            score(q, w, keys[:]), visible, k)}  # fmt: skip

    FAULTS[name] = apply, ("indexer", *LAYERS)


def chosen(scores: Tensor, visible: ops.Spans, k: int, *, last: bool = False) -> Tensor:
    out = torch.full((len(scores), k), -1)
    for i, (a, b) in enumerate(zip(visible.start.tolist(), visible.stop.tolist(), strict=True)):
        order = sorted(range(a, b), key=lambda e: (-scores[i, e].item(), -e if last else e))[:k]
        out[i, : len(order)] = torch.tensor(order, dtype=torch.int64)
    return out.sort(dim=1).values


scoring("index scores without relu", lambda q, w, k: torch.einsum("nh,nhd,ed->ne", w, q, k))
scoring("index weights missing", lambda q, w, k: torch.einsum("nhd,ed->nhe", q, k).relu().sum(1))
wrapping(
    "index ties to the highest entry",
    ("ties",),
    index_scores_topk=lambda op: (
        lambda q, w, keys, visible, k: chosen(reference.index_scores(q, w, keys[:]), visible, k, last=True)
    ),
)

# --- experts ---------------------------------------------------------------------------------------------------------

GATED = ("gate", *LAYERS)


def gating(weigh: Callable[[Tensor, Tensor, Any, float], Tensor], score: Callable | None = None) -> Any:
    def wrap(op: Callable) -> Callable:
        def call(x, weight, bias, given, k, scale):
            scores = reference.gate_scores(x, weight) if score is None else score(x, weight)
            picked = reference.topk_lowest(scores + bias, k) if given is None else given
            return scores, picked, weigh(scores, picked, (bias, given), scale)

        return call

    return wrap


def normed(w: Tensor, scale: float) -> Tensor:
    return w / w.sum(1, keepdim=True) * scale


wrapping("bias in the weights", GATED, gate=gating(lambda s, c, b, scale: normed(
    (s if b[0] is None else s + b[0]).gather(1, c), scale)))  # fmt: skip
wrapping("weights not normalised", GATED, gate=gating(lambda s, c, b, scale: s.gather(1, c) * scale))
wrapping("sigmoid gate", GATED, gate=gating(
    lambda s, c, b, scale: normed(s.gather(1, c), scale), lambda x, w: F.linear(x, w).sigmoid()))  # fmt: skip
wrapping("expert weights all equal", GATED, gate=gating(lambda s, c, b, scale: normed(
    s.gather(1, c) if b[1] is None else torch.ones(c.shape), scale)))  # fmt: skip
limits("route scale missing", GATED, lambda block: block.ffn.gate, scale=1.0)


def low_weigh(s: Tensor, c: Tensor, b: Any, scale: float) -> Tensor:
    w = s.gather(1, c)
    return bf(bf(w / bf(w.sum(1, keepdim=True))) * scale)


wrapping("router in BF16", GATED, gate=gating(
    low_weigh, lambda x, w: bf(bf(F.softplus(bf(F.linear(x.float(), w)))).sqrt())))  # fmt: skip


def weighed_late(x, chosen, weights, w13, w2, limit):
    out = torch.zeros(x.shape)
    for e in range(len(w13)):
        token, slot = torch.where(chosen == e)
        act = reference.swiglu(F.linear(x[token], w13[e, 0]), F.linear(x[token], w13[e, 1]), limit).to(x.dtype)
        y = F.linear(act, w2[e]) * weights[token, slot, None].to(x.dtype)
        out = out.index_add(0, token, y.to(x.dtype).float())
    return out


def low_swiglu(gate: Tensor, up: Tensor, limit: float) -> Tensor:
    act = F.silu(bf(gate.clamp(max=limit))).bfloat16()
    return (act * up.clamp(-limit, limit).bfloat16()).float()


@fault("SwiGLU in BF16", "roundings of BF16", *LAYERS)
def _(port: Ours, patch: MonkeyPatch) -> None:
    patch.setattr(reference, "swiglu", low_swiglu)


wrapping("expert weights after w2", ("roundings of BF16",), experts=lambda op: weighed_late)


@fault("experts chosen by score", "gate", *LAYERS)
def _(port: Ours, patch: MonkeyPatch) -> None:
    gate = port.model.layers[0].ffn.gate
    gate.tid2eid, gate.bias = None, torch.zeros(port.model.config.n_routed_experts)


limits("no clamp in the shared expert", ("experts", *LAYERS), lambda block: block.ffn.shared_experts, limit=1e9)
limits("no clamp in the routed experts", ("experts", *LAYERS), lambda block: block.ffn.experts, limit=1e9)
weights("shared expert missing", ("experts", *LAYERS),
        lambda n, w: torch.zeros_like(w) if n.endswith("shared_experts.w2.weight") else None)  # fmt: skip


@fault("gate clamped on both sides", "experts", *LAYERS)
def _(port: Ours, patch: MonkeyPatch) -> None:
    patch.setattr(reference, "swiglu", lambda gate, up, limit: F.silu(gate.clamp(-limit, limit)) * up.clamp(
        -limit, limit))  # fmt: skip


@fault("gate and up exchanged", "experts", *LAYERS)
def _(port: Ours, patch: MonkeyPatch) -> None:
    for block in port.model.layers:
        shared, routed = block.ffn.shared_experts, block.ffn.experts
        shared.w1, shared.w3 = shared.w3, shared.w1
        routed.w13.data = routed.w13.data.flip(1).contiguous()


wrapping("post and mixing in BF16", ("streams", *LAYERS), hyper_write=lambda op: lambda x, y, post, comb: (
    bf(post)[:, :, None] * y[:, None] + torch.einsum("njk,njm->nkm", bf(comb), x)))  # fmt: skip
