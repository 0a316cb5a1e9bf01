"""Anticipatory routing (paper, on training stability): the parameters of update t - delay choose the experts of t.

Features, scores and the weights of the experts are those of the parameters that learn; only which experts a token goes
to is decided earlier. The paper reads the batch of update t early and computes and keeps its choice at t - delay, when
those parameters are the current ones, so no second set of parameters is ever held. So here: before update s a pass
without a graph chooses for batch s + delay. Where it is switched on, the choices of the first `delay` updates are made
at once, by the oldest parameters that there are: their delay grows from 0 to `delay`. Hash layers have no choice to
make. It is off unless asked for; with `when: spike` it begins with a rollback, where the loss jumps (`Spikes`).

Of several processes each chooses for the tokens that it reads, and keeps that; a checkpoint has the choices of all in
the order of the batch, of which any number of processes takes its own again.

What a spike is, how far the run goes back, the delay and how long it stays on the paper does not state: these are ours.
"""

import math
import statistics
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsv4.checkpoint.writing import write_tensors
from dsv4.config import AnyConfig, ModelConfig
from dsv4.errors import UserError, nearest
from dsv4.model import LanguageModel, Segment
from dsv4.model.segments import IndexPhase
from dsv4.model.shards import Shard
from dsv4.train.balance import learned_gates
from dsv4.train.parallel.processes import Processes
from dsv4.train.parallel.shares import Rows, Share

FILE = "anticipated.safetensors"  # of a checkpoint: what has been chosen for updates to come
WHEN = ("off", "spike", "always")
LARGEST = 10**6

_READS: dict[IndexPhase, IndexPhase] = {"warmup": "dense", "sparse": "off"}  # the same entries, without indexers' loss
Choices = dict[int, Tensor]  # by number of a layer: whole numbers [tokens of a process's shares of a batch, K]


@dataclass(frozen=True)
class AnticipatoryConfig:
    """when: off; spike, from a rollback until `steps` updates after the spike; or always.

    delay: updates between the parameters that choose experts and those that learn. A spike is a loss above the median
    of the `window` losses before it by more than `threshold` robust standard deviations (1.4826 times the median
    distance from the median, at least 1% of the median), or one that is not finite.
    """

    when: str = "off"
    delay: int = 8
    steps: int = 100
    window: int = 32
    threshold: float = 6.0

    def check(self, model: AnyConfig) -> None:
        """UserError for what cannot be, by the setting's name."""
        if self.when not in WHEN:
            raise UserError(
                f"anticipatory.when={self.when!r} must be one of {', '.join(WHEN)}{nearest(self.when, WHEN)}"
            )
        for name, smallest in (("delay", 0), ("steps", 1), ("window", 4)):
            value = getattr(self, name)
            if not smallest <= value <= LARGEST:
                raise UserError(f"anticipatory.{name}={value} must be from {smallest} to {LARGEST:,}")
        if not 0 < self.threshold < math.inf:
            raise UserError(f"anticipatory.threshold={self.threshold} must be a positive finite number, such as 6")
        if self.when != "off" and not (isinstance(model, ModelConfig) and _has_learned_gates(model)):
            raise UserError(
                f"anticipatory.when={self.when}: the model has no V4 layer whose router learns, so nothing is chosen: "
                "leave anticipatory.when at off"
            )


def _has_learned_gates(model: ModelConfig) -> bool:
    numbers = range(model.num_hidden_layers + model.num_nextn_predict_layers)
    return any(not model.uses_hash_routing(layer) for layer in numbers)


class Spikes:
    """Tells a spike of the training loss from its noise, among updates of one kind (phase, lengths)."""

    def __init__(self, config: AnticipatoryConfig, records: Iterable[Mapping[str, Any]] = ()):
        self.config = config
        self._losses: deque[float] = deque(maxlen=config.window)
        self._kind: Any = None
        for record in records:
            if "loss" in record:
                self.judge(record)

    def judge(self, record: Mapping[str, Any]) -> float | None:
        """Enter an update's log record; the median that its loss has left, None for no spike. A spike is not entered,
        and no update is one before the window is full."""
        kind = record.get("phase"), record.get("seq_len")
        if kind != self._kind:
            self._losses.clear()
            self._kind = kind
        loss, found = record["loss"], None
        if len(self._losses) == self.config.window:
            usual = statistics.median(self._losses)
            spread = 1.4826 * statistics.median(abs(x - usual) for x in self._losses)
            if not loss <= usual + self.config.threshold * max(spread, 0.01 * abs(usual)):
                found = usual
        if found is None:
            self._losses.append(loss)
        return found


class Anticipation:
    """Choices of experts made ahead. until: the number of the first update that has none; no work where it is past.

    processes: those that share the run. rows: where the rows that this one chooses for stand in batch n, by layer.
    """

    def __init__(
        self, config: AnticipatoryConfig, steps: int, processes: Processes, rows: Callable[[int], Mapping[int, Rows]]
    ):
        self.config, self.steps, self.processes, self.rows = config, steps, processes, rows
        self.until = steps if config.when == "always" else 0
        # by number of the update: the one before which it was chosen for, and what, int32 on the CPU
        self._chosen: dict[int, tuple[int, Choices]] = {}

    def active(self, step: int) -> bool:
        return step < self.until and self.config.when != "off"

    def before(self, step: int, choose: Callable[[int], Choices]) -> tuple[int, Choices]:
        """Make what is lacking up to update step + delay with the parameters as they are before update `step`; how many
        updates old what that update is to take is, and what it is."""
        for n in range(step, min(step + self.config.delay + 1, self.until, self.steps)):
            if n not in self._chosen:
                self._chosen[n] = step, {layer: rows.to("cpu", torch.int32) for layer, rows in choose(n).items()}
        self._chosen = {n: kept for n, kept in self._chosen.items() if n >= step}
        made, chosen = self._chosen[step]
        return step - made, chosen

    def forget(self, until: int) -> None:
        """After a rollback: nothing of another course, on until there."""
        self._chosen, self.until = {}, max(self.until, until)

    def write(self, folder: Path, step: int, *, safe: str) -> None:
        """Beside a checkpoint before update `step`, where there is something to keep: the choices for whole batches.
        All processes call it, the first one writes."""
        tensors: dict[str, Tensor] = {}
        for n, (made, chosen) in self._chosen.items():
            if n < step:
                continue
            for layer, rows in self.rows(n).items():
                whole = self.processes.joined(chosen[layer], *rows)
                if self.processes.is_first:
                    tensors[f"{n}.{made}.{layer}"] = whole
        if tensors:
            write_tensors(folder / FILE, tensors, safe=safe)

    def read(self, tensors: Mapping[str, Tensor]) -> None:
        """This process's part of what any number of them wrote."""
        self._chosen = {}
        for name, whole in tensors.items():
            n, made, layer = map(int, name.split("."))
            self._chosen.setdefault(n, (made, {}))[1][layer] = whole[self.rows(n)[layer].places]


@contextmanager
def routed(model: LanguageModel, chosen: Choices | None):
    """In this block the learned gates take these choices, one row for each that they see; in the backward pass too,
    which may compute them again."""
    gates = learned_gates(model) if chosen is not None else {}
    for layer, gate in gates.items():
        given = (chosen or {}).get(layer)
        gate.anticipated = None if given is None else given.to(gate.bias.device, torch.int64)
    try:
        yield
    finally:
        for gate in gates.values():
            gate.anticipated = None


@torch.no_grad()
def choose(model: LanguageModel, shares: Sequence[Share], phase: IndexPhase) -> Choices:
    """What the gates choose for a process's shares of a batch, by the parameters as they are; all processes call it. Of
    the MTP block, whose number is that after the last layer, the tokens that are followed by another."""
    gates = learned_gates(model)
    found: dict[int, list[Tensor]] = {layer: [] for layer in gates}
    for share in shares:
        pieces = share.segments if isinstance(share.segments, Shard) else [Segment(n) for n in share.segments]
        routing = model.route(share.ids, pieces, _READS.get(phase, phase))
        for layer, gate in gates.items():
            decided = routing.get(layer)
            rows = torch.empty(0, gate.topk, dtype=torch.int64) if decided is None else decided.chosen.cpu()
            found[layer].append(rows if layer == len(model.layers) else rows[: len(share.rows)])
    return {layer: torch.cat(rows) for layer, rows in found.items()}


def parted(chosen: Choices, shares: Sequence[Share], num_layers: int) -> list[Choices]:
    """The choices for each share of a batch, in order, a row for each that its gates see: of the MTP block, number
    num_layers, the tokens that are followed by another, or all where others have parts of the row; where there is none
    it has no choice. Rows that count for nothing go to the first experts."""
    found: list[Choices] = [{} for _ in shares]
    followed = [~share.ends for share in shares]
    told = [torch.arange(len(share.ids)) < len(share.rows) for share in shares]
    seen = [rows if share.has_neighbours else rows[rows] for share, rows in zip(shares, followed, strict=True)]
    for layer, rows in chosen.items():
        kinds = seen if layer == num_layers else told
        for here, counts, own in zip(found, kinds, rows.split([int(c.sum()) for c in kinds]), strict=True):
            if len(counts):
                here[layer] = torch.arange(rows.shape[1], dtype=rows.dtype).repeat(len(counts), 1)
                here[layer][counts] = own
    return found
