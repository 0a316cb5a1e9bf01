"""Every known mistake, made in this package's own torch model and not in the plain one that the diagnosis uses.

A fault takes the loaded adapter and a MonkeyPatch; it changes weights, settings or functions, and may return ops to be
wrapped: {op: how to make the broken one of the right one}. All run on the reference ops, so that nothing passes by.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from pytest import MonkeyPatch
from torch import Tensor

from dsv4 import ops
from dsv4.config import RopeScaling
from dsv4.conform.adapters import ours
from dsv4.conform.adapters.ours import Ours
from dsv4.model import parts, segments
from dsv4.model.rope import frequencies, pair_frequencies, turns
from dsv4.ops import reference
from dsv4.ops.formats import Packed

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
        for module in (parts, segments, ours):
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

    for module in (parts, segments, ours):
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
