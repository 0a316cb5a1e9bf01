"""One record of a file -> documents: the text in one of its fields, or a conversation as JSON.

A document is a text either way, so that everything after it treats both alike: it is counted, held out, compared and
handed to whoever tokenises. A conversation is read as lessons only there (encode.py), and here once to have it judged
while file and line are known.
"""

import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from typing import Any, Protocol

from dsv4.errors import UserError
from dsv4.text.lessons import OPTIONS, lessons_of

DOCUMENT_CHARS = 1 << 20  # a longer text becomes several documents
NAMES_SHOWN = 5


class Rows(Protocol):
    """What is taken of a record."""

    def columns(self, names: list[str], where: str) -> list[str]:
        """Which columns of a table are to be read; UserError if one that is needed is not there."""
        ...

    def documents(self, record: Mapping[str, Any], where: str) -> Iterator[str]:
        """The documents of a record; UserError that says where, for what is none."""
        ...


class TextRows:
    """The text in one field, as documents of at most DOCUMENT_CHARS characters."""

    def __init__(self, field: str = "text"):
        self.field = field

    def columns(self, names: list[str], where: str) -> list[str]:
        self._check(names, where, "column")
        return [self.field]

    def documents(self, record: Mapping[str, Any], where: str) -> Iterator[str]:
        self._check(record, where, "field")
        return bounded([_checked(record[self.field], where, self.field)])

    def _check(self, names: Iterable[str], where: str, kind: str) -> None:
        names = list(names)
        if self.field not in names:
            have = names_of(name[:40] for name in names) or "none"
            raise UserError(f"{where} lacks the {kind} {self.field!r} (it has {have}): name another {kind}")


class ChatRows:
    """A conversation: `messages`, and what else `lessons_of` knows, as one line of JSON."""

    KEYS = ("messages", *OPTIONS)

    def columns(self, names: list[str], where: str) -> list[str]:
        if "messages" not in names:
            raise UserError(
                f"{where} lacks the column 'messages' (it has {names_of(names) or 'none'}): give conversations, or "
                "set data.format=text"
            )
        return [name for name in names if name in self.KEYS]

    def documents(self, record: Mapping[str, Any], where: str) -> Iterator[str]:
        row = {key: value for key, value in record.items() if key in self.KEYS}
        if others := [str(name)[:40] for name in record if name not in row]:
            say_once(f"passed over in conversations: {names_of(others)}")
        if record and "messages" not in row:
            have = names_of(str(name)[:40] for name in record)
            raise UserError(
                f"{where} lacks the field 'messages' (it has {have}): give conversations, or set data.format=text"
            )
        try:
            lessons_of(row)
        except UserError as error:
            raise UserError(f"{where} cannot be said in the chat format: {error}") from None
        yield json.dumps(row, ensure_ascii=False)


def bounded(documents: Iterable[str]) -> Iterator[str]:
    """Documents of at most DOCUMENT_CHARS characters: longer ones are cut, at a line end or space near by if any."""
    for text in documents:
        yield from cut_up([text])


def cut_up(parts: Iterable[str]) -> Iterator[str]:
    """One text that comes in parts, as documents of at most DOCUMENT_CHARS characters; together they are the text."""
    held: list[str] = []
    size = 0
    for part in parts:
        held.append(part)
        size += len(part)
        if size > DOCUMENT_CHARS:
            text, start = "".join(held), 0
            while len(text) - start > DOCUMENT_CHARS:
                cut = place_to_cut(text, start + DOCUMENT_CHARS, DOCUMENT_CHARS // 10)
                yield text[start:cut]
                start = cut
            held = [text[start:]]
            size = len(held[0])
    yield "".join(held)


def place_to_cut(text: str, at: int, room: int) -> int:
    """Where to cut a text that is to be cut at `at`, looking at the `room` characters before it.

    After the last line end there; else before the last other white space, as a word keeps the space before it;
    else at `at`, whatever stands there.
    """
    if (line_end := text.rfind("\n", at - room, at)) >= 0:
        return line_end + 1
    return next((i for i in range(at - 1, at - room - 1, -1) if text[i].isspace()), at)


def names_of(found: Iterable[object]) -> str:
    """A few of the names, and how many there are if not all are shown."""
    names = [str(name) for name in found]
    shown = ", ".join(names[:NAMES_SHOWN])
    return shown if len(names) <= NAMES_SHOWN else f"{shown}, ... ({len(names)} in all)"


@lru_cache(maxsize=1000)
def say_once(sentence: str) -> None:
    """Preparing reads the same files several times; what is to be said of them is said the first time."""
    logging.getLogger("dsv4").warning("%s", sentence)


def _checked(value: Any, place: str, field: str) -> str:
    """The value if it is text that UTF-8 can hold."""
    if not isinstance(value, str):
        kind = type(value).__name__
        raise UserError(f"{field!r} in {place} is a {kind}, not text: correct it or name another field")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise UserError(f"{field!r} in {place} holds half a surrogate pair: correct its \\u escape") from None
    return value
