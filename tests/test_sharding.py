"""Failures caught here: a module whose parameters are used outside its forward, so that sharding it breaks; a sharded
step that is not the unsharded one: gradients, their norm, Muon and AdamW on DTensors; a model that begins with other
numbers when processes share it, or that must be whole in one of them to begin at all; processes that wait for ever for
a gradient that one of them does not have.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from dsv4.model import init

PROGRAM = Path(__file__).with_name("sharded.py")


def run(what: str, processes: int, folder: Path) -> list[dict[str, Any]]:
    """The figures that each of the processes prints."""
    words = [
        [sys.executable, str(PROGRAM), what, str(rank), str(processes), str(folder / "meet")]
        for rank in range(processes)
    ]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    started = [subprocess.Popen(w, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env) for w in words]
    done = [child.communicate(timeout=120) for child in started]
    for child, (_, err) in zip(started, done, strict=True):
        assert child.returncode == 0, err[-3000:]
    return [json.loads(out.splitlines()[-1]) for out, _ in done]


@pytest.mark.parametrize("processes", [1, 2])
def test_a_sharded_step_is_the_unsharded_one(tmp_path: Path, processes: int) -> None:
    for figures in run("step", processes, tmp_path):
        for name in ("loss", "norm", "gradients", "parameters"):
            assert figures[name] <= 1e-5, figures
        assert figures["moved"] > 1e-3, "the step must have done something"
        assert processes == 1 or 0.4 < figures["share"] < 0.6, "each process holds about half"


@pytest.mark.parametrize("processes", [1, 2])
def test_a_process_to_whose_batch_most_contributes_nothing_stalls_none(tmp_path: Path, processes: int) -> None:
    """In every phase of the indexers, of which some leave most parameters frozen."""
    for figures in run("uneven", processes, tmp_path):
        assert figures.keys() == {"off", "dense", "warmup", "sparse"}
        assert all(value <= 1e-5 for value in figures.values()), figures


# --- how a sharded model begins --------------------------------------------------------------------------------------


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_a_sharded_model_begins_as_the_whole_one(tmp_path: Path, processes: int) -> None:
    """Made on the meta device, cut, then initialised: every process has its rows of the model made whole, bit for bit,
    and no more memory than a block beside them. Three processes cut unequal parts, of some parameters none."""
    for figures in run("start", processes, tmp_path):
        assert figures["other_parameters"] == figures["other_buffers"] == [], figures
        assert figures["same_generator"] and figures["same_logits"], figures
        assert 0 < figures["scratch"] <= figures["block"], figures
        assert figures["largest"] > 4 * figures["scratch"], "a parameter must be larger than what is made for it"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_numbers_drawn_in_blocks_are_those_drawn_at_once(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """torch draws fewer than 16 numbers another way, and the last 16 anew where they are no multiple of 16."""
    monkeypatch.setattr(init, "BLOCK", 64)
    for count in [*range(1, 40), *range(60, 100), *range(120, 150), 1000, 4096]:
        torch.manual_seed(3)
        once, after = torch.empty(count, dtype=dtype).normal_(0.0, 0.02), torch.rand(3)
        torch.manual_seed(3)
        blocks = [(start, values.clone()) for start, values in init.normal_blocks(count, 0.02, dtype)]
        assert torch.equal(torch.cat([values for _, values in blocks]), once), count
        assert torch.equal(torch.rand(3), after), f"{count} numbers leave the generator elsewhere"
        assert max(len(values) for _, values in blocks) <= 64 + 15
        assert [start for start, _ in blocks] == list(range(0, 64 * len(blocks), 64))
