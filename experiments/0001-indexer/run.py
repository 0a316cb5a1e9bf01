"""Trains a small V4 through its three phases, and beside the third what it is to be judged by.

`python experiments/0001-indexer/run.py [--out FOLDER]`: minutes on one core. The phases are those of the recipe
`phases`. Where the warm-up ends, the run is continued in three ways, over the same batches at the same rates:

    dense       every entry goes on being read: the trend
    sparse      what the indexer chooses is read, and it goes on learning: the third phase
    untrained   the same without warm-up or loss: an indexer as it began

Prints the figures of README.md as a table, and writes all records to FOLDER/figures.json.
"""

import argparse
import json
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from dsv4.train.recipes import resolve
from dsv4.train.runconfig import RunConfig
from dsv4.train.trainer import Trainer

SMOOTH = 20  # updates whose mean loss is compared


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/indexer"))
    parser.add_argument("settings", nargs="*", help="key=value, as for dsv4 train")
    given = parser.parse_args()
    config = resolve("phases", None, given.settings)
    torch.set_num_threads(1)
    shutil.rmtree(given.out, ignore_errors=True)
    figures = json.loads(json.dumps(experiment(config, given.out)))
    (given.out / "figures.json").write_text(json.dumps(figures) + "\n")
    print(table(figures))


def experiment(config: RunConfig, out: Path) -> dict[str, Any]:
    """The records of the first two phases and of the three ways on, each with its held-out bits per byte."""
    start, i, began = Trainer(config, out / "start"), config.indexer, time.perf_counter()
    before = [record for record in steps(start, i.dense)]
    initial = [p.detach().clone() for p in start.indexers]
    before += steps(start, i.dense + i.warmup)
    figures: dict[str, Any] = {"before": before, "start_bpb": start.evaluate()}
    start.save()
    start.close()
    for way in ("dense", "sparse", "untrained"):
        shutil.copytree(out / "start", out / way)
        run = Trainer(config, out / way, resume="auto")
        if way == "untrained":
            with torch.no_grad():
                for p, was in zip(run.indexers, initial, strict=True):
                    p.copy_(was)
        if way != "sparse":
            phase = "dense" if way == "dense" else "off"
            run.phase = lambda step, phase=phase: phase  # type: ignore[method-assign, misc]
        figures[way] = list(steps(run, config.schedule.steps))
        figures[f"{way}_bpb"] = run.evaluate()
        run.close()
    return {**figures, "minutes": (time.perf_counter() - began) / 60}


def steps(run: Trainer, end: int) -> Iterator[dict[str, Any]]:
    """The records of the updates up to number `end`."""
    while run.progress.step < end:
        record = run.step()
        if record["step"] % 20 == 0:
            print(record["step"], f"{record['loss']:.3f}", record.get("index_recall", ""), file=sys.stderr, flush=True)
        yield record


def table(figures: dict[str, Any]) -> str:
    learning = [r for r in figures["before"] if "index_recall" in r]
    lines = [f"{'':34}{'warm-up, first':>16}{'warm-up, last':>16}{'sparse, last':>16}"]
    ends = (learning[:1], learning[-5:], figures["sparse"][-5:])
    for name, what in (("index_kl", "KL"), ("index_recall", "recall of the true top-k"), ("index_mass", "mass")):
        for layer in learning[0][name]:
            values = (fmean(r[name][layer] for r in records) for records in ends)
            lines.append(f"{what + ', layer ' + layer:34}" + "".join(f"{v:16.3f}" for v in values))
    lines.append("")
    lines.append(f"{'':34}{'last loss':>16}{'worst beside dense':>20}{'held-out bpb':>16}")
    dense = smoothed(figures["dense"])
    for way in ("dense", "sparse", "untrained"):
        own = smoothed(figures[way])
        worst = max(a / b - 1 for a, b in zip(own, dense, strict=True))
        lines.append(f"{way:34}{own[-1]:16.4f}{worst:20.2%}{figures[f'{way}_bpb']:16.4f}")
    return "\n".join([*lines, "", f"{figures['minutes']:.1f} minutes"])


def smoothed(records: list[dict[str, Any]]) -> list[float]:
    """Mean losses of `SMOOTH` updates, from every update on that has as many before it."""
    losses = [r["loss"] for r in records]
    return [fmean(losses[i : i + SMOOTH]) for i in range(len(losses) - SMOOTH + 1)]


if __name__ == "__main__":
    main()
