"""`dsv4 bench decode`: what a decode step costs beside its arithmetic, by format of the memory and number of sequences.

On a small model a step's time is that of starting operations, and of planning on the host. So both are counted: a step
of 64 sequences should start about as many operations as a step of one, and its plan should be a small share of it.
The sequences have different lengths, so that their compression groups close at different steps.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dsv4 import ops
from dsv4.cache import format_name
from dsv4.measure.clock import Budget, timed
from dsv4.measure.rows import Row
from dsv4.measure.subjects import MODELS, tokens
from dsv4.model import Segment, Transformer
from dsv4.model.segments import plan
from dsv4.ops.formats import NAMES

TINY = MODELS["tiny"]
BATCHES = (1, 4, 16, 64)
SHORTEST, APART = 300, 7  # lengths SHORTEST + 7 i: 64 different residues mod 128, all of those mod 4
STEPS = 4  # counted and timed together: every sequence closes one CSA group in them
PLANS = 20  # made together, so that reading the clock does not count


class Operations(TorchDispatchMode):
    """Counts the torch operations that run inside the `with`, by name; also copies and views: the host starts each."""

    def __init__(self) -> None:
        super().__init__()
        self.by_name: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.by_name[str(func)] += 1
        return func(*args, **(kwargs or {}))


def count(work: Callable[[], object]) -> int:
    """The torch operations and the calls of our own kernels that `work` starts."""
    if ops.active("linear") != "cpu":
        with Operations() as operations:
            work()
        return operations.by_name.total()
    from dsv4.ops.cpu.library import watched

    with Operations() as operations, watched() as kernels:
        work()
    return operations.by_name.total() + len(kernels)


class Decoding:
    """Sequences of SHORTEST, SHORTEST + 7, ... random tokens in memories of one format; the first `batch` of them
    decode together, and begin again at these lengths each time that `batch` is set."""

    def __init__(self, model: Transformer, format: str, sequences: int):
        self.model, self.lengths = model, [SHORTEST + APART * i for i in range(sequences)]
        self.memories = list(model.new_cache(batch=sequences, format=format, capacity=self.lengths[-1] + 128))
        for length, memory in zip(self.lengths, self.memories, strict=True):
            model(tokens(model, length, seed=length), segments=[(length, memory)], rows="last")
        self.start(sequences)

    def start(self, batch: int) -> None:
        """The first `batch` memories, at their first lengths."""
        for length, memory in zip(self.lengths, self.memories, strict=True):
            memory.rewind(memory.length - length)
        self.batch, self.ids = batch, tokens(self.model, batch)

    def step(self) -> Tensor:
        """One token of each sequence: logits [batch, vocab]."""
        return self.model(self.ids, segments=[(1, memory) for memory in self.memories[: self.batch]])

    def plan(self) -> object:
        """The plan of such a step alone."""
        segments = [Segment(1, memory) for memory in self.memories[: self.batch]]
        return plan(self.model.config, segments, self.model.device)


def _repeat(times: int, work: Callable[[], object]) -> None:
    for _ in range(times):
        work()


@torch.no_grad()
def decode_rows(model: Transformer, format: str, batches: Sequence[int] = BATCHES) -> Iterator[Row]:
    """A row for each batch, which begins with 1.

    operations: of a step, the mean of four consecutive ones in which every sequence closes a CSA group, with the least
    and the most of them; times_batch_1: that mean over batch 1's. seconds: of a step, the median. plan_seconds: of a
    plan, the median; plan_share: that over the step's.
    """
    assert batches[0] == 1, "the others are set beside one sequence"
    decoding, budget = Decoding(model, format, max(batches)), Budget(float("inf"))
    alone = 0.0
    for batch in batches:
        decoding.start(batch)
        decoding.step()  # what is made once, for all steps
        decoding.start(batch)
        counts = [count(decoding.step) for _ in range(STEPS)]
        mean = sum(counts) / STEPS
        alone = alone or mean
        decoding.start(batch)
        planning = timed(partial(_repeat, PLANS, decoding.plan), model.device, budget)
        stepping = timed(partial(_repeat, STEPS, decoding.step), model.device, budget)
        seconds, plan_seconds = stepping.median / STEPS, planning.median / PLANS
        yield {
            "who": "dsv4", "what": "decode step", "format": format, "batch": batch, "device": model.device.type,
            "shortest": decoding.lengths[0], "longest": decoding.lengths[batch - 1],
            "operations": mean, "operations_least": min(counts), "operations_most": max(counts),
            "times_batch_1": mean / alone,
            "seconds": seconds, "fastest": stepping.fastest / STEPS, "slowest": stepping.slowest / STEPS,
            "repeats": stepping.repeats, "tokens_per_second": batch / seconds,
            "plan_seconds": plan_seconds, "plan_share": plan_seconds / seconds,
        }  # fmt: skip


def measure(
    model: Transformer,
    formats: Sequence[str] | None,
    device: torch.device,
    progress: Callable[[str], None],
    batches: Sequence[int] = BATCHES,
) -> list[Row]:
    """The rows of every format (None: all there are) on a device; UserError for an unknown one, before any work."""
    chosen = [format_name(format) for format in (NAMES if formats is None else formats)]
    model = model.to(device)
    rows: list[Row] = []
    for format in chosen:
        progress(f"{format}: {max(batches)} sequences of {SHORTEST} to {SHORTEST + APART * (max(batches) - 1)} tokens")
        for row in decode_rows(model, format, batches):
            rows.append(row)
            progress(f"{format}: batch {row['batch']}")
    return rows


def lines(rows: Sequence[Row]) -> list[str]:
    """The rows for a person, under a head."""
    head = f"{'memory':10s} {'batch':>5s} {'operations':>10s} {'x batch 1':>9s} {'ms/step':>8s} {'tokens/s':>9s}"
    out = [head + f" {'plan us':>8s} {'of step':>7s}"]
    for r in rows:
        out.append(
            f"{r['format']:10s} {r['batch']:5d} {r['operations']:10,.0f} {r['times_batch_1']:9.2f} "
            f"{1e3 * r['seconds']:8.1f} {r['tokens_per_second']:9,.0f} {1e6 * r['plan_seconds']:8.0f} "
            f"{r['plan_share']:7.1%}"
        )
    return out
