"""Model -> folder: all files are complete under temporary names before the first of them is renamed.

A folder is several files, so its renames are not one step. What loads at every moment is the old model, the new one,
or nothing: unless a single file changes, config.json is taken away first and comes back last.
"""

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from dsv4 import controls, files
from dsv4.checkpoint.names import LAYOUTS, Layout, file_names
from dsv4.checkpoint.shards import CONFIG, GENERATION, INDEX, listed_files
from dsv4.config import AnyConfig, ModelConfig, kind_of
from dsv4.errors import FileError, UserError
from dsv4.model import LanguageModel
from dsv4.model.language import as_dtype


def save(
    model: LanguageModel,
    folder: str | Path,
    layout: Layout = "published",
    *,
    dtype: torch.dtype | str | None = None,
    max_shard_bytes: int = 5 * 10**9,
) -> None:
    """Write weights and config.json. layout "published" has the released names; "transformers" what it can load as is.

    dtype is that of the large matrices, as in `load`; what a model of that dtype holds in fp32 stays fp32 (default: all
    as held). The transformers layout leaves out the MTP block, which transformers does not have. Weights above
    `max_shard_bytes` are sharded with an index. Stop ids that config.json does not name go into generation_config.json.
    FileError if the machine does not let it be written; until all is written, what was in the folder stays.
    """
    if layout not in LAYOUTS:
        raise UserError(f"unknown layout {layout!r}: use one of {', '.join(LAYOUTS)}")
    if layout == "transformers":
        _check_sayable(model.config)
    if model.device.type == "meta":
        raise UserError("the model is on the meta device and has no weights to save: build it on another device")
    folder, number_format = Path(folder), as_dtype(dtype or model.dtype)
    files.make_folder(folder)
    _clear(folder)
    safe = f"what was in {folder} before is as it was"
    held: list[list[str]] = []
    shards: list[Path] = []
    small: dict[str, str] = {}
    total = 0
    try:
        for number, shard in enumerate(_shards(model, layout, number_format if dtype else None, max_shard_bytes), 1):
            shards.append(folder / f".shard-{number:05d}.tmp")
            write_tensors(shards[-1], shard, safe=safe)
            held.append(list(shard))
            total += sum(t.nbytes for t in shard.values())
        targets = _targets(len(shards))
        if len(targets) > 1:
            where = {name: target for names, target in zip(held, targets, strict=True) for name in names}
            small[INDEX] = _json({"metadata": {"total_size": total}, "weight_map": where})
        stops = _generation_config(folder, model)
        if stops is not None:
            small[GENERATION] = _json(stops)
        small[CONFIG] = _json(_config_of(model.config, layout, number_format))
        small = {name: text for name, text in small.items() if _content(folder / name) != text.encode()}
        removed = _stale(folder, targets)
        if len(targets) + len(small) + len(removed) > 1 and CONFIG not in small:
            small[CONFIG] = _content(folder / CONFIG).decode()
        for name, text in small.items():
            with files.explained(folder / name, safe=safe):
                _temporary(folder, name).write_text(text, encoding="utf-8", newline="")
                files.synchronise(_temporary(folder, name))
        new = dict(zip(targets, shards, strict=True)) | {name: _temporary(folder, name) for name in small}
        for name in new:
            if (folder / name).is_dir():
                raise FileError(f"cannot write {folder / name}: it is a folder; move it away; {safe}")
        _exchange(folder, new, removed)
    except BaseException:  # a full disk, an interrupt: leave no litter
        for temporary in (*shards, *(_temporary(folder, name) for name in small)):
            files.discard(temporary)
        raise


def write_tensors(path: Path, tensors: dict[str, Tensor], *, safe: str = "") -> None:
    """Write a safetensors file and have the machine put it on its disk.

    FileError (path, reason, `safe`: what is still in good order) if it does not; what was written of it is removed.
    """
    try:
        with files.explained(path, safe=safe):
            try:
                save_file(tensors, path, metadata={"format": "pt"})
            except SafetensorError as error:
                raise OSError(files.reason_of(error)) from None
            path.chmod(files.MODE)  # the library's own choice is for its owner's eyes alone
            files.synchronise(path)
    except BaseException:
        files.discard(path)
        raise


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


def _generation_config(folder: Path, model: LanguageModel) -> dict | None:
    """generation_config.json where it says what config.json does not; one that is there keeps its other keys."""
    path = folder / GENERATION
    if not path.exists() and model.stop_ids == model.config.stop_ids:
        return None
    try:
        there = files.read_json(path, "", "") if path.exists() else {}
    except UserError:  # damaged: it is replaced
        there = {}
    return {**there, "eos_token_id": list(model.stop_ids) or None}


def _shards(
    model: LanguageModel, layout: Layout, dtype: torch.dtype | None, max_bytes: int
) -> Iterator[dict[str, Tensor]]:
    """File tensors in shards of at most `max_bytes` (a larger single tensor has a shard of its own)."""
    state = model.state_dict()
    dtypes = {name: tensor.dtype for name, tensor in state.items()}
    if dtype is not None:
        with torch.device("meta"):
            dtypes = {name: tensor.dtype for name, tensor in controls.build(model.config, dtype).state_dict().items()}
    shard: dict[str, Tensor] = {}
    size = 0
    for name, tensor in state.items():
        if layout == "transformers" and name.startswith("mtp."):
            continue
        for file_name, place in file_names(name, tuple(tensor.shape), layout):
            part = tensor[place].detach().to("cpu", dtypes[name])
            if shard and size + part.nbytes > max_bytes:
                yield shard
                shard, size = {}, 0
            shard[file_name] = part.clone(memory_format=torch.contiguous_format)
            size += part.nbytes
    yield shard


def _check_sayable(config: AnyConfig) -> None:
    """UserError unless transformers has what this configuration says."""
    if not isinstance(config, ModelConfig):
        raise UserError(f"a model of kind {kind_of(config)} is saved in the published layout alone: leave out layout")
    for key, of_v4 in (("residual", "mhc"), ("attention", "compressed")):
        value = getattr(config, key)
        if value != of_v4:
            raise UserError(
                f"{key}={value!r} cannot be said to transformers, which has V4's alone: use the published layout"
            )


def _config_of(config: AnyConfig, layout: Layout, dtype: torch.dtype) -> dict:
    data = config.to_json()
    if layout == "transformers":
        assert isinstance(config, ModelConfig)
        data |= _transformers_rope(config)
    return {**data, "torch_dtype": str(dtype).removeprefix("torch.")}


def _transformers_rope(config: ModelConfig) -> dict:
    """transformers keys its rotary settings by "main" and "compress"; its YaRN has to be told to leave amplitudes."""
    scaling = dict(vars(config.rope_scaling))
    kind = scaling.pop("type")
    share = config.qk_rope_head_dim / config.head_dim
    if int(config.head_dim * share) < config.qk_rope_head_dim:  # transformers rounds the product down
        share = math.nextafter(share, 1.0)
    partial = {"partial_rotary_factor": share}
    compress = {"rope_type": kind, "rope_theta": config.compress_rope_theta, **partial}
    if kind == "yarn":
        compress |= {**scaling, "attention_factor": 1.0}
    main = {"rope_type": "default", "rope_theta": config.rope_theta, **partial}
    return {"rope_parameters": {"main": main, "compress": compress}, **partial}


def _json(value: dict) -> str:
    return json.dumps(value, indent=2, allow_nan=False) + "\n"


def _content(path: Path) -> bytes:
    return path.read_bytes() if path.is_file() else b""


def _temporary(folder: Path, name: str) -> Path:
    return folder / f".{name}.tmp"
