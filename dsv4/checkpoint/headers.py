"""The headers of safetensors files, read strictly and by themselves: no tensor, no torch, nothing that executes.

A file is 8 bytes (the length n of the header, little-endian), n bytes of JSON, the tensors' bytes. The header maps
a name to {"dtype", "shape", "data_offsets": [begin, end]}, and `__metadata__` to strings. Every rule of the format is
held to: the bytes are covered once and wholly, sizes follow from dtype and shape, no name is there twice.
"""

import json
import math
import os
import stat
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from dsv4 import files
from dsv4.errors import UserError, shown

# Parsing takes at most some 25 bytes for one of the header. All of V4-Pro's 150,000 tensors in one file need 18 MB.
LARGEST_HEADER = 32 << 20
_LARGEST_SIZE = 1 << 48  # of one axis: beyond it torch cannot say the shape of an empty tensor
_MOST_AXES = 16
LONGEST_NAME = 1000  # characters: a sentence about a tensor or a file stays one
_MARGIN = 64  # bytes that tell what a file is that is none of ours

BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64,
    "C64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip
_KEYS = {"dtype", "shape", "data_offsets"}


class TensorInfo(NamedTuple):
    """What a header says of a tensor; `begin` and `end` are counted from the start of the file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def num_bytes(self) -> int:
        return self.end - self.begin


class Header(NamedTuple):
    """The tensors of one file by name, as they stand in it, its metadata, its length in bytes.

    aligned: every tensor begins at a multiple of its elements' size, so that it can be used where it is mapped.
    """

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]
    size: int
    aligned: bool


class _Bad(Exception):
    """Why a file is not what it should be, and what to do about it."""

    def __init__(self, reason: str, remedy: str = "fetch it again"):
        super().__init__(reason)
        self.remedy = remedy


def read_header(path: Path) -> Header:
    """The header of a safetensors file; UserError, in one sentence, for anything that is none or is not whole.

    Reads the header alone, at most LARGEST_HEADER bytes. A device, a pipe or a folder under the name is refused unread.
    """
    try:
        with _opened(path) as file:
            return _header(file, os.fstat(file.fileno()).st_size)
    except _Bad as bad:
        reason, remedy = str(bad), bad.remedy
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        reason, remedy = files.reason_of(error), "fetch it again"
    raise UserError(f"{path} cannot be read, or is truncated or damaged ({reason}): {remedy}")


def header_length(start: bytes) -> int:
    """Bytes of the header by the first 8 of a file; UserError if they say no length that a header has."""
    try:
        return _length(start)
    except _Bad as bad:
        raise UserError(f"this is no safetensors file ({bad}): {bad.remedy}") from None


def _header(file: BinaryIO, size: int) -> Header:
    start = file.read(8 + _MARGIN)
    if len(start) < 8:
        raise _Bad(f"it ends after {len(start)} bytes")
    length = _length(start)
    if length > size - 8:
        raise _Bad(f"its header of {length:,} bytes is longer than the file of {size:,}")
    file.seek(8)
    entries = _entries(file.read(length))
    metadata = entries.pop("__metadata__", None)
    return _checked(entries, _strings(metadata), 8 + length, size)


def _opened(path: Path) -> BinaryIO:
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | getattr(os, "O_NONBLOCK", 0))  # a pipe would wait for a writer
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise _Bad("it is no regular file", "put the file itself there")
    return os.fdopen(handle, "rb")


def _length(start: bytes) -> int:
    """The header's length, or what the file is instead: told by how it begins."""
    if start[8:9] != b"{" or int.from_bytes(start[:8], "little") > LARGEST_HEADER:
        _name_stranger(start)
    length = int.from_bytes(start[:8], "little")
    if length > LARGEST_HEADER:
        raise _Bad(f"its header would have {length:,} bytes, and at most {LARGEST_HEADER:,} are read")
    if length < 2:
        raise _Bad(f"its header has {length} bytes")
    if start[8:9] not in (b"{", b""):
        raise _Bad("its header does not begin with '{'")
    return length


def _name_stranger(start: bytes) -> None:
    """What is known by its first bytes to be something else."""
    text = start.lstrip()[:32].lower()
    if start.startswith((b"PK\x03\x04", b"PK\x05\x06")) or (start[:1] == b"\x80" and start[1:2] in b"\x02\x03\x04\x05"):
        raise _Bad(
            "it is a pickle or a zip file under another name, which could run code and is never opened",
            "get the model's .safetensors files",
        )
    if text.startswith(b"version https://git-lfs"):
        raise _Bad("it is Git LFS's note in place of the file", "fetch the file itself, with git lfs pull")
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        raise _Bad("it is a web page")
    if start.startswith(b"GGUF"):
        raise _Bad("it is a GGUF file", "get the model's .safetensors files")


def _entries(raw: bytes) -> dict[str, Any]:
    """The header's object, in which no name is there twice.

    A hook for every object takes as long as all else, so it looks only where a name may be: five strings are read of
    each tensor and two of each line of metadata, and a text with so many quotes has not held any more.
    """
    try:
        found = json.loads(raw.decode("utf-8"))
        lines = found.get("__metadata__") if isinstance(found, dict) else None
        strings = 5 * len(found) + (2 * len(lines) - 4 if isinstance(lines, dict) else 0)
        if raw.count(b'"') != 2 * strings or b"\\" in raw:
            found = lines = None  # two at a time would be twice the memory
            found = json.loads(raw.decode("utf-8"), object_pairs_hook=files.unique)
    except UnicodeDecodeError:
        raise _Bad("its header is not UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise _Bad(f"its header is not valid JSON: {files.reason_of(error)[:100]}") from None
    if not isinstance(found, dict):
        raise _Bad("its header is no JSON object")
    return found


def _strings(metadata: Any) -> dict[str, str]:
    if metadata is None:
        return {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _Bad("its __metadata__ is not an object of strings")
    return metadata


def _checked(entries: dict[str, Any], metadata: dict[str, str], start: int, size: int) -> Header:
    """The tensors, if each is well said and all together cover the bytes from `start` to `size` once."""
    tensors: dict[str, TensorInfo] = {}
    known: dict[str, tuple[str, tuple[int, ...], int]] = {}  # what is said of them, with the bytes: few in a file
    for name, entry in entries.items():
        if not name.isprintable() or len(name) > LONGEST_NAME:
            raise _Bad(f"a tensor is named {shown(name)}, which is too long or has characters that cannot be printed")
        if type(entry) is not dict or entry.keys() != _KEYS:
            raise _Bad(f"tensor {shown(name)} has not just dtype, shape and data_offsets")
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        said = f"{dtype}{shape!r}"  # not the shape itself: 1.0 and true are equal to 1
        if said not in known:
            known[said] = _judged(name, dtype, shape)
        dtype, shape, length = known[said]
        if type(offsets) is not list or len(offsets) != 2 or type(offsets[0]) is not int or type(offsets[1]) is not int:
            raise _Bad(f"tensor {shown(name)} has the offsets {shown(offsets)}")
        begin, end = offsets
        if begin < 0 or end - begin != length:
            raise _Bad(
                f"tensor {shown(name)}, {dtype} of shape {shown(list(shape))}, has {shown(length)} bytes, not those "
                f"from {shown(begin)} to {shown(end)}"
            )
        tensors[name] = TensorInfo(dtype, shape, start + begin, start + end)
    return Header(tensors, metadata, size, _aligned(tensors, start, size))


def _judged(name: str, dtype: Any, shape: Any) -> tuple[str, tuple[int, ...], int]:
    """A dtype and a shape with the bytes they take."""
    if type(dtype) is not str or dtype not in BITS:
        raise _Bad(f"tensor {shown(name)} has the unknown dtype {shown(dtype)}")
    if type(shape) is not list or len(shape) > _MOST_AXES or not all(type(axis) is int for axis in shape):
        raise _Bad(f"tensor {shown(name)} has the shape {shown(shape)}")
    if not all(0 <= axis <= _LARGEST_SIZE for axis in shape):
        raise _Bad(f"tensor {shown(name)} has the shape {shown(shape)}")
    bits = math.prod(shape) * BITS[dtype]
    if bits % 8:
        raise _Bad(f"tensor {shown(name)}, {dtype} of shape {shown(shape)}, ends within a byte")
    return dtype, tuple(shape), bits // 8


def _aligned(tensors: dict[str, TensorInfo], start: int, size: int) -> bool:
    """Whether every tensor begins at a multiple of its elements' size; the bytes must be covered once, and wholly."""
    aligned, at = True, start
    for begin, end, dtype, name in sorted((i.begin, i.end, i.dtype, name) for name, i in tensors.items()):
        if begin != at:
            how = "overlaps the tensor before it" if begin < at else "leaves a gap before it"
            raise _Bad(f"tensor {shown(name)} {how}: it begins at byte {begin - start:,}, not {at - start:,}")
        aligned = aligned and at * 8 % BITS[dtype] == 0
        at = end
    if at != size:
        how = "is truncated" if at > size else "has bytes that belong to no tensor"
        raise _Bad(f"it {how}: its tensors end at byte {at:,}, the file at {size:,}")
    return aligned
