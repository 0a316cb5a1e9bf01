"""How long `dsv4 inspect` takes on the released models: on files with their real headers and nothing behind them.

The headers come from our own configurations and names; the tensors are holes in sparse files, so that a checkpoint of
865 GB takes 25 MB.
"""

import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsv4.checkpoint.expected import released, wanted
from dsv4.checkpoint.headers import BITS
from dsv4.checkpoint.shards import CONFIG, INDEX
from dsv4.config import ModelConfig

Stored = tuple[str, str, tuple[int, ...]]  # name, dtype, shape


@dataclass(frozen=True)
class Subject:
    """A released model: its preset, and whether its experts are FP8."""

    preset: str
    base: bool = False


SUBJECTS = {
    "V4-Flash": Subject("flash"),
    "V4-Flash-Base": Subject("flash", base=True),
    "V4-Flash-0731": Subject("flash-0731"),
    "V4-Pro": Subject("pro"),
    "V4-Pro-0813": Subject("pro-0813"),
}


def contents(subject: Subject, config: ModelConfig | None = None) -> tuple[dict[str, Any], list[Stored]]:
    """(config.json, every tensor of the files) of a released model, or of another `config` as if it were released."""
    config = config or ModelConfig.preset(subject.preset)
    stored = [part for name, wish in wanted(config).items() for part in released(name, wish, base=subject.base)]
    return config.to_json(), stored


def write_sparse(folder: Path, data: dict[str, Any], stored: list[Stored], shards: int) -> int:
    """Write a folder of so many shards with an index, its tensors all holes; returns the bytes of its tensors."""
    folder.mkdir(parents=True)
    (folder / CONFIG).write_text(json.dumps(data), encoding="utf-8")
    sizes = [num_bytes(dtype, shape) for _, dtype, shape in stored]
    places: dict[str, str] = {}
    for number, group in enumerate(_split(sizes, shards), 1):
        name = f"model-{number:05d}-of-{shards:05d}.safetensors"
        header, at = {}, 0
        for i in sorted(group, key=lambda i: -BITS[stored[i][1]]):  # wide ones first, so that all are aligned
            tensor, dtype, shape = stored[i]
            header[tensor] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + sizes[i]]}
            at += sizes[i]
            places[tensor] = name
        raw = json.dumps(header).encode()
        raw += b" " * (-len(raw) % 8)
        with (folder / name).open("wb") as file:
            file.write(len(raw).to_bytes(8, "little") + raw)
            file.truncate(8 + len(raw) + at)
    index = {"metadata": {"total_size": sum(sizes)}, "weight_map": places}
    (folder / INDEX).write_text(json.dumps(index), encoding="utf-8")
    return sum(sizes)


def num_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    return math.prod(shape) * BITS[dtype] // 8


def _split(sizes: list[int], shards: int) -> Iterator[list[int]]:
    """Numbers of tensors, in order, in so many groups of nearly as many bytes."""
    total, done, group, number = sum(sizes), 0, list[int](), 1
    for i, size in enumerate(sizes):
        group.append(i)
        done += size
        if done * shards >= total * number and number < shards:
            yield group
            group, number = [], number + 1
    yield group


def measure(folder: Path, shards: int, repeats: int, note: Callable[[str], None]) -> list[dict[str, Any]]:
    """For each released model the seconds of a whole `dsv4 inspect --json`, from starting Python to its end."""
    rows = []
    for name, subject in SUBJECTS.items():
        data, stored = contents(subject)
        target = folder / name
        size = write_sparse(target, data, stored, shards)
        note(f"{name}: {len(stored):,} tensors, {size:,} bytes")
        command = [sys.executable, "-m", "dsv4", "inspect", str(target), "--json"]
        times = []
        for _ in range(repeats):
            started = time.perf_counter()
            done = subprocess.run(command, capture_output=True, text=True)
            times.append(time.perf_counter() - started)
        found = json.loads(done.stdout)
        rows.append({
            "model": name, "what": found["what"], "shards": shards, "tensors": found["tensors"],
            "bytes": found["bytes"], "parameters": found["parameters"], "active": found["active"],
            "whole": found["whole"], "seconds": round(statistics.median(times), 3), "slowest": round(max(times), 3),
        })  # fmt: skip
    return rows


def lines(rows: list[dict[str, Any]]) -> list[str]:
    out = [f"{'model':15s} {'tensors':>8s} {'bytes':>16s} {'parameters':>18s} {'seconds':>8s} {'slowest':>8s}  whole"]
    for row in rows:
        out.append(
            f"{row['model']:15s} {row['tensors']:8,} {row['bytes']:16,} {row['parameters']:18,} {row['seconds']:8.2f} "
            f"{row['slowest']:8.2f}  {'yes' if row['whole'] else 'NO'}: {row['what']}"
        )
    return out
