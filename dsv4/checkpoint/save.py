"""Model -> folder: a model as it is held, packed matrices as the codes they are."""

import math
import re
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from dsv4 import controls, files
from dsv4.checkpoint.names import LAYOUTS, Layout, file_names, scale_name
from dsv4.checkpoint.shards import CONFIG, GENERATION
from dsv4.checkpoint.writing import Entry, as_json, shards_of, whole, write_folder, write_tensors
from dsv4.config import AnyConfig, ModelConfig, kind_of
from dsv4.errors import UserError
from dsv4.model import LanguageModel
from dsv4.model.language import as_dtype
from dsv4.model.packed import packed_of
from dsv4.ops.weights import BLOCKS, PackedMatrix

__all__ = ["save", "write_tensors"]

# What the released files keep in FP32 of all that is FP32 here; the rest of it is BF16 there.
RELEASED_FP32 = re.compile(r"(^|\.)(hc_\w+|ape|attn_sink|gate\.bias)$")
CODE_DTYPES = {"fp8": torch.float8_e4m3fn, "fp4": torch.int8}


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
    as held). Packed matrices are written as their codes and scales, and beside them what the released files have in
    BF16 is BF16, unless that would change a number. The transformers layout leaves out the MTP block, which
    transformers does not have. Weights above `max_shard_bytes` are sharded with an index. Stop ids that config.json
    does not name go into generation_config.json. FileError if the machine does not let it be written; until all is
    written, what was in the folder stays.
    """
    if layout not in LAYOUTS:
        raise UserError(f"unknown layout {layout!r}: use one of {', '.join(LAYOUTS)}")
    if layout == "transformers":
        check_sayable(model.config)
    if model.device.type == "meta":
        raise UserError("the model is on the meta device and has no weights to save: build it on another device")
    if model.absent:
        raise UserError(f"the model cannot be saved, because {model.absent}: load the whole of it, or use dsv4 convert")
    packed = packed_of(model)
    if packed and dtype is not None:
        raise UserError(
            f"the model has FP8 or FP4 matrices, which are written as they are, not in {dtype}: leave it out"
        )
    number_format = as_dtype(dtype or (torch.bfloat16 if packed else model.dtype))
    folder = Path(folder)
    files.make_folder(folder)
    shards = list(shards_of(_entries(model, layout, number_format if dtype else None, packed), max_shard_bytes))
    codes = {matrix.code for name, matrix in packed.items() if ".experts." in name} if packed else None
    small = {CONFIG: as_json(config_of(model.config, layout, number_format, codes))}
    stops = _generation_config(folder, model)
    if stops is not None:
        small = {GENERATION: as_json(stops), **small}
    write_folder(folder, shards, small)


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


def _entries(
    model: LanguageModel, layout: Layout, dtype: torch.dtype | None, packed: dict[str, PackedMatrix]
) -> Iterator[Entry]:
    """All tensors of a file, by their names in the layout."""
    with torch.device("meta"):
        like = controls.build(model.config, dtype or model.dtype).state_dict()
    state = model.state_dict()
    for name, plain in like.items():
        if layout == "transformers" and name.startswith("mtp."):
            continue
        places = file_names(name, tuple(plain.shape), layout)
        if name in packed:
            yield from _packed_entries(packed[name], [file_name for file_name, _ in places])
            continue
        tensor = state[name]
        for file_name, place in places:
            part = tensor[place]
            if packed:
                yield whole(file_name, part, released_dtype(file_name, part))
            else:
                yield whole(file_name, part, plain.dtype if dtype else None)


def _packed_entries(matrix: PackedMatrix, names: list[str]) -> Iterator[Entry]:
    """Matrices that lie one below the other, each as its codes and scales."""
    rows = matrix.shape[0] // len(names)
    scaled = len(matrix.scales) // len(names)
    assert len(names) == 1 or rows % BLOCKS[matrix.code][0] == 0, "stacked matrices that share a scale"
    for i, name in enumerate(names):
        codes, scales = matrix.codes[i * rows :][:rows], matrix.scales[i * scaled :][:scaled]
        yield whole(name, codes.view(CODE_DTYPES[matrix.code]))
        yield whole(scale_name(name), scales.view(torch.float8_e8m0fnu))


def released_dtype(name: str, tensor: Tensor) -> torch.dtype:
    """The dtype of a tensor in numbers beside packed ones: BF16, unless the released files have FP32 (or whole
    numbers), or it changes a number."""
    if not tensor.is_floating_point() or RELEASED_FP32.search(name):
        return tensor.dtype
    return torch.bfloat16 if torch.equal(tensor.bfloat16().to(tensor.dtype), tensor) else torch.float32


def check_sayable(config: AnyConfig) -> None:
    """UserError unless transformers has what this configuration says."""
    if not isinstance(config, ModelConfig):
        raise UserError(f"a model of kind {kind_of(config)} is saved in the published layout alone: leave out layout")
    for key, of_v4 in (("residual", "mhc"), ("attention", "compressed")):
        value = getattr(config, key)
        if value != of_v4:
            raise UserError(
                f"{key}={value!r} cannot be said to transformers, which has V4's alone: use the published layout"
            )


def config_of(config: AnyConfig, layout: Layout, dtype: torch.dtype, codes: set[str] | None = None) -> dict:
    """What config.json says. codes: of the experts' matrices, if matrices are FP8 or FP4."""
    data = config.to_json()
    if layout == "transformers":
        assert isinstance(config, ModelConfig)
        data |= _transformers_rope(config)
    data["torch_dtype"] = str(dtype).removeprefix("torch.")
    if codes is not None:
        if codes == {"fp4"}:
            data["expert_dtype"] = "fp4"  # the released files with FP8 experts do not have this key
        data["quantization_config"] = {
            "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "scale_fmt": "ue8m0",
            "weight_block_size": list(BLOCKS["fp8"]),
        }  # fmt: skip
    return data


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
