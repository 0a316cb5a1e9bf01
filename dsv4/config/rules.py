"""What configurations stand on: the rotary scaling, what holds in every V4, and the rules for numbers and token ids."""

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any

from dsv4.errors import UserError, shown

# What is the same in every V4. Written with each configuration, because other readers ask for it; held to when read.
CONSTANTS: dict[str, Any] = {
    "architectures": ["DeepseekV4ForCausalLM"], "model_type": "deepseek_v4", "num_key_value_heads": 1,
    "hidden_act": "silu", "scoring_func": "sqrtsoftplus", "topk_method": "noaux_tc", "norm_topk_prob": True,
    "attention_bias": False, "attention_dropout": 0.0, "tie_word_embeddings": False,
}  # fmt: skip


@dataclass(frozen=True)
class RopeScaling:
    """YaRN, as the compressed layers use it: frequencies only, no amplitude factor (see docs/numerics.md)."""

    type: str = "yarn"  # "yarn", or "default": no scaling, and the other numbers mean nothing
    factor: float = 16.0
    original_max_position_embeddings: int = 65536
    beta_fast: float = 32.0
    beta_slow: float = 1.0

    def __post_init__(self) -> None:
        if self.type == "default":  # two ways to say "no scaling" are one value
            for f in fields(self):
                object.__setattr__(self, f.name, self.type if f.name == "type" else f.default)


def as_ids(given: int | Iterable[int] | None) -> tuple[int, ...]:
    """A token id, a list of them or None -> each once, in order."""
    return () if given is None else (given,) if isinstance(given, int) else tuple(sorted(set(given)))


def check_ids(name: str, value: Any, vocab_size: int) -> None:
    """UserError unless value is None, a token id, or a list of them, all within the vocabulary."""
    for one in value if isinstance(value, list | tuple) else [] if value is None else [value]:
        if type(one) is not int:
            raise UserError(f"{name}={shown(value)} must be a token id or a list of them")
        if not 0 <= one < vocab_size:
            raise UserError(f"{name}={shown(one)} must be at least 0 and below vocab_size={vocab_size}")


# The largest values that are taken for a size. They are far above any model's, and so low that the shape of no tensor
# overflows, no list is built that fills the memory, and no loop runs for minutes. A width not named here: 2**18.
_LARGEST: dict[str, float] = {
    "vocab_size": 2**24, "hidden_size": 2**18, "num_hidden_layers": 2**10, "num_attention_heads": 2**12,
    "head_dim": 2**14, "qk_rope_head_dim": 2**14, "q_lora_rank": 2**18, "o_groups": 2**12, "o_lora_rank": 2**18,
    "attention_rank": 2**14, "compress_rate_csa": 2**12, "compress_rate_hca": 2**12, "sliding_window": 2**20,
    "index_n_heads": 2**12, "index_head_dim": 2**14, "index_topk": 2**24,
    "moe_intermediate_size": 2**18, "n_routed_experts": 2**14, "n_shared_experts": 2**4, "num_experts_per_tok": 2**10,
    "num_hash_layers": 2**10, "hc_mult": 2**6, "hc_sinkhorn_iters": 1000, "num_nextn_predict_layers": 2**4,
    "dspark_stages": 2**4, "dspark_block_size": 2**10, "dspark_markov_rank": 2**18, "max_position_embeddings": 2**31,
    "original_max_position_embeddings": 2**31,
    "routed_scaling_factor": 1e6, "swiglu_limit": 1e6, "hc_eps": 1.0, "rms_norm_eps": 1.0, "initializer_range": 100.0,
    "rope_theta": 1e12, "compress_rope_theta": 1e12, "factor": 1e6, "beta_fast": 1e6, "beta_slow": 1e6,
}  # fmt: skip
# A base of 1 turns every pair alike, and a factor below 1 would shorten the context: neither is a rotary table. A group
# of one token compresses nothing; the largest one (above) closes at the end of a page of memory, which must stay small.
_SMALLEST = {
    "compress_rate_csa": 2, "compress_rate_hca": 2, "rope_theta": 1.001, "compress_rope_theta": 1.001, "factor": 1.0,
    "beta_fast": 1e-3, "beta_slow": 1e-3,
}  # fmt: skip


def check_numbers(owner: Any, zero_ok: set[str], prefix: str = "") -> None:
    """UserError unless every int or float field of a dataclass holds such a number, positive (or 0 where that is
    allowed) and not beyond all reason."""
    for f in fields(owner):
        if f.type not in (int, float):
            continue
        name, value = prefix + f.name, getattr(owner, f.name)
        if f.type is int and type(value) is not int:
            raise UserError(f"{name}={shown(value)} must be a whole number")
        if type(value) not in (int, float) or value != value or value in (float("inf"), float("-inf")):
            raise UserError(f"{name}={shown(value)} must be a finite number")
        if value < 0 or (value == 0 and f.name not in zero_ok):
            raise UserError(f"{name}={shown(value)} must be positive")
        low, high = _SMALLEST.get(f.name, 0), _LARGEST.get(f.name, 2**18)
        if not low <= value <= high:
            raise UserError(f"{name}={shown(value)} is out of range: it must lie in {low:,} .. {high:,}")


def check_scaling(scaling: RopeScaling) -> None:
    """UserError unless it is YaRN with sensible numbers, or no scaling."""
    if scaling.type not in ("yarn", "default"):
        raise UserError(f"rope_scaling type {shown(scaling.type)} is unknown: use 'yarn' or 'default'")
    check_numbers(scaling, set(), "rope_scaling.")
    if scaling.beta_slow > scaling.beta_fast:
        raise UserError(
            f"rope_scaling.beta_slow={scaling.beta_slow} must be at most rope_scaling.beta_fast={scaling.beta_fast}"
        )
