"""Makes the numbers beside it: a run of 22 steps through the three phases in which the indexers learn.

`python tests/golden/phases/make.py` prints how far today's code is from them; `--write` replaces them, which a
refactoring never does. Everything is seeded, on one thread, in fp32: 8 dense steps, 6 of warm-up, 8 sparse ones.
"""

import argparse
import importlib.util
import json
import random
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from dsv4.settings import merge
from dsv4.train.recipes import RECIPES
from dsv4.train.trainer import Trainer

HERE = Path(__file__).parent
DENSE, WARMUP, STEPS = 8, 6, 22
KEPT = (
    "phase", "loss", "mtp_loss", "balance", "grad_norm", "index_kl", "index_recall", "index_mass", "index_grad_norm",
    "heldout_bpb",
)  # fmt: skip

_SPEC = importlib.util.spec_from_file_location("golden_run", HERE.parent / "run" / "make.py")
assert _SPEC and _SPEC.loader
_run = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(_run)
machine = _run.machine


def everything() -> list[dict[str, Any]]:
    """The figures of every step as they are computed now."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        return train(Path(folder))


def train(folder: Path) -> list[dict[str, Any]]:
    rng = random.Random(1)
    texts = folder / "texts.jsonl"
    documents = (" ".join(rng.choices(_run.WORDS, k=rng.randrange(1, 90))) for _ in range(60))
    texts.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    changes: dict[str, Any] = {
        "data": {"path": str(texts), "tokenizer": "bytes", "seq_len": 300, "tokens_per_step": 512, "micro_batches": 2},
        "schedule": {"steps": STEPS, "warmup": 3, "decay_fraction": 0.4},
        "loss": {"balance": 1e-2},
        "indexer": {"train": True, "dense": DENSE, "warmup": WARMUP, "lr": 4e-3},
        "save": {"every": STEPS, "eval_every": 11, "eval_tokens": 1000},
    }
    run = Trainer(merge(replace(RECIPES["tiny"](), model=_run.config()), changes), folder / "run")
    records: list[dict[str, Any]] = []
    run.run(lambda record: records.append({name: record[name] for name in KEPT if name in record}))
    return records


def kept() -> dict[str, Any]:
    """The figures as they are on file, and the machine that they are of."""
    return json.loads((HERE / "phases.json").read_text())


def differences(now: list[dict[str, Any]], then: list[dict[str, Any]]) -> dict[str, float]:
    """The largest relative difference of each figure."""
    out: dict[str, float] = {}
    for a, b in zip(now, then, strict=True):
        assert a.keys() == b.keys() and a["phase"] == b["phase"]
        for name in a.keys() - {"phase"}:
            ours, theirs = (x[name] if isinstance(x[name], dict) else {"": x[name]} for x in (a, b))
            assert ours.keys() == theirs.keys()
            worst = max(abs(ours[key] - theirs[key]) / max(abs(theirs[key]), 1e-9) for key in ours)
            out[name] = max(out.get(name, 0.0), worst)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="replace the numbers on file")
    now = everything()
    if parser.parse_args().write:
        (HERE / "phases.json").write_text(json.dumps({"birth": machine(), "steps": now}, indent=1) + "\n")
    for name, value in differences(now, kept()["steps"]).items():
        print(f"{value:9.2e}  {name}")


if __name__ == "__main__":
    sys.exit(main())
