"""Failures caught here: `dsv4 inspect` that counts other tensors, bytes or parameters than there are, calls a
checkpoint whole that is not (or the other way round), misses what a known mistake of writers means, takes a model for
another, waits for torch, or gives statistics of other numbers than a model has.
"""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fuzz import TINY, released_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from dsv4 import controls
from dsv4.bench.inspect import SUBJECTS, Subject, contents, lines, num_bytes, write_sparse
from dsv4.checkpoint import load, save, statistics
from dsv4.checkpoint.expected import wanted
from dsv4.checkpoint.identify import V41_DIFFERS
from dsv4.checkpoint.inspect import Report, inspect
from dsv4.checkpoint.names import file_names
from dsv4.checkpoint.statistics import measure, statistics_of
from dsv4.cli.inspect import inspect as command
from dsv4.config import ModelConfig, preset_of
from dsv4.cost.params import parameters
from dsv4.errors import UserError
from dsv4.measure.subjects import small_config, small_model
from dsv4.model import Transformer
from dsv4.ops.weights import pack_matrix

ROOT = Path(__file__).resolve().parents[1]
CONFIG, INDEX, WEIGHTS = "config.json", "model.safetensors.index.json", "model.safetensors"
SMALL = small_config((0, 4, 128), mtp=1)


# --- what should be there ------------------------------------------------------------------------------


def of_model(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        state = Transformer(config).state_dict()
    return {
        name: tuple(tensor.shape[len(place) :])
        for key, tensor in state.items()
        for name, place in file_names(key, tuple(tensor.shape), "published")
    }


@settings(max_examples=10)
@given(
    st.lists(st.sampled_from((0, 4, 128)), min_size=1, max_size=4),
    st.integers(0, 1),
    st.integers(0, 3),
    st.integers(2, 5),
)
def test_the_list_of_tensors_is_the_models(ratios: list[int], mtp: int, hashed: int, experts: int) -> None:
    config = small_config(tuple(ratios), mtp=mtp, num_hash_layers=hashed, n_routed_experts=experts)
    assert {name: want.shape for name, want in wanted(config).items()} == of_model(config)


@pytest.mark.parametrize("preset", ["flash", "pro"])
def test_the_list_of_tensors_is_that_of_the_released_models(preset: str) -> None:
    config = ModelConfig.preset(preset)
    assert {name: want.shape for name, want in wanted(config).items()} == of_model(config)


@pytest.mark.parametrize(("name", "tensors", "size"), [
    ("V4-Flash", 69_187, 159_609_485_896), ("V4-Flash-0731", 72_317, 166_878_536_440),
    ("V4-Pro-0813", 149_782, 892_727_580_904),
])  # fmt: skip
def test_the_stored_tensors_are_those_of_the_releases(name: str, tensors: int, size: int) -> None:
    """Their totals, as published; names, shapes, dtypes and scales all take part in them."""
    _, stored = contents(SUBJECTS[name])
    assert len(stored) == len({n for n, _, _ in stored}) == tensors
    assert sum(num_bytes(dtype, shape) for _, dtype, shape in stored) == size


# --- whole checkpoints -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "what"), [
    pytest.param("V4-Flash-Base", "DeepSeek-V4-Flash-Base, with an MTP block", marks=pytest.mark.slow),
    ("V4-Flash-0731", "DeepSeek-V4-Flash-0731, with a DSpark drafter of 3 stages"),
])  # fmt: skip
def test_a_released_model_in_sixty_shards(tmp_path: Path, name: str, what: str) -> None:
    """Full shapes, sparse files: what it is, that it is whole, and its sums are those of `dsv4 cost`."""
    data, stored = contents(SUBJECTS[name])
    size = write_sparse(tmp_path / "m", data, stored, 60)
    report = inspect(tmp_path / "m")
    assert report.whole and not report.findings and report.what == what
    assert (report.tensors, report.bytes, len(report.files)) == (len(stored), size, 60)
    count = parameters(ModelConfig.preset("flash"))
    assert (report.parameters, report.active) == (count["total"], count["active"])
    assert report.layers == {"window": 2, "csa": 21, "hca": 20} and report.hash_layers == 3
    part = "DSpark drafter" if "0731" in name else "MTP block"
    assert report.parts[part].bytes == (10_862_838_300 if "0731" in name else report.parts[part].bytes) > 10**9
    if "0731" not in name:
        assert report.parts[part].parameters == count["mtp"]


NO_TORCH = """
import sys
sys.modules["torch"] = None
from dsv4.cli import main
main()
"""


def test_inspect_does_not_wait_for_torch(tmp_path: Path) -> None:
    """Loading torch alone takes longer than an answer may."""
    data, stored = contents(Subject(""), SMALL)
    write_sparse(tmp_path / "m", data, stored, 3)
    words = [sys.executable, "-c", NO_TORCH, "inspect", str(tmp_path / "m"), "--json", "--statistics"]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["whole"]


@pytest.mark.parametrize("layout", ["published", "transformers"])
@pytest.mark.parametrize("limit", [10**9, 100_000])
def test_what_save_writes_is_whole(tmp_path: Path, layout: Any, limit: int) -> None:
    model = small_model((0, 4, 128), mtp=1)
    save(model, tmp_path, layout, max_shard_bytes=limit)
    report = inspect(tmp_path)
    assert report.whole and report.layout == layout, report.findings
    count = parameters(model.config)
    assert (report.parameters, report.active) == (count["total"], count["active"])
    assert report.bytes == sum(t.nbytes for f in tmp_path.glob("*.safetensors") for t in load_file(f).values())
    assert "of the DeepSeek-V4 architecture" in report.what
    assert [f.says for f in report.findings] == (
        ["transformers' layout holds no MTP block or drafter"] if layout == "transformers" else []
    )


@pytest.mark.parametrize(
    "changes", [{"attention": "dense"}, {"attention": "lowrank", "attention_rank": 8}, {"residual": "plain"}]
)
def test_relatives_are_judged_by_their_own_model(tmp_path: Path, changes: dict[str, Any]) -> None:
    model = small_model((0, 4, 128), **changes)
    save(model, tmp_path)
    report = inspect(tmp_path)
    assert report.whole and "a relative of DeepSeek-V4" in report.what
    assert report.parameters == parameters(model.config)["total"]


@pytest.mark.parametrize(("kind", "what"), [("v32", "DeepSeek-V3.2"), ("llama", "dense transformer")])
def test_controls(tmp_path: Path, kind: str, what: str) -> None:
    config = preset_of(kind, "tiny").with_(vocab_size=97, num_hidden_layers=2)
    save(controls.build(config), tmp_path)
    report = inspect(tmp_path)
    assert report.whole and what in report.what and "reads it" in report.reads
    count = parameters(config)
    assert (report.parameters, report.active) == (count["total"], count["active"])
    rewrite(tmp_path, lambda t: t.pop("layers.1.attn_norm.weight"))
    assert says(inspect(tmp_path), "layers.1.attn_norm.weight is not there")


def test_a_run_folder_and_a_single_file(tmp_path: Path) -> None:
    model = small_model((0,))
    checkpoint = tmp_path / "checkpoints" / "step-000007"
    save(model, checkpoint)
    (tmp_path / "checkpoints" / "latest").write_text("step-000007")
    report = inspect(tmp_path)
    assert report.whole and report.checkpoint == str(checkpoint) and report.path == str(tmp_path)
    alone = inspect(checkpoint / WEIGHTS)
    assert alone.tensors == report.tensors and alone.what == "DeepSeek-V4 by its tensors" and alone.active is None


# --- what is something else --------------------------------------------------------------------------------


def stand_in(folder: Path, data: dict[str, Any] | None, *names: str) -> Report:
    folder.mkdir(exist_ok=True)
    if data is not None:
        (folder / CONFIG).write_text(json.dumps(data))
    save_file({name: torch.zeros(2, 2) for name in names}, folder / WEIGHTS)
    return inspect(folder)


@pytest.mark.parametrize(("data", "name", "what"), [
    ({"model_type": "deepseek_v41"}, "layers.1.engram.table", "DeepSeek-V4.1, another architecture"),
    (None, "layers.1.engram.table", "DeepSeek-V4.1, another architecture"),
    ({"model_type": "qwen3"}, "model.layers.0.self_attn.q_proj.weight", "of type 'qwen3', no DeepSeek-V4"),
    ({"model_type": "deepseek_v4"}, "layers.0.attn.wo_a.weight", "with a configuration that cannot be read"),
    (None, "layers.0.attn.wo_a.weight", "DeepSeek-V4 by its tensors"),
    (None, "mtp.2.markov_head.markov_w1.weight", "unknown model"),
    (None, "model.layers.0.self_attn.kv_a_proj_with_mqa.weight", "DeepSeek-V3 or V2 by its tensors"),
    (None, "base.layers.0.attn.wo_a.lora_A.weight", "an adapter (LoRA)"), (None, "x", "unknown model"),
    ({"model_type": 3}, "x", "unknown model"), ({"model_type": None}, "x", "unknown model"),
])  # fmt: skip
def test_what_is_no_v4_is_named(tmp_path: Path, data: dict[str, Any] | None, name: str, what: str) -> None:
    report = stand_in(tmp_path, data, name)
    assert what in report.what and not report.whole and report.findings[0].kind == "config"
    assert (report.differs == V41_DIFFERS) == ("V4.1" in what)


def test_published_v32_is_known_though_not_read(tmp_path: Path) -> None:
    config = preset_of("v32", "tiny").to_json()
    report = stand_in(tmp_path, config, "model.embed_tokens.weight", "model.layers.0.self_attn.q_a_proj.weight")
    assert "DeepSeek-V3.2" in report.what and "published names, not dsv4's" in report.reads


def test_a_folder_of_pickles_or_of_nothing(tmp_path: Path) -> None:
    (tmp_path / CONFIG).write_text(json.dumps(SMALL.to_json()))
    assert says(inspect(tmp_path), "there is no .safetensors file")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    assert says(inspect(tmp_path), "pytorch_model.bin: a pickle, which could run code and is never opened")
    for missing in (tmp_path / "nowhere", tmp_path / ("x" * 300)):
        with pytest.raises(UserError):
            inspect(missing)


# --- what is wrong, and what it means ------------------------------------------------------------------------


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def says(report: Report, words: str, *, harmless: bool = False) -> bool:
    """A finding has these words, and the checkpoint is judged accordingly."""
    found = [f for f in report.findings if words in f.says]
    assert found, [f.says for f in report.findings]
    assert all(f.harmless == harmless and "\n" not in f.says for f in found) and report.whole == harmless
    return True


def released(
    folder: Path, change: Callable[[dict[str, Any], dict[str, Any]], object], config: ModelConfig = SMALL
) -> Report:
    """A small model in the released formats, all holes, after a change of its config.json and its (dtype, shape)s."""
    data, stored = contents(Subject(""), config)
    tensors = {name: (dtype, shape) for name, dtype, shape in stored}
    change(data, tensors)
    write_sparse(folder / "m", data, [(name, *about) for name, about in tensors.items()], 2)
    return inspect(folder / "m")


def without(tensors: dict[str, Any], *words: str) -> None:
    for name in [n for n in tensors if any(word in n for word in words)]:
        del tensors[name]


def renamed(tensors: dict[str, Any], new: Callable[[str], str]) -> None:
    for name in list(tensors):
        tensors[new(name)] = tensors.pop(name)


WQ, GATE, EXPERT = "layers.0.attn.wq_a", "layers.1.ffn.gate", "layers.1.ffn.experts"
WRONG: dict[str, tuple[Callable[[dict[str, Any], dict[str, Any]], object], str]] = {
    "a scale is gone": (lambda c, t: t.pop(f"{WQ}.scale"), f"{WQ}.scale is not there: without it"),
    "all scales of experts": (lambda c, t: without(t, "w2.scale"), "like it: is not there: without it"),
    "a scale of another block": (lambda c, t: t.update({f"{WQ}.scale": ("F8_E8M0", (2, 2))}), "for 128 x 128 numbers"),
    "a scale in BF16": (lambda c, t: t.update({f"{WQ}.scale": ("BF16", (1, 1))}), "is BF16, not F8_E8M0"),
    "E5M2": (lambda c, t: t.update({f"{WQ}.weight": ("F8_E5M2", (24, 48))}), "is F8_E5M2: another FP8"),
    "INT8 by another tool": (lambda c, t: t.update({f"{WQ}.weight": ("I8", (24, 48))}), "another tool's quantisation"),
    "FP4 as F4": (lambda c, t: t.update({f"{EXPERT}.0.w1.weight": ("F4", (24, 48))}), "FP4 under its own type"),
    "a scale beside numbers": (lambda c, t: t.update({f"{WQ}.weight": ("BF16", (24, 48))}), "was left beside a weight"),
    "transposed": (lambda c, t: t.update({f"{WQ}.weight": ("BF16", (48, 24))}), "transposed by the tool"),
    "a quantised norm": (lambda c, t: t.update({"norm.weight": ("F8_E4M3", (48,))}), "never quantised"),
    "the head is tied": (lambda c, t: t.pop("head.weight"), "as if it were tied to the embedding"),
    "no MTP": (lambda c, t: without(t, "mtp."), "the MTP block is not there"),
    "a layer is gone": (lambda c, t: without(t, "layers.1."), "nothing of layer 1 is there"),
    "two layers are gone": (lambda c, t: without(t, "layers.1.", "layers.2."), "nothing of layers 1-2 is there"),
    "another depth": (lambda c, t: t.update({"layers.3.attn_norm.weight": ("BF16", (48,))}), "beyond the last of 3"),
    "no indexers": (lambda c, t: without(t, ".indexer."), "compressors or indexers of layer 1 are not there"),
    "a window that is CSA": (lambda c, t: c.update(compress_ratios=[0, 0, 128, 0]), "compress_ratios differs"),
    "CSA for HCA": (lambda c, t: c.update(compress_ratios=[0, 128, 128, 0]), "is CSA in the file"),
    "hash layers": (lambda c, t: c.update(num_hash_layers=2), "num_hash_layers differs"),
    "a table of floats": (lambda c, t: t.update({"layers.0.ffn.gate.tid2eid": ("F32", (97, 2))}), "a table of expert"),
    "another vocabulary": (lambda c, t: c.update(vocab_size=128), "the vocabulary is another one, or padded"),
    "fewer experts": (lambda c, t: c.update(n_routed_experts=8), "another number of experts"),
    "more experts": (lambda c, t: c.update(n_routed_experts=4), "of an expert that the configuration does not have"),
    "another model": (lambda c, t: renamed(t, lambda n: "x." + n), "it is another model's configuration"),
    "an adapter": (lambda c, t: t.update({f"{WQ}.lora_A.weight": ("BF16", (4, 48))}), "merge it into the"),
    "a drafter": (lambda c, t: t.update({"mtp.0.main_proj.weight": ("BF16", (48, 144))}), "to a DSpark drafter"),
    "a sharded leftover": (lambda c, t: t.update({"norm.weight": ("BF16", (0,))}), "an empty place holder"),
    "an unknown one": (lambda c, t: t.update({"surprise": ("BF16", (1,))}), "nothing that the configuration asks for"),
}  # fmt: skip


@pytest.mark.parametrize("how", WRONG)
def test_what_is_wrong_is_said_with_what_it_means(tmp_path: Path, how: str) -> None:
    change, words = WRONG[how]
    report = released(tmp_path, change)
    assert says(report, words) and report.reads == "not as it is: see the findings"
    assert len(report.findings) < 30, "like findings are one"


@pytest.mark.parametrize(("change", "words"), [
    (lambda c, t: renamed(t, lambda n: n.replace(".scale", ".weight_scale_inv")), "in transformers' spelling"),
    (lambda c, t: renamed(t, lambda n: "model." + n), "have 'model.' before them"),
    (lambda c, t: t.update({f"{WQ}.scale": ("U8", (1, 1))}), "E8M0 exponents as bytes"),
    (lambda c, t: t.update({f"{WQ}.scale": ("F32", (1, 1))}), "as DeepSeek-V3 stores them"),
    (lambda c, t: t.update({f"{EXPERT}.0.w1.weight": ("U8", (24, 24))}), "is U8: packed FP4"),
    (lambda c, t: t.update({"layers.0.ffn.gate.tid2eid": ("I32", (97, 2))}), "the same ids"),
    (lambda c, t: t.update({"layers.0.attn.attn_sink": ("BF16", (4,))}), "was rounded by the tool"),
])  # fmt: skip
def test_what_is_odd_and_harmless(tmp_path: Path, change, words: str) -> None:
    assert says(released(tmp_path, change), words, harmless=True)


def test_experts_stacked_as_in_memory(tmp_path: Path) -> None:
    def stack(config: dict[str, Any], tensors: dict[str, Any]) -> None:
        without(tensors, ".ffn.experts.")
        for layer in range(3):
            tensors[f"layers.{layer}.ffn.experts.gate_up_proj"] = ("BF16", (6, 48, 48))
            tensors[f"layers.{layer}.ffn.experts.down_proj"] = ("BF16", (6, 48, 24))

    assert says(released(tmp_path, stack), "the experts are stacked")


def test_drafters(tmp_path: Path) -> None:
    """Whole, without one of its tensors, and under the configuration of a model with an MTP block."""
    drafting = small_config((0, 4, 128), dspark=3, hidden_size=SMALL.hidden_size)
    assert released(tmp_path / "a", lambda c, t: None, drafting).whole
    for name in ("mtp.2.markov_head.markov_w2.weight", "mtp.2.confidence_head.proj.weight"):
        cut = released(tmp_path / name, lambda c, t, name=name: t.pop(name), drafting)
        assert says(cut, f"{name} is not there")

    def preview(config: dict[str, Any], tensors: dict[str, Any]) -> None:
        config.clear()
        config.update(SMALL.to_json())

    swapped = released(tmp_path / "d", preview, drafting)
    assert any("belongs to a DSpark drafter" in f.says for f in swapped.findings) and not swapped.whole


def test_files_that_are_gone_damaged_or_too_many(tmp_path: Path) -> None:
    """What is in the others is told all the same."""
    model = small_model((0, 4, 128), mtp=1)
    save(model, tmp_path, max_shard_bytes=100_000)
    shards = sorted(tmp_path.glob("*.safetensors"))
    index = json.loads((tmp_path / INDEX).read_text())
    content = shards[1].read_bytes()
    shards[1].unlink()
    report = inspect(tmp_path)
    held = sum(place == shards[1].name for place in index["weight_map"].values())
    assert says(report, f"{shards[1].name} is not there: the index lists {held:,} tensors in it")
    assert report.tensors == len(index["weight_map"]) - held
    shards[1].write_bytes(content[:-1])
    assert says(inspect(tmp_path), "is truncated")
    shards[1].write_bytes(content)
    name = next(n for n, place in index["weight_map"].items() if place == shards[0].name)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {**index["weight_map"], name: shards[1].name}}))
    assert says(inspect(tmp_path), "where the index does not say so", harmless=True)
    lost = {**index["weight_map"], "model.embed.weight": shards[0].name}  # a reader would take it for embed.weight
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": lost}))
    assert says(inspect(tmp_path), "model.embed.weight is in no file, but the index lists it")
    with pytest.raises(UserError, match="lacks the tensor 'model.embed.weight', which its index lists"):
        load(tmp_path)
    spoilt = {**index["weight_map"], "embed\x7f.weight": shards[0].name}  # nothing that a terminal obeys is printed
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": spoilt}))
    assert says(inspect(tmp_path), r"'embed\x7f.weight' is in no file, but the index lists it")
    (tmp_path / INDEX).unlink()
    assert inspect(tmp_path).whole
    shards[0].unlink()
    assert says(inspect(tmp_path), f"{len(shards) - 1} of {len(shards)} shards are there, and no index")
    shards[0].write_bytes(content)
    assert says(inspect(tmp_path), "remove one")


# --- statistics ----------------------------------------------------------------------------------------


def close(one: statistics.Statistics, numbers: torch.Tensor) -> None:
    x = numbers.double().flatten()
    assert one.count == x.numel()
    want = (x.min().item(), x.max().item(), x.mean().item(), x.square().mean().sqrt().item())
    assert (one.min, one.max, one.mean, one.rms) == pytest.approx(want, rel=1e-6, abs=1e-9)
    assert one.zeros == int((x == 0).sum()) and not one.nan and not one.inf


@pytest.mark.parametrize("chunk", [1 << 20, 512])
@pytest.mark.parametrize("shape", [(130, 256), (3, 2048), (257, 130), (1, 2)])
def test_statistics_are_those_of_the_numbers(tmp_path: Path, monkeypatch, chunk: int, shape: tuple[int, int]) -> None:
    """Plain, FP8 and FP4 matrices, read in pieces smaller than a row or larger than a block."""
    monkeypatch.setattr(statistics, "CHUNK", chunk)
    weight = torch.randn(shape) * torch.logspace(-3, 3, shape[0])[:, None]
    packed = {code: pack_matrix(weight, code) for code in ("fp8", "fp4")}
    e8m0 = torch.float8_e8m0fnu
    save_file({
        "plain": weight, "half": weight.bfloat16(), "ids": torch.arange(7), "none": torch.zeros(0, 3),
        "fp8.weight": packed["fp8"].codes.view(torch.float8_e4m3fn), "fp8.scale": packed["fp8"].scales.view(e8m0),
        "fp4.weight": packed["fp4"].codes.view(torch.int8), "fp4.scale": packed["fp4"].scales.view(e8m0),
    }, tmp_path / WEIGHTS)  # fmt: skip
    found = measure(inspect(tmp_path / WEIGHTS))
    close(found["plain"], weight)
    close(found["half"], weight.bfloat16())
    close(found["ids"], torch.arange(7))
    for code, matrix in packed.items():
        close(found[f"{code}.weight"], matrix.unpack())
        close(found[f"{code}.scale"], matrix.scales.view(e8m0).double())
    saturated = (packed["fp8"].codes & 127) == 126
    assert found["fp8.weight"].saturated == int(saturated.sum())
    assert found["none"].count == 0 and found["none"].to_json()["mean"] is None


def test_numbers_that_are_none(tmp_path: Path) -> None:
    x = torch.ones(4, 4)
    x[0, 0], x[1, 1], x[2, 2] = torch.nan, torch.inf, -torch.inf
    save_file({"a": x, "b": x[3:].clone()}, tmp_path / WEIGHTS)
    report = inspect(tmp_path / WEIGHTS)
    one = measure(report)["a"]
    assert (one.nan, one.inf, one.count, one.min, one.max) == (1, 2, 16, 1, 1)
    assert [f.says for f in report.findings if f.kind == "numbers"] == [
        "a has numbers that are NaN or infinite: it cannot be computed with"
    ]


def test_a_nan_scale_spoils_its_block_alone(tmp_path: Path) -> None:
    """It is whole by its headers; all numbers of the block are NaN."""
    folder = tmp_path / "m"
    released_checkpoint(folder)
    before = inspect(folder)
    assert before.whole and not [f for f in before.findings if measure(before) and f.kind == "numbers"]
    info, file = before.places["layers.0.ffn.experts.0.w1.scale"]
    raw = bytearray(file.read_bytes())
    raw[info.begin] = 0xFF
    file.write_bytes(raw)
    report = inspect(folder)
    found = measure(report)
    assert found["layers.0.ffn.experts.0.w1.weight"].nan == TINY["hidden_size"]
    assert says(report, "has numbers that are NaN or infinite")


def test_a_tensor_that_is_not_computed_and_a_file_that_shrinks(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(4, dtype=torch.float8_e5m2)}, tmp_path / WEIGHTS)
    report = inspect(tmp_path / WEIGHTS)
    assert measure(report) == {"a": None}
    save_file({"a": torch.zeros(400)}, tmp_path / WEIGHTS)
    info, file = inspect(tmp_path / WEIGHTS).places["a"]
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(UserError, match="has become shorter"):
        statistics_of(file, info)


# --- the verb ------------------------------------------------------------------------------------------


def test_the_verb(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import typer

    save(small_model((0, 4, 128), mtp=1), tmp_path)
    command(tmp_path, statistics=True)
    text = capsys.readouterr().out
    wanted = ["it loads", "3: 1 window, 1 csa, 1 hca; the first 1 hash-routed", "173,243", "as configured", "MTP block"]
    wanted += ["layers.N.ffn.experts.N.w1.weight", "every tensor that the configuration asks for is there"]
    assert not [words for words in wanted if words not in text]
    command(tmp_path, tensors=True, as_json=True)
    out = json.loads(capsys.readouterr().out)
    assert len(out["tensor_list"]) == out["tensors"] and out["configured"]["total"] == out["parameters"]
    rewrite(tmp_path, lambda t: t.pop("norm.weight"))
    for as_json in (False, True):
        with pytest.raises(typer.Exit) as ended:
            command(tmp_path, as_json=as_json)
        assert ended.value.exit_code == 1 and "norm.weight is not there" in capsys.readouterr().out


def test_the_report_on_its_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dsv4.bench import inspect as bench

    monkeypatch.setattr(bench, "SUBJECTS", {"V4-Tiny": Subject("tiny")})
    rows = bench.measure(tmp_path, 60, 1, lambda line: None)
    count = parameters(ModelConfig.preset("tiny"))
    assert [(r["model"], r["parameters"], r["active"], r["shards"], r["whole"]) for r in rows] == [
        ("V4-Tiny", count["total"], count["active"], 60, True)
    ]
    assert 0 < rows[0]["seconds"] <= rows[0]["slowest"] and "yes: a model of the DeepSeek-V4" in lines(rows)[1]
