"""Files, whole or not at all: atomic writes, strict small reads, digests, a folder's lock.

Every small file of dsv4 is written and read here, so that a full disk, a damaged file or a folder that somebody else
is using ends in one sentence with the path in it, and never in half a file. What the files mean is not known here.
"""

import codecs
import hashlib
import json
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dsv4.errors import FileError, UserError, shown

DIGESTS = "digests.json"  # beside the files it lists: sha256 of each, by name
TEMPORARY = ".tmp"  # the end of a name that begins with a dot: a file that is not there yet
LARGEST_JSON = 32 << 20  # bytes of a file that is parsed whole, which takes some 25 times as many; an index needs 15 MB
_BLOCK = 1 << 20
MODE = 0o666 & ~(_umask := os.umask(0o077))  # what a new file of this process is allowed; asking for it sets it
os.umask(_umask)
_OTHER_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE)  # UTF-32-LE begins as UTF-16-LE


# --- writing ---------------------------------------------------------------------------------------------------------


@contextmanager
def explained(path: str | Path, doing: str = "write", safe: str = "") -> Iterator[None]:
    """Turn the OSError of an operation on `path` into a FileError; `safe` ends it: what is still in good order.

    doing "read" makes it a plain UserError: what cannot be read was named by the user.
    """
    try:
        yield
    except OSError as error:
        rest = f"; {safe}" if safe else ""
        kind = UserError if doing == "read" else FileError
        raise kind(f"cannot {doing} {path}: {reason_of(error)}{rest}") from None


def reason_of(error: BaseException) -> str:
    """Why a file operation failed, in a few words."""
    return (getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__)[:300]


def write_atomically(path: Path, write: Callable[[Path], object], *, safe: str = "") -> None:
    """Let `write` fill a temporary neighbour of `path`, then rename it: readers see the old file or the new one.

    The bytes are on the disk before the name is. FileError if the machine does not allow it; the old file stays.
    """
    temporary = path.with_name(f".{path.name}{TEMPORARY}")
    with explained(path, safe=safe):
        try:
            write(temporary)
            synchronise(temporary)
            os.replace(temporary, path)
        except BaseException:
            discard(temporary)
            raise
        synchronise(path.parent)


def write_text(path: Path, text: str, *, safe: str = "") -> None:
    """Write a UTF-8 file whole or not at all."""
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8", newline=""), safe=safe)


def write_json(path: Path, value: Any, *, safe: str = "") -> None:
    """Write a value as JSON, whole or not at all; a NaN or an infinity in it is a mistake of ours."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n", safe=safe)


def make_folder(path: Path) -> None:
    """Create a folder and its parents; FileError if something else is in the way or it is not allowed."""
    with explained(path, "make the folder"):
        path.mkdir(parents=True, exist_ok=True)


def synchronise(path: Path) -> None:
    """Have the machine put a file, or the names in a folder, on its disk before going on."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def discard(path: Path) -> None:
    """Remove a file if it is there and can be removed: for what is being abandoned anyway."""
    try:
        path.unlink()
    except OSError:
        pass


# --- reading ---------------------------------------------------------------------------------------------------------


def read_text(path: Path, what: str, remedy: str) -> str:
    """The text of a UTF-8 file (a byte-order mark is dropped). UserError: "cannot read WHAT PATH: reason; REMEDY"."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"cannot read {what} {path}: {reason_of(error)}; {remedy}") from None
    except UnicodeDecodeError:
        raise UserError(f"{what} {path} is not UTF-8 text; {remedy}") from None


def read_json(path: Path, what: str, remedy: str) -> dict[str, Any]:
    """The JSON object in a file; UserError if it cannot be read, is damaged, or holds something else.

    What is no regular file, or has more than LARGEST_JSON bytes, is refused unread.
    """
    with explained(path, "read"):
        about = path.stat() if path.exists() else None  # read_text says that it is not there
    if about and not stat.S_ISREG(about.st_mode) and not stat.S_ISDIR(about.st_mode):
        raise UserError(f"{what} {path} is no regular file; {remedy}")
    if about and about.st_size > LARGEST_JSON:
        raise UserError(f"{what} {path} has {about.st_size:,} bytes, at most {LARGEST_JSON:,} are read; {remedy}")
    return parse_json(read_text(path, what, remedy), f"{what} {path}", remedy)


def parse_json(text: str, what: str, remedy: str) -> dict[str, Any]:
    """The JSON object that a text is; UserError otherwise, also for nesting or digits beyond all reason, and for a name
    that an object has twice."""
    try:
        value = json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{what} is not valid JSON ({reason_of(error)[:100]}); {remedy}") from None
    if not isinstance(value, dict):
        raise UserError(f"{what} must hold a JSON object, not a {type(value).__name__}; {remedy}")
    return value


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object_pairs_hook for json: ValueError for a name that is there twice, which readers take differently."""
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))
        raise ValueError(f"{shown(twice)} is there twice")
    return found


def read_lines(source: Path | Iterable[bytes], what: str = "") -> Iterator[tuple[int, str]]:
    """(number from 1, line without its end) of a UTF-8 file of lines, or of an open one.

    Lines end at \\n or \\r\\n and nowhere else (U+2028, U+000B, U+000C are text); a byte-order mark is dropped.
    UserError for bytes that are not UTF-8, and for NULs, which UTF-16 without a mark is full of.
    """
    if isinstance(source, Path):
        with explained(source, "read"), source.open("rb") as file:
            yield from read_lines(file, what or str(source))
        return
    decoder = StrictDecoder(what)
    for number, raw in enumerate(source, start=1):
        decoder.line = number
        line = decoder.decode(raw, final=True)
        yield number, line[:-2] if line.endswith("\r\n") else line.removesuffix("\n")


class StrictDecoder:
    """The bytes of a UTF-8 file, part by part -> its text; a byte-order mark is dropped.

    UserError that names the line for bytes that are not UTF-8, and for NULs. `line` is the number of the next one.
    """

    def __init__(self, what: str):
        self.what, self.line = what, 1
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()

    def decode(self, raw: bytes, *, final: bool = False) -> str:
        """The text of the next bytes; a character that they do not finish comes with the next ones unless final."""
        try:
            text = self._decoder.decode(raw, final)
        except UnicodeDecodeError as error:
            line = self.line + error.object.count(b"\n", 0, error.start)
            bad = f"byte 0x{error.object[error.start]:02x}"
            if line == 1 and raw.startswith(_OTHER_MARKS):
                bad = "it begins with the mark of UTF-16 or UTF-32"
            raise UserError(f"line {line} of {self.what} is not UTF-8 ({bad}): save it as UTF-8") from None
        if (at := text.find("\0")) >= 0:
            line = self.line + text.count("\n", 0, at)
            raise UserError(f"line {line} of {self.what} holds NUL characters, as UTF-16 does: save it as UTF-8")
        self.line += text.count("\n")
        return text


# --- digests ---------------------------------------------------------------------------------------------------------


def sha256_of(path: Path) -> str:
    """sha256 (64 hex digits) of a file, read block by block."""
    digest = hashlib.sha256()
    with explained(path, "read"), path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def write_digests(folder: Path) -> None:
    """List the sha256 of every file of a folder in its digests.json."""
    names = sorted(p.name for p in folder.iterdir() if p.is_file() and p.name != DIGESTS)
    write_json(folder / DIGESTS, {name: sha256_of(folder / name) for name in names})


def check_digests(folder: Path, only: Callable[[str], bool] = lambda name: True) -> None:
    """UserError if a file that digests.json lists is missing or changed; a folder without the list is not judged."""
    listing = folder / DIGESTS
    if not listing.exists():
        return
    remedy = "use another copy of it, or remove digests.json if the change was meant"
    for name, digest in read_json(listing, "the list of digests", remedy).items():
        if not only(name):
            continue
        if Path(name).name != name or not (folder / name).is_file():
            raise UserError(f"{folder} lacks {name!r}, which its digests.json lists: {remedy}")
        if sha256_of(folder / name) != digest:
            raise UserError(f"{folder / name} has changed since it was written: {remedy}")


# --- one user at a time ----------------------------------------------------------------------------------------------


class FolderLock:
    """Held while a folder is being written; the machine lets go of it when its process ends, however that happens."""

    def __init__(self, folder: Path):
        path = folder / ".lock"
        with explained(path):
            self._handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            import fcntl

            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.release()
            raise UserError(
                f"another process is working in {folder}: wait for it, stop it, or choose another folder"
            ) from None
        except (ImportError, OSError):  # no Unix, or a file system without locks: then it is a courtesy only
            pass

    def release(self) -> None:
        """Let others in; again and again is no error."""
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1

    def __del__(self) -> None:
        if hasattr(self, "_handle"):
            self.release()


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files and folders that a crash left in `folder`; only its lock's holder may."""
    import shutil

    for path in folder.glob(f".*{TEMPORARY}"):
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() and not path.is_symlink() else discard(path)
