"""Where training text comes from: the user's .txt, .jsonl and .parquet files, read document by document.

Nothing here tokenises (packed.py does). What is held in memory has a bound that the files cannot move: a text longer
than DOCUMENT_CHARS (rows.py) is cut into several documents while it is read, a .jsonl line has at most LINE_BYTES, a
.parquet comes PARQUET_ROWS rows at a time. Every defect of a file is one sentence that names the file and the place.
"""

import gzip
import io
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path
from typing import Any, BinaryIO, Literal

from dsv4.errors import UserError
from dsv4.files import StrictDecoder, explained, parse_json, read_lines, reason_of
from dsv4.train.rows import Rows, TextRows, cut_up, names_of, place_to_cut, say_once

LINE_BYTES = 32 << 20  # of a .jsonl line, which is held whole and a few times over while it is read
BLOCK_BYTES = 1 << 20
PARQUET_ROWS = 16
HOLD_OUT_EVERY = 20

KINDS = ".txt, .jsonl or .parquet"
PACKINGS = (".gz", ".zst")  # of .txt and .jsonl; a .parquet is compressed inside

Read = Callable[[int], None]  # told how many bytes of the files have been read so far
Place = Callable[[], int]  # how many bytes of a file have been read so far


def read_documents(path: str | Path, field: str = "text", on_read: Read = lambda done: None) -> Iterator[str]:
    """The documents of a file, or of a folder of files in sorted order (subfolders too, hidden names not).

    .txt: the file is one document. .jsonl: one JSON object per line, the text in `field`. .parquet: one document
    per row, the text in column `field`. .txt and .jsonl may be compressed (.txt.gz, .jsonl.zst). A text longer
    than DOCUMENT_CHARS becomes several documents (as `bounded` cuts them); documents without a visible character
    are passed over. Line ends become "\\n" in .txt; a byte-order mark is dropped.

    Whether the files exist, have contents and can be read by this installation is checked at once. A
    UserError about what is in them comes when the reading gets there: invalid UTF-8, bad JSON, a missing
    field or column, damage. Of several files some may be empty, which is said once; all of them may not.
    """
    return read_files(data_files(path), TextRows(field), on_read)


def data_files(path: str | Path) -> list[Path]:
    """The files that read_documents would read, in its order. UserError if there are none.

    What a folder holds besides is listed once, on the logger "dsv4"; a broken link in it is an error.
    """
    path = Path(path)
    with explained(path, "read"):
        if path.is_dir():
            found, others = _survey(path)
            if not found:
                raise UserError(f"the folder {path} holds no {KINDS} file: put the training text there")
            if others:
                say_once(f"passed over in {path}, as they are no {KINDS} files: {names_of(others)}")
            return found
        if not path.exists():
            raise UserError(f"there is no file or folder {path}: give a {KINDS} file or a folder of them")
        if _kind(path) == NO_KIND or not path.is_file():
            raise UserError(
                f"{path} is not a {KINDS} file: convert it to one of these (.txt and .jsonl also as .gz or .zst)"
            )
        return [path]


def read_files(files: Sequence[Path], rows: Rows, on_read: Read = lambda done: None) -> Iterator[str]:
    """The documents of these files, one file after another; rows: what is taken of a line or row.

    What can be known at once is said at once, as by `read_documents`; a .txt has no rows, so it is text alone.
    """
    sizes = [size_of(file) for file in files]
    empty = [str(file) for file, size in zip(files, sizes, strict=True) if size == 0]
    if len(empty) == len(files):
        raise UserError(f"{names_of(empty)} {'is' if len(empty) == 1 else 'are'} empty: give a file with text in it")
    if empty:
        say_once(f"passed over, as they are empty: {names_of(empty)}")
    for file in files:
        kind, packing = _kind(file)
        if kind == ".parquet":
            _pyarrow_parquet(file)
        if packing == ".zst":
            _zstd_opener(file)
    return _documents([(file, size) for file, size in zip(files, sizes, strict=True) if size], rows, on_read)


def size_of(file: Path) -> int:
    """Bytes of a file; UserError if it is gone."""
    with explained(file, "read"):
        return file.stat().st_size


def without(files: Iterable[Path], others: Iterable[Path]) -> tuple[list[Path], list[Path]]:
    """(the files that are none of `others`, those that are); the same file under another name or link is the same."""

    def identity(file: Path) -> tuple[int, int]:
        with explained(file, "read"):
            found = file.stat()
        return found.st_dev, found.st_ino

    taken = {identity(file) for file in others}
    kept, left = [], []
    for file in files:
        (left if identity(file) in taken else kept).append(file)
    return kept, left


def hold_out(
    documents: Iterable[str], split: Literal["train", "heldout"], every: int = HOLD_OUT_EVERY, *, whole: bool = False
) -> Iterator[str]:
    """One split of documents that come without one: of every `every` in a row, the middle one is held out.

    Fewer documents than that are each cut instead: the last 1/every of each is held out, or up to a tenth of the
    text more where a line end or a space is near. A document of fewer than `every` characters stays whole, in
    train. With `whole`, no document is cut: of few the last is held out, a single one is trained on. By position
    alone, so the two splits, read at different times, never overlap and together are everything.
    """
    documents = iter(documents)
    head = list(islice(documents, every))
    if len(head) < every and whole:
        yield from (head[:-1] or head) if split == "train" else head[1:][-1:]
        return
    if len(head) < every:
        yield from filter(None, (_part(text, split, every) for text in head))
        return
    for position, text in enumerate(chain(head, documents)):
        if (position % every == every // 2) == (split == "heldout"):
            yield text


def _part(text: str, split: str, every: int) -> str:
    """The beginning of a text, or about its last 1/every."""
    cut = len(text) - len(text) // every
    if cut < len(text):
        cut = place_to_cut(text, cut, cut // 10)
    return text[cut:] if split == "heldout" else text[:cut]


# --- a folder of files ---

NO_KIND = ("", "")


def _kind(file: Path) -> tuple[str, str]:
    """(what a file holds, how it is compressed), by its name: (".jsonl", ".gz"), (".txt", ""), NO_KIND."""
    suffixes = [suffix.lower() for suffix in file.suffixes[-2:]]
    packing = suffixes.pop() if suffixes and suffixes[-1] in PACKINGS else ""
    kind = suffixes[-1] if suffixes else ""
    known = kind in READERS and not (packing and kind == ".parquet")
    return (kind, packing) if known else NO_KIND


def _survey(folder: Path) -> tuple[list[Path], list[str]]:
    """(files to read in sorted order, names of what is passed over); hidden names are neither."""

    def failed(error: OSError) -> None:
        raise error  # a sub-folder that cannot be read would otherwise be left out in silence

    found: list[Path] = []
    others: list[str] = []
    for place, folders, names in os.walk(folder, onerror=failed):
        folders[:] = [name for name in folders if not name.startswith(".")]
        others += [f"{name}/ (a link)" for name in folders if (Path(place) / name).is_symlink()]
        for file in (Path(place) / name for name in names if not name.startswith(".")):
            if file.is_symlink() and not file.exists():
                raise UserError(f"{file} is a link to something that is not there: mend or remove the link")
            if _kind(file) != NO_KIND and file.is_file():
                found.append(file)
            else:
                others.append(file.name)
    return sorted(found), sorted(others)


# --- one file ---


def _documents(files: Sequence[tuple[Path, int]], rows: Rows, on_read: Read) -> Iterator[str]:
    before = 0
    barren: list[str] = []
    for file, size in files:
        found = False
        for text, place in READERS[_kind(file)[0]](file, rows):
            on_read(before + place)
            if text and not text.isspace():
                found = True
                yield text
        before += size
        on_read(before)
        if not found:
            barren.append(str(file))
    if len(barren) == len(files):
        holds = "holds no text: every document in it is empty" if len(files) == 1 else "hold no text"
        raise UserError(f"{names_of(barren)} {holds}; give text to read")
    if barren:
        say_once(f"passed over, as every document in them is empty: {names_of(barren)}")


def _read_txt(file: Path, rows: Rows) -> Iterator[tuple[str, int]]:
    if not isinstance(rows, TextRows):
        raise UserError(f"{file} is plain text, not rows of messages: give .jsonl or .parquet, or set data.format=text")
    with _opened(file) as (contents, place):
        for text in cut_up(_decoded(contents, str(file))):
            yield text, place()


def _decoded(contents: BinaryIO, what: str) -> Iterator[str]:
    """The text of an open file, a block at a time; "\\r\\n" becomes "\\n"."""
    decoder, held = StrictDecoder(what), ""
    while raw := contents.read(BLOCK_BYTES):
        text = held + decoder.decode(raw)
        held = "\r" if text.endswith("\r") else ""  # its "\n" may come with the next block
        yield text.removesuffix("\r").replace("\r\n", "\n")
    yield held + decoder.decode(b"", final=True)


def _read_jsonl(file: Path, rows: Rows) -> Iterator[tuple[str, int]]:
    with _opened(file) as (contents, place):
        for number, line in read_lines(_lines(contents, file), str(file)):
            if not line or line.isspace():
                continue
            where = f"line {number} of {file}"
            record = parse_json(line, where, "correct the line")
            for text in rows.documents(record, where):
                yield text, place()


def _lines(contents: BinaryIO, file: Path) -> Iterator[bytes]:
    number = 0
    while raw := contents.readline(LINE_BYTES + 1):
        number += 1
        if len(raw) > LINE_BYTES:
            limit = f"{LINE_BYTES:,} bytes, the most that a line may have"
            raise UserError(f"line {number} of {file} is longer than {limit}: split its text over several lines")
        yield raw


def _read_parquet(file: Path, rows: Rows) -> Iterator[tuple[str, int]]:
    parquet = _pyarrow_parquet(file)
    try:
        with parquet.ParquetFile(file, buffer_size=BLOCK_BYTES) as table:
            columns, size, number = rows.columns(table.schema_arrow.names, str(file)), size_of(file), 0
            for batch in table.iter_batches(batch_size=PARQUET_ROWS, columns=columns):
                for record in batch.to_pylist():
                    number += 1
                    for text in rows.documents(record, f"row {number} of {file}"):
                        yield text, size * number // table.metadata.num_rows
    except UserError:
        raise
    except Exception as error:  # pyarrow's own exceptions share no base class but this one
        raise UserError(f"{file} is not a readable parquet file ({reason_of(error)}): copy or write it again") from None


READERS: dict[str, Callable[[Path, Rows], Iterator[tuple[str, int]]]] = {
    ".txt": _read_txt,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}


@contextmanager
def _opened(file: Path) -> Iterator[tuple[BinaryIO, Place]]:
    """The contents of a file, unpacked, and how far it has been read; what goes wrong meanwhile is one sentence."""
    packing = _kind(file)[1]
    with explained(file, "read"), file.open("rb") as raw:
        if not packing:
            yield raw, raw.tell
            return
        try:
            unpacked: Any = _zstd_opener(file)(raw) if packing == ".zst" else gzip.GzipFile(fileobj=raw)
            with unpacked as contents:
                yield contents, raw.tell
        except (OSError, EOFError, zlib.error, *_zstd_errors()) as error:
            if isinstance(error, OSError) and error.errno is not None:  # the disk's, not the packing's
                raise
            raise UserError(f"{file} is damaged or cut short ({reason_of(error)}): copy or pack it again") from None


def _zstd_opener(file: Path) -> Callable[[BinaryIO], Any]:
    """What unpacks an open .zst: the standard library of Python 3.14, else pyarrow."""
    try:
        from compression.zstd import ZstdFile  # type: ignore[import-not-found]

        return ZstdFile
    except ImportError:
        pass
    try:
        import pyarrow
    except ImportError:
        raise UserError(f"reading {file} needs Python 3.14 or pyarrow: pip install pyarrow") from None

    def opened(raw: BinaryIO) -> io.BufferedReader:
        stream: Any = pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, mode="r"), "zstd")
        return io.BufferedReader(stream)

    return opened


def _zstd_errors() -> tuple[type[Exception], ...]:
    """What unpacking a damaged .zst raises besides OSError and EOFError."""
    try:
        from compression.zstd import ZstdError  # type: ignore[import-not-found]

        return (ZstdError,)
    except ImportError:
        return ()


def _pyarrow_parquet(file: Path):
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"reading {file} needs pyarrow: pip install pyarrow") from None
    return pyarrow.parquet
