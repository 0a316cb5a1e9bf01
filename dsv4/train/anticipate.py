"""Anticipatory routing (paper, on training stability): the parameters of update t - delay choose the experts of t.

Features, scores and the weights of the experts are those of the parameters that learn; only which experts a token goes
to is decided earlier. The paper reads the batch of update t early and computes and keeps its choice at t - delay, when
those parameters are the current ones, so no second set of parameters is ever held. So here: before update s a pass
without a graph chooses for batch s + delay. Where it is switched on, the choices of the first `delay` updates are made
at once, by the oldest parameters that there are: their delay grows from 0 to `delay`. Hash layers have no choice to
make. It is off unless asked for; with `when: spike` it begins with a rollback, where the loss jumps (`Spikes`).

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
from dsv4.train.balance import learned_gates

FILE = "anticipated.safetensors"  # of a checkpoint: what has been chosen for updates to come
WHEN = ("off", "spike", "always")
LARGEST = 10**6

_READS: dict[IndexPhase, IndexPhase] = {"warmup": "dense", "sparse": "off"}  # the same entries, without indexers' loss
Choices = dict[int, Tensor]  # by number of a layer: int64 [rows of the batch, K]


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

    def check_processes(self, several: bool) -> None:
        """UserError where several processes share the run: the choices of each are not in the others' checkpoints."""
        if several and self.when != "off":
            raise UserError(
                f"anticipatory.when={self.when} needs a run of one process: leave it at off, or start one process"
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

    chosen: by number of the update, what `choose(step)` gave and the update before which that was.
    """

    def __init__(self, config: AnticipatoryConfig, steps: int, until: int = 0):
        self.config, self.steps = config, steps
        self.until = steps if config.when == "always" else until
        self._chosen: dict[int, tuple[int, Choices]] = {}

    def active(self, step: int) -> bool:
        return step < self.until and self.config.when != "off"

    def before(self, step: int, choose: Callable[[int], Choices]) -> tuple[int, Choices]:
        """Make what is lacking up to update step + delay with the parameters as they are before update `step`; how many
        updates old what that update is to take is, and what it is."""
        for n in range(step, min(step + self.config.delay + 1, self.until, self.steps)):
            if n not in self._chosen:
                self._chosen[n] = step, choose(n)
        self._chosen = {n: kept for n, kept in self._chosen.items() if n >= step}
        made, chosen = self._chosen[step]
        return step - made, chosen

    def forget(self, until: int) -> None:
        """After a rollback: nothing of another course, on until there."""
        self._chosen, self.until = {}, max(self.until, until)

    def write(self, folder: Path, step: int, *, safe: str) -> None:
        """Beside a checkpoint before update `step`, where there is something to keep."""
        kept = {n: of for n, of in self._chosen.items() if n >= step}
        tensors = {
            f"{n}.{made}.{layer}": rows.to(torch.int32).contiguous()
            for n, (made, chosen) in kept.items()
            for layer, rows in chosen.items()
        }
        if tensors:
            write_tensors(folder / FILE, tensors, safe=safe)

    def read(self, tensors: Mapping[str, Tensor]) -> None:
        """What `write` wrote."""
        self._chosen = {}
        for name, rows in tensors.items():
            n, made, layer = map(int, name.split("."))
            self._chosen.setdefault(n, (made, {}))[1][layer] = rows.long()


@contextmanager
def routed(model: LanguageModel, chosen: Choices | None):
    """In this block the learned gates take these choices, one row for each that they see; in the backward pass too,
    which may compute them again."""
    gates = learned_gates(model) if chosen is not None else {}
    for layer, gate in gates.items():
        gate.anticipated = (chosen or {}).get(layer)
    try:
        yield
    finally:
        for gate in gates.values():
            gate.anticipated = None


@torch.no_grad()
def choose(model: LanguageModel, parts: Sequence[Any], phase: IndexPhase) -> Choices:
    """What the gates choose for the parts of a batch (their ids and lengths), by the parameters as they are."""
    found: dict[int, list[Tensor]] = {}
    for part in parts:
        trunk = model.trunk(part.ids, [Segment(n) for n in part.lengths], _READS.get(phase, phase))
        routing = dict(enumerate(trunk.routing))
        if model.predicts_next and max(part.lengths) > 1:
            routing[len(model.layers)] = model.predict_next(trunk, part.ids)[2]
        for layer in learned_gates(model):
            if (decided := routing.get(layer)) is not None:
                found.setdefault(layer, []).append(decided.chosen)
    return {layer: torch.cat(rows) for layer, rows in found.items()}


def parted(chosen: Choices, parts: Sequence[Any], num_layers: int) -> list[Choices]:
    """The choices of each part of a batch, in order. The MTP block, number num_layers, has no row for the last token of
    a sequence, and none at all in a part without a sequence of two."""
    drafted = [sum(n - 1 for n in part.lengths) for part in parts]
    sizes = [len(part.ids) for part in parts]
    cut = {n: rows.split(drafted if n == num_layers else sizes) for n, rows in chosen.items()}
    return [{n: pieces[i] for n, pieces in cut.items() if len(pieces[i])} for i in range(len(parts))]
