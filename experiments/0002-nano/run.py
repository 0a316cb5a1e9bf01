"""Trains the demo's model and nano-deepseek-v4 of the same sizes for the same time on the same tokens.

`python experiments/0002-nano/run.py --nano PYTHON [--seconds 240] [--threads 2] [--out FOLDER]`: PYTHON is one that has
nano-deepseek-v4. Ours runs first, for as many steps as fit the time by a short trial; the seconds that it took are what
every run of nano-deepseek-v4 gets. Writes FOLDER/results.json and prints the table of README.md.
"""

import argparse
import json
import math
import shutil
import statistics
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dsv4.settings import merge
from dsv4.train.batches import heldout_batches
from dsv4.train.recipes import resolve
from dsv4.train.runconfig import RunConfig
from dsv4.train.trainer import Trainer

TRIAL = 6  # steps that tell how long one takes
# How nano-deepseek-v4 is trained: as it comes (its own defaults, a constant rate), and with what ours has: higher
# rates, warm-up and decay, clipping, and its own bias update called after each step. The best of them counts.
WAYS: dict[str, dict[str, Any]] = {
    "as it comes": {"lr": 2.7e-4, "helped": False},
    "helped, 1e-3": {"lr": 1e-3, "helped": True},
    "helped, 4e-3": {"lr": 4e-3, "helped": True},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nano", required=True, help="the Python that has nano-deepseek-v4")
    parser.add_argument("--seconds", type=float, default=240.0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("runs/nano"))
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    shutil.rmtree(given.out, ignore_errors=True)
    config = resolve("demo")
    found: dict[str, Any] = {"threads": given.threads, "asked_seconds": given.seconds}
    found["dsv4"] = ours(config, given.out, given.seconds)
    job = exported(Trainer(config, given.out / "data-of-both"), given.out)
    for name, way in WAYS.items():
        asked = {**job, **way, "seconds": found["dsv4"]["seconds"], "threads": given.threads}
        found[name] = theirs(given.nano, asked, found["dsv4"])
        print(name, found[name], flush=True)
    (given.out / "results.json").write_text(json.dumps(found, indent=1) + "\n")
    print(table(found))


def ours(config: RunConfig, out: Path, seconds: float) -> dict[str, Any]:
    """The demo's recipe over as many steps as fit the time."""
    trial = Trainer(config, out / "trial")
    each = statistics.median(config.data.tokens_per_step / trial.step()["tokens_per_second"] for _ in range(TRIAL))
    trial.close()
    steps = max(2, int(seconds / each))
    warmup = min(config.schedule.warmup, steps // 10)
    phases = {name: getattr(config.indexer, name) * steps // config.schedule.steps for name in ("dense", "warmup")}
    changes = {"schedule": {"steps": steps, "warmup": warmup}, "save": {"every": steps, "eval_every": steps}}
    config = merge(config, {**changes, "indexer": phases})
    run = Trainer(config, out / "dsv4")
    last: dict[str, Any] = {}
    run.run(last.update)
    return {
        "seconds": run.progress.seconds, "steps": steps, "tokens": run.progress.tokens,
        "parameters": run.model.num_parameters(mtp=True), "heldout_bpb": last["heldout_bpb"],
    }  # fmt: skip


def exported(run: Trainer, out: Path) -> dict[str, Any]:
    """The tokens that are trained on, as one stream of documents, and the held-out pieces with their targets."""
    config = run.config
    np.save(out / "train.npy", np.asarray(run.train_data.tokens, dtype=np.int32))  # type: ignore[union-attr]
    d = config.data
    held = list(heldout_batches(run.heldout, d.tokens_per_step, d.seq_len, config.save.eval_tokens))
    np.savez(
        out / "heldout.npz",
        ids=torch.cat([b.ids for b in held]).numpy(), targets=torch.cat([b.targets for b in held]).numpy(),
        lengths=np.array([n for b in held for n in b.lengths]),
    )  # fmt: skip
    model = replace(config.model)
    (out / "config.json").write_text(json.dumps(model.to_json()))
    run.close()
    return {
        "train": str(out / "train.npy"), "heldout": str(out / "heldout.npz"), "config": str(out / "config.json"),
        "seq_len": d.seq_len, "tokens_per_step": d.tokens_per_step, "clip": config.optim.clip,
        "warmup_share": config.schedule.warmup / config.schedule.steps, "decay_share": config.schedule.decay_fraction,
        "final": config.schedule.final, "num_bytes": sum(b.num_bytes for b in held),
    }  # fmt: skip


def theirs(python: str, job: dict[str, Any], mine: dict[str, Any]) -> dict[str, Any]:
    """One run in its own Python (side.py)."""
    script = Path(__file__).with_name("side.py")
    done = subprocess.run([python, str(script)], input=json.dumps(job), capture_output=True, text=True)
    if done.returncode:
        return {"failed": done.stderr.strip().splitlines()[-1:]}
    found = json.loads(done.stdout.splitlines()[-1])
    assert math.isclose(found["parameters"], mine["parameters"], rel_tol=0.02), "not the same parameter budget"
    return {**found, "heldout_bpb": found.pop("nats") / math.log(2) / job["num_bytes"]}


def table(found: dict[str, Any]) -> str:
    lines = [f"{'':24}{'parameters':>12}{'seconds':>9}{'steps':>7}{'tokens':>11}{'held-out bpb':>14}"]
    for name in ("dsv4", *WAYS):
        r = found[name]
        if "failed" in r:
            lines.append(f"{name:24}{r['failed']}")
            continue
        lines.append(
            f"{name:24}{r['parameters']:12,}{r['seconds']:9.0f}{r['steps']:7,}{r['tokens']:11,}{r['heldout_bpb']:14.3f}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
