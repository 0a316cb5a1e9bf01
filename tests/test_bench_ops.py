"""Failures caught here: FLOPs of calls that do not add up to those that are counted of a model, bytes of rows and
experts that nobody reads, an op's time counted twice, an op without a formula. Nothing says how fast any is.
"""

import json
import sys
from pathlib import Path

import pytest
import torch

from dsv4 import ModelConfig, Transformer, cost, ops
from dsv4.bench import ops as bench
from dsv4.cli import main
from dsv4.measure.roofline import _FLOPS, Rates, Work, _calls, _covered, profile, work_of
from dsv4.measure.subjects import fill, tokens
from dsv4.ops import Spans
from dsv4.ops.formats import PackedRows, v4_rows
from dsv4.ops.table import OPS
from dsv4.ops.weights import pack_matrix

RATES = Rates(1e12, 1e10)
WITHOUT_PRODUCTS = {"best_rows", "topk_lowest", "compress", "rotate", "sinkhorn", "pack_rows", "unpack_rows"}


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def spans(*pairs: tuple[int, int]) -> Spans:
    return Spans(*(torch.tensor([p[i] for p in pairs], dtype=torch.int64) for i in (0, 1)))


def test_every_op_has_its_products_or_has_none() -> None:
    assert set(OPS) == set(_FLOPS) | WITHOUT_PRODUCTS and not set(_FLOPS) & WITHOUT_PRODUCTS


@pytest.mark.parametrize("preset", ["tiny", "small"])
@pytest.mark.parametrize("format", ["float32", "packed"])
@torch.inference_mode()
def test_calls_add_up_to_the_counted_model(preset: str, format: str) -> None:
    """A token, and a chunk: what is counted, and the collapse of the streams, which the rule leaves out."""
    config = ModelConfig.preset(preset)
    config = config.with_(num_nextn_predict_layers=0, compress_ratios=config.trunk_ratios)
    model, context = Transformer(config), 2048
    collapse = 2 * config.hc_mult * config.hidden_size
    head = 2 * config.vocab_size * config.hidden_size
    chunk = cost.weighted(cost.prefill(config, context)) - cost.weighted(cost.prefill(config, context - 100)) + head
    for count, want in ((1, cost.flops_per_token(config, context)), (100, chunk)):
        memory = model.new_cache(format=format, capacity=context)[0]
        fill(memory, context - count)
        works: list[Work] = []
        with _calls(lambda name, args, out, seconds: works.append(work_of(name, args, out))):  # noqa: B023
            model(tokens(model, count), segments=[(count, memory)], rows="last")
        assert sum(w.flops for w in works) == want + count * collapse


def test_rows_are_read_once_and_only_those_that_are_seen() -> None:
    q, sink, pool = normal(3, 2, 8), normal(2), normal(50, 8)
    window = spans((0, 4), (2, 6), (20, 21))
    entries = normal(30, 8)
    chosen = torch.tensor([[-1, 3, 5], [3, 5, 6], [-1, -1, 29]])
    out = ops.sparse_attention(q, pool, window, entries, None, chosen, sink, 1.0)
    work = work_of("sparse_attention", (q, pool, window, entries, None, chosen, sink, 1.0), out)
    read = (6 + 1) + 4  # rows 0..5 and 20 of the window, entries 3, 5, 6, 29
    beside = sum(t.numel() * t.itemsize for t in (q, sink, chosen, *out))
    assert work == Work(4 * 2 * 8 * (9 + 6), 4 * 8 * read + beside)
    visible = spans((0, 0), (0, 3), (0, 10))
    work = work_of("sparse_attention", (q, pool, window, entries, visible, None, sink, 1.0), out)
    assert work == Work(4 * 2 * 8 * (9 + 13), 4 * 8 * (7 + 10) + beside - chosen.numel() * 8)


def test_only_queries_that_choose_score_packed_keys_where_they_lie() -> None:
    _, format = v4_rows(64, 16, 32, "packed", torch.float32)
    keys = PackedRows(format.pack(normal(40, 32)), format)  # type: ignore[arg-type]
    q, weights, visible = normal(3, 4, 32), normal(3, 4), spans((0, 2), (0, 9), (0, 30))
    out = ops.index_scores_topk(q, weights, keys, visible, 8)
    work = work_of("index_scores_topk", (q, weights, keys, visible, 8), out)
    beside = sum(t.numel() * t.itemsize for t in (q, weights, out))
    assert work == Work(2 * 4 * 32 * 39, 30 * format.shape[0] + beside) and format.shape[0] == 17


@pytest.mark.parametrize("packed", [False, True])
def test_experts_that_are_not_chosen_are_not_read(packed: bool) -> None:
    x, chosen, weights = normal(2, 32), torch.tensor([[0, 3], [3, 4]]), normal(2, 2)
    w13, w2 = normal(6, 2, 64, 32), normal(6, 32, 64)
    gate, down = (pack_matrix(w.flatten(0, -2), "fp4") for w in (w13, w2)) if packed else (w13, w2)
    out = ops.experts(x, chosen, weights, gate, down, 10.0)
    work = work_of("experts", (x, chosen, weights, gate, down, 10.0), out)
    beside = sum(t.numel() * t.itemsize for t in (x, chosen, weights, out))
    each = 3 * 64 * 32 * (17 / 32 if packed else 4)
    assert work == Work(2 * 4 * 3 * 64 * 32, int(3 * each) + beside)


def test_covered_rows_are_those_of_the_union() -> None:
    generator = torch.Generator().manual_seed(5)
    for count in (0, 1, 2, 7, 40):
        start = torch.randint(0, 60, (count,), generator=generator)
        stop = start + torch.randint(-3, 20, (count,), generator=generator)
        want = {r for a, b in zip(start.tolist(), stop.tolist(), strict=True) for r in range(a, b)}
        assert _covered(Spans(start, stop)) == len(want)


def test_an_op_inside_an_op_is_part_of_it() -> None:
    """The torch form of the indexer unpacks its keys by another op."""
    _, format = v4_rows(64, 16, 32, "packed", torch.float32)
    keys = PackedRows(format.pack(normal(40, 32)), format)  # type: ignore[arg-type]
    q, weights, visible = normal(1, 4, 32), normal(1, 4), spans((0, 30))
    seen: list[str] = []
    with ops.using("blocked"), _calls(lambda name, *rest: seen.append(name)):
        ops.index_scores_topk(q, weights, keys, visible, 8)
        keys[:3]
    assert seen == ["index_scores_topk", "unpack_rows"]


def test_a_profile_holds_together() -> None:
    x, w = normal(4, 32), normal(16, 32)

    def step() -> None:
        ops.linear(x, w)
        ops.linear(ops.linear(x, w), w[:, :16].contiguous())
        ops.topk_lowest(x, 3)

    rows = profile(step, 1, RATES)
    assert {r["op"]: r["calls"] for r in rows} == {"linear": 3, "topk_lowest": 1, "between ops": 0, "step": 4}
    by_name = {r["op"]: r for r in rows}
    parts = [r for r in rows if r["op"] != "step"]
    assert sum(r["ms"] for r in parts) == pytest.approx(by_name["step"]["ms"])
    assert by_name["step"]["share_of_step"] == 1 and by_name["between ops"]["share_of_roofline"] is None
    linear = by_name["linear"]
    assert linear["flops"] == 2 * 4 * 16 * (32 + 32 + 16)
    assert linear["roofline_ms"] == pytest.approx(1e3 * linear["bytes"] / RATES.bytes) and linear["bound"] == "read"
    assert linear["share_of_roofline"] == pytest.approx(linear["roofline_ms"] / linear["ms"])
    assert Rates(1e6, 1e12).bound(Work(10**6, 10**6)) == "matmul"
    assert Rates(1e6, 1e12).seconds(Work(3 * 10**6, 10**6)) == 3


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["dsv4", "bench", "ops", *arguments])
    try:
        main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def test_the_verb_prints_both_phases(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "machine_rates", lambda dtype: RATES)
    out = tmp_path / "deep" / "ops.json"
    options = ["--context", "300", "--repeats", "1", "--cache", "packed", "--out", str(out)]
    assert run(monkeypatch, "tiny", *options) == 0
    told = capsys.readouterr().out
    assert told.startswith("decode: 1 tokens that end at 300") and "prefill: 300 tokens that end at 300" in told
    rows = json.loads(out.read_text(encoding="utf-8"))["rows"]
    for phase in ("decode", "prefill"):
        found = {r["op"]: r for r in rows if r["phase"] == phase}
        assert {"experts", "sparse_attention", "pack_rows", "between ops", "step"} <= set(found)
        assert found["step"]["flops"] == sum(r["flops"] for name, r in found.items() if name != "step")
        assert found["step"]["matmul_tflops"] == 1 and found["step"]["read_gb_s"] == 10
    assert run(monkeypatch, "tiny", *options, "--json") == 0
    assert len(json.loads(capsys.readouterr().out)["rows"]) == len(rows)


@pytest.mark.parametrize(
    "options", [["--context", "many"], ["--context", "1k,2k"], ["--context", "2m"], ["--dtype", "int8"]]
)
def test_a_wrong_option_ends_in_one_sentence(
    options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "ops.json"
    assert run(monkeypatch, "tiny", *options, "--out", str(out)) == 2
    told = capsys.readouterr().err.strip()
    assert told and "Traceback" not in told and "\n" not in told and not out.exists()
