"""Reading a published configuration: the three spellings of one schema (config.json, inference/config.json, and what
transformers writes) become the fields of a ModelConfig. What the fields mean and may be is in v4.py.

A key that is not there never takes a number of V4-Flash: `ABSENT` says for every field what its absence means. Where a
file says one thing twice (both names of a key, ratios beside layer types), the two must agree.
"""

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from dsv4 import files
from dsv4.config.rules import CONSTANTS, RopeScaling
from dsv4.errors import UserError, nearest, shown

REQUIRED = "required"

# What a file says that lacks the key. A default stands only where transformers (5.23, DeepseekV4Config) has the same
# one, both released models have that value, and it is no size and no choice of the model's. transformers fills in
# Flash's numbers for all the others, and official inference code its own (a compress_rope_theta of 40000, a factor of
# 40), so a file that lacks one of these means something else to each reader: that is an error here.
ABSENT: dict[str, Any] = {
    "vocab_size": REQUIRED,
    "hidden_size": REQUIRED,
    "num_hidden_layers": REQUIRED,
    "compress_ratios": REQUIRED,  # or layer_types; without either transformers takes Pro's pattern, at any depth
    "compress_rate_csa": 4,  # or compress_rates; no released file has them
    "compress_rate_hca": 128,
    "num_attention_heads": REQUIRED,
    "head_dim": REQUIRED,
    "qk_rope_head_dim": REQUIRED,  # or partial_rotary_factor; transformers' 64/512 is Flash's
    "q_lora_rank": REQUIRED,
    "o_groups": REQUIRED,
    "o_lora_rank": REQUIRED,
    "sliding_window": REQUIRED,
    "index_n_heads": REQUIRED,
    "index_head_dim": REQUIRED,
    "index_topk": REQUIRED,
    "moe_intermediate_size": REQUIRED,
    "n_routed_experts": REQUIRED,
    "n_shared_experts": 1,  # the only number there is: any other is refused
    "num_experts_per_tok": REQUIRED,
    "num_hash_layers": REQUIRED,  # or mlp_layer_types; transformers' 3 is Flash's
    "routed_scaling_factor": REQUIRED,  # 1.5 and 2.5 in the releases
    "swiglu_limit": REQUIRED,  # without it some readers clamp at 10, others not at all
    "hc_mult": REQUIRED,
    "hc_sinkhorn_iters": REQUIRED,
    "hc_eps": 1e-6,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "compress_rope_theta": REQUIRED,  # 160000 in transformers, 40000 in the official code's arguments
    "rope_scaling": RopeScaling(type="default"),  # none, as in transformers; null is the same
    "max_position_embeddings": REQUIRED,  # with YaRN: factor x original length, which no other reader disputes
    "num_nextn_predict_layers": 0,  # but 1 where compress_ratios has an entry more than there are layers
    "initializer_range": 0.02,
    "bos_token_id": None,  # transformers' 0 and 1 are the published tokenizer's, which need not be this model's
    "eos_token_id": None,
    "residual": "mhc",  # keys of ours: only what V4 is compared with has others
    "attention": "compressed",
    "attention_rank": 0,
    "dspark_stages": 0,  # counted: see _settle_drafter
    "dspark_block_size": 0,  # these four are a drafter's, which needs all of them
    "dspark_noise_token_id": None,
    "dspark_target_layer_ids": (),
    "dspark_markov_rank": 0,
}

# Other names of a key: those of the official inference/config.json, and two that transformers reads as the same.
_OTHER_NAMES = {
    "dim": "hidden_size", "n_layers": "num_hidden_layers", "n_heads": "num_attention_heads",
    "rope_head_dim": "qk_rope_head_dim", "window_size": "sliding_window", "moe_inter_dim": "moe_intermediate_size",
    "n_activated_experts": "num_experts_per_tok", "n_hash_layers": "num_hash_layers",
    "route_scale": "routed_scaling_factor", "n_mtp_layers": "num_nextn_predict_layers", "norm_eps": "rms_norm_eps",
    "score_func": "scoring_func", "intermediate_size": "moe_intermediate_size", "num_local_experts": "n_routed_experts",
}  # fmt: skip

# Keys that would change what is computed, held to the one value at which V4 is V4.
_HELD = {
    **{key: value for key, value in CONSTANTS.items() if key != "architectures"},
    "mlp_bias": False, "router_jitter_noise": 0.0, "is_encoder_decoder": False, "add_cross_attention": False,
    "pruned_heads": {},
}  # fmt: skip

# Keys that cannot change what is computed here. How the weights are stored is told by the weights themselves.
_PASSED_OVER = {
    # what the folder is, and which program wrote it
    "architectures", "auto_map", "transformers_version", "_name_or_path", "_commit_hash", "tokenizer_class", "prefix",
    # how weights are held and models are run
    "torch_dtype", "dtype", "use_bfloat16", "expert_dtype", "scale_fmt", "scale_dtype", "quantization_config",
    "quantization", "compression_config", "max_batch_size", "max_seq_len", "use_cache", "torchscript",
    "chunk_size_feed_forward", "_attn_implementation", "_attn_implementation_autoset", "attn_implementation",
    "_experts_implementation", "experts_implementation", "gradient_checkpointing", "tf_legacy_loss", "pretraining_tp",
    # what a call returns, and losses that are not ours
    "return_dict", "output_hidden_states", "output_attentions", "output_router_logits", "router_aux_loss_coef",
    # heads for other tasks
    "id2label", "label2id", "num_labels", "problem_type", "task_specific_params", "finetuning_task", "is_decoder",
    "cross_attention_hidden_size", "tie_encoder_decoder", "decoder_start_token_id", "sep_token_id", "pad_token_id",
    # how text is generated: the logits are the same
    "do_sample", "early_stopping", "num_beams", "num_beam_groups", "diversity_penalty", "temperature", "top_k", "top_p",
    "typical_p", "repetition_penalty", "length_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size",
    "bad_words_ids", "num_return_sequences", "output_scores", "return_dict_in_generate", "forced_bos_token_id",
    "forced_eos_token_id", "remove_invalid_values", "exponential_decay_length_penalty", "suppress_tokens",
    "begin_suppress_tokens", "max_length", "min_length",
}  # fmt: skip
_PASSED_OVER_PREFIXES = ("unsloth_",)  # of a tool

# transformers' layer types, and the field that holds the ratio of such a layer.
_WINDOW, _CSA, _HCA = "sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"
_RATE_OF_TYPE = {_WINDOW: None, _CSA: "compress_rate_csa", _HCA: "compress_rate_hca"}
_YARN_KEYS = ("rope_factor", "original_seq_len", "beta_fast", "beta_slow")  # of inference/config.json


def read_json(source: str | Path) -> dict[str, Any]:
    """The JSON object of a file, or of the config.json in a folder; UserError if there is none."""
    path = Path(source)
    with files.explained(path, "read"):
        path = path / "config.json" if path.is_dir() else path
    return files.read_json(path, "the configuration", "give a config.json")


def read_fields(data: dict[str, Any]) -> dict[str, Any]:
    """The fields of a ModelConfig from a configuration in any of the three spellings; UserError if one is not said."""
    data = _one_name(data)
    hold(data, _HELD)
    _unfold_rates(data)
    _unfold_layers(data)
    _unfold_rope(data)
    _settle_tail(data)
    for key in [k for k in data if k in _PASSED_OVER or (k not in ABSENT and k.startswith(_PASSED_OVER_PREFIXES))]:
        del data[key]
    for key in data:
        if key not in ABSENT:
            raise UserError(f"unknown configuration key {shown(key)}{nearest(key[:80], ABSENT)}")
    missing = [key for key, absent in ABSENT.items() if key not in data and absent is REQUIRED]
    if missing:
        raise UserError(
            f"the configuration lacks {', '.join(missing)}: give the model's whole config.json, or add what it was "
            "trained with (nothing that changes a model is guessed)"
        )
    return {key: data.get(key, absent) for key, absent in ABSENT.items()}


def layer_types(ratios: Sequence[int], csa: int, hca: int) -> list[str]:
    """The layers' types as transformers names them: all it goes by where a ratio is not 0, 4 or 128."""
    return [{0: _WINDOW, csa: _CSA, hca: _HCA}[ratio] for ratio in ratios]


def hold(data: dict[str, Any], held: dict[str, Any], kind: str = "DeepSeek-V4") -> None:
    """Take the keys of `held` out of `data`; UserError if one has another value."""
    for key, value in held.items():
        given = data.pop(key, value)
        if given != value or isinstance(given, bool) != isinstance(value, bool):
            raise UserError(f"{key} must be {value!r} for a {kind} model, not {shown(given)}: it is of another kind")


def read_scaling(given: Any, where: str, *, amplitude: tuple[str, ...] = ()) -> RopeScaling:
    """A RopeScaling from an object with `type` or `rope_type`; None is no scaling.

    UserError for YaRN without its factor or original length, for numbers without a type, for other kinds, and for an
    amplitude factor (the keys in `amplitude` were judged by the caller).
    """
    if given is None or isinstance(given, RopeScaling):
        return given or RopeScaling(type="default")
    if not isinstance(given, dict):
        raise UserError(f"{where}={shown(given)} must be an object with type, factor and so on, or null")
    names = [f.name for f in fields(RopeScaling) if f.name != "type"]
    known = [*names, "type", "rope_type", "rope_theta", "partial_rotary_factor", "truncate", "attention_factor"]
    for key in given:
        if key not in (*known, "mscale", "mscale_all_dim"):
            raise UserError(f"unknown {where} key {shown(key)}{nearest(str(key)[:80], known)}")
    kinds = [given[key] for key in ("rope_type", "type") if key in given]
    numbers = {key: given[key] for key in names if key in given}
    if len(kinds) == 2 and kinds[0] != kinds[1]:
        raise UserError(f"{where} has rope_type {shown(kinds[0])} and type {shown(kinds[1])}: keep one of them")
    if not kinds and numbers:
        raise UserError(f"{where} has {min(numbers)} but no type: say type 'yarn', or 'default' for no scaling")
    kind = kinds[0] if kinds else "default"
    if kind == "yarn":
        for key in ("factor", "original_max_position_embeddings"):
            if key not in numbers:
                raise UserError(f"{where} is YaRN without {key}: add the one that the model was trained with")
    for key in ("mscale", "mscale_all_dim"):
        if key not in amplitude and given.get(key) is not None:
            raise UserError(f"{where} asks for an amplitude factor ({key}): V4 has none; remove it")
    if not _is_one(given.get("attention_factor", 1.0)):
        raise UserError(f"{where} asks for an amplitude factor: V4 has none; set attention_factor to 1.0")
    if given.get("truncate", True) is not True:
        raise UserError(f"{where}.truncate={shown(given['truncate'])}: V4's YaRN rounds its bounds; remove the key")
    return RopeScaling(type=kind, **numbers)


def _is_one(value: Any) -> bool:
    return type(value) in (int, float) and value == 1


def _one_name(data: dict[str, Any]) -> dict[str, Any]:
    """The same keys under their published names; UserError if two names of one key disagree."""
    out: dict[str, Any] = {}
    for key, value in data.items():
        name = _OTHER_NAMES.get(str(key), str(key))
        if name in out and out[name] != value:
            raise UserError(f"{key}={shown(value)} and {name}={shown(out[name])} are one key: keep the right one")
        out[name] = value
    return out


def _unfold_rates(data: dict[str, Any]) -> None:
    """transformers spells compress_rate_csa and compress_rate_hca as `compress_rates`, by layer type (in place)."""
    for kind, rate in (_popped(data, "compress_rates", dict) or {}).items():
        key = _RATE_OF_TYPE.get(kind)
        if key is None:
            if kind in _RATE_OF_TYPE and rate == 0:
                continue
            raise UserError(
                f"compress_rates gives {shown(rate)} for {shown(kind)}: only CSA and HCA layers have a rate"
            )
        if data.setdefault(key, rate) != rate:
            raise UserError(
                f"compress_rates gives {shown(rate)} for {kind} but {key}={shown(data[key])}: keep the right one"
            )


def _unfold_layers(data: dict[str, Any]) -> None:
    """transformers spells the layer kinds as `layer_types`, the hash layers as `mlp_layer_types` (in place)."""
    kinds, mlp = (_popped(data, key, list) for key in ("layer_types", "mlp_layer_types"))
    if data.get("compress_ratios", 0) is None:
        del data["compress_ratios"]
    if kinds is not None:
        unknown = [k for k in kinds if not isinstance(k, str) or k not in _RATE_OF_TYPE]
        if unknown:
            raise UserError(f"layer type {shown(unknown[0])} is unknown: use one of {', '.join(_RATE_OF_TYPE)}")
        of_type = {kind: data.get(key, ABSENT[key]) if key else 0 for kind, key in _RATE_OF_TYPE.items()}
        ratios = [of_type[kind] for kind in kinds]
        said = data.setdefault("compress_ratios", ratios)
        if not isinstance(said, list | tuple) or list(said[: len(ratios)]) != ratios:
            raise UserError(
                f"layer_types, with a rate of {shown(of_type[_CSA])} for CSA and {shown(of_type[_HCA])} for HCA, and "
                "compress_ratios disagree: keep the right one"
            )
    if mlp is not None:
        unknown = [k for k in mlp if k not in ("hash_moe", "moe")]
        if unknown:
            raise UserError(f"mlp_layer_types has {shown(unknown[0])}: use hash_moe and moe")
        hashed = [kind == "hash_moe" for kind in mlp]
        if hashed != sorted(hashed, reverse=True):
            raise UserError("mlp_layer_types must name the hash_moe layers first: only leading layers are hash-routed")
        if len(mlp) != data.get("num_hidden_layers", len(mlp)):
            raise UserError(f"mlp_layer_types has {len(mlp)} entries: give one for each of num_hidden_layers")
        if data.setdefault("num_hash_layers", sum(hashed)) != sum(hashed):
            raise UserError("mlp_layer_types and num_hash_layers disagree: keep the right one")


def _popped(data: dict[str, Any], key: str, kind: type) -> Any:
    """Take a key out that holds a list or an object (`kind`), or null."""
    value = data.pop(key, None)
    if value is not None and not isinstance(value, kind):
        raise UserError(f"{key}={shown(value)} must be {'an object' if kind is dict else 'a list'}, or be left out")
    return value


def _unfold_rope(data: dict[str, Any]) -> None:
    """Bring `rope_scaling`, `rope_parameters` or the inference names to one RopeScaling, and the share of the head that
    rotates to qk_rope_head_dim (in place)."""
    found: list[tuple[str, RopeScaling]] = []
    shares = [data.pop("partial_rotary_factor", None)]
    flat = {key: data.pop(key) for key in ("rope_scaling", "rope_parameters") if key in data}
    for where, given in flat.items():
        if isinstance(given, dict) and ("main" in given or "compress" in given):
            found.append((where, _nested(data, given, where, shares)))
        elif given:
            found.append((where, read_scaling(given, where)))
            if isinstance(given, dict):
                shares.append(given.get("partial_rotary_factor"))
                theta = given.get("rope_theta")
                bases = [data.get("rope_theta", ABSENT["rope_theta"]), data.get("compress_rope_theta")]
                if theta is not None and theta not in bases:
                    raise UserError(f"{where}.rope_theta={shown(theta)} is neither rope_theta nor compress_rope_theta")
        elif given is not None and given != {}:
            raise UserError(f"{where}={shown(given)} must be an object with type, factor and so on, or null")
    yarn = {key: data.pop(key) for key in _YARN_KEYS if key in data}
    if yarn:
        found.append((" and ".join(yarn), _inference_yarn(yarn)))
    for where, scaling in found[1:]:
        if scaling != found[0][1]:
            raise UserError(f"{found[0][0]} and {where} say different rotary scalings: keep the right one")
    if found:
        data["rope_scaling"] = found[0][1]
    for share in shares:
        if share is not None:
            _rotating(data, share)
    scaling = data.get("rope_scaling")
    if scaling is not None and scaling.type == "yarn" and "max_position_embeddings" not in data:
        length, factor = scaling.original_max_position_embeddings, scaling.factor
        if type(length) is int and type(factor) in (int, float) and 0 < factor < 1e6 and 0 < length < 2**31:
            data["max_position_embeddings"] = int(length * factor)


def _nested(data: dict[str, Any], given: dict[str, Any], where: str, shares: list[Any]) -> RopeScaling:
    """transformers' rotary settings, keyed by "main" and "compress"; these are what it computes with, so their bases
    come before those beside them."""
    main, compress = (given.get(key) for key in ("main", "compress"))
    if not isinstance(main, dict) or not isinstance(compress, dict):
        raise UserError(f"{where} needs both main and compress, an object each: one alone counts for nothing")
    if read_scaling(main, f"{where}.main").type != "default":
        raise UserError(f"{where}.main asks for a scaling: only the compressed layers of V4 have one")
    scaling = read_scaling(compress, f"{where}.compress")
    if scaling.type == "yarn" and "attention_factor" not in compress:
        raise UserError(
            f"{where}.compress is YaRN without attention_factor, so transformers would scale amplitudes and V4 does "
            "not: add attention_factor 1.0"
        )
    if "rope_theta" not in compress:
        raise UserError(f"{where}.compress lacks rope_theta: add the base of the compressed layers")
    data["compress_rope_theta"] = compress["rope_theta"]
    if "rope_theta" in main:
        data["rope_theta"] = main["rope_theta"]
    shares += [main.get("partial_rotary_factor"), compress.get("partial_rotary_factor")]
    return scaling


def _inference_yarn(given: dict[str, Any]) -> RopeScaling:
    """The four keys of inference/config.json; an original_seq_len of 0 is no scaling."""
    for key in ("original_seq_len", "rope_factor"):
        if key not in given:
            raise UserError(f"{' and '.join(given)} without {key}: add the one that the model was trained with")
        if given["original_seq_len"] == 0:
            return RopeScaling(type="default")
    betas = {key: given[key] for key in ("beta_fast", "beta_slow") if key in given}
    return RopeScaling("yarn", given["rope_factor"], given["original_seq_len"], **betas)


def _rotating(data: dict[str, Any], share: Any) -> None:
    """Settle qk_rope_head_dim by the share of the head that rotates, as transformers does: rounded down (in place)."""
    if type(share) not in (int, float) or not 0 < share <= 1:
        raise UserError(f"partial_rotary_factor={shown(share)} must be a number above 0 and at most 1")
    width = data.get("head_dim")
    if type(width) is not int or not 0 < width < 2**31:
        return  # that is said elsewhere
    given = data.setdefault("qk_rope_head_dim", int(width * share))
    if given not in (int(width * share), round(width * share)):
        raise UserError(
            f"qk_rope_head_dim={shown(given)} and partial_rotary_factor={share} of head_dim={width} disagree: keep one"
        )


def _settle_tail(data: dict[str, Any]) -> None:
    """Bring the number of blocks after the trunk and the end of compress_ratios together (in place)."""
    layers, ratios, said = (data.get(k, "absent") for k in ("num_hidden_layers", "compress_ratios", _MTP))
    tail = ratios[layers:] if type(layers) is int and 0 < layers < 2**31 and isinstance(ratios, list | tuple) else []
    if any(key.startswith("dspark_") and key != "dspark_stages" for key in data):
        _settle_drafter(data, tail, said)
    elif said is None or (type(said) is int and said == 0):
        data[_MTP] = 0
        if tail and not any(tail) and len(tail) == 1:
            data["compress_ratios"] = ratios[:layers]
    elif said == "absent":
        data[_MTP] = len(tail)
    elif type(said) is int and said == 1 and not tail and isinstance(ratios, list | tuple) and len(ratios) == layers:
        data["compress_ratios"] = [*ratios, 0]  # transformers drops it; an MTP block is always a pure window


def _settle_drafter(data: dict[str, Any], tail: Sequence[Any], said: Any) -> None:
    """Count the stages of a DSpark drafter (in place), or take it out where dspark_stages is 0.

    V4-Flash-0731 and V4-Pro-0813 have one in place of the MTP block: a ratio of 0 per stage tells how many there are,
    in inference/config.json n_mtp_layers too, while the num_nextn_predict_layers of 1 in config.json means nothing.
    """
    ratios, counted = data.get("compress_ratios"), said if type(said) is int and said > 1 else 0
    data[_MTP] = 0
    if data.get("dspark_stages") == 0:
        for key in [key for key in data if key.startswith("dspark_")]:
            del data[key]
        if isinstance(ratios, list | tuple) and tail and not any(tail):
            data["compress_ratios"] = ratios[: len(ratios) - len(tail)]
        return
    targets = data.get("dspark_target_layer_ids")
    stages = len(tail) or counted or (len(targets) if isinstance(targets, list | tuple) else 0)
    stages = data.setdefault("dspark_stages", stages or 3)  # 3 in both releases
    if counted and counted != stages:
        raise UserError(
            f"{_MTP} (or n_mtp_layers) is {counted} but the DSpark drafter has {shown(stages)} stages: keep one number"
        )
    if not tail and isinstance(ratios, list | tuple) and type(stages) is int and 0 < stages < 2**4:
        data["compress_ratios"] = [*ratios, *[0] * stages]


_MTP = "num_nextn_predict_layers"
