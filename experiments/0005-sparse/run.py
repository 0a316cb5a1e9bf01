"""Is sparse attention, once its indexer has learned, as good as dense attention where the answer lies far away?

`python experiments/0005-sparse/run.py [--seed N] [--out FOLDER]`: minutes on one core. Trains the model of 0004-needle
with dense CSA, then goes on from there in several ways over the same rows: dense; sparse after a warm-up of the
indexer; sparse at once; sparse with an indexer that never learns. Prints the figures of README.md and writes
FOLDER/figures.json.
"""

import argparse
import importlib.util
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dsv4.train.loss import training_loss

_spec = importlib.util.spec_from_file_location("needle_run", Path(__file__).parents[1] / "0004-needle" / "run.py")
assert _spec and _spec.loader
needle: Any = importlib.util.module_from_spec(_spec)
sys.modules["needle_run"] = needle
_spec.loader.exec_module(needle)

COURSE: Any = needle.COURSE
WARM, SPARSE = COURSE[-2:]
MEAN = 20  # updates
HELD_OUT = 32  # batches
# How each goes on after the dense updates: whether the indexer warms up before, how CSA reads, and on held-out rows.
WAYS = {
    "dense": (False, "dense", "dense"),
    "warm-up, then sparse": (True, "sparse", "off"),
    "sparse at once": (False, "sparse", "off"),
    "sparse, the indexer never learns": (False, "off", "off"),
}


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@torch.no_grad()
def held_out(training: Any, phase: Any, rows: Sequence[Any]) -> float:
    """The loss at questions over rows that nobody has learned from, in nats."""
    total, count = 0.0, 0
    for ids, targets, lengths in rows:
        found = training_loss(training.model, ids, targets, lengths, mtp_weight=0.0, balance_weight=0.0, phase=phase)
        asked = int((targets >= 0).sum())
        total, count = total + found.next_token * asked, count + asked
    return total / count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/sparse"))
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    torch.set_num_threads(1)
    began = time.perf_counter()
    training = needle.Training(needle.config_of((0, 4, 128)), given.seed, needle.trunk_of(COURSE))
    dense, steps = list[float](), needle.updates_of(COURSE[:-2])
    for i, stage in enumerate(steps):
        dense.append(training.update(stage, training.batch(stage))[0])
        if (i + 1) % MEAN == 0:
            loss, seconds = sum(dense[-MEAN:]) / MEAN, time.perf_counter() - began
            say(f"dense, {i + 1} of {len(steps)}: loss {loss:.3f} {seconds:.0f} s")
    warm = [training.batch(WARM) for _ in range(WARM.steps)]
    rows = [training.batch(SPARSE) for _ in range(SPARSE.steps)]
    unseen = [training.batch(SPARSE) for _ in range(HELD_OUT)]
    found: dict[str, Any] = {"dense updates before": sum(dense[-MEAN:]) / MEAN}
    for name, (warms, phase, reads) in WAYS.items():
        mine = training.copied()
        recall = [mine.update(WARM, some)[1]["index_recall"] for some in warm] if warms else []
        stage = needle.Stage(SPARSE.steps, SPARSE.length, phase)
        losses = [mine.update(stage, some)[0] for some in rows]
        found[name] = {
            "first": sum(losses[:MEAN]) / MEAN, "last": sum(losses[-MEAN:]) / MEAN, "mean": sum(losses) / len(losses),
            "held out": held_out(mine, reads, unseen), "losses": losses, "recall in warm-up": recall,
        }  # fmt: skip
        figures = {key: value for key, value in found[name].items() if not isinstance(value, list)}
        say(f"{name}: {json.dumps(figures)} {time.perf_counter() - began:.0f} s")
    found["seconds"] = time.perf_counter() - began
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "figures.json").write_text(json.dumps(found, indent=1) + "\n")
    head = f"{'':36s} {'first ' + str(MEAN):>9s} {'last ' + str(MEAN):>9s} {'held out':>9s}"
    print(head)
    for name in WAYS:
        print(f"{name:36s} " + " ".join(f"{found[name][key]:9.4f}" for key in ("first", "last", "held out")))


if __name__ == "__main__":
    main()
