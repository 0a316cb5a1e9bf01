"""The op table: one name, one docstring (in reference.py), as many backends as pay.

`reference` defines what is correct; `blocked` keeps memory linear and has analytic gradients, on any device. The
environment variable DSV4_OPS=reference|blocked|auto chooses for the process (auto = the best of each op), and
`with ops.using("reference"):` for a stretch of code.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor

from dsv4.errors import UserError
from dsv4.ops import blocked, reference
from dsv4.ops.formats import PackedRows
from dsv4.ops.newton_schulz import newton_schulz
from dsv4.ops.reference import hyper_read, index_scores, swiglu
from dsv4.ops.spans import Spans

__all__ = [
    "Pool", "Spans", "active", "compress", "cross_entropy", "experts", "hyper_maps", "hyper_read", "hyper_write",
    "index_scores", "index_scores_topk", "newton_schulz", "sinkhorn", "sparse_attention", "swiglu", "topk_lowest",
    "using", "wanted", "wrapped",
]  # fmt: skip

Pool = Tensor | PackedRows  # rows that attention reads: as numbers, or packed and unpacked where they are read

# Best backend last. Ops with a single form (compress, hyper_read, ...) are linear as they stand.
_NAMES = (
    "sparse_attention", "index_scores_topk", "topk_lowest", "sinkhorn", "hyper_maps", "hyper_write", "experts",
    "cross_entropy",
)  # fmt: skip
TABLE: dict[str, dict[str, Callable]] = {
    name: {"reference": getattr(reference, name), "blocked": getattr(blocked, name)} for name in _NAMES
}
BACKENDS = ("auto", "reference", "blocked")
_wanted = os.environ.get("DSV4_OPS", "auto")


def active(name: str) -> str:
    """The backend that serves an op now; UserError for an unknown DSV4_OPS."""
    if _wanted not in BACKENDS:
        raise UserError(f"DSV4_OPS={_wanted!r} is unknown: use one of {', '.join(BACKENDS)}")
    return _wanted if _wanted in TABLE[name] else list(TABLE[name])[-1]


def wanted() -> str:
    """What was asked for: auto, reference or blocked."""
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
    """Serve these ops by wrap(name, op) inside the block, for recording and measuring (process-wide)."""
    before = {name: dict(TABLE[name]) for name in names}
    try:
        for name, backends in before.items():
            TABLE[name].update({backend: wrap(name, op) for backend, op in backends.items()})
        yield
    finally:
        for name, backends in before.items():
            TABLE[name].update(backends)


def _op(name: str) -> Callable:
    def call(*args, **kwargs):
        return TABLE[name][active(name)](*args, **kwargs)

    call.__name__, call.__doc__ = name, getattr(reference, name).__doc__
    return call


sparse_attention = _op("sparse_attention")
index_scores_topk = _op("index_scores_topk")
topk_lowest = _op("topk_lowest")
sinkhorn = _op("sinkhorn")
hyper_maps = _op("hyper_maps")
hyper_write = _op("hyper_write")
experts = _op("experts")
cross_entropy = _op("cross_entropy")
compress = reference.compress
