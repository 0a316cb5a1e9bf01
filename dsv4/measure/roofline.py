"""What each op takes where it runs: the time of its calls in place, beside what this machine could do them in at best.

FLOPs and bytes of a call come from its arguments: 2 per multiply-accumulate of the products that dsv4/cost counts, and
every byte that has to be read or written once, so of a weight the experts that are chosen, and of a pool the rows that
some query reads. The least time is the larger of FLOPs over the rate of matrix products and bytes over the rate of
reading. A share above 1 means that what was read was still in a cache, or that products were done in a narrower type.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dsv4 import ops
from dsv4.measure.rows import Row
from dsv4.ops import PackedMatrix, Pool, Spans
from dsv4.ops.formats import PackedRows
from dsv4.ops.table import OPS


@dataclass(frozen=True)
class Work:
    """What a call has to do at least: FLOPs of matrix products, bytes read and written."""

    flops: int
    bytes: int


@dataclass(frozen=True)
class Rates:
    """What a machine does at best: FLOP/s of matrix products, bytes/s read."""

    flops: float
    bytes: float

    def seconds(self, work: Work) -> float:
        return max(work.flops / self.flops, work.bytes / self.bytes)

    def bound(self, work: Work) -> str:
        return "matmul" if work.flops / self.flops > work.bytes / self.bytes else "read"


# --- what a call has to do -------------------------------------------------------------------------------------------


def work_of(name: str, args: Sequence[Any], out: Any) -> Work:
    """The work of a call of op `name` with these arguments and this result."""
    flops = _FLOPS[name](*args) if name in _FLOPS else 0
    results = out if isinstance(out, tuple) else (out,)
    if name in _READ:
        return Work(flops, _READ[name](*args) + sum(map(_size, results)))
    return Work(flops, sum(map(_size, args)) + sum(map(_size, results)))


def _size(x: Any) -> int:
    """Bytes of a tensor or a packed matrix; of anything else none."""
    if isinstance(x, PackedMatrix):
        return _size(x.codes) + _size(x.scales)
    return x.numel() * x.itemsize if isinstance(x, Tensor) else 0


def _elements(weight: Tensor | PackedMatrix) -> int:
    rows, columns = weight.shape
    return rows * columns


def _rows_size(pool: Pool, rows: int) -> int:
    """Bytes of so many rows as they lie in their pool."""
    data = pool.data if isinstance(pool, PackedRows) else pool
    return rows * data.shape[1] * data.itemsize


def _lengths(spans: Spans) -> Tensor:
    return (spans.stop - spans.start).clamp_min(0)


def _covered(spans: Spans) -> int:
    """Rows that lie in at least one interval."""
    start, order = spans.start.sort(stable=True)
    stop = spans.stop[order]
    if not len(start):
        return 0
    before = torch.cat([start[:1], stop.cummax(0).values[:-1]])
    return int((stop - torch.maximum(start, before)).clamp_min(0).sum())


def _sparse_attention(q: Tensor, window_kv: Pool, window: Spans, entries: Pool | None, visible: Spans | None,
                      chosen: Tensor | None, *rest: Any) -> int:  # fmt: skip
    read = int(_lengths(window).sum())
    if entries is not None:
        read += int((chosen >= 0).sum()) if chosen is not None else int(_lengths(_some(visible)).sum())
    return 4 * q.shape[1] * q.shape[2] * read


def _sparse_attention_read(q: Tensor, window_kv: Pool, window: Spans, entries: Pool | None, visible: Spans | None,
                           chosen: Tensor | None, sink: Tensor, scale: float) -> int:  # fmt: skip
    size = _size(q) + _size(sink) + _size(chosen) + _rows_size(window_kv, _covered(window))
    if entries is not None:
        rows = len(chosen[chosen >= 0].unique()) if chosen is not None else _covered(_some(visible))
        size += _rows_size(entries, rows)
    return size


def _some(spans: Spans | None) -> Spans:
    assert spans is not None, "entries are read by interval or as chosen rows"
    return spans


def _scored(visible: Spans, k: int) -> Spans:
    """The intervals of queries that have to choose: the others read all they see."""
    wanted = _lengths(visible) > k
    return Spans(visible.start[wanted], visible.stop[wanted])


def _index_scores_topk(q: Tensor, weights: Tensor, keys: Pool, visible: Spans, k: int) -> int:
    return 2 * q.shape[1] * q.shape[2] * int(_lengths(_scored(visible, k)).sum())


def _index_read(q: Tensor, weights: Tensor, keys: Pool, visible: Spans, k: int) -> int:
    return _size(q) + _size(weights) + _rows_size(keys, _covered(_scored(visible, k)))


def _index_kl(q: Tensor, weights: Tensor, keys: Tensor, attn_q: Tensor, entries: Tensor, lse: Tensor, visible: Spans,
              chosen: Tensor | None, scale: float) -> int:  # fmt: skip
    """Both scores of every entry that is read, and twice those of the indexer again for its gradients."""
    read = int(_lengths(visible).sum()) if chosen is None else int((chosen >= 0).sum())
    return 2 * read * (3 * q[0].numel() + attn_q[0].numel())


def _expert_sizes(w13: Tensor | PackedMatrix, w2: Tensor | PackedMatrix) -> tuple[int, int]:
    """Elements of one expert, and how many experts there are."""
    inner, width = w2.shape[-1], w13.shape[-1]
    elements = w13.numel() if isinstance(w13, Tensor) else _elements(w13)
    return 3 * inner * width, elements // (2 * inner * width)


def _experts(x: Tensor, chosen: Tensor, weights: Tensor, w13: Any, w2: Any, limit: float) -> int:
    return 2 * chosen.numel() * _expert_sizes(w13, w2)[0]


def _experts_read(x: Tensor, chosen: Tensor, weights: Tensor, w13: Any, w2: Any, limit: float) -> int:
    used, count = len(chosen.unique()), _expert_sizes(w13, w2)[1]
    return _size(x) + _size(chosen) + _size(weights) + (_size(w13) + _size(w2)) * used // count


_FLOPS: dict[str, Callable[..., int]] = {
    "sparse_attention": _sparse_attention,
    "index_scores_topk": _index_scores_topk,
    "index_kl": _index_kl,
    "experts": _experts,
    "linear": lambda x, w: 2 * (x.numel() // x.shape[-1]) * _elements(w),
    "project_in": lambda x, a, _, b, kv, *rest: 2 * len(x) * (_elements(a) + _elements(b) + _elements(kv)),
    "project_out": lambda o, turn, a, groups, b: 2 * len(o) * (_elements(a) + _elements(b)),
    "compressor_rows": lambda x, wkv, wgate, *rest: 2 * len(x) * (_elements(wkv) + _elements(wgate)),
    "gate": lambda x, weight, *rest: 2 * len(x) * _elements(weight),
    "mlp": lambda x, w1, w3, w2, limit: 2 * (x.numel() // x.shape[-1]) * sum(map(_elements, (w1, w3, w2))),
    "hyper_maps": lambda x, fn, *rest: 2 * len(x) * _elements(fn),
    "hyper_enter": lambda x, fn, *rest: 2 * (len(x) * _elements(fn) + x.numel()),
    "hyper_write": lambda x, *rest: 2 * x.numel() * (x.shape[1] + 1),
    "head_collapse": lambda x, fn, *rest: 2 * (len(x) * _elements(fn) + x.numel()),
    "cross_entropy": lambda hidden, head, *rest: 2 * len(hidden) * _elements(head),
}
# Ops that do not read all of their arguments.
_READ: dict[str, Callable[..., int]] = {
    "sparse_attention": _sparse_attention_read,
    "index_scores_topk": _index_read,
    "experts": _experts_read,
}


# --- what the calls of a step take -----------------------------------------------------------------------------------


@contextmanager
def _calls(see: Callable[[str, Sequence[Any], Any, float], None]) -> Iterator[None]:
    """see(name, args, result, seconds) after every call of an op; those that an op makes itself are part of it."""
    inside = False

    def wrap(name: str, op: Callable) -> Callable:
        def call(*args: Any) -> Any:
            nonlocal inside
            if inside:
                return op(*args)
            inside = True
            began = time.perf_counter()
            try:
                out = op(*args)
            finally:
                seconds, inside = time.perf_counter() - began, False
            see(name, args, out, seconds)
            return out

        return call

    with ops.wrapped(OPS, wrap):
        yield


def profile(
    step: Callable[[], object], repeats: int, rates: Rates, before: Callable[[], object] = lambda: None
) -> list[Row]:
    """A row for each op that a step calls, dearest first; then what lies between ops, and the whole step.

    The step runs once to warm and to look at its calls, then `repeats` times; it calls the same ops every time. ms: the
    median of an op's time in a step, of all its calls. share_of_roofline: the least time over that. before: called
    before each step that is timed.
    """
    works: list[tuple[str, Work]] = []
    with _calls(lambda name, args, out, seconds: works.append((name, work_of(name, args, out)))):
        step()
    names = dict.fromkeys(name for name, _ in works)
    times: list[dict[str, float]] = []
    for _ in range(repeats):
        spent: dict[str, float] = dict.fromkeys(names, 0.0)

        def add(name: str, args: Any, out: Any, seconds: float, spent: dict[str, float] = spent) -> None:
            spent[name] += seconds

        before()
        with _calls(add):
            began = time.perf_counter()
            step()
            spent["step"] = time.perf_counter() - began
        spent["between ops"] = spent["step"] - sum(spent[name] for name in names)
        times.append(spent)
    median = {name: statistics.median(t[name] for t in times) for name in times[0]}
    rows = [_row(name, [w for n, w in works if n == name], median, rates) for name in names]
    rows.sort(key=lambda row: -row["ms"])
    return [*rows, _row("between ops", [], median, rates), _row("step", [w for _, w in works], median, rates)]


def _row(name: str, works: Sequence[Work], median: dict[str, float], rates: Rates) -> Row:
    least = sum(map(rates.seconds, works))
    total = Work(sum(w.flops for w in works), sum(w.bytes for w in works))
    return {
        "op": name, "calls": len(works), "ms": 1e3 * median[name], "share_of_step": median[name] / median["step"],
        "flops": total.flops, "bytes": total.bytes, "bound": rates.bound(total) if works else None,
        "roofline_ms": 1e3 * least, "share_of_roofline": least / median[name] if works else None,
    }  # fmt: skip


def lines(rows: Sequence[Row]) -> list[str]:
    """The rows for a person, under a head."""
    out = [
        f"{'op':18s} {'calls':>5s} {'ms':>9s} {'of step':>7s} {'GFLOP':>9s} {'MB':>9s} {'bound':>6s} {'at best':>9s} "
        f"{'share':>6s}"
    ]
    for r in rows:
        text = f"{r['op']:18s} {r['calls'] or '':>5} {r['ms']:9.3f} {r['share_of_step']:7.1%}"
        if r["bound"] is not None:
            text += f" {r['flops'] / 1e9:9.4f} {r['bytes'] / 1e6:9.3f} {r['bound']:>6s} {r['roofline_ms']:9.3f}"
            text += f" {r['share_of_roofline']:6.1%}"
        out.append(text)
    return out
