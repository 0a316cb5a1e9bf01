"""What is asked and what answers: messages or a prompt in, a text out, and one exception for a question left open.

An endpoint answers in process (inprocess.py) or over HTTP (server.py). `complete` may be called from several threads;
`workers` says from how many it is worth it.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Messages = Sequence[Mapping[str, str]]  # of `role` and `content`


@dataclass(frozen=True)
class Params:
    """How an answer is drawn. temperature: 0 is greedy. seed: None where an endpoint knows none."""

    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = 0
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class Answer:
    """text: what the user is shown; reasoning: what a model that reasons first wrote before it. finish: "stop", or
    "length" where max_tokens cut it."""

    text: str
    finish: str = "stop"
    reasoning: str = ""


class Unanswered(Exception):
    """This question got no answer, for the reason given: neither a refusal nor a success, and counted as neither."""


class Endpoint(ABC):
    """name: for a person. identity: what its answers depend on beside the question; kept answers are found by it.
    dtype, config_hash: of a model in process, else empty."""

    name = "an endpoint"
    identity = ""
    dtype = ""
    config_hash = ""
    workers = 1

    @abstractmethod
    def complete(self, asked: Messages | str, params: Params) -> Answer:
        """The answer to a conversation, or the continuation of a prompt.

        Unanswered if there is none to this question; UserError if there will be none to any.
        """

    def count_tokens(self, text: str) -> int | None:
        """Tokens of a text; None where that is not known."""
        return None
