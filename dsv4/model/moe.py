"""DeepSeekMoE: routed experts and one shared expert, all with the clamped SwiGLU.

The first layers route by a fixed table of token ids, the others by learned scores plus a balance bias that only
selects. Router arithmetic is fp32. Legend: T tokens, M model width, X experts, K experts per token, I inner width.
"""

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from dsv4 import ops
from dsv4.config import ModelConfig, V32Config
from dsv4.errors import UserError
from dsv4.model.layers import Weight


@dataclass(frozen=True)
class Routing:
    """What a gate decided: scores fp32 [T, X] (all experts), chosen int64 [T, K], weights fp32 [T, K]."""

    scores: Tensor
    chosen: Tensor
    weights: Tensor


class Gate(nn.Module):
    """weight [X, M] fp32; then a selection bias [X] (buffer, fp32), or the table tid2eid [V, K] of a hash layer."""

    bias: Tensor | None
    tid2eid: Tensor | None
    anticipated: Tensor | None = None  # int64 [T, K]: experts chosen beforehand (train/anticipate.py)

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.topk, self.scale = config.num_experts_per_tok, config.routed_scaling_factor
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size, dtype=torch.float32))
        # buffers: published with the weights, but not counted as parameters and not trained by gradient
        bias = torch.empty(config.n_routed_experts, dtype=torch.float32)
        table = torch.empty(config.vocab_size, config.num_experts_per_tok, dtype=torch.int64)
        hashed = config.uses_hash_routing(layer)
        self.register_buffer("bias", None if hashed else bias)
        self.register_buffer("tid2eid", table if hashed else None)
        self.config, self.layer = config, layer

    @torch.no_grad()
    def fill_buffers(self) -> None:
        """The bias begins at 0, the table as `hash_table` says; on the meta device nothing happens."""
        if self.bias is not None:
            self.bias.zero_()
        if self.tid2eid is not None and not self.tid2eid.is_meta:
            self.tid2eid.copy_(hash_table(self.config, self.layer))

    def forward(self, x: Tensor, ids: Tensor) -> Routing:
        """x [T, M], ids int64 [T] -> Routing (paper 2.1): score = sqrt(softplus(logit)), weights sum to `scale`."""
        given = self.anticipated if self.tid2eid is None else self.tid2eid[ids]
        return Routing(*ops.gate(x, self.weight, self.bias, given, self.topk, self.scale))


def hash_table(config: ModelConfig, layer: int) -> Tensor:
    """A valid balanced table int64 [V, K]: K distinct experts per token id, every expert in equally many rows (+-1).

    A shuffled deck of all experts is dealt round and round in hands of K until hands and deck end together; then comes
    a new deck. The table depends on the layer only, not on the global seed, and lies on the CPU.
    """
    vocab, experts, k = config.vocab_size, config.n_routed_experts, config.num_experts_per_tok
    seed = torch.Generator().manual_seed(0x5EED + layer)
    hands = experts // math.gcd(experts, k)
    place = torch.arange(hands * k, device="cpu").view(hands, k) % experts
    deck = torch.rand(-(-vocab // hands), experts, generator=seed, device="cpu").argsort(dim=1)
    return deck[:, place].reshape(-1, k)[:vocab].clone()


def check_hash_table(table: Tensor, config: ModelConfig, name: str) -> None:
    """UserError unless every token id has K distinct experts that exist (an all-zero table sends all to expert 0)."""
    ordered = table.sort(dim=1).values
    if ordered.min() < 0 or ordered.max() >= config.n_routed_experts:
        raise UserError(f"{name} names expert {int(ordered.max())} of {config.n_routed_experts}: the table is damaged")
    if config.num_experts_per_tok > 1 and (ordered[:, 1:] == ordered[:, :-1]).any():
        raise UserError(
            f"{name} routes a token id to the same expert twice (an uninitialised table?): every id needs "
            f"{config.num_experts_per_tok} distinct experts"
        )


class Dispatch(Protocol):
    """`ops.experts` where every process has some of the experts: it sends tokens to those who have theirs."""

    def __call__(self, x: Tensor, chosen: Tensor, weights: Tensor, w13: Tensor, w2: Tensor, limit: float) -> Tensor: ...


class Experts(nn.Module):
    """All routed experts, stacked: w13 [X, 2, I, M] (gate over up) and w2 [X, M, I]; `limit` is the SwiGLU's clamp."""

    def __init__(self, config: ModelConfig | V32Config, dtype: torch.dtype, limit: float):
        super().__init__()
        self.limit = limit
        self.dispatch: Dispatch | None = None  # for processes that have some of the experts each
        x, i, m = config.n_routed_experts, config.moe_intermediate_size, config.hidden_size
        self.w13 = nn.Parameter(torch.empty(x, 2, i, m, dtype=dtype))
        self.w2 = nn.Parameter(torch.empty(x, m, i, dtype=dtype))

    def forward(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """x [T, M], chosen int64 [T, K], weights fp32 [T, K] -> the weighted sum of the chosen experts, fp32 [T, M]."""
        if self.dispatch is not None:
            return self.dispatch(x, chosen, weights, self.w13, self.w2, self.limit)
        return ops.experts(x, chosen, weights, self.w13, self.w2, self.limit)


class SharedExpert(nn.Module):
    """w2 (silu(min(w1 x, limit)) * clamp(w3 x)): the same clamp as the routed experts."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype):
        super().__init__()
        self.limit = config.swiglu_limit
        self.w1 = Weight(config.moe_intermediate_size, config.hidden_size, dtype=dtype)
        self.w2 = Weight(config.hidden_size, config.moe_intermediate_size, dtype=dtype)
        self.w3 = Weight(config.moe_intermediate_size, config.hidden_size, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return ops.mlp(x, self.w1.weight, self.w3.weight, self.w2.weight, self.limit)


class MoE(nn.Module):
    def __init__(self, config: ModelConfig, layer: int, dtype: torch.dtype):
        super().__init__()
        self.gate = Gate(config, layer)
        self.experts = Experts(config, dtype, config.swiglu_limit)
        self.shared_experts = SharedExpert(config, dtype)

    def forward(self, x: Tensor, ids: Tensor) -> tuple[Tensor, Routing]:
        """x [T, M], ids int64 [T] (hash layers route by them) -> [T, M] and what the gate decided."""
        routing = self.gate(x, ids)
        routed = self.experts(x, routing.chosen, routing.weights)
        return (routed + self.shared_experts(x).float()).to(x.dtype), routing
