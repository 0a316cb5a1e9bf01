"""How long work is shown: a bar with time left on a terminal, a plain line now and then elsewhere."""

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

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


@contextmanager
def preparation_progress() -> Iterator[Callable[[str, int, int | None], None]]:
    """Yields a function to call with (what is being done, bytes done, bytes in all or None) while data are prepared."""
    if sys.stderr.isatty():
        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeElapsedColumn())
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            tasks: dict[str, TaskID] = {}

            def show(what: str, done: int, total: int | None) -> None:
                if what not in tasks:
                    tasks[what] = bar.add_task(what, total=total)
                bar.update(tasks[what], completed=done, total=total)

            yield show
        return
    shown = time.monotonic()

    def plain(what: str, done: int, total: int | None) -> None:
        nonlocal shown
        now = time.monotonic()
        if now - shown >= PLAIN_SECONDS:
            shown = now
            of = f" of {total / 1e6:,.0f}" if total else ""
            print(f"{what}: {done / 1e6:,.0f}{of} MB", file=sys.stderr, flush=True)

    yield plain


@contextmanager
def byte_progress() -> Iterator[Callable[[str, int, int], None]]:
    """Yields a function to call with (what is being done, bytes done, bytes in all): one bar or line for each."""
    if sys.stderr.isatty():
        columns = (
            TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(),
            TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
        )  # fmt: skip
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            tasks: dict[str, TaskID] = {}

            def show(what: str, done: int, total: int) -> None:
                if what not in tasks:
                    tasks[what] = bar.add_task(what, total=total)
                bar.update(tasks[what], completed=done)

            yield show
        return
    shown = time.monotonic()
    began: dict[str, float] = {}

    def plain(what: str, done: int, total: int) -> None:
        nonlocal shown
        now = time.monotonic()
        start = began.setdefault(what, now)
        if now - shown >= PLAIN_SECONDS:
            shown, left = now, (now - start) / max(1, done) * (total - done)
            print(
                f"{what}: {done / 1e6:,.0f} of {total / 1e6:,.0f} MB, {_clock(left)} left", file=sys.stderr, flush=True
            )

    yield plain


@contextmanager
def reading_progress() -> Iterator[Callable[[str, int, int], None]]:
    """Yields a function to call with (what is being read, tokens done, tokens in all); first with none done."""
    began: dict[str, float] = {}
    if sys.stderr.isatty():
        columns = (
            TextColumn("{task.description}"), MofNCompleteColumn(), BarColumn(), TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
        )  # fmt: skip
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            tasks: dict[str, TaskID] = {}

            def show(what: str, done: int, total: int) -> None:
                if what not in tasks:
                    began[what], tasks[what] = time.monotonic(), bar.add_task(what, total=total, note="")
                speed = done / max(1e-9, time.monotonic() - began[what])
                bar.update(tasks[what], completed=done, note=f"{speed:,.0f} tokens/s")

            yield show
        return
    shown = time.monotonic()

    def plain(what: str, done: int, total: int) -> None:
        nonlocal shown
        now = time.monotonic()
        start = began.setdefault(what, now)
        if done and (now - shown >= PLAIN_SECONDS or done == total):
            shown, speed = now, done / max(1e-9, now - start)
            left = _clock((total - done) / speed)
            print(f"{what}: {done:,}/{total:,} tokens  {speed:,.0f} tokens/s  {left} left", file=sys.stderr, flush=True)

    yield plain


def shown_as_long_as_read(show: Callable[[dict[str, Any]], None]) -> Callable[[dict[str, Any]], None]:
    """`show`, until its reader leaves: the work goes on then, and says so where it still can."""
    read = True

    def report(record: dict[str, Any]) -> None:
        nonlocal read
        if not read:
            return
        try:
            show(record)
        except OSError:  # a closed pipe or terminal
            read = False
            for stream in (sys.stdout, sys.stderr):
                _say_or_silence(stream)

    return report


def _say_or_silence(stream: Any) -> None:
    """Tell whoever still reads `stream` that the run goes on; a stream that nobody reads is led nowhere."""
    try:
        if stream is sys.stderr:
            print("nobody reads the records any more; the run goes on, they are in log.jsonl", file=stream)
        stream.flush()
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def _note(record: dict[str, Any]) -> str:
    note = f"loss {record['loss']:.3f}  {record['tokens_per_second']:,.0f} tokens/s"
    for name, said in (("mfu", "MFU"), ("optimizer_share", "optimiser")):
        note += f", {said} {record[name]:.0%}" if name in record else ""
    if "seq_len" in record:
        note += f"  length {record['seq_len']:,}"
    if "phase" in record:
        recall = record.get("index_recall", {}).values()
        note += f"  {record['phase']}" + (f", recall {min(recall):.2f}" if recall else "")
    return note + (f"  held-out {record['heldout_bpb']:.3f} bits/byte" if "heldout_bpb" in record else "")


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
