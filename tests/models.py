"""Models that the tests stand on: every layer kind, few numbers, and weights large enough for a mistake to show.

A freshly initialised model is nearly linear: sinks, positional biases and dynamic mixing are zero or almost, so many a
mistake would not change a logit. `randomise` gives every parameter and buffer a size at which it matters.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from dsv4.config import ModelConfig, RopeScaling
from dsv4.model import Transformer
from dsv4.model.indexer import Indexer

# Ratios of the trunk by the name of what it exercises.
KINDS: dict[str, tuple[int, ...]] = {"window": (0,), "csa": (4,), "hca": (128,), "whole": (0, 4, 128)}


def small_config(ratios: tuple[int, ...] = KINDS["whole"], *, mtp: int = 0, **changes) -> ModelConfig:
    """About 100 thousand parameters, one hash layer, 32 index heads (fewer would make exactly tied index scores).

    YaRN acts on most pairs because the original context is short.
    """
    fields: dict = dict(
        vocab_size=97, hidden_size=48, num_hidden_layers=len(ratios), compress_ratios=(*ratios, *[0] * mtp),
        num_attention_heads=4, head_dim=32, qk_rope_head_dim=8, q_lora_rank=24, o_groups=2, o_lora_rank=20,
        sliding_window=128, index_n_heads=32, index_head_dim=16, index_topk=8, moe_intermediate_size=24,
        n_routed_experts=6, num_experts_per_tok=2, num_hash_layers=1, num_nextn_predict_layers=mtp,
        rope_scaling=RopeScaling(factor=16.0, original_max_position_embeddings=256), max_position_embeddings=8192,
    )  # fmt: skip
    return ModelConfig(**{**fields, **changes})


def small_model(ratios: tuple[int, ...] = KINDS["whole"], *, mtp: int = 0, seed: int = 0, **changes) -> Transformer:
    return randomise(Transformer(small_config(ratios, mtp=mtp, **changes)), seed)


@torch.no_grad()
def randomise(model: Transformer, seed: int = 0, std: float = 0.1) -> Transformer:
    """Random weights from `seed` alone; norm gains around 1, matrices `std`, what else there is of order 1/2."""
    generator = torch.Generator().manual_seed(seed)

    def normal(like: Tensor, scale: float) -> Tensor:
        return scale * torch.randn(like.shape, generator=generator, device="cpu").to(like.dtype)

    for name, p in model.named_parameters():
        leaf = name.rsplit(".", 1)[-1]
        if name.endswith("norm.weight"):
            p.copy_(1 + normal(p, 0.1))
        elif leaf.endswith(("_base", "_scale")) or leaf in ("attn_sink", "ape"):
            p.copy_(normal(p, 0.5))
        else:
            p.copy_(normal(p, std))
    for name, b in model.named_buffers():
        if name.endswith("gate.bias"):
            b.copy_(normal(b, 0.2))
    return model


def tokens(model: Transformer, count: int, seed: int = 0) -> Tensor:
    """Random ids int64 [count]."""
    generator = torch.Generator().manual_seed(1000 + seed)
    return torch.randint(0, model.config.vocab_size, (count,), generator=generator)


def stream(model: Transformer, ids: Tensor, chunk: int, memory=None) -> Tensor:
    """Logits [T, vocab] of ids [T] fed through a memory in chunks."""
    memory = model.new_cache() if memory is None else memory
    with torch.no_grad():
        return torch.cat([model(part, segments=[(len(part), memory[0])]) for part in ids.split(chunk)])


@contextmanager
def choices(model: Transformer) -> Iterator[dict[str, list[tuple[int, ...]]]]:
    """Records, for every CSA layer and token of the calls inside, the entries it reads (numbered in its document)."""
    seen: dict[str, list[tuple[int, ...]]] = {}

    def hook(name: str):
        def record(module, args, output) -> None:
            run = args[2]
            for piece, chosen in zip(run.pieces, output, strict=True):
                visible = piece.groups[4].visible
                for token, (lo, hi) in enumerate(zip(visible.start.tolist(), visible.stop.tolist(), strict=True)):
                    rows = range(lo, hi) if chosen is None else [row for row in chosen[token].tolist() if row >= 0]
                    seen.setdefault(name, []).append(tuple(row - lo for row in rows))

        return record

    handles = [m.register_forward_hook(hook(n)) for n, m in model.named_modules() if isinstance(m, Indexer)]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


LARGEST: dict[str, float] = {}  # test function -> the largest difference it measured, for `pytest --differences`


def differ(a: Tensor, b: Tensor) -> float:
    """The largest absolute difference; infinite for different shapes or anything that is not a number."""
    if a.shape != b.shape:
        return float("inf")
    largest = (a.detach().double() - b.detach().double()).abs().max().item()
    largest = largest if largest == largest else float("inf")
    test = os.environ.get("PYTEST_CURRENT_TEST", "").partition("[")[0].partition(" ")[0]
    LARGEST[test] = max(largest, LARGEST.get(test, 0.0))
    return largest
