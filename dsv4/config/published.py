"""Reading a published configuration: the three spellings of one schema (config.json, inference/config.json, and what
transformers writes) become the fields of a ModelConfig. What the fields mean and may be is in v4.py.
"""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

from dsv4.config.v4 import ModelConfig, RopeScaling
from dsv4.errors import UserError, nearest

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


def read_json(source: str | Path) -> dict[str, Any]:
    """The JSON object of a file, or of the config.json in a folder; UserError if there is none."""
    path = Path(source)
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


def read_fields(data: dict[str, Any]) -> dict[str, Any]:
    """The fields of a ModelConfig from a configuration in any of the three spellings."""
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
            raise UserError(f"unknown configuration key {key!r}{nearest(key, names)}")
    if "compress_ratios" not in data and {"num_hidden_layers", "num_nextn_predict_layers"} & set(data):
        raise UserError("the configuration has a number of layers but no compress_ratios: give one ratio per layer")
    return data


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
            raise UserError(f"unknown rope_scaling key {key!r}{nearest(key, names)}")
    data["rope_scaling"] = RopeScaling(type=kind, **scaling)
