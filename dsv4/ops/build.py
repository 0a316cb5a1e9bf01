"""Builds the C++ ops: every file of cpu/src/ once for each set of instructions, all into one shared library.

Run by `pip install` (setup.py), or by hand: python -m dsv4.ops.build. Needs g++ or what CXX names, nothing of torch:
the kernels take pointers, and their threads are those of the OpenMP library that torch has loaded into the process.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent / "cpu"
SOURCES = HERE / "src"
NAME = "_kernels"  # the library's, before the platform's ending

_AVX2 = ("-mavx2", "-mfma", "-mf16c")
_AVX512 = (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni")
# Sets of instructions, the least first; a machine runs the last that it has (library.py).
ISAS = {"avx2": _AVX2, "avx512": _AVX512, "avx512bf16": (*_AVX512, "-mavx512bf16")}
_FLAGS = (
    "-O3",  # at -O2 the tiles of products run at a third: their loops are not unrolled
    "-std=c++17", "-fPIC", "-fopenmp", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math",
    "-Wall", "-Wextra", "-Werror", "-Wno-psabi",
    "-Wno-uninitialized", "-Wno-maybe-uninitialized",  # GCC 12 says it of its own header
    "-Wno-ignored-attributes",
)  # fmt: skip


class BuildError(Exception):
    """Why there is no library, in one sentence."""


def digest() -> str:
    """sha256 of the sources and flags: what a library was built from is written into it."""
    seen = hashlib.sha256(repr((_FLAGS, ISAS)).encode())
    for path in sorted(SOURCES.iterdir()):
        seen.update(path.name.encode() + b"\0" + path.read_bytes())
    return seen.hexdigest()


def build(target: Path, *, reuse: bool = False) -> None:
    """Compile and link into the file `target`, which is whole or not there. BuildError if that cannot be done.

    reuse: what lies beside the sources and was built from them is copied instead.
    """
    for there in HERE.glob(f"{NAME}*.so") if reuse else ():
        if digest().encode() in there.read_bytes():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(there, target)
            return
    asked = os.environ.get("CXX", "g++")
    compiler = shutil.which(asked)
    if compiler is None:
        raise BuildError(f"no C++ compiler {asked!r} was found: install g++, or name another in CXX")
    files = sorted(SOURCES.glob("*.cpp"))
    with tempfile.TemporaryDirectory() as folder:

        def compiled(job: tuple[Path, str]) -> str:
            source, isa = job
            out = Path(folder) / f"{source.stem}-{isa}.o"
            named = (f"-DDSV4_ISA={isa}", f'-DDSV4_DIGEST="{digest()}"')
            _run(compiler, *_FLAGS, *ISAS[isa], *named, "-c", str(source), "-o", str(out))
            return str(out)

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(compiled, [(source, isa) for source in files for isa in ISAS]))
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.tmp")
        # without -fopenmp: the symbols are found in the library that torch has loaded, and no second one is
        _run(compiler, "-shared", *objects, "-o", str(temporary))
        os.replace(temporary, target)


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        first = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr.strip()[:300])
        raise BuildError(f"{command[0]} could not compile the C++ ops: {first}")


def main() -> int:
    """Build beside this file and say how long it took."""
    began = time.perf_counter()
    try:
        build(HERE / f"{NAME}.so")
    except BuildError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"built {HERE / NAME}.so in {time.perf_counter() - began:.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
