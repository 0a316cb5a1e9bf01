"""What V4 is compared with: DeepSeek-V3.2 (MLA + DSA) and a dense transformer with grouped queries (Llama 3.1).

The same published field names as in their config.json. Defaults are V3.2 671B and Llama-3.1-405B.
"""

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from dsv4.config.published import hold, read_json, read_scaling
from dsv4.config.rules import RopeScaling, check_numbers, check_scaling
from dsv4.config.v4 import ModelConfig
from dsv4.errors import UserError, nearest, shown


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
        check_numbers(self, {"first_k_dense_replace"})
        check_scaling(self.rope_scaling)
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
    rope_type: str = "default"  # another one is counted alike, and not computed

    def __post_init__(self) -> None:
        check_numbers(self, set())
        if self.num_attention_heads % self.num_key_value_heads:
            raise UserError(
                f"num_attention_heads={self.num_attention_heads} must be a multiple of "
                f"num_key_value_heads={self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise UserError(f"head_dim={self.head_dim} must be even: channels rotate in pairs")


AnyConfig = ModelConfig | V32Config | LlamaConfig

_OF_TYPE = {"deepseek_v32": V32Config, "llama": LlamaConfig}

# What a file of a control says that lacks the key: transformers' defaults, where they are no size and no choice of one
# model's. Every other number must be there.
_ABSENT = {"rms_norm_eps": 1e-6, "rope_theta": 10000.0}
_HELD: dict[type, dict[str, Any]] = {
    V32Config: {
        "hidden_act": "silu", "scoring_func": "sigmoid", "topk_method": "noaux_tc", "norm_topk_prob": True,
        "moe_layer_freq": 1, "attention_bias": False, "tie_word_embeddings": False,
    },
    LlamaConfig: {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False},
}  # fmt: skip


def read_any(source: dict[str, Any] | str | Path) -> AnyConfig:
    """A configuration (dict, JSON file, or folder holding config.json) of V4, V3.2 or Llama, told by its model_type.

    UserError for any other model_type. Of a control the keys that its class has are read, and the others left unread.
    """
    data = source if isinstance(source, dict) else read_json(source)
    kind = data.get("model_type", "deepseek_v4")
    if kind == "deepseek_v4":
        return ModelConfig.from_json(data)
    if not isinstance(kind, str) or kind not in _OF_TYPE:
        known = ["deepseek_v4", *_OF_TYPE]
        raise UserError(
            f"model_type {shown(kind)} is not V4-like: give a config.json of {', '.join(known)}"
            f"{nearest(str(kind)[:80], known)}"
        )
    return _read_control(dict(data), _OF_TYPE[kind])


def _read_control(data: dict[str, Any], of: type) -> AnyConfig:
    if of is LlamaConfig and data.pop("tie_word_embeddings", False) is not False:
        raise UserError("tie_word_embeddings must be false: only untied Llama models are counted")
    hold(data, _HELD[of], data["model_type"])
    rope = data.pop("rope_parameters", None) or data.pop("rope_scaling", None)  # the new name and the old
    if isinstance(rope, dict) and "rope_theta" in rope:
        data["rope_theta"] = rope["rope_theta"]
    if of is LlamaConfig:
        if rope is not None and not isinstance(rope, dict):
            raise UserError(f"rope_scaling={shown(rope)} must be an object, or null")
        data["rope_type"] = str((rope or {}).get("rope_type", (rope or {}).get("type", "default")))[:80]
        heads, width = data.get("num_attention_heads"), data.get("hidden_size")
        if data.get("num_key_value_heads") is None:
            data["num_key_value_heads"] = heads
        if data.get("head_dim") is None and type(heads) is int and type(width) is int and heads > 0:
            data["head_dim"] = width // heads
    else:
        data["rope_scaling"] = _scaling_of_v32(rope)
    names = [f.name for f in fields(of)]
    missing = [name for name in names if data.get(name, _ABSENT.get(name)) is None]
    if missing:
        raise UserError(f"the configuration of a {data['model_type']} lacks {missing[0]!r}: give its whole config.json")
    return of(**{name: data.get(name, _ABSENT.get(name)) for name in names})


def _scaling_of_v32(given: Any) -> RopeScaling:
    """V3.2's YaRN: its two amplitude factors are equal, so they leave the rotation alone and sharpen the softmax."""
    scaling = read_scaling(given, "rope_scaling", amplitude=("mscale", "mscale_all_dim"))
    if isinstance(given, dict) and scaling.type == "yarn":
        for key in ("mscale", "mscale_all_dim"):
            if given.get(key) != 1:
                raise UserError(f"rope_scaling.{key}={shown(given.get(key))}: V3.2's YaRN has 1 there; add or mend it")
    return scaling


CONTROLS: dict[str, AnyConfig] = {"v3.2": V32Config(), "llama-405b": LlamaConfig()}
