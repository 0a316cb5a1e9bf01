"""Failures caught here: a frontier whose rows lack a context or a figure, whose bounds are not those of the machine and
the model, whose plot lacks somebody, or that fails late on a wrong option. Nothing here says how fast anything is.
"""

import json
import sys
from pathlib import Path

import pytest
import torch

from dsv4.bench import frontier, show
from dsv4.bench.peers import Theirs, twin
from dsv4.cli import main
from dsv4.config import ModelConfig
from dsv4.cost.params import parameters
from dsv4.measure.subjects import small_model, tokens
from dsv4.ops import PackedMatrix


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["dsv4", "bench", "frontier", *arguments])
    try:
        main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


ROW = {
    "who", "dtype", "weights", "cache", "ctx", "batch", "batch_tok_s", "batch_times", "prefill_tok_s", "decode_ms",
    "prefill_best_tok_s", "decode_best_ms", "cache_bytes", "peak_rss", "prefill_share", "decode_share", "apart",
    "apart_ours", "matmul_tflops", "fp32_tflops", "bf16_tflops", "read_gb_s", "copy_gb_s", "threads",
}  # fmt: skip


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_context_has_a_row_of_ours_and_of_the_peer(
    dtype: str, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    again = iter([(3e12, 7e9), (2e12, 9e9)])  # after the repeat of each
    now: list[float] = []
    monkeypatch.setattr(frontier, "product_rate", lambda dtype: (now.__setitem__(slice(None), next(again)), now[0])[1])
    if dtype == "bfloat16":  # the machine's rates are measured for the other one
        rates = dict.fromkeys(("matmul_tflops", "fp32_tflops", "bf16_tflops", "read_gb_s", "copy_gb_s"), 1.0)
        monkeypatch.setattr(frontier, "machine", lambda dtype: {**rates, "threads": 1})
        monkeypatch.setattr(frontier, "read_rate", lambda device: now[1])
    out, plot = tmp_path / "deep" / "frontier.json", tmp_path / "other" / "frontier.svg"
    options = ["--context", "40,100", "--repeats", "1", "--cache", "packed", "--against", "transformers", "--json"]
    options += ["--dtype", dtype, "--out", str(out), "--plot", str(plot)]
    assert run(monkeypatch, "tiny", *options) == 0
    report = json.loads(capsys.readouterr().out)
    assert report == json.loads(out.read_text(encoding="utf-8"))
    rows = report["rows"]
    assert ModelConfig.from_json(report["config"]).hidden_size == ModelConfig.preset("tiny").hidden_size
    assert [(r["who"], r["ctx"]) for r in rows] == [(w, n) for w in ("dsv4", "transformers") for n in (40, 100)]
    assert all(set(r) == ROW and r["prefill_tok_s"] > 0 and r["decode_ms"] > 0 and r["peak_rss"] > 0 for r in rows)
    assert all((r["cache_bytes"] is None) == (r["apart"] is not None) == (r["who"] == "transformers") for r in rows)
    assert all(r["dtype"] == dtype for r in rows)
    if dtype == "bfloat16":  # medians of before and after
        assert [(r["matmul_tflops"], r["read_gb_s"]) for r in rows] == [(2, 4), (2, 4), (1.5, 5), (1.5, 5)]
    text = "\n".join(show.lines(rows))
    assert text.count("x as fast") == 2 and "at best" not in text and "this machine" not in text
    text = "\n".join(show.lines([*rows, {"who": "nano", "skipped": "why"}], ceiling=True))
    assert "GB/s read" in text and text.count("at best") == 2 and "nano: skipped: why" in text
    drawn = plot.read_text(encoding="utf-8")
    assert drawn.startswith("<svg") and "http://www.w3.org" in drawn  # a name space; nothing is fetched
    for word in ("dsv4", "transformers", "at best here", "prefill, tokens/s", "a decoded token, ms"):
        assert f">{word}<" in drawn


def test_released_weights_and_sequences_side_by_side(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model that is timed has packed matrices, and a bound of their bytes; a batch has its own column."""
    rates = dict.fromkeys(("matmul_tflops", "fp32_tflops", "bf16_tflops", "read_gb_s", "copy_gb_s"), 1.0)
    monkeypatch.setattr(frontier, "machine", lambda dtype: {**rates, "threads": 1})
    monkeypatch.setattr(frontier.Limits, "again", lambda self: None)
    kinds: list[bool] = []
    monkeypatch.setattr(
        frontier.Ours, "begin", lambda self, begin=frontier.Ours.begin: (kinds.append(
            isinstance(self.model.layers[0].ffn.experts.w2, PackedMatrix)), begin(self))[1],
    )  # fmt: skip
    options = ["--context", "40", "--repeats", "1", "--batch", "3", "--json", "--out", str(tmp_path / "r.json")]
    found = []
    for weights in ([], ["--weights", "released"]):
        assert run(monkeypatch, "tiny", *options, *weights) == 0
        found += json.loads(capsys.readouterr().out)["rows"]
    assert kinds == [False, True] and [r["weights"] for r in found] == ["float32", "published"]
    assert found[1]["decode_best_ms"] < found[0]["decode_best_ms"] / 2
    for r in found:
        assert r["batch"] == 3 and r["batch_times"] == pytest.approx(r["batch_tok_s"] * r["decode_ms"] / 1e3)
    assert "batch 3:" in "\n".join(show.lines(found))
    for wrong in (["--weights", "fp4"], ["--weights", "released", "--against", "transformers"]):
        assert run(monkeypatch, "tiny", *options, *wrong) == 2


def test_at_best_is_the_slower_of_computing_and_moving() -> None:
    """On paper: a machine whose rates are round numbers, so that every byte and FLOP can be counted by hand."""
    planned = frontier.plan("bench", "float32", "packed", [1024], 1, [], "")
    counts = parameters(planned.config)
    limits = {"matmul_tflops": 1e-6, "read_gb_s": 1.0}  # computing is what takes long
    prefill, decode = frontier.at_best(planned, "dsv4", 1024, limits)
    # of 2 FLOPs for each weight but the head's, at every token, and attention on top
    weights = 2 * (counts["active"] - counts["head"]) * 1024 / 1e6
    assert 1 < prefill / weights < 1.6
    # 4 bytes a weight, the embedding's one row apart; 128 + 256 packed rows and index keys are less than 2 MB
    assert 4e-9 * counts["active"] < decode < 4e-9 * counts["active"] + 0.002
    plain = frontier.at_best(frontier.plan("bench", "float32", "float32", [1024], 1, [], ""), "dsv4", 1024, limits)[1]
    assert decode < plain < decode + 0.01, "plain rows are more bytes than packed ones"
    limits = {"matmul_tflops": 1e6, "read_gb_s": 1.0}  # moving is; the memory of 1,024 tokens is 0.3% of the weights
    assert frontier.at_best(planned, "dsv4", 1024, limits)[0] == pytest.approx(4e-9 * counts["total"], rel=0.005)


def test_the_model_that_vllm_can_run() -> None:
    config = ModelConfig.preset("bench")
    config = config.with_(num_nextn_predict_layers=0, compress_ratios=config.trunk_ratios, **frontier.VLLM_SIZES)
    assert round(parameters(config)["total"] / 1e6) == 234
    # what vLLM asks a configuration for, beside the sizes
    said = config.to_json()
    assert said["hidden_act"] == "silu" and said["norm_topk_prob"] is True
    assert said["topk_method"] == "noaux_tc" and said["scoring_func"] == "sqrtsoftplus"


@torch.inference_mode()
def test_ours_and_the_peer_read_the_same() -> None:
    """In chunks, and the token that is decoded on a memory of its own, which leaves the first as it was."""
    model = small_model()
    ids = tokens(model, 90)
    ours, theirs = frontier.Ours(model, "float32", 100), Theirs(twin(model, torch.float32))
    want = model(ids)
    for who in (ours, theirs):
        who.begin()
        who.read(ids[:50])
        for _ in range(2):
            assert (who.decoding()(ids[50:51]) - want[50]).abs().max() < 1e-4
        assert (who.read(ids[50:89]) - want[88]).abs().max() < 1e-4


@pytest.mark.parametrize(
    "options",
    [
        ["--against", "nobody"],
        ["--context", "many"],
        ["--dtype", "float16"],
        ["--cache", "paper"],
        ["--plot", "drawing.png"],
        ["--against", "vllm", "--dtype", "float32"],
        ["--against", "llama"],
        ["--against", "transformers,nano", "--peer-python", "no-such-python"],
    ],  # fmt: skip
)
def test_a_wrong_option_ends_in_one_sentence(
    options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DSV4_LLAMA_PYTHON", raising=False)
    assert run(monkeypatch, "tiny", *options, "--out", str(tmp_path / "f.json")) == 2
    told = capsys.readouterr().err.strip()
    assert told and "Traceback" not in told and options[-1].rpartition(",")[2] in told
    assert not (tmp_path / "f.json").exists()
