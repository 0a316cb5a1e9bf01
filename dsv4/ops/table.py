"""Which form of an op runs: chosen at every call, by what the arguments are.

An op is a name with one signature (ops/__init__.py). A form of it is a function of that name and signature in a
backend's module; what the form does not serve stands in the module's `LIMITS` (op -> ops/limits.py). Forms are tried
fastest first and the first that serves the call runs; the reference serves every call. Why a form was passed over is
said once, through logging.getLogger("dsv4"). DSV4_OPS in the environment, or `using`, puts one backend first and leaves
the faster ones out.

`cpu` and `triton` are imported at the first call whose first argument is on their device. Their import raises
ImportError with a reason where the machine cannot run them (no such instructions, no compiler). A backend whose module
does not exist is not built.
"""

import importlib
import importlib.util
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from types import ModuleType
from typing import Any, Protocol

import torch

from dsv4.errors import UserError

log = logging.getLogger("dsv4")

# Every op; each has a function of this name in dsv4/ops/__init__.py, whose first argument is a tensor.
OPS = (
    "sparse_attention", "index_scores_topk", "best_rows", "topk_lowest", "compress", "rotate", "sinkhorn", "hyper_maps",
    "hyper_enter", "hyper_write", "head_collapse", "linear", "project_in", "project_out", "compressor_rows",
    "gate", "experts", "mlp", "cross_entropy", "index_kl", "pack_rows", "unpack_rows",
)  # fmt: skip
ORDER = ("triton", "cpu", "blocked", "reference")  # fastest first
BACKENDS = ("auto", *reversed(ORDER))


class Condition(Protocol):
    """What a form serves: "" or the reason why not."""

    def refuses(self, *args: Any) -> str:
        """For the arguments of a call."""
        ...

    def refuses_kind(self, *args: Any) -> str:
        """The same from the kinds of the arguments alone (device, dtype, ...), which need not be all of them."""
        ...


@dataclass(frozen=True)
class Lazy:
    """A backend that is imported when a tensor on `device` comes by."""

    module: str
    device: str


LAZY = {"triton": Lazy("dsv4.ops.triton", "cuda"), "cpu": Lazy("dsv4.ops.cpu", "cpu")}

TABLE: dict[str, dict[str, Callable]] = {name: {} for name in OPS}  # op -> form -> function, as far as imported
_limits: dict[tuple[str, str], Condition] = {}  # (op, form); a form without an entry serves every call
_tried: dict[str, str] = {}  # lazy backend -> "", or why there is none
_said: set[tuple[str, str, str]] = set()  # (op, form, reason)
_tries: dict[tuple[str, str, str], list[tuple[str, Condition | None]]] = {}  # as `_forms_for` has found them
_wraps: dict[str, Callable] = {}
_orders = {"auto": ORDER, **{form: ORDER[i:] for i, form in enumerate(ORDER)}}
_wanted = os.environ.get("DSV4_OPS", "auto")


# --- backends --------------------------------------------------------------------------------------------------------


def enrol(backend: str, module: ModuleType) -> None:
    """Enter every op that a backend's module has, with its limits."""
    limits = getattr(module, "LIMITS", {})
    for name in OPS:
        if hasattr(module, name):
            TABLE[name][backend] = getattr(module, name)
            if name in limits:
                _limits[name, backend] = limits[name]
    _tries.clear()


def _try(backend: str) -> str:
    """Import a lazy backend, once: "" or why there is none."""
    if backend not in _tried:
        _tried[backend] = "not built"
        if _is_built(backend):
            try:
                enrol(backend, importlib.import_module(LAZY[backend].module))
                _tried[backend] = ""
            except ImportError as e:
                _tried[backend] = f"cannot be imported: {e}"
                log.warning("the %s ops %s", backend, _tried[backend])
    return _tried[backend]


def _is_built(backend: str) -> bool:
    return importlib.util.find_spec(LAZY[backend].module) is not None


def _absent(backend: str, device: str) -> str:
    """Why a backend has no form of any op for tensors on `device`; it is imported if it may have one."""
    if backend not in LAZY:
        return ""
    return _try(backend) if LAZY[backend].device == device else f"for {LAZY[backend].device} tensors"


# --- calls -----------------------------------------------------------------------------------------------------------


def call(name: str, *args: Any) -> Any:
    """Run an op by the first form that serves these arguments."""
    return _gate(name, *args)


def _run(name: str, *args: Any) -> Any:
    wrap = _wraps.get(name)
    return wrap(*args) if wrap is not None else _serve(name, *args)


_gate: Callable = _run


def keep_out_of_graphs() -> None:
    """From now on torch.compile leaves ops as they are and compiles what lies between them.

    Their loops over blocks are planned on the host from the numbers of a run, so a graph would hold for that run alone.
    To be called before something that uses ops is compiled: it imports the compiler, which nothing else here does.
    """
    global _gate
    _gate = torch.compiler.disable(_run)


def _serve(name: str, *args: Any) -> Any:
    asked = (name, args[0].device.type, _wanted)
    for form, limits in _tries.get(asked) or _forms_for(*asked):
        reason = limits.refuses(*args) if limits is not None else ""
        if not reason:
            return TABLE[name][form](*args)
        _say(name, form, reason)
    raise AssertionError(f"no form of {name} serves: the reference must serve every call")


def _forms_for(name: str, device: str, wanted: str) -> list[tuple[str, Condition | None]]:
    """The forms to try, in order, kept from call to call; a backend asked for by name that is not there is said."""
    found = []
    for form in _order():
        absent = _absent(form, device)
        if absent and form == _wanted:
            _say("", form, absent)
        if not absent and form in TABLE[name]:
            found.append((form, _limits.get((name, form))))
    _tries[name, device, wanted] = found
    return found


def _order() -> tuple[str, ...]:
    if _wanted not in _orders:
        raise UserError(f"DSV4_OPS={_wanted!r} is unknown: use one of {', '.join(BACKENDS)}")
    return _orders[_wanted]


def _say(name: str, form: str, reason: str) -> None:
    """Once for each (op, form, reason): a warning where the backend was asked for by name, else an information."""
    if (name, form, reason) not in _said:
        _said.add((name, form, reason))
        level = logging.WARNING if form == _wanted else logging.INFO
        log.log(level, "the %s form of %s does not serve: %s", form, name or "any op", reason)


# --- asking and choosing ---------------------------------------------------------------------------------------------


def explain(name: str, device: str = "cpu", dtype: torch.dtype = torch.float32) -> dict[str, str]:
    """Every backend in the order in which it would be tried: "" if its form serves in general, or why not.

    In general: plain tensors of `dtype` on `device` without gradient. A form may still refuse a shape.
    """
    found = {}
    like = torch.empty(0, dtype=dtype, device=device)
    for form in _order():
        found[form] = _absent(form, device) or ("" if form in TABLE[name] else "has no form of it")
        if form in LAZY and not _is_built(form):
            found[form] = "not built"
        elif not found[form] and (limits := _limits.get((name, form))) is not None:
            found[form] = limits.refuses_kind(like)
    return found


def refusal(name: str, form: str, *args: Any) -> str:
    """ "" if an enrolled form of an op serves a call with these arguments, or why not."""
    limits = _limits.get((name, form))
    return limits.refuses(*args) if limits is not None else ""


def active(name: str, device: str = "cpu", dtype: torch.dtype = torch.float32) -> str:
    """The form that serves an op in general (see `explain`); UserError for an unknown DSV4_OPS."""
    return next(form for form, reason in explain(name, device, dtype).items() if not reason)


def whole_blocks(device: torch.device) -> Any:
    """What of a backend runs a block in one call (ops/cpu/block.py), or None: it has none for tensors of this device,
    another was asked for, or ops are wrapped, which nothing may then pass by."""
    return None if _wraps else _of_cpu("block", device)


def whole_updates(device: torch.device) -> Any:
    """What of a backend makes Muon's updates in one call (ops/cpu/newton_schulz.py), or None, as above."""
    return _of_cpu("newton_schulz", device)


def _of_cpu(module: str, device: torch.device) -> Any:
    """A module of the cpu backend that no op stands for; None where another is asked for or it cannot be used."""
    if device.type != "cpu" or _wanted not in ("auto", "cpu") or _try("cpu"):
        return None
    return _module_of_cpu(module)


@cache
def _module_of_cpu(module: str) -> ModuleType:
    return importlib.import_module(f"dsv4.ops.cpu.{module}")


def wanted() -> str:
    """What was asked for: auto, or the backend that comes first."""
    return _wanted


@contextmanager
def using(backend: str) -> Iterator[None]:
    """Serve every op that has it by `backend` inside the block (process-wide: for tests and comparisons)."""
    global _wanted
    assert backend in BACKENDS, backend
    before, _wanted = _wanted, backend
    try:
        yield
    finally:
        _wanted = before


@contextmanager
def wrapped(names: Iterable[str], wrap: Callable[[str, Callable], Callable]) -> Iterator[None]:
    """Serve these ops by wrap(name, op) inside the block, for recording and measuring (process-wide).

    `op` is whatever form serves the call. A form that makes use of another op's arithmetic does not come by here.
    """
    global _wraps
    before = _wraps
    _wraps = {**before, **{name: wrap(name, before.get(name, partial(_serve, name))) for name in names}}
    try:
        yield
    finally:
        _wraps = before
