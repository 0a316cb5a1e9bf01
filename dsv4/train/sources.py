"""Where training text comes from: the user's .txt, .jsonl and .parquet files, read document by document.

Nothing here tokenises (data.py does) and nothing is held in memory but the document at hand, a batch of
.parquet rows or, of a long .txt, about a megabyte. Every defect of a file is one sentence that names the
file and the place.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal

from dsv4.errors import UserError

TXT_DOCUMENT_BYTES = 1 << 20  # a longer .txt becomes several documents, cut at line ends
HOLD_OUT_EVERY = 20


def read_documents(path: str | Path, field: str = "text") -> Iterator[str]:
    """The documents of a file, or of a folder of files in sorted order (subfolders too, hidden names not).

    .txt: the file is one document, or several of about a megabyte. .jsonl: one JSON object per line, the
    text in `field`. .parquet: one document per row, the text in column `field`. Files of other kinds in a
    folder are passed over, as are documents without a visible character. Line ends become "\\n" in .txt; a
    byte-order mark is dropped.

    Whether the files exist, have contents and can be read by this installation is checked at once. A
    UserError about what is in them comes when the reading gets there: invalid UTF-8, bad JSON, a missing
    field or column.
    """
    files = data_files(path)
    for file in files:
        if file.stat().st_size == 0:
            raise UserError(f"{file} is empty: give a file with text in it")
        if _kind(file) == ".parquet":
            _pyarrow_parquet(file)
    return chain.from_iterable(_read_file(file, field) for file in files)


def data_files(path: str | Path) -> list[Path]:
    """The files that read_documents would read, in its order. UserError if there are none."""
    path = Path(path)
    if path.is_dir():
        found = [f for f in sorted(path.rglob("*")) if _kind(f) in READERS and f.is_file()]
        found = [f for f in found if not any(part.startswith(".") for part in f.relative_to(path).parts)]
        if not found:
            raise UserError(f"the folder {path} holds no {KINDS} file: put the training text there")
        return found
    if not path.exists():
        raise UserError(f"there is no file or folder {path}: give a {KINDS} file or a folder of them")
    if _kind(path) not in READERS:
        raise UserError(f"{path} is not a {KINDS} file: convert it to one of these")
    return [path]


def hold_out(
    documents: Iterable[str], split: Literal["train", "heldout"], every: int = HOLD_OUT_EVERY
) -> Iterator[str]:
    """One split of documents that come without one: of every `every` in a row, the middle one is held out.

    Fewer documents than that are each cut instead, and the last 1/every of each is held out. By position
    alone, so the two splits, read at different times, never overlap and together are everything.
    """
    documents = iter(documents)
    head = list(islice(documents, every))
    if len(head) < every:
        yield from filter(None, (_part(text, split, every) for text in head))
        return
    for position, text in enumerate(chain(head, documents)):
        if (position % every == every // 2) == (split == "heldout"):
            yield text


def _part(text: str, split: str, every: int) -> str:
    """The beginning of a text, or its last 1/every, parted before a space where there is one."""
    cut = len(text) - len(text) // every
    cut = max(text.rfind(" ", 0, cut), 0) or cut
    return text[cut:] if split == "heldout" else text[:cut]


def _read_file(file: Path, field: str) -> Iterator[str]:
    found = False
    for text in READERS[_kind(file)](file, field):
        if text and not text.isspace():
            found = True
            yield text
    if not found:
        raise UserError(f"{file} holds no text: every document in it is empty")


def _read_txt(file: Path, field: str) -> Iterator[str]:
    lines, size = [], 0
    for _, line in _lines(file):
        lines.append(line)
        size += len(line)
        if size >= TXT_DOCUMENT_BYTES:
            yield "".join(lines)
            lines, size = [], 0
    yield "".join(lines)


def _read_jsonl(file: Path, field: str) -> Iterator[str]:
    for number, line in _lines(file):
        if not line.strip():
            continue
        place = f"line {number} of {file}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{place} is not JSON ({error}): correct the line") from None
        if not isinstance(record, dict):
            raise UserError(f"{place} is a {type(record).__name__}, not a JSON object: correct the line")
        if field not in record:
            have = ", ".join(record) or "none"
            raise UserError(f"{place} lacks the field {field!r} (it has {have}): name another field")
        yield _checked(record[field], place, field)


def _read_parquet(file: Path, field: str) -> Iterator[str]:
    parquet = _pyarrow_parquet(file)
    try:
        table = parquet.ParquetFile(file)
    except Exception as error:  # pyarrow's own exceptions share no base class but this one
        reason = str(error).splitlines()[0]
        raise UserError(f"{file} is not a readable parquet file ({reason}): copy or write it again") from None
    with table:
        names = table.schema_arrow.names
        if field not in names:
            have = ", ".join(names)
            raise UserError(f"{file} lacks the column {field!r} (it has {have}): name another column")
        batches = table.iter_batches(batch_size=256, columns=[field])
        rows = chain.from_iterable(batch.column(0).to_pylist() for batch in batches)
        for number, value in enumerate(rows, start=1):
            yield _checked(value, f"row {number} of {file}", field)


READERS: dict[str, Callable[[Path, str], Iterator[str]]] = {
    ".txt": _read_txt,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}
KINDS = ".txt, .jsonl or .parquet"


def _kind(file: Path) -> str:
    return file.suffix.lower()


def _lines(file: Path) -> Iterator[tuple[int, str]]:
    """(number from 1, line) of a UTF-8 file; read as bytes so that a bad byte can be blamed on its line."""
    with _opened(file) as contents:
        for number, line in enumerate(contents, start=1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                bad = f"byte 0x{error.object[error.start]:02x}"
                raise UserError(f"line {number} of {file} is not UTF-8 ({bad}): save it as UTF-8") from None
            yield number, text.replace("\r\n", "\n")


def _opened(file: Path):
    try:
        return file.open("rb")
    except OSError as error:
        raise UserError(f"cannot read {file} ({error.strerror}): check its permissions") from None


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


def _pyarrow_parquet(file: Path):
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"reading {file} needs pyarrow: pip install pyarrow") from None
    return pyarrow.parquet
