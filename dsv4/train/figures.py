"""What a run's log says beside its losses: the experts' load, the machine's part, and a look inside the model.

Figures of an update cost microseconds and stand in every line. What needs a pass of its own (`look_inside`) is measured
at evaluations alone, on held-out text, without a graph.
"""

import math
import resource
import sys
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from dsv4 import ops
from dsv4.config import AnyConfig
from dsv4.cost.flops import train
from dsv4.model import LanguageModel, Segment
from dsv4.model.head import IGNORE
from dsv4.model.segments import IndexPhase
from dsv4.train.batches import Batch

LOOKED_AT = 2048  # held-out tokens of a look inside
ROWS = 256  # logits [ROWS, vocab] are held at once


class Peak:
    """FLOP/s that a run's utilisation is a share of. measure: what one device reaches now. Who does more than that was
    measured while others had the device, so it is measured again, TRIES times at most; the largest counts."""

    TRIES = 3

    def __init__(self, measure: Callable[[], float], devices: int = 1):
        self.measure, self.devices, self.left, self.best = measure, devices, self.TRIES, measure()

    def share(self, rate: float) -> float:
        """Of a rate of all devices together."""
        while rate > self.best * self.devices and self.left:
            self.best, self.left = max(self.best, self.measure()), self.left - 1
        return rate / (self.best * self.devices)


def update_figures(
    config: AnyConfig,
    batch: Batch,
    loss: float,
    loads: dict[int, Tensor],
    seconds: float,
    optimizer_seconds: float,
    device: torch.device,
    peak: Peak | None,
    phase: IndexPhase = "off",
) -> dict[str, Any]:
    """Of one update: training bits per byte; over the layers with a learned gate the largest load of an expert over the
    mean, and the largest coefficient of variation; and of the machine (log.MACHINE): the optimiser's share of the time,
    model FLOPs utilisation, the most bytes held so far.

    batch: all that the update learned from, with `loss` nats per target. loads: fp32 [X] by layer. peak: what the
    devices could do; without it there is no MFU. FLOPs are those of the mathematics (cost.flops.train): neither
    recomputation nor what indexers learn from is in them; while these learn alone, only the forward pass is.
    """
    targets = int((batch.targets != IGNORE).sum())
    figures: dict[str, Any] = {
        **({"bpb": loss * targets / math.log(2) / batch.num_bytes} if batch.num_bytes else {}),
        "load_max": max((float(load.max() / load.mean()) for load in loads.values()), default=1.0),
        "load_cv": max((float(load.std(correction=0) / load.mean()) for load in loads.values()), default=0.0),
        "optimizer_share": optimizer_seconds / seconds,
        "memory_bytes": most_bytes(device),
    }
    if peak is not None:
        figures["mfu"] = peak.share(flops_of(config, batch.lengths, backward=phase != "warmup") / seconds)
    return figures


def flops_of(config: AnyConfig, lengths: Iterable[int], *, backward: bool = True) -> float:
    """FLOPs of an update on documents of these lengths, forward and, unless it is left out, backward."""
    return sum(_document_flops(config, n, backward) for n in lengths)


@lru_cache(maxsize=1 << 14)
def _document_flops(config: AnyConfig, tokens: int, backward: bool) -> float:
    # of a product with weights the backward pass is twice the forward one; an indexer's choice has none
    return sum(
        w.flops / (1 if backward or w.component.startswith("indexer") else 3)
        for w in train(config, tokens)
        if w.kind != "sum"
    )


def most_bytes(device: torch.device) -> int:
    """The most bytes held so far: of the accelerator by tensors, or of the machine by this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


@torch.no_grad()
def look_inside(model: LanguageModel, batch: Batch, phase: IndexPhase = "off") -> dict[str, Any]:
    """Of at most LOOKED_AT tokens of a held-out batch, as far as the model has the parts:

    sink_mass            by layer: the attention that goes to the sink, mean over tokens and heads
    mhc_row_gain, mhc_column_gain   of the composite of all layers' mixing matrices of a token, the largest sum of a
                         row's (forward) and of a column's (backward) absolute values over all tokens; 1 if every matrix
                         is doubly stochastic
    mtp_acceptance       the share of tokens t + 2 for which the MTP block's likeliest, at t with the text's token
                         t + 1, is the trunk's likeliest at t + 1: what a greedy draft would come to
    """
    lengths = _cut(batch.lengths, LOOKED_AT)
    ids, segments = batch.ids[: sum(lengths)], [Segment(n) for n in lengths]
    sinks: list[float] = []
    composite: list[Tensor] = []  # the newest one alone

    def watch(name: str, op: Callable) -> Callable:
        def attention(*args: Any) -> tuple[Tensor, Tensor]:
            out, lse = op(*args)
            sinks.append(float((args[6].float() - lse).exp().mean()))
            return out, lse

        def write(x: Tensor, y: Tensor, post: Tensor, comb: Tensor) -> Tensor:
            mixing = comb.float().mT  # the op sums over comb's rows
            composite[:] = [mixing @ composite[0] if composite else mixing]
            return op(x, y, post, comb)

        return attention if name == "sparse_attention" else write

    with ops.wrapped(("sparse_attention", "hyper_write"), watch):
        trunk = model.trunk(ids, segments, phase)
    figures: dict[str, Any] = {}
    if len(sinks) == len(model.layers):
        figures["sink_mass"] = {str(layer): mass for layer, mass in enumerate(sinks)}
    if composite:
        sizes = composite[0].abs()
        figures["mhc_row_gain"] = float(sizes.sum(dim=2).max())
        figures["mhc_column_gain"] = float(sizes.sum(dim=1).max())
    if model.predicts_next and max(lengths) > 1:
        hidden, rows, _ = model.predict_next(trunk, ids)
        drafted, right = _likeliest(model, hidden), _likeliest(model, trunk.hidden[rows + 1])
        figures["mtp_acceptance"] = float((drafted == right).float().mean())
    return figures


def _likeliest(model: LanguageModel, hidden: Tensor) -> Tensor:
    """int64 [n]: the token of the largest logit for each row of hidden [n, M]."""
    return torch.cat([model.head(some).argmax(dim=1) for some in hidden.split(ROWS)])


def _cut(lengths: list[int], most: int) -> list[int]:
    """The first of these lengths, `most` in sum; the last of them may be cut."""
    kept: list[int] = []
    for length in lengths:
        if most:
            kept.append(min(length, most))
            most -= kept[-1]
    return kept
