"""The report of a check: one JSON file that is whole after every row, and the same rows as lines for a person."""

import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dsv4.files import make_folder, write_json
from dsv4.measure.rows import Row

SECTIONS = ("parity", "ceilings", "speed", "skipped", "failed")


class Report:
    """Rows by section under a header. Each change is written at once, so a stopped run leaves what it has."""

    def __init__(self, path: Path, header: Mapping[str, Any]):
        self.path, self.began = path, time.perf_counter()
        self.data: dict[str, Any] = {**header, "finished": False, "elapsed_seconds": 0.0}
        self.data |= {section: [] for section in SECTIONS}
        make_folder(path.parent)
        self.write()

    def add(self, section: str, row: Row) -> None:
        self.data[section].append(row)
        print(line(section, row), flush=True)
        self.write()

    def __getitem__(self, section: str) -> list[Row]:
        return self.data[section]

    def write(self) -> None:
        """Whole or not at all. FileError if the machine does not allow it."""
        self.data["elapsed_seconds"] = round(time.perf_counter() - self.began, 1)
        write_json(self.path, plain(self.data))

    def broken(self) -> list[str]:
        """What says that the model is wrong on this device: rows out of tolerance, and work of ours that raised."""
        return [row["name"] for row in self["parity"] if not row["passed"]] + [row["what"] for row in self["failed"]]


def line(section: str, row: Row) -> str:
    """One row for a person."""
    if section == "parity":
        verdict = "ok    " if row["passed"] else "FAILED"
        found = row["error"] or f"{row[row['measure']]:.1e} of {row['tolerance']:.0e} allowed ({row['measure']})"
        return f"{verdict} {row['dtype']:9s} {row['name']:52s} {found}"
    if section == "ceilings":
        return f"{row['name']:62s} {row['value']:10.1f} {row['unit']}"
    if section == "speed":
        return _speed_line(row)
    return f"{section}: {row['what']}: {row['why']}"


def _speed_line(row: Row) -> str:
    what = f"{row['who']} {row['preset']} {row['what']}, context {row['context']}, batch {row['batch']}"
    parts = [f"{what:62s} {row['tokens_per_second']:10.0f} tok/s", f"{row['tflops']:8.3g} TFLOP/s"]
    if row["share_of_matmul"] is not None:
        parts.append(f"{row['share_of_matmul']:6.2%} of matmul")
    if row["share_of_copy"] is not None:
        parts.append(f"{row['share_of_copy']:6.2%} of copy")
    if row["peak_bytes"] is not None:
        parts.append(f"{row['peak_bytes'] / 2**30:6.2f} GiB")
    if row["times_transformers"] is not None:
        parts.append(f"{row['times_transformers']:.2f} x transformers")
    return "  ".join(parts)


def plain(value: Any) -> Any:
    """A value as JSON can say it: numbers that JSON lacks become null."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: plain(v) for key, v in value.items()}
    return [plain(v) for v in value] if isinstance(value, list | tuple) else value
