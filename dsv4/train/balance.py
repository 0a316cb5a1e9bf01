"""The router's balance bias: not trained by gradient, but nudged after every step towards an even load (paper 2.1)."""

from typing import Any

import torch
from torch import Tensor

from dsv4.model import LanguageModel


def learned_gates(model: LanguageModel) -> dict[int, Any]:
    """Gates with a balance bias by layer number (hash and dense layers have none); the MTP block is number n_layers."""
    blocks: list[Any] = [*model.layers, *(mtp.block for mtp in model.mtp)]
    gates = {i: getattr(block.ffn, "gate", None) for i, block in enumerate(blocks)}
    return {i: gate for i, gate in gates.items() if gate is not None and gate.bias is not None}


@torch.no_grad()
def update_balance_bias(model: LanguageModel, loads: dict[int, Tensor], speed: float) -> None:
    """After a step: bias += speed for experts with less than the mean load, -= speed for those with more."""
    gates = learned_gates(model)
    for layer, load in loads.items():
        gates[layer].bias += speed * torch.sign(load.mean() - load)
