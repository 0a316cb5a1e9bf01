"""Ctrl-C waits for the end of a step: what a step has computed is kept, and nothing is found half written.

Other handlers of the signal than Python's own, and threads other than the main one, are left alone: no Ctrl-C arrives
there in the middle of a step.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def held_back() -> Iterator[None]:
    """The first Ctrl-C in the block raises KeyboardInterrupt at its end, a second one at once."""
    plain = signal.default_int_handler
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGINT) is not plain:
        yield
        return
    asked = False

    def ask(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True

    signal.signal(signal.SIGINT, ask)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, plain)
    if asked:
        raise KeyboardInterrupt
