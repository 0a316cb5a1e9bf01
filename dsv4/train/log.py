"""The run's own record: log.jsonl, one JSON object per line, and the picture made from it.

A line with a `loss` is an update; one with an `event` says what else happened after that step. Whether the loss has
left its own past is told from the record too, so that a resumed run tells the same.
"""

import json
import logging
import os
from collections import deque
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dsv4.checkpoint import RunFolder
from dsv4.files import explained, write_text

log = logging.getLogger("dsv4")

WINDOW = 10  # losses whose mean is compared with the lowest such mean so far
FAR = 0.5  # nats above it, and a tenth of it on top: no noise of batches reaches that far
MACHINE = (
    "tokens_per_second",
    "optimizer_share",
    "anticipatory_share",
    "memory_bytes",
    "mfu",
)  # of the machine that ran, not of the run
SMOOTHED = 0.9  # weight of the past in the picture's smoothed line


class Log:
    """Appends to log.jsonl; a resumed run first drops the lines after the step it goes on from.

    writes: of several processes that share a run one does; the others only know what is there.
    """

    def __init__(self, path: Path, resume_step: int, *, writes: bool = True):
        self.path, self.writes = path, writes
        self.records = [r for r in read_log(self.path) if r["step"] <= resume_step]
        if writes:
            write_text(self.path, "".join(_line(r) for r in self.records))

    def write(self, record: dict[str, Any]) -> None:
        """Add a line. FileError if it cannot be: the run's checkpoints are not touched by that."""
        if not self.writes:
            return
        with explained(self.path, safe="the checkpoints are whole"), self.path.open("a", encoding="utf-8") as file:
            file.write(_line(record))

    def synchronise(self) -> None:
        """Have every line on the disk, so that no checkpoint is newer than its line, whatever happens next."""
        if not self.writes:
            return
        with explained(self.path, safe="the checkpoints are whole"), self.path.open("a", encoding="utf-8") as file:
            os.fsync(file.fileno())


class LossWatch:
    """Tells when the training loss has left its own past: the mean of ten updates far above the lowest such mean."""

    def __init__(self, losses: Iterable[float] = ()):
        self._newest: deque[float] = deque(maxlen=WINDOW)
        self.lowest = float("inf")
        self.diverging = False
        for loss in losses:
            self.push(loss)

    def push(self, loss: float) -> bool:
        """Enter the loss of an update; True if the run is diverging now."""
        self._newest.append(loss)
        if len(self._newest) == WINDOW:
            mean = sum(self._newest) / WINDOW
            self.lowest = min(self.lowest, mean)
            self.diverging = mean > 1.1 * self.lowest + FAR
        return self.diverging


def read_log(path: Path) -> list[dict[str, Any]]:
    """All records; the last line may have been cut off by a crash, damaged ones are left out and counted aloud."""
    if not path.exists():
        return []
    with explained(path, "read"):
        lines = path.read_bytes().split(b"\n")
    records, damaged = [], 0
    for number, line in enumerate(lines, start=1):
        record = _record(line)
        if record is not None:
            records.append(record)
        elif line.strip() and number < len(lines):
            damaged += 1
    if damaged:
        log.warning("%s has %d damaged lines, which are left out", path, damaged)
    return records


def reproducible(record: dict[str, Any]) -> dict[str, Any]:
    """What a record says that the same run says again anywhere and at any time."""
    return {name: value for name, value in record.items() if name not in MACHINE}


def _record(line: bytes) -> dict[str, Any] | None:
    """A line's record: an object with a step, and numbers where there are figures."""
    try:
        record = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or type(record.get("step")) is not int:
        return None
    figures = (record[name] for name in ("loss", "heldout_bpb") if name in record)
    return record if all(type(value) in (int, float) for value in figures) else None


def _line(record: dict[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=False) + "\n"


def plot_loss(folder: Path, baselines: dict[str, float] | None = None) -> Path:
    """Draw the loss.png of a run folder from its log: training loss, held-out bits per byte, lines for `baselines`.

    The training loss of single updates is faint, its smoothed course in front; final values stand in the legends.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    run = RunFolder(folder)
    records = read_log(run.log)
    train = [(r["step"], r["loss"]) for r in records if "loss" in r]
    held = [(r["step"], r["heldout_bpb"]) for r in records if "heldout_bpb" in r]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    if train:
        steps, losses = zip(*train, strict=True)
        course = smoothed(losses)
        left.plot(steps, losses, color="C0", alpha=0.3, linewidth=0.8)
        left.plot(steps, course, color="C0", label=f"smoothed; {course[-1]:.3f} at step {steps[-1]}")
        left.legend()
    left.set(title="training loss", xlabel="step", ylabel="nats per token")
    if held:
        right.plot(*zip(*held, strict=True), "o-", color="C1", label=f"dsv4; {held[-1][1]:.3f} at step {held[-1][0]}")
    for (name, value), style in zip((baselines or {}).items(), ("--", ":", "-."), strict=False):
        right.axhline(value, color="grey", linestyle=style, label=f"{name}; {value:.3f}")
    right.set(title="held-out text", xlabel="step", ylabel="bits per byte")
    if held:
        right.legend()
    for axis in (left, right):
        axis.grid(alpha=0.3)
    target = run.picture
    with explained(target, safe="the run itself is complete"):
        figure.savefig(target, dpi=120)
    plt.close(figure)
    return target


def smoothed(values: Iterable[float]) -> list[float]:
    """The exponential mean of all values so far, unbiased at the start."""
    out, mean, weight = [], 0.0, 0.0
    for value in values:
        mean, weight = SMOOTHED * mean + (1 - SMOOTHED) * value, SMOOTHED * weight + 1 - SMOOTHED
        out.append(mean / weight)
    return out
