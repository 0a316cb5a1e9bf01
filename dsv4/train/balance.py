"""The router's balance bias: not trained by gradient, but nudged after every step towards an even load (paper 2.1)."""

import torch
from torch import Tensor

from dsv4.model import Transformer
from dsv4.model.moe import Gate


def learned_gates(model: Transformer) -> dict[int, Gate]:
    """Gates with a balance bias by layer number (hash layers have none); the MTP block is number n_layers."""
    blocks = [*model.layers, *(mtp.block for mtp in model.mtp)]
    return {i: block.ffn.gate for i, block in enumerate(blocks) if block.ffn.gate.bias is not None}  # type: ignore[union-attr, misc]


@torch.no_grad()
def update_balance_bias(model: Transformer, loads: dict[int, Tensor], speed: float) -> None:
    """After a step: bias += speed for experts with less than the mean load, -= speed for those with more."""
    gates = learned_gates(model)
    for layer, load in loads.items():
        bias = gates[layer].bias
        assert bias is not None
        bias += speed * torch.sign(load.mean() - load)
