"""Who runs in this step, and how many of their tokens: first come, first served, within a budget of tokens.

A step is one flat run: a token for each decoding request and chunks of prompts. Knows nothing of models.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from dsv4.engine.types import Request
from dsv4.errors import UserError


@dataclass(frozen=True)
class Work:
    """The next `count` pending tokens of a request."""

    request: Request
    count: int


class Scheduler:
    """Requests wait in line for one of `max_batch` places and keep it until they end."""

    def __init__(self, max_batch: int, tokens_per_step: int):
        if max_batch < 1:
            raise UserError(f"max_batch={max_batch} must be at least 1")
        if tokens_per_step < max_batch:
            raise UserError(
                f"tokens_per_step={tokens_per_step} must be at least max_batch={max_batch}: "
                "every running request needs a token in a step"
            )
        self.max_batch, self.tokens_per_step = max_batch, tokens_per_step
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []

    def __iter__(self) -> Iterator[Request]:
        yield from self.running
        yield from self.waiting

    def add(self, request: Request) -> None:
        self.waiting.append(request)

    def remove(self, request: Request) -> None:
        (self.running if request in self.running else self.waiting).remove(request)

    def schedule(self) -> list[Work]:
        """This step's work, empty if there is none.

        Who needs a single token goes first, so that a long prompt delays no one's next token; what is left of the
        budget goes to prompts, oldest first. There is always some left: decoding takes max_batch - 1 at most then.
        """
        while self.waiting and len(self.running) < self.max_batch:
            self.running.append(self.waiting.popleft())
        budget, work = self.tokens_per_step, []
        for request in sorted(self.running, key=lambda r: r.pending > 1):  # stable: oldest first in each half
            count = min(request.pending, budget)
            if count:
                work.append(Work(request, count))
            budget -= count
        return work
