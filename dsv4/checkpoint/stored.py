"""The tensors of a folder as they lie in its files: names, dtypes, shapes, and their bytes piece by piece.

Files are read, not mapped: pages of a mapped file count as the reader's memory, and a model larger than the memory is
read more than once. Headers are judged before anything is believed (headers.py).
"""

import ctypes
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dsv4 import files
from dsv4.checkpoint.headers import read_header
from dsv4.errors import UserError

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I8": torch.int8, "U8": torch.uint8, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
}  # fmt: skip
PIECE = 1 << 22  # bytes that are read at a time, unless a row of blocks has more
_MOST = 1 << 30  # that one system call is asked for


@dataclass(frozen=True)
class Stored:
    """A tensor in a file: its dtype as safetensors spells it, its shape, and where its bytes begin."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * DTYPES[self.dtype].itemsize

    def read(self, first: int = 0, count: int | None = None, into: Tensor | None = None) -> Tensor:
        """Numbers first, first + 1, ... of the flat tensor [count], into a contiguous tensor of this dtype on the CPU
        if it is given. UserError if the file is not what it was when it was opened."""
        dtype = DTYPES[self.dtype]
        count = self.numel - first if count is None else count
        out = torch.empty(count, dtype=dtype) if into is None else into.view(-1)
        assert out.is_contiguous() and out.dtype == dtype and len(out) == count, self.name
        if not count:
            return out
        # not through numpy: torch lets no storage go that numpy has seen, and streamed blocks are let go
        space = memoryview((ctypes.c_char * (count * dtype.itemsize)).from_address(out.data_ptr())).cast("B")
        at = self.start + first * dtype.itemsize
        with files.explained(self.file, "read"):
            handle = os.open(self.file, os.O_RDONLY)
            try:
                done = 0
                while done < len(space):
                    got = os.preadv(handle, [space[done : done + _MOST]], at + done)
                    if not got:
                        raise UserError(f"{self.file} has become shorter while it was read: fetch it again")
                    done += got
            finally:
                os.close(handle)
        return out

    def pieces(self, rows: int = 1) -> Iterator[tuple[int, Tensor]]:
        """(first row, [n, columns]) of the tensor as a matrix of its last dimension; n a multiple of `rows` but for the
        last piece."""
        columns = self.shape[-1] if self.shape else 1
        if not self.numel:
            return
        step = max(1, PIECE // (columns * DTYPES[self.dtype].itemsize * rows)) * rows
        for first in range(0, self.numel // columns, step):
            count = min(step, self.numel // columns - first)
            yield first, self.read(first * columns, count * columns).view(count, columns)


def open_folder(folder: Path, names: list[str]) -> dict[str, Stored]:
    """Every tensor of these files by its name there; only headers are read.

    UserError for a file that is damaged, a name that is there twice, or a dtype that no model is held in.
    """
    tensors: dict[str, Stored] = {}
    for name in names:
        for stored in _open(folder / name):
            if stored.name in tensors:
                raise UserError(f"tensor {stored.name} appears twice in {folder}: remove the stray .safetensors file")
            tensors[stored.name] = stored
    return tensors


def _open(file: Path) -> list[Stored]:
    return [Stored(name, file, i.dtype, i.shape, i.begin) for name, i in read_header(file).tensors.items()]
