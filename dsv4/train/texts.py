"""Which documents belong to which split of a run's data: the embedded corpus, the user's own texts, a mixture."""

import os
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any, Literal

from dsv4 import data as corpus
from dsv4.errors import UserError
from dsv4.files import explained
from dsv4.train.dataconfig import HUB, DataConfig, Source
from dsv4.train.hub import HubSource
from dsv4.train.rows import ChatRows, Rows, TextRows, bounded, names_of, say_once
from dsv4.train.sources import HOLD_OUT_EVERY, data_files, hold_out, read_files, size_of, without

Read = Callable[[int], None]  # told how many bytes have been read so far
HELDOUT = "heldout"


def train_split(source: Source) -> str:
    """The name of what is trained on of a source."""
    return f"train.{source.name}" if source.name else "train"


class Texts:
    """Where the documents of all splits come from: "train", or "train.NAME" of each part of a mixture, and "heldout".

    The held-out split is data.heldout if given, else held out of each source of the first one's format, else that of
    the embedded corpus. Files of data.heldout that lie in a source are not trained on.
    """

    def __init__(self, data: DataConfig):
        self.data = data
        first = data.sources[0]
        if data.has_chat and not first.path:
            raise UserError("data.format=chat needs conversations to learn from: give data.path or data.mix")
        heldout = Source(data.heldout, text_field=data.text_field, format=first.format) if data.heldout else None
        origins = {train_split(s): _origin(s) for s in data.sources}
        self.heldout = _origin(heldout) if heldout else None
        self.origins = {
            name: self._kept(source, origin, data.heldout)
            for source, (name, origin) in zip(data.sources, origins.items(), strict=True)
        }
        self.parted = bool(first.path) and heldout is None
        same = [train_split(s) for s in data.sources if s.format == first.format]
        self.parted_from = [self.origins[split] for split in same] if self.parted else []

    def _kept(self, source: Source, origin: "Origin", heldout: str) -> "Origin":
        """A source without the files of data.heldout."""
        if not (isinstance(origin, Files) and isinstance(self.heldout, Files)):
            return origin
        setting = f"data.mix {source.name!r}" if source.name else "data.path"
        with explained(heldout, "read"):
            if os.path.samefile(source.path, heldout):
                raise UserError(
                    f"data.heldout={heldout} is {setting} itself: leave data.heldout empty to have every "
                    f"{HOLD_OUT_EVERY}th document held out, or give other text"
                )
        kept, shared = without(origin.files, self.heldout.files)
        if shared and kept:
            say_once(f"not trained on, as they belong to data.heldout={heldout}: {names_of(shared)}")
        if not kept:
            raise UserError(
                f"data.heldout={heldout} leaves nothing to train on, as every file of {setting}={source.path} "
                "belongs to it too: give other text as one of them"
            )
        return Files(kept, origin.root, origin.rows)

    @property
    def splits(self) -> list[str]:
        return [*self.origins, HELDOUT]

    def format(self, split: str) -> str:
        """What the documents of a split are: texts, or conversations as JSON; of "heldout" those it is parted from."""
        formats = {train_split(s): s.format for s in self.data.sources}
        return formats.get(split, self.data.sources[0].format)

    def size(self, split: str) -> int | None:
        """Bytes of what a split is read from, of the text itself for the embedded corpus; None where nobody knows."""
        sizes = [origin.size() for origin in self._origins(split)]
        return None if None in sizes else sum(size for size in sizes if size is not None)

    def documents(self, split: str, on_read: Read) -> Iterator[str]:
        """The documents of one split, read as they are needed; on_read is told the bytes of `size` read so far."""
        origins = self._origins(split)
        if not any(origin in self.parted_from for origin in origins):
            return origins[0].documents(on_read)
        side: Literal["train", "heldout"] = "heldout" if split == HELDOUT else "train"
        before, each = 0, []
        for origin in origins:
            each.append(self._part(origin, side, lambda done, before=before: on_read(before + done)))
            before += origin.size() or 0
        return chain.from_iterable(each)

    def _part(self, origin: "Origin", side: Literal["train", "heldout"], on_read: Read) -> Iterator[str]:
        chat = isinstance(origin.rows, ChatRows)
        found = hold_out(origin.documents(on_read), side, whole=chat)
        few = f"its few documents have less than {HOLD_OUT_EVERY} characters each"
        why = "it has one conversation" if chat else few
        return _some(found, f"no text can be held out of {origin.root}, as {why}")

    def _origins(self, split: str) -> list["Origin"]:
        if split != HELDOUT:
            return [self.origins[split]]
        if self.heldout:
            return [self.heldout]
        return self.parted_from or [Embedded(HELDOUT)]

    def identity(self) -> dict[str, Any]:
        """What tells texts apart without reading them: name, size and time of change of every file."""
        facts = {"text_field": self.data.text_field, "parted": self.parted}
        each = {split: [origin.identity() for origin in self._origins(split)] for split in self.splits}
        return facts | {split: found[0] if len(found) == 1 else found for split, found in each.items()}


# --- one source ---


class Files:
    """Files of a folder, or one file; rows: what is taken of a line or row of them."""

    def __init__(self, files: list[Path], root: Path, rows: Rows):
        self.files, self.root, self.rows = files, root, rows

    def size(self) -> int:
        return sum(map(size_of, self.files))

    def documents(self, on_read: Read) -> Iterator[str]:
        return read_files(self.files, self.rows, on_read)

    def identity(self) -> Any:
        return [[_name(file, self.root), *_size_and_time(file)] for file in self.files]


class Embedded:
    """The embedded corpus, which has its own splits."""

    root, rows = "the embedded corpus", TextRows()

    def __init__(self, split: Literal["train", "heldout"]):
        self.split: Literal["train", "heldout"] = split

    def size(self) -> int:
        return corpus.facts()[self.split]["text_bytes"]

    def documents(self, on_read: Read) -> Iterator[str]:
        return bounded(counted(corpus.documents(self.split), on_read))

    def identity(self) -> Any:
        return corpus.facts()[self.split]["sha256"]


Origin = Files | Embedded | HubSource


def _origin(source: Source) -> Origin:
    rows = ChatRows() if source.format == "chat" else TextRows(source.text_field)
    if source.path.startswith(HUB):
        return HubSource(source.path, rows)
    return Files(data_files(source.path), Path(source.path), rows) if source.path else Embedded("train")


def _name(file: Path, root: Path) -> str:
    """The name of a file below the source it was found in, as text that JSON can hold."""
    name = file.name if file == root else file.relative_to(root).as_posix()
    return name.encode("utf-8", "backslashreplace").decode()


def _size_and_time(file: Path) -> tuple[int, int]:
    with explained(file, "read"):
        found = file.stat()
    return found.st_size, found.st_mtime_ns


def _some(documents: Iterator[str], problem: str) -> Iterator[str]:
    """Documents held out of a source; UserError when there is none."""
    for text in documents:
        yield text
        break
    else:
        raise UserError(f"{problem}: give more text, or a source of its own as data.heldout")
    yield from documents


def counted(documents: Iterable[str], on_read: Read) -> Iterator[str]:
    """The same documents; on_read is told how many bytes of them have come."""
    done = 0
    for text in documents:
        done += len(text.encode())
        on_read(done)
        yield text
