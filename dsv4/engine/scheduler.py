"""Who runs in this step, and how many of their tokens: first come, first served, as far as tokens and pages go.

A step is one flat run: a token for each decoding request, with the drafts of those after it, and chunks of prompts. A
request gets its memory when it is admitted, with room for all that is known of it. Where those that run need more pages
than there are, the youngest gives way: what it remembers is kept as a snapshot, and it goes on with the same bits when
there is room again.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from dsv4.engine.types import Request
from dsv4.errors import UserError
from dsv4.model import Memory, Pool


@dataclass(frozen=True)
class Share:
    """The next `count` pending tokens of a request, whose memory they continue."""

    request: Request
    count: int

    @property
    def memory(self) -> Memory:
        assert self.request.memory is not None, "a request that runs has a memory"
        return self.request.memory


class Scheduler:
    """Requests wait in line for one of `max_batch` places and for pages of the pool, and keep them until they end."""

    def __init__(self, max_batch: int, tokens_per_step: int, pool: Pool, drafts: int = 0):
        if max_batch < 1:
            raise UserError(f"max_batch={max_batch} must be at least 1")
        if tokens_per_step < max_batch * (1 + drafts):
            each = f" x (1 + {drafts} drafted)" if drafts else ""
            raise UserError(
                f"tokens_per_step={tokens_per_step} must be at least max_batch={max_batch}{each}: "
                "every running request needs a token in a step, and those drafted after it"
            )
        self.max_batch, self.tokens_per_step, self.pool = max_batch, tokens_per_step, pool
        self.ahead = max(0, drafts - 1)  # tokens beyond what a step runs into which deeper drafts are written
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []  # oldest first

    def __iter__(self) -> Iterator[Request]:
        yield from self.running
        yield from self.waiting

    def check(self, request: Request) -> None:
        """UserError if the pool could not hold a request even alone."""
        most = self.pool.most_tokens
        if most is not None and request.limit > most:
            raise UserError(
                f"a prompt of {request.num_prompt} tokens and up to {request.limit - request.num_prompt} new ones do "
                f"not fit: the cache has pages for {most}; ask for fewer, or make the engine with more pages"
            )

    def add(self, request: Request) -> None:
        """Put a request in line that was checked."""
        self.waiting.append(request)

    def remove(self, request: Request) -> None:
        """Its memory stays its own: a conversation goes on with it."""
        (self.running if request in self.running else self.waiting).remove(request)

    def schedule(self) -> list[Share]:
        """This step's shares, empty if there is none.

        Who needs a single token goes first, so that a long prompt delays no one's next token; what is left of the
        budget goes to prompts, oldest first. There is always some left: at most max_batch - 1 decode then.
        """
        self._let_wait([r for r in self.running if r.memory is None])  # a step was stopped, and their memories are lost
        shares = self._shares()
        enough = not self._short(shares)
        while len(self.running) > 1 and self._short(shares):
            self._preempt(self.running[-1])
            shares = self._shares()
        while enough and self.waiting and len(self.running) < self.max_batch and self._admit(self.waiting[0]):
            shares = self._shares()
        return shares

    def _shares(self) -> list[Share]:
        budget, shares = self.tokens_per_step, []
        for request in sorted(self.running, key=lambda r: r.behind > 1):  # stable: oldest first in each half
            count = min(request.pending, budget)
            if request.behind <= count < request.pending:
                count = request.behind - 1  # the last token and its drafts are verified together
            if count:
                shares.append(Share(request, count))
            budget -= count
        return shares

    def _short(self, shares: list[Share]) -> bool:
        wanted = [
            (share.memory, min(share.count + self.ahead, share.request.limit - share.memory.length)) for share in shares
        ]
        return self.pool.shortage(wanted) > 0

    def _admit(self, request: Request) -> bool:
        """Let the first of the line in, if there is room for what is known of it beside what the others need now."""
        fresh = request.memory is None
        if fresh:
            if self.running and not self.pool.fits(len(request.ids)):
                return False
            memory = request.memory = self.pool.new(capacity=len(request.ids))
            if request.kept is not None:
                memory.restore(request.kept)
        self.running.append(self.waiting.popleft())
        if len(self.running) > 1 and self._short(self._shares()):
            self.waiting.appendleft(self.running.pop())
            if fresh and request.memory is not None:
                request.memory.release()
                request.memory = None
            return False
        request.kept = None
        return True

    def _preempt(self, request: Request) -> None:
        assert request.memory is not None
        request.kept = request.memory.snapshot()
        request.memory.release()
        request.memory = None
        self._let_wait([request])

    def _let_wait(self, requests: list[Request]) -> None:
        """Back to the head of the line, in their order."""
        for request in reversed(requests):
            self.running.remove(request)
            self.waiting.appendleft(request)
