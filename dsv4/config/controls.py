"""What V4 is compared with: DeepSeek-V3.2 (MLA + DSA) and a dense transformer with grouped queries (Llama 3.1).

The same published field names as in their config.json. Defaults are V3.2 671B and Llama-3.1-405B.
"""

from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

from dsv4.config.published import read_json
from dsv4.config.v4 import ModelConfig, RopeScaling
from dsv4.errors import UserError, nearest


@dataclass(frozen=True)
class V32Config:
    """DeepSeek-V3.2: every layer is MLA with an indexer over all tokens; the first layers have a dense MLP."""

    vocab_size: int = 129280
    hidden_size: int = 7168
    num_hidden_layers: int = 61
    num_attention_heads: int = 128
    q_lora_rank: int = 1536
    kv_lora_rank: int = 512
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    index_n_heads: int = 64
    index_head_dim: int = 128
    index_topk: int = 2048
    intermediate_size: int = 18432
    moe_intermediate_size: int = 2048
    first_k_dense_replace: int = 3
    n_routed_experts: int = 256
    n_shared_experts: int = 1
    num_experts_per_tok: int = 8
    n_group: int = 8
    topk_group: int = 4
    routed_scaling_factor: float = 2.5
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling = field(
        default_factory=lambda: RopeScaling(factor=40.0, original_max_position_embeddings=4096)
    )
    max_position_embeddings: int = 163840

    def __post_init__(self) -> None:
        _check_sizes(self)
        if self.num_experts_per_tok > self.n_routed_experts:
            raise UserError(
                f"num_experts_per_tok={self.num_experts_per_tok} must be at most "
                f"n_routed_experts={self.n_routed_experts}"
            )
        if self.n_routed_experts % self.n_group or self.topk_group > self.n_group:
            raise UserError(
                f"n_group={self.n_group} must divide n_routed_experts={self.n_routed_experts} and be at least "
                f"topk_group={self.topk_group}"
            )
        if self.topk_group * (self.n_routed_experts // self.n_group) < self.num_experts_per_tok:
            raise UserError(
                f"topk_group={self.topk_group} groups of {self.n_routed_experts // self.n_group} experts are too few "
                f"for num_experts_per_tok={self.num_experts_per_tok}"
            )
        if self.qk_rope_head_dim % 2 or self.qk_rope_head_dim > self.index_head_dim:
            raise UserError(
                f"qk_rope_head_dim={self.qk_rope_head_dim} must be even and at most "
                f"index_head_dim={self.index_head_dim}"
            )
        if self.rope_scaling.type not in ("yarn", "default"):
            raise UserError(f"rope_scaling type {self.rope_scaling.type!r} is unknown: use 'yarn' or 'default'")


@dataclass(frozen=True)
class LlamaConfig:
    """A dense transformer with grouped-query attention, untied, without biases."""

    vocab_size: int = 128256
    hidden_size: int = 16384
    num_hidden_layers: int = 126
    num_attention_heads: int = 128
    num_key_value_heads: int = 8
    head_dim: int = 128
    intermediate_size: int = 53248
    rms_norm_eps: float = 1e-5
    rope_theta: float = 500000.0
    max_position_embeddings: int = 131072

    def __post_init__(self) -> None:
        _check_sizes(self)
        if self.num_attention_heads % self.num_key_value_heads:
            raise UserError(
                f"num_attention_heads={self.num_attention_heads} must be a multiple of "
                f"num_key_value_heads={self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise UserError(f"head_dim={self.head_dim} must be even: channels rotate in pairs")


AnyConfig = ModelConfig | V32Config | LlamaConfig

_OF_TYPE = {"deepseek_v32": V32Config, "llama": LlamaConfig}


def read_any(source: dict[str, Any] | str | Path) -> AnyConfig:
    """A configuration (dict, JSON file, or folder holding config.json) of V4, V3.2 or Llama, told by its model_type.

    UserError for any other model_type. A control is read for its sizes: its other keys are left unread, and its
    rotary scaling is read as V3.2's own.
    """
    data = source if isinstance(source, dict) else read_json(source)
    kind = data.get("model_type", "deepseek_v4")
    if kind == "deepseek_v4":
        return ModelConfig.from_json(data)
    if kind not in _OF_TYPE:
        known = ["deepseek_v4", *_OF_TYPE]
        raise UserError(
            f"model_type {kind!r} is not V4-like: give a config.json of {', '.join(known)}{nearest(str(kind), known)}"
        )
    return _read_control(data, _OF_TYPE[kind])


def _read_control(data: dict[str, Any], of: type) -> AnyConfig:
    data = dict(data)
    if of is LlamaConfig:
        data.setdefault("num_key_value_heads", data.get("num_attention_heads"))
        if not data.get("head_dim") and data.get("num_attention_heads"):
            data["head_dim"] = data.get("hidden_size", 0) // data["num_attention_heads"]
        if data.get("tie_word_embeddings"):
            raise UserError("tie_word_embeddings must be false: only untied Llama models are counted")
    sizes = [f.name for f in fields(of) if f.type is int and f.default is not MISSING]
    missing = [name for name in sizes if data.get(name) is None]
    if missing:
        raise UserError(f"the configuration of a {data['model_type']} lacks {missing[0]!r}: give its whole config.json")
    known = [f.name for f in fields(of) if f.type in (int, float)]
    return of(**{name: data[name] for name in known if data.get(name) is not None})


def _check_sizes(config: V32Config | LlamaConfig) -> None:
    for f in fields(config):
        value, zero_ok = getattr(config, f.name), f.name == "first_k_dense_replace"
        if f.type is int and (type(value) is not int or value < (0 if zero_ok else 1)):
            raise UserError(f"{f.name}={value!r} must be a positive whole number")


CONTROLS: dict[str, AnyConfig] = {"v3.2": V32Config(), "llama-405b": LlamaConfig()}
