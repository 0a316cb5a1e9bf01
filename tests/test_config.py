"""Failures caught here: a published count or layer list that is not ours, a spelling of config.json that loads to
something else, a key or a value that is wrong and passes, an error that does not say what to do.
"""

import json

import pytest
import torch
from models import small_config

from dsv4.config import PRESETS, ModelConfig, RopeScaling
from dsv4.errors import UserError
from dsv4.model import Transformer


def on_meta(config: ModelConfig) -> Transformer:
    with torch.device("meta"):
        return Transformer(config)


# --- counts ---------------------------------------------------------------------------------------
# The counting rule: parameters are what gradients train. Router biases (moved by the balance rule) and hash tables
# (fixed) are buffers: published with the weights, loaded and saved, not counted. The MTP block is counted apart.


@pytest.mark.parametrize(
    ("preset", "trunk", "with_mtp"),
    [("flash", 284_332_230_231, 290_942_278_866), ("pro", 1_572_997_179_491, None)],
)
def test_published_parameter_counts(preset, trunk, with_mtp):
    model = on_meta(ModelConfig.preset(preset))
    assert model.num_parameters() == trunk
    assert with_mtp is None or model.num_parameters(mtp=True) == with_mtp
    assert sum(p.numel() for p in model.parameters()) == model.num_parameters(mtp=True)
    buffers = {name.rsplit(".", 1)[-1] for name, _ in model.named_buffers()}
    assert buffers == {"bias", "tid2eid"}, "what is not counted must be the router biases and the hash tables, only"


@pytest.mark.parametrize(("preset", "about"), [("tiny", 1e6), ("small", 10e6), ("bench", 67e6), ("base", 100e6)])
def test_small_presets_have_the_size_they_claim(preset, about):
    assert 0.75 <= on_meta(ModelConfig.preset(preset)).num_parameters() / about <= 1.34


@pytest.mark.parametrize(
    ("preset", "window", "csa", "hca"),
    [("flash", 2, 21, 20), ("pro", 0, 30, 31), ("bench", 2, 3, 3)],
)
def test_layer_census(preset, window, csa, hca):
    config = ModelConfig.preset(preset)
    kinds = [config.layer_kind(i) for i in range(config.num_hidden_layers)]
    assert (kinds.count("window"), kinds.count("csa"), kinds.count("hca")) == (window, csa, hca)
    assert config.layer_kind(config.num_hidden_layers) == "window", "the MTP block is a pure window"
    assert kinds[-1] == ("hca" if preset == "bench" else "csa")
    hashed = [i for i in range(len(config.compress_ratios)) if config.uses_hash_routing(i)]
    assert hashed == [0, 1, 2], "hash routing is for the first layers, never for the MTP block"


def test_bench_is_what_was_asked_for():
    c = ModelConfig.preset("bench")
    assert (c.hidden_size, c.num_hidden_layers, c.trunk_ratios) == (512, 8, (0, 0, 4, 128, 4, 128, 4, 128))
    assert (c.num_attention_heads, c.head_dim, c.qk_rope_head_dim, c.q_lora_rank) == (8, 128, 32, 256)
    assert (c.o_groups, c.o_lora_rank, c.index_n_heads, c.index_head_dim, c.index_topk) == (4, 128, 8, 64, 128)
    assert (c.n_routed_experts, c.num_experts_per_tok, c.moe_intermediate_size, c.num_hash_layers) == (16, 4, 256, 3)
    assert (c.vocab_size, c.sliding_window) == (4096, 128)


# --- reading --------------------------------------------------------------------------------------

PUBLISHED_FLASH = {
    "architectures": ["DeepseekV4ForCausalLM"], "model_type": "deepseek_v4", "vocab_size": 129280,
    "hidden_size": 4096, "num_hidden_layers": 43, "num_attention_heads": 64, "num_key_value_heads": 1,
    "head_dim": 512, "qk_rope_head_dim": 64, "q_lora_rank": 1024, "o_groups": 8, "o_lora_rank": 1024,
    "sliding_window": 128, "compress_ratios": [0, 0, *[4, 128] * 20, 4, 0], "index_n_heads": 64,
    "index_head_dim": 128, "index_topk": 512, "moe_intermediate_size": 2048, "n_routed_experts": 256,
    "n_shared_experts": 1, "num_experts_per_tok": 6, "num_hash_layers": 3, "scoring_func": "sqrtsoftplus",
    "topk_method": "noaux_tc", "norm_topk_prob": True, "routed_scaling_factor": 1.5, "swiglu_limit": 10.0,
    "hc_mult": 4, "hc_sinkhorn_iters": 20, "hc_eps": 1e-6, "rms_norm_eps": 1e-6, "rope_theta": 10000,
    "compress_rope_theta": 160000, "max_position_embeddings": 1048576, "num_nextn_predict_layers": 1,
    "rope_scaling": {"type": "yarn", "factor": 16, "original_max_position_embeddings": 65536, "beta_fast": 32,
                     "beta_slow": 1},
    "hidden_act": "silu", "attention_bias": False, "attention_dropout": 0.0, "tie_word_embeddings": False,
    "initializer_range": 0.02, "bos_token_id": 0, "eos_token_id": 1, "torch_dtype": "bfloat16", "use_cache": True,
    "expert_dtype": "fp4", "transformers_version": "4.57.1",
    "quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]},
}  # fmt: skip

INFERENCE_FLASH = {
    "vocab_size": 129280, "dim": 4096, "moe_inter_dim": 2048, "n_layers": 43, "n_hash_layers": 3, "n_heads": 64,
    "n_routed_experts": 256, "n_shared_experts": 1, "n_activated_experts": 6, "score_func": "sqrtsoftplus",
    "route_scale": 1.5, "swiglu_limit": 10.0, "q_lora_rank": 1024, "head_dim": 512, "rope_head_dim": 64,
    "norm_eps": 1e-6, "o_groups": 8, "o_lora_rank": 1024, "window_size": 128, "original_seq_len": 65536,
    "rope_theta": 10000.0, "rope_factor": 16, "beta_fast": 32, "beta_slow": 1, "index_n_heads": 64,
    "index_head_dim": 128, "index_topk": 512, "hc_mult": 4, "hc_sinkhorn_iters": 20, "hc_eps": 1e-6,
    "compress_rope_theta": 160000.0, "compress_ratios": [0, 0, *[4, 128] * 20, 4, 0], "n_mtp_layers": 1,
    "dtype": "fp8", "scale_fmt": "ue8m0", "expert_dtype": "fp4",
}  # fmt: skip

_TYPES = {0: "sliding_attention", 4: "compressed_sparse_attention", 128: "heavily_compressed_attention"}
_YARN = {
    "rope_type": "yarn", "rope_theta": 160000.0, "partial_rotary_factor": 0.125, "factor": 16.0, "beta_fast": 32.0,
    "beta_slow": 1.0, "original_max_position_embeddings": 65536, "attention_factor": 1.0,
}  # fmt: skip
_PLAIN = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.125}
_DROPPED = ("compress_ratios", "rope_theta", "compress_rope_theta", "rope_scaling", "num_hash_layers")
TRANSFORMERS_FLASH = {
    **{key: value for key, value in PUBLISHED_FLASH.items() if key not in _DROPPED},
    "layer_types": [_TYPES[r] for r in PUBLISHED_FLASH["compress_ratios"][:43]],
    "mlp_layer_types": ["hash_moe"] * 3 + ["moe"] * 40,
    "compress_rates": {_TYPES[4]: 4, _TYPES[128]: 128},
    "rope_parameters": {"main": _PLAIN, "compress": _YARN},
    "partial_rotary_factor": 0.125, "router_jitter_noise": 0.0, "output_router_logits": False,
}  # fmt: skip
SPELLINGS = {"published": PUBLISHED_FLASH, "inference": INFERENCE_FLASH, "transformers": TRANSFORMERS_FLASH}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_three_spellings_are_one_configuration(spelling, tmp_path):
    given = SPELLINGS[spelling]
    before = json.dumps(given)
    assert ModelConfig.from_json(given) == ModelConfig.preset("flash")
    assert json.dumps(given) == before, "the caller's dict is not ours to change"
    (tmp_path / "config.json").write_text(json.dumps(given), encoding="utf-8")
    assert ModelConfig.from_json(tmp_path) == ModelConfig.from_json(str(tmp_path / "config.json"))
    assert ModelConfig.from_json(tmp_path) == ModelConfig.preset("flash")


def test_a_spelling_is_read_and_not_defaulted():
    """Every spelling of every field, moved away from its default, arrives."""
    published = {**PUBLISHED_FLASH, "num_hidden_layers": 3, "compress_ratios": [128, 4, 0, 0], "num_hash_layers": 1,
                 "rope_theta": 500.0, "compress_rope_theta": 7000.0}  # fmt: skip
    published["rope_scaling"] = {**PUBLISHED_FLASH["rope_scaling"], "factor": 3.0, "beta_fast": 20.0}
    inference = {**INFERENCE_FLASH, "n_layers": 3, "compress_ratios": [128, 4, 0, 0], "n_hash_layers": 1,
                 "rope_theta": 500.0, "compress_rope_theta": 7000.0, "rope_factor": 3.0, "beta_fast": 20.0}  # fmt: skip
    nested = {"main": {**_PLAIN, "rope_theta": 500.0},
              "compress": {**_YARN, "rope_theta": 7000.0, "factor": 3.0, "beta_fast": 20.0}}  # fmt: skip
    other = {**TRANSFORMERS_FLASH, "num_hidden_layers": 3, "layer_types": [_TYPES[128], _TYPES[4], _TYPES[0]],
             "mlp_layer_types": ["hash_moe", "moe", "moe"], "rope_parameters": nested}  # fmt: skip
    first, *rest = (ModelConfig.from_json(data) for data in (published, inference, other))
    assert all(config == first for config in rest)
    assert (first.rope_theta, first.compress_rope_theta, first.num_hash_layers) == (500.0, 7000.0, 1)
    assert (first.rope_scaling.factor, first.rope_scaling.beta_fast) == (3.0, 20.0)
    assert first.compress_ratios == (128, 4, 0, 0)


def test_no_scaling_can_be_said_in_transformers_words():
    nested = {"main": _PLAIN, "compress": {**_PLAIN, "rope_theta": 160000.0}}
    config = ModelConfig.from_json({**TRANSFORMERS_FLASH, "rope_parameters": nested})
    assert config.rope_scaling.type == "default"


@pytest.mark.parametrize("changes", [{"rope_scaling": None}, {"original_seq_len": 0, "rope_factor": 1}])
def test_no_scaling_can_be_said_in_published_words(changes):
    data = {key: value for key, value in PUBLISHED_FLASH.items() if key != "rope_scaling"}
    assert ModelConfig.from_json(data).rope_scaling == RopeScaling(), "left out, it is V4's"
    assert ModelConfig.from_json({**data, **changes}).rope_scaling.type == "default"


def test_flat_rope_parameters_and_a_rotary_share():
    data = {**TRANSFORMERS_FLASH, "rope_parameters": {**_YARN, "factor": 3.0}, "rope_theta": 500.0, "head_dim": 256}
    data.pop("qk_rope_head_dim")
    config = ModelConfig.from_json(data)
    assert (config.rope_scaling.factor, config.rope_theta, config.compress_rope_theta) == (3.0, 500.0, 160000.0)
    assert config.qk_rope_head_dim == 32


@pytest.mark.parametrize("preset", PRESETS)
def test_json_round_trip(preset):
    config = ModelConfig.preset(preset)
    text = json.dumps(config.to_json())
    assert ModelConfig.from_json(json.loads(text)) == config


def test_replaced_fields():
    config = ModelConfig.preset("tiny", index_topk=7)
    assert config.index_topk == 7 and config.with_(index_topk=32) == ModelConfig.preset("tiny")
    assert hash(config) != hash(ModelConfig.preset("tiny"))


# --- wrong use ------------------------------------------------------------------------------------


def refused(build, *words: str) -> None:
    """A UserError whose message is one line and holds every word."""
    with pytest.raises(UserError) as caught:
        build()
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, f"{word!r} is not in: {message}"


@pytest.mark.parametrize(("key", "nearest"), [
    ("hidden_sizes", "hidden_size"), ("index_top_k", "index_topk"), ("num_hash_layer", "num_hash_layers"),
])  # fmt: skip
def test_unknown_key_names_the_nearest(key, nearest):
    refused(lambda: ModelConfig.from_json({**PUBLISHED_FLASH, key: 1}), repr(key), f"did you mean {nearest!r}")
    refused(lambda: ModelConfig.preset("tiny", **{key: 1}), repr(key), f"did you mean {nearest!r}")


def test_a_key_like_no_other_is_still_named():
    refused(lambda: ModelConfig.from_json({**PUBLISHED_FLASH, "zzz": 1}), "'zzz'")


def test_unknown_preset_lists_the_presets():
    refused(lambda: ModelConfig.preset("flahs"), "'flahs'", "'flash'", *PRESETS)


@pytest.mark.parametrize("ratios", [(0, 4, 128, 4), (0, 4, 128, 4, 0, 0), ()])
def test_ratio_list_of_the_wrong_length(ratios):
    wrong = {"mtp": 1, "compress_ratios": ratios}
    refused(lambda: small_config((0, 4, 128, 4), **wrong), "compress_ratios", str(len(ratios)), "5")


def test_layers_without_ratios():
    refused(lambda: ModelConfig.from_json({"num_hidden_layers": 3}), "compress_ratios")


@pytest.mark.parametrize(("changes", "words"), [
    ({"compress_ratios": (0, 4, 8, 4)}, ("8", "0", "4", "128")),
    ({"compress_ratios": (0, 4, 128, 4, 4), "num_nextn_predict_layers": 1}, ("MTP", "0")),
    ({"compress_ratios": (0, 4, 128, 4, 0, 0), "num_nextn_predict_layers": 2}, ("num_nextn_predict_layers=2", "1")),
    ({"n_shared_experts": 2}, ("n_shared_experts=2",)),
    ({"qk_rope_head_dim": 7}, ("qk_rope_head_dim=7", "even")),
    ({"qk_rope_head_dim": 64}, ("qk_rope_head_dim=64", "head_dim=32")),
    ({"qk_rope_head_dim": 20}, ("qk_rope_head_dim=20", "index_head_dim=16")),
    ({"o_groups": 3}, ("num_attention_heads=4", "o_groups=3")),
    ({"num_experts_per_tok": 7}, ("num_experts_per_tok=7", "n_routed_experts=6")),
    ({"rope_scaling": RopeScaling(type="linear")}, ("'linear'", "'yarn'")),
    ({"eos_token_id": 97}, ("eos_token_id=97", "vocab_size=97")),
    ({"hidden_size": 0}, ("hidden_size=0", "positive")),
    ({"hidden_size": -4}, ("hidden_size=-4", "positive")),
    ({"hidden_size": "48"}, ("hidden_size='48'", "whole number")),
    ({"hidden_size": 48.0}, ("hidden_size=48.0", "whole number")),
    ({"hc_mult": True}, ("hc_mult=True", "whole number")),
    ({"rms_norm_eps": "small"}, ("rms_norm_eps='small'", "number")),
])  # fmt: skip
def test_rules_between_fields(changes, words):
    refused(lambda: small_config((0, 4, 128, 4), **changes), *words)


@pytest.mark.parametrize(("changes", "words"), [
    ({"model_type": "llama"}, ("model_type", "deepseek_v4")),
    ({"num_key_value_heads": 8}, ("num_key_value_heads", "1")),
    ({"scoring_func": "sigmoid"}, ("scoring_func", "sqrtsoftplus")),
    ({"tie_word_embeddings": True}, ("tie_word_embeddings", "False")),
    ({"rope_scaling": {"type": "yarn", "factor": 16, "mscale": 1.0}}, ("amplitude",)),
    ({"rope_scaling": {"type": "yarn", "factor": 16, "attention_factor": 1.2}}, ("amplitude",)),
    ({"rope_scaling": {"type": "yarn", "facto": 16}}, ("'facto'", "did you mean 'factor'")),
])  # fmt: skip
def test_files_of_another_kind_of_model(changes, words):
    refused(lambda: ModelConfig.from_json({**PUBLISHED_FLASH, **changes}), *words)


@pytest.mark.parametrize(("changes", "words"), [
    ({"compress_rates": {_TYPES[4]: 8}}, ("8", _TYPES[4])),
    ({"layer_types": ["full_attention"] * 43}, ("'full_attention'", _TYPES[0])),
    ({"mlp_layer_types": ["moe"] * 40 + ["hash_moe"] * 3}, ("mlp_layer_types", "first")),
])  # fmt: skip
def test_transformers_files_we_cannot_honour(changes, words):
    refused(lambda: ModelConfig.from_json({**TRANSFORMERS_FLASH, **changes}), *words)


def test_unreadable_files(tmp_path):
    refused(lambda: ModelConfig.from_json(tmp_path), "config.json")
    file = tmp_path / "config.json"
    for content in (b"{", b"", b"\xff\xfe\x00"):
        file.write_bytes(content)
        refused(lambda: ModelConfig.from_json(file), "not valid JSON")
    file.write_text("[1]", encoding="utf-8")
    refused(lambda: ModelConfig.from_json(file), "list")


@pytest.mark.parametrize("changes", [
    {"compress_ratios": 4}, {"compress_ratios": None}, {"compress_ratios": "0404"}, {"compress_ratios": [[0], [4]]},
    {"rope_scaling": 16}, {"rope_scaling": {"type": "yarn", "factor": "many"}},
    {"rope_scaling": {"type": "yarn", "factor": 0}}, {"hidden_size": None}, {"rope_theta": None},
    {"rms_norm_eps": float("nan")}, {"rope_theta": float("inf")}, {"swiglu_limit": True},
])  # fmt: skip
def test_values_of_the_wrong_type_are_told_not_thrown(changes):
    refused(lambda: ModelConfig.from_json({**PUBLISHED_FLASH, **changes}))
