"""Model -> folder, atomically: files are written under temporary names and renamed when all of them are complete."""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from dsv4.checkpoint.names import LAYOUTS, Layout, file_names
from dsv4.errors import UserError
from dsv4.model import Transformer


def save(
    model: Transformer,
    folder: str | Path,
    layout: Layout = "published",
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 5 * 10**9,
) -> None:
    """Write weights and config.json. layout "published" has the released names; "transformers" what it can load as is.

    dtype casts the floating-point matrices of the file (default: as held). The transformers layout leaves out the MTP
    block, which transformers does not have. Weights above `max_shard_bytes` are sharded with an index.
    """
    if layout not in LAYOUTS:
        raise UserError(f"unknown layout {layout!r}: use one of {', '.join(LAYOUTS)}")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    shards = _shards(model, layout, dtype, max_shard_bytes)
    names, weight_map, total, new = [], {}, 0, []
    try:
        for number, shard in enumerate(shards, 1):
            new.append(folder / f".shard-{number:05d}.tmp")
            save_file(shard, new[-1], metadata={"format": "pt"})
            names.append(list(shard))
            total += sum(t.nbytes for t in shard.values())
    except BaseException:  # a full disk, an interrupt: leave the folder as it was
        for temporary in new:
            temporary.unlink(missing_ok=True)
        raise
    targets = ["model.safetensors"]
    if len(new) > 1:
        targets = [f"model-{i:05d}-of-{len(new):05d}.safetensors" for i in range(1, len(new) + 1)]
    for target, held in zip(targets, names, strict=True):
        weight_map |= dict.fromkeys(held, target)
    for temporary, target in zip(new, targets, strict=True):
        os.replace(temporary, folder / target)
    for stale in folder.glob("model*.safetensors"):
        if stale.name not in targets:
            stale.unlink()
    index = folder / "model.safetensors.index.json"
    if len(new) > 1:
        text = json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=1)
        write_atomically(index, lambda path: path.write_text(text, encoding="utf-8"))
    else:
        index.unlink(missing_ok=True)
    config = model.config.to_json()
    if layout == "transformers":
        config |= _transformers_rope(config)
    text = json.dumps({**config, "torch_dtype": str(dtype or model.dtype).removeprefix("torch.")}, indent=2) + "\n"
    write_atomically(folder / "config.json", lambda path: path.write_text(text, encoding="utf-8"))


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary neighbour of `path`, then rename it: readers see the old file or the new one."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        write(temporary)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    os.replace(temporary, path)


def _shards(
    model: Transformer, layout: Layout, dtype: torch.dtype | None, max_bytes: int
) -> Iterator[dict[str, Tensor]]:
    """File tensors in shards of at most `max_bytes` (a larger single tensor has a shard of its own)."""
    shard: dict[str, Tensor] = {}
    size = 0
    for name, tensor in model.state_dict().items():
        if layout == "transformers" and name.startswith("mtp."):
            continue
        for file_name, place in file_names(name, tuple(tensor.shape), layout):
            part = tensor[place].detach().to("cpu", dtype if dtype and tensor.is_floating_point() else tensor.dtype)
            if shard and size + part.nbytes > max_bytes:
                yield shard
                shard, size = {}, 0
            shard[file_name] = part.clone(memory_format=torch.contiguous_format)
            size += part.nbytes
    yield shard


def _transformers_rope(config: dict) -> dict:
    """transformers keys its rotary settings by "main" and "compress"; its YaRN has to be told to leave amplitudes."""
    scaling = dict(config["rope_scaling"])
    kind = scaling.pop("type")
    partial = {"partial_rotary_factor": config["qk_rope_head_dim"] / config["head_dim"]}
    compress = {"rope_type": kind, "rope_theta": config["compress_rope_theta"], **partial}
    if kind == "yarn":
        compress |= {**scaling, "attention_factor": 1.0}
    main = {"rope_type": "default", "rope_theta": config["rope_theta"], **partial}
    return {"rope_parameters": {"main": main, "compress": compress}, **partial}
