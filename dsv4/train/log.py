"""The run's own record: log.jsonl, one JSON object per line, and the picture made from it."""

import json
import os
from pathlib import Path
from typing import Any


class Log:
    """Appends to log.jsonl; a resumed run first drops the lines after the step it goes on from."""

    def __init__(self, folder: Path, resume_step: int):
        self.path = folder / "log.jsonl"
        kept = [r for r in read_log(self.path) if r["step"] <= resume_step]
        temporary = self.path.with_name(".log.jsonl.tmp")
        temporary.write_text("".join(json.dumps(r) + "\n" for r in kept), encoding="utf-8")
        os.replace(temporary, self.path)

    def write(self, record: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")


def read_log(path: Path) -> list[dict[str, Any]]:
    """All complete lines (the last one may have been cut off by a crash)."""
    if not path.exists():
        return []
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except ValueError:
            break
    return records


def plot_loss(folder: Path, baselines: dict[str, float] | None = None) -> Path:
    """Draw loss.png from log.jsonl: training loss, held-out bits per byte, and horizontal lines for `baselines`."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    records = read_log(folder / "log.jsonl")
    train = [(r["step"], r["loss"]) for r in records if "loss" in r]
    held = [(r["step"], r["heldout_bpb"]) for r in records if "heldout_bpb" in r]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    left.plot(*zip(*train, strict=True), color="C0") if train else None
    left.set(title="training loss", xlabel="step", ylabel="nats per token")
    right.plot(*zip(*held, strict=True), "o-", color="C1", label="dsv4") if held else None
    for (name, value), style in zip((baselines or {}).items(), ("--", ":", "-."), strict=False):
        right.axhline(value, color="grey", linestyle=style, label=name)
    right.set(title="held-out text", xlabel="step", ylabel="bits per byte")
    if held:
        right.legend()
    for axis in (left, right):
        axis.grid(alpha=0.3)
    target = folder / "loss.png"
    figure.savefig(target, dpi=120)
    plt.close(figure)
    return target
