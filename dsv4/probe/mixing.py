"""gain.certificate: does mHC's residual path carry a perturbation further than it was, over any depth?

Covers: the mixing of the residual streams, sublayer by sublayer, as it is on given tokens, and every product of
consecutive mixers. With C the matrix of ops.hyper_write (streams become C^T X), a composite P = C_b^T ... C_a^T has
    forward   max row sum of |P|:     how much the largest stream can grow,
    backward  max column sum of |P|:  how much the largest gradient can grow,
    spectral  largest singular value.
Sinkhorn ends with a column step, so each C^T is row-stochastic, products of such are row-stochastic, and for N streams
forward <= 1, backward <= N, spectral <= sqrt(N), at any depth and converged or not. Columns that are off by d make
forward at most the product of (1 + d_i), which is printed beside what was found.

Does not cover: what sublayers add (gain.jacobian), and that the mixers themselves depend on the input (gain.dynamic):
here they are frozen. A matrix that is applied transposed, or a Sinkhorn that ends with the row step, breaks it.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dsv4 import ops
from dsv4.config import AnyConfig, ModelConfig
from dsv4.model import LanguageModel
from dsv4.probe.record import Record
from dsv4.probe.subject import Recorder, Settings, Subject

NAME = "gain.certificate"
FORWARD = 1.001  # the limit for a composite, which leaves room for fp32 in a hundred mixers
BLOCK = 1024  # tokens whose composites are held at a time
UNIT_ROUNDOFF = {"float32": 2.0**-24, "bfloat16": 2.0**-8, "float16": 2.0**-11, "float64": 2.0**-53}


@dataclass(frozen=True)
class Certificate:
    """Of mixers [L, T, N, N]: the largest composite gains over all a <= b and tokens; the bound on forward that follows
    from each mixer alone; and the means over tokens of the gains of P(0:b), by b: [L, 3]."""

    forward: float
    backward: float
    spectral: float
    bound: float
    by_depth: list[list[float]]
    streams: int

    @property
    def holds(self) -> bool:
        """Within 1.001, N and sqrt(N)."""
        n = self.streams
        return self.forward <= FORWARD and self.backward <= n and self.spectral <= n**0.5


def mixers_of(model: LanguageModel, ids: Tensor) -> Tensor:
    """The matrices that mix the streams, fp32 [sublayers, T, N, N] in the order in which they act, for ids [T]."""
    found: list[Tensor] = []

    def watch(name: str, op: Callable) -> Callable:
        def write(x: Tensor, y: Tensor, post: Tensor, comb: Tensor) -> Tensor:
            found.append(comb.detach().float().cpu())
            return op(x, y, post, comb)

        return write

    with torch.no_grad(), ops.wrapped(["hyper_write"], watch):
        model(ids, rows="last")
    return torch.stack(found)


def certificate(mixers: Tensor) -> Certificate:
    """Products are taken in fp64, so what is found is the mixers', not the product's rounding."""
    depth, count, n, _ = mixers.shape
    worst, bound = torch.zeros(3, dtype=torch.float64), 1.0
    by_depth = torch.zeros(depth, 3, dtype=torch.float64)
    for a in range(depth):  # each mixer alone
        bound *= max(1.0, float(mixers[a].double().abs().sum(dim=-2).max()))
    for block in mixers.split(BLOCK, dim=1):
        steps = block.double().transpose(-1, -2)  # what acts on the streams
        products = steps.new_zeros(0, block.shape[1], n, n)
        for b in range(depth):
            products = torch.cat([steps[b] @ products, steps[b][None]])  # P(a:b) for every a <= b
            gains = gains_of(products)
            worst = torch.maximum(worst, gains.amax(dim=(0, 1)))
            by_depth[b] += gains[0].sum(dim=0) / count
    forward, backward, spectral = worst.tolist()
    return Certificate(forward, backward, spectral, bound, by_depth.tolist(), n)


def gains_of(products: Tensor) -> Tensor:
    """Forward, backward and spectral gain of matrices [..., N, N] -> [..., 3]."""
    size = products.abs()
    spectral = torch.linalg.matrix_norm(products, 2)
    return torch.stack([size.sum(dim=-1).amax(dim=-1), size.sum(dim=-2).amax(dim=-1), spectral], dim=-1)


def needs(config: AnyConfig) -> str | None:
    if not isinstance(config, ModelConfig) or config.residual == "plain":
        return "the model has one residual stream, which nothing mixes: this is about hyper-connections"
    return None


def run(subject: Subject, settings: Settings) -> Iterator[Record]:
    record = Recorder(NAME, subject, settings)
    config = subject.config
    assert isinstance(config, ModelConfig)
    total = settings.pick(10_000, 40_000)
    length = min(1000, config.max_position_embeddings)
    pieces = [mixers_of(subject.model, ids) for ids in subject.windows(-(-total // length), length, settings, salt=1)]
    mixers = torch.cat(pieces, dim=1)[:, :total]
    found, n = certificate(mixers), config.hc_mult
    roundoff = UNIT_ROUNDOFF[subject.dtype]
    # mixers are fp32 in every dtype; the mixed streams are rounded to the model's dtype once a sublayer
    bound = found.bound * (1 + roundoff) ** len(mixers)
    about: dict[str, Any] = {"tokens": total, "mixers": len(mixers), "residual": config.residual, "holds": found.holds}
    verdict = "holds" if found.holds else "DOES NOT HOLD"
    yield record(
        "composite forward gain", found.forward, "x", n=total,
        detail={**about, "limit": FORWARD, "bound": bound, "plot": _plot(found)},
        finding=f"The mixing certificate {verdict}: over {len(mixers)} mixers no stream grows by more than "
        f"{found.forward:.6f} (limit {FORWARD}; bound from the mixers and {subject.dtype} streams {bound:.6f}).",
    )  # fmt: skip
    yield record("composite backward gain", found.backward, "x", n=total, detail={**about, "limit": n})
    yield record("composite spectral gain", found.spectral, "x", n=total, detail={**about, "limit": n**0.5})
    narrow = certificate(mixers.bfloat16().float())
    worst = (1 + UNIT_ROUNDOFF["bfloat16"]) ** len(mixers) * found.bound
    yield record(
        "forward gain with mixers held in bfloat16", narrow.forward, "x", n=total, dtype="bfloat16",
        detail={**about, "bound": worst, "backward": narrow.backward, "spectral": narrow.spectral},
        finding=f"An implementation that rounds the mixers to bfloat16 has forward gain {narrow.forward:.4f} here and "
        f"at most {worst:.3f} anywhere.",
    )  # fmt: skip
    rows = mixers.double().sum(dim=-1).sub(1).abs().max()
    columns = mixers.double().sum(dim=-2).sub(1).abs().max()
    yield record(
        "largest deviation of a row sum from 1", float(rows), "", n=total,
        detail={**about, "columns": float(columns)},
        finding="Sinkhorn's 20 rounds leave rows unfinished where logits are large; the certificate does not need them."
        if float(rows) > 1e-4 else "",
    )  # fmt: skip


def _plot(found: Certificate) -> dict[str, Any]:
    names = ("forward", "backward", "spectral")
    series = {name: [row[i] for row in found.by_depth] for i, name in enumerate(names)}
    x = list(range(1, len(found.by_depth) + 1))
    title = "gain of the streams' mixing, mean over tokens"
    return {"title": title, "x": x, "series": series, "xlabel": "mixers from the bottom", "ylabel": "gain"}
