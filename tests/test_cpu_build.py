"""Failures caught here: C++ ops that are not there though there is a compiler; a library of other sources, a compiler
that is missing or fails, or a processor that cannot, which ends in anything but one sentence and the torch ops.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dsv4.ops import build

ASK = """
import logging, torch
logging.basicConfig(format="%(message)s")
from dsv4 import ops
print(ops.active("linear"), ops.linear(torch.ones(1, 2), torch.ones(1, 2)).item())
"""


def ask(program: str = ASK, **environment: str) -> tuple[str, str]:
    """(stdout, stderr) of a program in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, **environment}, capture_output=True, text=True, timeout=120
    )
    return done.stdout.strip(), done.stderr.strip()


@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="no C++ compiler here")
def test_with_a_compiler_the_library_is_there() -> None:
    out, said = ask()
    assert out == "cpu 2.0" or "need a processor with AVX2" in said, "run `make setup`, or `python -m dsv4.ops.build`"


def test_a_compiler_that_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(build.BuildError, match="no C\\+\\+ compiler 'no-such-compiler' was found: install g\\+\\+"):
        build.build(tmp_path / "kernels.so")
    assert not list(tmp_path.iterdir())


def test_a_compiler_that_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The first line that says why; nothing is left, and what was there before stays."""
    compiler, target = tmp_path / "c++", tmp_path / "kernels.so"
    compiler.write_text("#!/bin/sh\necho 'simd.h:1: error: too old' >&2\nexit 1\n")
    compiler.chmod(0o755)
    target.write_text("before")
    monkeypatch.setenv("CXX", str(compiler))
    with pytest.raises(build.BuildError, match="could not compile the C\\+\\+ ops: simd.h:1: error: too old$"):
        build.build(target)
    assert target.read_text() == "before" and {p.name for p in tmp_path.iterdir()} == {"c++", "kernels.so"}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("build.digest = lambda: 'other'", "were built from other sources than are there: run `make setup`"),
        ("build.NAME = 'absent'", "were not built (no compiler at installation?): run `make setup`"),
    ],
)
def test_a_library_that_cannot_be_used_is_said_once(change: str, told: str) -> None:
    out, said = ask(f"from dsv4.ops import build\n{change}\n{ASK}{ASK}")
    assert out.splitlines() == ["blocked 2.0"] * 2 or out.splitlines() == ["reference 2.0"] * 2
    assert said.count(told) == 1 and "Traceback" not in said


def test_instructions_that_the_machine_lacks() -> None:
    out, said = ask(DSV4_CPU="avx9000")
    assert out == "reference 2.0" and "were asked for DSV4_CPU=avx9000, but this machine has avx2" in said


def test_fewer_instructions_can_be_asked_for() -> None:
    pytest.importorskip("dsv4.ops.cpu", exc_type=ImportError)
    program = ASK + "from dsv4.ops.cpu import library\nprint(library.isa())"
    assert ask(program, DSV4_CPU="avx2")[0].splitlines() == ["cpu 2.0", "avx2"]
