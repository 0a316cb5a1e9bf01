"""Which experts and entries a run chose: kept, compared, and replayed.

Where a rounding decides a choice, two right models go apart: what is compared then are runs with the same choices.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from dsv4 import ops
from dsv4.model import Transformer
from dsv4.model.indexer import Indexer

Choices = dict[str, list[tuple[int, ...]]]  # CSA layer -> the entries that each token reads, in order of the tokens
_CHOOSING = ("topk_lowest", "index_scores_topk", "best_rows", "gate")  # a gate gives (scores, chosen, weights)


@contextmanager
def recording(tape: list[Tensor]) -> Iterator[None]:
    """Keeps what the ops that choose experts and entries return, in order of the calls."""

    def keep(name: str, op: Callable) -> Callable:
        def call(*args: Any) -> Any:
            out = op(*args)
            tape.append(out[1] if name == "gate" else out)
            return out

        return call

    with ops.wrapped(_CHOOSING, keep):
        yield


@contextmanager
def replaying(tape: list[Tensor] | None) -> Iterator[None]:
    """Lets these ops return what was kept: in bf16 a rounding may choose otherwise, and the rest is then incomparable.

    None: they choose for themselves.
    """
    if tape is None:
        yield
        return
    kept = iter(tape)

    def give(name: str, op: Callable) -> Callable:
        def call(x: Tensor, *args: Any) -> Any:
            chosen = next(kept).to(x.device)
            if name != "gate":
                return chosen
            weight, bias, _, k, scale = args  # the weights are those of its own scores
            return op(x, weight, bias, chosen, k, scale)

        return call

    with ops.wrapped(_CHOOSING, give):
        yield
    assert next(kept, None) is None, "the two runs chose a different number of times"


@contextmanager
def choices(model: Transformer) -> Iterator[Choices]:
    """Records for every CSA layer and token of the calls inside which entries it reads, counted in its document."""
    seen: Choices = {}

    def watch(name: str) -> Callable:
        def record(module: Any, args: Any, output: Any) -> None:
            run, read = args[2], {}
            for part, (chosen, _) in zip(run.parts, output, strict=True):
                visible = part.groups[module.kind.name].visible
                starts = visible.start.tolist()
                spans = zip(starts, visible.stop.tolist(), strict=True)
                rows = [range(lo, hi) for lo, hi in spans] if chosen is None else chosen.tolist()
                tokens = range(len(run.positions)) if part.tokens is None else part.tokens.tolist()
                for token, lo, own in zip(tokens, starts, rows, strict=True):
                    read[token] = tuple(r - lo for r in own if r >= 0)
            seen.setdefault(name, []).extend(read[token] for token in range(len(run.positions)))

        return record

    handles = [m.register_forward_hook(watch(n)) for n, m in model.named_modules() if isinstance(m, Indexer)]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
