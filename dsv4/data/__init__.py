"""The embedded corpus: 12 MB of public-domain English prose, shipped compressed, split by whole documents.

State of the Union addresses and Moby Dick; origin and licence are stated in README.md beside this file.
Each split is one xz file of JSON lines, each with a `source` (where the document comes from) and its `text`.
build.py made the files; tokenising and packing are left to dsv4.train.packed.
"""

import json
import lzma
from collections.abc import Iterator
from importlib.resources import files
from typing import Any, Literal

from dsv4.errors import FileError
from dsv4.files import reason_of

Split = Literal["train", "heldout"]


def documents(split: Split) -> Iterator[str]:
    """The texts of one split, always in the same order (addresses by year, then chapters)."""
    for record in records(split):
        yield record["text"]


def records(split: Split) -> Iterator[dict[str, str]]:
    """The same documents with their origin: {"source": "sotu/1862_abraham_lincoln_r", "text": ...}.

    FileError if the file is not there or not whole; its own check sum notices a changed bit.
    """
    name = f"corpus.{split}.jsonl.xz"
    try:
        with (files(__name__) / name).open("rb") as packed, lzma.open(packed) as lines:
            for line in lines:
                yield json.loads(line)
    except (OSError, EOFError, lzma.LZMAError, ValueError) as error:
        raise FileError(f"cannot read the embedded corpus {name} ({reason_of(error)}): install dsv4 again") from None


def facts() -> dict[str, Any]:
    """corpus.json: per split the number of documents, the UTF-8 bytes of text and the JSON lines' sha256."""
    try:
        return json.loads((files(__name__) / "corpus.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FileError(f"cannot read the embedded corpus.json ({reason_of(error)}): install dsv4 again") from None
