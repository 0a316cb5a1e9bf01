"""One timeline over one memory: say something, let the model go on, take it back. Chat is made of this."""

from collections.abc import Generator

from dsv4.cache import SequenceMemory, Snapshot
from dsv4.engine.engine import Engine
from dsv4.engine.types import Event, SamplingParams
from dsv4.errors import UserError


class Session:
    """What was said, as tokens, and the memory of it. Only `ids` count: a lost memory is computed again.

    The memory as the last turn found it is kept as a snapshot, so taking back one turn, or stopping in the middle
    of one, computes nothing of the turns before it.
    """

    def __init__(self, engine: Engine):
        self.engine = engine
        self.reset()

    def reset(self) -> None:
        """Back to a bos alone."""
        self.ids = [self.engine.tokenizer.bos_id]
        self.memory: SequenceMemory | None = None
        self._before: Snapshot | None = None  # of the memory, at the start of the last turn
        self._turns: list[int] = []  # the length of ids at the start of each turn

    def generate(self, text: str, params: SamplingParams | None = None) -> Generator[Event, None, None]:
        """A turn: append a text ("" just goes on) and stream what follows it; UserError if it does not fit.

        Closed early or interrupted, the turn is what was said until then; `undo` takes back all of it, with the
        text. A final eos is not part of the timeline.
        """
        ids = self.ids + self.engine.tokenizer.encode(text)
        self._recall(len(ids) - 1)  # the model has to run the last token again, or there is nothing to draw from
        request = self.engine.prepare(ids, params or SamplingParams(), self.memory)
        self._turns.append(len(self.ids))
        self._before = self.memory.snapshot() if self.memory else None
        try:
            yield from self.engine.follow(self.engine.submit(request))
        finally:
            ended = len(request.ids) > len(ids) and request.ids[-1] == self.engine.tokenizer.eos_id
            self.ids = request.ids[:-1] if ended else request.ids
            self.memory = request.memory or self.memory  # torn if a step was stopped: _recall mends it

    def undo(self) -> bool:
        """Take back the last turn; False if there is none."""
        if not self._turns:
            return False
        self.rewind(len(self.ids) - self._turns[-1])
        return True

    def rewind(self, count: int) -> None:
        """Forget the last `count` tokens of the timeline (not its bos), and the turns that began in them."""
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
            self.memory.rewind(max(0, self.memory.length - length))  # refused if too far, or if a step was stopped
        except UserError:
            if self._before is not None and int(self._before["length"][0]) <= length:
                self.memory.restore(self._before)
            else:
                self.memory = None
