"""Folder -> model: strict (every tensor used exactly once), shapes and dtypes checked before any weight is read."""

import json
import logging
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dsv4.checkpoint.names import Layout, file_names, layout_of
from dsv4.config import ModelConfig
from dsv4.errors import UserError
from dsv4.model import Transformer
from dsv4.model.moe import check_hash_table

log = logging.getLogger("dsv4")

_PLAIN = {"F64", "F32", "F16", "BF16", "I64", "I32"}


def read_config(folder: str | Path) -> ModelConfig:
    """The configuration of a checkpoint folder."""
    return ModelConfig.from_json(Path(folder))


def load(
    folder: str | Path,
    dtype: torch.dtype | str = "float32",
    device: torch.device | str = "cpu",
    config: ModelConfig | None = None,
) -> Transformer:
    """A model from a folder in published or transformers layout (safetensors, one file or sharded).

    dtype is that of the large matrices. A transformers folder never holds the MTP block, so the model comes without
    one. Raises UserError, before any weight is read, for a missing, truncated, misshapen, unknown or repeated tensor.
    """
    folder = Path(folder)
    config = config or read_config(folder)
    with ExitStack() as stack:
        tensors = _open(folder, stack)
        layout = layout_of(set(tensors))
        if layout == "transformers" and config.num_nextn_predict_layers:
            log.info("%s is a transformers folder, which holds no MTP block: loading without one", folder)
            trunk = config.compress_ratios[: config.num_hidden_layers]
            config = config.with_(num_nextn_predict_layers=0, compress_ratios=trunk)
        with torch.device("meta"):
            model = Transformer(config, dtype)
        places = _match(model, tensors, layout, folder)
        state = {name: _read(t, places[name], tensors, device) for name, t in model.state_dict().items()}
    for name, tensor in state.items():
        if name.endswith("tid2eid"):
            check_hash_table(tensor, config, name)
    model.load_state_dict(state, assign=True)
    return model


def _open(folder: Path, stack: ExitStack) -> dict[str, Any]:
    """Every tensor of every shard by name -> its safetensors slice handle; nothing is read but the headers."""
    files = sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("*.safetensors"))
    index = folder / "model.safetensors.index.json"
    if index.exists():
        listed = _listed(index)
        missing = sorted(listed - {f.name for f in files})
        if missing:
            raise UserError(f"{folder} lacks {missing[0]}, which its index lists: fetch the missing file")
        files = [f for f in files if f.name in listed]
    if not files:
        raise UserError(f"{folder} holds no .safetensors file: give the folder of a checkpoint")
    tensors: dict[str, Any] = {}
    for file in files:
        try:
            handle = stack.enter_context(safe_open(file, framework="pt"))
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file} is truncated or damaged ({error}): copy or save it again") from None
        for name in handle.keys():  # noqa: SIM118 (not a dict)
            if name in tensors:
                raise UserError(f"tensor {name} appears twice in {folder}: remove the stray .safetensors file")
            tensors[name] = handle.get_slice(name)
    return tensors


def _listed(index: Path) -> set[str]:
    """The files that an index names."""
    try:
        return set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        raise UserError(f"{index} is damaged: fetch it again, or remove it if no file is missing") from None


def _match(model: Transformer, tensors: dict[str, Any], layout: Layout, folder: Path) -> dict[str, list]:
    """For each model tensor its file tensors with their places; UserError unless the two sides match exactly."""
    places: dict[str, list] = {}
    left = set(tensors)
    for name, tensor in model.state_dict().items():
        places[name] = []
        for file_name, place in file_names(name, tuple(tensor.shape), layout):
            if file_name == "head.weight" and layout == "transformers" and "lm_head.weight" in tensors:
                file_name = "lm_head.weight"
            if file_name not in tensors:
                raise UserError(f"{folder} lacks tensor {file_name}: it is incomplete or of another configuration")
            if tensors[file_name].get_dtype() not in _PLAIN:
                raise UserError(
                    f"tensor {file_name} is {tensors[file_name].get_dtype()}: quantised weights cannot be read yet; "
                    "convert it to BF16 first"
                )
            shape, want = tuple(tensors[file_name].get_shape()), tuple(tensor.shape[len(place) :])
            if shape != want:
                raise UserError(f"tensor {file_name} in {folder} has shape {shape}, the configuration asks for {want}")
            left.discard(file_name)
            places[name].append((file_name, place))
    if left:
        raise UserError(f"{folder} holds {len(left)} tensors too many, such as {min(left)}: is its config.json right?")
    return places


def _read(like: Tensor, places: list, tensors: dict[str, Any], device: torch.device | str) -> Tensor:
    if places[0][1] == ():
        return tensors[places[0][0]][...].to(device=device, dtype=like.dtype)
    whole = torch.empty(like.shape, dtype=like.dtype, device=device)
    for name, place in places:
        whole[place] = tensors[name][...].to(like.dtype)
    return whole
