"""What V4 is compared with: DeepSeek-V3.2 (MLA + DSA) and a dense transformer with grouped queries (Llama 3.1).

The same published field names as in their config.json. Defaults are V3.2 671B and Llama-3.1-405B; presets of the names
that V4 has are as large as V4's. A kind is one of the three: "v4", "v32", "llama".
"""

from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Self

from dsv4.config.published import hold, read_json, read_scaling
from dsv4.config.rules import RopeScaling, as_ids, check_ids, check_numbers, check_scaling
from dsv4.config.v4 import ModelConfig
from dsv4.errors import UserError, nearest, shown


@dataclass(frozen=True)
class _Control:
    """What both have beside their sizes: how they start, and the ids that begin and end a text (None: not said)."""

    initializer_range: float = field(default=0.02, kw_only=True)
    bos_token_id: int | None = field(default=None, kw_only=True)
    eos_token_id: int | tuple[int, ...] | None = field(default=None, kw_only=True)

    def with_(self, **changes: Any) -> Self:
        """This configuration with fields replaced; an unknown name is a UserError that says the nearest one."""
        names = [f.name for f in fields(self)]
        for key in changes:
            if key not in names:
                raise UserError(f"unknown configuration key {key!r}{nearest(key, names)}")
        return replace(self, **changes)

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """The ids of `eos_token_id`, each once, in order."""
        return as_ids(self.eos_token_id)

    def to_json(self) -> dict[str, Any]:
        """The published spelling, ready for `json.dump`; `read_any` reads it back unchanged."""
        model_type = next(name for name, of in _OF_TYPE.items() if isinstance(self, of))
        return {"model_type": model_type, **_HELD[type(self)], **asdict(self)}

    def _check_ids(self, vocab_size: int) -> None:
        check_ids("eos_token_id", self.eos_token_id, vocab_size)
        if isinstance(self.bos_token_id, list | tuple):
            raise UserError(f"bos_token_id={shown(self.bos_token_id)} must be one token id")
        check_ids("bos_token_id", self.bos_token_id, vocab_size)
        if isinstance(self.eos_token_id, list):
            object.__setattr__(self, "eos_token_id", tuple(self.eos_token_id))


@dataclass(frozen=True)
class V32Config(_Control):
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
        check_numbers(self, {"first_k_dense_replace", "initializer_range"})
        if not isinstance(self.rope_scaling, RopeScaling):
            raise UserError(f"rope_scaling={shown(self.rope_scaling)} must be a RopeScaling")
        check_scaling(self.rope_scaling)
        self._check_ids(self.vocab_size)
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

    def to_json(self) -> dict[str, Any]:
        scaling: dict[str, Any] | None = asdict(self.rope_scaling)
        if self.rope_scaling.type == "default":
            scaling = None
        else:
            scaling |= dict.fromkeys(_AMPLITUDE, 1.0)
        return {**super().to_json(), "rope_scaling": scaling}


@dataclass(frozen=True)
class LlamaConfig(_Control):
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
        check_numbers(self, {"initializer_range"})
        self._check_ids(self.vocab_size)
        if self.num_attention_heads % self.num_key_value_heads:
            raise UserError(
                f"num_attention_heads={self.num_attention_heads} must be a multiple of "
                f"num_key_value_heads={self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise UserError(f"head_dim={self.head_dim} must be even: channels rotate in pairs")

    def to_json(self) -> dict[str, Any]:
        data = {**super().to_json(), "tie_word_embeddings": False}
        rope_type = data.pop("rope_type")
        return {**data, "rope_scaling": None if rope_type == "default" else {"rope_type": rope_type}}


AnyConfig = ModelConfig | V32Config | LlamaConfig

KINDS: dict[str, type] = {"v4": ModelConfig, "v32": V32Config, "llama": LlamaConfig}  # as `model.kind` says them

_OF_TYPE = {"deepseek_v32": V32Config, "llama": LlamaConfig}
_AMPLITUDE = ("mscale", "mscale_all_dim")

# What a file of a control says that lacks the key: transformers' defaults, where they are no size and no choice of one
# model's. Every other number must be there; the ids that begin and end a text need not be said.
_ABSENT = {"rms_norm_eps": 1e-6, "rope_theta": 10000.0, "initializer_range": 0.02}
_NEED_NOT_BE_SAID = {"bos_token_id", "eos_token_id"}
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
    missing = [n for n in names if data.get(n, _ABSENT.get(n)) is None and n not in _NEED_NOT_BE_SAID]
    if missing:
        raise UserError(f"the configuration of a {data['model_type']} lacks {missing[0]!r}: give its whole config.json")
    return of(**{name: data.get(name, _ABSENT.get(name)) for name in names})


def _scaling_of_v32(given: Any) -> RopeScaling:
    """V3.2's YaRN: its two amplitude factors are equal, so they leave the rotation alone and sharpen the softmax."""
    scaling = read_scaling(given, "rope_scaling", amplitude=_AMPLITUDE)
    if isinstance(given, dict) and scaling.type == "yarn":
        for key in _AMPLITUDE:
            if given.get(key) != 1:
                raise UserError(f"rope_scaling.{key}={shown(given.get(key))}: V3.2's YaRN has 1 there; add or mend it")
    return scaling


CONTROLS: dict[str, AnyConfig] = {"v3.2": V32Config(), "llama-405b": LlamaConfig()}

_SMALL_ROPE = RopeScaling(factor=16.0, original_max_position_embeddings=4096)

# As many parameters as V4's presets of these names, at the same width, depth and vocabulary; a query of V3.2 reads as
# far as the entries that one of V4 reads.
CONTROL_PRESETS: dict[str, dict[str, AnyConfig]] = {
    "v32": {
        "tiny": V32Config(
            vocab_size=512, hidden_size=96, num_hidden_layers=5, num_attention_heads=4, q_lora_rank=48, kv_lora_rank=48,
            qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=32, index_n_heads=4, index_head_dim=32, index_topk=128,
            intermediate_size=240, moe_intermediate_size=80, first_k_dense_replace=1, n_routed_experts=8,
            num_experts_per_tok=2, n_group=4, topk_group=2, routed_scaling_factor=1.5, rope_scaling=_SMALL_ROPE,
            max_position_embeddings=65536,
        ),
        "small": V32Config(
            vocab_size=2048, hidden_size=256, num_hidden_layers=6, num_attention_heads=8, q_lora_rank=128,
            kv_lora_rank=128, qk_nope_head_dim=32, qk_rope_head_dim=32, v_head_dim=64, index_n_heads=4,
            index_head_dim=64, index_topk=1024, intermediate_size=480, moe_intermediate_size=160,
            first_k_dense_replace=1, n_routed_experts=8, num_experts_per_tok=2, n_group=4, topk_group=2,
            routed_scaling_factor=1.5, rope_scaling=_SMALL_ROPE, max_position_embeddings=65536,
        ),
    },
    "llama": {
        "tiny": LlamaConfig(
            vocab_size=512, hidden_size=96, num_hidden_layers=5, num_attention_heads=4, num_key_value_heads=2,
            head_dim=32, intermediate_size=720, rms_norm_eps=1e-6, rope_theta=10000.0, max_position_embeddings=65536,
        ),
        "small": LlamaConfig(
            vocab_size=2048, hidden_size=256, num_hidden_layers=6, num_attention_heads=8, num_key_value_heads=2,
            head_dim=64, intermediate_size=1536, rms_norm_eps=1e-6, rope_theta=10000.0, max_position_embeddings=65536,
        ),
    },
}  # fmt: skip


def kind_of(config: AnyConfig) -> str:
    """The kind of a configuration, a key of KINDS."""
    return next(kind for kind, of in KINDS.items() if type(config) is of)


def preset_of(kind: str, name: str) -> AnyConfig:
    """A preset of a kind by name; UserError for an unknown kind or one that has no preset of this name."""
    if kind not in KINDS:
        raise UserError(
            f"model.kind={shown(kind)} is unknown: use one of {', '.join(KINDS)}{nearest(kind[:80], KINDS)}"
        )
    if kind == "v4":
        return ModelConfig.preset(name)
    known = CONTROL_PRESETS[kind]
    if name not in known:
        raise UserError(
            f"there is no preset {shown(name)} of kind {kind}: choose model.preset from {', '.join(known)}"
            f"{nearest(name[:80], known)}"
        )
    return known[name]
