"""How long work is shown: a bar with time left on a terminal, a plain line now and then elsewhere."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

PLAIN_SECONDS = 15.0  # at most one plain line in this time, unless it brings an evaluation


@contextmanager
def training_progress(start: int, total: int) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Yields a function to call with every log record of a run that stands at `start` of `total` steps."""
    if sys.stderr.isatty():
        columns = (
            TextColumn("step"), MofNCompleteColumn(), BarColumn(), TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
        )  # fmt: skip
        with Progress(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task("train", total=total, completed=start, note="")
            yield lambda record: bar.update(task, completed=record["step"], note=_note(record))
        return
    shown = began = time.monotonic()

    def plain(record: dict[str, Any]) -> None:
        nonlocal shown
        now = time.monotonic()
        if now - shown < PLAIN_SECONDS and "heldout_bpb" not in record and record["step"] not in (start + 1, total):
            return
        shown = now
        left = (now - began) / max(1, record["step"] - start) * (total - record["step"])
        print(f"step {record['step']}/{total}  {_note(record)}  {_clock(left)} left", file=sys.stderr, flush=True)

    yield plain


def _note(record: dict[str, Any]) -> str:
    note = f"loss {record['loss']:.3f}  {record['tokens_per_second']:,.0f} tokens/s"
    return note + (f"  held-out {record['heldout_bpb']:.3f} bits/byte" if "heldout_bpb" in record else "")


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
