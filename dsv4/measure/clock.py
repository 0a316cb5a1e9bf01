"""Time: what is left of a budget, and medians of repeated calls. What is measured belongs to the callers."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch


class Skip(Exception):
    """A piece of work is left out; the text says why."""


class Budget:
    """Seconds from now on in which everything has to be done."""

    def __init__(self, minutes: float):
        self.began = time.perf_counter()
        self.seconds = 60 * minutes

    def spent(self) -> float:
        return time.perf_counter() - self.began

    def left(self) -> float:
        return self.seconds - self.spent()

    def require(self, seconds: float, what: str) -> None:
        """Skip unless that many seconds are left."""
        if self.left() < seconds:
            raise Skip(f"{what} takes about {seconds:.1f} s and {max(0.0, self.left()):.1f} s of the budget are left")


@dataclass(frozen=True)
class Timing:
    """Seconds per call over `repeats` calls, and the most bytes that were allocated meanwhile (None on a CPU)."""

    median: float
    fastest: float
    slowest: float
    repeats: int
    peak_bytes: int | None


LEAST, MOST, ENOUGH_SECONDS = 3, 7, 6.0  # repeats of one measurement, and when more of them teach nothing new


def timed(run: Callable[[], object], device: torch.device, budget: Budget) -> Timing:
    """The median of at least three calls after a warm-up, each waited for; Skip where they do not fit the budget."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    first = _seconds(run, device)
    budget.require(LEAST * first, "repeating it three times")
    if first < 1:
        _seconds(run, device)  # the first call loads kernels and fills the allocator; a second one is truly warm
    times: list[float] = []
    while len(times) < LEAST or (len(times) < MOST and sum(times) < ENOUGH_SECONDS and budget.left() > 2 * first):
        times.append(_seconds(run, device))
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    return Timing(statistics.median(times), min(times), max(times), len(times), peak)


def synchronise(device: torch.device) -> None:
    """Wait until everything that was started on the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    synchronise(device)
    began = time.perf_counter()
    run()
    synchronise(device)
    return time.perf_counter() - began
