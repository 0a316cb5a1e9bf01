"""How rows of numbers lie in a memory: plain, or packed into bytes (FP8 or FP4 codes, block scales, a BF16 tail).

A packed row is [codes | tail in BF16 | scales | zeros up to a multiple of `align`]. Codes are e4m3 (FP8) or e2m1 (FP4,
the even column in the low nibble); a scale is a power of two in one byte (UE8M0, 2^(byte - 127)) or an FP32 number.
Sources: the released kernels' rounding rules, and the 584- and 68-byte rows of deployed V4 caches.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dsv4.ops import table

_LARGEST = {"fp8": 448.0, "fp4": 6.0}
_FLOOR = {"fp8": 1e-4, "fp4": 6 * 2.0**-126}  # of a block's largest number, so that scales stay normal
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


@dataclass(frozen=True)
class Plain:
    """Rows of shape `shape` kept as numbers of `dtype`."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    def pack(self, rows: Tensor) -> Tensor:
        return rows.to(self.dtype)

    def unpack(self, data: Tensor) -> Tensor:
        return data

    def as_read(self, rows: Tensor) -> Tensor:
        """Rows as a reader of the store will see them."""
        return rows.to(self.dtype)

    def as_query(self, rows: Tensor) -> Tensor:
        """What a query must be to meet such rows: itself."""
        return rows


@dataclass(frozen=True)
class Packed:
    """Rows of `width` numbers in `row_bytes` bytes.

    code: "fp8" or "fp4", for all but the last `tail` numbers, which are BF16. block: numbers that share a scale (the
    last block may be shorter). fp32_scales: FP32 scales, exactly largest / 448; else UE8M0, rounded up to a power of
    two. rotated: a Hadamard rotation comes first, to spread outliers, and its sums are rounded to the dtype that rows
    came in, as the released code does; rows are read rotated, so queries must be too (`as_query`). numbers: the dtype
    of unpacked rows; BF16 holds UE8M0-scaled rows exactly.
    """

    width: int
    code: str
    block: int
    tail: int = 0
    fp32_scales: bool = False
    align: int = 1
    rotated: bool = False
    numbers: torch.dtype = torch.float32

    dtype = torch.uint8

    @property
    def coded(self) -> int:
        return self.width - self.tail

    @property
    def cuts(self) -> list[int]:
        """Bytes of codes, tail and scales."""
        codes = self.coded if self.code == "fp8" else -(-self.coded // 2)
        return [codes, 2 * self.tail, -(-self.coded // self.block) * (4 if self.fp32_scales else 1)]

    @property
    def row_bytes(self) -> int:
        return -(-sum(self.cuts) // self.align) * self.align

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.row_bytes,)

    def pack(self, rows: Tensor) -> Tensor:
        """rows [n, width] -> uint8 [n, row_bytes] (ops.pack_rows)."""
        return table.call("pack_rows", rows, self)

    def unpack(self, data: Tensor) -> Tensor:
        """uint8 [..., row_bytes] -> numbers [..., width] (ops.unpack_rows)."""
        return table.call("unpack_rows", data, self)

    def as_read(self, rows: Tensor) -> Tensor:
        return self.unpack(self.pack(rows))

    def as_query(self, rows: Tensor) -> Tensor:
        """What a query [..., width] must be to meet such rows: rotated and rounded as they are, if they are rotated."""
        return self.as_read(rows.flatten(0, -2)).view(rows.shape) if self.rotated else rows


RowFormat = Plain | Packed


class PackedRows:
    """Packed rows [n, width] that are unpacked where they are read: rows[a:b] or rows[indices]."""

    format: RowFormat

    def __init__(self, data: Tensor, format: Packed):
        self.data, self.format = data, format
        self.dtype, self.device = format.numbers, data.device

    def __len__(self) -> int:
        return len(self.data)

    @property
    def shape(self) -> tuple[int, int]:
        return len(self), self.format.width if isinstance(self.format, Packed) else self.data.shape[1]

    def __getitem__(self, rows: slice | Tensor) -> Tensor:
        return self.format.unpack(self.data[rows])


class PagedRows(PackedRows):
    """Rows that lie in pages of a store: row i of them is row i % per_page of page pages[i // per_page].

    data [all pages' rows, ...] in any format, not copied; table: the pages' numbers int64 on the data's device, pages:
    the same on the host. A slice whose pages follow each other is read in place, any other one is gathered.
    """

    def __init__(
        self,
        data: Tensor,
        format: RowFormat,
        table: Tensor,
        pages: np.ndarray,
        per_page: int,
        count: int | None = None,
    ):
        self.data, self.format, self.table, self.pages, self.per_page = data, format, table, pages, per_page
        self.dtype = format.numbers if isinstance(format, Packed) else format.dtype
        self.device = data.device
        self.count = len(pages) * per_page if count is None else count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, rows: slice | Tensor) -> Tensor:
        return self.format.unpack(self._kept(rows))

    def kept(self) -> Tensor:
        """A copy of all rows as they lie in the store."""
        return self._kept(slice(None)).clone()

    def _kept(self, rows: slice | Tensor) -> Tensor:
        size = self.per_page
        if isinstance(rows, slice):
            start, stop, step = rows.indices(self.count)
            assert step == 1, rows
            if stop <= start:
                return self.data[:0]
            pages = self.pages[start // size : (stop - 1) // size + 1]
            if (np.diff(pages) == 1).all():
                first = int(pages[0]) * size + start % size
                return self.data[first : first + stop - start]
            rows = torch.arange(start, stop, device=self.device)
        return self.data[self.table[rows // size] * size + rows % size]


# --- packing and unpacking, in plain torch: the reference of ops.pack_rows and ops.unpack_rows -----------------------


def pack_rows(rows: Tensor, format: Packed) -> Tensor:
    x = rows.float()
    if format.rotated:
        x = hadamard(x).to(rows.dtype).float()
    head, tail = x[:, : format.coded], x[:, format.coded :]
    blocks = F.pad(head, (0, -format.coded % format.block)).unflatten(1, (-1, format.block))
    largest = blocks.abs().amax(dim=2).clamp_min(_FLOOR[format.code])
    scale = largest / _LARGEST[format.code] if format.fp32_scales else power_of_two_scale(largest, format.code)
    scaled = (blocks / scale[..., None]).clamp(-_LARGEST[format.code], _LARGEST[format.code])
    scaled = scaled.flatten(1)[:, : format.coded]
    parts = [to_e4m3(scaled) if format.code == "fp8" else to_e2m1(scaled), _bytes(tail.bfloat16())]
    parts.append(_bytes(scale) if format.fp32_scales else (scale.view(torch.int32) >> 23).to(torch.uint8))
    return F.pad(torch.cat(parts, dim=1), (0, format.row_bytes - sum(format.cuts)))


def unpack_rows(data: Tensor, format: Packed) -> Tensor:
    codes, tail, scales = data[..., : sum(format.cuts)].split(format.cuts, dim=-1)
    if format.code == "fp8":
        values = _numbers(codes, torch.float8_e4m3fn).float()
    else:
        values = e2m1_numbers(codes)[..., : format.coded]
    scale = _numbers(scales, torch.float32) if format.fp32_scales else (scales.int() << 23).view(torch.float32)
    values = values * scale.repeat_interleave(format.block, dim=-1)[..., : format.coded]
    return torch.cat([values.to(format.numbers), _numbers(tail, torch.bfloat16).to(format.numbers)], dim=-1)


def hadamard(x: Tensor) -> Tensor:
    """x [..., n] times the Sylvester-Walsh matrix of order n (a power of two) times n^-0.5: orthogonal, symmetric."""
    n = x.shape[-1]
    assert n > 0 and n & (n - 1) == 0, n
    y, half = x, 1
    while half < n:  # n log n additions: neighbouring blocks of `half` numbers become their sum and difference
        a, b = y.reshape(*x.shape[:-1], n // (2 * half), 2, half).unbind(-2)
        y = torch.stack([a + b, a - b], dim=-2)
        half *= 2
    return y.reshape(x.shape) * n**-0.5


def power_of_two_scale(largest: Tensor, code: str) -> Tensor:
    """The least power of two, from 2^-126 up, with which the block's largest number is not above the code's, fp32."""
    ratio = largest / _LARGEST[code]
    # from the bits: a logarithm may err next to a power of two
    bits = ratio.clamp_min(2.0**-126).view(torch.int32)
    return ((bits + 0x7FFFFF) & ~0x7FFFFF).view(torch.float32)


def to_e4m3(x: Tensor) -> Tensor:
    """FP8 codes of x in [-448, 448], uint8."""
    return x.to(torch.float8_e4m3fn).view(torch.uint8)  # round to nearest, ties to even


def to_e2m1(x: Tensor) -> Tensor:
    """FP4 codes of x [n, m] in [-6, 6], ties to the even code, two to a byte: uint8 [n, ceil(m / 2)]."""
    a = x.abs()
    code = torch.zeros_like(a, dtype=torch.uint8)
    for number, border in enumerate((0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)):
        code += (a > border) if number % 2 == 0 else (a >= border)
    code += torch.signbit(x).to(torch.uint8) * 8
    code = F.pad(code, (0, code.shape[1] % 2))
    return code[:, 0::2] | (code[:, 1::2] << 4)


def e2m1_numbers(codes: Tensor) -> Tensor:
    """FP4 codes, uint8 [..., m] -> numbers fp32 [..., 2 m]."""
    numbers = torch.tensor(_E2M1 + tuple(-v for v in _E2M1), device=codes.device)
    return torch.stack([numbers[(codes & 15).int()], numbers[(codes >> 4).int()]], dim=-1).flatten(-2)


def _bytes(x: Tensor) -> Tensor:
    """[n, m] -> uint8 [n, m * itemsize], least significant byte first."""
    if not x.numel():
        return x.new_zeros(len(x), x.shape[1] * x.element_size(), dtype=torch.uint8)
    return x.contiguous().view(torch.uint8)


def _numbers(data: Tensor, dtype: torch.dtype) -> Tensor:
    """uint8 [..., m * itemsize] -> [..., m] of dtype; a copy, because rows may begin at any byte."""
    if not data.numel():
        return data.new_zeros(*data.shape[:-1], data.shape[-1] // dtype.itemsize, dtype=dtype)
    return data.clone(memory_format=torch.contiguous_format).view(dtype)


# --- the formats of memories, by name --------------------------------------------------------------------------------

PLAIN = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
NAMES: Sequence[str] = (*PLAIN, "packed")


def v4_rows(width: int, rope: int, index_width: int, format: str, numbers: torch.dtype) -> tuple[RowFormat, RowFormat]:
    """V4's attention rows (window and entries) and index keys in a format of NAMES.

    packed: FP8 in blocks of 64 with a BF16 rotary tail (584 bytes for 512 numbers), FP4 keys in blocks of 32 (68 bytes
    for 128 numbers), rotated.
    """
    if format in PLAIN:
        return Plain((width,), PLAIN[format]), Plain((index_width,), PLAIN[format])
    row = Packed(width, "fp8", 64, tail=rope, align=8, numbers=numbers)
    return row, Packed(index_width, "fp4", 32, rotated=True, numbers=numbers)


def v32_rows(latent: int, rope: int, index_width: int, format: str) -> tuple[RowFormat, RowFormat]:
    """V3.2's latent rows and index keys. packed: FP8 in blocks of 128 with FP32 scales (656 and 132 bytes)."""
    if format in PLAIN:
        return Plain((latent + rope,), PLAIN[format]), Plain((index_width,), PLAIN[format])
    row = Packed(latent + rope, "fp8", 128, tail=rope, fp32_scales=True)
    return row, Packed(index_width, "fp8", index_width, fp32_scales=True, rotated=True)
