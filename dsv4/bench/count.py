"""Instructions that the C++ ops execute in a chunk of prefill and in a decode step: a slower commit is seen without a
clock, on a loaded machine too.

valgrind's callgrind counts them, one thread, the `tiny` preset, packed memory, with AVX2 (it knows no AVX-512). Counted
is what is executed inside the library of the ops alone, so neither Python nor torch matter; the same library gives the
same counts. They say nothing about what waits for memory, nor about the AVX-512 forms of the same sources. The figures
to compare with are committed in counts.json, with the compiler, whose versions differ.
"""

import ctypes
import json
import mmap
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dsv4.errors import UserError
from dsv4.files import write_json
from dsv4.measure.rows import Row

COMMITTED = Path(__file__).with_name("counts.json")
ALLOWED = 0.05  # more instructions than committed: well above what a change of nothing does, well below a mistake
CHUNK = 256  # tokens of prefill; the step is the token after them

# A client request is a sequence of instructions that does nothing but under valgrind, with rax = the address of six
# numbers, the request first, and rdx = what it returns elsewhere (valgrind.h, callgrind.h).
_CODE = bytes.fromhex("4889f8 31d2 48c1c703 48c1c70d 48c1c73d 48c1c733 4887db 4889d0 c3")
_TOOL = ord("C") << 24 | ord("T") << 16
_ZERO, _DUMP_AT, _START = _TOOL + 1, _TOOL + 3, _TOOL + 4

Counts = dict[str, dict[str, int]]  # phase -> op -> instructions


def measure() -> Row:
    """{"compiler": ..., "counts": phase -> op -> instructions}, of the library that is there. UserError without
    valgrind or without the library."""
    from dsv4.ops.cpu import library  # ImportError says why there is none

    valgrind, built = shutil.which("valgrind"), library.find()
    if valgrind is None:
        raise UserError("instructions are counted by valgrind, which is not installed: apt-get install valgrind")
    assert built is not None
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        command = [valgrind, "--tool=callgrind", "--instr-atstart=no", f"--callgrind-out-file={out}", sys.executable]
        fixed = {"DSV4_CPU": "avx2", "DSV4_OPS": "cpu", "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("DSV4_", "OMP_"))}
        done = subprocess.run(
            [*command, "-c", "from dsv4.bench.count import work; work()"],
            env=environment | fixed, capture_output=True, text=True,
        )  # fmt: skip
        if done.returncode:
            raise UserError(f"valgrind ended with {done.returncode}: {done.stderr.strip()[-300:]}")
        counts = read(Path(folder), built.name)
    return {"compiler": compiler(built), "counts": counts}


def read(folder: Path, library: str) -> Counts:
    """The counts out of callgrind's dumps, of which each that was asked for is one call of an op."""
    counts: dict[str, Counter[str]] = {}
    for path in folder.iterdir():
        lines = path.read_text(errors="replace").splitlines()
        asked = next((found for line in lines if (found := re.search(r"Client Request: (\w+)/(\w+)", line))), None)
        if asked:
            counts.setdefault(asked[1], Counter())[asked[2]] += inside(lines, library)
    return {phase: dict(sorted(counts[phase].items())) for phase in sorted(counts, reverse=True)}


def inside(lines: Sequence[str], library: str) -> int:
    """Instructions that functions of a library executed themselves, in a profile of callgrind's format."""
    total, ours, called, names = 0, False, False, dict[str, bool]()
    for line in lines:
        if found := re.match(r"c?ob=(\(\d+\))(?: (.*))?$", line):
            if found[2] is not None:
                names[found[1]] = Path(found[2]).name == library
            if line.startswith("ob"):
                ours = names[found[1]]
        elif line.startswith("calls="):
            called = True  # the next line is the cost of what was called
        elif re.match(r"[0-9+*-]\S* \d+$", line):
            total += 0 if called or not ours else int(line.split()[1])
            called = False
    return total


def compiler(library: Path) -> str:
    """What the compiler has written into a library about itself."""
    found = re.search(rb"(?:GCC: |clang version )[^\0]{1,80}", library.read_bytes())
    return found[0].decode(errors="replace") if found else "unknown"


def committed() -> Row:
    return json.loads(COMMITTED.read_text(encoding="utf-8"))


def update(found: Row) -> None:
    """What was found is what later commits are compared with."""
    write_json(COMMITTED, found)


def compare(found: Row, before: Row) -> list[Row]:
    """A row an op and a phase: instructions now, committed ones (None: there is none), and by what share they grew."""
    rows = []
    for phase, ops in found["counts"].items():
        known = before["counts"].get(phase, {})
        for op in [*sorted({*ops, *known}), "all"]:
            now, then = (sum(of.values()) if op == "all" else of.get(op, 0) for of in (ops, known))
            rows.append(
                {"phase": phase, "op": op, "now": now, "then": then or None, "more": now / then - 1 if then else None}
            )
    return rows


def worse(rows: Sequence[Row]) -> list[Row]:
    """Those that grew by more than is allowed."""
    return [r for r in rows if r["then"] is not None and r["now"] > (1 + ALLOWED) * r["then"]]


def lines(found: Row, before: Row, rows: Sequence[Row]) -> list[str]:
    """For a person."""
    out = [f"{'':9s}{'op':18s}{'instructions':>14s}{'committed':>14s}{'more':>8s}"]
    for r in rows:
        then, more = ("", "new") if r["then"] is None else (f"{r['then']:,}", f"{r['more']:+.1%}")
        out.append(f"{r['phase']:9s}{r['op']:18s}{r['now']:14,d}{then:>14s}{more:>8s}")
    if found["compiler"] != before["compiler"]:
        out.append(
            f"compiled by {found['compiler']}, the committed figures by {before['compiler']}: these differ by that"
        )
    return out


# --- what runs under valgrind ----------------------------------------------------------------------------------------


def work() -> None:
    """A chunk and a step of a random model, each call of the library a dump of its own."""
    import torch

    from dsv4.config import ModelConfig
    from dsv4.measure.subjects import randomise, tokens
    from dsv4.model import Transformer
    from dsv4.ops.cpu import library

    torch.set_num_threads(1)
    model = randomise(Transformer(ModelConfig.preset("tiny")), std=None).eval()
    ids, memory = tokens(model, CHUNK + 1), model.new_cache(format="packed", max_rewind=0)[0]
    ask, phase = _requests(), ""

    def counted(self: Any, *args: Any) -> None:
        ask(_ZERO)
        self.forms[library.isa()](*args)
        ask(_DUMP_AT, f"{phase}/{self.name}")

    library.Kernel.__call__ = counted  # type: ignore[method-assign]
    ask(_START)
    with torch.inference_mode():
        for phase, part in (("prefill", ids[:CHUNK]), ("decode", ids[CHUNK:])):  # noqa: B007 (counted reads it)
            model(part, segments=[(len(part), memory)], rows="last")


def _requests() -> Callable[..., None]:
    """A function that makes a client request, with a text or without."""
    room = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    room.write(_CODE)
    call = ctypes.CFUNCTYPE(ctypes.c_long, ctypes.c_void_p)(ctypes.addressof(ctypes.c_char.from_buffer(room)))

    def ask(request: int, text: str = "") -> None:
        said = ctypes.create_string_buffer(text.encode())
        numbers = (ctypes.c_ulong * 6)(request, ctypes.addressof(said), 0, 0, 0, 0)
        call(ctypes.addressof(numbers))

    ask.room = room  # type: ignore[attr-defined]  (the code lives as long as the function)
    return ask
