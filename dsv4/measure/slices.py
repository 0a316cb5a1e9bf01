"""Models that fit: one layer of each kind at its real width, in weights that share storage where they are many.

Together with the number of its layers a slice says what the whole model executes and remembers.
"""

from dataclasses import dataclass, replace

import torch
from torch import nn

from dsv4 import controls
from dsv4.config import AnyConfig, ModelConfig, V32Config
from dsv4.measure.executed import Place
from dsv4.model import LanguageModel


@dataclass(frozen=True)
class Slice:
    """One layer of a kind with both ends of its model, standing for `times` layers."""

    place: Place
    times: int
    config: AnyConfig


def slices(config: AnyConfig) -> list[Slice]:
    """A model as one layer of each kind, at its real width."""
    if isinstance(config, ModelConfig):
        one, trunk = dict(num_hidden_layers=1, num_hash_layers=0), config.without_drafts()
        ratio_of = {config.layer_kind(i): r for i, r in enumerate(config.trunk_ratios)}
        return [
            Slice(kind.name, times, trunk.with_(**one, compress_ratios=(ratio_of[kind],)))
            for kind, times in config.trunk_kinds.items()
        ]
    if isinstance(config, V32Config):
        dense = min(config.first_k_dense_replace, config.num_hidden_layers)
        one = replace(config, num_hidden_layers=1, first_k_dense_replace=0)
        both = [
            Slice("dense", dense, replace(one, first_k_dense_replace=1)),
            Slice("moe", config.num_hidden_layers - dense, one),
        ]
        return [s for s in both if s.times]
    return [Slice("gqa", config.num_hidden_layers, replace(config, num_hidden_layers=1))]


def build(config: AnyConfig, dtype: torch.dtype) -> LanguageModel:
    """A model whose experts share one set of weights, and its tokens one embedding row: the same products, less memory.

    The values are of no matter here, only that they are finite.
    """
    with torch.device("meta"):
        model = controls.build(config, dtype)
    pattern = 0.02 * torch.randn(1 << 20, generator=torch.Generator().manual_seed(0))
    for path, module in model.named_modules():
        for name, p in list(module.named_parameters(recurse=False)):
            full = f"{path}.{name}"
            shared = ".experts." in full or path == "embed"
            # logits are fp32: a narrower head would be copied for every token
            dtype_held = torch.float32 if path == "head" else p.dtype
            data = torch.empty((1, *p.shape[1:]) if shared else p.shape, dtype=dtype_held)
            if full.endswith("norm.weight"):
                data.fill_(1.0)
            else:
                for part in data.view(-1).split(len(pattern)):
                    part.copy_(pattern[: len(part)])
            module._parameters[name] = nn.Parameter(data.expand(p.shape), requires_grad=False)
        for name, b in list(module.named_buffers(recurse=False)):
            module._buffers[name] = torch.zeros(b.shape, dtype=b.dtype)
    return model
