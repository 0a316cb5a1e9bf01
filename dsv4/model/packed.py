"""Weights in FP8 and FP4 in place of a model's parameters: which of them the released files have so, how packed
matrices get into a model, and the choice of numbers they are multiplied in.

A model that was made on the meta device is given its matrices one by one (`put`), so that no wider copy of all its
experts ever exists.
"""

import re

import torch
from torch import Tensor, nn

from dsv4.config import ModelConfig
from dsv4.errors import UserError
from dsv4.model.language import LanguageModel
from dsv4.ops.weights import PackedMatrix, pack_matrix

NUMBERS = ("plain", "published")

# V3.2's wkv_b is not among them: it is multiplied from both sides, by head, and stays in numbers.
_LARGE = re.compile(
    r"(^|\.)(attn\.(wq_a|wq_b|wkv|wkv_a|wo_a|wo_b|wo)|attn\.indexer\.(wq_b|wk)"
    r"|ffn\.(shared_experts\.)?w[123]|[eh]_proj|main_proj)\.weight$"
)
_ROUTED = re.compile(r"(^|\.)ffn\.experts\.(w13|w2)$")
_ROWS = 1 << 13  # rows that are rounded at a time; whole blocks of scales


def released_code(name: str, experts: str = "fp4") -> str:
    """ "fp8" or "fp4": how the released files have the parameter of this name, in a model or in a block of one; "" for
    what they keep in numbers.

    experts: the code of the routed ones, "fp4" in V4; "fp8" in V4's base models and in V3.2.
    """
    if _ROUTED.search(name):
        return experts
    return "fp8" if _LARGE.search(name) else ""


def put(model: nn.Module, name: str, matrix: PackedMatrix) -> None:
    """Let a packed matrix take the place of the parameter `name`; of a stack of matrices, all one below the other."""
    path, _, leaf = name.rpartition(".")
    module, there = model.get_submodule(path), model.get_parameter(name)
    want = (there.numel() // there.shape[-1], there.shape[-1])
    assert matrix.shape == want, f"{name} is {want}, not {matrix.shape}"
    delattr(module, leaf)
    setattr(module, leaf, matrix)


@torch.no_grad()
def pack_weights(model: nn.Module, experts: str = "fp4") -> None:
    """Round the large matrices of a model, or of a block, to the released formats in place, one after the other."""
    for name, weight in list(model.named_parameters()):
        if code := released_code(name, experts):
            put(model, name, _packed(weight.flatten(0, -2), code))


def packed_of(model: nn.Module) -> dict[str, PackedMatrix]:
    """The packed matrices of a model, by the name of the parameter whose place they have."""
    return {name: module for name, module in model.named_modules() if isinstance(module, PackedMatrix)}


def choose_numbers(model: LanguageModel, numbers: str) -> None:
    """Let a model compute with the numbers of the released code ("published") or without its roundings ("plain").

    published: what goes into an FP8 or FP4 matrix is rounded to FP8 (ops.weights.round_inputs), wo_a's input is not,
    as in the released code; and memories are packed unless another format is asked for, also those of sequences that
    are given without one (Transformer.trunk). The C++ ops do not round inputs: such products run in torch. UserError
    for a model without packed matrices, or one that is not V4's.
    """
    if numbers not in NUMBERS:
        raise UserError(f"numbers={numbers!r} is unknown: use one of {', '.join(NUMBERS)}")
    matrices = packed_of(model)
    if numbers == "published":
        if not isinstance(model.config, ModelConfig) or not matrices:
            raise UserError(
                "numbers='published' rounds what goes into V4's FP8 and FP4 matrices, and this model has none: load a "
                "released checkpoint with weights='released'"
            )
        model.new_pool()  # its packed rows may not fit the configuration: that is said now
    for name, matrix in matrices.items():
        matrix.rounds_inputs = numbers == "published" and not name.endswith("attn.wo_a.weight")
    model.numbers = numbers


def _packed(weight: Tensor, code: str) -> PackedMatrix:
    parts = [pack_matrix(rows, code) for rows in weight.split(_ROWS)]
    return PackedMatrix(code, torch.cat([p.codes for p in parts]), torch.cat([p.scales for p in parts]))
