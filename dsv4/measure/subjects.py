"""Random subjects: models of every layer kind in which a mistake shows, token ids, and memories as after a long text.

A freshly initialised model is nearly linear: sinks, positional biases and dynamic mixing are zero or almost, so many a
mistake would not change a logit. `randomise` gives every parameter and buffer a size at which it matters.
"""

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from dsv4.cache import SequenceMemory
from dsv4.cache.layer import Entries, Ring
from dsv4.config import ModelConfig, RopeScaling
from dsv4.controls.memory import ControlMemory, Rows
from dsv4.errors import UserError
from dsv4.model import Transformer
from dsv4.ops.formats import Packed

Module = TypeVar("Module", bound=nn.Module)

# Ratios of the trunk by the name of what it exercises.
KINDS: dict[str, tuple[int, ...]] = {"window": (0,), "csa": (4,), "hca": (128,), "whole": (0, 4, 128)}
_FILL_ROWS = 8192  # rows that `fill` draws at a time


def small_config(
    ratios: tuple[int, ...] = KINDS["whole"], *, mtp: int = 0, dspark: int = 0, **changes: Any
) -> ModelConfig:
    """About 100 thousand parameters, one hash layer, 32 index heads (fewer would make exactly tied index scores).

    YaRN acts on most pairs because the original context is short. mtp: blocks; dspark: stages of a drafter, which reads
    the last three layers.
    """
    drafter = dict(
        dspark_stages=dspark, dspark_block_size=5, dspark_noise_token_id=96, dspark_markov_rank=16,
        dspark_target_layer_ids=tuple(range(len(ratios)))[-3:],
    )  # fmt: skip
    fields: dict[str, Any] = dict(
        vocab_size=97, hidden_size=48, num_hidden_layers=len(ratios), compress_ratios=(*ratios, *[0] * (mtp + dspark)),
        num_attention_heads=4, head_dim=32, qk_rope_head_dim=8, q_lora_rank=24, o_groups=2, o_lora_rank=20,
        sliding_window=128, index_n_heads=32, index_head_dim=16, index_topk=8, moe_intermediate_size=24,
        n_routed_experts=6, num_experts_per_tok=2, num_hash_layers=1, num_nextn_predict_layers=mtp,
        rope_scaling=RopeScaling(factor=16.0, original_max_position_embeddings=256), max_position_embeddings=8192,
        **(drafter if dspark else {}),
    )  # fmt: skip
    return ModelConfig(**{**fields, **changes})


def small_model(
    ratios: tuple[int, ...] = KINDS["whole"], *, mtp: int = 0, dspark: int = 0, seed: int = 0, **changes: Any
) -> Transformer:
    """A lively model of `small_config`."""
    return randomise(Transformer(small_config(ratios, mtp=mtp, dspark=dspark, **changes)), seed)


@torch.no_grad()
def randomise(model: Module, seed: int = 0, std: float | None = 0.1) -> Module:
    """Random weights from `seed` alone, drawn on the CPU; norm gains around 1, what is no matrix of order 1/2.

    std: of matrices; None: such that each keeps the size of what it multiplies.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(like: Tensor, scale: float) -> Tensor:
        return scale * torch.randn(like.shape, generator=generator, device="cpu").to(like.dtype)

    for name, p in model.named_parameters():
        leaf = name.rpartition(".")[2]
        if name.endswith("norm.weight"):
            p.copy_(1 + normal(p, 0.1))
        elif leaf.endswith(("_base", "_scale")) or leaf in ("attn_sink", "ape"):
            p.copy_(normal(p, 0.5))
        else:
            p.copy_(normal(p, p.shape[-1] ** -0.5 if std is None else std))
    for name, b in model.named_buffers():
        if name.endswith("gate.bias"):
            b.copy_(normal(b, 0.2))
    return model


# What devices are compared on: the tiny preset, and a model whose CSA layers choose 8 of up to 75 entries by gathering
# rows. With these seeds no choice of an expert or an entry hangs on a rounding (the closest runner-up is more than 1e-4
# of the scores' spread behind), so all choices in fp32 must be the same.
MODELS: dict[str, Callable[[], Transformer]] = {
    "tiny": lambda: randomise(Transformer(ModelConfig.preset("tiny")), 0, None),
    "csa": lambda: randomise(Transformer(small_config((0, 4, 4, 128, 4), mtp=1)), 10, None),
}


def tokens(model: Any, count: int, seed: int = 0) -> Tensor:
    """Random ids int64 [count], on the CPU, for any model whose `config` has a vocab_size."""
    generator = torch.Generator().manual_seed(1000 + seed)
    return torch.randint(0, model.config.vocab_size, (count,), generator=generator)


@torch.no_grad()
def stream(model: Any, ids: Tensor, chunk: int, memory: Any = None) -> Tensor:
    """Logits [T, vocab] of ids [T] fed through a memory (the first of a `new_cache`) in chunks."""
    memory = model.new_cache() if memory is None else memory
    return torch.cat([model(part, segments=[(len(part), memory[0])]) for part in ids.split(chunk)])


def fill(memory: SequenceMemory | ControlMemory, length: int, generator: torch.Generator | None = None) -> None:
    """Make a memory one of `length` tokens that were never seen: random rows in every store, drawn on the CPU.

    The next token costs what it costs after a real text of that length. UserError if the model has no such position.
    """
    if not 0 <= length <= memory.config.max_position_embeddings:
        raise UserError(f"cannot fill {length} tokens: max_position_embeddings={memory.config.max_position_embeddings}")
    if isinstance(memory, SequenceMemory):
        memory.pool.reserve([(memory, length - memory.length)])
    for store, places in _stores(memory, length):
        width = store.format.width if isinstance(store.format, Packed) else store.format.shape
        shape = width if isinstance(width, tuple) else (width,)
        for at in places.split(_FILL_ROWS) if len(places) else ():
            rows = torch.randn(len(at), *shape, generator=generator, device="cpu")
            rows = rows.to(store.data.device)
            if isinstance(store, Rows):
                store.write(rows, int(at[0]))
            else:
                store.data[at] = store.format.pack(rows)
    memory.length = length
    if isinstance(memory, SequenceMemory):
        memory.newest = memory.drafted = length


def _stores(memory: SequenceMemory | ControlMemory, length: int) -> Iterator[tuple[Entries | Ring | Rows, Tensor]]:
    """Every store, and which of its rows hold what is remembered of `length` tokens: int64 [n] on the host."""
    if isinstance(memory, ControlMemory):
        for _, store in memory.stores():
            yield store, torch.arange(length)
        return
    for _, layer, store in memory.pool.stores():
        if isinstance(store, Ring):
            yield store, memory.slot * store.rows + torch.arange(store.rows)
        else:
            row, size = torch.arange(length // layer.kind.ratio), store.per_page
            yield store, torch.from_numpy(memory.table)[row // size] * size + row % size
