"""What a model is: one frozen schema with the published field names, and the presets.

A published `config.json`, the official `inference/config.json` and the `config.json` that transformers writes all load
through `ModelConfig.from_json`. The kind of a layer is one line: ratio 0 = window, 4 = CSA, 128 = HCA.
"""

import difflib
import json
import math
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from dsv4.errors import UserError

LayerKind = Literal["window", "csa", "hca"]
KIND_OF_RATIO: dict[int, LayerKind] = {0: "window", 4: "csa", 128: "hca"}


@dataclass(frozen=True)
class RopeScaling:
    """YaRN, as the compressed layers use it: frequencies only, no amplitude factor (see docs/numerics.md)."""

    type: str = "yarn"  # "yarn" or "default" (no scaling)
    factor: float = 16.0
    original_max_position_embeddings: int = 65536
    beta_fast: float = 32.0
    beta_slow: float = 1.0


@dataclass(frozen=True)
class ModelConfig:
    """Every field of the published configuration that the computation reads; the defaults are V4-Flash.

    `compress_ratios` has one entry per trunk layer and one per MTP layer after them (which must be 0: a pure window).
    """

    vocab_size: int = 129280
    hidden_size: int = 4096
    num_hidden_layers: int = 43
    compress_ratios: tuple[int, ...] = (0, 0, *(4, 128) * 20, 4, 0)
    num_attention_heads: int = 64
    head_dim: int = 512
    qk_rope_head_dim: int = 64
    q_lora_rank: int = 1024
    o_groups: int = 8
    o_lora_rank: int = 1024
    sliding_window: int = 128
    index_n_heads: int = 64
    index_head_dim: int = 128
    index_topk: int = 512
    moe_intermediate_size: int = 2048
    n_routed_experts: int = 256
    n_shared_experts: int = 1
    num_experts_per_tok: int = 6
    num_hash_layers: int = 3
    routed_scaling_factor: float = 1.5
    swiglu_limit: float = 10.0
    hc_mult: int = 4
    hc_sinkhorn_iters: int = 20
    hc_eps: float = 1e-6
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    compress_rope_theta: float = 160000.0
    rope_scaling: RopeScaling = field(default_factory=RopeScaling)
    max_position_embeddings: int = 1048576
    num_nextn_predict_layers: int = 1
    initializer_range: float = 0.02
    bos_token_id: int = 0
    eos_token_id: int = 1

    def __post_init__(self) -> None:
        _check(self)

    @staticmethod
    def preset(name: str, **changes: Any) -> "ModelConfig":
        """A preset by name (tiny, small, bench, base, flash, pro), with single fields replaced by `changes`."""
        if name not in PRESETS:
            raise UserError(f"unknown preset {name!r}: choose one of {', '.join(PRESETS)}{_nearest(name, PRESETS)}")
        return PRESETS[name].with_(**changes)

    @staticmethod
    def from_json(source: "dict[str, Any] | str | Path") -> "ModelConfig":
        """Read a configuration (dict, JSON file, or folder holding config.json) in any of the three known spellings."""
        return _from_dict(source if isinstance(source, dict) else _read_json(Path(source)))

    def with_(self, **changes: Any) -> "ModelConfig":
        """This configuration with fields replaced; an unknown name is a UserError that says the nearest one."""
        names = [f.name for f in fields(self)]
        for key in changes:
            if key not in names:
                raise UserError(f"unknown configuration key {key!r}{_nearest(key, names)}")
        return replace(self, **changes)

    def to_json(self) -> dict[str, Any]:
        """The published spelling, ready for `json.dump`; `from_json` reads it back unchanged."""
        return {"architectures": ["DeepseekV4ForCausalLM"], "model_type": "deepseek_v4", **asdict(self)}

    @property
    def trunk_ratios(self) -> tuple[int, ...]:
        return self.compress_ratios[: self.num_hidden_layers]

    def layer_kind(self, layer: int) -> LayerKind:
        """The kind of a layer; the MTP block is layer number `num_hidden_layers`."""
        return KIND_OF_RATIO[self.compress_ratios[layer]]

    def uses_hash_routing(self, layer: int) -> bool:
        return layer < min(self.num_hash_layers, self.num_hidden_layers)


def _check(c: ModelConfig) -> None:
    """The rules between fields; each failure is one sentence."""
    zero_ok = {"num_hash_layers", "num_nextn_predict_layers", "bos_token_id", "eos_token_id", "initializer_range"}
    if not isinstance(c.rope_scaling, RopeScaling):
        raise UserError(f"rope_scaling={c.rope_scaling!r} must be a RopeScaling")
    for owner, prefix in ((c, ""), (c.rope_scaling, "rope_scaling.")):
        for f in fields(owner):
            _check_number(prefix + f.name, f.type, getattr(owner, f.name), zero_ok=f.name in zero_ok)
    if not isinstance(c.compress_ratios, list | tuple) or not all(type(r) is int for r in c.compress_ratios):
        raise UserError(f"compress_ratios={c.compress_ratios!r} must be a list of whole numbers: one ratio per layer")
    object.__setattr__(c, "compress_ratios", tuple(c.compress_ratios))
    want = c.num_hidden_layers + c.num_nextn_predict_layers
    if len(c.compress_ratios) != want:
        raise UserError(
            f"compress_ratios has {len(c.compress_ratios)} entries but num_hidden_layers + num_nextn_predict_layers = "
            f"{want}: give one ratio per trunk layer and a 0 for each MTP layer"
        )
    unknown = [r for r in c.compress_ratios if r not in KIND_OF_RATIO]
    if unknown:
        raise UserError(f"compress ratio {unknown[0]!r} is unknown: use 0 (window), 4 (CSA) or 128 (HCA)")
    if any(c.compress_ratios[c.num_hidden_layers :]):
        raise UserError("the MTP entries of compress_ratios (the last ones) must be 0: an MTP block is a pure window")
    if c.num_nextn_predict_layers > 1:
        raise UserError(f"num_nextn_predict_layers={c.num_nextn_predict_layers}: at most 1 MTP block is supported")
    if c.n_shared_experts != 1:
        raise UserError(f"n_shared_experts={c.n_shared_experts}: V4 has exactly 1 shared expert")
    if c.qk_rope_head_dim % 2 or c.qk_rope_head_dim > min(c.head_dim, c.index_head_dim):
        raise UserError(
            f"qk_rope_head_dim={c.qk_rope_head_dim} must be even and at most head_dim={c.head_dim} and "
            f"index_head_dim={c.index_head_dim}"
        )
    if c.head_dim % 2 or c.index_head_dim % 2:
        raise UserError(
            f"head_dim={c.head_dim} and index_head_dim={c.index_head_dim} must be even: channels rotate in pairs"
        )
    if c.num_attention_heads % c.o_groups:
        raise UserError(f"num_attention_heads={c.num_attention_heads} must be a multiple of o_groups={c.o_groups}")
    if c.num_experts_per_tok > c.n_routed_experts:
        raise UserError(
            f"num_experts_per_tok={c.num_experts_per_tok} must be at most n_routed_experts={c.n_routed_experts}"
        )
    if c.rope_scaling.type not in ("yarn", "default"):
        raise UserError(f"rope_scaling type {c.rope_scaling.type!r} is unknown: use 'yarn' or 'default'")
    for name in ("bos_token_id", "eos_token_id"):
        if getattr(c, name) >= c.vocab_size:
            raise UserError(f"{name}={getattr(c, name)} must be below vocab_size={c.vocab_size}")


def _check_number(name: str, kind: Any, value: Any, *, zero_ok: bool) -> None:
    """UserError unless a field declared int or float holds such a number, positive (or zero where that is allowed)."""
    if kind not in (int, float):
        return
    if kind is int and type(value) is not int:
        raise UserError(f"{name}={value!r} must be a whole number")
    if type(value) not in (int, float) or not math.isfinite(value):
        raise UserError(f"{name}={value!r} must be a finite number")
    if value < 0 or (value == 0 and not zero_ok):
        raise UserError(f"{name}={value} must be positive")


def _nearest(key: str, names) -> str:
    match = difflib.get_close_matches(key, list(names), n=1, cutoff=0.5)
    return f"; did you mean {match[0]!r}?" if match else ""


# --- reading the three published spellings --------------------------------------------------------------------------

# The official inference/config.json: its name -> the published name.
_INFERENCE_NAMES = {
    "dim": "hidden_size", "n_layers": "num_hidden_layers", "n_heads": "num_attention_heads",
    "rope_head_dim": "qk_rope_head_dim", "window_size": "sliding_window", "moe_inter_dim": "moe_intermediate_size",
    "n_activated_experts": "num_experts_per_tok", "n_hash_layers": "num_hash_layers",
    "route_scale": "routed_scaling_factor", "n_mtp_layers": "num_nextn_predict_layers", "norm_eps": "rms_norm_eps",
}  # fmt: skip

# Keys of published files that change nothing that is computed here; some are held to the one value V4 has.
_FIXED = {
    "num_key_value_heads": 1, "hidden_act": "silu", "scoring_func": "sqrtsoftplus", "score_func": "sqrtsoftplus",
    "topk_method": "noaux_tc", "norm_topk_prob": True, "attention_bias": False, "mlp_bias": False,
    "tie_word_embeddings": False, "model_type": "deepseek_v4",
}  # fmt: skip
_IGNORED = {
    "architectures", "attention_dropout", "transformers_version", "use_cache", "pad_token_id", "torch_dtype", "dtype",
    "expert_dtype", "quantization_config", "output_router_logits", "router_aux_loss_coef", "router_jitter_noise",
    "partial_rotary_factor", "intermediate_size", "scale_fmt", "scale_dtype", "max_batch_size", "max_seq_len",
    "auto_map", "_name_or_path",
}  # fmt: skip
_RATIO_OF_TYPE = {"sliding_attention": 0, "compressed_sparse_attention": 4, "heavily_compressed_attention": 128}


def _read_json(path: Path) -> dict[str, Any]:
    path = path / "config.json" if path.is_dir() else path
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read the configuration {path}: {error.strerror}; give a config.json") from None
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}); give a config.json") from None
    if not isinstance(data, dict):
        raise UserError(f"{path} holds a {type(data).__name__}, not a JSON object with configuration keys")
    return data


def _from_dict(data: dict[str, Any]) -> ModelConfig:
    data = {_INFERENCE_NAMES.get(k, k): v for k, v in data.items()}
    for key, value in _FIXED.items():
        if key in data and data.pop(key) != value:
            raise UserError(f"{key} must be {value!r} for a DeepSeek-V4 model; this configuration is of another kind")
    _unfold_transformers(data)
    _unfold_rope(data)
    if "partial_rotary_factor" in data and "qk_rope_head_dim" not in data:
        data["qk_rope_head_dim"] = int(data.get("head_dim", ModelConfig.head_dim) * data["partial_rotary_factor"])
    data = {k: v for k, v in data.items() if k not in _IGNORED}
    names = [f.name for f in fields(ModelConfig)]
    for key in data:
        if key not in names:
            raise UserError(f"unknown configuration key {key!r}{_nearest(key, names)}")
    if "compress_ratios" not in data and {"num_hidden_layers", "num_nextn_predict_layers"} & set(data):
        raise UserError("the configuration has a number of layers but no compress_ratios: give one ratio per layer")
    return ModelConfig(**data)


def _unfold_transformers(data: dict[str, Any]) -> None:
    """transformers spells the layer kinds as `layer_types`, the hash layers as `mlp_layer_types` (in place)."""
    kinds, mlp = data.pop("layer_types", None), data.pop("mlp_layer_types", None)
    rates = data.pop("compress_rates", None) or {}
    for kind, rate in rates.items():
        if _RATIO_OF_TYPE.get(kind) != rate:
            raise UserError(f"compress_rates gives {rate} for {kind}: V4 compresses by 4 (CSA) and 128 (HCA)")
    if kinds is not None and "compress_ratios" not in data:
        unknown = [k for k in kinds if k not in _RATIO_OF_TYPE]
        if unknown:
            raise UserError(f"layer type {unknown[0]!r} is unknown: use one of {', '.join(_RATIO_OF_TYPE)}")
        # transformers drops the MTP entry; the MTP block is always a pure window
        tail = [0] * data.get("num_nextn_predict_layers", 1)
        data["compress_ratios"] = [_RATIO_OF_TYPE[k] for k in kinds] + tail
    if mlp is not None and "num_hash_layers" not in data:
        hashed = [kind == "hash_moe" for kind in mlp]
        if hashed != sorted(hashed, reverse=True):
            raise UserError("mlp_layer_types must name the hash_moe layers first: only leading layers are hash-routed")
        data["num_hash_layers"] = sum(hashed)


def _unfold_rope(data: dict[str, Any]) -> None:
    """Bring `rope_scaling`, `rope_parameters{main, compress}` or the inference names to one RopeScaling (in place)."""
    if "rope_scaling" in data and data["rope_scaling"] is None:
        data["rope_scaling"] = {"type": "default"}  # written out as null: no scaling
    scaling = data.pop("rope_scaling", None)
    nested = data.pop("rope_parameters", None) or {}
    if nested and "compress" not in nested:
        scaling = nested  # an older, flat form
    elif nested:
        scaling = nested["compress"]
        data["rope_theta"] = nested.get("main", {}).get("rope_theta", data.get("rope_theta", 10000.0))
        data["compress_rope_theta"] = scaling.get("rope_theta", data.get("compress_rope_theta", 160000.0))
    if "rope_factor" in data or "original_seq_len" in data:
        scaling = {
            "type": "yarn" if data.get("original_seq_len", 65536) else "default",  # 0 switches YaRN off
            "factor": data.pop("rope_factor", 16.0),
            "original_max_position_embeddings": data.pop("original_seq_len", 65536) or 65536,
            "beta_fast": data.pop("beta_fast", 32.0),
            "beta_slow": data.pop("beta_slow", 1.0),
        }
    if scaling is None:
        return
    if isinstance(scaling, RopeScaling):
        data["rope_scaling"] = scaling
        return
    if not isinstance(scaling, dict):
        raise UserError(f"rope_scaling={scaling!r} must be an object with type, factor and so on, or be left out")
    scaling = dict(scaling)
    kind = scaling.pop("rope_type", scaling.pop("type", "default"))
    scaling.pop("type", None)
    if scaling.pop("attention_factor", 1.0) not in (1.0, None) or scaling.pop("mscale", None) is not None:
        raise UserError("rope_scaling asks for an amplitude factor: V4 has none; remove attention_factor and mscale")
    names = [f.name for f in fields(RopeScaling)]
    scaling = {k: v for k, v in scaling.items() if k not in ("rope_theta", "partial_rotary_factor", "truncate")}
    for key in scaling:
        if key not in names:
            raise UserError(f"unknown rope_scaling key {key!r}{_nearest(key, names)}")
    data["rope_scaling"] = RopeScaling(type=kind, **scaling)


# --- presets --------------------------------------------------------------------------------------------------------

_SMALL_ROPE = RopeScaling(factor=16.0, original_max_position_embeddings=4096)

PRESETS: dict[str, ModelConfig] = {
    # About 1M parameters: tests. Every layer kind, two hash layers, an MTP block.
    "tiny": ModelConfig(
        vocab_size=512, hidden_size=96, num_hidden_layers=5, compress_ratios=(0, 4, 128, 4, 128, 0),
        num_attention_heads=4, head_dim=48, qk_rope_head_dim=16, q_lora_rank=48, o_groups=2, o_lora_rank=48,
        sliding_window=128, index_n_heads=4, index_head_dim=32, index_topk=32, moe_intermediate_size=64,
        n_routed_experts=8, num_experts_per_tok=2, num_hash_layers=2, rope_scaling=_SMALL_ROPE,
        max_position_embeddings=65536,
    ),
    # About 10M parameters: the demo.
    "small": ModelConfig(
        vocab_size=2048, hidden_size=256, num_hidden_layers=6, compress_ratios=(0, 0, 4, 128, 4, 128, 0),
        num_attention_heads=8, head_dim=64, qk_rope_head_dim=32, q_lora_rank=128, o_groups=4, o_lora_rank=64,
        sliding_window=128, index_n_heads=4, index_head_dim=64, index_topk=256, moe_intermediate_size=160,
        n_routed_experts=8, num_experts_per_tok=2, num_hash_layers=2, rope_scaling=_SMALL_ROPE,
        max_position_embeddings=65536,
    ),
    "bench": ModelConfig(
        vocab_size=4096, hidden_size=512, num_hidden_layers=8, compress_ratios=(0, 0, *(4, 128) * 3, 0),
        num_attention_heads=8, head_dim=128, qk_rope_head_dim=32, q_lora_rank=256, o_groups=4, o_lora_rank=128,
        sliding_window=128, index_n_heads=8, index_head_dim=64, index_topk=128, moe_intermediate_size=256,
        n_routed_experts=16, num_experts_per_tok=4, num_hash_layers=3,
    ),
    "base": ModelConfig(
        vocab_size=8192, hidden_size=640, num_hidden_layers=10, compress_ratios=(0, 0, *(4, 128) * 4, 0),
        num_attention_heads=10, head_dim=128, qk_rope_head_dim=32, q_lora_rank=320, o_groups=5, o_lora_rank=128,
        sliding_window=128, index_n_heads=8, index_head_dim=64, index_topk=512, moe_intermediate_size=256,
        n_routed_experts=16, num_experts_per_tok=4, num_hash_layers=3,
    ),
    "flash": ModelConfig(),
    "pro": ModelConfig(
        hidden_size=7168, num_hidden_layers=61, compress_ratios=(128, 128, *(4, 128) * 29, 4, 0),
        num_attention_heads=128, q_lora_rank=1536, o_groups=16, index_topk=1024, moe_intermediate_size=3072,
        n_routed_experts=384, routed_scaling_factor=2.5,
    ),
}  # fmt: skip
