"""The built library: found, checked, and its functions for the instructions of this machine.

DSV4_CPU=avx2|avx512|avx512bf16 in the environment asks for fewer instructions than the machine has; `using_isa` does so
for a stretch of code. Functions take addresses and numbers; shapes and dtypes are checked before (the forms' limits).
"""

import ctypes
import os
import sysconfig
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch  # first: it loads the OpenMP library whose threads the kernels run on
from torch import Tensor

from dsv4.ops.build import HERE, ISAS, NAME, SOURCES, digest
from dsv4.ops.limits import Limits

_KINDS = {"p": ctypes.c_void_p, "l": ctypes.c_long, "i": ctypes.c_int, "f": ctypes.c_float}
DTYPES = {torch.float32: 0, torch.bfloat16: 1, "fp8": 2, "fp4": 3}  # as in src/matmul.h

REMEDY = "run `make setup`, or `python -m dsv4.ops.build`"


def find() -> Path | None:
    """The newest library beside this file."""
    names = (f"{NAME}.so", f"{NAME}{sysconfig.get_config_var('EXT_SUFFIX')}")
    there = [HERE / name for name in names if (HERE / name).is_file()]
    return max(there, key=lambda path: path.stat().st_mtime, default=None)


def _opened() -> ctypes.CDLL:
    path = find()
    if path is None:
        raise ImportError(f"were not built (no compiler at installation?): {REMEDY}")
    try:
        lib = ctypes.CDLL(str(path))
        lib.dsv4_digest.restype = ctypes.c_char_p
        built = lib.dsv4_digest().decode()
    except (OSError, AttributeError) as error:
        raise ImportError(f"cannot be loaded ({error}): {REMEDY}") from None
    if SOURCES.is_dir() and built != digest():
        raise ImportError(f"were built from other sources than are there: {REMEDY}")
    return lib


_LIB = _opened()
_NAMES = list(ISAS)
_best = _LIB.dsv4_best_isa()
if _best < 0:
    raise ImportError("need a processor with AVX2 and FMA, which this one lacks")
AVAILABLE = tuple(_NAMES[: _best + 1])
_asked = os.environ.get("DSV4_CPU", AVAILABLE[-1])
if _asked not in AVAILABLE:
    raise ImportError(f"were asked for DSV4_CPU={_asked}, but this machine has {', '.join(AVAILABLE)}")
_isa = _asked


def isa() -> str:
    """The instructions that kernels use now."""
    return _isa


@contextmanager
def using_isa(name: str) -> Iterator[None]:
    """Use these instructions, one of AVAILABLE, inside the block (process-wide: for tests and comparisons)."""
    global _isa
    assert name in AVAILABLE, f"{name} is not one of {AVAILABLE}"
    before, _isa = _isa, name
    try:
        yield
    finally:
        _isa = before


_watchers: list[list[str]] = []


@contextmanager
def watched() -> Iterator[list[str]]:
    """The names of the functions that are called inside the block, in order."""
    names: list[str] = []
    _watchers.append(names)
    try:
        yield names
    finally:
        _watchers.remove(names)


class Kernel:
    """A function of the library, in the form for the instructions in use.

    kinds: of its arguments, a letter each: p address (or bytes, or None), l long, i int, f float.
    """

    def __init__(self, name: str, kinds: str):
        self.name, self.forms = name, {}
        for isa in AVAILABLE:
            form = getattr(_LIB, f"{name}_{isa}")
            form.argtypes, form.restype = [_KINDS[kind] for kind in kinds], None
            self.forms[isa] = form

    def __call__(self, *args: int | float | bytes | None) -> None:
        self.forms[_isa](*args)
        for names in _watchers:
            names.append(self.name)


PLAIN = (torch.float32, torch.bfloat16)


def values_only(also: Callable[..., str], dtypes: tuple[torch.dtype, ...] | None = PLAIN) -> Limits:
    """The limits of a form that gives values only, of FP32 and BF16 tensors on the CPU that `also` accepts."""
    return Limits(devices=("cpu",), dtypes=dtypes, gradient=False, also=also)


def needs_gradient(*args: Any) -> bool:
    """Whether a gradient will be asked for with respect to one of these."""
    return torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args)


def address(x: Tensor | None) -> int | None:
    """Where a tensor's numbers begin; None for none."""
    return None if x is None else x.data_ptr()
