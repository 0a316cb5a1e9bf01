"""Whole blocks for a few tokens in one call: what the library takes, laid out as in src/block.cpp and src/step.h.

Filled by model/step.py, which knows a block's modules and stores. It holds addresses only: what they are of must
outlive the call.
"""

import ctypes
from array import array
from collections.abc import Sequence
from ctypes import c_double, c_long, c_void_p

import numpy as np
from torch import Tensor

from dsv4.ops.cpu.experts import Weight, laid_experts, laid_mlp
from dsv4.ops.cpu.library import _LIB, DTYPES, Kernel, address
from dsv4.ops.formats import Packed, RowFormat
from dsv4.ops.weights import PackedMatrix

_blocks = Kernel("blocks", "plppplpppppp")
_plan = Kernel("plan", "lppppllllppplpp")

KINDS = 2  # of layers with compressed entries, at most


class Matrix(ctypes.Structure):
    _fields_ = [("data", c_void_p), ("scales", c_void_p), ("dtype", c_long), ("rows", c_long), ("columns", c_long)]


class Hyper(ctypes.Structure):
    _fields_ = [(name, c_void_p) for name in ("fn", "base", "scale", "gain")]


class Store(ctypes.Structure):
    _fields_ = [("data", c_void_p)] + [
        (name, c_long) for name in ("kind", "width", "block", "tail", "rotated", "row_bytes", "per_page")
    ]


class Compressor(ctypes.Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("wkv", "wgate", "ape", "gain")),
        *((name, c_long) for name in ("channels", "ratio", "overlap", "width")),
        ("ring", c_void_p), ("entries", Store),
    ]  # fmt: skip


class Indexer(ctypes.Structure):
    _fields_ = [
        ("wq_b", Matrix), ("weights_proj", Matrix), ("heads", c_long), ("width", c_long), ("topk", c_long),
        ("scale", c_double), ("compressor", Compressor),
    ]  # fmt: skip


class Attention(ctypes.Structure):
    _fields_ = [
        *((name, Matrix) for name in ("wq_a", "wq_b", "wkv", "wo_a", "wo_b")),
        *((name, c_void_p) for name in ("q_gain", "kv_gain", "sink")),
        ("heads", c_long), ("groups", c_long), ("scale", c_double), ("window", Store), ("compressor", Compressor),
        ("indexer", Indexer),
    ]  # fmt: skip


class Mlp(ctypes.Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("gate", "gate_scales", "up", "up_scales", "down", "down_scales")),
        *((name, c_long) for name in ("dtype", "inner", "step", "offset", "down_step")),
    ]


class Experts(ctypes.Structure):
    _fields_ = [
        ("gate", Matrix), ("bias", c_void_p), ("table", c_void_p), ("k", c_long), ("scale", c_double),
        ("limit", c_double), ("routed", Mlp), ("shared", Mlp),
    ]  # fmt: skip


class Layer(ctypes.Structure):
    """A block with its stores; float32 or bfloat16 (`is_bf16`) streams."""

    _fields_ = [
        *((name, c_long) for name in ("is_bf16", "streams", "width", "iters", "pairs", "kind")),
        ("hc_eps", c_double), ("eps", c_double), ("attn", Hyper), ("ffn", Hyper), ("attention", Attention),
        ("experts", Experts),
    ]  # fmt: skip


class Collapse(ctypes.Structure):
    """Streams into one, at the end."""

    _fields_ = [*((name, c_void_p) for name in ("fn", "base", "scale")), ("hc_eps", c_double), ("eps", c_double)]


class RingRows(ctypes.Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("read", "order", "write", "kept")),
        *((name, c_long) for name in ("before", "joined", "stored")),
        ("places", c_void_p),
    ]


class Groups(ctypes.Structure):
    _fields_ = [
        ("closing", c_long), ("longest", c_long),
        *((name, c_void_p) for name in ("first_row", "entry", "start", "stop", "has_previous")),
        ("rows", RingRows),
    ]  # fmt: skip


class Step(ctypes.Structure):
    _fields_ = [
        ("n", c_long), ("pages", c_long),
        *((name, c_void_p) for name in ("positions", "start", "stop", "table", "window_turn", "turn")),
        ("ring", RingRows), ("groups", Groups * KINDS),
    ]  # fmt: skip


_LIB.dsv4_sizes.restype = c_long
for _i, _laid in enumerate((Layer, Step, Collapse)):
    assert ctypes.sizeof(_laid) == _LIB.dsv4_sizes(_i), f"{_laid.__name__} is laid out in another way in the library"


def matrix(weight: Weight) -> Matrix:
    if isinstance(weight, PackedMatrix):
        return Matrix(address(weight.codes), address(weight.scales), DTYPES[weight.code], *weight.shape)
    return Matrix(address(weight), None, DTYPES[weight.dtype], *weight.shape)


def store(data: Tensor, format: RowFormat, per_page: int = 1) -> Store:
    """Rows of a memory, kept as `format` says."""
    if isinstance(format, Packed):
        described = DTYPES[format.code], format.width, format.block, format.tail, format.rotated
    else:
        described = DTYPES[format.dtype], data.shape[1], 0, 0, False
    return Store(address(data), *described, data.stride(0) * data.element_size(), per_page)


def routed(w13: Weight, w2: Weight) -> Mlp:
    places, kind, steps = laid_experts(w13, w2)
    return Mlp(*places, kind, w2.shape[-1], *steps)


def shared(w1: Weight, w3: Weight, w2: Weight) -> Mlp:
    places, kind, steps = laid_mlp(w1, w3, w2)
    return Mlp(*places, kind, w1.shape[0], *steps)


where = ctypes.addressof  # of a structure, which must outlive the use of it


def run(layers: ctypes.Array, step: Step, *places: int | None) -> None:
    """Streams and memory of a step, through all layers (`in_order`); `places` as in src/block.cpp."""
    _blocks(ctypes.addressof(layers), len(layers), ctypes.addressof(step), *places)


def in_order(layers: Sequence[Layer]) -> ctypes.Array:
    """Where the layers lie, as `run` takes it; they must outlive it."""
    return (c_void_p * len(layers))(*map(ctypes.addressof, layers))


def plan(
    slots: list[int],
    starts: list[int],
    lengths: list[int],
    tables: list[int],
    window: int,
    max_rewind: int,
    page_tokens: int,
    kinds: tuple[tuple[int, int], ...],
    turned: list[tuple[Tensor, int]],
) -> tuple[Step, np.ndarray]:
    """Where the tokens of a step read and write, and what holds it: it has addresses in that, and in tables.

    For each sequence its slot, its length so far, new tokens, and the address of its pages' numbers. kinds: ratio and
    overlap of each. turned: for each sequence rotations complex64 [.., 2, pairs] of positions in a row, as many as its
    tokens and the groups that they close need, and the first of these positions.
    """
    count, tokens, pairs = len(slots), sum(lengths), turned[0][0].shape[2]
    held = sum((a + n) // page_tokens + 1 for a, n in zip(starts, lengths, strict=True)) if count > 1 else 0
    size = count * (8 + 3 * window + 4 * sum(ratio for ratio, _ in kinds)) + held
    size += tokens * (9 + 12 * len(kinds) + 2 * pairs * (1 + len(kinds)))
    given = [*slots, *starts, *lengths, *(first for _, first in turned), *tables, *(t.data_ptr() for t, _ in turned)]
    room, step, flat = np.empty(size, dtype=np.int64), Step(), [number for kind in kinds for number in kind]
    numbers = array("q", given + flat)
    at = numbers.buffer_info()[0]
    slot, start, length, first, table, turn, kind = (at + 8 * count * i for i in range(7))
    _plan(
        count, slot, start, length, table, window, max_rewind, page_tokens, len(kinds), kind, turn, first, pairs,
        room.ctypes.data, ctypes.addressof(step),
    )  # fmt: skip
    return step, room
