"""A model as a linear map: what a small change of its embeddings, or of a block's streams, does further up.

Both products are exact derivatives (forward and reverse mode) of the reference ops, so no step size enters. The choices
of indexer and gates are discrete: they are those of the clean pass, and a change of theirs is not in the derivative.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor

from dsv4 import ops
from dsv4.model import LanguageModel, Segment, Transformer
from dsv4.model.segments import plan
from dsv4.ops.reference import rms_norm
from dsv4.probe.lanczos import largest_singular

Map = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Gain:
    """How a map f stretches a small change at x. sigma: at most; random: the mean over random directions; scale:
    |x| / |f(x)|, so that sigma * scale is relative. asymmetry: how far <u, J v> and <J^T u, v> are apart, relative to
    |u| |J v|: what rounding is in both."""

    sigma: float
    random: float
    scale: float
    residual: float
    steps: int
    asymmetry: float

    @property
    def relative(self) -> float:
        return self.sigma * self.scale


def embeddings_to_hidden(model: LanguageModel, ids: Tensor) -> tuple[Map, Tensor]:
    """The map from embeddings [T, M] to what the head reads [T, M], for ids that hash layers route by; its point."""
    with torch.no_grad():
        start = model.embedded(ids, None)
    return lambda x: model.trunk(ids, [Segment(len(ids))], embedded=x).hidden, start


def blocks_of(model: Transformer, ids: Tensor) -> Iterator[tuple[Map, Tensor]]:
    """For every block the map of its streams [T, N, M] and its point, from the bottom."""
    run = plan(model.config, [Segment(len(ids))], model.device)
    views = [None] * len(run.pools)
    with torch.no_grad():
        x = model.embedded(ids, None)[:, None].expand(-1, model.config.num_streams, -1).contiguous()
    for block in model.layers:
        yield lambda given, block=block: block(given, ids, run, views)[0], x
        with torch.no_grad():
            x = block(x, ids, run, views)[0]


def gain(f: Map, x: Tensor, generator: torch.Generator, *, directions: int = 8, tolerance: float = 1e-3) -> Gain:
    """Of a differentiable map at x, fp32."""
    with ops.using("reference"):
        with torch.enable_grad():
            point = x.clone().requires_grad_(True)
            y = f(point)

        def apply(v: Tensor) -> Tensor:
            with torch.no_grad(), forward_ad.dual_level():
                out = forward_ad.unpack_dual(f(forward_ad.make_dual(x, v)))
                return torch.zeros_like(y) if out.tangent is None else out.tangent.clone()

        def transpose(u: Tensor) -> Tensor:
            return torch.autograd.grad(y, point, u, retain_graph=True)[0]

        def drawn(like: Tensor) -> Tensor:
            return torch.randn(like.shape, generator=generator, device="cpu").to(like)

        found = largest_singular(apply, transpose, drawn(x), tolerance=tolerance)
        lengths, apart = [], 0.0
        for _ in range(directions):
            v, u = drawn(x), drawn(y)
            image = apply(v)
            lengths.append(float(image.norm() / v.norm()))
            both = float((u * image).double().sum()), float((transpose(u) * v).double().sum())
            apart = max(apart, abs(both[0] - both[1]) / max(float(u.norm() * image.norm()), 1e-30))
        y = y.detach()
    random = sum(lengths) / max(1, len(lengths))
    return Gain(found.value, random, float(x.norm() / y.norm()), found.residual, found.steps, apart)


@contextmanager
def without_parameters(model: torch.nn.Module) -> Iterator[None]:
    """Derivatives of inputs alone: no parameter is followed inside the block."""
    trained = [p for p in model.parameters() if p.requires_grad]
    for p in trained:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in trained:
            p.requires_grad_(True)


@contextmanager
def coefficients_replayed(model: LanguageModel, ids: Tensor) -> Iterator[None]:
    """Inside the block the streams of an mHC model are read, written and mixed as they were for `ids`, whatever comes.

    Only whole passes over as many tokens may be made: coefficients are told apart by the order of calls.
    """
    kept: list[tuple[Tensor, ...]] = []

    def record(name: str, op: Callable) -> Callable:
        def enter(x: Tensor, fn: Tensor, base: Tensor, scale: Tensor, gain: Tensor, *rest: float) -> object:
            kept.append(ops.hyper_maps(x, fn, base, scale, *rest))  # type: ignore[arg-type]
            return op(x, fn, base, scale, gain, *rest)

        def collapse(x: Tensor, fn: Tensor, base: Tensor, scale: Tensor, eps: float, norm_eps: float) -> object:
            flat = x.flatten(1).float()
            rho = torch.rsqrt(flat.square().mean(dim=1, keepdim=True) + norm_eps)
            kept.append((torch.sigmoid(scale * (F.linear(flat, fn.float()) * rho) + base) + eps,))
            return op(x, fn, base, scale, eps, norm_eps)

        return enter if name == "hyper_enter" else collapse

    with torch.no_grad(), ops.wrapped(["hyper_enter", "head_collapse"], record):
        model.trunk(ids, [Segment(len(ids))])
    calls = 0

    def replay(name: str, op: Callable) -> Callable:
        def next_of(size: int) -> tuple[Tensor, ...]:
            nonlocal calls
            found, calls = kept[calls], (calls + 1) % len(kept)
            assert len(found) == size, "passes came in another order than the one that was recorded"
            return found

        def enter(x: Tensor, fn: Tensor, base: Tensor, scale: Tensor, gain: Tensor, *rest: float) -> object:
            pre, post, comb = next_of(3)
            return rms_norm(ops.hyper_read(x, pre), gain, rest[-1]), post, comb

        def collapse(x: Tensor, *rest: object) -> object:
            return ops.hyper_read(x, *next_of(1))

        return enter if name == "hyper_enter" else collapse

    with ops.wrapped(["hyper_enter", "head_collapse"], replay):
        yield


def with_residual(model: Transformer, residual: str) -> Transformer:
    """The same weights joined by another residual (they are shared, not copied). plain has no use for the
    hyper-connections' own; hc mixes by I + tanh of the logits that mHC gives to Sinkhorn."""
    with torch.device("meta"):
        other = Transformer(model.config.with_(residual=residual), model.dtype, compute_dtype=model.compute_dtype)
    missing, _ = other.load_state_dict(model.state_dict(), strict=False, assign=True)
    assert not missing, missing
    return other.eval()
