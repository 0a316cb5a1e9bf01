"""Failures caught here: a layer with packed weights that computes something else than one of the same numbers, matrices
packed that are released as numbers or the other way round, a report whose bytes are not those that are allocated or
whose layers do not add up to the counted models, work that begins though the memory is too small for it.
"""

import copy
import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from dsv4 import cost
from dsv4.bench import layer as bench
from dsv4.bench.cost import REAL, SMALL
from dsv4.cli import main
from dsv4.config import AnyConfig
from dsv4.cost import kv_bytes
from dsv4.cost.params import families
from dsv4.errors import UserError
from dsv4.measure.layer import (
    decode_step,
    experts_code,
    filled_memory,
    memory_bytes,
    meta_block,
    random_block,
    random_inputs,
    random_matrix,
    weight_bytes,
)
from dsv4.measure.roofline import Rates
from dsv4.measure.rows import TOLERANCE, difference
from dsv4.measure.slices import slices
from dsv4.model.packed import pack_weights, released_code
from dsv4.ops.weights import PackedMatrix, pack_matrix

MODELS = {"v3.2": SMALL["small V3.2"], "pro": SMALL["small V4"]}
RATES = Rates(1e12, 1e10)
PARTS = {f"{name}:{part.place}": part.config for name, config in MODELS.items() for part in slices(config)}
CONTEXT = 2048  # beyond every top-k


@pytest.fixture(autouse=True)
def no_rates_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "machine_rates", lambda dtype: RATES)


def in_numbers(block: nn.Module, config: AnyConfig, dtype: torch.dtype) -> nn.Module:
    """A copy with plain parameters in place of packed matrices."""
    plain, like = copy.deepcopy(block), meta_block(config, dtype)
    for name, matrix in list(plain.named_modules()):
        if isinstance(matrix, PackedMatrix):
            path, _, leaf = name.rpartition(".")
            module = plain.get_submodule(path)
            delattr(module, leaf)
            numbers = matrix.unpack(dtype).view(like.get_parameter(name).shape)
            module.register_parameter(leaf, nn.Parameter(numbers, requires_grad=False))
    assert {n for n, _ in plain.named_parameters()} == {n for n, _ in like.named_parameters()}
    return plain


@pytest.mark.parametrize("name", PARTS)
def test_a_packed_layer_is_the_layer_of_its_numbers(name: str) -> None:
    """In fp32, over a packed memory, and twice: a step leaves the memory as it was."""
    config, dtype = PARTS[name], torch.float32
    block, (x,) = random_block(config, dtype), random_inputs(config, torch.float32, 1)
    plain = in_numbers(block, config, dtype)
    assert any(isinstance(m, PackedMatrix) for m in block.modules())
    memory = filled_memory(config, CONTEXT, "packed", dtype)
    got, want = decode_step(block, config, memory, x), decode_step(plain, config, memory, x)
    assert memory.length == CONTEXT - 1
    assert torch.equal(decode_step(block, config, memory, x), got)
    assert want.std() > 0.1 and difference(got, want)["max_rel"] <= TOLERANCE[dtype]


@pytest.mark.parametrize("model", REAL)
def test_what_is_packed_is_what_is_counted_so(model: str) -> None:
    """Every parameter of every layer at real width, on the meta device; V3.2's absorbed matrix stays in numbers."""
    for part in slices(REAL[model]):
        found = families(part.config)
        for name, p in meta_block(part.config, torch.bfloat16).named_parameters():
            storage = [f.storage for f in found if f.matches(f"layers.0.{name}")]
            assert len(storage) == 1, name
            code = released_code(name, experts_code(part.config))
            wanted = storage[0][:3] if storage[0].startswith("fp") and storage[0] != "fp32" else ""
            assert code == ("" if name == "attn.wkv_b.weight" else wanted), name
            assert not code or p.dim() > 1


def test_packing_a_layer_rounds_each_matrix_in_place() -> None:
    config = PARTS["pro:csa"]
    block = in_numbers(random_block(config, torch.float32), config, torch.float32)
    for p in block.parameters():
        p.data += 0.3 * p.data.std() * torch.randn(p.shape)  # so that there is something to round
    before = {name: p.detach().clone() for name, p in block.named_parameters()}
    pack_weights(block)
    for name, p in before.items():
        if code := released_code(name):
            got = block.get_submodule(name)
            assert isinstance(got, PackedMatrix) and got.code == code
            assert torch.equal(got.unpack(), pack_matrix(p.flatten(0, -2), code).unpack()), name
        else:
            assert torch.equal(block.get_parameter(name), p), name


@pytest.mark.parametrize("code", ["fp8", "fp4"])
@pytest.mark.parametrize(("rows", "columns"), [(1, 2), (130, 130), (300, 1024)])
def test_random_matrices_are_finite_and_keep_a_size(code: str, rows: int, columns: int) -> None:
    matrix = random_matrix(rows, columns, code, torch.Generator().manual_seed(3))
    numbers = matrix.unpack()
    assert numbers.shape == (rows, columns) and numbers.isfinite().all()
    if rows == 300:
        assert 0.4 < numbers.square().mean().sqrt() * columns**0.5 < 1.6
        assert len(matrix.codes.unique()) == (254 if code == "fp8" else 256) and len(matrix.scales.unique()) == 2


@pytest.mark.parametrize("name", PARTS)
def test_bytes_are_known_before_they_are_allocated(name: str) -> None:
    config = PARTS[name]
    block = random_block(config, torch.bfloat16)
    tensors = [*block.parameters(), *block.buffers()]
    held = sum(t.untyped_storage().nbytes() for t in tensors)
    # codes are drawn eight bytes at a time
    assert 0 <= held - weight_bytes(block, config, read=False) < 8 * len(tensors)
    assert weight_bytes(block, config, read=False) == weight_bytes(
        meta_block(config, torch.bfloat16), config, read=False
    )
    assert weight_bytes(block, config, read=True) <= weight_bytes(block, config, read=False)
    for format in ("packed", "bfloat16"):
        memory = filled_memory(config, CONTEXT, format, torch.bfloat16)
        assert memory.bytes() == memory_bytes(config, CONTEXT, format)


def test_the_report_adds_up_to_the_counted_models() -> None:
    """Bytes of memories are those allocated, in the ratio that dsv4/cost counts; FLOPs of layers and ends are all."""
    notes: list[str] = []
    found = bench.measure(bench.choose("", MODELS), CONTEXT, 1, notes.append)
    assert [(r["model"], r["kind"], r["cache"]) for r in found["layers"]] == [
        ("v3.2", "dense", "packed"), ("v3.2", "dense", "bfloat16"), ("v3.2", "moe", "packed"),
        ("v3.2", "moe", "bfloat16"), ("pro", "window", "packed"), ("pro", "csa", "packed"), ("pro", "hca", "packed"),
    ]  # fmt: skip
    held = {}
    for name, config in MODELS.items():
        rows = [r for r in found["layers"] if r["model"] == name and r["cache"] == "packed"]
        page, back = (1, 0) if name == "v3.2" else (128, 1)
        counted = kv_bytes.held(config, CONTEXT, allocated=True, page_tokens=page, max_rewind=back)
        held[name] = sum(r["layers"] * r["cache_bytes"] for r in rows)
        assert held[name] == sum(counted.values())
        read = sum(r["layers"] * r["cache_bytes_read_counted"] for r in rows)
        assert read == sum(kv_bytes.read(config, CONTEXT).values())
        (whole,) = (m for m in found["models"] if m["model"] == name)
        assert whole["fp8_flops_counted"] == pytest.approx(cost.weighted(cost.decode(config, CONTEXT), "C"), rel=1e-12)
        assert whole["cache_bytes"] == held[name] and whole["fp8_flops_counted_percent_said"] is None
    for row in found["layers"]:
        assert row["cache_bytes"] == row["cache_bytes_counted"] and row["ms"] > 0
        assert row["attention_ms"] + row["experts_ms"] <= row["ms"] and row["indexer_ms"] <= row["attention_ms"]
        assert (row["indexer_ms"] > 0) == (row["model"] == "v3.2" or row["kind"] == "csa")
        assert row["read_gb_s"] == 10 and not row["ops"]
        # fp32 where the model keeps it, which is not less than what is released
        assert row["weight_bytes_read"] >= 0.999 * row["weight_bytes_read_counted"]
    pro = next(m for m in found["models"] if m["model"] == "pro")
    assert pro["cache_bytes_percent"] == 100 * held["pro"] / held["v3.2"]
    text = "\n".join(bench.lines(found))
    assert "pro:csa" in text and "% of V3.2" in text and "said" not in text


def test_real_layers_come_to_the_published_ratios() -> None:
    """Before anything runs: allocated bytes as they will be, FLOPs of all layers, in percent of V3.2's."""
    context = 1 << 20
    chosen = bench.choose("")
    bytes_of, flops_of = {}, {}
    for name in REAL:
        parts = [one.part for one in chosen if one.model == name]
        bytes_of[name] = sum(p.times * memory_bytes(p.config, context, "packed") for p in parts)
        flops = sum(p.times * bench.layer_flops(p.config, context, "C") for p in parts)
        flops_of[name] = flops + bench.end_flops(parts[0].config, "C")
    percent = {n: (100 * flops_of[n] / flops_of["v3.2"], 100 * bytes_of[n] / bytes_of["v3.2"]) for n in REAL}
    assert percent["pro"] == pytest.approx((26.70, 10.51), abs=0.005)
    assert percent["flash"] == pytest.approx((10.09, 7.34), abs=0.005)


def test_a_model_is_summed_only_when_all_its_kinds_ran() -> None:
    found = bench.measure(bench.choose("pro:csa,v3.2:moe,pro:csa", MODELS), CONTEXT, 1, lambda line: None)
    assert len(found["layers"]) == 3 and not found["models"]
    found = bench.measure(bench.choose("pro", MODELS), CONTEXT, 1, lambda line: None)
    assert [m["cache_bytes_percent"] for m in found["models"]] == [None]
    assert "of V3.2" not in "\n".join(bench.lines(found))


def test_each_op_of_a_layer_is_shown_on_request() -> None:
    found = bench.measure(bench.choose("pro:csa", MODELS), CONTEXT, 1, lambda line: None, each_op=True)
    (row,) = found["layers"]
    by_name = {r["op"]: r for r in row["ops"]}
    # without what the ends of a model do: the layer's products alone
    assert by_name["step"]["flops"] == row["flops_counted"]
    assert by_name["experts"]["calls"] == 1 and by_name["index_scores_topk"]["calls"] == 1
    assert "ops of pro:csa, packed memory" in bench.lines(found)


def test_what_does_not_fit_is_refused_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "random_block", lambda *_: pytest.fail("work was begun"))
    with pytest.raises(UserError, match=r"pro:csa at 1,048,576 tokens takes 15\.\d GB and 8\.0 GB of memory are free"):
        bench.check(bench.choose("flash,pro:csa"), 1 << 20, int(8e9))
    bench.check(bench.choose("flash"), 1 << 20, int(8e9))
    monkeypatch.setattr(bench, "available_bytes", lambda: 1000)
    with pytest.raises(UserError, match="flash:hca at 4,096 tokens takes"):
        bench.measure(bench.choose("flash:hca"), 4096, 1, lambda line: None)
    with pytest.raises(UserError, match="beyond pro:hca"):
        bench.check(bench.choose("pro:hca"), 1 << 21, 1 << 40)
    with pytest.raises(UserError, match="'flash:cas' is unknown.*flash:csa"):
        bench.choose("flash:cas")


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["dsv4", "bench", "layer", *arguments])
    try:
        main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def test_the_verb_writes_what_it_prints(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "REAL", MODELS)
    out = tmp_path / "deep" / "layer.json"
    options = ["--layers", "pro:hca", "--context", "1k", "--repeats", "1", "--json", "--out", str(out)]
    assert run(monkeypatch, *options) == 0
    told = capsys.readouterr()
    assert json.loads(told.out) == json.loads(out.read_text(encoding="utf-8"))
    assert json.loads(told.out)["layers"][0]["kind"] == "hca" and "weights are drawn" in told.err


@pytest.mark.parametrize(
    "options", [["--layers", "flush"], ["--context", "many"], ["--context", "1k,2k"], ["--context", "2m"]]
)
def test_a_wrong_option_ends_in_one_sentence(
    options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "layer.json"
    assert run(monkeypatch, *options, "--out", str(out)) == 2
    told = capsys.readouterr().err.strip()
    assert told and "Traceback" not in told and "\n" not in told and not out.exists()
