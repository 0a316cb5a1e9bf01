"""What is wrong with a checkpoint's tensors (missing, unexpected, misshapen, other dtypes), and what it probably means.

Tensors are named as published here, and judged by their headers alone. Like findings are one, so that a checkpoint
without a shard is a few lines and not a thousand.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from dsv4.checkpoint.expected import Want, fp4_scales, fp8_scales, packed_shape, scale_of
from dsv4.checkpoint.headers import TensorInfo
from dsv4.config import AnyConfig, ModelConfig
from dsv4.errors import shown

PLAIN = {"F64", "F32", "F16", "BF16"}
_DIGITS = re.compile(r"(?<=\.)\d+(?=\.)")
_LAYER = re.compile(r"^layers\.(\d+)\.")
_STACKED = re.compile(r"\.experts\.(w13|w1|w2|w3|gate_up_proj|down_proj|gate_proj|up_proj)(\.weight)?$")
_SCALES = ("weight_scale_inv", "weight_scale", "scales")  # other spellings of `scale`
_DRAFTER = (".main_proj.", ".main_norm.", ".markov_head.", ".confidence_head.")


@dataclass(frozen=True)
class Finding:
    """One thing that is not as the configuration says.

    kind: missing, unexpected, shape, dtype, repeated, file, index, config or note. harmless: the model that is read is
    the right one all the same.
    """

    kind: str
    says: str
    tensors: tuple[str, ...] = ()
    harmless: bool = False


def pattern_of(name: str) -> str:
    """A name with every number in it left open: like names of all layers and experts are one."""
    return _DIGITS.sub("N", name)


def compare(config: AnyConfig, want: Mapping[str, Want], found: Mapping[str, TensorInfo]) -> list[Finding]:
    """The findings on tensors (published names) beside what a configuration asks for; none: all is as it should be."""
    missing: list[str] = []
    wrong: list[tuple[str, str, str]] = []  # kind, tensor, what is wrong and what it means
    used: set[str] = set()
    for name, wish in want.items():
        info = found.get(name)
        if info is None:
            missing.append(name)
            continue
        used.add(name)
        if wish.role in ("fp8", "fp4"):
            wrong += _judge_matrix(name, wish, info, found, used)
        else:
            wrong += _judge_plain(name, wish, info)
    unexpected = {name for name in found if name not in used}
    if missing and len(missing) == len(want):
        says = (
            f"none of the {len(want):,} tensors that the configuration asks for is there, but {len(found):,} others, "
        )
        says += f"such as {min(found)}: it is another model's configuration, or they are named in another way"
        return [Finding("missing", says, tuple(missing))]
    findings = _explain_missing(config, missing, unexpected, want, found)
    findings += _explain_unexpected(config, unexpected, want, found)
    return findings + grouped(wrong)


def grouped(rows: Iterable[tuple[str, str, str]], *, harmless: bool = False) -> list[Finding]:
    """(kind, tensor, text) -> a finding for each text about tensors of like names."""
    groups: dict[tuple[str, str, str], list[str]] = {}
    for kind, name, text in rows:
        groups.setdefault((kind, text, pattern_of(name)), []).append(name)
    return [
        Finding(kind, f"{_named(names)} {text}", tuple(names), harmless or kind == "note")
        for (kind, text, _), names in groups.items()
    ]


def _named(names: list[str]) -> str:
    first = names[0] if names[0].isprintable() else shown(names[0])
    return first if len(names) == 1 else f"{first} and {len(names) - 1:,} like it:"


# --- one tensor ------------------------------------------------------------------------------------------------------


def _judge_matrix(
    name: str, want: Want, info: TensorInfo, found: Mapping[str, TensorInfo], used: set[str]
) -> list[tuple[str, str, str]]:
    """A large matrix: numbers, or FP8 or packed FP4 with its scales."""
    shape, dtype = info.shape, info.dtype
    if dtype in PLAIN:
        return [] if shape == want.shape else [_misshapen(name, want.shape, info)]
    if dtype == "F8_E4M3" and shape == want.shape:
        return _judge_scale(name, fp8_scales(shape), dtype, found, used)
    packed = shape == packed_shape(want.shape)
    if dtype in ("I8", "U8") and packed:
        rows = _judge_scale(name, fp4_scales(want.shape), "packed FP4", found, used)
        if dtype == "U8":
            rows.append(("note", name, "is U8: packed FP4, which is I8 in the release; the same bytes"))
        if want.role != "fp4":
            rows.append(("note", name, "is packed FP4, which a release has for routed experts alone"))
        return rows
    _scale(name, found, used)
    if shape != want.shape:
        return [_misshapen(name, want.shape, info)]
    if dtype in ("I8", "U8"):
        text = f"{dtype}: whole numbers of another tool's quantisation"
    elif dtype == "F4":
        text = "F4: FP4 under its own type; the release packs two numbers into an I8"
    elif dtype.startswith("F8"):
        text = f"{dtype}: another FP8 than F8_E4M3, the release's; its bytes mean other numbers"
    else:
        text = f"{dtype}, which no matrix is stored in"
    return [("dtype", name, f"is {text}")]


def scale_names(name: str) -> tuple[str, ...]:
    """What a matrix's scales may be called: as published, and in other tools' spellings."""
    return (scale_of(name), *(name.removesuffix("weight") + other for other in _SCALES))


def _scale(name: str, found: Mapping[str, TensorInfo], used: set[str]) -> str | None:
    """The tensor that holds a matrix's scales, in any spelling."""
    plain = scale_of(name)
    scale = plain if plain in found else next((other for other in scale_names(name) if other in found), None)
    if scale is not None:
        used.add(scale)
    return scale


def _judge_scale(
    name: str, shape: tuple[int, ...], stored: str, found: Mapping[str, TensorInfo], used: set[str]
) -> list[tuple[str, str, str]]:
    scale = _scale(name, found, used)
    if scale is None:
        text = f"is not there: without it {pattern_of(name)}, {stored}, is unusable, as its bytes are no numbers yet"
        return [("missing", scale_of(name), text)]
    info = found[scale]
    rows: list[tuple[str, str, str]] = []
    if info.shape != shape:
        blocks = {"F8_E4M3": "128 x 128 numbers"}.get(stored, "32 numbers of a row")
        text = f"has shape {info.shape}, not {shape}: one scale for {blocks}; another block size is another format"
        rows.append(("shape", scale, text))
    if info.dtype == "U8":
        text = "is U8: E8M0 exponents as bytes; whoever reads them as numbers sees weights explode"
        rows.append(("note", scale, text))
    elif info.dtype == "F32":
        rows.append(("note", scale, "is F32: multipliers as DeepSeek-V3 stores them; V4's are F8_E8M0, powers of two"))
    elif info.dtype != "F8_E8M0":
        rows.append(("dtype", scale, f"is {info.dtype}, not F8_E8M0: no scale of a release is stored so"))
    if not scale.endswith(".scale"):
        text = (
            "is the published `scale` in transformers' spelling: the same factor, to multiply by in spite of its name"
        )
        rows.append(("note", scale, text))
    return rows


def _judge_plain(name: str, want: Want, info: TensorInfo) -> list[tuple[str, str, str]]:
    if info.shape != want.shape:
        return [_misshapen(name, want.shape, info)]
    if want.role == "int64":
        if info.dtype == "I32":
            return [
                ("note", name, "is I32, as official code holds it after loading; the release has I64: the same ids")
            ]
        if info.dtype != "I64":
            return [("dtype", name, f"is {info.dtype}: a table of expert ids, which has to be I64 or I32")]
    elif info.dtype not in PLAIN:
        return [("dtype", name, f"is {info.dtype}: the release holds it as {want.role}, and never quantised")]
    elif want.role == "fp32" and info.dtype in ("BF16", "F16"):
        return [("note", name, f"is {info.dtype}, the release's is F32: it was rounded by the tool that wrote it")]
    return []


def _misshapen(name: str, want: tuple[int, ...], info: TensorInfo) -> tuple[str, str, str]:
    shape, why = info.shape, "the configuration is another model's, or the tensor is cut"
    if len(shape) == 2 and shape == want[::-1]:
        why = "transposed by the tool that wrote it"
    elif name.endswith(".ape") and len(shape) == 2:
        kinds = {4: "CSA", 128: "HCA"}
        why = f"the layer is {kinds.get(shape[0], f'of ratio {shape[0]}')} in the file: compress_ratios differs"
    elif name.startswith(("embed.", "head.")) and shape[1:] == want[1:]:
        why = "the vocabulary is another one, or padded: vocab_size differs"
    elif ".ffn.gate." in name and shape[1:] == want[1:]:
        why = "the file has another number of experts: a pruned copy, or n_routed_experts differs"
    elif not shape or 0 in shape:
        why = "an empty place holder, as sharded training writes it for what another process holds"
    return ("shape", name, f"has shape {shape}, not {want}: {why}")


# --- all together ----------------------------------------------------------------------------------------------------


def _explain_missing(
    config: AnyConfig,
    missing: list[str],
    unexpected: set[str],
    want: Mapping[str, Want],
    found: Mapping[str, TensorInfo],
) -> list[Finding]:
    """What is missing, explained from the largest part to the smallest."""
    findings: list[Finding] = []
    left = dict.fromkeys(missing)

    def take(names: list[str], says: str) -> None:
        findings.append(Finding("missing", says, tuple(names)))
        for name in names:
            left.pop(name, None)

    mtp = [name for name in left if name.startswith("mtp.")]
    if mtp and not any(name.startswith("mtp.") and name in found for name in want):
        if any(part in name for name in unexpected for part in _DRAFTER):
            take(mtp, "the MTP block is not there, but a DSpark drafter's tensors are: the config.json is that of the "
                 "preview; take the one that came with these weights")  # fmt: skip
        else:
            take(mtp, "the MTP block is not there: it was left out by the tool that wrote this (the trunk is read by "
                 "load(folder, mtp=False))")  # fmt: skip
    layers: dict[int, list[str]] = {}
    for name in left:
        if match := _LAYER.match(name):
            layers.setdefault(int(match[1]), []).append(name)
    whole = {
        layer: names for layer, names in layers.items()
        if not any(name.startswith(f"layers.{layer}.") for name in found)
    }  # fmt: skip
    if whole:
        names = [name for group in whole.values() for name in group]
        take(names, f"nothing of {_layers(whole)} is there ({len(names):,} tensors): shards are missing, or "
             "num_hidden_layers is another model's")  # fmt: skip
    stacked = sorted(name for name in unexpected if _STACKED.search(name))
    experts = [name for name in left if ".ffn.experts." in name]
    if stacked and experts:
        take(experts, f"the experts are stacked, {stacked[0]} among them, as transformers holds them in memory: save "
             "it with save_pretrained, or write one tensor for each expert")  # fmt: skip
        unexpected.difference_update(stacked)
    if "head.weight" in left and "embed.weight" in found:
        take(["head.weight"], "head.weight is not there: saved as if it were tied to the embedding, which V4's is not")
    tables = [name for name in left if name.endswith(("gate.tid2eid", "gate.bias"))]
    others = {name.rpartition(".")[0] for name in unexpected if name.endswith(("gate.tid2eid", "gate.bias"))}
    if swapped := [name for name in tables if name.rpartition(".")[0] in others]:
        take(swapped, f"{swapped[0]} is not there, but the other kind of gate is: num_hash_layers differs")
    far = [name for name in left if ".attn.compressor." in name or ".attn.indexer." in name]
    if far and isinstance(config, ModelConfig):
        layers_ = {int(m[1]): [] for name in far if (m := _LAYER.match(name))}
        take(far, f"compressors or indexers of {_layers(layers_)} are not there: compress_ratios is another model's, "
             "or the tool that wrote this left them out")  # fmt: skip
    scales = [("missing", name, "is not there") for name in left]
    return findings + grouped(scales)


def _explain_unexpected(
    config: AnyConfig, unexpected: set[str], want: Mapping[str, Want], found: Mapping[str, TensorInfo]
) -> list[Finding]:
    rows: list[tuple[str, str, str]] = []
    depth = config.num_hidden_layers
    for name in sorted(unexpected):
        match = _LAYER.match(name)
        stem, _, leaf = name.rpartition(".")
        weight = f"{stem}.weight"
        if match and int(match[1]) >= depth:
            text = f"lies beyond the last of {depth} layers: num_hidden_layers is another model's"
        elif leaf in ("scale", *_SCALES) and weight in want:
            if weight not in found:
                text = "scales a weight that is not there"
            else:
                text = "was left beside a weight that is in numbers already: applied once more, it would spoil it"
        elif name.startswith("mtp."):
            text = "belongs to no MTP block that the configuration has"
            if any(part in name for part in _DRAFTER) or not name.startswith("mtp.0."):
                text = "belongs to a DSpark drafter, which the configuration has no dspark_* keys for"
        elif ".attn.compressor." in name or ".attn.indexer." in name:
            text = "is of a compressor or indexer that this layer has not: compress_ratios differs"
        elif name.endswith(("gate.tid2eid", "gate.bias")):
            text = "is of the other kind of gate: num_hash_layers differs"
        elif ".experts." in name:
            text = "is of an expert that the configuration does not have: n_routed_experts differs"
        elif ".self_attn." in name or ".mlp." in name:
            text = "is named as transformers names it in memory: save it with save_pretrained"
        elif "lora_" in name:
            text = "is an adapter's: merge it into the weights first"
        else:
            text = "is nothing that the configuration asks for"
        rows.append(("unexpected", name, text))
    return grouped(rows)


def _layers(found: Iterable[int]) -> str:
    """layer 3, or layers 0-2, 5."""
    numbers = sorted(found)
    parts: list[list[int]] = []
    for number in numbers:
        if parts and parts[-1][-1] == number - 1:
            parts[-1][1:] = [number]
        else:
            parts.append([number])
    return ("layer " if len(numbers) == 1 else "layers ") + ", ".join("-".join(map(str, part)) for part in parts)
