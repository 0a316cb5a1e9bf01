"""What passes through the engine: how to sample, a request on its way, news of it, and what came of it.

Data only. What these mean to logits is sampler.py; who runs when is scheduler.py.
"""

import math
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from dsv4.engine.writer import TextWriter
from dsv4.errors import UserError
from dsv4.model import Memory

# "stop": an eos or a stop string. "length": max_tokens, or the model's context is full. "error": the logits were not
# finite (a damaged checkpoint, or overflow in a narrow dtype); the other requests of the batch go on.
FinishReason = Literal["stop", "length", "error"]


MOST_LOGPROBS = 100  # likeliest tokens that can be asked for beside a drawn one


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is drawn and when a text ends; the defaults are what the published models recommend.

    temperature: 0 is greedy. top_k: 0 is off. top_p: 1 is off. min_p: 0 is off. seed: the same seed draws the
    same tokens whatever else is in the batch; None is a new one each time. max_tokens: new tokens at most. stop:
    strings that end the text and are not part of it. logprobs: also tell log-probabilities, of each drawn token and of
    this many of the likeliest (0 to 100); None: none. pinned: so many of the prompt's first tokens stay in what CSA
    reads, whatever later text the indexer prefers: the defence of a system prompt (docs/robustness.md); at most
    index_topk entries.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    max_tokens: int = 128
    stop: tuple[str, ...] | list[str] = ()
    logprobs: int | None = None
    pinned: int = 0

    def __post_init__(self) -> None:
        if not _is_number(self.temperature) or not 0 <= self.temperature < math.inf:
            raise UserError(f"temperature={self.temperature!r} must be 0 (greedy) or positive and finite")
        if not _is_whole(self.top_k) or self.top_k < 0:
            raise UserError(f"top_k={self.top_k!r} must be a whole number from 1, or 0 to switch it off")
        if not _is_number(self.top_p) or not 0 < self.top_p <= 1:
            raise UserError(f"top_p={self.top_p!r} must be above 0 and at most 1; 1 switches it off")
        if not _is_number(self.min_p) or not 0 <= self.min_p <= 1:
            raise UserError(f"min_p={self.min_p!r} must be from 0 to 1; 0 switches it off")
        if self.seed is not None and (not _is_whole(self.seed) or not 0 <= self.seed < 2**63):
            raise UserError(f"seed={self.seed!r} must be a whole number from 0 to 2**63 - 1, or None")
        if not _is_whole(self.max_tokens) or self.max_tokens < 1:
            raise UserError(f"max_tokens={self.max_tokens!r} must be a whole number of at least 1")
        if not isinstance(self.stop, list | tuple) or not all(isinstance(s, str) and s for s in self.stop):
            raise UserError(f"stop={self.stop!r} must be a list of non-empty strings")
        if self.logprobs is not None and (not _is_whole(self.logprobs) or not 0 <= self.logprobs <= MOST_LOGPROBS):
            raise UserError(f"logprobs={self.logprobs!r} must be a whole number from 0 to {MOST_LOGPROBS}, or None")
        if not _is_whole(self.pinned) or self.pinned < 0:
            raise UserError(f"pinned={self.pinned!r} must be a whole number of the prompt's first tokens, or 0")
        object.__setattr__(self, "stop", tuple(self.stop))


@dataclass(frozen=True)
class Logprob:
    """Natural logarithms of the model's own probabilities: before temperature and filters, over the tokens that the
    tokenizer has. top: (token, log-probability) of the likeliest, by log-probability, then by lowest id."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Completion:
    """What came of a request. memory_bytes is what its memory had allocated at the end.

    ids are all tokens drawn, with a final eos and the tokens of a stop string; text has neither. logprobs has one for
    each of ids if they were asked for, else none. With speculation, drafted counts the tokens that the model was given
    to verify, accepted those of them that are among ids.
    """

    request: int
    prompt_ids: list[int]
    ids: list[int]
    text: str
    finish_reason: FinishReason
    memory_bytes: int
    logprobs: tuple[Logprob, ...] = ()
    drafted: int = 0
    accepted: int = 0


@dataclass(frozen=True)
class Event:
    """One step's news of a request: the tokens drawn, the text that they let out; at the end, the completion.

    A step draws one token, with speculation sometimes more. tokens is empty only with finish_reason "error"; logprobs
    has one for each if they were asked for. text may be empty: a character may be incomplete, or what is there may be
    the beginning of a stop string. All texts of a request together are its completion's text.
    """

    request: int
    tokens: tuple[int, ...]
    text: str
    finish_reason: FinishReason | None = None
    completion: Completion | None = None
    logprobs: tuple[Logprob, ...] = ()


@dataclass(frozen=True)
class Draft:
    """A guess at a token to come, and the distribution fp64 [V] that it was drawn from (None: all on it)."""

    token: int
    probs: Tensor | None = None


@dataclass(frozen=True)
class Drawn:
    """What a step drew for a request: at least one token, all but the last of them drafts that were accepted; their
    log-probabilities, if they were asked for; and the drafts of the tokens after them."""

    request: "Request"
    tokens: list[int]
    logprobs: tuple[Logprob, ...] = ()
    drafts: tuple[Draft, ...] = ()


@dataclass(eq=False)
class Request:
    """A request on its way: `ids` is the prompt, then every token drawn; `memory` has seen the first of them.

    Only ids count, and `drafts`, of the tokens after them: a memory that was lost is computed again. `kept` is what a
    request remembers that had to make room for others; `lasting`: the memory is still needed when the request has
    ended, and may have seen more than ids then (accepted tokens after the one that ended it). `limit` is the length
    that ids may reach.
    """

    number: int
    ids: list[int]
    params: SamplingParams
    limit: int
    writer: TextWriter
    generator: torch.Generator
    memory: Memory | None = None
    kept: dict[str, Tensor] | None = None
    lasting: bool = False
    num_prompt: int = 0
    text: str = ""
    finish_reason: FinishReason | None = None
    logprobs: list[Logprob] = field(default_factory=list)
    drafts: tuple[Draft, ...] = ()
    drafted: int = 0
    accepted: int = 0

    def __post_init__(self) -> None:
        self.num_prompt = len(self.ids)

    @property
    def behind(self) -> int:
        """Tokens of ids that the memory has not seen: what is left of the prompt, or the one token drawn last."""
        return len(self.ids) - (self.memory.length if self.memory else 0)

    @property
    def pending(self) -> int:
        """Tokens that the model has to run before more can be drawn: those, and the drafts."""
        return self.behind + len(self.drafts)

    def forget(self) -> None:
        """The request has ended: give its memory back, unless somebody goes on with it."""
        if self.memory is not None and not self.lasting:
            self.memory.release()
            self.memory = None

    def completion(self) -> Completion:
        assert self.finish_reason is not None
        ids, new = self.ids[: self.num_prompt], self.ids[self.num_prompt :]
        held = self.memory.bytes() if self.memory else 0
        told, counts = tuple(self.logprobs), (self.drafted, self.accepted)
        return Completion(self.number, ids, new, self.text, self.finish_reason, held, told, *counts)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
