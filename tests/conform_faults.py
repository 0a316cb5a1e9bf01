"""Every known mistake, made in this package's own torch model and not in the plain one that the diagnosis uses.

A fault takes the loaded adapter and a MonkeyPatch; it changes weights, settings or functions, and may return ops to be
wrapped: {op: how to make the broken one of the right one}. All run on the reference ops, so that nothing passes by.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from pytest import MonkeyPatch
from torch import Tensor

from dsv4 import ops
from dsv4.config import RopeScaling
from dsv4.conform.adapters import ours
from dsv4.conform.adapters.ours import Ours
from dsv4.model import hyper, segments
from dsv4.model.rope import frequencies, pair_frequencies, turns
from dsv4.ops import formats, reference
from dsv4.ops.formats import Packed
from dsv4.ops.weights import PackedMatrix

Wraps = dict[str, Callable[[Callable], Callable]]
Fault = Callable[[Ours, MonkeyPatch], Wraps | None]
FAULTS: dict[str, tuple[Fault, tuple[str, ...]]] = {}  # name -> fault, the components that are asked


def fault(name: str, *components: str) -> Callable[[Fault], Fault]:
    def enter(f: Fault) -> Fault:
        FAULTS[name] = f, components
        return f

    return enter


def wrapping(name: str, components: tuple[str, ...], **wraps: Callable[[Callable], Callable]) -> None:
    FAULTS[name] = (lambda port, patch: wraps), components


def weights(name: str, components: tuple[str, ...], change: Callable[[str, Tensor], Tensor | None]) -> None:
    """change(name of a tensor, tensor) -> what is there instead, or None."""

    def apply(port: Ours, patch: MonkeyPatch) -> None:
        for key, value in port.model.state_dict().items():
            new = change(key, value)
            if new is not None:
                value.copy_(new)

    FAULTS[name] = apply, components


def config(name: str, components: tuple[str, ...], **changes: Any) -> None:
    def apply(port: Ours, patch: MonkeyPatch) -> None:
        port.model.config = port.model.config.with_(**changes)

    FAULTS[name] = apply, components


def limits(name: str, components: tuple[str, ...], of: Callable[[Any], Any], **settings: Any) -> None:
    """Set attributes on a module of every block."""

    def apply(port: Ours, patch: MonkeyPatch) -> None:
        for block in port.model.layers:
            module = of(block)
            for key, value in settings.items():
                if module is not None:
                    setattr(module, key, value)

    FAULTS[name] = apply, components


def bf(x: Tensor) -> Tensor:
    return x.bfloat16().float()


LAYERS, MODEL = ("layers",), ("layers", "model")

# --- streams ---------------------------------------------------------------------------------------------------------

wrapping("mixing transposed", ("streams", *LAYERS),
         hyper_write=lambda op: lambda x, y, post, comb: op(x, y, post, comb.transpose(1, 2).contiguous()))  # fmt: skip
wrapping(
    "post not doubled", ("streams", *LAYERS),
    hyper_maps=lambda op: lambda *a: (lambda pre, post, comb: (pre, post / 2, comb))(*op(*a)),
    hyper_enter=lambda op: lambda *a: (lambda h, post, comb: (h, post / 2, comb))(*op(*a)),
)  # fmt: skip


def unnormed_maps(x: Tensor, fn: Tensor, base: Tensor, scale: Tensor, iters: int, eps: float, norm_eps: float) -> Any:
    pre, post, comb = reference.hyper_logits(F.linear(x.flatten(1), fn), base, scale, x.shape[1])
    return torch.sigmoid(pre) + eps, 2 * torch.sigmoid(post), reference.sinkhorn(comb, iters, eps)


def unnormed_enter(x: Tensor, fn: Tensor, base: Tensor, scale: Tensor, gain: Tensor, *rest: Any) -> Any:
    pre, post, comb = unnormed_maps(x, fn, base, scale, *rest)
    return reference.rms_norm(reference.hyper_read(x, pre), gain, rest[-1]), post, comb


wrapping(
    "streams not normalised", ("streams", *LAYERS),
    hyper_maps=lambda op: unnormed_maps, hyper_enter=lambda op: unnormed_enter,
    head_collapse=lambda op: lambda x, fn, base, scale, eps, norm_eps: reference.hyper_read(
        x, torch.sigmoid(scale * F.linear(x.flatten(1), fn) + base) + eps
    ),
)  # fmt: skip
wrapping(
    "one Sinkhorn round", ("streams", *LAYERS),
    hyper_maps=lambda op: lambda x, fn, base, scale, iters, *a: op(x, fn, base, scale, 1, *a),
    hyper_enter=lambda op: lambda x, fn, base, scale, gain, iters, *a: op(x, fn, base, scale, gain, 1, *a),
)  # fmt: skip
wrapping("head reads the mean of the streams", ("streams", "model"),
         head_collapse=lambda op: lambda x, *a: x.mean(dim=1))  # fmt: skip
weights("gain of the norms plus one", ("streams", *MODEL), lambda n, w: w + 1 if n.endswith("norm.weight") else None)

# --- rotation --------------------------------------------------------------------------------------------------------


def rotating(name: str, bad: Callable[[Tensor, Tensor], Tensor]) -> None:
    def apply(port: Ours, patch: MonkeyPatch) -> Wraps:
        patch.setattr(reference, "rotate", bad)
        return {"rotate": lambda op: bad}

    FAULTS[name] = apply, ("rotation", "projections", *LAYERS)


def on_the_first(x: Tensor, turn: Tensor) -> Tensor:
    width = 2 * turn.shape[-1]
    right = RIGHT_ROTATE(torch.cat([x[..., width:], x[..., :width]], dim=-1), turn)
    return torch.cat([right[..., -width:], right[..., :-width]], dim=-1)


def in_halves(x: Tensor, turn: Tensor) -> Tensor:
    pairs = turn.shape[-1]
    head, tail = x[..., : -2 * pairs], x[..., -2 * pairs :]
    woven = torch.stack([tail[..., :pairs], tail[..., pairs:]], dim=-1).flatten(-2)
    right = RIGHT_ROTATE(woven, turn).unflatten(-1, (pairs, 2))
    return torch.cat([head, right[..., 0], right[..., 1]], dim=-1)


RIGHT_ROTATE = reference.rotate
rotating("rotation on the first channels", on_the_first)
rotating("rotation in halves", in_halves)
config("thetas swapped", ("rotation", "projections", *LAYERS), rope_theta=160000.0, compress_rope_theta=10000.0)
config("compressed theta 40000", ("rotation", "projections", *LAYERS), compress_rope_theta=40000.0)
config("YaRN missing", ("rotation", "projections", *LAYERS), rope_scaling=RopeScaling(type="default"))


def tables(name: str, components: tuple[str, ...], of: Callable[[Any, str], Tensor]) -> None:
    def apply(port: Ours, patch: MonkeyPatch) -> None:
        for module in (segments, ours):
            patch.setattr(module, "frequencies", of)

    FAULTS[name] = apply, components


tables("YaRN on window layers", ("rotation", "projections", *LAYERS),
       lambda c, table: pair_frequencies(c.qk_rope_head_dim, c.rope_theta, c.rope_scaling)
       if table == "window" else frequencies(c, table))  # fmt: skip


def turning(name: str, components: tuple[str, ...], change: Callable[[Any, Tensor, Tensor, Tensor], Tensor]) -> None:
    """change(config, right turns, frequencies, positions) -> turns."""

    def apply(port: Ours, patch: MonkeyPatch) -> None:
        c = port.model.config
        for module in (segments, ours):
            patch.setattr(module, "turns", lambda f, positions: change(c, turns(f, positions), f, positions))

    FAULTS[name] = apply, components


def is_compressed(c: Any, f: Tensor) -> bool:
    return torch.equal(f, frequencies(c, "compressed"))


turning("YaRN amplitude", ("projections", *LAYERS),
        lambda c, turn, f, p: turn * (0.1 * math.log(c.rope_scaling.factor) + 1) if is_compressed(c, f) else turn
        )  # fmt: skip
turning("cos and sin in BF16", ("rotation", "projections", *LAYERS),
        lambda c, turn, f, p: torch.complex(bf(turn.real), bf(turn.imag)))  # fmt: skip
turning("angles in FP64", ("rotation",),
        lambda c, turn, f, p: torch.polar(torch.ones(1, dtype=torch.float64), p.double()[:, None] * f.double())
        .to(torch.complex64))  # fmt: skip


def remembering(patch: MonkeyPatch, port: Ours) -> Callable[[Tensor], tuple[Any, Tensor]]:
    """From a tensor of turns to its frequencies and positions."""
    known: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def turned(f: Tensor, positions: Tensor) -> Tensor:
        out = turns(f, positions)
        known[id(out)] = f, positions, out  # held, so that no other comes to lie there
        return out

    for module in (segments, ours):
        patch.setattr(module, "turns", turned)
    return lambda turn: known[id(turn)][:2]


def with_window_theta(row_too: bool) -> Fault:
    def apply(port: Ours, patch: MonkeyPatch) -> Wraps:
        of, c = remembering(patch, port), port.model.config

        def window(turn: Tensor) -> Tensor:
            return turns(frequencies(c, "window"), of(turn)[1])

        def project_in(op: Callable) -> Callable:
            def call(*a: Any) -> Any:
                qr, q, kv, row = op(*a[:-1], window(a[-1]))
                return qr, q, kv, row if row_too else RIGHT_ROTATE(kv, a[-1])

            return call

        return {"project_in": project_in, "project_out": lambda op: lambda o, turn, *a: op(o, window(turn), *a)}

    return apply


fault("queries with the window's theta", "projections", *LAYERS)(with_window_theta(False))
fault("queries and window with the window's theta", "projections", *LAYERS)(with_window_theta(True))
wrapping("output not rotated back", ("projections", *LAYERS),
         project_out=lambda op: lambda o, turn, *a: op(o, torch.ones_like(turn), *a))  # fmt: skip

# --- attention -------------------------------------------------------------------------------------------------------


def projecting(head_norm: bool = True, latent_norm: bool = True, cast: bool = True) -> Callable[[Callable], Callable]:
    def project_in(x, wq_a, q_gain, wq_b, wkv, kv_gain, heads, eps, turn):
        def norm(y: Tensor, gain: Tensor) -> Tensor:
            out = F.rms_norm(y.float(), gain.shape, gain.float(), eps)
            return out.to(x.dtype) if cast else out

        def product(y: Tensor, w: Tensor) -> Tensor:
            return F.linear(y.float(), w.float()).to(x.dtype)

        latent = product(x, wq_a)
        latent = norm(latent, q_gain) if latent_norm else latent
        q = product(latent, wq_b).unflatten(1, (heads, -1))
        q = F.rms_norm(q.float(), q.shape[-1:], None, eps).to(x.dtype) if head_norm else q
        kv = norm(product(x, wkv), kv_gain)
        return latent, RIGHT_ROTATE(q, turn), kv, RIGHT_ROTATE(kv, turn)

    return lambda op: project_in


wrapping("no query norm", ("projections", *LAYERS), project_in=projecting(head_norm=False))
wrapping("query latent not normed", ("projections", *LAYERS), project_in=projecting(latent_norm=False))
wrapping("norms hand on FP32", ("roundings of BF16",), project_in=projecting(cast=False))


def attending(stop: int = 0, factor: float = 1.0) -> Callable[[Callable], Callable]:
    def wrap(op: Callable) -> Callable:
        def call(q, rows, window, entries, visible, chosen, sink, scale):
            seen = ops.Spans(window.start, window.stop - stop)
            times = factor if entries is not None else 1.0
            return op(q, rows, seen, entries, visible, chosen, sink, scale * times)

        return call

    return wrap


wrapping("window without the token itself", ("attention", *LAYERS), sparse_attention=attending(stop=1))
wrapping("YaRN amplitude in the softmax", ("attention", *LAYERS),
         sparse_attention=attending(factor=(0.1 * math.log(16) + 1) ** 2))  # fmt: skip
config("window one wider", LAYERS, sliding_window=17)
wrapping("sink missing", ("attention", *LAYERS), sparse_attention=lambda op: lambda *a: op(
    *a[:6], torch.full_like(a[6], -1e30), a[7]))  # fmt: skip
wrapping("sink scaled", ("attention", *LAYERS), sparse_attention=lambda op: lambda *a: op(
    *a[:6], a[6] * a[0].shape[-1] ** -0.5, a[7]))  # fmt: skip
wrapping(
    "output groups interleaved", ("projections", *LAYERS),
    project_out=lambda op: lambda o, turn, wo_a, groups, wo_b: op(
        o.unflatten(1, (-1, groups)).transpose(1, 2).flatten(1, 2).contiguous(), turn, wo_a, groups, wo_b
    ),
)  # fmt: skip


def output_in_fp8(o: Tensor, turn: Tensor, wo_a: Tensor, groups: int, wo_b: Tensor) -> Tensor:
    rows = RIGHT_ROTATE(o, turn.conj().resolve_conj()).reshape(len(o) * groups, -1)
    rows = Packed(rows.shape[1], "fp8", 128).as_read(rows).view(len(o), groups, -1)
    low = torch.einsum("tgi,gri->tgr", rows, wo_a.view(groups, -1, rows.shape[-1]))
    return low.flatten(1) @ wo_b.T


wrapping("attention output in FP8", ("projections", *LAYERS), project_out=lambda op: output_in_fp8)

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
        right = segments._groups

        def groups(kind, part, slot, start, count, *rest):
            found = right(kind, part, slot, start, count, *rest)
            t, there = segments._ragged(start, count), int(start[0] + count[0]) // kind.ratio
            seen = torch.from_numpy(stop(t, kind.ratio, there) + 0 * t).clamp_max(there)
            return replace(found, visible=ops.Spans(found.visible.start, found.visible.start + seen))

        patch.setattr(segments, "_groups", groups)

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
wrapping("index ties to the highest entry", ("ties",), index_scores_topk=lambda op: lambda q, w, keys, visible, k: chosen(
    reference.index_scores(q, w, keys[:]), visible, k, last=True))  # fmt: skip

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

# --- MTP -------------------------------------------------------------------------------------------------------------

DRAFT = ("MTP", "model")


def drafting(name: str, change: Callable[[Any, tuple], tuple]) -> None:
    """change(model, (streams, embedded, ids, run, views)) -> what the MTP block gets."""

    def apply(port: Ours, patch: MonkeyPatch) -> None:
        right = port.model.mtp[0].forward
        patch.setattr(port.model.mtp[0], "forward", lambda *a: right(*change(port.model, a)))

    FAULTS[name] = apply, DRAFT


def collapsed(model: Any, a: tuple) -> tuple:
    h = hyper.collapse(a[0], hyper.parameters_of(model, "hc_head"), model.config)
    return h[:, None].expand_as(a[0]).contiguous(), *a[1:]


def turned(table: Callable[[Any, Any], Tensor]) -> Callable[[Any, tuple], tuple]:
    def change(model: Any, a: tuple) -> tuple:
        run = replace(a[3], turn={**a[3].turn, "window": table(model.config, a[3])})
        return *a[:3], run, a[4]

    return change


drafting("MTP reads the collapsed stream", collapsed)
drafting("MTP with YaRN", turned(lambda c, run: turns(
    pair_frequencies(c.qk_rope_head_dim, c.rope_theta, c.rope_scaling), run.positions)))  # fmt: skip
drafting("MTP with the compressed layers' table", turned(lambda c, run: run.turn["compressed"]))


@fault("MTP embeds its own token", *DRAFT)
def _(port: Ours, patch: MonkeyPatch) -> None:
    right = port.model.predict_next
    patch.setattr(port.model, "predict_next", lambda trunk, ids: right(trunk, torch.cat([ids[:1], ids[:-1]])))


@fault("MTP routes by token id", *DRAFT)
def _(port: Ours, patch: MonkeyPatch) -> None:
    port.model.mtp[0].block.ffn.gate.tid2eid = port.model.layers[0].ffn.gate.tid2eid


@fault("wrong drafter", *DRAFT)
def _(port: Ours, patch: MonkeyPatch) -> None:
    """The block of another training: right shapes, other numbers."""
    from dsv4.measure.subjects import randomise

    randomise(port.model.mtp[0], 99)


# --- one sequence after another ----------------------------------------------------------------------------------------


@fault("state of the sequence before", "sequences", "model")
def _(port: Ours, patch: MonkeyPatch) -> Wraps:
    bank: dict[int, Tensor] = {}  # by width: the rows of the group that closed last, whoever's they were

    def compress(op: Callable) -> Callable:
        def call(values, scores, first, has, r, overlap, gain, eps, turn, dtype):
            width = values.shape[1]
            old = bank.get(width)
            if overlap and len(first):
                last = slice(int(first[-1]), int(first[-1]) + r)
                bank[width] = torch.stack([values[last], scores[last]])
                short = len(values) == r  # a prompt that closes a group fills the bank itself
                if old is not None and not has[0] and short:
                    values, scores = torch.cat([old[0], values]), torch.cat([old[1], scores])
                    first, has = first + r, torch.ones_like(has)
            return op(values, scores, first, has, r, overlap, gain, eps, turn, dtype)

        return call

    bank.clear()
    return {"compress": compress}


@fault("state not rewound", "rewind", "model")
def _(port: Ours, patch: MonkeyPatch) -> None:
    from dsv4.cache import SequenceMemory

    right = SequenceMemory.rewind

    def rewind(self: SequenceMemory, count: int) -> None:
        right(self, count)
        group = self.length // 4
        for layer in self.layers:
            for store in (layer.attention, layer.index):
                if store is not None and layer.kind.overlap:
                    rows = store.rows.slot(self.slot)
                    new, old = (torch.arange(4 * g, 4 * g + 4) % len(rows) for g in (group, group - 1))
                    rows[old] = rows[new]

    patch.setattr(SequenceMemory, "rewind", rewind)


@fault("padding is pooled", "padding", "model")
def _(port: Ours, patch: MonkeyPatch) -> None:
    """Left padding that the window does not see, but the compressors do."""

    def batch(ids: list[Tensor]) -> list[Tensor]:
        longest, out = max(len(part) for part in ids), []
        for part in ids:
            pads = longest - len(part)
            right = segments._part

            def blind(*a: Any, pads: int = pads, **more: Any) -> Any:
                made = right(*a, **more)
                start = made.window.start.clamp_min(pads)
                return replace(made, window=ops.Spans(start, torch.maximum(made.window.stop, start)))

            patch.setattr(segments, "_part", blind)
            with torch.no_grad():
                out.append(port.model(torch.cat([torch.zeros(pads, dtype=torch.int64), part]))[pads:])
            patch.setattr(segments, "_part", right)
        return out

    patch.setattr(port, "batch", batch)


# --- number formats --------------------------------------------------------------------------------------------------

FORMATS = ("number formats",)


def formatted(name: str, apply: Callable[[MonkeyPatch], None]) -> None:
    FAULTS[name] = (lambda port, patch: apply(patch) and None), FORMATS


def truncating(x: Tensor) -> Tensor:
    nearest = x.to(torch.float8_e4m3fn)
    codes = nearest.view(torch.uint8)
    return codes - (nearest.float().abs() > x.abs()).to(torch.uint8)


def truncating_fp4(x: Tensor) -> Tensor:
    a = x.abs()
    code = sum((a >= v).to(torch.uint8) for v in formats._E2M1[1:]) + torch.signbit(x).to(torch.uint8) * 8
    return code[:, 0::2] | (code[:, 1::2] << 4)


def lower_scale(largest: Tensor, code: str) -> Tensor:
    right = RIGHT_SCALE(largest, code)
    exact = largest / formats._LARGEST[code]
    return torch.where((right > exact) & torch.tensor(code == "fp8"), right / 2, right)


RIGHT_SCALE = formats.power_of_two_scale
RIGHT_HADAMARD = formats.hadamard
formatted("rows not rounded", lambda patch: patch.setattr(ours, "_ROW", SimpleNamespace(as_read=lambda x: x.float())))
formatted("rows truncated", lambda patch: patch.setattr(formats, "to_e4m3", truncating))
formatted("rows without a floor", lambda patch: patch.setitem(formats._FLOOR, "fp8", 1e-38))
formatted("row scales not powers of two", lambda patch: patch.setattr(
    ours, "_ROW", Packed(512, "fp8", 64, tail=64, fp32_scales=True)))  # fmt: skip
formatted("row scales rounded down", lambda patch: patch.setattr(formats, "power_of_two_scale", lower_scale))
formatted("rows in blocks of 128", lambda patch: patch.setattr(ours, "_ROW", Packed(512, "fp8", 128, tail=64)))
formatted("rotary channels in FP8", lambda patch: patch.setattr(ours, "_ROW", Packed(512, "fp8", 64)))
formatted("index rows not rotated", lambda patch: patch.setattr(formats, "hadamard", lambda x: x))
formatted("rotated index rows not rounded", lambda patch: patch.setattr(
    ours, "_KEY", SimpleNamespace(as_read=lambda x: Packed(128, "fp4", 32, rotated=True).as_read(x.float()))))
formatted("index rows in FP8", lambda patch: [
    patch.setattr(ours, "_KEY", Packed(128, "fp8", 128, rotated=True)),
    patch.setattr(ours, "Packed", lambda *a, **more: Packed(128, "fp8", 128, rotated=True)),
])  # fmt: skip
formatted("index rows truncated", lambda patch: patch.setattr(formats, "to_e2m1", truncating_fp4))


def one_sided(queries: bool) -> Callable[[MonkeyPatch], None]:
    """Only queries, or only keys, are rotated before they are rounded."""

    def apply(patch: MonkeyPatch) -> None:
        plain = Packed(128, "fp4", 32)
        method = "as_read" if queries else "as_query"
        turned = Packed(128, "fp4", 32, rotated=True)

        def make(*a: Any, **more: Any) -> Any:
            both = {"as_read": turned.as_read, "as_query": turned.as_query}
            both[method] = lambda x: plain.as_read(x.flatten(0, -2)).view(x.shape)
            return SimpleNamespace(**both)

        patch.setattr(ours, "Packed", make)

    return apply


formatted("Hadamard on queries only", one_sided(True))
formatted("Hadamard on keys only", one_sided(False))


def unpacking(name: str, numbers: Callable[[PackedMatrix], Tensor]) -> None:
    formatted(name, lambda patch: patch.setattr(PackedMatrix, "unpack", lambda self, dtype=None: numbers(self)))


def parts_of(m: PackedMatrix) -> tuple[Tensor, Tensor]:
    """Values, and the scale of each of them."""
    one = torch.full_like(m.scales, 127)
    scale = m.scales.view(torch.float8_e8m0fnu).float()
    rows, columns = m.shape
    high, wide = (128, 128) if m.code == "fp8" else (1, 32)
    spread = scale.repeat_interleave(high, 0).repeat_interleave(wide, 1)[:rows, :columns]
    return RIGHT_UNPACK(PackedMatrix(m.code, m.codes, one)), spread


RIGHT_UNPACK = PackedMatrix.unpack
unpacking("scale bytes read as numbers", lambda m: parts_of(m)[0] * (parts_of(m)[1].log2() + 127))
unpacking("scales divide", lambda m: parts_of(m)[0] / parts_of(m)[1])
unpacking("scale blocks transposed", lambda m: RIGHT_UNPACK(
    PackedMatrix("fp8", m.codes, m.scales.T.contiguous()) if m.code == "fp8" else m))  # fmt: skip
unpacking("codes read as FNUZ", lambda m: (
    m.codes.view(torch.float8_e4m3fnuz).float() * parts_of(m)[1] if m.code == "fp8" else RIGHT_UNPACK(m)))  # fmt: skip
unpacking("nibbles exchanged", lambda m: RIGHT_UNPACK(
    PackedMatrix("fp4", (m.codes >> 4) | (m.codes << 4), m.scales) if m.code == "fp4" else m))  # fmt: skip


def per_16(m: PackedMatrix) -> Tensor:
    if m.code == "fp8":
        return RIGHT_UNPACK(m)
    columns = m.shape[1]
    scale = m.scales.view(torch.float8_e8m0fnu).float()
    spread = scale[:, (torch.arange(columns) // 16) % scale.shape[1]]
    return parts_of(m)[0] * spread


unpacking("FP4 scales per 16 columns", per_16)
