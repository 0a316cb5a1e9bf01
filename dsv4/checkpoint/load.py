"""Folder -> model: strict (every tensor used exactly once), shapes and dtypes checked before any weight is read, and
never more in memory than the model and a piece of one tensor.
"""

import logging
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Literal

import torch
from torch import Tensor, nn

from dsv4 import controls, files
from dsv4.checkpoint.drafter import check_drafter
from dsv4.checkpoint.folder import resolve_checkpoint
from dsv4.checkpoint.names import Layout, Place, file_names, known_names, layout_of
from dsv4.checkpoint.shards import CONFIG, GENERATION, INDEX, read_index, weight_files
from dsv4.checkpoint.source import Source, pair
from dsv4.checkpoint.stored import Stored, open_folder
from dsv4.checkpoint.stream import Stream, as_bytes, size_of
from dsv4.config import AnyConfig, ModelConfig, kind_of, read_any
from dsv4.config.rules import as_ids, check_ids
from dsv4.errors import UserError, shown
from dsv4.model import LanguageModel
from dsv4.model.dspark import DSpark
from dsv4.model.moe import check_hash_table
from dsv4.model.packed import choose_numbers, put, released_code
from dsv4.ops.weights import BLOCKS, PackedMatrix

log = logging.getLogger("dsv4")

Weights = Literal["plain", "released"]
_IDS = ("I64", "I32")


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
    weights: Weights = "plain",
    numbers: str = "plain",
    layers: Iterable[int] | None = None,
    memory: int | str | None = None,
) -> LanguageModel:
    """A model from a folder in published or transformers layout (safetensors, one file or sharded), or from the latest
    checkpoint of a run folder.

    dtype is that of the large matrices, and of the activations. weights: "plain" has every matrix in dtype, what is FP8
    or FP4 on file unpacked; "released" keeps those as the codes they are (ops.PackedMatrix). numbers: "published"
    rounds where the released code rounds, "plain" does not (model/packed.py). mtp=False leaves out the MTP block, or
    the DSpark drafter in its place. The model comes without one from a transformers folder, which never holds it.
    `stop_ids` of the model are those of config.json and generation_config.json.

    layers: only these blocks are read, by their numbers (the MTP block's is that after the last), with what lies
    outside of blocks; the others stay on the meta device and cannot run. memory: bytes that the weights may take, such
    as "16GiB"; blocks beyond that are read from disk when they run, each time.

    Raises UserError, before any weight is read, for a missing, truncated, misshapen, unknown or repeated tensor, and
    for a file that has changed since digests.json listed it; and for codes and scales that are no numbers.
    """
    folder, device = resolve_checkpoint(folder, needs_config=config is None), _device(device)
    if weights not in ("plain", "released"):
        raise UserError(f"weights={weights!r} is unknown: use plain or released")
    room = None if memory is None else as_bytes(memory)
    config, sources, layout, stop_ids = open_checkpoint(folder, config, mtp=mtp)
    with torch.device("meta"):
        model = controls.build(config, dtype)
    parts = match(model, sources, layout, folder)
    if weights == "released":
        _pack(model, parts)
    choose_numbers(model, numbers)
    blocks = dict(enumerate([*model.layers, *model.mtp]))
    wanted = _wanted(layers, blocks)
    streamed = {}
    if room is not None:  # a drafter's stages are used outside of their own turns, too, so they stay
        streamed = {i: blocks[i] for i in wanted if i < len(model.layers) or not isinstance(model.mtp, DSpark)}
        left_out = [blocks[i] for i in set(blocks) - set(wanted)]
        room = _room(model, streamed, left_out, room)
    _allocate(model, device, set(blocks.values()) - {blocks[i] for i in wanted})

    def read(i: int | None) -> None:
        for name, part in parts.items():
            if _block_of(name, len(model.layers)) == i:
                _fill(model, name, part)

    for i in (None, *(i for i in wanted if i not in streamed)):
        read(i)
    for i in set(blocks) - set(wanted):
        blocks[i].register_forward_pre_hook(_absent(i, folder))
        model.absent = "only some of its layers were loaded"
    if room is not None:
        model.stream = Stream(streamed, read, room)
        model.absent = "its layers are read from disk as they run"
    model.stop_ids = stop_ids
    return model


def open_checkpoint(
    folder: Path, config: AnyConfig | None = None, *, mtp: bool = True
) -> tuple[AnyConfig, dict[str, Source], Layout, tuple[int, ...]]:
    """What a checkpoint folder holds, its headers read and no weight: the configuration of the model that can be built
    of it, its tensors by their names in the layout, the layout, and the stop ids. UserError as in `load`."""
    files.check_digests(folder, lambda name: name in (GENERATION, INDEX))
    config = config or read_config(folder)
    stop_ids = as_ids([*config.stop_ids, *_generation_stops(folder, config)])
    names = weight_files(folder)
    files.check_digests(folder, lambda name: name in names or PurePosixPath(name).match("model*.safetensors"))
    found = open_folder(folder, names)
    if (folder / INDEX).exists():
        for name in read_index(folder).keys() - found.keys():
            raise UserError(f"{folder} lacks the tensor {shown(name)}, which its index lists: fetch it again")
    tensors = {name: found[given] for name, given in known_names(found).items()}
    layout = layout_of(tensors)
    if isinstance(config, ModelConfig):
        config, tensors = _drafting(folder, config, tensors, layout, mtp)
    elif layout == "transformers":
        raise UserError(
            f"{folder} names its tensors as transformers does, which is not read for a model of kind "
            f"{kind_of(config)}: give a folder that dsv4 has saved"
        )
    return config, pair(tensors), layout, stop_ids


def _device(given: torch.device | str) -> torch.device:
    """UserError for a name that is no device's; whether there is such a device is torch's to say."""
    try:
        return torch.device(given)
    except (RuntimeError, TypeError):
        raise UserError(f"device {shown(given)} is unknown: use cpu, cuda or cuda:N") from None


def _generation_stops(folder: Path, config: AnyConfig) -> tuple[int, ...]:
    """The stop ids of generation_config.json, if there is one."""
    path = folder / GENERATION
    if not path.exists():
        return ()
    stops = files.read_json(path, "the generation settings", "mend or remove the file").get("eos_token_id")
    check_ids(f"eos_token_id of {path}", stops, config.vocab_size)
    return as_ids(stops)


def _drafting(
    folder: Path, config: ModelConfig, tensors: dict[str, Stored], layout: Layout, mtp: bool
) -> tuple[ModelConfig, dict[str, Stored]]:
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
        check_drafter(folder, config, {name: tensors[name].shape for name in drafts})
        return config, tensors
    trunk = config.without_drafts()
    return trunk, {name: tensor for name, tensor in tensors.items() if name not in drafts}


Parts = list[tuple[Source, Place]]  # what a tensor of a model is put together from, and where in it each lies


def match(model: LanguageModel, sources: dict[str, Source], layout: Layout, folder: Path) -> dict[str, Parts]:
    """For each tensor of a model (nothing packed) its parts; UserError unless the two sides match exactly."""
    parts: dict[str, Parts] = {}
    left = set(sources)
    for name, tensor in model.state_dict().items():
        parts[name] = []
        for file_name, place in file_names(name, tuple(tensor.shape), layout):
            source = sources.get(file_name)
            if source is None:
                raise UserError(f"{folder} lacks tensor {file_name}: it is incomplete or of another configuration")
            if (source.weight.dtype in _IDS) == tensor.is_floating_point() and not source.code:
                raise UserError(
                    f"tensor {file_name} in {folder} is {source.weight.dtype}, which is no "
                    f"{'weight' if tensor.is_floating_point() else 'table of ids'}: fetch it again"
                )
            shape, want = source.shape, tuple(tensor.shape[len(place) :])
            if shape != want:
                raise UserError(f"tensor {file_name} in {folder} has shape {shape}, the configuration asks for {want}")
            left.discard(file_name)
            parts[name].append((source, place))
    if left:
        remedy = "is its config.json right?"
        if all(name.startswith("mtp.") for name in left):
            remedy = "they are passed over by load(folder, mtp=False)"
        raise UserError(f"{folder} holds {len(left)} tensors too many, such as {min(left)}: {remedy}")
    return parts


def _pack(model: LanguageModel, parts: dict[str, Parts]) -> None:
    """Give a model on the meta device packed matrices where the files have codes; UserError where it cannot have them.

    A code on file for what no op multiplies packed (released_code) is unpacked like any other number.
    """
    for name, sources in parts.items():
        codes = {source.code for source, _ in sources}
        if codes == {""} or not released_code(name):
            continue
        first = sources[0][0]
        code = first.code
        high, wide = BLOCKS[code] if code else (1, 1)
        like = model.get_parameter(name)
        rows, columns = like.numel() // like.shape[-1], like.shape[-1]
        if len(codes) > 1 or (len(sources) > 1 and first.shape[0] % high):
            why = "are in several formats" if len(codes) > 1 else f"have {first.shape[0]} rows, no multiple of {high}"
            raise UserError(
                f"the matrices {first.name} and those stacked with it {why}, so they cannot be kept as one packed "
                "matrix: load with weights='plain'"
            )
        packed = columns // 2 if code == "fp4" else columns
        put(
            model, name,
            PackedMatrix(
                code, torch.empty(rows, packed, dtype=torch.uint8, device="meta"),
                torch.empty(-(-rows // high), -(-columns // wide), dtype=torch.uint8, device="meta"),
            ),
        )  # fmt: skip


def _fill(model: LanguageModel, name: str, parts: Parts) -> None:
    """Read one tensor of a model into its place."""
    path, _, leaf = name.rpartition(".")
    there = getattr(model.get_submodule(path), leaf)
    if isinstance(there, PackedMatrix):
        for i, (source, _) in enumerate(parts):  # in the order in which they lie below each other
            source.fill_packed(there, i * source.shape[0])
        return
    tensor = there.detach()
    for source, place in parts:
        source.fill(tensor[place])
    if isinstance(model.config, ModelConfig) and leaf == "tid2eid":
        check_hash_table(tensor, model.config, name)


def _wanted(layers: Iterable[int] | None, blocks: dict[int, nn.Module]) -> list[int]:
    wanted = sorted(blocks if layers is None else set(layers))
    for i in wanted:
        if i not in blocks:
            raise UserError(
                f"layer {i} does not exist: the model has layers 0 to {len(blocks) - 1}, the MTP block among"
            )
    return wanted


def _room(model: LanguageModel, streamed: dict[int, nn.Module], left_out: list[nn.Module], budget: int) -> int:
    """What of a budget is left for streamed blocks; UserError if not even the largest of them fits."""
    sizes = [size_of(block) for block in streamed.values()]
    outside = size_of(model) - sum(sizes) - sum(map(size_of, left_out))
    if budget < outside + max(sizes, default=0):
        raise UserError(
            f"memory={budget} bytes is too little: what lies outside of the layers takes {outside}, the largest layer "
            f"{max(sizes)} more; give at least {outside + max(sizes)}"
        )
    return budget - outside


def _allocate(module: nn.Module, device: torch.device, leave: set[nn.Module]) -> None:
    """Memory, not yet filled, for all tensors of a module on the meta device but those of the modules in `leave`."""
    for child in module.children():
        if child not in leave:
            _allocate(child, device, leave)
    # not to_empty: on meta tensors it imports torch's compiler, which takes a second
    for name, p in list(module.named_parameters(recurse=False)):
        setattr(module, name, nn.Parameter(_like(p, device), requires_grad=p.requires_grad))
    for name, buffer in list(module.named_buffers(recurse=False)):
        setattr(module, name, _like(buffer, device))


def _like(there: Tensor, device: torch.device) -> Tensor:
    return torch.empty(there.shape, dtype=there.dtype, device=device)


def _block_of(name: str, layers: int) -> int | None:
    """The number of the block that a tensor of this name is in; the MTP block's is that after the last."""
    kind, _, rest = name.partition(".")
    if kind not in ("layers", "mtp"):
        return None
    return int(rest.partition(".")[0]) + (layers if kind == "mtp" else 0)


def _absent(i: int, folder: Path):
    def refuse(module: nn.Module, args: object) -> None:
        raise UserError(
            f"layer {i} of {folder} was not loaded: load it with layers=range({i}, {i + 1}), or leave it out"
        )

    return refuse
