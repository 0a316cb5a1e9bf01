"""Conversations -> what a model learns from them: ids, and which of these it is to write itself.

A lesson is a conversation as the model would have met it: the ids of its prompts, then those of its own answers, each
tokenised apart, as they are when it answers. Reasoning that the format leaves out of later prompts is learned where
it stood: such a conversation is several lessons, each up to the end of one answer.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dsv4.errors import UserError, shown
from dsv4.text.chat import marked
from dsv4.text.prompt import Piece, Prompt
from dsv4.text.tokenizer import Tokenizer

# What a row of chat data may say beside its messages, with the type of it; null is the same as nothing.
OPTIONS: dict[str, type | tuple[type, ...]] = {
    "tools": list,
    "response_format": (dict, list, str),
    "thinking": bool,
    "drop_thinking": bool,
    "effort": str,
    "edition": str,
}
_PROMPTS = ("user", "developer", "tool")  # roles that a new prompt begins with


@dataclass(frozen=True)
class Lesson:
    """parts: prompts and answers in turn, each with whether the model is to write it."""

    parts: tuple[tuple[Prompt, bool], ...]

    def ids(self, tokenizer: Tokenizer) -> tuple[list[int], list[bool]]:
        """Ids of all parts, and for each whether it is to be learned. UserError as of `Prompt.ids`."""
        ids: list[int] = []
        learned: list[bool] = []
        for prompt, written in self.parts:
            found = prompt.ids(tokenizer)
            ids += found
            learned += [written] * len(found)
        return ids, learned

    @property
    def texts(self) -> Iterator[str]:
        """The plain texts in it, control tokens left out."""
        return (piece for prompt, _ in self.parts for piece in prompt.pieces if isinstance(piece, str))


def lessons_of(row: Mapping[str, Any]) -> list[Lesson]:
    """The lessons of {"messages": [...], "tools": [...], ...}, at least one.

    messages and the options (OPTIONS) are those of `render`; other keys say nothing. thinking: by default, whether
    some answer has `reasoning_content`. UserError for what the format cannot say, for reasoning that thinking=false
    would lose, and for a conversation without an answer.
    """
    options = {key: _checked(key, row[key]) for key in OPTIONS if row.get(key) is not None}
    messages = row.get("messages")
    if not isinstance(messages, list):
        raise UserError(f"its messages are {shown(messages)}; give a list of messages")
    reasoned = any(isinstance(m, Mapping) and m.get("reasoning_content") for m in messages)
    if reasoned and options.get("thinking") is False:
        raise UserError("it has reasoning_content, which thinking=false would lose; leave one of the two out")
    options.setdefault("thinking", reasoned)
    found = [Lesson(tuple(_parts(pieces))) for pieces in _marked(messages, options)]
    if not any(written and prompt.pieces for lesson in found for prompt, written in lesson.parts):
        raise UserError("it has no answer of the assistant to learn from; give one")
    return found


def _marked(messages: list[Any], options: dict[str, Any]) -> Iterator[list[tuple[Piece, bool]]]:
    """The conversation in pieces, once whole, or once up to each answer behind which reasoning is left out."""
    whole = marked(messages, **options)
    leaves_out = options["thinking"] and options.get("drop_thinking", True) and not options.get("tools")
    ends = _answered(messages) if leaves_out else []
    early = [end for end in ends if not any(message.get("tools") for message in messages[:end])]
    for end in early:
        yield marked(messages[:end], **options)
    if not early:
        yield whole
    elif len(early) < len(ends):  # tools have come: nothing is left out of the whole, where the rest is learned
        known = len(marked(messages[: early[-1]], **{**options, "drop_thinking": False}))
        yield [(piece, written and n >= known) for n, (piece, written) in enumerate(whole)]


def _checked(key: str, value: Any) -> Any:
    if not isinstance(value, OPTIONS[key]):
        raise UserError(f"its {key} is {shown(value)}; leave it out, or give what `render` takes")
    return value


def _answered(messages: Sequence[Mapping[str, Any]]) -> list[int]:
    """Where the answers to each prompt end."""
    ends: list[int] = []
    for n, message in enumerate(messages, 1):
        if message["role"] == "assistant":
            before = messages[ends[-1] : n] if ends else []
            if ends and not any(m["role"] in _PROMPTS for m in before):
                ends.pop()  # the same prompt's answer goes on
            ends.append(n)
    return ends


def _parts(pieces: list[tuple[Piece, bool]]) -> Iterator[tuple[Prompt, bool]]:
    for written, run in itertools.groupby(pieces, key=lambda item: item[1]):
        yield Prompt.of(piece for piece, _ in run), written
