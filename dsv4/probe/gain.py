"""gain.jacobian, gain.ratio, gain.dynamic: how strongly does a small change of the input come out above?

f is the map from the embeddings of T tokens to the last hidden state before the head. Covers: its largest singular
value sigma at real inputs (the worst direction) and the mean over random ones; relative gain rho = sigma |x| / |f(x)|,
which leaves out the factor that N copies of the embedding bring; each block's own. gain.ratio runs the same block
weights with a plain residual and with unconstrained hyper-connections: R = rho(mHC) / rho(other), paired by input, with
the bootstrap interval of the geometric mean. gain.dynamic holds the coefficients of the streams as they were in the
clean pass: D = sigma / sigma(frozen) says what their dependence on the input adds to what gain.certificate bounds.

Does not cover: large changes (attention is not Lipschitz, so a local gain bounds nothing beyond its neighbourhood), and
jumps of the discrete choices (selection.*, routing.*). In gain.ratio the weights were trained with mHC; trained with
another residual they would be others (experiments/0003-residuals trains them).
"""

import math
from collections.abc import Iterator

import torch

from dsv4.config import AnyConfig, ModelConfig
from dsv4.model import Transformer
from dsv4.probe import stats
from dsv4.probe.jacobian import (
    Gain,
    blocks_of,
    coefficients_replayed,
    embeddings_to_hidden,
    gain,
    with_residual,
    without_parameters,
)
from dsv4.probe.record import Record
from dsv4.probe.subject import Recorder, Settings, Subject

LOUD = 2.0  # a ratio above this would mean that perturbations are carried further than by a plain residual


def tokens_of(settings: Settings) -> int:
    return settings.pick(64, 256)


def end_to_end(
    subject: Subject, settings: Settings, number: int, model: Transformer | None = None, directions: int = 1
) -> list[Gain]:
    """The gains of a model (the subject's own, or one beside it) for the same `number` inputs."""
    found, asked = [], subject.model if model is None else model
    for i, ids in enumerate(subject.windows(number, tokens_of(settings), settings, salt=2)):
        with without_parameters(asked):
            f, x = embeddings_to_hidden(asked, ids)
            found.append(gain(f, x, settings.generator(100 + i), directions=directions))
    return found


# --- gain.jacobian ---------------------------------------------------------------------------------------------------


def needs_trunk(config: AnyConfig) -> str | None:
    return None


def run_jacobian(subject: Subject, settings: Settings) -> Iterator[Record]:
    record = Recorder("gain.jacobian", subject, settings)
    number = settings.pick(4, 16)
    found = end_to_end(subject, settings, number, directions=8)
    worst = max(g.residual for g in found)
    detail = {"tokens": tokens_of(settings), "each": [g.sigma for g in found],
              "relative": [g.relative for g in found], "steps": [g.steps for g in found],
              "asymmetry": max(g.asymmetry for g in found)}  # fmt: skip
    sigma, rho, random = ([getattr(g, name) for g in found] for name in ("sigma", "relative", "random"))
    mean = _geometric(rho)
    yield record(
        "relative gain, worst direction", mean, "x", interval=_interval(rho, settings), residual=worst, n=number,
        detail=detail,
        finding=f"Before the head, a small change of the input is {mean:.3g} times as large in its worst direction, "
        f"relative to what it is added to; {_geometric([g.random * g.scale for g in found]):.2g} in a random one.",
    )  # fmt: skip
    yield record("largest singular value", _geometric(sigma), "x", interval=_interval(sigma, settings), n=number,
                 residual=worst)  # fmt: skip
    yield record("gain of a random direction", _geometric(random), "x", interval=_interval(random, settings), n=number)
    if isinstance(subject.model, Transformer):
        yield _profile(subject, settings, record)


def _profile(subject: Subject, settings: Settings, record: Recorder) -> Record:
    model = subject.model
    assert isinstance(model, Transformer)
    ids = subject.ids(tokens_of(settings), settings, salt=2 * 4096)
    kinds = [model.config.layer_kind(i).name for i in range(len(model.layers))]
    with without_parameters(model):
        found = [gain(f, x, settings.generator(200 + i)) for i, (f, x) in enumerate(blocks_of(model, ids))]
    relative, random = [g.relative for g in found], [g.random * g.scale for g in found]
    top = max(range(len(found)), key=lambda i: relative[i])
    labels = [f"{i} {kind}" for i, kind in enumerate(kinds)]
    plot = {"title": "relative gain of each block", "x": labels, "kind": "bar", "xlabel": "block", "ylabel": "gain",
            "series": {"worst direction": relative, "random direction": random}, "logy": True}  # fmt: skip
    return record(
        "largest relative gain of a block", relative[top], "x", residual=max(g.residual for g in found),
        detail={"block": top, "kind": kinds[top], "sigma": [g.sigma for g in found], "plot": plot},
        finding=f"The loudest block is {top} ({kinds[top]}), {relative[top]:.3g} times in its worst direction.",
    )  # fmt: skip


# --- gain.ratio ------------------------------------------------------------------------------------------------------


def needs_mhc(config: AnyConfig) -> str | None:
    if not isinstance(config, ModelConfig) or config.residual != "mhc":
        return "the model has no mHC, whose block weights are to be run with other residuals"
    return None


def run_ratio(subject: Subject, settings: Settings) -> Iterator[Record]:
    record = Recorder("gain.ratio", subject, settings)
    assert isinstance(subject.model, Transformer)
    number = settings.pick(6, 24)
    own = end_to_end(subject, settings, number)
    for residual, words in (("plain", "a plain residual"), ("hc", "unconstrained hyper-connections")):
        others = end_to_end(subject, settings, number, with_residual(subject.model, residual))
        ratios = [a.relative / b.relative for a, b in zip(own, others, strict=True)]
        low, high = _interval(ratios, settings)
        value, residue = _geometric(ratios), max(g.residual for g in [*own, *others])
        yield record(
            f"R = rho(mHC) / rho({residual})", value, "x", interval=(low, high), residual=residue, n=number,
            detail={"each": ratios, "mhc": [g.relative for g in own], residual: [g.relative for g in others]},
            finding=f"With the same block weights, mHC carries a perturbation {value:.3g} times as far as {words} does "
            f"(95%: {low:.3g} to {high:.3g}): {_verdict(low, high)}.",
        )  # fmt: skip


def _verdict(low: float, high: float) -> str:
    if low > LOUD:
        return "more than twice as far, a finding to act on"
    if high < 1:
        return "less far"
    if low > 1:
        return "further, by less than a factor of two" if high <= LOUD else "further"
    return "no difference is shown" if high <= LOUD else "too few inputs to say"


# --- gain.dynamic ----------------------------------------------------------------------------------------------------


def run_dynamic(subject: Subject, settings: Settings) -> Iterator[Record]:
    record = Recorder("gain.dynamic", subject, settings)
    number, shares, residue = settings.pick(4, 16), [], 0.0
    for i, (ids, own) in enumerate(
        zip(
            subject.windows(number, tokens_of(settings), settings, salt=2),
            end_to_end(subject, settings, number),
            strict=True,
        )
    ):
        with without_parameters(subject.model), coefficients_replayed(subject.model, ids):
            f, x = embeddings_to_hidden(subject.model, ids)
            frozen = gain(f, x, settings.generator(100 + i), directions=1)
        shares.append(own.sigma / frozen.sigma)
        residue = max(residue, own.residual, frozen.residual)
    value, (low, high) = _geometric(shares), _interval(shares, settings)
    yield record(
        "D = sigma / sigma(coefficients frozen)", value, "x", interval=(low, high), residual=residue, n=number,
        detail={"each": shares},
        finding=f"That the streams' coefficients depend on the input changes the worst gain by a factor of {value:.3g} "
        f"({low:.3g} to {high:.3g}); the mixing certificate does not cover this part.",
    )  # fmt: skip


def _geometric(values: list[float]) -> float:
    return math.exp(sum(math.log(v) for v in values) / len(values))


def _interval(values: list[float], settings: Settings) -> tuple[float, float]:
    """Of the geometric mean."""
    low, high = stats.bootstrap(torch.tensor(values).log(), seed=settings.seed)
    return math.exp(low), math.exp(high)
