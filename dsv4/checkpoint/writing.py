"""Tensors -> files of a folder: all are complete under temporary names before the first of them is renamed.

A folder is several files, so its renames are not one step. What loads at every moment is the old model, the new one,
or nothing: unless a single file changes, config.json is taken away first and comes back last. A file is written piece
by piece, so nothing that is made on the way to it needs to be whole in memory.
"""

import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dsv4 import files
from dsv4.checkpoint.shards import CONFIG, GENERATION, INDEX, listed_files
from dsv4.checkpoint.stored import DTYPES
from dsv4.errors import FileError, UserError

SPELLED = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Entry:
    """A tensor of a file to be written; `pieces` gives its numbers in order, contiguous tensors of its dtype."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: Callable[[], Iterable[Tensor]]

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def whole(name: str, tensor: Tensor, dtype: torch.dtype | None = None) -> Entry:
    """A tensor that is there, on any device, as a file's entry of a dtype (None: its own)."""
    dtype = dtype or tensor.dtype
    return Entry(
        name, dtype, tuple(tensor.shape), lambda: [tensor.detach().to("cpu", dtype).contiguous()],
    )  # fmt: skip


def shards_of(entries: Iterable[Entry], max_bytes: int) -> Iterator[list[Entry]]:
    """Entries in shards of at most `max_bytes` (a larger single tensor has a shard of its own)."""
    shard: list[Entry] = []
    size = 0
    for entry in entries:
        if shard and size + entry.nbytes > max_bytes:
            yield shard
            shard, size = [], 0
        shard.append(entry)
        size += entry.nbytes
    yield shard


def write_folder(
    folder: Path, shards: list[list[Entry]], small: dict[str, str], wrote: Callable[[int], object] = lambda n: None
) -> None:
    """Write weight files, and small files by name and text, config.json among them, over what was saved there before.

    wrote: called with the number of bytes of every tensor that was written. FileError if the machine does not let it be
    written; until all is written, what was in the folder stays.
    """
    files.make_folder(folder)
    _clear(folder)
    safe = f"what was in {folder} before is as it was"
    places = [folder / f".shard-{number:05d}.tmp" for number in range(1, len(shards) + 1)]
    try:
        for place, shard in zip(places, shards, strict=True):
            write_entries(place, shard, safe=safe, wrote=wrote)
        targets = _targets(len(shards))
        if len(targets) > 1:
            where = {entry.name: target for shard, target in zip(shards, targets, strict=True) for entry in shard}
            total = sum(entry.nbytes for shard in shards for entry in shard)
            small = {INDEX: as_json({"metadata": {"total_size": total}, "weight_map": where}), **small}
        small = {name: text for name, text in small.items() if _content(folder / name) != text.encode()}
        removed = _stale(folder, targets)
        if len(targets) + len(small) + len(removed) > 1 and CONFIG not in small:
            small[CONFIG] = _content(folder / CONFIG).decode()
        for name, text in small.items():
            with files.explained(folder / name, safe=safe):
                _temporary(folder, name).write_text(text, encoding="utf-8", newline="")
                files.synchronise(_temporary(folder, name))
        new = dict(zip(targets, places, strict=True)) | {name: _temporary(folder, name) for name in small}
        for name in new:
            if (folder / name).is_dir():
                raise FileError(f"cannot write {folder / name}: it is a folder; move it away; {safe}")
        _exchange(folder, new, removed)
    except BaseException:  # a full disk, an interrupt: leave no litter
        for temporary in (*places, *(_temporary(folder, name) for name in small)):
            files.discard(temporary)
        raise


def write_tensors(path: Path, tensors: dict[str, Tensor], *, safe: str = "") -> None:
    """Write a safetensors file and have the machine put it on its disk.

    FileError (path, reason, `safe`: what is still in good order) if it does not; what was written of it is removed.
    """
    write_entries(path, [whole(name, tensor) for name, tensor in tensors.items()], safe=safe)


def write_entries(
    path: Path, entries: list[Entry], *, safe: str = "", wrote: Callable[[int], object] = lambda n: None
) -> None:
    """`write_tensors`, of tensors that are made while they are written."""
    try:
        with files.explained(path, safe=safe):
            stream_file(path, entries, wrote)
            files.synchronise(path)
    except BaseException:
        files.discard(path)
        raise


def stream_file(path: Path, entries: list[Entry], wrote: Callable[[int], object] = lambda n: None) -> None:
    """A safetensors file: its header, then every tensor's bytes; wider numbers first, so that all of them are
    aligned."""
    entries = sorted(entries, key=lambda entry: -entry.dtype.itemsize)  # stable: else in the order given
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for entry in entries:
        begin, end = end, end + entry.nbytes
        header[entry.name] = {
            "dtype": SPELLED[entry.dtype], "shape": list(entry.shape), "data_offsets": [begin, end],
        }  # fmt: skip
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for entry in entries:
            written = 0
            for piece in entry.pieces():
                assert piece.dtype == entry.dtype and piece.is_contiguous(), entry.name
                written += file.write(piece.reshape(-1).view(torch.uint8).numpy().data)
            assert written == entry.nbytes, f"{entry.name}: {written} bytes of {entry.nbytes}"
            wrote(written)


def _clear(folder: Path) -> None:
    """Remove what a process that died here was writing, safetensors' own temporaries among it."""
    small = (_temporary(folder, name) for name in (INDEX, GENERATION, CONFIG))
    for stale in (*folder.glob(".shard-*.tmp"), *folder.glob(".tmp??????"), *small):
        files.discard(stale)


def _exchange(folder: Path, new: dict[str, Path], removed: list[str]) -> None:
    """Rename the complete files to their names; config.json, if it is among them, is away meanwhile and comes last."""
    again = "save it again: without its config.json it loads nothing that is half new" if CONFIG in new else ""
    with files.explained(folder, "exchange the files of", safe=again):
        if CONFIG in new:
            (folder / CONFIG).unlink(missing_ok=True)
            files.synchronise(folder)
        for name, temporary in new.items():
            if name != CONFIG:
                os.replace(temporary, folder / name)
        for name in removed:
            (folder / name).unlink(missing_ok=True)
        files.synchronise(folder)
        if CONFIG in new:
            os.replace(new[CONFIG], folder / CONFIG)
            files.synchronise(folder)


def _targets(count: int) -> list[str]:
    """The names of the weight files."""
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]


def _stale(folder: Path, targets: list[str]) -> list[str]:
    """The files of what was saved here before that would be read beside the new ones, or judge them."""
    old = {p.name for pattern in ("model*.safetensors", "mtp*.safetensors") for p in folder.glob(pattern)}
    if (folder / INDEX).exists():
        try:
            old |= listed_files(folder)
        except UserError:  # a damaged index names nothing
            pass
        if len(targets) == 1:
            old.add(INDEX)
    old |= {files.DIGESTS} if (folder / files.DIGESTS).exists() else set()
    return sorted(old - set(targets))


def as_json(value: dict) -> str:
    return json.dumps(value, indent=2, allow_nan=False) + "\n"


def _content(path: Path) -> bytes:
    return path.read_bytes() if path.is_file() else b""


def _temporary(folder: Path, name: str) -> Path:
    return folder / f".{name}.tmp"
