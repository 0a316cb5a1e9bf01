"""Being asked to stop: the first Ctrl-C or SIGTERM lets the step end, the second gives it up, the third interrupts.

What is happening is said at once, on stderr, since a step may take long and people press again. A step can be given up
only while it has changed nothing yet (`may_give_up`), so the newest state is whole and can be saved either way.
"""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any


class GivenUp(BaseException):
    """The step that was going on is given up; nothing of it has happened."""


class Stop:
    """Within the block, counts the requests to stop; `outcome` ends what is said to the first.

    patient: no step is given up, since other processes are in the middle of it too.
    """

    def __init__(self, outcome: str, *, patient: bool = False):
        self.asked = 0
        self._outcome, self._patient = outcome, patient
        self._open = False  # a step may be given up now
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Stop":
        try:
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._ask)
        except ValueError:  # not the main thread: signals are somebody else's
            pass
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextmanager
    def may_give_up(self) -> Iterator[None]:
        """In this block, which must leave no trace when it is left half way, a second request raises GivenUp."""
        if self.asked >= 2 and not self._patient:
            raise GivenUp
        self._open = not self._patient
        try:
            yield
        finally:
            self._open = False

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked += 1
        if self.asked == 1:
            again = "" if self._patient else " (once more: without finishing the step)"
            _say(f"stopping after this step; {self._outcome}{again}")
        elif self.asked == 2:
            _say("giving up the step, saving the state before it" if self._open else "saving; this takes a moment")
            if self._open:
                self._open = False
                raise GivenUp
        else:
            raise KeyboardInterrupt


def _say(text: str) -> None:
    """Straight to stderr: a handler may have come in the middle of a print."""
    try:
        os.write(2, f"\n{text}\n".encode(errors="replace"))
    except OSError:
        pass
