"""What each op of a training step takes, forward and backward."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from dsv4 import ops
from dsv4.ops.table import OPS


@dataclass
class Spent:
    """Seconds in all calls of an op."""

    forward: float = 0.0
    backward: float = 0.0


@contextmanager
def spent() -> Iterator[dict[str, Spent]]:
    """Seconds of every op that is called inside the block, by name; ops that an op calls itself are part of it.

    The nodes that a call adds to the graph are timed when the backward pass comes to them, inside the block too.
    """
    found: dict[str, Spent] = {}
    inside = False

    def wrap(name: str, op: Callable) -> Callable:
        def call(*args: Any) -> Any:
            nonlocal inside
            if inside:
                return op(*args)
            inside, began = True, time.perf_counter()
            try:
                out = op(*args)
            finally:
                inside = False
            total = found.setdefault(name, Spent())
            total.forward += time.perf_counter() - began
            _watch(args, out if isinstance(out, tuple) else (out,), total)
            return out

        return call

    with ops.wrapped(OPS, wrap):
        yield found


def _watch(args: Any, results: tuple[Any, ...], total: Spent) -> None:
    """Let the nodes between a call's arguments and its results add their time when the backward pass runs them."""
    seen: set[Any] = {a.grad_fn for a in args if isinstance(a, Tensor)} | {None}
    waiting: list[Any] = [r.grad_fn for r in results if isinstance(r, Tensor)]
    while waiting:
        node = waiting.pop()
        if node in seen or "AccumulateGrad" in node.name():
            continue
        seen.add(node)
        _time(node, total)
        waiting += [following for following, _ in node.next_functions]


def _time(node: Any, total: Spent) -> None:
    began = 0.0

    def before(grads: Any) -> None:
        nonlocal began
        began = time.perf_counter()

    def after(inputs: Any, grads: Any) -> None:
        total.backward += time.perf_counter() - began

    node.register_prehook(before)
    node.register_hook(after)
