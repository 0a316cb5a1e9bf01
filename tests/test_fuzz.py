"""Failures caught here: a damaged or hostile checkpoint that is loaded, ends in a traceback, fills the memory, runs
something or is read outside its folder (a short cut of `make fuzz`, and whether that would notice).
"""

import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import fuzz
import pytest

from dsv4.errors import UserError

CASES = 250


def test_a_few_hundred_cases() -> None:
    command = [sys.executable, fuzz.__file__, "--cases", str(CASES), "--seed", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and f"{CASES} cases, seed 1: 0 wrong" in done.stdout, done.stdout + done.stderr
    rows = [line.rsplit(maxsplit=4) for line in done.stdout.splitlines()[1 : 1 + len(fuzz.SPOILERS)]]
    assert [row[0] for row in rows] == list(fuzz.SPOILERS)
    assert all(int(row[1]) + int(row[2]) > 0 for row in rows), "a way of spoiling was never drawn"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[fuzz.Fuzz]:
    made = fuzz.Fuzz(tmp_path_factory.mktemp("fuzz"), seed=0)
    yield made
    made.watch.folder = None


def unpickles(folder: Path) -> None:
    for file in sorted(folder.iterdir()):
        if file.is_file():
            try:
                pickle.loads(file.read_bytes())
            except (pickle.UnpicklingError, EOFError, ValueError, KeyError, IndexError, AttributeError):
                pass
    raise UserError("no")


def stumbles(folder: Path) -> None:
    raise KeyError("weight_map")


def accepts(folder: Path) -> None:
    return None


def strays(folder: Path) -> None:
    os.close(os.open(Path(sys.prefix) / "pyvenv.cfg", os.O_RDONLY))
    raise UserError("no")


def rambles(folder: Path) -> None:
    raise UserError("one line\nand another")


@pytest.mark.parametrize(("loader", "says"), [
    (unpickles, "pickle was executed"), (unpickles, "pickle.find_class"), (stumbles, "load ended in KeyError"),
    (accepts, "load accepts it"), (strays, "did ['open "), (rambles, "load says"),
])  # fmt: skip
def test_it_would_notice(runs: fuzz.Fuzz, monkeypatch: pytest.MonkeyPatch, loader, says: str) -> None:
    """A loader that does what none may do."""
    monkeypatch.setattr(fuzz, "load", loader)
    monkeypatch.setattr(fuzz, "SPOILERS", {"pickle under another name": fuzz.SPOILERS["pickle under another name"]})
    runs.failures.clear()
    for number in range(12):
        runs.run(number)
    assert any(says in failure for failure in runs.failures), runs.failures


def test_a_case_is_the_same_again(runs: fuzz.Fuzz) -> None:
    """What number and seed decide, nothing else does: so a failure can be looked at."""
    seen = []
    for _ in range(2):
        runs.outcomes = {name: fuzz.Counter() for name in fuzz.SPOILERS}
        runs.failures.clear()
        for number in range(20):
            runs.run(number)
        assert not runs.failures
        seen.append(runs.outcomes)
    assert seen[0] == seen[1]
