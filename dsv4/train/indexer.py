"""How the indexers of CSA learn beside everything else: what moves in which phase, and what a run's log says of them.

Phases (model/segments.py) are a function of the step (schedule.py). What does not learn in one is frozen: it has no
gradient, so the optimiser leaves it alone, momentum and decay included.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from dsv4.model.segments import IndexPhase
from dsv4.train.loss import Loss


def is_index_parameter(name: str) -> bool:
    """Whether a parameter is an indexer's, by its published name."""
    return ".indexer." in name


def thaw(named_parameters: Iterable[tuple[str, nn.Parameter]], phase: IndexPhase) -> None:
    """Let learn what learns in a phase, and freeze the rest: indexers in the warm-up and the sparse phase, everything
    else in all but the warm-up."""
    for name, parameter in named_parameters:
        parameter.requires_grad_(phase in ("warmup", "sparse") if is_index_parameter(name) else phase != "warmup")


def index_figures(phase: IndexPhase, parts: list[Loss], norm: float) -> dict[str, Any]:
    """What an update's record says of the indexers: their phase, and where they learn by layer the loss and, if a query
    saw more entries than it may choose, recall of the best ones and the share of their mass (ops.index_recall)."""
    record: dict[str, Any] = {"phase": phase}
    if phase not in ("warmup", "sparse"):
        return record
    layers = parts[0].index_kl
    record |= {"index_grad_norm": norm, "index_kl": {str(n): sum(p.index_kl[n] for p in parts) for n in layers}}
    found = {n: torch.stack([p.index_found[n] for p in parts]).sum(dim=0).tolist() for n in layers}
    for name, place in (("index_recall", 1), ("index_mass", 2)):
        means = {str(n): sums[place] / sums[0] for n, sums in found.items() if sums[0]}
        record |= {name: means} if means else {}
    return record
