"""Failures caught here: instructions that are counted for the wrong op, twice, or outside the library; a slower op that
passes, a missing valgrind that ends in a traceback, committed figures of ops that are no longer there.
"""

import json
import shutil
import sys
from pathlib import Path

import pytest

from dsv4.bench import count
from dsv4.cli import main
from dsv4.errors import UserError

library = pytest.importorskip("dsv4.ops.cpu.library", reason="the C++ ops are not built", exc_type=ImportError)

DUMP = """# callgrind format
version: 1
desc: Trigger: Client Request: prefill/gate

positions: line
events: Ir
summary: 1116

ob=(1) /usr/lib/libpython3.so
fl=(1) ???
fn=(1) call
0 1000
cob=(2) /somewhere/_kernels.so
cfn=(2) gate_avx2
calls=1 0
0 116

ob=(2)
fn=(2)
0 10
+3 6
cob=(1)
cfn=(1)
calls=2 0
0 900
* 40

ob=(1)
fn=(3) other
0 5

ob=(2)
fn=(4) tile
-2 60

totals: 1116
"""


def test_what_the_library_executed_itself_is_counted(tmp_path: Path) -> None:
    """Not what it called, nor what called it; calls of an op are added up, by phase."""
    (tmp_path / "out.1").write_text(DUMP)
    (tmp_path / "out.2").write_text(DUMP)
    (tmp_path / "out.3").write_text(DUMP.replace("prefill/gate", "decode/block").replace("-2 60", "-2 61"))
    (tmp_path / "out").write_text(DUMP.replace("Client Request: prefill/gate", "Program termination"))
    assert count.read(tmp_path, "_kernels.so") == {"prefill": {"gate": 2 * 116}, "decode": {"block": 117}}
    assert count.read(tmp_path, "libpython3.so")["decode"] == {"block": 1005}


def found(**ops: int) -> dict:
    return {"compiler": "GCC: 1", "counts": {"decode": ops}}


def test_an_op_that_grew_is_told() -> None:
    before = found(gate=1000, experts=9000, gone=10)
    rows = count.compare(found(gate=1050, experts=9000, new=7), before)
    assert [(r["op"], r["then"]) for r in rows] == [
        ("experts", 9000), ("gate", 1000), ("gone", 10), ("new", None), ("all", 10010)
    ]  # fmt: skip
    assert count.worse(rows) == [] and "new" in "\n".join(count.lines(found(), before, rows))
    rows = count.compare(found(gate=1051, experts=9000), before)
    assert [r["op"] for r in count.worse(rows)] == ["gate"]
    assert "compiled by" not in "\n".join(count.lines(found(), before, rows))
    assert "compiled by GCC: 1" in "\n".join(count.lines(found(), before | {"compiler": "GCC: 2"}, rows))


def test_the_committed_figures_are_of_ops_that_are_there() -> None:
    kept = count.committed()
    assert set(kept["counts"]) == {"prefill", "decode"} and "blocks" in kept["counts"]["decode"]
    for ops in kept["counts"].values():
        for op, instructions in ops.items():
            assert instructions > 0 and hasattr(library._LIB, f"{op}_avx2"), op


def test_the_verb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """Exit code 1 where an op grew, until that is committed."""
    kept = tmp_path / "counts.json"
    kept.write_text(json.dumps(found(gate=1000)))
    monkeypatch.setattr(count, "COMMITTED", kept)
    monkeypatch.setattr(count, "measure", lambda: found(gate=2000))

    def run(*options: str) -> int:
        monkeypatch.setattr(sys, "argv", ["dsv4", "bench", "count", *options])
        try:
            main()
        except SystemExit as stop:
            return int(stop.code or 0)
        return 0

    assert run() == 1
    out, err = capsys.readouterr()
    assert "+100.0%" in out and "more instructions than committed: gate (decode)" in err
    assert run("--update") == 0 and run("--json") == 0
    assert json.loads(kept.read_text())["counts"] == {"decode": {"gate": 2000}}


def test_without_valgrind_one_sentence_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(UserError, match="valgrind, which is not installed: apt-get install valgrind"):
        count.measure()


@pytest.mark.slow  # a minute
@pytest.mark.skipif(shutil.which("valgrind") is None, reason="valgrind is not installed")
def test_the_same_library_gives_the_same_counts() -> None:
    first = count.measure()
    assert first == count.measure() and set(first["counts"]) == {"prefill", "decode"}
    assert {"sparse_attention", "experts", "index_scores_topk"} <= set(first["counts"]["prefill"])
