"""One timeline over one memory: say something, let the model go on, take it back. Chat is made of this."""

import weakref
from collections.abc import Callable

from dsv4.cache import Snapshot
from dsv4.engine.engine import Engine, Events
from dsv4.engine.types import SamplingParams
from dsv4.errors import UserError
from dsv4.model import Memory


class Session:
    """What was said, as tokens, and the memory of it. Only `ids` count: a lost memory is computed again.

    The memory as the last turn found it is kept as a snapshot, so taking back one turn, or stopping in the middle
    of one, computes nothing of the turns before it. One turn is open at a time: whatever comes next closes it.
    """

    def __init__(self, engine: Engine):
        self.engine = engine
        self._turn: Callable[[], Events | None] = lambda: None  # the open turn, as long as its caller holds it
        self.reset()

    def reset(self) -> None:
        """Back to a bos alone."""
        self._close()
        self.ids = [self.engine.tokenizer.bos_id]
        self.memory: Memory | None = None
        self._before: Snapshot | None = None  # of the memory, at the start of the last turn
        self._turns: list[int] = []  # the length of ids at the start of each turn

    def generate(self, text: str, params: SamplingParams | None = None) -> Events:
        """A turn: append a text ("" just goes on) and stream what follows it; UserError, at once, if it does not fit.

        Closed early, also before its first event, or interrupted, the turn is what was said until then; `undo` takes
        back all of it, with the text. A long text that Ctrl-C interrupts is read on from there by the next turn
        (`unread` tokens are left). A final eos is not part of the timeline.
        """
        self._close()
        ids = self.ids + self.engine.tokenizer.encode(text)
        # The model has to run the last token again, or there is nothing to draw from; and with speculation what the
        # timeline ended with, after which the MTP block may have read another token (an eos, or what was taken back).
        self._recall((len(ids) if self.engine.speculation is None else len(self.ids)) - 1)
        request = self.engine.prepare(ids, params or SamplingParams(), self.memory, lasting=True)
        self._turns.append(len(self.ids))
        self._before = self.memory.snapshot() if self.memory else None
        number = self.engine.submit(request)

        def settle() -> None:
            self.engine.cancel(number)
            ended = len(request.ids) > len(ids) and request.ids[-1] in self.engine.stop_ids
            self.ids = request.ids[:-1] if ended else request.ids
            self.memory = request.memory or self.memory  # torn if a step was stopped: _recall mends it

        events = Events(self.engine.events_of(number), settle)
        self._turn = weakref.ref(events)  # weak: an open turn that its caller has dropped ends
        return events

    def _close(self) -> None:
        turn = self._turn()
        if turn is not None:
            turn.close()

    @property
    def unread(self) -> int:
        """Tokens of the timeline that are not remembered: the last one, or what is left of an interrupted text."""
        return len(self.ids) - self._seen()

    def _seen(self) -> int:
        if self.memory is not None:
            try:
                self.memory.refuse_torn()
                return self.memory.length
            except UserError:  # _recall will go back to the snapshot
                pass
        return 0 if self._before is None else int(self._before["length"][0])

    def undo(self) -> bool:
        """Take back the last turn; False if there is none."""
        self._close()
        if not self._turns:
            return False
        self.rewind(len(self.ids) - self._turns[-1])
        return True

    def rewind(self, count: int) -> None:
        """Forget the last `count` tokens of the timeline (not its bos), and the turns that began in them."""
        self._close()
        if not 0 <= count < len(self.ids):
            raise UserError(f"cannot rewind {count} tokens: give a number from 0 to {len(self.ids) - 1}")
        del self.ids[len(self.ids) - count :]
        self._turns = [start for start in self._turns if start < len(self.ids)]
        self._recall(len(self.ids))

    def _recall(self, length: int) -> None:
        """Bring the memory back to at most `length` tokens: rewind, else the snapshot, else begin again."""
        if self.memory is None:
            return
        try:
            # refused if too far, if a step was stopped, or if the memory was given up for another request
            self.memory.rewind(max(0, self.memory.length - length))
        except UserError:
            self.memory.release()
            self.memory = None
            before = None if self._before is None else int(self._before["length"][0])
            if self._before is not None and before is not None and before <= length and self.engine.pool.fits(before):
                self.memory = self.engine.pool.new()
                self.memory.restore(self._before)
