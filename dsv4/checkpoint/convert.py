"""Folder -> folder, tensor by tensor: layouts, and the formats that matrices are in. No model is ever in memory.

Whatever the file says is kept where it can be: codes that keep their format are copied; FP4 goes to FP8 without a
change or not at all; what is rounded is rounded as training would (ops.pack_matrix). What was written is read again and
its numbers compared with those of the source, by their sha256.
"""

import hashlib
import logging
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from dsv4 import controls, files
from dsv4.checkpoint.folder import resolve_checkpoint
from dsv4.checkpoint.load import Parts, match, open_checkpoint
from dsv4.checkpoint.names import Layout, file_names, scale_name
from dsv4.checkpoint.save import CODE_DTYPES, RELEASED_FP32, check_sayable, config_of
from dsv4.checkpoint.shards import CONFIG, GENERATION
from dsv4.checkpoint.source import Source
from dsv4.checkpoint.stored import DTYPES
from dsv4.checkpoint.writing import Entry, as_json, shards_of, write_folder
from dsv4.config import AnyConfig
from dsv4.errors import UserError
from dsv4.model.packed import released_code
from dsv4.ops.weights import BLOCKS, PackedMatrix, pack_matrix, unpack_matrix

log = logging.getLogger("dsv4")

Target = Literal["published", "transformers", "training"]
TARGETS: tuple[Target, ...] = ("published", "transformers", "training")
FORMATS = ("released", "fp8", "fp4", "bfloat16", "float16", "float32")
ROWS = 128  # that are converted at a time: a row of FP8 blocks
# What lies beside the weights and is copied: the tokenizer's files, and how text is generated.
_BESIDE = re.compile(
    r"(tokenizer(_config)?|special_tokens_map|added_tokens|generation_config)\.json|chat_template\.jinja"
)


@dataclass(frozen=True)
class Converted:
    """What became of a tensor: its format in the source and now, and the sha256 of its numbers before and after.

    digests are of the numbers in BF16 where it holds all of them exactly ("bf16:..."), else in FP32, or of the whole
    numbers they are; little-endian, row by row.
    """

    name: str
    before: str
    after: str
    digest_before: str
    digest_after: str

    @property
    def same(self) -> bool:
        return self.digest_before == self.digest_after


def convert(
    source: str | Path,
    target: str | Path,
    layout: Target = "published",
    weights: str = "released",
    *,
    max_shard_bytes: int = 5 * 10**9,
    shown: Callable[[str, int, int], object] = lambda what, done, total: None,
    each: Callable[[Converted], object] = lambda row: None,
) -> list[Converted]:
    """Convert a checkpoint folder (or the latest of a run) to another folder; returns what became of each tensor, once
    all is written.

    layout: "published", "transformers" (without the MTP block, which it does not have) or "training": the published
    names in FP32, what a run of ours keeps beside its optimiser's state, which no other folder has. weights: "released"
    leaves every tensor in its format; "fp8" and "fp4" have the matrices in codes that the released files have so, "fp4"
    the routed experts alone (all others are FP8); a dtype has all in numbers, FP32 where a model of that dtype holds
    FP32. shown: called with what is being done, bytes done, and bytes in all; each: with every tensor's row when it is
    known.

    UserError, before anything is written, for folders that cannot be loaded, and for FP4 that FP8 does not hold
    exactly.
    """
    source, target = resolve_checkpoint(source), Path(target)
    if layout not in TARGETS:
        raise UserError(f"layout {layout!r} is unknown: use one of {', '.join(TARGETS)}")
    if layout == "training":
        if weights not in ("released", "float32"):
            raise UserError(f"a training folder holds float32 numbers, not {weights}: leave out weights")
        weights = "float32"
    if weights not in FORMATS:
        raise UserError(f"weights {weights!r} are unknown: use one of {', '.join(FORMATS)}")
    if target.resolve() == source.resolve():
        raise UserError(f"{target} is the source itself: give another folder")
    named: Layout = "transformers" if layout == "transformers" else "published"
    config, sources, given, stop_ids = open_checkpoint(source)
    if named == "transformers":
        check_sayable(config)
    with torch.device("meta"):
        model = controls.build(config, getattr(torch, weights, torch.bfloat16))
    parts = match(model, sources, given, source)
    if named == "transformers":
        parts = {name: part for name, part in parts.items() if not name.startswith("mtp.")}
    plans = list(_plans(config, parts, {n: t for n, t in model.state_dict().items()}, named, weights))
    for plan in plans:
        plan.check()
    entries = [entry for plan in plans for entry in plan.entries()]
    total, done = sum(entry.nbytes for entry in entries), 0

    def wrote(count: int) -> None:
        nonlocal done
        done += count
        shown("write", done, total)

    small = {}
    for file in sorted(source.iterdir()):
        if _BESIDE.fullmatch(file.name):
            small[file.name] = files.read_text(file, "the file", "mend or remove it")
    codes = {plan.code for plan in plans if ".experts." in plan.name and plan.code}
    coded = any(plan.code for plan in plans)
    dtype = getattr(torch, weights, torch.bfloat16 if coded else _widest(plans))
    small[CONFIG] = as_json(config_of(config, named, dtype, codes if coded else None))
    if stop_ids != config.stop_ids and GENERATION not in small:
        small[GENERATION] = as_json({"eos_token_id": list(stop_ids) or None})
    write_folder(target, list(shards_of(entries, max_shard_bytes)), small, wrote)
    return _compared(target, plans, shown, each)


# --- one tensor ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """A tensor of the target: its name there, where it comes from, and its format: a code, or "" and a dtype."""

    name: str
    source: Source
    code: str
    dtype: torch.dtype

    def check(self) -> None:
        """UserError where it cannot be done without changing a number that must not change."""
        if (self.source.code, self.code) == ("fp4", "fp8"):
            _check_widening(self.source)
        if self.code == "fp4" and self.source.shape[1] % 2:
            raise UserError(
                f"tensor {self.name} has {self.source.shape[1]} columns, and FP4 needs an even number: use fp8"
            )

    def entries(self) -> list[Entry]:
        shape = self.source.shape
        if not self.code:
            return [Entry(self.name, self.dtype, shape, self._numbers)]
        high, wide = BLOCKS[self.code]
        packed = (shape[0], shape[1] // 2) if self.code == "fp4" else shape
        scaled = (-(-shape[0] // high), -(-shape[1] // wide))
        kept: list[Tensor] = []  # the scales, which come out with the codes

        def codes() -> Iterator[Tensor]:
            kept.clear()
            for codes, scales in self._coded():
                kept.append(scales)
                yield codes.view(CODE_DTYPES[self.code])

        def scales() -> list[Tensor]:
            found = [scales.view(torch.float8_e8m0fnu).contiguous() for scales in kept]
            kept.clear()
            return found

        return [
            Entry(self.name, CODE_DTYPES[self.code], packed, codes),
            Entry(scale_name(self.name), torch.float8_e8m0fnu, scaled, scales),
        ]

    def _numbers(self) -> Iterator[Tensor]:
        """The numbers in order; those of more than BF16 are rounded to it here, if it is BF16 that is written."""
        for _, numbers in self.source.pieces():
            yield numbers.to(self.dtype).contiguous()

    def _coded(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Codes and byte scales of whole rows of blocks, in order."""
        high = BLOCKS[self.code][0]
        if self.source.code == self.code:
            scales = self.source.byte_scales()
            for first, codes in self.source.code_pieces():
                yield codes, scales[first // high : -(-(first + len(codes)) // high)]
        elif self.source.code == "fp4":
            scales = self.source.byte_scales()
            for first, codes in self.source.code_pieces(ROWS):
                wide = widened(codes, scales[first : first + len(codes)])
                assert wide is not None, f"{self.name} was checked"
                yield wide.codes, wide.scales
        else:
            for _, numbers in self.source.pieces(ROWS):
                packed = pack_matrix(numbers.float(), self.code)
                yield packed.codes, packed.scales


def _plans(
    config: AnyConfig, parts: dict[str, Parts], like: dict[str, Tensor], layout: Layout, weights: str
) -> Iterator[Plan]:
    for name, sources in parts.items():
        names = [file_name for file_name, _ in file_names(name, tuple(like[name].shape), layout)]
        for file_name, (source, _) in zip(names, sources, strict=True):
            stored = torch.bfloat16 if source.code else DTYPES[source.weight.dtype]
            if weights == "released":
                yield Plan(file_name, source, source.code, stored)
            elif weights in ("fp8", "fp4"):
                code = released_code(name, weights)
                yield Plan(file_name, source, code, stored if code else _beside_codes(name, source, stored))
            else:
                number = like[name].is_floating_point()
                yield Plan(file_name, source, "", like[name].dtype if number else stored)


def _beside_codes(name: str, source: Source, stored: torch.dtype) -> torch.dtype:
    """What is not in codes beside matrices that are: BF16 where the released files have it, unless that changes a
    number of what a model holds in FP32."""
    if not stored.is_floating_point or stored == torch.bfloat16 or RELEASED_FP32.search(name):
        return stored
    if len(source.shape) == 2 and re.search(r"(^|\.)(embed|head|weights_proj)\.weight$", name):
        return torch.bfloat16
    exact = all(torch.equal(x.bfloat16().to(x.dtype), x) for _, x in source.pieces())
    return torch.bfloat16 if exact else torch.float32


def _widest(plans: Iterable[Plan]) -> torch.dtype:
    """The dtype of the large matrices: that of the embedding."""
    return next(plan.dtype for plan in plans if plan.name.endswith(("embed.weight", "embed_tokens.weight")))


# --- FP4 as FP8 ------------------------------------------------------------------------------------------------------


def widened(codes: Tensor, scales: Tensor) -> PackedMatrix | None:
    """FP4 codes [n, columns / 2] with their scales [n, columns / 32], uint8, as the same numbers in FP8; None if there
    are numbers that e4m3 does not hold.

    For every block of 128 x 128 the scale is the largest of its own, less 6 powers of two: its numbers are at most 384
    then, and exact as long as the scales of those that are not zero span 14 powers of two. Source: released code.
    """
    rows, columns = len(codes), codes.shape[1] * 2
    high, wide = BLOCKS["fp8"]
    per = wide // BLOCKS["fp4"][1]
    padded = torch.nn.functional.pad(scales, (0, -scales.shape[1] % per, 0, -rows % high))
    blocks = padded.view(padded.shape[0] // high, high, -1, per).amax(dim=(1, 3))
    target = (blocks.int() - 6).clamp_min(0).to(torch.uint8)
    numbers = unpack_matrix("fp4", codes, scales)
    over = target.repeat_interleave(high, dim=0)[:rows].repeat_interleave(wide, dim=1)[:, :columns]
    scaled = numbers / over.view(torch.float8_e8m0fnu).float()
    wider = scaled.to(torch.float8_e4m3fn)
    if not torch.equal(wider.float(), scaled):
        return None
    return PackedMatrix("fp8", wider, target)


def _check_widening(source: Source) -> None:
    """UserError if FP8 does not hold a matrix. With scales that span at most 14 powers of two it does, whatever the
    codes."""
    scales = source.byte_scales()
    if int(scales.max()) - int(scales.min()) <= 14:
        return
    for first, codes in source.code_pieces(ROWS):
        if widened(codes, scales[first : first + len(codes)]) is None:
            raise UserError(
                f"tensor {source.name} cannot be FP8 without changing numbers: within rows {first} to "
                f"{first + len(codes) - 1} the scales of a block of 128 x 128 span more than FP8 holds; keep it in "
                "FP4, or convert to bfloat16"
            )


# --- what came of it -------------------------------------------------------------------------------------------------


def _compared(
    target: Path, plans: list[Plan], shown: Callable[[str, int, int], object], each: Callable[[Converted], object]
) -> list[Converted]:
    _, written, _, _ = open_checkpoint(target)
    total, done = sum(plan.source.weight.nbytes for plan in plans), 0
    rows = []
    for plan in plans:
        before, after = plan.source, written[plan.name]
        rows.append(Converted(plan.name, before.format, after.format, digest_of(before), digest_of(after)))
        each(rows[-1])
        done += before.weight.nbytes
        shown("compare", done, total)
    return rows


def digest_of(source: Source) -> str:
    """The sha256 of a tensor's numbers, as `Converted` has it."""
    if source.weight.dtype.startswith("I") and not source.code:
        return "int64:" + _digest(source, torch.int64)
    return next(
        f"{name}:{found}"
        for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32), ("fp64", torch.float64))
        if (found := _digest(source, dtype))
    )


def _digest(source: Source, dtype: torch.dtype) -> str:
    """The sha256 of the numbers in a dtype; "" if it does not hold one of them."""
    digest = hashlib.sha256()
    for _, numbers in source.pieces():
        held = numbers.to(dtype)
        if not ((held.to(numbers.dtype) == numbers) | (numbers != numbers)).all():  # a NaN stays one
            return ""
        digest.update(held.contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
