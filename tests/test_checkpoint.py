"""Failures caught here: a tensor that is lost, doubled, renamed or cast on the way to a file and back; a damaged,
changed or foreign folder that loads, or one from the wild that does not; a save that fails or dies half way and leaves
a folder that loads to something else; a traceback where the machine says no.
"""

import json
import os
import resource
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import dsv4
from dsv4 import controls
from dsv4.checkpoint import load, read_config, resolve_checkpoint, save, write_tensors, writing
from dsv4.checkpoint.names import LAYOUTS, file_names, layout_of
from dsv4.checkpoint.writing import stream_file
from dsv4.config import preset_of
from dsv4.errors import FileError, UserError
from dsv4.files import DIGESTS, write_digests
from dsv4.measure.subjects import randomise, small_config, small_model, tokens
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


FP32 = ("norm.weight", "attn_sink", "ape", "gate.weight", "gate.bias", "compressor.wkv.weight",
        "compressor.wgate.weight")  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_cast_leaves_in_fp32_what_a_narrow_model_holds_in_fp32(model, tmp_path, layout):
    """Sinks, positional biases, hyper-connections, router: all were cast, and came back as something else."""
    save(model, tmp_path, layout=layout, dtype=torch.bfloat16)
    for name, t in load_file(tmp_path / WEIGHTS).items():
        wide = name.endswith(FP32) or "hc_" in name
        want = torch.int64 if name.endswith("tid2eid") else torch.float32 if wide else torch.bfloat16
        assert t.dtype == want, name
    back = load(tmp_path, dtype="bfloat16")
    save(model, tmp_path / "wide", layout=layout)
    assert same_weights(back, load(tmp_path / "wide", dtype="bfloat16")), "a cast on the way out is that on the way in"


def test_balance_steps_survive_a_cast(tmp_path):
    """The router's bias moves by 1e-3 a step: in bf16 a bias of 1 would stay where it is."""
    model = small_model((4,), num_hash_layers=0)
    bias = model.layers[0].ffn.gate.bias
    bias.copy_(1 + 1e-3 * torch.arange(len(bias)))
    save(model, tmp_path, dtype="bfloat16")
    assert torch.equal(load(tmp_path, dtype="bfloat16").layers[0].ffn.gate.bias, bias)


def test_dtypes(model, tmp_path):
    """A cast touches the large matrices only, on the way out and on the way in."""
    save(model, tmp_path, dtype=torch.bfloat16)
    wide, narrow = load(tmp_path), load(tmp_path, dtype="bfloat16")
    assert wide.embed.weight.dtype == torch.float32 and narrow.embed.weight.dtype == torch.bfloat16
    assert json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))["torch_dtype"] == "bfloat16"
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


CONTROLS = {
    kind: preset_of(kind, "tiny").with_(vocab_size=97, num_hidden_layers=2, eos_token_id=(5, 9), bos_token_id=4)
    for kind in ("v32", "llama")
}


@pytest.mark.parametrize("kind", CONTROLS)
@pytest.mark.parametrize("limit", [10**9, 100_000])
def test_a_control_goes_there_and_back_as_what_it_is(tmp_path, kind, limit):
    """One file or shards; every tensor under its own name, the configuration and its kind in config.json."""
    model = randomise(controls.build(CONTROLS[kind]))
    save(model, tmp_path, max_shard_bytes=limit)
    assert len(list(tmp_path.glob("*.safetensors"))) > (1 if limit < 10**6 else 0)
    loaded = load(tmp_path)
    assert type(loaded) is type(model) and loaded.config == CONTROLS[kind] == read_config(tmp_path)
    assert same_weights(model, loaded) and loaded.stop_ids == (5, 9)
    ids = tokens(model, 40)
    with torch.no_grad():
        assert torch.equal(model(ids), loaded(ids))
    half = load(tmp_path, "bfloat16")
    assert half.layers[1].ffn_norm.weight.dtype == torch.float32 and half.embed.weight.dtype == torch.bfloat16
    save(half, tmp_path / "half", dtype="bfloat16")
    assert same_weights(half, load(tmp_path / "half", "bfloat16"))


def test_a_control_that_does_not_fit_or_cannot_be_said(tmp_path):
    model = controls.build(CONTROLS["v32"])
    with pytest.raises(UserError, match="kind v32 is saved in the published layout alone"):
        save(model, tmp_path / "other", "transformers")
    assert not (tmp_path / "other").exists()
    save(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())

    def say(**changes):
        (tmp_path / "config.json").write_text(json.dumps(config | changes))

    say(model_type="mamba")
    refused(tmp_path, "model_type 'mamba'.* deepseek_v4, deepseek_v32, llama")
    say(model_type="deepseek_v4")
    refused(tmp_path, "are one key")
    say(kv_lora_rank=32)
    refused(tmp_path, r"layers\.0\.attn\.wkv_a\.weight .* has shape")
    say()
    rewrite(tmp_path, lambda t: t.pop("layers.1.ffn.gate.bias"))
    refused(tmp_path, r"lacks tensor layers\.1\.ffn\.gate\.bias")
    theirs = {"embed.weight": "model.embed_tokens.weight"}  # under `model.`, our names would still be ours
    rewrite(tmp_path, lambda t: t.update({theirs.get(n, f"model.{n}"): t.pop(n) for n in list(t)}))
    refused(tmp_path, "names its tensors as transformers does")


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

    monkeypatch.setattr(module, "_fill", read)
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


def test_codes_without_their_scales(folder):
    """FP8 weights, and FP4 weights packed two to a byte: named as what they are, not as tensors of a wrong shape."""

    def fp8(tensors):
        tensors["layers.0.attn.wq_a.weight"] = tensors["layers.0.attn.wq_a.weight"].to(torch.float8_e4m3fn)

    shutil.copytree(folder, folder.parent / "fp4")
    rewrite(folder, fp8)
    refused(folder, "layers.0.attn.wq_a.weight is F8_E4M3, codes of a quantised matrix, and has 0 tensors of scales")

    def fp4(tensors):
        name = "layers.0.ffn.experts.0.w1.weight"
        tensors[name] = torch.zeros(tensors[name].shape[0], tensors[name].shape[1] // 2, dtype=torch.int8)
        tensors["layers.0.ffn.experts.0.w1.scale"] = torch.ones(1, 1)

    rewrite(folder.parent / "fp4", fp4)
    refused(folder.parent / "fp4", "the scales of layers.0.ffn.experts.0.w1.weight are F8_E8M0")


def test_folders_that_hold_no_checkpoint(model, tmp_path):
    refused(tmp_path / "nowhere", "does not exist: give the folder")
    refused(tmp_path, "holds neither config.json nor checkpoints/latest")
    save(model, tmp_path)
    (tmp_path / WEIGHTS).rename(tmp_path / "pytorch_model.bin")
    refused(tmp_path, "holds no .safetensors file")


def test_a_shard_or_the_index_is_gone_or_damaged(model, tmp_path):
    save(model, tmp_path, max_shard_bytes=100_000)
    index = (tmp_path / INDEX).read_text(encoding="utf-8")
    places = (3, ["model.safetensors"], "../x.safetensors", "/x.safetensors", "config.json")
    maps = (3, None, [], *({"norm.weight": place} for place in places))
    damages = [index[: len(index) // 2], "[]", "{}", "", "[" * 200_000, '{"weight_map":' * 200_000]
    for damaged in (*damages, *(json.dumps({"weight_map": m}) for m in maps)):
        (tmp_path / INDEX).write_text(damaged, encoding="utf-8")
        refused(tmp_path, "index.json")
    (tmp_path / INDEX).write_bytes(b"\xff\xfe{")
    refused(tmp_path, "index.json is not UTF-8")
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
    left = [good_files]

    def failing(path, *args):
        if not left[0]:
            Path(path).write_bytes(b"half a file")
            raise DiskFull
        left[0] -= 1
        stream_file(path, *args)

    monkeypatch.setattr(writing, "stream_file", failing)
    other = randomise(Transformer(small_config((0, 4, 128), mtp=1)), seed=77)
    with pytest.raises(FileError, match="what was in .* before is as it was"):
        save(other, tmp_path, max_shard_bytes=100_000)
    assert same_weights(model, load(tmp_path))
    assert {f.name for f in tmp_path.iterdir()} == names


class Dies(BaseException):
    """The process ends here: nothing after this line happens."""


FOLDER_STEPS = ("replace", "unlink")  # os.replace, and what Path.unlink calls


@pytest.mark.parametrize("before", [10**9, 250_000])
@pytest.mark.parametrize("after", [10**9, 400_000])
@pytest.mark.parametrize("other", ["weights", "numbers"])
def test_a_save_that_dies_leaves_the_old_model_the_new_one_or_none(model, tmp_path, monkeypatch, before, after, other):
    """Death before and after each step that changes a name, over a folder of one file or of shards.

    "weights": the same configuration, over a folder whose digests have to go.
    "numbers": the new model has the same shapes and another rotary base, so old weights with the new configuration, or
    new ones with the old, would load and be wrong.
    """
    changes = {"rope_theta": 777.0} if other == "numbers" else {}
    new = small_model((0, 4, 128), mtp=1, seed=7, **changes).eval()
    outcomes, step, went_through = [], 0, False
    while not went_through:
        folder = tmp_path / str(step)
        save(model, folder, max_shard_bytes=before)
        if other == "weights":
            write_digests(folder)
        count = [0]

        def counted(real, at=step, count=count):
            def call(*args, **kwargs):
                die_before, die_after = count[0] == at, count[0] + 1 == at
                count[0] += 2
                if die_before:
                    raise Dies
                out = real(*args, **kwargs)
                if die_after:
                    raise Dies
                return out

            return call

        with monkeypatch.context() as patched:
            for name in FOLDER_STEPS:
                patched.setattr(os, name, counted(getattr(os, name)))
            patched.setattr(files_module(), "discard", lambda path: None)  # a dead process tidies nothing
            patched.setattr(files_module(), "synchronise", lambda path: None)  # which costs time, and names no file
            try:
                save(new, folder, max_shard_bytes=after)
                went_through = True
            except Dies:
                pass
        try:
            found = load(folder)
        except UserError as error:
            assert "config.json" in str(error)
            outcomes.append("none")
        else:
            is_old = found.config == model.config and same_weights(found, model)
            assert is_old or (found.config == new.config and same_weights(found, new)), f"step {step}"
            outcomes.append("old" if is_old else "new")
        save(new, folder, max_shard_bytes=after)
        assert same_weights(load(folder), new), "what a dead process left does not hinder the next"
        assert not list(folder.glob(".*")), "and is cleared away"
        step += 1
    assert outcomes[0] == "old" and outcomes[-1] == "new" and set(outcomes[1:-2]) == {"none"}


def files_module():
    return sys.modules["dsv4.files"]


def test_a_save_over_one_file_is_one_step(model, tmp_path, monkeypatch):
    """Same configuration, one weight file: there is no moment without a checkpoint."""
    save(model, tmp_path)
    seen = []
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (seen.append((tmp_path / "config.json").exists()), replace(a, b)))
    save(small_model((0, 4, 128), mtp=1, seed=3), tmp_path)
    assert seen == [True]


def test_a_save_over_a_listed_folder_drops_the_list(model, folder):
    """digests.json speaks of the old files: left there, it would refuse the new ones."""
    write_digests(folder)
    other = small_model((0, 4, 128), mtp=1, seed=3)
    save(other, folder)
    assert same_weights(load(folder), other) and not (folder / DIGESTS).exists()


def test_files_that_an_old_index_names_do_not_stay(model, tmp_path):
    save(model, tmp_path, max_shard_bytes=100_000)
    rename_in_index(tmp_path, lambda name: name.replace("model-", "mtp-"))
    save(model, tmp_path)
    assert sorted(f.name for f in tmp_path.glob("*.safetensors*")) == [WEIGHTS] and same_weights(model, load(tmp_path))


def said(words: str, function, *args, **kwargs) -> None:
    """A FileError of one line: what the machine refused, where, and what is still safe."""
    with pytest.raises(FileError, match=words) as caught:
        function(*args, **kwargs)
    assert "\n" not in str(caught.value)


def test_places_that_cannot_be_written(model, tmp_path):
    """A file where the folder should be, a folder where a file should be, a name that is too long."""
    (tmp_path / "file").write_text("")
    said("cannot make the folder .*file", save, model, tmp_path / "file")
    said("cannot make the folder", save, model, tmp_path / "file" / "below")
    said("too long", save, model, tmp_path / ("x" * 300))
    for name in (WEIGHTS, "config.json"):
        (tmp_path / name / "in the way").mkdir(parents=True)
        said(f"cannot write .*{name}: it is a folder", save, model, tmp_path)
        shutil.rmtree(tmp_path / name)
    assert [f.name for f in tmp_path.iterdir()] == ["file"], "no litter"


def test_a_folder_that_is_deleted_meanwhile(model, tmp_path, monkeypatch):
    folder = tmp_path / "gone"

    def failing(path, *args):
        shutil.rmtree(folder, ignore_errors=True)
        stream_file(path, *args)

    monkeypatch.setattr(writing, "stream_file", failing)
    said(f"cannot write {folder}", save, model, folder)


def test_a_file_that_the_machine_cuts_short(tmp_path):
    """Nothing of the file stays."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
        words = "cannot write .*weights: .*File too large.*; the old one is whole"
        said(words, write_tensors, tmp_path / "weights", {"a": torch.ones(5000)}, safe="the old one is whole")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert not list(tmp_path.iterdir())


def test_what_a_dead_process_left_is_cleared_away(model, folder):
    """Its shards, its small files, and the temporaries of safetensors itself; nobody else's files."""
    left = [".shard-00007.tmp", ".config.json.tmp", f".{INDEX}.tmp", ".tmpAb3dEf", ".tmpfiles.conf"]
    for name in left:
        (folder / name).write_bytes(b"half")
    save(model, folder)
    assert sorted(f.name for f in folder.iterdir()) == [".tmpfiles.conf", "config.json", WEIGHTS]


def test_small_files_on_a_full_disk(model, folder, monkeypatch):
    """The weights fitted, config.json does not: the old checkpoint stays."""
    real = Path.write_text

    def failing(self, text, *args, **kwargs):
        if ".config.json" in self.name:
            raise OSError(28, "No space left on device")
        return real(self, text, *args, **kwargs)

    monkeypatch.setattr(Path, "write_text", failing)
    other = small_model((0, 4, 128), mtp=1, seed=3, rope_theta=500.0)
    said("config.json: No space left on device; what was in .* is as it was", save, other, folder)
    assert same_weights(load(folder), model) and sorted(f.name for f in folder.iterdir()) == ["config.json", WEIGHTS]


def test_a_file_is_on_the_disk_before_its_name_is(model, tmp_path, monkeypatch):
    """fsync of every file before the first rename, and of the folder after the last."""
    synced, order = files_module().synchronise, []
    replace = os.replace
    monkeypatch.setattr(files_module(), "synchronise", lambda path: (order.append(path.name), synced(path)))
    monkeypatch.setattr(os, "replace", lambda a, b: (order.append("rename"), replace(a, b)))
    save(model, tmp_path / "new", max_shard_bytes=200_000)
    first = order.index("rename")
    assert {f".{name}.tmp" for name in ("config.json", INDEX)} < set(order[:first])
    assert sum(name.startswith(".shard-") for name in order[:first]) == len(list((tmp_path / "new").glob("model-*")))
    assert order[-2:] == ["rename", "new"] and order[-3] == "new", "config.json comes last, after the others are there"


def test_a_model_without_weights(tmp_path):
    with torch.device("meta"):
        model = Transformer(small_config())
    with pytest.raises(UserError, match="meta device"):
        save(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()


# --- a file that has changed ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", [WEIGHTS, "config.json", "generation_config.json", INDEX])
def test_a_changed_file_is_refused_where_digests_are_listed(model, tmp_path, name):
    """One bit in a tensor's body, a digit in config.json: it loads, and is another model. Without the list, it does."""
    limit = 100_000 if name == INDEX else 10**9
    save(model, tmp_path, max_shard_bytes=limit)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 3}', encoding="utf-8")
    write_digests(tmp_path)
    assert same_weights(model, load(tmp_path))
    content = bytearray((tmp_path / name).read_bytes())
    content[{"config.json": content.find(b"10000.0"), WEIGHTS: -1}.get(name, content.find(b"3"))] ^= 2
    (tmp_path / name).write_bytes(content)
    refused(tmp_path, f"{name} has changed since it was written: .*remove digests.json")
    if name == "config.json":
        with pytest.raises(UserError, match="config.json has changed"):
            read_config(tmp_path)
    if name != INDEX:
        (tmp_path / DIGESTS).unlink()
        other = load(tmp_path)
        assert not same_weights(model, other) or other.config != model.config or other.stop_ids == (1,)


def test_a_file_that_is_not_read_is_not_judged(model, folder):
    """The optimiser's tensors and the tokenizer are for others to check."""
    for name in ("optimizer.safetensors", "tokenizer.json"):
        (folder / name).write_bytes(b"old")
    write_digests(folder)
    (folder / "tokenizer.json").write_bytes(b"new")
    (folder / "optimizer.safetensors").unlink()
    assert same_weights(model, load(folder))


def test_a_listed_weight_file_that_is_gone(model, tmp_path):
    save(model, tmp_path)
    write_digests(tmp_path)
    shutil.move(tmp_path / WEIGHTS, tmp_path / "mtp.safetensors")
    refused(tmp_path, f"lacks '{WEIGHTS}', which its digests.json lists")


# --- stop ids ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("config", "generation", "want"), [
    (1, None, (1,)), (1, {"eos_token_id": 5}, (1, 5)), (None, {"eos_token_id": [9, 5, 9]}, (5, 9)),
    ((3, 1), {"eos_token_id": [1, 2]}, (1, 2, 3)), (None, None, ()), (1, {"temperature": 0.6}, (1,)),
    (1, {"eos_token_id": None}, (1,)),
])  # fmt: skip
def test_stop_ids_come_from_both_files_and_survive_saving(tmp_path, config, generation, want):
    save(small_model((0,), eos_token_id=config), tmp_path)
    assert not (tmp_path / "generation_config.json").exists()
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation), encoding="utf-8")
    model = load(tmp_path)
    assert model.stop_ids == want and model.config.eos_token_id == config
    save(model, tmp_path / "again")
    again = load(tmp_path / "again")
    assert again.stop_ids == want and again.config == model.config
    assert (tmp_path / "again" / "generation_config.json").exists() == (want != model.config.stop_ids)


def test_saving_over_generation_settings_keeps_the_others(tmp_path):
    """Another model's stop ids go, its temperature stays."""
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7], "temperature": 0.6}', encoding="utf-8")
    save(small_model((0,), eos_token_id=1), tmp_path)
    written = json.loads((tmp_path / "generation_config.json").read_text(encoding="utf-8"))
    assert written == {"eos_token_id": [1], "temperature": 0.6} and load(tmp_path).stop_ids == (1,)


@pytest.mark.parametrize("content", [
    '{"eos_token_id": 97}', '{"eos_token_id": -1}', '{"eos_token_id": "1"}', '{"eos_token_id": [1, null]}',
    '{"eos_token_id": true}', '{"eos_token_id": {}}', '{"eos_token_id": 1e400}', "[]", "null", "{", "[" * 200_000,
])  # fmt: skip
def test_damaged_generation_settings(folder, content):
    (folder / "generation_config.json").write_text(content, encoding="utf-8")
    refused(folder, "generation_config.json")


# --- folders from the wild -----------------------------------------------------------------------------


def rename_in_index(folder: Path, new_name) -> None:
    """Rename the shards, and say so in the index."""
    index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    for name in set(index["weight_map"].values()):
        (folder / new_name(name)).parent.mkdir(exist_ok=True)
        shutil.move(folder / name, folder / new_name(name))
    index["weight_map"] = {tensor: new_name(name) for tensor, name in index["weight_map"].items()}
    (folder / INDEX).write_text(json.dumps(index), encoding="utf-8")


@pytest.mark.parametrize("new_name", [
    lambda name: f"weights/{name}", lambda name: name.replace("model", "consolidated"),
    lambda name: "mtp.safetensors" if "00001-of" in name else name,
], ids=["sub-folder", "other names", "mtp"])  # fmt: skip
def test_an_index_may_name_any_file_in_its_folder(model, tmp_path, new_name):
    save(model, tmp_path, max_shard_bytes=100_000)
    rename_in_index(tmp_path, new_name)
    assert same_weights(model, load(tmp_path))
    victim = next(f for f in tmp_path.rglob("*.safetensors") if "model-" not in f.name or f.parent != tmp_path)
    victim.unlink()
    refused(tmp_path, f"lacks .*{victim.name}, which its index lists")


def test_mtp_weights_in_a_file_of_their_own(model, tmp_path):
    """Without an index."""
    save(model, tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    mtp = {name: tensors.pop(name) for name in list(tensors) if name.startswith("mtp.")}
    save_file(tensors, tmp_path / WEIGHTS)
    save_file(mtp, tmp_path / "mtp.safetensors")
    assert same_weights(model, load(tmp_path))


def without_mtp(tensors: dict) -> None:
    for name in [name for name in tensors if "mtp." in name]:
        del tensors[name]


def same_trunk(with_mtp: Transformer, trunk: Transformer) -> bool:
    want = {name: t for name, t in with_mtp.state_dict().items() if not name.startswith("mtp.")}
    got = trunk.state_dict()
    return want.keys() == got.keys() and all(torch.equal(t, want[name]) for name, t in got.items())


def test_a_published_folder_without_its_mtp_block(model, folder):
    """The sentence offers two ways out, and both work."""
    rewrite(folder, without_mtp)
    refused(folder, r"no mtp\.\* .*load\(folder, mtp=False\) or with num_nextn_predict_layers 0 in its config.json")
    trunk = load(folder, mtp=False)
    assert same_trunk(model, trunk) and trunk.config.num_nextn_predict_layers == 0
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, "num_nextn_predict_layers": 0}), encoding="utf-8")
    assert same_trunk(model, load(folder))


def test_the_mtp_block_can_be_left_out_or_be_too_much(model, folder):
    assert same_trunk(model, load(folder, mtp=False))
    config = model.config.with_(num_nextn_predict_layers=0, compress_ratios=model.config.trunk_ratios)
    refused(folder, r"too many, such as mtp\..*load\(folder, mtp=False\)", config=config)
    assert same_trunk(model, load(folder, mtp=False, config=config))


@pytest.mark.parametrize("head", ["head.weight", "model.head.weight", "lm_head.weight"])
def test_published_names_under_a_prefix(model, folder, head):
    """Told from transformers' layout, whose names have the same prefix."""

    def prefix(tensors):
        for name in list(tensors):
            tensors[head if name == "head.weight" else f"model.{name}"] = tensors.pop(name)

    rewrite(folder, prefix)
    assert same_weights(model, load(folder))
    rewrite(folder, lambda tensors: tensors.update({"norm.weight": torch.ones(48)}))
    refused(folder, "norm.weight is there twice")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", [
    "rotary_emb.inv_freq", "model.rotary_emb.inv_freq", "model.layers.0.self_attn.rotary_emb.inv_freq",
    "model.rotary_emb.compress_inv_freq", "freqs_cis",
])  # fmt: skip
def test_tables_that_carry_no_information_are_passed_over(model, tmp_path, layout, name):
    save(model, tmp_path, layout=layout)
    want = load(tmp_path)
    rewrite(tmp_path, lambda tensors: tensors.update({name: torch.ones(4)}))
    assert same_weights(want, load(tmp_path))
    rewrite(tmp_path, lambda tensors: tensors.update({f"{name}_bias": torch.ones(4)}))
    refused(tmp_path, "1 tensors too many")


@pytest.mark.parametrize("key", ["quantization", "quantization_config"])
def test_a_word_of_quantisation_over_plain_weights(model, folder, key):
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config[key] = {"quant_method": "fp8", "group_size": 64, "bits": 4}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert same_weights(model, load(folder))


# --- which folder a path means ---------------------------------------------------------------------------


def test_a_run_folder_is_its_latest_checkpoint(model, tmp_path):
    checkpoints = tmp_path / "checkpoints"
    save(small_model((0,)), checkpoints / "step-000001")
    save(model, checkpoints / "step-000002")
    (checkpoints / "latest").write_text("step-000002\n", encoding="utf-8")
    assert same_weights(model, load(tmp_path)) and read_config(str(tmp_path)) == model.config
    newest = checkpoints / "step-000002"
    assert resolve_checkpoint(tmp_path) == newest == resolve_checkpoint(newest)


@pytest.mark.parametrize("content", [
    b"\xff\xfe", b"", b"..", b".", b"../x", b"../checkpoints/step-000001", b"step-000001/", b"/", b"x" * 100_000,
    b"step-000001\nstep-000001", b"\0", b"step-000003", b".hidden", b"latest",
])  # fmt: skip
def test_a_damaged_pointer(model, tmp_path, content):
    """Also one that would lead out of the run, or to the folder of all checkpoints."""
    checkpoints = tmp_path / "checkpoints"
    save(model, checkpoints / "step-000001")
    save(model, checkpoints / ".hidden")
    (checkpoints / "latest").write_bytes(content)
    refused(tmp_path, "latest .*step-000001")
    with pytest.raises(UserError, match="latest") as caught:
        read_config(tmp_path)
    assert len(str(caught.value)) < 600


def test_a_pointer_with_nothing_to_point_at(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    refused(tmp_path, "no finished checkpoint yet")
    (tmp_path / "checkpoints" / "latest").mkdir()
    refused(tmp_path, "cannot read the pointer")
    refused(tmp_path / ("x" * 300), "too long")


def test_a_given_configuration_needs_no_file(model, folder):
    (folder / "config.json").unlink()
    refused(folder, "holds neither config.json")
    assert same_weights(model, load(folder, config=model.config))


def test_a_checkpoint_can_be_read_by_whom_its_folder_lets_in(tmp_path: Path) -> None:
    """safetensors writes files that nobody but their owner can read, whatever the process is told to allow."""
    save(small_model(), tmp_path / "a")
    (tmp_path / "plain").write_text("")
    modes = {f.name: f.stat().st_mode for f in (tmp_path / "a").iterdir()}
    assert set(modes.values()) == {(tmp_path / "plain").stat().st_mode}, modes


@pytest.mark.parametrize("device", ["nonsense", "cuda:x", "", None])
def test_a_device_that_is_none_is_one_sentence(tmp_path: Path, device: str) -> None:
    save(small_model(), tmp_path / "a")
    with pytest.raises(UserError, match="device .* is unknown: use cpu, cuda"):
        load(tmp_path / "a", device=device)
