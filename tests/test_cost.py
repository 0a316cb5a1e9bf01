"""Failures caught here: a count that is not the model's; a published figure that is no longer reproduced; a cost that
falls when the context grows; a format that changes what it should not; a wrong question answered instead of refused.
"""

import json
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from dsv4 import ModelConfig, Transformer, UserError
from dsv4.cli import application
from dsv4.config import CONTROLS, PRESETS, AnyConfig, read_any
from dsv4.cost import (
    compare,
    decode,
    flops_by_component,
    flops_per_token,
    hardware,
    kv_bytes,
    parameters,
    prefill,
    report,
    train,
    weighted,
)
from dsv4.cost.causes import (
    CACHE_CAUSES,
    FLOP_CAUSES,
    bundled,
    cache_causes,
    cache_switched,
    flops_causes,
    flops_switched,
    shapley,
    verdicts,
)
from dsv4.cost.flops import KINDS, SCHEMES, attended, by_component, scheme_weights
from dsv4.cost.params import active_by_component, active_bytes, families, mtp_families, on_file, weight_bytes

K = 1024
MILLION = 1024 * K
MODELS: dict[str, AnyConfig] = {
    "pro": ModelConfig.preset("pro"), "flash": ModelConfig.preset("flash"), **CONTROLS
}  # fmt: skip
EVERY = {**PRESETS, **CONTROLS}
TINY = ModelConfig.preset("tiny", num_nextn_predict_layers=0, compress_ratios=(0, 4, 128, 4, 128))
OTHERS = {  # one window layer and four of another attention
    "dense": TINY.with_(attention="dense"), "anchors": TINY.with_(attention="anchors"),
    "lowrank": TINY.with_(attention="lowrank", attention_rank=8),
}  # fmt: skip
RATES = TINY.with_(compress_rate_csa=8, compress_rate_hca=32, compress_ratios=(0, 8, 32, 8, 32))
EVERY |= {f"tiny, {name}": config for name, config in OTHERS.items()} | {"tiny, ratios 8 and 32": RATES}
NAMES, FORMATS = st.sampled_from(sorted(EVERY)), st.sampled_from(kv_bytes.FORMATS)
CONTEXT = st.integers(1, 4 * MILLION)


# --- parameters ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PRESETS)
def test_counted_parameters_are_those_of_the_model(name: str) -> None:
    config = ModelConfig.preset(name)
    with torch.device("meta"):
        model = Transformer(config)
    counted = parameters(config)
    assert counted["total"] == model.num_parameters()
    assert counted["total"] + counted["mtp"] == model.num_parameters(mtp=True)
    biases = sum(b.numel() for n, b in model.named_buffers() if n.endswith("gate.bias") and not n.startswith("mtp."))
    assert counted["routing_biases"] == biases


@pytest.mark.parametrize("name", PRESETS)
def test_every_tensor_belongs_to_one_family_of_its_size(name: str) -> None:
    """Family by family, not only in total: routing biases too, the MTP block apart."""
    config = ModelConfig.preset(name)
    with torch.device("meta"):
        model = Transformer(config)
    tensors = dict(model.named_parameters()) | {n: b for n, b in model.named_buffers() if n.endswith("gate.bias")}
    for of_mtp, found in ((False, families(config)), (True, mtp_families(config))):
        sizes = dict.fromkeys((f.name for f in found), 0)
        for tensor_name, tensor in tensors.items():
            if tensor_name.startswith("mtp.") == of_mtp:
                (family,) = [f for f in found if f.matches(tensor_name)]
                sizes[family.name] += tensor.numel()
        assert sizes == {f.name: f.count for f in found}


def test_published_counts() -> None:
    """To the last unit, without the routing biases, which are buffers, and with them."""
    counted = {name: parameters(config) for name, config in MODELS.items()}
    assert {name: p["total"] for name, p in counted.items()} == {
        "pro": 1_572_997_179_491, "flash": 284_332_230_231, "v3.2": 671_877_929_216, "llama-405b": 405_853_388_800,
    }  # fmt: skip
    assert {name: p["routing_biases"] for name, p in counted.items()} == {
        "pro": 22_272, "flash": 10_240, "v3.2": 14_848, "llama-405b": 0,
    }  # fmt: skip
    assert {name: p["active"] for name, p in counted.items()} == {
        "pro": 48_852_402_019, "flash": 13_270_101_591, "v3.2": 37_477_143_296, "llama-405b": 403_752_042_496,
    }  # fmt: skip
    assert counted["flash"]["total"] + counted["flash"]["mtp"] == 290_942_278_866
    assert round((counted["pro"]["total"] + counted["pro"]["mtp"]) / 1e7) == 159_884


def test_bytes_of_the_released_files() -> None:
    """Elements and bytes of all shards with MTP, scales and hash tables; the listing of Pro's files says the same."""
    elements, size = on_file(ModelConfig.preset("pro"))
    assert elements == 861_608_274_846 and f"{size / 2**30:.2f}" == "805.32"
    assert f"{on_file(ModelConfig.preset('flash'))[1] / 1e9:.1f}" == "159.6"


def test_active_bytes() -> None:
    assert {name: active_bytes(config) for name, config in MODELS.items()} == {
        "pro": 39_666_618_316, "flash": 11_217_580_252, "v3.2": 38_548_208_144, "llama-405b": 807_504_117_760,
    }  # fmt: skip
    assert active_bytes(CONTROLS["llama-405b"], "fp8") == 405_882_081_280


@pytest.mark.parametrize("name", EVERY)
def test_a_batch_reads_more_weights_but_never_more_than_all(name: str) -> None:
    config = EVERY[name]
    reads = [active_bytes(config, "published", batch) for batch in (1, 2, 8, 64, 4096)]
    rows = 2 * config.hidden_size  # embedding rows are read once for each token
    assert reads == sorted(reads)
    assert reads[-1] <= weight_bytes(config) + 4096 * rows
    assert reads[1] < 2 * reads[0]


# --- FLOPs -----------------------------------------------------------------------------------------------------------


def test_rows_that_a_query_reads() -> None:
    flash = ModelConfig.preset("flash")
    for layer, entries in ((0, 0), (2, 512), (3, 8192)):  # window, CSA, HCA
        assert attended(flash, flash.layer_kind(layer), 1 << 20) == 128 + entries
    assert attended(flash, flash.layer_kind(2), 7) == 7 + 1


AT_A_MILLION = {  # scheme: V3.2, Pro, Flash
    "A": (1157720178688, 303261155328, 140353208320), "B": (1157720178688, 238836645888, 95256051712),
    "C": (1196685131776, 319491407872, 120714690560), "D": (1196685131776, 327678689280, 123600371712),
    "E": (1192516124672, 315508523008, 118861594624), "F": (1196685131776, 307402375168, 117468299264),
    "G": (1192978415616, 315364474880, 118427222016), "H": (1082767966208, 205520896000, 113799856128),
    "I": (1117563912192, 217768263680, 92308242432), "J": (148713111552, 255066898432, 75617533952),
}  # fmt: skip


@pytest.mark.parametrize("scheme", SCHEMES)
def test_flops_of_every_scheme(scheme: str) -> None:
    assert tuple(weighted(decode(MODELS[n], MILLION), scheme) for n in ("v3.2", "pro", "flash")) == AT_A_MILLION[scheme]


def test_llama_costs() -> None:
    """In T of FP8 equivalents, from 4K to 1M."""
    costs = [weighted(decode(CONTROLS["llama-405b"], n * K), "C") / 1e12 for n in (4, 128, 1024)]
    assert [round(c, 4) for c in costs] == [1.6826, 3.7797, 18.9323]


def head_flops(config: AnyConfig) -> int:
    return 2 * config.vocab_size * config.hidden_size


@pytest.mark.parametrize("name", [*PRESETS, *CONTROLS])
@pytest.mark.parametrize("tokens", [1, 3, 127, 128, 129, 515, 2500])
def test_a_prompt_is_the_sum_of_its_tokens(name: str, tokens: int) -> None:
    config = EVERY[name]
    one_by_one = sum(flops_per_token(config, t) for t in range(1, tokens + 1))
    assert weighted(prefill(config, tokens)) == one_by_one - (tokens - 1) * head_flops(config)


def test_a_training_token_costs_three_forward_ones() -> None:
    """But for the indexer, which has no backward pass; the MTP block comes on top, with the head once more."""
    config, n = ModelConfig.preset("small"), 300
    forward = by_component(prefill(config, n)) | {"head": n * head_flops(config)}
    trained = by_component(train(config, n))
    mtp = trained.pop("MTP")
    assert {k: v / forward[k] for k, v in trained.items()} == {k: 1 if k.startswith("indexer") else 3 for k in forward}
    d, active = config.hidden_size, active_by_component(config)
    layers = config.num_hidden_layers
    like_a_layer = active["experts"] / layers + active["router"] / layers + 2 * d * d + head_flops(config) / 2
    assert mtp > 3 * (n - 1) * 2 * like_a_layer
    assert "MTP" not in by_component(train(config, n, mtp=False))


def test_weights_of_ones_own() -> None:
    work = decode(ModelConfig.preset("flash"), MILLION)
    assert weighted(work, {"core": 2, "idx4": 0.5, **dict.fromkeys(("absorb", "aux", "head", "mhc", "llm"), 2)}) == (
        weighted(work, "C")
    )
    assert weighted(work, {"sum": 1}) - weighted(work, "A") == 21 * 2 * 64 * (MILLION // 4)


@given(NAMES, CONTEXT, CONTEXT, st.sampled_from("ACHI"))
def test_flops_grow_with_the_context_and_are_sums_of_components(name: str, a: int, b: int, scheme: str) -> None:
    config, (a, b) = EVERY[name], sorted((a, b))
    for count in (decode, prefill, train):
        assert weighted(count(config, a), scheme) <= weighted(count(config, b), scheme)
    work = decode(config, b)
    assert sum(by_component(work, scheme).values()) == pytest.approx(weighted(work, scheme), rel=1e-12)


def windows_only(config: ModelConfig) -> ModelConfig:
    return config.with_(compress_ratios=(0,) * len(config.compress_ratios))


@given(st.sampled_from(["tiny", "small", "flash", "pro"]), st.integers(1, MILLION))
def test_ratio_zero_everywhere_is_plain_window_attention(name: str, context: int) -> None:
    """No indexer, no compressor, a core and a cache that stop growing at the window."""
    k = windows_only(ModelConfig.preset(name))
    parts = flops_by_component(k, context)
    rows = min(context, k.sliding_window)
    assert parts["core: window"] == k.num_hidden_layers * 4 * k.num_attention_heads * k.head_dim * rows
    assert not [p for p in parts if "indexer" in p or "compressor" in p or p in ("core: csa", "core: hca")]
    row = kv_bytes.row_bytes(k, "published")[0]
    assert kv_bytes.held(k, context) == {"window: window": k.num_hidden_layers * rows * row}


# --- cache bytes -----------------------------------------------------------------------------------------------------

HELD = {
    4: (43879168, 29814784, 196886528, 2113929216), 16: (105705472, 72997888, 787546112, 8455716864),
    32: (188140544, 130575360, 1575092224, 16911433728), 64: (353010688, 245730304, 3150184448, 33822867456),
    128: (682750976, 476040192, 6300368896, 67645734912), 256: (1342231552, 936659968, 12600737792, 135291469824),
    512: (2661192704, 1857899520, 25201475584, 270582939648),
    1024: (5299115008, 3700378624, 50402951168, 541165879296),
}  # fmt: skip
READ = {
    4: (27626240, 13049856, 114933760, 2113929216), 32: (46304256, 25902080, 345800704, 16911433728),
    128: (110343168, 69966848, 1137344512, 67645734912), 1024: (708039680, 481238016, 8525086720, 541165879296),
}  # fmt: skip


@pytest.mark.parametrize("thousands", HELD)
def test_bytes_held(thousands: int) -> None:
    assert tuple(sum(kv_bytes.held(c, thousands * K).values()) for c in MODELS.values()) == HELD[thousands]


@pytest.mark.parametrize("thousands", READ)
def test_bytes_read(thousands: int) -> None:
    assert tuple(sum(kv_bytes.read(c, thousands * K).values()) for c in MODELS.values()) == READ[thousands]


def test_row_sizes() -> None:
    pro, v32 = MODELS["pro"], MODELS["v3.2"]
    assert [kv_bytes.row_bytes(pro, f) for f in kv_bytes.FORMATS] == [(584, 68), (584, 132), (1024, 256), (2048, 512)]
    assert [kv_bytes.row_bytes(v32, f) for f in kv_bytes.FORMATS] == [(656, 132), (656, 132), (1152, 256), (2304, 512)]


def test_two_numbers_per_layer_kind() -> None:
    """163 bytes per token and CSA layer, 584 / 128 per HCA layer; what does not grow stands apart."""
    two = kv_bytes.fixed_and_per_token(MODELS["pro"])
    assert float(two["csa"][1]) == 30 * 163 and float(two["hca"][1]) == 31 * 584 / 128
    assert two["csa"][0] == 30 * (128 * 584 + 8 * 2 * 8 * (512 + 128))
    context = 512 * K
    assert sum(f + int(p * context) for f, p in two.values()) == sum(kv_bytes.held(MODELS["pro"], context).values())


@given(NAMES, CONTEXT, CONTEXT, FORMATS)
def test_bytes_grow_with_the_context(name: str, a: int, b: int, format: str) -> None:
    config, (a, b) = EVERY[name], sorted((a, b))
    for count in (kv_bytes.held, kv_bytes.read):
        assert sum(count(config, a, format).values()) <= sum(count(config, b, format).values())
    held, read = kv_bytes.held(config, b, format), kv_bytes.read(config, b, format)
    assert all(size <= held[part] for part, size in read.items()), "no more is read than is held"
    exact, paged = (sum(kv_bytes.held(config, b, format, page_tokens=n).values()) for n in (1, 256))
    growing = (s for s in kv_bytes.stores(config, format) if s.per_token)
    assert exact <= paged <= exact + sum(s.layers * s.row_bytes * -(-256 // s.every) for s in growing)


@given(st.sampled_from(["tiny", "bench", "flash", "pro", "v3.2"]), st.integers(1, MILLION))
def test_a_format_changes_only_what_it_should(name: str, context: int) -> None:
    """FP8 index keys change the keys; BF16 to FP32 doubles rows and leaves the fp32 open groups; no FLOP changes."""
    config = EVERY[name]
    held = {f: kv_bytes.held(config, context, f) for f in kv_bytes.FORMATS}
    assert {p for p in held["fp8"] if held["fp8"][p] != held["published"][p]} <= {"csa: index keys"}
    for part, size in held["bfloat16"].items():
        assert held["float32"][part] == (size if "open groups" in part else 2 * size)
    assert set(held["published"]) == set(held["float32"])


@given(st.sampled_from(sorted(PRESETS)), st.sampled_from(kv_bytes.FORMATS))
def test_weight_formats_change_weights_alone(name: str, dtype: str) -> None:
    config = EVERY[name]
    elements = sum(f.count for f in families(config))
    assert weight_bytes(config, "bfloat16") < weight_bytes(config, "float32") == 4 * elements
    assert weight_bytes(config, "published") <= weight_bytes(config, "fp8") <= weight_bytes(config, "bfloat16")
    assert active_bytes(config, dtype) <= weight_bytes(config, dtype)


# --- machines --------------------------------------------------------------------------------------------------------


def test_roofline_of_one_h200() -> None:
    """Milliseconds for memory and for compute, tokens per second, FLOPs per byte, at batch 1."""
    h200 = hardware.machine("h200")
    want = {
        ("v3.2", 4): (8.05, 0.077, 124, 2.9), ("pro", 4): (8.27, 0.062, 121, 2.7),
        ("flash", 4): (2.34, 0.017, 427, 2.6), ("v3.2", 1024): (9.81, 0.605, 102, 24.6),
        ("pro", 1024): (8.41, 0.194, 119, 7.5), ("flash", 1024): (2.44, 0.084, 410, 12.0),
        ("llama-405b", 1024): (280.97, 9.567, 4, 7.0),
    }  # fmt: skip
    for (name, thousands), (memory, compute, rate, intensity) in want.items():
        step = hardware.step(MODELS[name], h200, thousands * K)
        assert round(1e3 * step.memory_seconds, 2) == memory and round(1e3 * step.compute_seconds, 3) == compute
        assert round(step.tokens_per_second) == rate and step.bound == "memory"
        assert round(step.flops / (step.weight_bytes + step.cache_bytes), 1) == intensity


def test_what_fits_on_eight_h200() -> None:
    eight = hardware.machine("H200x8")
    fits = {name: hardware.sequences(config, eight, MILLION) for name, config in MODELS.items() if name != "llama-405b"}
    assert fits == {"pro": 31, "flash": 232, "v3.2": 6}
    assert hardware.sequences(CONTROLS["llama-405b"], eight, MILLION, "fp8") == 1
    assert hardware.sequences(MODELS["pro"], hardware.machine("h200"), MILLION) == -1


@given(
    st.sampled_from(["flash", "pro", "v3.2"]), st.sampled_from(sorted(hardware.ACCELERATORS)), st.integers(1, 256),
    st.integers(1, 512), st.integers(1, MILLION), st.sampled_from(kv_bytes.FORMATS),
)  # fmt: skip
def test_steps_grow_with_batch_and_context(
    name: str, device: str, count: int, batch: int, context: int, dtype: str
) -> None:
    config, on = MODELS[name], hardware.machine(f"{device}x{count}")
    step, wider, longer = (
        hardware.step(config, on, c, b, dtype)
        for c, b in ((context, batch), (context, batch + 1), (context + 1000, batch))
    )
    for more in (wider, longer):
        assert more.memory_seconds >= step.memory_seconds and more.compute_seconds >= step.compute_seconds
    assert wider.batch / wider.seconds >= step.batch / step.seconds * (1 - 1e-9), "a batch never costs throughput"
    assert hardware.sequences(config, on, context + 1000, dtype) <= hardware.sequences(config, on, context, dtype)


def test_the_smallest_machine_serves_the_load_and_a_smaller_one_does_not() -> None:
    flash = MODELS["flash"]
    found = hardware.smallest(flash, MILLION, 8, 30.0)
    assert found == sorted(found, key=lambda m: (m.usable_bytes, m.count)) and len(found) > 10
    for on in found:
        assert hardware.sequences(flash, on, MILLION) >= 8
        assert hardware.step(flash, on, MILLION, 8).tokens_per_second >= 30
        fewer = [n for n in hardware.COUNTS if n < on.count]
        if fewer:
            less = hardware.Machine(on.device, fewer[-1])
            fits = hardware.sequences(flash, less, MILLION) >= 8
            assert not fits or hardware.step(flash, less, MILLION, 8).tokens_per_second < 30


def test_the_table_of_accelerators_is_plausible() -> None:
    """Wider formats are never faster, and every row says where it is from."""
    for a in hardware.ACCELERATORS.values():
        rates = [a.flops(f) for f in ("fp4", "fp8", "bf16", "fp32")]
        assert rates == sorted(rates, reverse=True) and a.source
        assert 10 < a.memory < 400 and 0.1 < a.bandwidth < 10


def test_critical_batch() -> None:
    batches = [round(hardware.critical_batch(MODELS[n], MILLION)) for n in ("v3.2", "pro", "flash")]
    assert batches == [5, 56, 23]


# --- other ratios, other attentions ----------------------------------------------------------------------------------


def test_other_ratios_are_counted() -> None:
    """Of the model on the meta device to the unit; groups of 8 and 32 in place of 4 and 128, by hand."""
    with torch.device("meta"):
        model = Transformer(RATES)
    assert parameters(RATES)["total"] == model.num_parameters()
    for family in families(RATES):
        sizes = (t.numel() for n, t in model.state_dict().items() if family.matches(n))
        assert sum(sizes) == family.count, family.name
    context = 1000
    parts = flops_by_component(RATES, context)
    per_row = 4 * 4 * 48  # two products of 4 heads of 48
    assert parts["core: window"] == per_row * 128
    assert parts["core: csa"] == 2 * per_row * (128 + 32)  # of 125 entries 32 are chosen
    assert parts["core: hca"] == 2 * per_row * (128 + 31)
    assert parts["indexer scores"] == 2 * 2 * 4 * 32 * 125
    held = kv_bytes.held(RATES, context, "float32")
    assert held["csa: entries"] == 2 * 125 * 192 and held["csa: index keys"] == 2 * 125 * 128
    assert held["hca: entries"] == 2 * 31 * 192 and held["hca: open groups"] == 2 * 32 * 8 * 48
    assert held["csa: open groups"] == 2 * 16 * 8 * 2 * (48 + 32)


def test_parameters_of_the_other_attentions() -> None:
    """Beside the window's: nothing, a score per channel, two projections; all fp32 or BF16, all read by every token."""
    plain = parameters(windows_only(TINY))
    for name, more in (("dense", 0), ("anchors", 4 * 96), ("lowrank", 4 * 2 * 8 * 32)):
        counted = parameters(OTHERS[name])
        assert counted["total"] - plain["total"] == counted["active"] - plain["active"] == more
    bytes_more = {name: active_bytes(k) - active_bytes(windows_only(TINY)) for name, k in OTHERS.items()}
    assert bytes_more == {"dense": 0, "anchors": 4 * 4 * 96, "lowrank": 2 * 4 * 2 * 8 * 32}
    names = {"anchors": ["attn.anchor_score.weight"], "lowrank": ["attn.far_down.weight", "attn.far_up.weight"]}
    for name, tensors in names.items():
        for tensor in tensors:
            (found,) = [f for f in families(OTHERS[name]) if f.matches(f"layers.1.{tensor}")]
            assert found.count == (4 * 96 if name == "anchors" else 4 * 8 * 32)


def test_flops_of_the_other_attentions() -> None:
    """At 1000 tokens, by hand: 4 heads of 48, two products, 4 layers; the square root of 1000 rounded up is 32."""
    at = {name: flops_by_component(config, 1000) for name, config in OTHERS.items()}
    layers = 4 * 4 * 4 * 48
    assert at["dense"]["core: dense"] == layers * 1000
    assert at["anchors"]["core: anchors"] == layers * (128 + 32)
    assert at["anchors"]["anchor scores"] == 4 * 2 * 96
    assert at["lowrank"]["core: lowrank"] == layers * 1000
    # one row comes down to rank 8, the 872 that have left the window come up from it
    assert at["lowrank"]["low-rank rows"] == 4 * 2 * 8 * 32 * (1 + 872)
    assert flops_by_component(OTHERS["lowrank"], 128)["low-rank rows"] == 4 * 2 * 8 * 32
    for parts in at.values():
        assert parts["core: window"] == layers // 4 * 128
        assert not [p for p in parts if "indexer" in p or "compressor" in p or p in ("core: csa", "core: hca")]
    one, kind = OTHERS["anchors"], OTHERS["anchors"].layer_kind(1)
    assert [attended(one, kind, n) for n in (1, 4, 5, 16, 17, 10_000)] == [2, 6, 8, 20, 22, 228]


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("tokens", [1, 2, 4, 5, 9, 10, 129, 1025])
def test_a_prompt_of_another_attention(name: str, tokens: int) -> None:
    """The sum of its tokens, but that a low-rank row is rebuilt once a call; a training token is three of them."""
    config = OTHERS[name]
    one_by_one = by_component(w for t in range(1, tokens + 1) for w in decode(config, t))
    one_by_one["head"] = head_flops(config)
    if name == "lowrank":
        one_by_one["low-rank rows"] = 4 * 2 * 8 * 32 * (tokens + max(0, tokens - 128))
    assert by_component(prefill(config, tokens)) == one_by_one
    trained = by_component(train(config, tokens))
    assert trained == {n: 3 * f for n, f in (one_by_one | {"head": tokens * head_flops(config)}).items()}


HELD_BY_OTHERS = {  # at 1000 tokens in four layers: bytes of a row in each format, by hand
    "dense": {"rows": (72, 96, 192)},
    "anchors": {"scaled rows": (72, 96, 192), "anchor scores": (4, 4, 4)},
    "lowrank": {"low-rank rows": (48, 48, 96)},  # 8 numbers and 16 rotary ones: 8 + 1 + 32, padded to 8
}


@pytest.mark.parametrize("name", OTHERS)
def test_bytes_of_the_other_attentions(name: str) -> None:
    config = OTHERS[name]
    rows = {"dense": {"rows": 1000}, "anchors": {"scaled rows": 32, "anchor scores": 1000},
            "lowrank": {"low-rank rows": 1000 - 128}}[name]  # fmt: skip
    for i, format in enumerate(("published", "bfloat16", "float32")):
        row = (72, 96, 192)[i]
        window = {"window: window": 128 * row} | ({} if name == "dense" else {f"{name}: window": 4 * 128 * row})
        sizes = {part: each[i] for part, each in HELD_BY_OTHERS[name].items()}
        held = {f"{name}: {part}": 4 * 1000 * size for part, size in sizes.items()}
        assert kv_bytes.held(config, 1000, format) == window | held
        read = {f"{name}: {part}": 4 * count * sizes[part] for part, count in rows.items()}
        assert kv_bytes.read(config, 1000, format) == window | read
        fixed, per_token = kv_bytes.fixed_and_per_token(config, format)[name]
        assert (fixed, per_token) == (0 if name == "dense" else 4 * 128 * row, 4 * sum(sizes.values()))
    assert kv_bytes.row_bytes(config, "float32") == (192, 0), "there is no index key"
    spare = kv_bytes.held(config, 1000, "float32", allocated=True, max_rewind=10)
    assert spare.get(f"{name}: window", 0) == (0 if name == "dense" else 4 * 138 * 192)


@pytest.mark.parametrize("name", OTHERS)
def test_a_report_of_another_attention(name: str, tmp_path: Path) -> None:
    """`dsv4 cost` on a file that has the keys: all that the tables show, and on a machine."""
    (tmp_path / "config.json").write_text(json.dumps(OTHERS[name].to_json()), encoding="utf-8")
    shown = CliRunner().invoke(application(), ["cost", str(tmp_path), "--context", "1k,32k", "--json"])
    assert shown.exit_code == 0, shown.output
    told = json.loads(shown.stdout)["model"]
    assert told["contexts"][0]["decode_by_component"][f"core: {name}"] > 0
    assert set(told["cache_fixed_and_per_token"]) == {"window", name}
    assert told["row_bytes"].get("low-rank row") == (48 if name == "lowrank" else None)
    tables = CliRunner().invoke(application(), ["cost", str(tmp_path), "--context", "1k,32k", "--details"])
    assert tables.exit_code == 0 and f"core: {name}" in tables.output


# --- comparisons -----------------------------------------------------------------------------------------------------


def test_the_five_claims_within_half_a_point() -> None:
    claims = compare.claims()
    assert [c.said for c in claims] == [27, 10, 10, 7, 2, 2]
    for claim in claims:
        assert abs(claim.error) <= 0.5, claim
    million = compare.claims(1_000_000)
    assert [round(c.counted, 2) for c in million[:2]] == [27.03, 10.16]


def test_other_ways_of_counting_miss() -> None:
    """Only FP8 equivalents (and near relatives) give both labels; the cache needs FP4 keys."""
    rows = compare.flops_alternatives()
    off = {letter: max(abs(r["pro error"]), abs(r["flash error"])) for letter, r in rows.items()}
    assert off["C"] < 0.5 and off["A"] > 2 and off["B"] > 6 and off["H"] > 8 and off["J"] > 100
    assert [round(rows[s]["pro %"], 1) for s in "KLM"] == [26.2, 26.5, 20.7]
    caches = {r["what"]: (round(r["pro x"], 2), round(r["flash x"], 2)) for r in compare.cache_alternatives()}
    assert list(caches.values()) == [(9.55, 13.67), (9.51, 13.62), (8.71, 12.47), (8.71, 12.47), (17.06, 24.42)]


def test_no_other_reading_fits_the_labels() -> None:
    tried, hits = compare.grid()
    assert (tried, len(hits)) == (1728, 42)
    assert {(h["idx4"], h["core"], h["expert"]) for h in hits} == {(0.5, 2, 1)}
    assert round(hits[0]["pro x"], 3) == 3.688 and round(hits[0]["flash x"], 3) == 9.805


@pytest.mark.parametrize(
    ("context", "scheme", "idx4", "core"),
    [
        (10**6, "A", (0.522, 0.48, 0.56), (2.00, 1.87, 2.14)),
        (10**6, "C", (0.511, 0.47, 0.55), (1.98, 1.84, 2.12)),
        (MILLION, "C", (0.504, 0.47, 0.54), (2.05, 1.92, 2.19)),
        (MILLION, "D", (0.496, 0.46, 0.53), (1.95, 1.81, 2.08)),
    ],
)
def test_free_weights_come_out_as_a_half_and_two(context, scheme, idx4, core) -> None:
    fit = compare.free_fit(context, scheme)
    for got, want in ((fit["idx4"], idx4), (fit["core"], core)):
        assert got == pytest.approx(want, abs=0.006)


def test_causes_multiply_to_the_saving() -> None:
    v32, nothing = weighted(decode(CONTROLS["v3.2"], MILLION), "C"), frozenset()
    for k in compare.targets().values():
        assert flops_switched(k, frozenset(FLOP_CAUSES), MILLION) == pytest.approx(weighted(decode(k, MILLION), "C"))
        assert flops_switched(k, nothing, MILLION) == pytest.approx(v32)
        smaller = cache_switched(k, nothing, MILLION) / cache_switched(k, frozenset(CACHE_CAUSES), MILLION)
        for shares, total in (
            (flops_causes(k), 1 / compare.flops_share(k, MILLION)),
            (cache_causes(k), smaller),
        ):
            product = 1.0
            for share in shares.values():
                product *= share.shapley
            assert product == pytest.approx(total)


def test_shares_of_the_causes() -> None:
    pro, flash = compare.targets().values()
    shapley_of = lambda shares: [round(s.shapley, 2) for s in shares.values()]  # noqa: E731
    assert shapley_of(flops_causes(pro)) == [2.19, 1.16, 1.47, 1.05, 0.95]
    assert shapley_of(flops_causes(flash)) == [2.49, 1.31, 1.57, 1.07, 1.82]
    assert shapley_of(cache_causes(pro)) == [3.96, 2.00, 1.09, 1.11, 1.00]
    assert shapley_of(cache_causes(flash)) == [3.96, 2.02, 1.09, 1.11, 1.42]
    split = bundled(lambda on: flops_switched(pro, on, MILLION, "A"))
    assert [round(s.alone, 2) for s in split.values()] == [3.26, 1.71, 0.98]
    assert [round(s.last, 2) for s in split.values()] == [2.30, 1.25, 0.92]


def test_shapley_of_known_games() -> None:
    """Independent factors keep their own; two causes of which either does all share it evenly."""
    own = shapley(("a", "b"), lambda on: 1 / (3 ** ("a" in on) * 5 ** ("b" in on)))
    assert [own[c].shapley for c in "ab"] == pytest.approx([3, 5])
    either = shapley(("a", "b"), lambda on: 1 / 4 if on else 1)
    assert [either[c].shapley for c in "ab"] == pytest.approx([2, 2])
    assert either["a"].alone == pytest.approx(4) and either["a"].last == pytest.approx(1)


def test_which_public_decompositions_hold() -> None:
    assert [v.holds for v in verdicts()] == [True, False, False]


def test_crossovers() -> None:
    pro, flash = compare.targets().values()
    assert compare.csa_cheaper_than_hca(pro) == 257 * K and compare.csa_cheaper_than_hca(flash) is None
    for config in MODELS.values():
        at = compare.cache_outweighs_weights(config, 16)
        assert at is not None
        for context, beyond in ((at, True), (at - K, False)):
            cache = 16 * sum(kv_bytes.read(config, context).values())
            assert (cache > active_bytes(config, "published", 16)) == beyond
    assert compare.cache_outweighs_weights(windows_only(flash)) is None


def test_other_hybrids() -> None:
    rounded = {name: (round(f, 1), round(c, 1)) for name, (f, c) in compare.hybrids().items()}
    assert rounded == {
        "as released": (26.7, 10.5), "all CSA": (22.7, 20.7), "all HCA": (30.6, 0.6), "indexer in FP8": (32.1, 10.5),
    }  # fmt: skip


# --- wrong questions -------------------------------------------------------------------------------------------------


def refused(part: str, function, *args, **kwargs) -> None:
    with pytest.raises(UserError, match=part) as caught:
        function(*args, **kwargs)
    assert "\n" not in str(caught.value)


def test_wrong_questions_are_refused() -> None:
    flash = ModelConfig.preset("flash")
    refused("model_type 'gpt2' is not V4-like", read_any, {"model_type": "gpt2", "n_layer": 12})
    refused("lacks 'hidden_size'", read_any, {"model_type": "llama", "vocab_size": 10})
    refused("untied", read_any, {"model_type": "llama", "tie_word_embeddings": True})
    refused("did you mean 'h200'", hardware.machine, "h2000x8")
    refused("without accelerators", hardware.machine, "h200x0")
    refused("give at least 1", decode, flash, 0)
    refused("must not be negative", kv_bytes.held, flash, -1)
    refused("cache format 'int4' is unknown", kv_bytes.held, flash, 10, "int4")
    refused("dtype 'int4' is unknown", weight_bytes, flash, "int4")
    refused("scheme 'Z' is unknown", scheme_weights, "Z")
    refused("did you mean 'core'", scheme_weights, {"cores": 2})
    refused("from 0 to 1,000", scheme_weights, {"core": -1})
    refused("from 0 to 1,000", scheme_weights, {"core": float("nan")})
    refused("batch=0", hardware.step, flash, hardware.machine("h200"), 10, 0)
    refused("batch=1000001", hardware.step, flash, hardware.machine("h200"), 10, 1_000_001)
    refused("from 1 to 100,000", hardware.machine, "h200x100001")
    refused("a page of 0 tokens", kv_bytes.held, flash, 10, page_tokens=0)
    for load in ({"batch": 0}, {"rate": float("nan")}, {"rate": -1.0}, {"dtype": "fp9"}, {"page_tokens": 0}):
        refused("from|use one of", report.of_model, "flash", flash, [10], **load)
    refused("costs nothing", report.comparison, scheme={kind: 0.0 for kind in KINDS})
    assert hardware.machine("h200x100000").count == 100_000


def test_a_config_of_a_control_is_read() -> None:
    llama = {
        "model_type": "llama", "vocab_size": 32000, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "intermediate_size": 96, "max_position_embeddings": 512, "rope_scaling": {"rope_type": "llama3"},
    }  # fmt: skip
    config = read_any(llama)
    assert parameters(config)["total"] == 2 * 32000 * 64 + 64 + 2 * (4 * 64 * 64 + 3 * 64 * 96 + 2 * 64)
    v32 = {f: getattr(CONTROLS["v3.2"], f) for f in CONTROLS["v3.2"].__dataclass_fields__ if f != "rope_scaling"}
    yarn = {**vars(CONTROLS["v3.2"].rope_scaling), "mscale": 1.0, "mscale_all_dim": 1.0}
    assert read_any({"model_type": "deepseek_v32", **v32, "rope_scaling": yarn}) == CONTROLS["v3.2"]
    assert read_any(ModelConfig.preset("pro").to_json()) == MODELS["pro"]


# --- the numbers of docs/cost.md -------------------------------------------------------------------------------------


def test_the_worked_numbers_are_those_of_the_code() -> None:
    text = (Path(__file__).resolve().parents[1] / "docs" / "cost.md").read_text(encoding="utf-8")
    flat = re.sub(r"\s+", " ", text)
    pro, flash = compare.targets().values()
    v32 = CONTROLS["v3.2"]
    said: list[str] = []
    for config in MODELS.values():
        p = parameters(config)
        total = p["total"]
        said.append(f"| {total:,} | {total + p['routing_biases']:,} | {p['active']:,} |")
    elements, size = on_file(pro)
    said += [f"{elements:,} elements and {size / 2**30:.2f} GiB"]
    said += [f"{active_bytes(pro):,} bytes of weights, one of V3.2 {active_bytes(v32):,}"]
    at = {name: f"{flops / 1e9:.2f} G" for name, flops in flops_by_component(pro, MILLION).items()}
    said += [f"{c} {at[c]}" for c in ("attention projections", "compressor", "indexer projections", "router", "head")]
    said += [f"{c} {at[c]}" for c in ("experts", "hyper-connections", "indexer scores")]
    said += [f"core of CSA layers {at['core: csa']}", f"core of HCA layers {at['core: hca']}"]
    for name, config in (("V4-Pro", pro), ("V4-Flash", flash)):
        weights, raw = (weighted(decode(config, MILLION), s) / 1e9 for s in "CA")
        shares = [100 * compare.flops_share(config, MILLION, s) for s in "CA"]
        report = {"V4-Pro": 27, "V4-Flash": 10}[name]
        said += [f"| {name} | {weights:.2f} G | {shares[0]:.2f}% | {report}% | {raw:.2f} G | {shares[1]:.2f}% |"]
    weights, raw = (weighted(decode(v32, MILLION), s) / 1e9 for s in "CA")
    said += [f"| V3.2 | {weights:.2f} G | | | {raw:.2f} G |"]
    fit = compare.free_fit(MILLION, "C")
    said += [f"gives {fit['idx4'][0]:.2f} and {fit['core'][0]:.2f} at 1M"]
    said += ["({:.2f}% and {:.2f}%)".format(*(c.counted for c in compare.claims(1_000_000)[:2]))]
    held = [f"{sum(kv_bytes.held(c, MILLION).values()):,}" for c in (pro, flash, v32)]
    said += [f"| {' | '.join(held)} |"]
    for shares, title in ((flops_causes, "FLOPs"), (cache_causes, "cache")):
        rows = zip(shares(pro).values(), shares(flash).values(), strict=True)
        for both in rows:
            cells = (f"{s.shapley:.2f} / {s.alone:.2f} / {s.last:.2f}" for s in both)
            said += [f"| {' | '.join(cells)} |"]
        assert title in text
    for name, config in (("V3.2", v32), ("V4-Pro", pro), ("V4-Flash", flash)):
        said += [f"{name} {1e3 * hardware.step(config, hardware.machine('h200'), MILLION).seconds:.2f} ms"]
    other = compare.hybrids()
    said += [f"would need {other['all CSA'][0]:.1f}% of V3.2's FLOPs instead of {other['as released'][0]:.1f}%"]
    missing = [s for s in said if s not in flat]
    assert not missing, missing
