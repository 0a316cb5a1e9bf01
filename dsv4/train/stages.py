"""The stages of a run: from which step on, how long its sequences are and how many tokens a step has.

V4 goes from 4K to 16K, 64K and 1M while its steps grow (paper section 4.2.2). Everything here is a function of the
step, so a resumed run follows the same course.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from dsv4.errors import UserError, nearest, shown


@dataclass(frozen=True)
class Stage:
    """From update number `start` on; a seq_len or tokens_per_step of 0 is that of the stage before."""

    start: int
    seq_len: int = 0
    tokens_per_step: int = 0


class Course:
    """All stages of a run, number 0 being that which it begins with; each complete."""

    def __init__(self, seq_len: int, tokens_per_step: int, stages: Sequence[Stage] = ()):
        self.stages = [Stage(0, seq_len, tokens_per_step)]
        for s in stages:
            last = self.stages[-1]
            self.stages.append(Stage(s.start, s.seq_len or last.seq_len, s.tokens_per_step or last.tokens_per_step))
        self._starts = [s.start for s in self.stages]
        self._before = [0]  # tokens before each stage
        for last, s in zip(self.stages, self.stages[1:], strict=False):
            self._before.append(self._before[-1] + (s.start - last.start) * last.tokens_per_step)

    def number(self, step: int) -> int:
        """Of the stage of update number `step`."""
        return bisect_right(self._starts, step) - 1

    def at(self, step: int) -> Stage:
        """The stage of update number `step`."""
        return self.stages[self.number(step)]

    def tokens(self, step: int) -> int:
        """Tokens before update number `step`."""
        number = self.number(step)
        stage = self.stages[number]
        return self._before[number] + (step - stage.start) * stage.tokens_per_step

    def check(self) -> None:
        """UserError if no run can follow these stages."""
        for n, (last, s) in enumerate(zip(self.stages, self.stages[1:], strict=False)):
            where = f"data.stages[{n}]"
            if s.start <= last.start:
                rule = f"come after the stage before it, which starts at {last.start}" if n else "be at least 1"
                raise UserError(f"{where}.start={s.start} must {rule}: give stages in order, each with a later step")
            if (s.seq_len, s.tokens_per_step) == (last.seq_len, last.tokens_per_step):
                raise UserError(
                    f"{where} changes nothing (seq_len={s.seq_len}, tokens_per_step={s.tokens_per_step} as before): "
                    "give it another seq_len or tokens_per_step, or leave it out"
                )
            if s.tokens_per_step < s.seq_len:
                raise UserError(
                    f"{where} has tokens_per_step={s.tokens_per_step}, which no sequence of seq_len={s.seq_len} fits "
                    "into: raise the one or lower the other"
                )


def read_stage(given: Any, number: int) -> Stage:
    """A stage of data.stages as it was written, a group of settings."""
    where = f"data.stages[{number}]"
    if isinstance(given, Stage):
        given = vars(given)
    if not isinstance(given, dict):
        raise UserError(f"{where}={shown(given)} must be a group such as {{start: 1000, seq_len: 16384}}")
    known = [f.name for f in fields(Stage)]
    for key, value in given.items():
        if key not in known:
            hint = nearest(str(key), known) or f"; known here: {', '.join(known)}"
            raise UserError(f"unknown configuration key {f'{where}.{key}'!r}{hint}")
        if type(value) is not int or not 0 <= value <= 10**12:
            raise UserError(f"{where}.{key}={shown(value)} must be a whole number from 0 to 10**12")
    if "start" not in given:
        raise UserError(f"{where} lacks its start: give the number of the update that it begins with")
    return Stage(**given)
