"""What a folder has for each tensor of a model: numbers, or FP8 or FP4 codes with their scales; read as numbers, or as
the codes they are, never more than a piece beside what is being filled.

A matrix in codes is two tensors: `X.weight` in F8_E4M3 or I8 (two FP4 codes to a byte), and `X.scale`, which
transformers calls `X.weight_scale_inv`, for all that one multiplies by it. A scale is a power of two in a byte; FP32
multipliers are read too.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from dsv4.checkpoint.stored import DTYPES, Stored
from dsv4.errors import UserError
from dsv4.ops.weights import BLOCKS, PackedMatrix, unpack_matrix

PLAIN = {"F64", "F32", "F16", "BF16", "I64", "I32"}
_CODES = {"F8_E4M3": "fp8", "I8": "fp4", "U8": "fp4"}
_SCALES = {"F8_E8M0", "U8", "F32"}
_SCALE_NAMES = ("scale", "weight_scale_inv", "weight_scale")
_NAN_SCALE, _NAN_CODE = 0xFF, 0x7F  # the code's sign aside


@dataclass(frozen=True)
class Source:
    """A tensor of a model in a file; `name` is its own in the layout. code: "" for numbers, else "fp8" or "fp4"."""

    name: str
    weight: Stored
    code: str = ""
    scales: Stored | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the numbers."""
        *rest, columns = self.weight.shape or (None,)
        if columns is None:
            return ()
        return (*rest, columns * 2) if self.code == "fp4" else self.weight.shape

    @property
    def format(self) -> str:
        """Its format in a word: a code, or a dtype as safetensors spells it."""
        return self.code or self.weight.dtype.lower()

    def pieces(self, rows: int = 1) -> Iterator[tuple[int, Tensor]]:
        """(first row, numbers [n, columns]), in FP32 where they are codes, n a multiple of `rows` but for the last;
        UserError for a code or a scale that is no number."""
        scales = self.read_scales() if self.code else None
        for first, piece in self.code_pieces(rows) if self.code else self.weight.pieces(rows):
            yield first, piece if scales is None else unpack_matrix(self.code, piece, scales, first)

    def code_pieces(self, rows: int = 1) -> Iterator[tuple[int, Tensor]]:
        """(first row, codes uint8), whole blocks of scales and a multiple of `rows` but for the last."""
        for first, piece in self.weight.pieces(max(rows, BLOCKS[self.code][0])):
            codes = piece.view(torch.uint8)
            if self.code == "fp8" and ((codes & _NAN_CODE) == _NAN_CODE).any():
                raise UserError(
                    f"tensor {self.name} holds an FP8 code that is no number (NaN): the file is damaged; fetch it again"
                )
            yield first, codes

    def read_scales(self) -> Tensor:
        """uint8 [row blocks, column blocks], or FP32 multipliers; UserError for one that is no positive number."""
        assert self.scales is not None
        scales = self.scales.read().view(self.scales.shape)
        if scales.dtype == torch.float32:
            bad = ~(scales.isfinite() & (scales > 0))
        else:
            scales = scales.view(torch.uint8)
            bad = scales == _NAN_SCALE
        if bad.any():
            raise UserError(
                f"tensor {self.scales.name} holds a scale that is no positive number: the file is damaged; "
                "fetch it again"
            )
        return scales

    def fill(self, out: Tensor) -> None:
        """The numbers into a contiguous tensor of this shape, of any dtype, on any device."""
        flat = out.view(-1)
        if not self.code and out.device.type == "cpu" and out.dtype == DTYPES[self.weight.dtype]:
            self.weight.read(into=out)
            return
        columns = out.shape[-1] if out.ndim else 1
        for first, numbers in self.pieces():
            flat[first * columns : first * columns + numbers.numel()].copy_(numbers.view(-1))

    def fill_packed(self, matrix: PackedMatrix, row: int) -> None:
        """The codes and scales into the rows of a packed matrix from `row` on, a multiple of its blocks."""
        scales = self.byte_scales()
        high = BLOCKS[self.code][0]
        matrix.scales[row // high : row // high + len(scales)].copy_(scales)
        for first, codes in self.code_pieces():
            matrix.codes[row + first : row + first + len(codes)].copy_(codes)

    def byte_scales(self) -> Tensor:
        """The scales as bytes; UserError for FP32 ones that are not powers of two."""
        scales = self.read_scales()
        if scales.dtype != torch.float32:
            return scales
        bits = scales.view(torch.int32)
        if ((bits & 0x7FFFFF) != 0).any() or (bits >> 23 == 0).any():
            assert self.scales is not None
            raise UserError(
                f"tensor {self.scales.name} holds scales that are not powers of two, which a packed matrix has: load "
                "with weights='plain'"
            )
        return (bits >> 23).to(torch.uint8)


def pair(tensors: dict[str, Stored]) -> dict[str, Source]:
    """Tensors by name -> sources by name; a scale is part of its matrix. UserError for codes without fitting scales,
    and for dtypes that are neither."""
    sources: dict[str, Source] = {}
    scales: set[str] = set()
    for name, weight in tensors.items():
        stem, _, leaf = name.rpartition(".")
        if weight.dtype not in _CODES or leaf != "weight":
            continue
        found = [f"{stem}.{scale}" for scale in _SCALE_NAMES if f"{stem}.{scale}" in tensors]
        if len(found) != 1:
            raise UserError(
                f"tensor {name} is {weight.dtype}, codes of a quantised matrix, and has {len(found)} tensors of "
                f"scales: it needs one, {stem}.scale"
            )
        sources[name] = _checked(Source(name, weight, _CODES[weight.dtype], tensors[found[0]]))
        scales.add(found[0])
    for name, weight in tensors.items():
        if name in sources or name in scales:
            continue
        if weight.dtype not in PLAIN:
            raise UserError(
                f"tensor {name} is {weight.dtype}, which is not read here: use {', '.join(sorted(PLAIN))}, or FP8 "
                "(F8_E4M3) or FP4 (I8) matrices with scales"
            )
        sources[name] = Source(name, weight)
    return sources


def _checked(source: Source) -> Source:
    name, scales = source.name, source.scales
    assert scales is not None
    if len(source.weight.shape) != 2:
        raise UserError(f"tensor {name} is {source.weight.dtype} of shape {source.weight.shape}: codes are matrices")
    high, wide = BLOCKS[source.code]
    rows, columns = source.shape
    want = (-(-rows // high), -(-columns // wide))
    if scales.dtype not in _SCALES or scales.shape != want:
        raise UserError(
            f"tensor {scales.name} is {scales.dtype} {scales.shape}: the scales of {name} are F8_E8M0 {want}, one for "
            f"every {high} x {wide} numbers"
        )
    return source
