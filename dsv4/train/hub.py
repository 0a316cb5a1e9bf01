"""Data sets of the Hugging Face hub as sources, streamed: hf:NAME[/CONFIG][:SPLIT][@REVISION].

NAME is OWNER/NAME on the hub, or a path that begins with /, ./, ../ or ~, of a folder that `datasets` can read. Rows
come as they are needed and nothing of them is kept, so each pass over the text reads it again. A revision makes a
run's data those of a day; without one they are whatever the hub has. No data set's own code is ever run.
"""

import logging
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsv4.errors import UserError, shown
from dsv4.files import explained, reason_of
from dsv4.train.dataconfig import HUB
from dsv4.train.rows import Rows

_PLACES = ("/", "./", "../", "~")
_PART = r"[A-Za-z0-9][A-Za-z0-9._-]*"
_SPEC = re.compile(
    rf"(?P<name>{_PART}(?:/{_PART})?)(?:/(?P<config>{_PART}))?(?::(?P<split>[\w.\[\]%+:-]+?))?(?:@(?P<revision>[\w./-]+))?"
)
_LOCAL = re.compile(r"(?P<name>[^:@]+)(?::(?P<split>[\w.\[\]%+:-]+))?")


@dataclass(frozen=True)
class HubSpec:
    name: str
    config: str = ""
    split: str = "train"
    revision: str = ""

    @classmethod
    def read(cls, path: str) -> "HubSpec":
        """What `hf:...` says; UserError if it says nothing of the form above."""
        text = path.removeprefix(HUB)
        found = (_LOCAL if text.startswith(_PLACES) else _SPEC).fullmatch(text)
        if not found:
            raise UserError(f"{shown(path)} is no data set: write hf:OWNER/NAME[/CONFIG][:SPLIT][@REVISION]")
        given = {key: value for key, value in found.groupdict().items() if value}
        if text.startswith(_PLACES):
            given["name"] = str(Path(given["name"]).expanduser().absolute())
        return cls(**given)

    def __str__(self) -> str:
        config = f"/{self.config}" if self.config else ""
        return f"{HUB}{self.name}{config}:{self.split}{f'@{self.revision}' if self.revision else ''}"


class HubSource:
    """The documents of a split of a data set."""

    def __init__(self, path: str, rows: Rows):
        self.spec, self.rows = HubSpec.read(path), rows
        self.root = str(self.spec)
        _library(str(self.spec))

    def size(self) -> None:
        """Bytes to read, which nobody knows beforehand."""

    def identity(self) -> Any:
        """The data set by name and, of a local folder, the names, sizes and times of its files."""
        folder = Path(self.spec.name)
        if not folder.is_absolute():
            return str(self.spec)
        with explained(folder, "read"):
            files = sorted(p for p in folder.rglob("*") if p.is_file()) if folder.is_dir() else []
            return [self.spec.split, *([f.relative_to(folder).as_posix(), *_size_and_time(f)] for f in files)]

    def documents(self, on_read: Callable[[int], None]) -> Iterator[str]:
        """Its documents in order; on_read is told how many bytes of text have come so far."""
        done, some = 0, False
        for number, record in enumerate(self._records(), 1):
            if number == 1:
                self.rows.columns(list(record), str(self.spec))
            for text in self.rows.documents(record, f"row {number} of {self.spec}"):
                done += len(text.encode())
                on_read(done)
                if text and not text.isspace():
                    some = True
                    yield text
        if not some:
            raise UserError(f"{self.spec} holds no text: give another split or another data set")

    def _records(self) -> Iterator[dict[str, Any]]:
        datasets, spec = _library(str(self.spec)), self.spec
        if Path(spec.name).is_absolute() and not Path(spec.name).is_dir():
            raise UserError(f"there is no folder {spec.name}: give the folder of a data set")
        with _quiet(datasets):
            try:
                found = datasets.load_dataset(
                    spec.name, spec.config or None, split=spec.split, revision=spec.revision or None, streaming=True
                )
                yield from found
            except UserError:
                raise
            except Exception as error:  # the library's errors, the network's and those of every format it reads
                raise UserError(
                    f"cannot read {spec} ({type(error).__name__}: {reason_of(error)[:200]}): check its name, split and "
                    "revision and that this machine reaches the hub, or give files"
                ) from None


def _library(what: str) -> Any:
    # a run says itself what it reads, and rows are streamed, so there is nothing whose progress is worth a bar
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        import datasets
    except ImportError:
        raise UserError(f"reading {what} needs the datasets package: pip install 'dsv4[data]'") from None
    return datasets


@contextmanager
def _quiet(datasets: Any) -> Iterator[None]:
    """The library logs an error before it raises it, in a form that is not ours."""
    logger = logging.getLogger(datasets.__name__)
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def _size_and_time(file: Path) -> tuple[int, int]:
    found = file.stat()
    return found.st_size, found.st_mtime_ns
