"""The numbers in a checkpoint's tensors: smallest, largest, mean, size, and those that are none; read piece by piece.

Matrices in FP8 and packed FP4 are taken times their scales, as a model uses them. At most CHUNK numbers are in memory.
"""

import math
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dsv4 import files
from dsv4.checkpoint.diagnose import Finding, grouped, scale_names
from dsv4.checkpoint.expected import FP4_BLOCK, FP8_BLOCK
from dsv4.checkpoint.headers import TensorInfo
from dsv4.checkpoint.inspect import Report
from dsv4.errors import UserError

CHUNK = 1 << 20
_FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], dtype=np.float32)
_PLAIN = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "U8": "u1", "BOOL": "u1"}


@dataclass
class Statistics:
    """Of the numbers of one tensor or of many; those that are NaN or infinite count in `nan` and `inf` alone.

    saturated: FP8 codes of the largest size, 448 times their scale.
    """

    count: int = 0
    nan: int = 0
    inf: int = 0
    zeros: int = 0
    saturated: int = 0
    min: float = math.inf
    max: float = -math.inf
    total: float = 0.0
    squares: float = 0.0

    @property
    def mean(self) -> float:
        return self.total / self._finite

    @property
    def rms(self) -> float:
        return math.sqrt(self.squares / self._finite)

    @property
    def _finite(self) -> int:
        return max(1, self.count - self.nan - self.inf)

    def add(self, x: np.ndarray, saturated: int = 0) -> None:
        """Count the numbers of an array in."""
        finite = np.isfinite(x)
        self.count += x.size
        self.saturated += saturated
        if not finite.all():
            nan = int(np.isnan(x).sum())
            self.nan += nan
            self.inf += x.size - int(finite.sum()) - nan
            x = x[finite]
        if x.size:
            wide = x.astype(np.float64)
            self.zeros += int((wide == 0).sum())
            self.min, self.max = min(self.min, float(wide.min())), max(self.max, float(wide.max()))
            self.total += float(wide.sum())
            self.squares += float(np.dot(wide, wide))

    def merge(self, other: "Statistics") -> None:
        for key in ("count", "nan", "inf", "zeros", "saturated", "total", "squares"):
            setattr(self, key, getattr(self, key) + getattr(other, key))
        self.min, self.max = min(self.min, other.min), max(self.max, other.max)

    def to_json(self) -> dict[str, float | int | None]:
        """Without NaN and infinities, which JSON does not have."""
        any_ = self.count > self.nan + self.inf
        numbers = {key: getattr(self, key) if any_ else None for key in ("min", "max", "mean", "rms")}
        numbers = {key: value if value is None or math.isfinite(value) else None for key, value in numbers.items()}
        return {key: getattr(self, key) for key in ("count", "nan", "inf", "zeros", "saturated")} | numbers


def statistics_of(file: Path, info: TensorInfo, scale: tuple[TensorInfo, Path] | None = None) -> Statistics | None:
    """The statistics of a tensor in a file; None for a dtype that is not computed with here.

    scale: the E8M0 scales of an FP8 or a packed FP4 matrix (header, file); without it the codes themselves are counted.
    UserError if the file has changed under its header.
    """
    found = Statistics()
    with files.explained(file, "read"), _handle(file) as handle:
        read = _reader(handle, file)
        if scale is not None and len(info.shape) == 2 and info.dtype in ("F8_E4M3", "I8"):
            with files.explained(scale[1], "read"), _handle(scale[1]) as scales:
                pieces = _scaled(info, read, scale[0], _reader(scales, scale[1]))
                return _count(found, pieces)
        decode = _decoder(info.dtype)
        if decode is None:
            return None
        return _count(found, _flat(info, read, *decode))


def measure(report: Report, seen: Callable[[Iterable[str]], Iterable[str]] = iter) -> dict[str, Statistics | None]:
    """The statistics of every tensor that a report has found, by name; what is wrong joins the report's findings.

    Wrong are numbers that are NaN or infinite, expert ids that are none, and files that are not those that digests.json
    lists. seen: what is shown of the names as they are worked on.
    """
    if (folder := Path(report.checkpoint)).is_dir():
        try:
            files.check_digests(folder)
        except UserError as error:
            report.findings.append(Finding("file", str(error)))
    found: dict[str, Statistics | None] = {}
    rows: list[tuple[str, str, str]] = []
    experts = getattr(report.config, "n_routed_experts", None)
    for name in seen(report.places):
        info, file = report.places[name]
        try:
            one = found[name] = statistics_of(file, info, _scale(report, name))
        except UserError as error:
            report.findings.append(Finding("file", f"{name}: {error}"))
            continue
        if one is not None and (one.nan or one.inf):
            rows.append(("numbers", name, "has numbers that are NaN or infinite: it cannot be computed with"))
        elif (
            one is not None
            and name.endswith(".tid2eid")
            and experts
            and one.count
            and not 0 <= one.min <= one.max < experts
        ):
            rows.append(("numbers", name, f"names experts that are not among the {experts:,} there are"))
    report.findings += grouped(rows)
    return found


def _scale(report: Report, name: str) -> tuple[TensorInfo, Path] | None:
    if not name.endswith(".weight"):
        return None
    scale = next((other for other in scale_names(name) if other in report.places), None)
    return None if scale is None else report.places[scale]


def _count(found: Statistics, pieces: Iterator[tuple[np.ndarray, int]]) -> Statistics:
    with np.errstate(all="ignore"):
        for piece, saturated in pieces:
            found.add(piece, saturated)
    return found


class _handle:
    """An open file's descriptor, closed at the end."""

    def __init__(self, path: Path):
        self._path = path

    def __enter__(self) -> int:
        self._open = os.open(self._path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        return self._open

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):
            os.close(self._open)


Read = Callable[[int, int], np.ndarray]  # (first byte, number of bytes) -> uint8


def _reader(handle: int, file: Path) -> Read:
    def read(at: int, length: int) -> np.ndarray:
        parts = bytearray()
        while len(parts) < length:
            part = os.pread(handle, length - len(parts), at + len(parts))
            if not part:
                raise UserError(f"{file} has become shorter while it was read: see who writes it, and try again")
            parts += part
        return np.frombuffer(parts, dtype=np.uint8)

    return read


def _fp8_table() -> np.ndarray:
    """E4M3: 4 bits of exponent with bias 7, 3 of mantissa; 0x7f and 0xff are NaN, and there is no infinity."""
    code = np.arange(256)
    exponent, mantissa = (code >> 3) & 15, code & 7
    size = np.where(exponent == 0, mantissa / 8 * 2.0**-6, (1 + mantissa / 8) * 2.0 ** (exponent - 7.0))
    size[(code & 127) == 127] = np.nan
    return np.where(code & 128, -size, size).astype(np.float32)


def _e8m0_table() -> np.ndarray:
    table = np.ldexp(np.float64(1), np.arange(256) - 127)
    table[255] = np.nan
    return table


_E4M3, _E8M0 = _fp8_table(), _e8m0_table()


def _decoder(dtype: str) -> tuple[int, Callable[[np.ndarray], np.ndarray]] | None:
    """Bytes of a number, and bytes -> numbers."""
    if dtype in _PLAIN:
        kind = np.dtype(_PLAIN[dtype])
        return kind.itemsize, lambda raw: raw.view(kind)
    if dtype == "BF16":
        return 2, lambda raw: (raw.view("<u2").astype(np.uint32) << 16).view(np.float32)
    if dtype == "I8":
        return 1, lambda raw: raw.view(np.int8)
    table = {"F8_E4M3": _E4M3, "F8_E8M0": _E8M0}.get(dtype)
    return None if table is None else (1, lambda raw: table[raw])


def _flat(info: TensorInfo, read: Read, width: int, decode: Callable) -> Iterator[tuple[np.ndarray, int]]:
    for at in range(info.begin, info.end, CHUNK * width):
        raw = read(at, min(CHUNK * width, info.end - at))
        yield decode(raw), _saturated(raw) if info.dtype == "F8_E4M3" else 0


def _saturated(codes: np.ndarray) -> int:
    return int(((codes & 127) == 126).sum())


def _scaled(info: TensorInfo, read: Read, scale: TensorInfo, read_scale: Read) -> Iterator[tuple[np.ndarray, int]]:
    """Pieces of whole rows, or of one row where it is long, each times its scales."""
    rows, width = info.shape  # in bytes, for both formats
    block = FP8_BLOCK if info.dtype == "F8_E4M3" else FP4_BLOCK // 2
    tall = FP8_BLOCK if info.dtype == "F8_E4M3" else 1
    per_row = -(-width // block)
    if scale.dtype != "F8_E8M0" or scale.shape != (-(-rows // tall), per_row):
        raise UserError(f"scales of dtype {scale.dtype} and shape {scale.shape} do not fit a matrix of {info.shape}")
    step = max(block, CHUNK // 2 // block * block)
    high = max(1, CHUNK // 2 // max(1, width))
    for row in range(0, rows, high):
        count = min(high, rows - row)
        first, last = row // tall, (row + count - 1) // tall
        for column in range(0, width, step):
            wide = min(step, width - column)
            codes = read(info.begin + row * width + column, (count - 1) * width + wide).reshape(count, wide)
            from_, blocks = column // block, -(-wide // block)
            at = scale.begin + first * per_row + from_
            factors = _E8M0[read_scale(at, (last - first) * per_row + blocks).reshape(last - first + 1, blocks)]
            factors = factors[(np.arange(row, row + count) // tall) - first].repeat(block, axis=1)[:, :wide]
            if info.dtype == "F8_E4M3":
                yield (_E4M3[codes] * factors).ravel(), _saturated(codes)
            else:
                for half in (codes & 15, codes >> 4):
                    yield (_FP4[half] * factors).ravel(), 0
