"""Failures caught here: a tensor that is lost, doubled, renamed or cast on the way to a file and back; a damaged or
foreign folder that loads; a save that fails half way and takes the old checkpoint with it.
"""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from models import randomise, small_config, small_model, tokens
from safetensors.torch import load_file, save_file

import dsv4
from dsv4.checkpoint import load, read_config, save, write_atomically
from dsv4.checkpoint.names import LAYOUTS, file_names, layout_of
from dsv4.errors import UserError
from dsv4.model import Transformer

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def model() -> Transformer:
    return small_model((0, 4, 128), mtp=1).eval()


@pytest.fixture
def folder(model, tmp_path) -> Path:
    """A published checkpoint in one file, to be spoilt."""
    save(model, tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def same_weights(a: Transformer, b: Transformer) -> bool:
    one, two = a.state_dict(), b.state_dict()
    return one.keys() == two.keys() and all(one[n].dtype == two[n].dtype and torch.equal(one[n], two[n]) for n in one)


def refused(folder: Path, words: str, **kwargs) -> None:
    with pytest.raises(UserError, match=words) as caught:
        load(folder, **kwargs)
    assert "\n" not in str(caught.value)


def rewrite(folder: Path, change, file: str = WEIGHTS) -> None:
    tensors = load_file(folder / file)
    change(tensors)
    save_file(tensors, folder / file, metadata={"format": "pt"})


# --- there and back ----------------------------------------------------------------------------------


def test_published_round_trip(model, folder):
    again = dsv4.load(folder)
    assert again.config == model.config == read_config(folder) and same_weights(model, again)
    ids = tokens(model, 140)
    assert torch.equal(model(ids), again(ids))
    assert sorted(f.name for f in folder.iterdir()) == ["config.json", WEIGHTS]


def test_transformers_round_trip(model, tmp_path):
    """That layout has no MTP block; all else comes back."""
    save(model, tmp_path, layout="transformers")
    again = load(tmp_path)
    assert again.config == model.config.with_(num_nextn_predict_layers=0, compress_ratios=(0, 4, 128))
    trunk = {name: t for name, t in model.state_dict().items() if not name.startswith("mtp.")}
    assert again.state_dict().keys() == trunk.keys()
    assert all(torch.equal(t, trunk[name]) for name, t in again.state_dict().items())
    ids = tokens(model, 140)
    assert torch.equal(model(ids), again(ids))


def test_a_model_without_mtp(tmp_path):
    model = small_model((128, 4))
    for layout in LAYOUTS:
        save(model, tmp_path / layout, layout=layout)
        assert same_weights(model, load(tmp_path / layout))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("limit", [1, 20_000, 100_000])
def test_shards(model, tmp_path, layout, limit):
    """From a tensor a shard to a few; the index says where each is."""
    save(model, tmp_path, layout=layout, max_shard_bytes=limit)
    shards = sorted(tmp_path.glob("*.safetensors"))
    index = json.loads((tmp_path / INDEX).read_text(encoding="utf-8"))
    held = {name: f.name for f in shards for name in load_file(f)}
    assert held == index["weight_map"] and len(shards) > 1
    assert index["metadata"]["total_size"] == sum(t.nbytes for f in shards for t in load_file(f).values())
    for file in shards:
        tensors = load_file(file)
        assert len(tensors) == 1 or sum(t.nbytes for t in tensors.values()) <= limit
    ids = tokens(model, 60)
    assert torch.equal(load(tmp_path)(ids), model(ids))


def test_saving_again_leaves_nothing_of_the_old(model, tmp_path):
    """Many shards, then few, then one file, then shards again: never a stale file that would be read too."""
    for limit, files in ((20_000, None), (200_000, None), (10**9, 1), (50_000, None)):
        save(model, tmp_path, max_shard_bytes=limit)
        shards = sorted(f.name for f in tmp_path.glob("*.safetensors"))
        assert files is None or shards == [WEIGHTS]
        assert (tmp_path / INDEX).exists() == (len(shards) > 1)
        assert {f.name for f in tmp_path.iterdir()} - {INDEX} == {*shards, "config.json"}
        assert same_weights(model, load(tmp_path))


def test_dtypes(model, tmp_path):
    """A cast on the way out touches floating-point tensors only; on the way in, the large matrices only."""
    save(model, tmp_path, dtype=torch.bfloat16)
    tensors = load_file(tmp_path / WEIGHTS)
    assert {t.dtype for t in tensors.values()} == {torch.bfloat16, torch.int64}
    assert {name for name, t in tensors.items() if t.dtype == torch.int64} == {"layers.0.ffn.gate.tid2eid"}
    wide, narrow = load(tmp_path), load(tmp_path, dtype="bfloat16")
    assert wide.embed.weight.dtype == torch.float32 and narrow.embed.weight.dtype == torch.bfloat16
    assert narrow.norm.weight.dtype == narrow.layers[1].attn.compressor.ape.dtype == torch.float32
    assert torch.equal(wide.embed.weight, narrow.embed.weight.float())
    assert torch.equal(wide.embed.weight, model.embed.weight.bfloat16().float())
    save(narrow, tmp_path / "again")
    assert same_weights(load(tmp_path / "again", dtype=torch.bfloat16), narrow)
    assert json.loads((tmp_path / "again" / "config.json").read_text(encoding="utf-8"))["torch_dtype"] == "bfloat16"


def test_saving_does_not_change_the_model(model, tmp_path):
    before = {name: t.clone() for name, t in model.state_dict().items()}
    save(model, tmp_path, layout="transformers", dtype=torch.bfloat16)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


# --- names -------------------------------------------------------------------------------------------

HYPER = [f"hc_{part}_{leaf}" for part in ("attn", "ffn") for leaf in ("fn", "base", "scale")]
ATTENTION = ["attn_sink", *(f"{n}.weight" for n in ("wq_a", "q_norm", "wq_b", "wkv", "kv_norm", "wo_a", "wo_b"))]
COMPRESSOR = ["ape", "wkv.weight", "wgate.weight", "norm.weight"]


def block_names(prefix: str, ratio: int, hashed: bool, experts: int) -> set[str]:
    """The published names of one block, as the specification lists them."""
    names = [*HYPER, "attn_norm.weight", "ffn_norm.weight", *(f"attn.{n}" for n in ATTENTION)]
    if ratio:
        names += [f"attn.compressor.{n}" for n in COMPRESSOR]
    if ratio == 4:
        names += ["attn.indexer.wq_b.weight", "attn.indexer.weights_proj.weight"]
        names += [f"attn.indexer.compressor.{n}" for n in COMPRESSOR]
    names += ["ffn.gate.weight", "ffn.gate.tid2eid" if hashed else "ffn.gate.bias"]
    for expert in (*(f"experts.{e}" for e in range(experts)), "shared_experts"):
        names += [f"ffn.{expert}.{w}.weight" for w in ("w1", "w2", "w3")]
    return {f"{prefix}{name}" for name in names}


def test_published_names(model, folder):
    c, want = model.config, {"embed.weight", "head.weight", "norm.weight"}
    want |= {f"hc_head_{leaf}" for leaf in ("fn", "base", "scale")}
    for layer, ratio in enumerate(c.trunk_ratios):
        want |= block_names(f"layers.{layer}.", ratio, layer < c.num_hash_layers, c.n_routed_experts)
    want |= block_names("mtp.0.", 0, False, c.n_routed_experts)
    want |= {f"mtp.0.{n}.weight" for n in ("e_proj", "h_proj", "enorm", "hnorm", "norm")}
    want |= {f"mtp.0.hc_head_{leaf}" for leaf in ("fn", "base", "scale")}
    assert set(load_file(folder / WEIGHTS)) == want


def test_published_tensor_count():
    """Flash: 1,199 plain tensors, 66,048 of routed experts (with as many block scales; half of them are weights)."""
    with torch.device("meta"):
        flash = Transformer(dsv4.ModelConfig.preset("flash"))
    names = [n for name, t in flash.state_dict().items() for n, _ in file_names(name, tuple(t.shape), "published")]
    assert len(names) == len(set(names))
    trunk = [n for n in names if not n.startswith("mtp.")]
    assert sum(".experts." in n for n in trunk) == 66_048 // 2
    assert sum(".experts." not in n for n in trunk) == 1_199
    shapes = {name: tuple(t.shape) for name, t in flash.state_dict().items()}
    assert shapes["layers.2.attn.wo_a.weight"] == (8192, 4096) and shapes["layers.2.attn.compressor.ape"] == (4, 1024)
    assert shapes["layers.3.attn.compressor.ape"] == (128, 512) and shapes["layers.2.hc_attn_fn"] == (24, 16384)
    assert shapes["layers.0.ffn.gate.tid2eid"] == (129280, 6)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_names_go_both_ways(model, layout):
    """No two places share a file name, every element of a stacked tensor has one, and a layout is recognised."""
    seen: set[str] = set()
    for name, tensor in model.state_dict().items():
        filled = torch.zeros(tensor.shape, dtype=torch.int64)
        for file_name, place in file_names(name, tuple(tensor.shape), layout):
            assert file_name not in seen
            seen.add(file_name)
            filled[place] += 1
        assert filled.eq(1).all(), name
    assert layout_of(seen) == layout


def test_experts_lie_where_their_names_say(model, folder):
    tensors, experts = load_file(folder / WEIGHTS), model.layers[1].ffn.experts
    for e in range(model.config.n_routed_experts):
        assert torch.equal(tensors[f"layers.1.ffn.experts.{e}.w1.weight"], experts.w13[e, 0])
        assert torch.equal(tensors[f"layers.1.ffn.experts.{e}.w3.weight"], experts.w13[e, 1])
        assert torch.equal(tensors[f"layers.1.ffn.experts.{e}.w2.weight"], experts.w2[e])


def test_the_other_name_of_the_head(model, tmp_path):
    """In memory transformers calls it lm_head.weight, and some writers put that into the file."""
    save(model, tmp_path, layout="transformers")
    rewrite(tmp_path, lambda tensors: tensors.update({"lm_head.weight": tensors.pop("head.weight")}))
    assert torch.equal(load(tmp_path).head.weight, model.head.weight)


# --- what is refused ---------------------------------------------------------------------------------


def test_missing_tensor(folder):
    rewrite(folder, lambda tensors: tensors.pop("layers.1.ffn.experts.3.w3.weight"))
    refused(folder, "lacks tensor layers.1.ffn.experts.3.w3.weight")


def test_extra_tensor(folder):
    rewrite(folder, lambda tensors: tensors.update({"layers.7.attn_norm.weight": torch.ones(48)}))
    refused(folder, "too many, such as layers.7.attn_norm.weight")


def test_tensor_that_appears_twice(model, tmp_path):
    save(model, tmp_path, max_shard_bytes=100_000)
    (tmp_path / INDEX).unlink()
    save_file({"norm.weight": torch.ones(48)}, tmp_path / "model-99999.safetensors")
    refused(tmp_path, "norm.weight appears twice")


def test_a_stray_file_beside_an_index_is_not_read(model, tmp_path):
    save(model, tmp_path, max_shard_bytes=100_000)
    save_file({"norm.weight": torch.ones(48)}, tmp_path / "model-99999.safetensors")
    assert same_weights(model, load(tmp_path))


@pytest.mark.parametrize("changes", [
    {"hidden_size": 64}, {"vocab_size": 98}, {"q_lora_rank": 25}, {"moe_intermediate_size": 25}, {"o_lora_rank": 21},
])  # fmt: skip
def test_checkpoint_of_another_shape(model, folder, changes):
    refused(folder, r"has shape \(.*\), the configuration asks for \(", config=model.config.with_(**changes))


@pytest.mark.parametrize("changes", [
    {"n_routed_experts": 5}, {"n_routed_experts": 7}, {"num_hash_layers": 2}, {"num_hash_layers": 0},
    {"compress_ratios": (0, 4, 4, 0)}, {"compress_ratios": (0, 128, 4, 0)}, {"compress_ratios": (4, 4, 128, 0)},
    {"num_hidden_layers": 2, "compress_ratios": (0, 4, 0)},
    {"num_hidden_layers": 4, "compress_ratios": (0, 4, 128, 4, 0)},
    {"num_nextn_predict_layers": 0, "compress_ratios": (0, 4, 128)},
])  # fmt: skip
def test_checkpoint_of_another_architecture(model, folder, changes):
    refused(folder, "lacks tensor|too many|has shape", config=model.config.with_(**changes))


def test_nothing_is_read_before_everything_fits(folder, monkeypatch):
    """The wrong tensor is the last one; no weight has been read when it is found."""
    rewrite(folder, lambda tensors: tensors.update({"norm.weight": torch.ones(47)}))
    module = sys.modules[load.__module__]

    def read(*args):
        raise AssertionError("a weight was read")

    monkeypatch.setattr(module, "_read", read)
    refused(folder, "norm.weight in .* has shape")


@pytest.mark.parametrize("keep", [0, 1, 7, 8, 100, 0.1, 0.5, 0.99, -1])
def test_truncated_file(folder, keep):
    """Cut in the length, in the header, in the data, one byte short."""
    whole = (folder / WEIGHTS).read_bytes()
    cut = int(keep * len(whole)) if isinstance(keep, float) else keep if keep >= 0 else len(whole) + keep
    (folder / WEIGHTS).write_bytes(whole[:cut])
    refused(folder, "truncated or damaged")


def test_file_that_is_something_else(folder):
    (folder / WEIGHTS).write_bytes(b"<!DOCTYPE html>" * 100)
    refused(folder, "truncated or damaged")


def test_all_zero_hash_table(folder):
    rewrite(folder, lambda tensors: tensors["layers.0.ffn.gate.tid2eid"].zero_())
    refused(folder, "layers.0.ffn.gate.tid2eid routes a token id to the same expert twice")


def test_hash_table_that_names_no_expert(folder):
    rewrite(folder, lambda tensors: tensors["layers.0.ffn.gate.tid2eid"][0].copy_(torch.tensor([0, 6])))
    refused(folder, "expert 6 of 6")


def test_quantised_tensors(folder):
    """FP8 weights, and FP4 weights packed two to a byte: named as what they are, not as tensors of a wrong shape."""

    def fp8(tensors):
        tensors["layers.0.attn.wq_a.weight"] = tensors["layers.0.attn.wq_a.weight"].to(torch.float8_e4m3fn)
        tensors["layers.0.attn.wq_a.scale"] = torch.ones(1, 1)

    shutil.copytree(folder, folder.parent / "fp4")
    rewrite(folder, fp8)
    refused(folder, "layers.0.attn.wq_a.weight is F8_E4M3: quantised")

    def fp4(tensors):
        name = "layers.0.ffn.experts.0.w1.weight"
        tensors[name] = torch.zeros(tensors[name].shape[0], tensors[name].shape[1] // 2, dtype=torch.int8)

    rewrite(folder.parent / "fp4", fp4)
    refused(folder.parent / "fp4", "layers.0.ffn.experts.0.w1.weight is I8: quantised")


def test_folders_that_hold_no_checkpoint(model, tmp_path):
    refused(tmp_path / "nowhere", "cannot read the configuration")
    save(model, tmp_path)
    (tmp_path / WEIGHTS).rename(tmp_path / "pytorch_model.bin")
    refused(tmp_path, "holds no .safetensors file")


def test_a_shard_or_the_index_is_gone_or_damaged(model, tmp_path):
    save(model, tmp_path, max_shard_bytes=100_000)
    index = (tmp_path / INDEX).read_text(encoding="utf-8")
    for damaged in (index[: len(index) // 2], "[]", "{}", '{"weight_map": 3}', ""):
        (tmp_path / INDEX).write_text(damaged, encoding="utf-8")
        refused(tmp_path, "index.json")
    (tmp_path / INDEX).write_text(index, encoding="utf-8")
    victim = sorted(tmp_path.glob("*.safetensors"))[1]
    victim.unlink()
    refused(tmp_path, f"lacks {victim.name}, which its index lists")


def test_unknown_layout_is_refused_before_anything_is_written(model, tmp_path):
    with pytest.raises(UserError, match="unknown layout 'torch'"):
        save(model, tmp_path / "new", layout="torch")  # type: ignore[arg-type]
    assert not (tmp_path / "new").exists()


# --- a save that fails ---------------------------------------------------------------------------------


class DiskFull(OSError):
    pass


@pytest.mark.parametrize("good_files", [0, 1, 2])
@pytest.mark.parametrize("before", [10**9, 100_000])
def test_a_failed_save_leaves_the_old_checkpoint(model, tmp_path, monkeypatch, good_files, before):
    """The disk is full at the first, second or third shard: the folder still loads as it was, without litter."""
    save(model, tmp_path, max_shard_bytes=before)
    names = {f.name for f in tmp_path.iterdir()}
    module = sys.modules[save.__module__]
    left = [good_files]

    def failing(tensors, path, metadata=None):
        if not left[0]:
            Path(path).write_bytes(b"half a file")
            raise DiskFull
        left[0] -= 1
        save_file(tensors, path, metadata=metadata)

    monkeypatch.setattr(module, "save_file", failing)
    other = randomise(Transformer(small_config((0, 4, 128), mtp=1)), seed=77)
    with pytest.raises(DiskFull):
        save(other, tmp_path, max_shard_bytes=100_000)
    assert same_weights(model, load(tmp_path))
    assert {f.name for f in tmp_path.iterdir()} == names


def test_atomic_write(tmp_path):
    target = tmp_path / "state.json"
    write_atomically(target, lambda path: path.write_text("old", encoding="utf-8"))

    def fail(path: Path) -> None:
        path.write_text("ne", encoding="utf-8")
        raise DiskFull

    with pytest.raises(DiskFull):
        write_atomically(target, fail)
    assert target.read_text(encoding="utf-8") == "old"
    write_atomically(target, lambda path: path.write_text("new", encoding="utf-8"))
    assert target.read_text(encoding="utf-8") == "new" and [f.name for f in tmp_path.iterdir()] == ["state.json"]
