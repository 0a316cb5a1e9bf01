"""A whole block for a few tokens in one call: what the library takes, laid out as in src/block.cpp.

Filled by model/step.py, which knows a block's modules and stores. It holds addresses only: what they are of must
outlive the call.
"""

import ctypes
from ctypes import c_double, c_long, c_void_p

from torch import Tensor

from dsv4.ops.cpu.experts import Weight, laid_experts, laid_mlp
from dsv4.ops.cpu.library import _LIB, DTYPES, Kernel, address
from dsv4.ops.formats import Packed, RowFormat
from dsv4.ops.weights import PackedMatrix

_block = Kernel("block", "pppppppppp")


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
        *((name, c_long) for name in ("is_bf16", "streams", "width", "iters")), ("hc_eps", c_double), ("eps", c_double),
        ("attn", Hyper), ("ffn", Hyper), ("attention", Attention), ("experts", Experts),
    ]  # fmt: skip


class RingRows(ctypes.Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("read", "order", "write", "kept")),
        *((name, c_long) for name in ("before", "joined", "stored")),
    ]


class Groups(ctypes.Structure):
    _fields_ = [
        ("closing", c_long), ("longest", c_long),
        *((name, c_void_p) for name in ("first_row", "entry", "start", "stop", "has_previous", "turn")),
        ("rows", RingRows),
    ]  # fmt: skip


class Step(ctypes.Structure):
    _fields_ = [
        *((name, c_long) for name in ("n", "pairs", "pages")),
        *((name, c_void_p) for name in ("positions", "start", "stop", "table")), ("ring", RingRows),
    ]  # fmt: skip


_LIB.dsv4_sizes.restype = c_long
for _i, _laid in enumerate((Layer, Step, Groups)):
    assert ctypes.sizeof(_laid) == _LIB.dsv4_sizes(_i), f"{_laid.__name__} is laid out in another way in block.cpp"


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


def run(layer: Layer, step: Step, groups: Groups | None, *places: int) -> None:
    """Streams and memory of a step; `places` as in src/block.cpp."""
    _block(
        ctypes.addressof(layer), ctypes.addressof(step), None if groups is None else ctypes.addressof(groups), *places
    )
