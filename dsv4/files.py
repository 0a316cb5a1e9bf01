"""Files, whole or not at all: atomic writes, strict small reads, digests, a folder's lock.

Every small file of dsv4 is written and read here, so that a full disk, a damaged file or a folder that somebody else
is using ends in one sentence with the path in it, and never in half a file. What the files mean is not known here.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dsv4.errors import FileError, UserError

DIGESTS = "digests.json"  # beside the files it lists: sha256 of each, by name
TEMPORARY = ".tmp"  # the end of a name that begins with a dot: a file that is not there yet
_BLOCK = 1 << 20


# --- writing ---------------------------------------------------------------------------------------------------------


@contextmanager
def explained(path: str | Path, doing: str = "write", safe: str = "") -> Iterator[None]:
    """Turn the OSError of an operation on `path` into a FileError; `safe` ends it: what is still in good order."""
    try:
        yield
    except OSError as error:
        rest = f"; {safe}" if safe else ""
        raise FileError(f"cannot {doing} {path}: {reason_of(error)}{rest}") from None


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
    """The JSON object in a file; UserError if it cannot be read, is damaged, or holds something else."""
    return parse_json(read_text(path, what, remedy), f"{what} {path}", remedy)


def parse_json(text: str, what: str, remedy: str) -> dict[str, Any]:
    """The JSON object that a text is; UserError otherwise, also for nesting or digits beyond all reason."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{what} is not valid JSON ({reason_of(error)[:100]}); {remedy}") from None
    if not isinstance(value, dict):
        raise UserError(f"{what} must hold a JSON object, not a {type(value).__name__}; {remedy}")
    return value


def read_lines(source: Path | Iterable[bytes], what: str = "") -> Iterator[tuple[int, str]]:
    """(number from 1, line without its end) of a UTF-8 file of lines, or of an open one.

    Lines end at \\n or \\r\\n and nowhere else (U+2028, U+000B, U+000C are text); a byte-order mark is dropped.
    UserError for bytes that are not UTF-8, and for NULs, which UTF-16 without a mark is full of.
    """
    if isinstance(source, Path):
        with explained(source, "read"), source.open("rb") as file:
            yield from read_lines(file, what or str(source))
        return
    for number, raw in enumerate(source, start=1):
        try:
            line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            bad = f"byte 0x{error.object[error.start]:02x}"
            raise UserError(f"line {number} of {what} is not UTF-8 ({bad}): save it as UTF-8") from None
        if "\0" in line:
            raise UserError(f"line {number} of {what} holds NUL characters, as UTF-16 does: save it as UTF-8")
        yield number, line.removesuffix("\n").removesuffix("\r")


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
    """UserError if a file that digests.json lists is missing or has changed; a folder without the list is not judged."""
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
        self.path = folder / ".lock"
        with explained(self.path):
            self._file = self.path.open("a")
        try:
            import fcntl
        except ImportError:  # not a Unix: the lock is then a courtesy only
            return
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise UserError(
                f"another process is working in {folder}: wait for it, stop it, or choose another folder"
            ) from None
        except OSError:  # a file system without locks
            pass

    def release(self) -> None:
        self._file.close()


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files and folders that a crash left in `folder`; only its lock's holder may."""
    import shutil

    for path in folder.glob(f".*{TEMPORARY}"):
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() and not path.is_symlink() else discard(path)
