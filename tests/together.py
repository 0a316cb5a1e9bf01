"""Runs that several processes share: what starts them (parallel.py is one of them), and what compares their logs."""

import json
import math
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

PROGRAM = Path(__file__).with_name("parallel.py")
ROOT = PROGRAM.parents[1]
# Sums are taken in other orders, and that is all: about 1e-7 in fp32, which a step's optimiser hands on.
CLOSE = 1e-6
SAME = ("step", "lr", "tokens", "phase")
SUMS = ("loss", "mtp_loss", "balance", "grad_norm", "heldout_bpb", "load_max")


def documents(path: Path) -> Path:
    """A file of texts of one word to more than a row."""
    draw = random.Random(5)
    words = ["".join(draw.choices("abcdefghijklmnop", k=draw.randint(2, 7))) for _ in range(60)]
    texts = [" ".join(draw.choices(words, k=draw.choice([1, 3, 8, 30, 90, 150]))) for _ in range(300)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def job(text: Path, out: Path, *settings: str, **more: Any) -> dict[str, Any]:
    return {"name": out.name, "text": str(text), "out": str(out), "settings": list(settings), **more}


def run(world: int, jobs: list[dict[str, Any]], folder: Path, seconds: float = 240) -> list[dict[str, Any]]:
    """What each of the processes says of the jobs, which they do together."""
    listing, meeting = folder / f"jobs-{world}.json", folder / f"meet-{world}"
    listing.write_text(json.dumps(jobs))
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    words = [[sys.executable, str(PROGRAM), str(rank), str(world), str(meeting), str(listing)] for rank in range(world)]
    with (folder / "errors").open("w+") as errors:
        started = [subprocess.Popen(w, stdout=subprocess.PIPE, stderr=errors, text=True, env=env) for w in words]
        try:
            done = [child.communicate(timeout=seconds)[0] for child in started]
        finally:
            for child in started:
                child.kill()
        errors.seek(0)
        said = errors.read()
    assert all(child.returncode == 0 for child in started), said[-4000:]
    return [json.loads(out.splitlines()[-1]) for out in done]


def compare(
    expected: list[dict[str, Any]], found: list[dict[str, Any]], limit: float = CLOSE, tied: set[int] | None = None
) -> float:
    """Assert that two logs say the same; returns by how much the losses differ at most, relatively. tied: updates in
    which a tie was decided otherwise. The figures that count choices may differ in these, and the indexers, which have
    learned from other entries, may differ a little more from there on; everything else is compared as ever."""
    assert [r["step"] for r in expected] == [r["step"] for r in found]
    for one, several in zip(expected, found, strict=True):
        assert one.keys() == several.keys()
        assert all(one[name] == several[name] for name in SAME if name in one)
        free, apart = one["step"] in (tied or ()), one["step"] > min(tied or (math.inf,))
        for name in SUMS:
            if name in one and not (free and name == "load_max"):
                assert several[name] == pytest.approx(one[name], rel=limit if name == "loss" else 20 * limit), name
        for layer, value in one.get("index_kl", {}).items():
            if not free:
                assert several["index_kl"][layer] == pytest.approx(value, rel=(100 if apart else 20) * limit), layer
    return max(abs(b["loss"] / a["loss"] - 1) for a, b in zip(expected, found, strict=True))
