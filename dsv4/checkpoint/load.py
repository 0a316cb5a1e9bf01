"""Folder -> model: strict (every tensor used exactly once), shapes and dtypes checked before any weight is read."""

import logging
from contextlib import ExitStack
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dsv4 import controls, files
from dsv4.checkpoint.drafter import check_drafter
from dsv4.checkpoint.folder import resolve_checkpoint
from dsv4.checkpoint.names import Layout, file_names, known_names, layout_of
from dsv4.config import AnyConfig, ModelConfig, kind_of, read_any
from dsv4.config.rules import as_ids, check_ids
from dsv4.errors import UserError, shown
from dsv4.model import LanguageModel
from dsv4.model.moe import check_hash_table

log = logging.getLogger("dsv4")

CONFIG, GENERATION, INDEX = "config.json", "generation_config.json", "model.safetensors.index.json"
_PLAIN = {"F64", "F32", "F16", "BF16", "I64", "I32"}


def read_config(folder: str | Path) -> AnyConfig:
    """The configuration of a checkpoint folder, or of the latest checkpoint of a run folder; its kind is what
    config.json says in `model_type` (config.read_any)."""
    folder = resolve_checkpoint(folder)
    files.check_digests(folder, lambda name: name == CONFIG)
    return read_any(folder)


def load(
    folder: str | Path,
    dtype: torch.dtype | str = "float32",
    device: torch.device | str = "cpu",
    config: AnyConfig | None = None,
    *,
    mtp: bool = True,
) -> LanguageModel:
    """A model from a folder in published or transformers layout (safetensors, one file or sharded), or from the latest
    checkpoint of a run folder.

    dtype is that of the large matrices. mtp=False leaves out the MTP block, or the DSpark drafter in its place. The
    model comes without one from a transformers folder, which never holds it. `stop_ids` of the model are those of
    config.json and generation_config.json. Raises UserError, before any weight is read, for a
    missing, truncated, misshapen, unknown or repeated tensor, and for a file that has changed since digests.json listed
    it.
    """
    folder, device = resolve_checkpoint(folder, needs_config=config is None), _device(device)
    files.check_digests(folder, lambda name: name in (GENERATION, INDEX))
    config = config or read_config(folder)
    stop_ids = as_ids([*config.stop_ids, *_generation_stops(folder, config)])
    names = _weight_files(folder)
    files.check_digests(folder, lambda name: name in names or PurePosixPath(name).match("model*.safetensors"))
    with ExitStack() as stack:
        tensors = _open(folder, names, stack)
        layout = layout_of(tensors)
        if isinstance(config, ModelConfig):
            config, tensors = _drafting(folder, config, tensors, layout, mtp)
        elif layout == "transformers":
            raise UserError(
                f"{folder} names its tensors as transformers does, which is not read for a model of kind "
                f"{kind_of(config)}: give a folder that dsv4 has saved"
            )
        with torch.device("meta"):
            model = controls.build(config, dtype)
        places = _match(model, tensors, layout, folder)
        state = {name: _read(t, places[name], tensors, device) for name, t in model.state_dict().items()}
    for name, tensor in state.items():
        if isinstance(config, ModelConfig) and name.endswith("tid2eid"):
            check_hash_table(tensor, config, name)
    model.load_state_dict(state, assign=True)
    model.stop_ids = stop_ids
    return model


def _device(given: torch.device | str) -> torch.device:
    """UserError for a name that is no device's; whether there is such a device is torch's to say."""
    try:
        return torch.device(given)
    except (RuntimeError, TypeError):
        raise UserError(f"device {shown(given)} is unknown: use cpu, cuda or cuda:N") from None


def listed_files(folder: Path) -> set[str]:
    """The weight files that a folder's index names, relative to it; UserError if the index is damaged."""
    index, remedy = folder / INDEX, "fetch it again, or remove it if no file is missing"
    places = files.read_json(index, "the index", remedy).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise UserError(f"the index {index} has no weight_map from tensor names to file names: {remedy}")
    names = set(places.values())
    for name in sorted(names):
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or "\\" in name or path.suffix != ".safetensors":
            raise UserError(f"the index {index} names {shown(name)}, which is no .safetensors file in there: {remedy}")
    return names


def _weight_files(folder: Path) -> list[str]:
    """The files that hold the weights, relative to the folder: what the index names, else all that look like it."""
    with files.explained(folder, "read"):
        if (folder / INDEX).exists():
            names = sorted(listed_files(folder))
            missing = [name for name in names if not (folder / name).is_file()]
            if missing:
                raise UserError(f"{folder} lacks {missing[0]}, which its index lists: fetch the missing file")
        else:
            found = [p for pattern in ("model*", "mtp*") for p in folder.glob(f"{pattern}.safetensors")]
            names = sorted(p.name for p in found or folder.glob("*.safetensors"))
    if not names:
        raise UserError(f"{folder} holds no .safetensors file: give the folder of a checkpoint")
    return names


def _generation_stops(folder: Path, config: AnyConfig) -> tuple[int, ...]:
    """The stop ids of generation_config.json, if there is one."""
    path = folder / GENERATION
    if not path.exists():
        return ()
    stops = files.read_json(path, "the generation settings", "mend or remove the file").get("eos_token_id")
    check_ids(f"eos_token_id of {path}", stops, config.vocab_size)
    return as_ids(stops)


def _open(folder: Path, names: list[str], stack: ExitStack) -> dict[str, Any]:
    """Every tensor of every shard, by its name in the layout -> its safetensors slice handle; only headers are read."""
    tensors: dict[str, Any] = {}
    for name in names:
        file = folder / name
        try:
            handle = stack.enter_context(safe_open(file, framework="pt"))
        except (SafetensorError, OSError) as error:
            reason = files.reason_of(error)
            raise UserError(f"{file} cannot be read, or is truncated or damaged ({reason}): fetch it again") from None
        for tensor in handle.keys():  # noqa: SIM118 (not a dict)
            if tensor in tensors:
                raise UserError(f"tensor {tensor} appears twice in {folder}: remove the stray .safetensors file")
            tensors[tensor] = handle.get_slice(tensor)
    return {name: tensors[given] for name, given in known_names(tensors).items()}


def _drafting(
    folder: Path, config: ModelConfig, tensors: dict[str, Any], layout: Layout, mtp: bool
) -> tuple[ModelConfig, dict[str, Any]]:
    """Configuration and tensors without what cannot be or was not asked to be built beside the trunk; says so."""
    drafts = {name for name in tensors if name.startswith(("mtp.", "model.mtp."))}
    blocks = "an MTP block" if config.num_nextn_predict_layers else "a DSpark drafter"
    if not mtp:
        pass
    elif layout == "transformers" and config.num_draft_blocks:
        log.info("%s is a transformers folder, which does not hold %s: loading without one", folder, blocks)
    elif config.num_draft_blocks and not drafts:
        key = "num_nextn_predict_layers" if config.num_nextn_predict_layers else "dspark_stages"
        raise UserError(
            f"{folder} holds no mtp.* tensors although its configuration has {blocks}: load it without, with "
            f"load(folder, mtp=False) or with {key} 0 in its config.json"
        )
    else:
        check_drafter(folder, config, {name: tuple(tensors[name].get_shape()) for name in drafts})
        return config, tensors
    trunk = config.without_drafts()
    return trunk, {name: tensor for name, tensor in tensors.items() if name not in drafts}


def _match(model: LanguageModel, tensors: dict[str, Any], layout: Layout, folder: Path) -> dict[str, list]:
    """For each model tensor its file tensors with their places; UserError unless the two sides match exactly."""
    places: dict[str, list] = {}
    left = set(tensors)
    for name, tensor in model.state_dict().items():
        places[name] = []
        for file_name, place in file_names(name, tuple(tensor.shape), layout):
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
        remedy = "is its config.json right?"
        if all(name.startswith("mtp.") for name in left):
            remedy = "they are passed over by load(folder, mtp=False)"
        raise UserError(f"{folder} holds {len(left)} tensors too many, such as {min(left)}: {remedy}")
    return places


def _read(like: Tensor, places: list, tensors: dict[str, Any], device: torch.device | str) -> Tensor:
    if places[0][1] == ():
        return tensors[places[0][0]][...].to(device=device, dtype=like.dtype)
    whole = torch.empty(like.shape, dtype=like.dtype, device=device)
    for name, place in places:
        whole[place] = tensors[name][...].to(like.dtype)
    return whole
