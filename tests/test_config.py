"""Failures caught here: a published count or layer list that is not ours, a spelling of config.json that loads to
something else, a key that is not there read as Flash's, a key or a value that is wrong and passes, an error that does
not say what to do.
"""

import json
import random
from dataclasses import fields
from typing import Any

import pytest
import torch

from dsv4.checkpoint import save
from dsv4.config import (
    CONTROLS,
    PRESETS,
    LayerKind,
    LlamaConfig,
    ModelConfig,
    RopeScaling,
    V32Config,
    kind_of,
    preset_of,
    read_any,
)
from dsv4.config.controls import CONTROL_PRESETS
from dsv4.config.published import ABSENT, REQUIRED
from dsv4.controls import DenseTransformer
from dsv4.cost import parameters
from dsv4.errors import UserError
from dsv4.measure.subjects import small_config
from dsv4.model import Transformer
from dsv4.model.rope import frequencies


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
    kinds = [config.layer_kind(i).name for i in range(config.num_hidden_layers)]
    assert (kinds.count("window"), kinds.count("csa"), kinds.count("hca")) == (window, csa, hca)
    assert config.layer_kind(config.num_hidden_layers).name == "window", "the MTP block is a pure window"
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
UNSAID: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None}  # what inference/config.json does not say


def without(data: dict, *keys: str, **changes) -> dict:
    return {**{key: value for key, value in data.items() if key not in keys}, **changes}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_three_spellings_are_one_configuration(spelling, tmp_path):
    given = SPELLINGS[spelling]
    flash = ModelConfig.preset("flash", **(UNSAID if spelling == "inference" else {}))
    before = json.dumps(given)
    assert ModelConfig.from_json(given) == flash
    assert json.dumps(given) == before, "the caller's dict is not ours to change"
    (tmp_path / "config.json").write_text(json.dumps(given), encoding="utf-8")
    assert ModelConfig.from_json(tmp_path) == ModelConfig.from_json(str(tmp_path / "config.json"))
    assert ModelConfig.from_json(tmp_path) == flash


def test_a_spelling_is_read_and_not_defaulted():
    """Every spelling of every field, moved away from its default, arrives."""
    published = {**PUBLISHED_FLASH, "num_hidden_layers": 3, "compress_ratios": [128, 4, 0, 0], "num_hash_layers": 1,
                 "rope_theta": 500.0, "compress_rope_theta": 7000.0}  # fmt: skip
    published["rope_scaling"] = {**PUBLISHED_FLASH["rope_scaling"], "factor": 3.0, "beta_fast": 20.0}
    inference = {**INFERENCE_FLASH, "n_layers": 3, "compress_ratios": [128, 4, 0, 0], "n_hash_layers": 1,
                 "rope_theta": 500.0, "compress_rope_theta": 7000.0, "rope_factor": 3.0, "beta_fast": 20.0,
                 "bos_token_id": 0, "eos_token_id": 1, "max_position_embeddings": 1048576}  # fmt: skip
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


@pytest.mark.parametrize(
    "changes",
    [{}, {"rope_scaling": None}, {"rope_scaling": {}}, {"rope_scaling": {"type": "default"}},
     {"original_seq_len": 0, "rope_factor": 1}, {"original_seq_len": 0}, {"rope_parameters": None}],
)  # fmt: skip
def test_no_scaling_can_be_said_in_published_words(changes):
    """Left out, it is no scaling, as transformers reads it; it was YaRN 16 x 65536, because Flash has that."""
    config = ModelConfig.from_json({**without(PUBLISHED_FLASH, "rope_scaling"), **changes})
    assert config.rope_scaling == RopeScaling(type="default")


def test_numbers_of_no_scaling_mean_nothing():
    assert RopeScaling("default", 4.0, 128) == RopeScaling("default")


def test_flat_rope_parameters_and_a_rotary_share():
    data = without(
        TRANSFORMERS_FLASH, "qk_rope_head_dim", rope_parameters={**_YARN, "factor": 3.0}, rope_theta=500.0,
        compress_rope_theta=160000.0, head_dim=256,
    )  # fmt: skip
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


# --- other ratios, other attentions -----------------------------------------------------------------

RATES = {"compress_rate_csa": 8, "compress_rate_hca": 32}
MEMORIES = ("dense", "anchors", "lowrank")


def attending(attention: str, **changes: Any) -> ModelConfig:
    rank = {"attention_rank": 8} if attention == "lowrank" else {}
    return small_config((0, 4, 128, 4), attention=attention, **rank, **changes)


def test_a_layer_kind_says_all_that_a_ratio_meant():
    config = small_config((32, 8, 0, 8), **RATES)
    csa, hca = LayerKind("csa", 8, overlap=True, indexed=True), LayerKind("hca", 32, overlap=False, indexed=False)
    window = LayerKind("window", 0, overlap=False, indexed=False)
    assert [config.layer_kind(i) for i in range(4)] == [hca, csa, window, csa]
    assert list(config.trunk_kinds.items()) == [(window, 1), (csa, 2), (hca, 1)]
    assert config.compressed_kinds == (csa, hca)
    assert [kind.ratio for kind in ModelConfig.preset("pro").compressed_kinds] == [4, 128]
    assert small_config((0, 0)).compressed_kinds == ()


@pytest.mark.parametrize("attention", MEMORIES)
def test_the_kinds_of_another_attention(attention):
    """Layers with a ratio are of one kind that pools nothing; a window stays what it is."""
    config = attending(attention, mtp=1)
    window, other = config.trunk_kinds
    assert other == LayerKind(attention, 1, overlap=False, indexed=False) == config.layer_kind(2)
    assert window.name == config.layer_kind(4).name == "window" and config.trunk_kinds[other] == 3
    assert config.compressed_kinds == ()


def test_other_ratios_are_written_under_their_names_and_those_of_v4_are_not():
    """A released file must not change by a key that no other reader needs."""
    config = small_config((0, 8, 32, 8), **RATES)
    data = json.loads(json.dumps(config.to_json()))
    assert (data["compress_rate_csa"], data["compress_rate_hca"]) == (8, 32)
    assert data["layer_types"] == [_TYPES[r] for r in (0, 4, 128, 4)], "transformers knows no other ratios"
    assert ModelConfig.from_json(data) == config
    new = ("compress_rate_csa", "compress_rate_hca", "attention", "attention_rank", "layer_types")
    assert not set(new) & set(ModelConfig.preset("flash").to_json())
    only_csa = small_config((0, 8, 128), compress_rate_csa=8).to_json()
    assert "compress_rate_hca" not in only_csa and ModelConfig.from_json(only_csa).compress_rate_hca == 128


def test_rates_in_the_words_of_transformers():
    """By layer type or by name, alone or both; the ratios of `layer_types` are theirs."""
    by_type = {_TYPES[4]: 8, _TYPES[128]: 32}
    for said in ({"compress_rates": by_type}, {"compress_rates": None, **RATES}, {"compress_rates": by_type, **RATES}):
        config = ModelConfig.from_json({**TRANSFORMERS_FLASH, **said})
        assert (config.compress_rate_csa, config.compress_rate_hca) == (8, 32)
        assert config.trunk_ratios == tuple({0: 0, 4: 8, 128: 32}[r] for r in TRUNK_RATIOS)
    part = {"compress_rates": {_TYPES[4]: 8, _TYPES[0]: 0}}
    assert ModelConfig.from_json({**TRANSFORMERS_FLASH, **part}).compress_rate_hca == 128


@pytest.mark.parametrize("attention", MEMORIES)
def test_another_attention_survives_a_file(attention):
    config = attending(attention)
    data = json.loads(json.dumps(config.to_json()))
    assert data["attention"] == attention and ("attention_rank" in data) == (attention == "lowrank")
    assert ModelConfig.from_json(data) == config
    refused(lambda: ModelConfig.from_json({**data, "attention": attention.upper()}), "attention=")
    refused(lambda: ModelConfig.from_json({**data, "attention_rank": 4.5}), "attention_rank=4.5", "whole number")


def test_another_attention_is_not_said_to_transformers(tmp_path):
    """It would pass the key over and look for the weights of CSA and HCA."""
    model = Transformer(small_config())
    model.config = model.config.with_(attention="dense")
    refused(lambda: save(model, tmp_path / "a", "transformers"), "attention='dense'", "published layout")
    assert not (tmp_path / "a").exists()


# --- what is not there ------------------------------------------------------------------------------


def test_the_table_of_absent_keys_is_whole():
    """Every field is there, in the order of the class; all that decide what is computed are required."""
    assert list(ABSENT) == [f.name for f in fields(ModelConfig)]
    defaults = {name: value for name, value in ABSENT.items() if value is not REQUIRED}
    assert defaults == {
        "compress_rate_csa": 4, "compress_rate_hca": 128,
        "n_shared_experts": 1, "hc_eps": 1e-6, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
        "rope_scaling": RopeScaling("default"), "num_nextn_predict_layers": 0, "initializer_range": 0.02,
        "bos_token_id": None, "eos_token_id": None, "residual": "mhc", "attention": "compressed",
        "attention_rank": 0, "dspark_stages": 0, "dspark_block_size": 0, "dspark_noise_token_id": None,
        "dspark_target_layer_ids": (), "dspark_markov_rank": 0,
    }  # fmt: skip


@pytest.mark.parametrize("key", [key for key, value in ABSENT.items() if value is REQUIRED])
def test_a_key_that_changes_the_model_is_not_guessed(key):
    """Without it the file was read as Flash."""
    unscaled = without(PUBLISHED_FLASH, "rope_scaling")  # with YaRN, the longest position follows
    refused(lambda: ModelConfig.from_json(without(unscaled, key)), f"lacks {key}", "whole config.json")


@pytest.mark.parametrize(("spelling", "key"), [
    ("inference", "n_layers"), ("inference", "route_scale"), ("inference", "compress_rope_theta"),
    ("transformers", "layer_types"), ("transformers", "mlp_layer_types"), ("transformers", "q_lora_rank"),
])  # fmt: skip
def test_nor_is_it_in_the_other_spellings(spelling, key):
    refused(lambda: ModelConfig.from_json(without(SPELLINGS[spelling], key)), "lacks ")


@pytest.mark.parametrize("key", [key for key, value in ABSENT.items() if value is not REQUIRED])
def test_a_default_is_the_formats_own(key):
    """Moved away from the default and then left out: the default, whatever Flash has."""
    config = ModelConfig.from_json(without(PUBLISHED_FLASH, key))
    want = 1 if key == "num_nextn_predict_layers" else ABSENT[key]  # the ratio at the end says that there is one
    assert getattr(config, key) == want


@pytest.mark.parametrize("key", ["factor", "original_max_position_embeddings"])
def test_yarn_without_its_numbers(key):
    scaling = without(PUBLISHED_FLASH["rope_scaling"], key)
    refused(lambda: ModelConfig.from_json({**PUBLISHED_FLASH, "rope_scaling": scaling}), f"YaRN without {key}", "add")


def test_numbers_of_a_scaling_without_its_type():
    scaling = without(PUBLISHED_FLASH["rope_scaling"], "type")
    refused(lambda: ModelConfig.from_json({**PUBLISHED_FLASH, "rope_scaling": scaling}), "no type", "'yarn'")


@pytest.mark.parametrize(("keys", "lacking"), [
    (("rope_factor",), "rope_factor"), (("original_seq_len",), "original_seq_len"),
    (("rope_factor", "original_seq_len"), "original_seq_len"),
])  # fmt: skip
def test_inference_yarn_without_its_numbers(keys, lacking):
    refused(lambda: ModelConfig.from_json(without(INFERENCE_FLASH, *keys)), f"without {lacking}", "add")


def test_betas_are_those_that_all_readers_have():
    short = {"type": "yarn", "factor": 16, "original_max_position_embeddings": 65536}
    assert ModelConfig.from_json({**PUBLISHED_FLASH, "rope_scaling": short}).rope_scaling == RopeScaling()
    assert ModelConfig.from_json(without(INFERENCE_FLASH, "beta_fast", "beta_slow")).rope_scaling == RopeScaling()


def test_the_longest_position_follows_from_yarn_and_from_nothing_else():
    scaling = {**PUBLISHED_FLASH["rope_scaling"], "factor": 4}
    data = without(PUBLISHED_FLASH, "max_position_embeddings", rope_scaling=scaling)
    assert ModelConfig.from_json(data).max_position_embeddings == 4 * 65536
    refused(lambda: ModelConfig.from_json({**data, "rope_scaling": None}), "lacks max_position_embeddings")


def test_one_thing_said_twice_must_agree():
    same = {**PUBLISHED_FLASH, "n_layers": 43, "dim": 4096, "num_local_experts": 256, "intermediate_size": 2048}
    assert ModelConfig.from_json(same) == ModelConfig.preset("flash")
    refused(lambda: ModelConfig.from_json({**same, "dim": 4097}), "dim=4097", "hidden_size=4096")
    refused(lambda: ModelConfig.from_json({**same, "intermediate_size": 18432}), "moe_intermediate_size")
    yarn = {"rope_factor": 16, "original_seq_len": 65536}
    assert ModelConfig.from_json({**PUBLISHED_FLASH, **yarn}) == ModelConfig.preset("flash")
    other = {**PUBLISHED_FLASH, **yarn, "rope_factor": 8}
    refused(lambda: ModelConfig.from_json(other), "rope_scaling and rope_factor")


# --- token ids --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("eos", "kept", "stops"), [
    (1, 1, (1,)), (0, 0, (0,)), (None, None, ()), ([1, 128803], (1, 128803), (1, 128803)), ([], (), ()),
    ([7, 3, 7], (7, 3, 7), (3, 7)),
])  # fmt: skip
def test_stop_ids_of_a_file(eos, kept, stops):
    config = ModelConfig.from_json({**PUBLISHED_FLASH, "eos_token_id": eos})
    assert (config.eos_token_id, config.stop_ids) == (kept, stops)
    assert ModelConfig.from_json(json.loads(json.dumps(config.to_json()))) == config


@pytest.mark.parametrize("eos", [129280, -1, True, 1.0, "1", [1, None], [[1]], {"a": 1}, 2**62])
def test_token_ids_outside_the_vocabulary_or_of_the_wrong_type(eos):
    refused(lambda: ModelConfig.from_json({**PUBLISHED_FLASH, "eos_token_id": eos}), "eos_token_id")
    refused(lambda: ModelConfig.from_json({**PUBLISHED_FLASH, "bos_token_id": eos}), "bos_token_id")


def test_one_bos_at_most():
    assert ModelConfig.from_json({**PUBLISHED_FLASH, "bos_token_id": None}).bos_token_id is None
    refused(lambda: ModelConfig.from_json({**PUBLISHED_FLASH, "bos_token_id": [0]}), "bos_token_id", "one token id")


# --- files from the wild ----------------------------------------------------------------------------

TRUNK_RATIOS = PUBLISHED_FLASH["compress_ratios"][:43]


@pytest.mark.parametrize("ratios", [TRUNK_RATIOS, [*TRUNK_RATIOS, 0]])
@pytest.mark.parametrize("said", [0, None])
def test_no_mtp_block_with_or_without_the_trailing_ratio(ratios, said):
    config = ModelConfig.from_json({**PUBLISHED_FLASH, "num_nextn_predict_layers": said, "compress_ratios": ratios})
    assert config == ModelConfig.preset("flash", num_nextn_predict_layers=0, compress_ratios=tuple(TRUNK_RATIOS))


def test_an_mtp_block_whose_ratio_was_dropped():
    assert ModelConfig.from_json({**PUBLISHED_FLASH, "compress_ratios": TRUNK_RATIOS}) == ModelConfig.preset("flash")


def test_ratios_that_are_neither_the_trunks_nor_an_mtp_blocks():
    for said in (0, None, 1):
        data = {**PUBLISHED_FLASH, "num_nextn_predict_layers": said, "compress_ratios": [*TRUNK_RATIOS, 0, 0]}
        refused(lambda data=data: ModelConfig.from_json(data), "compress_ratios has 45 entries")
    refused(lambda: ModelConfig.from_json({**PUBLISHED_FLASH, "num_nextn_predict_layers": 0,
                                           "compress_ratios": [*TRUNK_RATIOS, 4]}), "compress_ratios")  # fmt: skip


DSPARK = {"dspark_block_size": 5, "dspark_noise_token_id": 128799, "dspark_target_layer_ids": [40, 41, 42],
          "dspark_markov_rank": 256}  # fmt: skip
PRO_DSPARK = {**DSPARK, "dspark_target_layer_ids": [58, 59, 60], "dspark_markov_rank": 512}
RELEASES = [("flash", "flash-0731", DSPARK), ("pro", "pro-0813", PRO_DSPARK)]
FLASH_0731 = {**PUBLISHED_FLASH, **DSPARK, "compress_ratios": [*TRUNK_RATIOS, 0, 0, 0]}


@pytest.mark.parametrize(("before", "release", "drafter"), RELEASES)
def test_the_releases_with_a_drafter(before, release, drafter):
    """V4-Flash-0731 and V4-Pro-0813: the trunk of before, three stages of a drafter, and no MTP block, although their
    num_nextn_predict_layers goes on saying 1."""
    trunk = ModelConfig.preset(before)
    ratios = [*trunk.trunk_ratios, 0, 0, 0]
    data = {**trunk.to_json(), **drafter, "compress_ratios": ratios}
    assert data["num_nextn_predict_layers"] == 1
    config = ModelConfig.from_json(data)
    assert config == ModelConfig.preset(release) and config.num_draft_blocks == config.dspark_stages == 3
    assert config.without_drafts() == trunk.without_drafts()
    assert [config.layer_kind(len(trunk.trunk_ratios) + stage).name for stage in range(3)] == ["window"] * 3
    written = json.loads(json.dumps(config.to_json()))
    assert ModelConfig.from_json(written) == config
    assert written == json.loads(json.dumps(data)), "in the published spelling"


def test_the_inference_file_of_a_release_with_a_drafter():
    data = {**INFERENCE_FLASH, **DSPARK, "n_mtp_layers": 3, "compress_ratios": [*TRUNK_RATIOS, 0, 0, 0]}
    config = ModelConfig.from_json(data)
    assert (config.dspark_stages, config.num_nextn_predict_layers) == (3, 0)
    assert config == ModelConfig.from_json({**data, "compress_ratios": TRUNK_RATIOS}), "the ratios left out"
    refused(lambda: ModelConfig.from_json({**data, "n_mtp_layers": 2}), "n_mtp_layers", "is 2", "3 stages")


def test_a_drafter_without_trailing_ratios_is_counted_by_its_target_layers():
    assert ModelConfig.from_json({**FLASH_0731, "compress_ratios": TRUNK_RATIOS}).dspark_stages == 3


def test_a_drafter_may_be_left_out_by_the_file():
    """Whatever its other keys say; ours are written without them then."""
    config = ModelConfig.from_json({**FLASH_0731, "dspark_stages": 0, "dspark_of_another_day": 1})
    assert config == ModelConfig.preset("flash").without_drafts()
    assert not any(key.startswith("dspark_") for key in config.to_json())


@pytest.mark.parametrize(("changes", "said"), [
    ({"dspark_target_layer_ids": [40, 41, 43]}, ["[40, 41, 43]", "0 to 42", "another model's"]),
    ({"dspark_target_layer_ids": [42, 41, 40]}, ["ascending"]),
    ({"dspark_target_layer_ids": [41, 41, 42]}, ["ascending"]),
    ({"dspark_target_layer_ids": ["40", 41, 42]}, ["dspark_target_layer_ids"]),
    ({"dspark_target_layer_ids": 42}, ["dspark_target_layer_ids"]),
    ({"dspark_target_layer_ids": [True, 41]}, ["dspark_target_layer_ids"]),
    ({"dspark_noise_token_id": 129280}, ["dspark_noise_token_id=129280", "vocab_size=129280"]),
    ({"dspark_noise_token_id": 1.5}, ["dspark_noise_token_id=1.5"]),
    ({"dspark_noise_token_id": [1]}, ["dspark_noise_token_id=[1]", "one token id"]),
    ({"dspark_block_size": 0}, ["3 stages needs dspark_block_size"]),
    ({"dspark_block_size": -5}, ["dspark_block_size=-5"]),
    ({"dspark_block_size": 5.0}, ["whole number"]),
    ({"dspark_markov_rank": 0}, ["needs dspark_markov_rank"]),
    ({"dspark_markov_rank": 2**40}, ["dspark_markov_rank"]),
    ({"dspark_stages": 2}, ["compress_ratios has 46 entries", "dspark_stages = 45"]),
    ({"dspark_stages": -1}, ["dspark_stages=-1"]),
    ({"dspark_n_routed_experts": 128}, ["unknown configuration key 'dspark_n_routed_experts'"]),
    ({"compress_ratios": [*TRUNK_RATIOS, 0, 4, 0]}, ["must be 0"]),
])  # fmt: skip
def test_a_drafter_that_is_not_this_trunk_s_is_refused(changes, said):
    refused(lambda: ModelConfig.from_json({**FLASH_0731, **changes}), *said)


@pytest.mark.parametrize("key", DSPARK)
def test_what_a_drafter_needs_is_not_guessed(key):
    refused(lambda: ModelConfig.from_json(without(FLASH_0731, key)), key, "dspark_stages to 0")
    alone = {**PUBLISHED_FLASH, key: DSPARK[key]}
    refused(lambda: ModelConfig.from_json(alone), *(other for other in DSPARK if other != key))
    value = tuple(DSPARK[key]) if key == "dspark_target_layer_ids" else DSPARK[key]
    refused(lambda: ModelConfig.preset("flash", **{key: value}), key, "dspark_stages is 0")


def test_a_drafter_and_an_mtp_block_are_not_both():
    config = ModelConfig.preset("flash-0731")
    ratios = (*config.compress_ratios, 0)
    refused(lambda: config.with_(num_nextn_predict_layers=1, compress_ratios=ratios), "in the place of the MTP block")


@pytest.mark.parametrize("extra", [
    {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}, {"unsloth_version": "2026.9.1", "unsloth_fixed": True},
    {"quantization": {"group_size": 64, "bits": 4}}, {"_attn_implementation": "eager"}, {"torchscript": False},
    {"task_specific_params": None, "problem_type": None}, {"chunk_size_feed_forward": 0}, {"pruned_heads": {}},
    {"temperature": 0.6, "top_p": 0.95, "do_sample": True, "max_length": 20}, {"is_encoder_decoder": False},
    {"attn_implementation": None, "output_attentions": False, "return_dict": True, "tokenizer_class": None},
    {"compress_rate_csa": 4, "compress_rate_hca": 128},
])  # fmt: skip
def test_keys_that_tools_add_change_nothing(extra):
    assert ModelConfig.from_json({**PUBLISHED_FLASH, **extra}) == ModelConfig.preset("flash")


@pytest.mark.parametrize(("key", "nearest"), [
    ("temperatur_scale", ""), ("attn_temperature", ""), ("swiglu_limits", "swiglu_limit"), ("hc_iters", ""),
    ("expert_groups", ""), ("rope_scalings", "rope_scaling"),
])  # fmt: skip
def test_a_key_that_could_change_the_computation_is_still_refused(key, nearest):
    refused(lambda: ModelConfig.from_json({**PUBLISHED_FLASH, key: 1}), repr(key), nearest)


def test_what_is_written_has_the_keys_that_other_readers_ask_for():
    want = {"hidden_act": "silu", "norm_topk_prob": True, "topk_method": "noaux_tc", "scoring_func": "sqrtsoftplus",
            "num_key_value_heads": 1, "attention_bias": False, "tie_word_embeddings": False}  # fmt: skip
    for preset in PRESETS:
        written = ModelConfig.preset(preset).to_json()
        assert {key: written.get(key) for key in want} == want
        assert "dspark_stages" not in written
        assert any("dspark" in key for key in written) == (ModelConfig.preset(preset).dspark_stages > 0)


# --- the models that V4 is compared with ------------------------------------------------------------

V32 = {
    "model_type": "deepseek_v32",
    **{f.name: getattr(V32Config(), f.name) for f in fields(V32Config) if f.name != "rope_scaling"},
    "rope_scaling": {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "beta_fast": 32,
                     "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0},
}  # fmt: skip
LLAMA = {
    "model_type": "llama", "vocab_size": 32000, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 96, "max_position_embeddings": 512,
}  # fmt: skip


def test_a_control_is_read_as_its_file_says():
    assert read_any(V32) == V32Config()
    scaling = {**V32["rope_scaling"], "factor": 8}
    assert read_any({**V32, "rope_scaling": scaling}) == V32Config(
        rope_scaling=RopeScaling(factor=8, original_max_position_embeddings=4096)
    )
    assert read_any(without(V32, "rope_scaling")) == V32Config(rope_scaling=RopeScaling("default"))
    theta = {"rope_type": "default", "rope_theta": 500000.0}
    llama = read_any({**LLAMA, "rope_parameters": theta, "rms_norm_eps": 1e-5})
    assert isinstance(llama, LlamaConfig)
    assert (llama.rope_theta, llama.rms_norm_eps, llama.rope_type) == (500000.0, 1e-5, "default")


@pytest.mark.parametrize("config", [*CONTROLS.values(), *(c for p in CONTROL_PRESETS.values() for c in p.values())])
def test_what_a_control_writes_is_read_back_unchanged(config):
    written = config.with_(bos_token_id=3, eos_token_id=[7, 5], initializer_range=0.01)
    assert written.stop_ids == (5, 7) and written.eos_token_id == (7, 5)
    for c in (config, written, written.with_(rms_norm_eps=1e-4)):
        assert read_any(json.loads(json.dumps(c.to_json()))) == c
    refused(lambda: config.with_(vocab_sise=3), "unknown configuration key 'vocab_sise'", "vocab_size")
    refused(lambda: config.with_(eos_token_id=config.vocab_size), "eos_token_id", "below vocab_size")
    refused(lambda: config.with_(bos_token_id=[1]), "bos_token_id", "one token id")


def test_a_context_extension_of_a_llama_is_written_as_it_was_read():
    llama = LlamaConfig(rope_type="llama3")
    assert read_any(llama.to_json()) == llama


@pytest.mark.parametrize("name", ["tiny", "small"])
def test_the_controls_presets_are_as_large_as_v4s(name):
    """Parameters of the trunk within a tenth, at the same width, depth, vocabulary and context."""
    v4 = ModelConfig.preset(name)
    for kind in CONTROL_PRESETS:
        config = preset_of(kind, name)
        assert abs(parameters(config)["total"] / parameters(v4)["total"] - 1) < 0.1
        for field in ("hidden_size", "num_hidden_layers", "vocab_size", "max_position_embeddings"):
            assert getattr(config, field) == getattr(v4, field)
        assert kind_of(config) == kind


def test_a_llama_with_a_context_extension_is_counted_and_not_computed_without_it():
    llama = read_any({**LLAMA, "rope_scaling": {"rope_type": "llama3", "factor": 8.0}})
    assert isinstance(llama, LlamaConfig) and llama.rope_type == "llama3"
    refused(lambda: DenseTransformer(llama), "'llama3'", "counted, not computed")


def test_a_key_that_a_control_lacks_is_not_that_of_405b():
    llama = read_any(LLAMA)
    assert isinstance(llama, LlamaConfig)
    assert (llama.rms_norm_eps, llama.rope_theta) == (1e-6, 10000.0), "transformers' defaults"
    assert (llama.num_key_value_heads, llama.head_dim) == (4, 16)


@pytest.mark.parametrize("key", [f.name for f in fields(V32Config) if f.type is int] + ["routed_scaling_factor"])
def test_a_control_without_a_size(key):
    refused(lambda: read_any(without(V32, key)), f"lacks {key!r}")


@pytest.mark.parametrize(("changes", "words"), [
    ({"rope_scaling": {"type": "yarn"}}, ("YaRN without factor",)),
    ({"rope_scaling": without(V32["rope_scaling"], "mscale")}, ("mscale=None", "add")),
    ({"rope_scaling": {**V32["rope_scaling"], "mscale_all_dim": 0.7}}, ("mscale_all_dim=0.7",)),
    ({"rope_scaling": 3}, ("rope_scaling=3",)),
    ({"scoring_func": "softmax"}, ("scoring_func", "sigmoid")),
    ({"hidden_size": 2**62}, ("hidden_size", "out of range")),
    ({"rms_norm_eps": "x"}, ("rms_norm_eps='x'",)),
    ({"rms_norm_eps": float("nan")}, ("rms_norm_eps=nan",)),
    ({"num_hidden_layers": True}, ("num_hidden_layers=True",)),
    ({"model_type": ["llama"]}, ("model_type",)),
])  # fmt: skip
def test_a_control_that_is_another_model(changes, words):
    refused(lambda: read_any({**V32, **changes}), *words)


@pytest.mark.parametrize("changes", [
    {"num_attention_heads": "4"}, {"num_attention_heads": 0}, {"hidden_size": None}, {"rope_scaling": 3},
    {"hidden_act": "gelu"}, {"mlp_bias": True}, {"rope_parameters": {"rope_theta": None}}, {"head_dim": [1]},
])  # fmt: skip
def test_a_llama_that_is_another_model(changes):
    refused(lambda: read_any({**LLAMA, **changes}))


# --- anything at all --------------------------------------------------------------------------------

_DEEP: Any = [0]
for _ in range(500):
    _DEEP = [_DEEP]
ANYTHING: list[Any] = [
    None, True, False, 0, 1, -1, 3, 2**31, 2**62, 2**63, 10**400, 0.5, 1e-300, 1e308, float("inf"), float("-inf"),
    float("nan"), "", "x", "4096", [], [0], [[]], [None], ["x"], [2**62], [1e400], {}, {"type": "yarn"}, {"a": {}},
    {"main": None, "compress": None}, {"main": {}, "compress": {}}, {"type": []}, {"rope_type": {}}, {"type": "yarn",
    "factor": 2**62, "original_max_position_embeddings": 2**62}, "y" * 100_000, _DEEP, [0] * 100_000,
]  # fmt: skip


def judged(data: dict) -> bool:
    """Read to a configuration (True) or refused in one line of bearable length; anything else is a failure."""
    try:
        config = ModelConfig.from_json(data)
    except UserError as error:
        assert "\n" not in str(error) and len(str(error)) < 1000
        return False
    assert isinstance(config, ModelConfig) and ModelConfig.from_json(config.to_json()) == config
    assert all(frequencies(config, table).isfinite().all() for table in ("window", "compressed"))
    return True


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_key_with_every_kind_of_value(spelling):
    """A traceback, a list of 2**62 layers, or a message that holds the file."""
    outcomes = [judged({**SPELLINGS[spelling], key: value}) for key in SPELLINGS[spelling] for value in ANYTHING]
    assert 0 < sum(outcomes) < len(outcomes) // 2


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_nested_keys_with_every_kind_of_value(spelling):
    data = SPELLINGS[spelling]
    paths = [(key,) for key in data if isinstance(data[key], dict)]
    paths = [(*path, key) for path in paths for key in data[path[0]]]
    paths += [("rope_parameters", part, key) for part in ("main", "compress") for key in _YARN]
    for path in paths:
        for value in ANYTHING:
            changed = json.loads(json.dumps(data))
            inner = changed
            for key in path[:-1]:
                inner = inner.setdefault(key, {})
            inner[path[-1]] = value
            judged(changed)


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_random_changes(spelling):
    """Several keys at once, moved, dropped, doubled in another spelling, of any kind: 400 files."""
    draw = random.Random(spelling)
    everything = {**PUBLISHED_FLASH, **INFERENCE_FLASH, **TRANSFORMERS_FLASH, **DSPARK}
    for _ in range(400):
        data = dict(SPELLINGS[spelling])
        for _ in range(draw.randint(1, 4)):
            key = draw.choice(list(everything))
            change = draw.random()
            if change < 0.2:
                data.pop(key, None)
            elif change < 0.4:
                data[key] = everything[key]
            elif change < 0.5:
                data[key] = draw.choice(list(everything.values()))
            else:
                data[key] = draw.choice(ANYTHING)
        judged(data)


@pytest.mark.parametrize("field", [f.name for f in fields(ModelConfig) if f.type is int])
def test_sizes_have_upper_bounds(field):
    """2**62 layers are refused before anything is built; so is the first size above each bound."""
    refused(lambda: ModelConfig(**{field: 2**62}), field)
    refused(lambda: ModelConfig(**{field: 2**31 + 1}), field)


def test_the_largest_sizes_can_be_built_on_the_meta_device():
    """No tensor's shape overflows at the bounds (two layers of it)."""
    largest = ModelConfig(
        vocab_size=2**24, hidden_size=2**18, num_hidden_layers=2, compress_ratios=(4, 128, 0),
        num_attention_heads=2**12, head_dim=2**14, q_lora_rank=2**18, o_groups=2**12, o_lora_rank=2**18,
        sliding_window=2**20, index_n_heads=2**12, index_head_dim=2**14, index_topk=2**24,
        moe_intermediate_size=2**18, n_routed_experts=2**14, num_experts_per_tok=2**10, hc_mult=2**6,
    )  # fmt: skip
    assert on_meta(largest).num_parameters() > 2**50


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
    ({"compress_rate_csa": 1}, ("compress_rate_csa=1", "2 .. 4,096")),
    ({"compress_rate_csa": 4.0}, ("compress_rate_csa=4.0", "whole number")),
    ({"compress_rate_hca": 8192}, ("compress_rate_hca=8192", "2 .. 4,096")),
    ({"compress_rate_hca": 4}, ("compress_rate_hca=4", "compress_rate_csa=4", "not the same")),
    ({"compress_rate_hca": 130}, ("compress_rate_hca=130", "multiple of compress_rate_csa=4")),
    ({"compress_rate_hca": 2}, ("compress_rate_hca=2", "multiple of compress_rate_csa=4")),
    ({"compress_rate_hca": 64}, ("compress ratio 128", "64 (compress_rate_hca)")),
    ({"attention": "Dense"}, ("attention='Dense'", "did you mean 'dense'", "compressed, dense, anchors, lowrank")),
    ({"attention": None}, ("attention=None",)),
    ({"attention": ["dense"]}, ("attention=['dense']",)),
    ({"attention": "lowrank"}, ("lowrank", "attention_rank")),
    ({"attention": "lowrank", "attention_rank": 25}, ("attention_rank=25", "head_dim=32", "qk_rope_head_dim=8")),
    ({"attention": "lowrank", "attention_rank": -1}, ("attention_rank=-1", "positive")),
    ({"attention": "dense", "attention_rank": 16}, ("attention_rank=16", "lowrank", "'dense'")),
    ({"attention_rank": 16}, ("attention_rank=16", "lowrank", "'compressed'")),
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
    ({"rope_scaling": {**PUBLISHED_FLASH["rope_scaling"], "mscale": 1.0}}, ("amplitude", "mscale")),
    ({"rope_scaling": {**PUBLISHED_FLASH["rope_scaling"], "attention_factor": 1.2}}, ("amplitude",)),
    ({"rope_scaling": {**PUBLISHED_FLASH["rope_scaling"], "attention_factor": None}}, ("amplitude",)),
    ({"rope_scaling": {**PUBLISHED_FLASH["rope_scaling"], "truncate": False}}, ("truncate=False",)),
    ({"rope_scaling": {**PUBLISHED_FLASH["rope_scaling"], "rope_type": "linear"}}, ("rope_type", "'yarn'")),
    ({"attention_dropout": 0.1}, ("attention_dropout", "0.0")),
    ({"norm_topk_prob": 1}, ("norm_topk_prob", "True")),
    ({"num_key_value_heads": True}, ("num_key_value_heads", "1")),
    ({"pruned_heads": {"0": [1]}}, ("pruned_heads",)),
    ({"compress_rate_csa": 8}, ("compress ratio 4", "8 (compress_rate_csa)", "128 (compress_rate_hca)")),
    ({"rope_scaling": {"type": "yarn", "facto": 16}}, ("'facto'", "did you mean 'factor'")),
])  # fmt: skip
def test_files_of_another_kind_of_model(changes, words):
    refused(lambda: ModelConfig.from_json({**PUBLISHED_FLASH, **changes}), *words)


@pytest.mark.parametrize(("changes", "words"), [
    ({"compress_rates": {_TYPES[4]: 8}, "compress_rate_csa": 4}, ("8", _TYPES[4], "compress_rate_csa=4")),
    ({"compress_rates": {_TYPES[0]: 2}}, ("2", _TYPES[0], "only CSA and HCA")),
    ({"compress_rates": {_TYPES[4]: 8}, "compress_ratios": [0, 0, *[4, 128] * 20, 4]},
     ("layer_types", "rate of 8 for CSA", "compress_ratios", "disagree")),
    ({"compress_rates": {_TYPES[4]: 8, _TYPES[128]: 8}}, ("compress_rate_hca=8", "compress_rate_csa=8")),
    ({"compress_rates": {_TYPES[4]: "8"}}, ("compress_rate_csa='8'", "whole number")),
    ({"compress_rates": [4, 128]}, ("compress_rates=[4, 128]", "an object")),
    ({"layer_types": ["full_attention"] * 43}, ("'full_attention'", _TYPES[0])),
    ({"mlp_layer_types": ["moe"] * 40 + ["hash_moe"] * 3}, ("mlp_layer_types", "first")),
    ({"mlp_layer_types": ["hash_moe"] * 3 + ["sparse"] * 40}, ("mlp_layer_types", "'sparse'")),
    ({"mlp_layer_types": ["hash_moe"] * 3}, ("mlp_layer_types", "3 entries")),
    ({"num_hash_layers": 2}, ("mlp_layer_types", "num_hash_layers", "disagree")),
    ({"compress_ratios": [0] * 44}, ("layer_types", "compress_ratios", "disagree")),
    ({"rope_parameters": {"main": _PLAIN}}, ("both main and compress",)),
    ({"rope_parameters": {"compress": _YARN}}, ("both main and compress",)),
    ({"rope_parameters": {"main": _YARN, "compress": _YARN}}, ("rope_parameters.main", "scaling")),
    ({"rope_parameters": {"main": _PLAIN, "compress": without(_YARN, "attention_factor")}}, ("attention_factor 1.0",)),
    ({"rope_parameters": {"main": _PLAIN, "compress": without(_YARN, "rope_theta")}}, ("compress lacks rope_theta",)),
    ({"rope_parameters": {"main": _PLAIN, "compress": without(_YARN, "factor")}}, ("without factor",)),
    ({"rope_parameters": {"main": _PLAIN, "compress": without(_YARN, "rope_type")}}, ("no type",)),
    ({"rope_scaling": {**PUBLISHED_FLASH["rope_scaling"], "factor": 8}}, ("rope_scaling and rope_parameters",)),
    ({"partial_rotary_factor": 0.25}, ("qk_rope_head_dim=64", "partial_rotary_factor=0.25")),
    ({"partial_rotary_factor": 2}, ("partial_rotary_factor=2",)),
])  # fmt: skip
def test_transformers_files_we_cannot_honour(changes, words):
    refused(lambda: ModelConfig.from_json({**TRANSFORMERS_FLASH, **changes}), *words)


def test_unreadable_files(tmp_path):
    refused(lambda: ModelConfig.from_json(tmp_path), "config.json")
    file = tmp_path / "config.json"
    for content in (b"{", b"", b"[" * 200_000 + b"]" * 200_000, b'{"a":' * 200_000, b'{"vocab_size": 1' + b"0" * 5000):
        file.write_bytes(content)
        refused(lambda: ModelConfig.from_json(file), "not valid JSON", str(file))
    file.write_bytes(b"\xff\xfe\x00")
    refused(lambda: ModelConfig.from_json(file), "not UTF-8", str(file))
    refused(lambda: ModelConfig.from_json("x" * 5000), "xxx")
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
