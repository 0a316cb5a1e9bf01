"""transformers' `deepseek_v4` (5.23, 5.24), an independent implementation of the same function, as an oracle: the same
random weights in fp32 give the same logits and the same gradients.

Failures caught here: anything in which this model is not V4, names or shapes of the transformers layout that do not
load there, and a configuration file that means one thing there and another here. Ties are kept out (their order is not
defined there): 64 index heads, or room for every entry. transformers holds S x S masks, so lengths stay small. It has
no MTP block; tests/test_quirks.py checks that one.
"""

import copy
import json
from pathlib import Path

import pytest
import torch
from differences import differ
from safetensors.torch import load_file
from torch import Tensor
from transformers import DeepseekV4Config, DeepseekV4ForCausalLM
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4RotaryEmbedding, apply_rotary_pos_emb

import dsv4
from dsv4.bench.peers import memory_name
from dsv4.checkpoint.names import file_names
from dsv4.config import ModelConfig, RopeScaling
from dsv4.config.published import ABSENT, REQUIRED
from dsv4.measure.subjects import stream
from dsv4.model.rope import frequencies, turns
from dsv4.ops import rotate

LOGITS = 5e-5  # the largest absolute difference allowed; logits reach about 6
GRADIENTS = 1e-4  # of the largest entry of each gradient
YARN = {"type": "yarn", "factor": 16, "original_max_position_embeddings": 65536, "beta_fast": 32, "beta_slow": 1}
SMALL = dict(
    vocab_size=256, hidden_size=128, moe_intermediate_size=64, num_attention_heads=4, head_dim=64,
    qk_rope_head_dim=16, q_lora_rank=48, o_groups=2, o_lora_rank=32, index_head_dim=32, n_routed_experts=8,
    num_experts_per_tok=2, max_position_embeddings=1048576, num_nextn_predict_layers=1,
)  # fmt: skip
CASES: dict[str, dict] = {
    # a window that is short, so that most is read through entries; entries are chosen from position 35 on
    "window 16, YaRN": dict(
        compress_ratios=[0, 4, 128, 4, 0], num_hidden_layers=4, num_hash_layers=2, sliding_window=16, index_n_heads=64,
        index_topk=8, rope_scaling=YARN,
    ),
    # the published window, no scaling, every entry read, HCA first as in Pro
    "window 128": dict(
        compress_ratios=[128, 4, 0, 0], num_hidden_layers=3, num_hash_layers=1, sliding_window=128, index_n_heads=4,
        index_topk=512, rope_scaling=None, swiglu_limit=1.0,
    ),
    # other ratios; entries of both kinds close and are chosen often
    "ratios 8 and 32": dict(
        compress_rates={"compressed_sparse_attention": 8, "heavily_compressed_attention": 32},
        layer_types=["heavily_compressed_attention", "sliding_attention", "compressed_sparse_attention"],
        num_hidden_layers=3, num_hash_layers=1, sliding_window=16, index_n_heads=64, index_topk=8, rope_scaling=YARN,
    ),
    # YaRN that acts on most pairs at these lengths
    "strong YaRN": dict(
        compress_ratios=[0, 4, 128, 0], num_hidden_layers=3, num_hash_layers=1, sliding_window=32, index_n_heads=64,
        index_topk=8, rope_scaling={**YARN, "factor": 4, "original_max_position_embeddings": 128},
    ),
}  # fmt: skip


def peer_config(case: str) -> DeepseekV4Config:
    return DeepseekV4Config(**SMALL, **CASES[case])


@torch.no_grad()
def make_peer(case: str) -> DeepseekV4ForCausalLM:
    torch.manual_seed(0)
    peer = DeepseekV4ForCausalLM(peer_config(case)).eval()
    for name, p in peer.named_parameters():
        p.copy_(1 + 0.1 * torch.randn_like(p)) if "norm" in name else p.normal_(0, 0.1)
    for name, b in peer.named_buffers():
        if name.endswith("tid2eid"):
            b.copy_(torch.rand(SMALL["vocab_size"], SMALL["n_routed_experts"]).argsort(1)[:, :2])
        elif name.endswith("e_score_correction_bias"):
            b.normal_(0, 0.1)
    return peer


@pytest.fixture(scope="module", params=CASES)
def pair(request, tmp_path_factory):
    """(transformers' model, ours with its weights, the folder between them)."""
    folder = tmp_path_factory.mktemp("peer")
    peer = make_peer(request.param)
    peer.save_pretrained(folder)
    return peer, dsv4.load(folder).eval(), folder


def ids_of(count: int, seed: int = 0) -> Tensor:
    return torch.randint(0, SMALL["vocab_size"], (count,), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def theirs(peer, ids: Tensor) -> Tensor:
    return peer(ids[None], use_cache=False).logits[0]


@torch.no_grad()
def ours(model, ids: Tensor) -> Tensor:
    return model(ids)


# --- logits ------------------------------------------------------------------------------------------


def test_logits_at_every_length(pair):
    """One call, lengths around the groups, the window and the HCA edges."""
    peer, model, _ = pair
    ids = ids_of(1000)
    for length in (*range(1, 10), 15, 16, 17, *range(126, 132), *range(255, 259), 1000):
        want = theirs(peer, ids[:length])
        assert want.std() > 0.5, "weights too small to prove anything"
        assert differ(want, ours(model, ids[:length])) < LOGITS, f"length {length}"


def test_logits_in_chunks_and_token_by_token(pair):
    """Through the memory: token by token to 258, in chunks of 61 to 1000."""
    peer, model, _ = pair
    ids = ids_of(1000)
    want = theirs(peer, ids)
    assert differ(want[:258], stream(model, ids[:258], 1)) < LOGITS
    for chunk in (61, 128, 1000):
        assert differ(want, stream(model, ids, chunk)) < LOGITS, f"chunks of {chunk}"


def test_their_cache_and_ours(pair):
    """Both stream: a prompt of 131, then 10 single tokens, through either one's memory."""
    peer, model, _ = pair
    ids = ids_of(141)
    with torch.no_grad():
        step = peer(ids[None, :131], use_cache=True)
        want = [step.logits[0]]
        for t in range(131, 141):
            memory = {memory_name(peer): step[memory_name(peer)]}
            step = peer(ids[None, t : t + 1], **memory, use_cache=True)
            want.append(step.logits[0])
    memory = model.new_cache()
    got = [stream(model, ids[:131], 131, memory), stream(model, ids[131:], 1, memory)]
    assert differ(torch.cat(want), torch.cat(got)) < LOGITS


def test_batch_of_unequal_lengths(pair):
    """Packed into one call here, one by one there: they cannot pad, we need not."""
    peer, model, _ = pair
    parts = [ids_of(n, seed=n) for n in (3, 130, 128, 1, 65)]
    got = model(torch.cat(parts), segments=[len(p) for p in parts]).split([len(p) for p in parts])
    memory = model.new_cache(batch=len(parts))
    cached = model(torch.cat(parts), segments=[(len(p), m) for p, m in zip(parts, memory, strict=True)])
    for part, mine, streamed in zip(parts, got, cached.split([len(p) for p in parts]), strict=True):
        want = theirs(peer, part)
        assert differ(want, mine) < LOGITS and differ(want, streamed) < LOGITS, f"length {len(part)}"


# --- gradients ---------------------------------------------------------------------------------------


def gradients_by_file_name(peer, folder: Path) -> dict[str, Tensor]:
    """transformers' gradients under the names of its files: the model is saved with gradients in place of weights."""
    held = copy.deepcopy(peer)
    with torch.no_grad():
        for mine, p in zip(held.parameters(), peer.parameters(), strict=True):
            mine.copy_(torch.full_like(p, float("nan")) if p.grad is None else p.grad)
    held.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def test_gradients(pair, tmp_path):
    """Every parameter that transformers trains; nothing flows to the indexer's, there or here."""
    peer, model, _ = pair
    ids = ids_of(300, seed=4)
    direction = torch.randn(300, SMALL["vocab_size"], generator=torch.Generator().manual_seed(1))
    (peer(ids[None], use_cache=False).logits[0] * direction).sum().backward()
    (model(ids) * direction).sum().backward()
    want = gradients_by_file_name(peer, tmp_path)
    compared, untrained = 0, []
    for name, p in model.named_parameters():
        for file_name, place in file_names(name, tuple(p.shape), "transformers"):
            if want[file_name].isnan().all():
                untrained.append(file_name)
                assert p.grad is not None and not p.grad.any(), file_name
                continue
            assert p.grad is not None, file_name
            largest = want[file_name].abs().max().item()
            assert largest > 0, file_name
            assert differ(want[file_name] / largest, p.grad[place] / largest) <= GRADIENTS, file_name
            compared += 1
    assert compared + len(untrained) == sum(1 for n in want if not n.endswith(("tid2eid", "gate.bias")))
    assert untrained and all(".indexer." in name for name in untrained)
    peer.zero_grad(set_to_none=True)
    model.zero_grad(set_to_none=True)


# --- rotary tables -----------------------------------------------------------------------------------


@pytest.mark.parametrize("scaling", [RopeScaling(), RopeScaling(type="default"), RopeScaling(factor=4.0)])
@pytest.mark.parametrize("table", ["window", "compressed"])
def test_rotary_tables_far_out(scaling, table):
    """The published rotary width, at positions to a million: beyond 65536 YaRN decides where a pair stands."""
    config = ModelConfig(rope_scaling=scaling)
    yarn = {"type": "yarn", "factor": scaling.factor, "original_max_position_embeddings": 65536}
    tables = DeepseekV4RotaryEmbedding(
        DeepseekV4Config(qk_rope_head_dim=64, head_dim=512, rope_scaling=yarn if scaling.type == "yarn" else None)
    )
    positions = torch.tensor([0, 1, 127, 4095, 65535, 65536, 70001, 123456, 1048575])
    cos, sin = tables(torch.zeros(1), positions[None], layer_type="main" if table == "window" else "compress")
    turn = turns(frequencies(config, table), positions)
    # the angle is an fp32 product: at a million its last bit is 0.06 radians, and a frequency may differ in its own
    near = positions < 100_000
    assert differ(turn.real[near], cos[0][near]) < 1e-2 and differ(turn.imag[near], sin[0][near]) < 1e-2
    assert differ(turn.real[:4], cos[0][:4]) < 5e-4 and differ(turn.imag[:4], sin[0][:4]) < 5e-4
    x = torch.randn(len(positions), 3, 512)
    want = apply_rotary_pos_emb(x.transpose(0, 1)[None], turn.real[None], turn.imag[None])[0].transpose(0, 1)
    assert differ(want, rotate(x, turn)) < 1e-5


# --- files -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["published", "transformers"])
def test_what_we_save_loads_there(pair, layout, tmp_path):
    """Both layouts, strictly, with the same logits to the bit."""
    peer, model, _ = pair
    dsv4.save(model, tmp_path, layout=layout)
    loaded, report = DeepseekV4ForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    ids = ids_of(140)
    assert torch.equal(theirs(loaded.eval(), ids), theirs(peer, ids))
    assert torch.equal(ours(dsv4.load(tmp_path), ids), ours(model, ids))


def test_their_files_and_ours_hold_the_same_names(pair, tmp_path):
    _, model, folder = pair
    dsv4.save(model, tmp_path, layout="transformers")
    their, our = load_file(folder / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert their.keys() == our.keys()
    assert all(torch.equal(their[name], our[name]) for name in their)


def test_their_configuration_reads_as_ours(pair, tmp_path):
    """What transformers writes after reading what we wrote is the configuration we started from."""
    _, model, folder = pair
    dsv4.save(model, tmp_path / "ours", layout="transformers")
    DeepseekV4Config.from_pretrained(tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    written = json.loads((tmp_path / "theirs" / "config.json").read_text(encoding="utf-8"))
    again = ModelConfig.from_json({**written, "num_nextn_predict_layers": 0})
    assert again == model.config
    assert dsv4.load(folder).config == model.config


# --- what a file means -------------------------------------------------------------------------------


def edited(folder: Path, *left_out: str, **changes) -> None:
    """Change config.json by hand."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config = {key: value for key, value in (config | changes).items() if key not in left_out}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


@pytest.fixture(scope="module")
def plain_peer() -> DeepseekV4ForCausalLM:
    """Without scaling, and with entries that decide the logits."""
    return make_peer("window 128")


FLAT = {"rope_type": "default", "rope_theta": 10000.0}
NESTED = {"main": FLAT, "compress": {"rope_type": "default", "rope_theta": 160000.0}}


@pytest.mark.parametrize(("left_out", "changes"), [
    (("rope_scaling",), {}), ((), {"rope_scaling": None}), ((), {"rope_scaling": {"type": "default"}}),
    (("rope_scaling",), {"rope_parameters": FLAT}), (("rope_scaling",), {"rope_parameters": NESTED}),
], ids=["left out", "null", "default", "flat", "nested"])  # fmt: skip
def test_no_scaling_means_the_same_on_both_sides(plain_peer, tmp_path, left_out, changes):
    """Left out, it was read here as V4-Flash's YaRN: logits 2.2 away."""
    plain_peer.save_pretrained(tmp_path)
    model = dsv4.load(tmp_path)
    dsv4.save(model, tmp_path / "file")
    edited(tmp_path / "file", *left_out, **changes)
    if "rope_parameters" in changes and "main" in changes["rope_parameters"]:
        share = SMALL["qk_rope_head_dim"] / SMALL["head_dim"]
        nested = {key: {**value, "partial_rotary_factor": share} for key, value in NESTED.items()}
        edited(tmp_path / "file", rope_parameters=nested)
    ids = ids_of(300)
    there = DeepseekV4ForCausalLM.from_pretrained(tmp_path / "file").eval()
    here = dsv4.load(tmp_path / "file")
    want = theirs(there, ids)
    assert differ(want, ours(here, ids)) < LOGITS
    assert differ(want, theirs(plain_peer, ids)) < LOGITS
    flash = dsv4.load(tmp_path / "file", config=here.config.with_(rope_scaling=RopeScaling()))
    assert differ(want, ours(flash, ids)) > 0.1, "the wrong reading would show"


@pytest.mark.parametrize("layout", ["published", "transformers"])
@pytest.mark.parametrize("scaling", [RopeScaling("default"), RopeScaling("yarn", 4.0, 64)])
def test_what_we_save_means_the_same_there(plain_peer, tmp_path, layout, scaling):
    """With scaling and without."""
    plain_peer.save_pretrained(tmp_path)
    model = dsv4.load(tmp_path)
    model = dsv4.load(tmp_path, config=model.config.with_(rope_scaling=scaling))
    dsv4.save(model, tmp_path / "file", layout=layout)
    there = DeepseekV4ForCausalLM.from_pretrained(tmp_path / "file").eval()
    ids = ids_of(300)
    assert differ(theirs(there, ids), ours(model, ids)) < LOGITS
    assert dsv4.load(tmp_path / "file").config == model.config


def test_defaults_of_a_file_are_those_of_transformers():
    """What we do not require, transformers fills in with the same."""
    theirs = DeepseekV4Config()
    ours = {name: value for name, value in ABSENT.items() if value is not REQUIRED}
    for name in ("n_shared_experts", "hc_eps", "rms_norm_eps", "rope_theta", "initializer_range"):
        assert ours.pop(name) == getattr(theirs, name), name
    assert theirs.rope_parameters["compress"]["rope_type"] == ours.pop("rope_scaling").type == "default"
    assert ours.pop("compress_rate_csa") == theirs.compress_rates["compressed_sparse_attention"]
    assert ours.pop("compress_rate_hca") == theirs.compress_rates["heavily_compressed_attention"]
    assert ours == {
        "bos_token_id": None,
        "eos_token_id": None,
        "num_nextn_predict_layers": 0,
        "residual": "mhc",
        "attention": "compressed",
        "attention_rank": 0,
        "dspark_stages": 0,
        "dspark_block_size": 0,
        "dspark_noise_token_id": None,
        "dspark_target_layer_ids": (),
        "dspark_markov_rank": 0,
    }


def test_where_their_fallback_is_another_model_ours_is_an_error():
    """Pro's pattern for missing layer kinds, an amplitude factor for nested YaRN that does not rule it out."""
    there = DeepseekV4Config(num_hidden_layers=4)
    assert there.layer_types[:2] == ["heavily_compressed_attention"] * 2
    compress = {**YARN, "rope_type": "yarn", "rope_theta": 160000.0, "partial_rotary_factor": 0.125}
    del compress["type"]
    nested = {"main": {**FLAT, "partial_rotary_factor": 0.125}, "compress": compress}
    tables = DeepseekV4RotaryEmbedding(DeepseekV4Config(rope_parameters=copy.deepcopy(nested)))
    cos, _ = tables(torch.zeros(1), torch.zeros(1, 1, dtype=torch.int64), layer_type="compress")
    assert cos.max() > 1.2, "cos 0 is 1"
    data = {**ModelConfig().to_json(), "rope_parameters": nested}
    del data["rope_scaling"]
    with pytest.raises(dsv4.UserError, match="attention_factor 1.0"):
        ModelConfig.from_json(data)
    del data["compress_ratios"]
    data["rope_parameters"]["compress"]["attention_factor"] = 1.0
    with pytest.raises(dsv4.UserError, match="lacks compress_ratios"):
        ModelConfig.from_json(data)


def test_stop_ids_reach_transformers(pair, tmp_path):
    """Its generate stops where our engine does."""
    _, model, folder = pair
    model = dsv4.load(folder)
    model.stop_ids = (1, 5)
    dsv4.save(model, tmp_path, layout="transformers")
    loaded = DeepseekV4ForCausalLM.from_pretrained(tmp_path)
    assert loaded.generation_config.eos_token_id == [1, 5] and dsv4.load(tmp_path).stop_ids == (1, 5)


def test_a_rotary_width_survives_their_rounding(tmp_path):
    """transformers rounds head_dim x share down: 26/46 of 46 is 25.99... there."""
    for width, rotating in ((46, 26), (44, 30), (64, 16)):
        config = ModelConfig.preset("tiny", head_dim=width, qk_rope_head_dim=rotating)
        dsv4.save(dsv4.Transformer(config), tmp_path, layout="transformers")
        assert DeepseekV4Config.from_pretrained(tmp_path).qk_rope_head_dim == rotating
        trunk = config.with_(num_nextn_predict_layers=0, compress_ratios=config.trunk_ratios)
        assert dsv4.load(tmp_path).config == trunk
