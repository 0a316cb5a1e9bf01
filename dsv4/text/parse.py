"""Reading what a model writes in V4's chat format: reasoning, content and tool calls, as they come and at the end.

Well-formed output is read as the released encoder's parser reads it. Anything else is read too: a block of calls that
is malformed or cut short comes back as text and with a warning, and whoever follows the stream never sees the half of
a tag, however the output is cut. Output without the end token is no mistake: most engines take it away.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from dsv4.errors import UserError
from dsv4.text.dsml import LONGEST_NAME, is_json, to_json
from dsv4.text.incoming import ANY, MARK, STOP, THOUGHT, SpelledText, TokenText, spelled
from dsv4.text.tokenizer import Tokenizer

CHUNK = 4096  # characters worked on at once, so that a long text costs no more in one piece than in many
_HEADER = LONGEST_NAME + 64  # characters that a tag may take, its name included

_ANY = ANY.pattern
_TAIL = re.compile(r"\n{0,2}(?:</?)?\Z")  # of content: may be the beginning of a tag
_OPENING = re.compile(r"(?:\n\n)?<\Z")
_CLOSE = re.compile(rf"\s*</{MARK}tool_calls>")
_INVOKE = re.compile(rf'\s*<{MARK}invoke name="([^{_ANY[1:-1]}]*)">\s*(?=</?{MARK})')
_CLOSE_INVOKE = re.compile(rf"\s*</{MARK}invoke>")
_PARAMETER = re.compile(rf'\s*<{MARK}parameter name="([^{_ANY[1:-1]}]*?)" string="(true|false)">')
_SPACE = re.compile(r"\s*")
_SLASH = re.compile(r"</?\Z")
_END_OF_TAG = re.compile(rf"[>\n{_ANY[1:-1]}]")


@dataclass(frozen=True, slots=True)
class Event:
    """What became known.

    reasoning, content: the next characters. call: call `index` begins, text is its name. arguments: the next characters
    of the JSON of its arguments. done: the call is complete, text is all of that JSON. withdrawn: the call was not
    well-formed after all; what it was made of follows as content. Who cannot take back a call waits for `done`.
    """

    kind: Literal["reasoning", "content", "call", "arguments", "done", "withdrawn"]
    text: str = ""
    index: int = 0


@dataclass
class _Open:
    """A call that is being read."""

    name: str
    keys: list[str] = field(default_factory=list)
    json: list[str] = field(default_factory=list)
    value: list[str] = field(default_factory=list)  # of the parameter that is open
    is_text: bool = False


class ChatParser:
    """Feed it the output in pieces, as text or as ids, then finish it.

    thinking: whether the output begins within the reasoning (`Prompt.opens_thinking`). tokenizer: for ids, with which
    control tokens are told from texts that spell them; without one, feed takes text, in which they are spelled.

    message: what was said so far, as the usual API has it and `render` takes it back (calls have no ids).
    warnings: sentences about what was not well-formed. ended: the end token has come. The parse is the same however the
    output is cut into pieces.
    """

    def __init__(self, *, thinking: bool, tokenizer: Tokenizer | None = None):
        self.warnings: list[str] = []
        self.ended = False
        self._source = TokenText(tokenizer) if tokenizer else SpelledText()
        self._said: dict[str, list[str]] = {"reasoning": [], "content": []}
        self._calls: list[tuple[str, str]] = []
        self._events: list[Event] = []
        self._rest, self._at = "", 0  # what has come and where in it we are
        self._plain = 0  # characters from there on that are content, as a block of them failed
        self._raw: list[str] = []  # of a block: what would be content if it fails
        self._done_in_block = 0
        self._call: _Open | None = None
        self._beyond = 0
        self._finished = False
        self._state: Callable[[bool], bool] = self._reasoning if thinking else self._content

    def feed(self, piece: str | Iterable[int]) -> list[Event]:
        """Events of the next piece: a text, or ids where there is a tokenizer."""
        if isinstance(piece, str) != isinstance(self._source, SpelledText):
            raise UserError("a parser with a tokenizer is fed lists of ids, one without is fed text; do either")
        if self._finished:
            raise UserError("this parser was finished; begin a new one for each reply")
        self._take(self._source.push(piece))  # type: ignore[arg-type]
        return self._told()

    def finish(self) -> list[Event]:
        """The last events: of what was kept back, and of what the end has made malformed."""
        if self._finished:
            return []
        self._finished = True
        text, half = self._source.flush()
        self._take(text)
        if half and not self.ended:
            self._warn(f"the output ended in half a control token, {half!r}, which was left out")
        if not self.ended:
            self._run(True)
        elif self._beyond:
            self._warn(f"{self._beyond} characters after the end token were left out")
        return self._told()

    @property
    def message(self) -> dict[str, Any]:
        calls = [{"type": "function", "function": {"name": n, "arguments": a}} for n, a in self._calls]
        content, reasoning = ("".join(self._said[kind]) for kind in ("content", "reasoning"))
        return {"role": "assistant", "content": content, "reasoning_content": reasoning, "tool_calls": calls}

    def _take(self, text: str) -> None:
        for i in range(0, len(text), CHUNK):
            part, stop, beyond = text[i : i + CHUNK].partition(STOP)
            if self.ended:
                self._beyond += len(part) + len(stop) + len(beyond)
                continue
            self._rest += part
            self._run(bool(stop))
            self.ended, self._beyond = bool(stop), len(beyond)

    def _run(self, last: bool) -> None:
        """States in turn, each as long as it gets on. last: nothing more will come."""
        while self._state(last):
            pass
        self._rest, self._at = self._rest[self._at :], 0

    def _told(self) -> list[Event]:
        events, self._events = self._events, []
        return events

    def _say(self, kind: Literal["reasoning", "content"], end: int) -> None:
        """The characters up to `end` are said."""
        text = spelled(self._rest[self._at : end])
        self._plain = max(0, self._plain - (end - self._at))
        self._at = end
        if text:
            self._said[kind].append(text)
            self._events.append(Event(kind, text))

    def _warn(self, sentence: str) -> None:
        if sentence not in self.warnings:
            self.warnings.append(sentence)

    # The states. Each returns whether to go on: False means that it needs more, or that nothing is left.

    def _reasoning(self, last: bool) -> bool:
        found = ANY.search(self._rest, self._at)
        if not found:
            tail = _SLASH.search(self._rest, self._at)
            self._say("reasoning", tail.start() if tail and not last else len(self._rest))
            if last:
                self._warn("the output ended within the reasoning")
            return False
        if found[0] == MARK:
            return self._tag("reasoning", last)
        self._say("reasoning", found.start())
        if found[0] == THOUGHT:
            self._at += 1
            self._state = self._content
            return True
        self._warn(f"{spelled(found[0])} in the reasoning was taken for text")
        self._say("reasoning", found.end())
        return True

    def _content(self, last: bool) -> bool:
        found = ANY.search(self._rest, self._at)
        if not found:
            tail = _TAIL.search(self._rest, self._at)
            self._say("content", len(self._rest) if last or not tail else tail.start())
            return False
        if found[0] != MARK:
            self._warn(f"{spelled(found[0])} in the content was taken for text")
            self._say("content", found.end())
            return True
        opening = _OPENING.search(self._rest, self._at, found.start())
        if opening and self._plain <= found.start() - self._at:
            wanted, got = "tool_calls>", self._rest[found.end() : found.end() + len("tool_calls>")]
            if got == wanted:
                self._say("content", opening.start())
                self._raw = [self._consume(found.end() + len(wanted))]
                self._done_in_block, self._state = 0, self._block
                return True
            if wanted.startswith(got) and not last:
                self._say("content", opening.start())
                return False
        return self._tag("content", last)

    def _tag(self, kind: Literal["reasoning", "content"], last: bool) -> bool:
        """A ｜DSML｜ that opens no block: said once its tag is whole, left out when the output ends within it."""
        mark = self._rest.index(MARK, self._at)
        before = _SLASH.search(self._rest, self._at, mark)
        self._say(kind, before.start() if before else mark)
        window = mark + 1 + _HEADER
        whole = _END_OF_TAG.search(self._rest, mark + 1, window) if before else None
        if not before:
            end = mark + 1
        elif whole:
            end = whole.end() if whole[0] == ">" else whole.start()
        elif len(self._rest) >= window:
            end = window
        elif last:
            self._leave_out(self._at)
            return True
        else:
            return False
        if self._plain <= 0:
            self._warn(f"｜DSML｜ markup in the {kind} was taken for text")
        self._say(kind, end)
        return True

    def _block(self, last: bool) -> bool:
        """Between the calls of a block."""
        if closed := _CLOSE.match(self._rest, self._at, self._at + _HEADER):
            self._at = closed.end()
            if not self._done_in_block:
                self._raw.append(closed[0])
                return self._fail("a block without tool calls")
            self._state = self._content
            return True
        found = _INVOKE.match(self._rest, self._at, self._at + _HEADER)
        if found and found[1]:
            self._call = _Open(found[1])
            self._raw.append(self._consume(found.end()))
            self._events.append(Event("call", found[1], len(self._calls)))
            self._state = self._parameters
            return True
        is_open = self._may_become(f'<{MARK}invoke name="', f"</{MARK}tool_calls>")
        if is_open and self._done_in_block and last:  # the space before a tag that never came
            self._at = _SPACE.match(self._rest, self._at).end()  # type: ignore[union-attr]
        return self._fail("a block of tool calls", is_open) if last or not is_open else False

    def _parameters(self, last: bool) -> bool:
        """Within a call, between its parameters."""
        assert self._call
        if closed := _CLOSE_INVOKE.match(self._rest, self._at, self._at + _HEADER):
            self._at = closed.end()
            self._argue("}" if self._call.keys else "{}")
            arguments = "".join(self._call.json)
            self._events.append(Event("done", arguments, len(self._calls)))
            self._calls.append((self._call.name, arguments))
            self._call, self._raw, self._state = None, [], self._block
            self._done_in_block += 1
            return True
        found = _PARAMETER.match(self._rest, self._at, self._at + _HEADER)
        if found and found[1] not in self._call.keys:
            self._raw.append(self._consume(found.end()))
            self._call.is_text, self._call.value = found[2] == "true", []
            self._argue((", " if self._call.keys else "{") + to_json(found[1], "a name") + ": ")
            self._argue('"' if self._call.is_text else "")
            self._call.keys.append(found[1])
            self._state = self._value
            return True
        is_open = not found and self._may_become(f'<{MARK}parameter name="', f"</{MARK}invoke>")
        return self._fail(f"the tool call {self._call.name!r}", is_open) if last or not is_open else False

    def _value(self, last: bool) -> bool:
        """Within a parameter's value, which ends with its closing tag alone: any other control token is text."""
        assert self._call
        mark = self._rest.find(MARK, self._at)
        if mark < 0:
            tail = _SLASH.search(self._rest, self._at)
            self._add(tail.start() if tail else len(self._rest))
            return self._fail(f"the tool call {self._call.name!r}", True) if last else False
        if self._rest.endswith("</", self._at, mark):
            wanted, got = "parameter>", self._rest[mark + 1 : mark + 1 + len("parameter>")]
            if wanted.startswith(got) and (got == wanted or not last):
                self._add(mark - 2)
                return self._end_of_value(mark + 1 + len(wanted)) if got == wanted else False
            if last and wanted.startswith(got):
                self._add(mark - 2)
                return self._fail(f"the tool call {self._call.name!r}", True)
        self._add(mark + 1)
        return True

    def _end_of_value(self, end: int) -> bool:
        assert self._call
        self._raw.append(self._consume(end))
        if not self._call.is_text and not is_json("".join(self._call.value)):
            return self._fail(f"the argument {self._call.keys[-1]!r} of the tool call {self._call.name!r}")
        self._argue('"' if self._call.is_text else "")
        self._state = self._parameters
        return True

    # What the states share.

    def _consume(self, end: int) -> str:
        """The characters up to `end`, which are behind us."""
        text, self._at = self._rest[self._at : end], end
        return text

    def _add(self, end: int) -> None:
        """The characters up to `end` belong to the value."""
        assert self._call
        text = self._consume(end)
        self._raw.append(text)
        value = spelled(text)
        self._call.value.append(value)
        self._argue(to_json(value, "a value")[1:-1] if self._call.is_text else value)

    def _argue(self, text: str) -> None:
        """More of the JSON of the arguments."""
        assert self._call
        if text:
            self._call.json.append(text)
            self._events.append(Event("arguments", text, len(self._calls)))

    def _leave_out(self, start: int) -> None:
        """The output has ended, in half a tag."""
        self._warn(f"the output ended in half a tag, {spelled(self._rest[start:])!r}, which was left out")
        self._rest = self._rest[:start]

    def _may_become(self, header: str, closing: str) -> bool:
        """Whether more characters can make a tag with a name, or a closing tag, of what has come."""
        window = self._rest[self._at : self._at + _HEADER].lstrip()
        if len(self._rest) >= self._at + _HEADER:
            return False
        if window.startswith(header):
            return not ANY.search(window, len(header))
        return header.startswith(window) or closing.startswith(window)

    def _fail(self, what: str, by_the_end: bool = False) -> bool:
        """What began as calls is content: all since the block opened, or since its last call that was whole."""
        half = _SLASH.search(self._rest, self._at) if by_the_end else None
        if half:
            self._leave_out(half.start())
        if self._call:
            self._events.append(Event("withdrawn", self._call.name, len(self._calls)))
            self._call = None
        raw = "".join(self._raw)
        self._rest, self._at, self._plain, self._raw = raw + self._rest[self._at :], 0, len(raw), []
        self._state = self._content
        self._warn(f"{what} was malformed or cut short, and was taken for text")
        return True


@dataclass(frozen=True)
class Reply:
    """A reply that was read whole, with the parser's fields."""

    message: dict[str, Any]
    warnings: list[str]
    ended: bool


def read_reply(output: str | Iterable[int], *, thinking: bool, tokenizer: Tokenizer | None = None) -> Reply:
    """A whole output, as text or, with a tokenizer, as ids: see ChatParser."""
    parser = ChatParser(thinking=thinking, tokenizer=tokenizer)
    parser.feed(output)
    parser.finish()
    return Reply(parser.message, parser.warnings, parser.ended)
