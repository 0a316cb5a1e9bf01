"""Known mistakes of MTP, of what lies between sequences, and of number formats; see conform_faults.py."""

from collections.abc import Callable
from copy import copy
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from conform_faults import FAULTS, Wraps, fault
from pytest import MonkeyPatch
from torch import Tensor

from dsv4 import ops
from dsv4.conform.adapters import ours
from dsv4.conform.adapters.ours import Ours
from dsv4.model import hyper, segments
from dsv4.model.rope import pair_frequencies, turns
from dsv4.ops import formats
from dsv4.ops.formats import Packed
from dsv4.ops.weights import PackedMatrix

# --- MTP -------------------------------------------------------------------------------------------------------------

DRAFT = ("MTP", "model")


def drafting(name: str, change: Callable[[Any, tuple], tuple]) -> None:
    """change(model, (streams, embedded, ids, run, views)) -> what the MTP block gets."""

    def apply(port: Ours, patch: MonkeyPatch) -> None:
        right = port.model.mtp[0].forward
        patch.setattr(port.model.mtp[0], "forward", lambda *a: right(*change(port.model, a)))

    FAULTS[name] = apply, DRAFT


def collapsed(model: Any, a: tuple) -> tuple:
    h = hyper.collapse(a[0], hyper.parameters_of(model, "hc_head"), model.config)
    return h[:, None].expand_as(a[0]).contiguous(), *a[1:]


def turned(table: Callable[[Any, Any], Tensor]) -> Callable[[Any, tuple], tuple]:
    def change(model: Any, a: tuple) -> tuple:
        run = copy(a[3])
        run.turn = {**run.turn, "window": table(model.config, run)}
        return *a[:3], run, a[4]

    return change


drafting("MTP reads the collapsed stream", collapsed)
drafting("MTP with YaRN", turned(lambda c, run: turns(
    pair_frequencies(c.qk_rope_head_dim, c.rope_theta, c.rope_scaling), run.positions)))  # fmt: skip
drafting("MTP with the compressed layers' table", turned(lambda c, run: run.turn["compressed"]))


@fault("MTP embeds its own token", *DRAFT)
def _(port: Ours, patch: MonkeyPatch) -> None:
    right = port.model.predict_next
    patch.setattr(port.model, "predict_next", lambda trunk, ids: right(trunk, torch.cat([ids[:1], ids[:-1]])))


@fault("MTP routes by token id", *DRAFT)
def _(port: Ours, patch: MonkeyPatch) -> None:
    port.model.mtp[0].block.ffn.gate.tid2eid = port.model.layers[0].ffn.gate.tid2eid


@fault("wrong drafter", *DRAFT)
def _(port: Ours, patch: MonkeyPatch) -> None:
    """The block of another training: right shapes, other numbers."""
    from dsv4.measure.subjects import randomise

    randomise(port.model.mtp[0], 99)


# --- one sequence after another --------------------------------------------------------------------------------------


@fault("state of the sequence before", "sequences", "model")
def _(port: Ours, patch: MonkeyPatch) -> Wraps:
    bank: dict[int, Tensor] = {}  # by width: the rows of the group that closed last, whoever's they were

    def compress(op: Callable) -> Callable:
        def call(values, scores, first, has, r, overlap, gain, eps, turn, dtype):
            width = values.shape[1]
            old = bank.get(width)
            if overlap and len(first):
                last = slice(int(first[-1]), int(first[-1]) + r)
                bank[width] = torch.stack([values[last], scores[last]])
                short = len(values) == r  # a prompt that closes a group fills the bank itself
                if old is not None and not has[0] and short:
                    values, scores = torch.cat([old[0], values]), torch.cat([old[1], scores])
                    first, has = first + r, torch.ones_like(has)
            return op(values, scores, first, has, r, overlap, gain, eps, turn, dtype)

        return call

    bank.clear()
    return {"compress": compress}


@fault("state not rewound", "rewind", "model")
def _(port: Ours, patch: MonkeyPatch) -> None:
    from dsv4.cache import SequenceMemory

    right = SequenceMemory.rewind

    def rewind(self: SequenceMemory, count: int) -> None:
        right(self, count)
        group = self.length // 4
        for layer in self.layers:
            for store in (layer.attention, layer.index):
                if store is not None and layer.kind.overlap:
                    rows = store.rows.slot(self.slot)
                    new, old = (torch.arange(4 * g, 4 * g + 4) % len(rows) for g in (group, group - 1))
                    rows[old] = rows[new]

    patch.setattr(SequenceMemory, "rewind", rewind)


@fault("padding is pooled", "padding", "model")
def _(port: Ours, patch: MonkeyPatch) -> None:
    """Left padding that the window does not see, but the compressors do."""

    def batch(ids: list[Tensor]) -> list[Tensor]:
        longest, out = max(len(part) for part in ids), []
        for part in ids:
            pads = longest - len(part)
            right = segments.part_of

            def blind(*a: Any, pads: int = pads, right: Callable = right, **more: Any) -> Any:
                made = right(*a, **more)
                start = made.window.start.clamp_min(pads)
                return replace(made, window=ops.Spans(start, torch.maximum(made.window.stop, start)))

            patch.setattr(segments, "part_of", blind)
            with torch.no_grad():
                out.append(port.model(torch.cat([torch.zeros(pads, dtype=torch.int64), part]))[pads:])
            patch.setattr(segments, "part_of", right)
        return out

    patch.setattr(port, "batch", batch)


# --- number formats --------------------------------------------------------------------------------------------------

FORMATS = ("number formats",)


def formatted(name: str, apply: Callable[[MonkeyPatch], None]) -> None:
    FAULTS[name] = (lambda port, patch: apply(patch) and None), FORMATS


def truncating(x: Tensor) -> Tensor:
    nearest = x.to(torch.float8_e4m3fn)
    codes = nearest.view(torch.uint8)
    return codes - (nearest.float().abs() > x.abs()).to(torch.uint8)


def truncating_fp4(x: Tensor) -> Tensor:
    a = x.abs()
    code = sum((a >= v).to(torch.uint8) for v in formats._E2M1[1:]) + torch.signbit(x).to(torch.uint8) * 8
    return code[:, 0::2] | (code[:, 1::2] << 4)


def lower_scale(largest: Tensor, code: str) -> Tensor:
    right = RIGHT_SCALE(largest, code)
    exact = largest / formats._LARGEST[code]
    return torch.where((right > exact) & torch.tensor(code == "fp8"), right / 2, right)


RIGHT_SCALE = formats.power_of_two_scale
RIGHT_HADAMARD = formats.hadamard
formatted("rows not rounded", lambda patch: patch.setattr(ours, "_ROW", SimpleNamespace(as_read=lambda x: x.float())))
formatted("rows truncated", lambda patch: patch.setattr(formats, "to_e4m3", truncating))
formatted("rows without a floor", lambda patch: patch.setitem(formats._FLOOR, "fp8", 1e-38))
formatted("row scales not powers of two", lambda patch: patch.setattr(
    ours, "_ROW", Packed(512, "fp8", 64, tail=64, fp32_scales=True)))  # fmt: skip
formatted("row scales rounded down", lambda patch: patch.setattr(formats, "power_of_two_scale", lower_scale))
formatted("rows in blocks of 128", lambda patch: patch.setattr(ours, "_ROW", Packed(512, "fp8", 128, tail=64)))
formatted("rotary channels in FP8", lambda patch: patch.setattr(ours, "_ROW", Packed(512, "fp8", 64)))
formatted("index rows not rotated", lambda patch: patch.setattr(formats, "hadamard", lambda x: x))
formatted(
    "rotated index rows not rounded",
    lambda patch: patch.setattr(
        ours, "_KEY", SimpleNamespace(as_read=lambda x: Packed(128, "fp4", 32, rotated=True).as_read(x.float()))
    ),
)
formatted("index rows in FP8", lambda patch: [
    patch.setattr(ours, "_KEY", Packed(128, "fp8", 128, rotated=True)),
    patch.setattr(ours, "Packed", lambda *a, **more: Packed(128, "fp8", 128, rotated=True)),
])  # fmt: skip
formatted("index rows truncated", lambda patch: patch.setattr(formats, "to_e2m1", truncating_fp4))


def one_sided(queries: bool) -> Callable[[MonkeyPatch], None]:
    """Only queries, or only keys, are rotated before they are rounded."""

    def apply(patch: MonkeyPatch) -> None:
        plain = Packed(128, "fp4", 32)
        method = "as_read" if queries else "as_query"
        turned = Packed(128, "fp4", 32, rotated=True)

        def make(*a: Any, **more: Any) -> Any:
            both = {"as_read": turned.as_read, "as_query": turned.as_query}
            both[method] = lambda x: plain.as_read(x.flatten(0, -2)).view(x.shape)
            return SimpleNamespace(**both)

        patch.setattr(ours, "Packed", make)

    return apply


formatted("Hadamard on queries only", one_sided(True))
formatted("Hadamard on keys only", one_sided(False))


def unpacking(name: str, numbers: Callable[[PackedMatrix], Tensor]) -> None:
    formatted(name, lambda patch: patch.setattr(PackedMatrix, "unpack", lambda self, dtype=None: numbers(self)))


def parts_of(m: PackedMatrix) -> tuple[Tensor, Tensor]:
    """Values, and the scale of each of them."""
    one = torch.full_like(m.scales, 127)
    scale = m.scales.view(torch.float8_e8m0fnu).float()
    rows, columns = m.shape
    high, wide = (128, 128) if m.code == "fp8" else (1, 32)
    spread = scale.repeat_interleave(high, 0).repeat_interleave(wide, 1)[:rows, :columns]
    return RIGHT_UNPACK(PackedMatrix(m.code, m.codes, one)), spread


RIGHT_UNPACK = PackedMatrix.unpack
unpacking("scale bytes read as numbers", lambda m: parts_of(m)[0] * (parts_of(m)[1].log2() + 127))
unpacking("scales divide", lambda m: parts_of(m)[0] / parts_of(m)[1])
unpacking("scale blocks transposed", lambda m: RIGHT_UNPACK(
    PackedMatrix("fp8", m.codes, m.scales.T.contiguous()) if m.code == "fp8" else m))  # fmt: skip
unpacking("codes read as FNUZ", lambda m: (
    m.codes.view(torch.float8_e4m3fnuz).float() * parts_of(m)[1] if m.code == "fp8" else RIGHT_UNPACK(m)))  # fmt: skip
unpacking("nibbles exchanged", lambda m: RIGHT_UNPACK(
    PackedMatrix("fp4", (m.codes >> 4) | (m.codes << 4), m.scales) if m.code == "fp4" else m))  # fmt: skip


def per_16(m: PackedMatrix) -> Tensor:
    if m.code == "fp8":
        return RIGHT_UNPACK(m)
    columns = m.shape[1]
    scale = m.scales.view(torch.float8_e8m0fnu).float()
    spread = scale[:, (torch.arange(columns) // 16) % scale.shape[1]]
    return parts_of(m)[0] * spread


unpacking("FP4 scales per 16 columns", per_16)
