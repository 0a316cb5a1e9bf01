"""Failures caught here: a module whose parameters are used outside its forward, so that sharding it breaks, and a
sharded step that is not the unsharded one: gradients, their norm, Muon and AdamW on DTensors.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("sharded.py")


@pytest.mark.parametrize("processes", [1, 2])
def test_a_sharded_step_is_the_unsharded_one(tmp_path: Path, processes: int) -> None:
    words = [
        [sys.executable, str(PROGRAM), str(rank), str(processes), str(tmp_path / "meet")] for rank in range(processes)
    ]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    started = [subprocess.Popen(w, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env) for w in words]
    done = [child.communicate(timeout=120) for child in started]
    for child, (out, err) in zip(started, done, strict=True):
        assert child.returncode == 0, err[-3000:]
        figures = json.loads(out.splitlines()[-1])
        for name in ("loss", "norm", "gradients", "parameters"):
            assert figures[name] <= 1e-5, figures
        assert figures["moved"] > 1e-3, "the step must have done something"
        assert processes == 1 or 0.4 < figures["share"] < 0.6, "each process holds about half"
