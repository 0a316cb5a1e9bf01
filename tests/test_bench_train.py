"""Failures caught here: a row of `dsv4 bench train` that lacks a figure or whose bound is not that of the machine and
the model, a peer that is timed although it computes something else, an op's time credited to another or counted twice,
an option that fails late. Nothing here says how fast anything is.
"""

import dataclasses
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dsv4 import cost, ops
from dsv4.bench import train, trainstep
from dsv4.cli import main
from dsv4.config import ModelConfig
from dsv4.measure.backward import spent
from dsv4.measure.subjects import small_model, tokens

LIMITS = {
    "matmul_tflops": 1e-3, "fp32_tflops": 1e-3, "bf16_tflops": 1.0, "read_gb_s": 1.0, "copy_gb_s": 1.0, "threads": 1,
}  # fmt: skip


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["dsv4", "bench", "train", *arguments])
    monkeypatch.setattr(train, "machine", lambda dtype: LIMITS)
    try:
        main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def here(work: Callable[[train.Job], Any], job: train.Job) -> Any:
    """In place of a process of its own."""
    return work(job)


def test_a_row_of_ours_and_of_the_peer(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real thing, in processes of their own: figures, their bounds, and that both train the same."""
    out = tmp_path / "deep" / "train.json"
    options = ["--context", "60", "--batch", "2", "--steps", "2", "--against", "transformers", "--profile", "--json"]
    assert run(monkeypatch, "tiny", *options, "--out", str(out)) == 0
    report = json.loads(capsys.readouterr().out)
    assert report == json.loads(out.read_text(encoding="utf-8"))
    ours, peer = report["rows"]
    assert (ours["who"], peer["who"]) == ("dsv4", "transformers")
    assert set(ours) == set(peer) and all(ours[k] == v for k, v in LIMITS.items() if k != "matmul_tflops")
    flops = 2 * cost.weighted(cost.train(ModelConfig.preset("tiny"), 60, mtp=False))
    for row in (ours, peer):
        seconds = row["forward_seconds"] + row["backward_seconds"]
        assert row["tok_s"] == pytest.approx(120 / seconds)
        best = flops / (1e12 * row["matmul_tflops"])  # measured between the steps
        assert row["best_tok_s"] == pytest.approx(120 / best) and row["share"] == pytest.approx(best / seconds)
        assert row["whole_tok_s"] == pytest.approx(120 / (seconds + row["optimizer_seconds"]))
        assert row["peak_rss"] > 1e8
        assert row["muon_share"] == pytest.approx(row["muon_seconds"] * row["whole_tok_s"] / 120)
    # weights drawn alike, the same tokens, nothing predicted across the end of a document
    assert ours["loss"] == pytest.approx(peer["loss"], rel=1e-5)
    assert peer["loss_apart"] <= train.CLOSE_LOSS and peer["gradients_apart"] <= train.CLOSE_GRADIENT
    assert {"experts", "sparse_attention", "between ops"} < {p["op"] for p in ours["profile"]}
    text = "\n".join(train.lines(report["rows"]))
    assert "x as fast" in text and "TFLOP/s in fp32" in text and "hyper_write" in text and "60" in text


def test_a_peer_that_computes_something_else_is_not_timed(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "_apart", here)
    real = trainstep.twin
    options = ["--context", "40", "--steps", "1", "--against", "transformers", "--out", str(tmp_path / "r.json")]

    def other(ours: Any, dtype: torch.dtype) -> Any:
        peer = real(ours, dtype)
        with torch.no_grad():
            next(p for n, p in peer.named_parameters() if n.endswith("sinks")).add_(0.1)
        return peer

    monkeypatch.setattr(trainstep, "twin", other)
    assert run(monkeypatch, "tiny", *options) == 1
    text = capsys.readouterr().out
    assert "computes another function" in text and "dsv4" in text and "x as fast" not in text


def test_a_length_that_cannot_fit_is_not_begun(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is said what it would take, along the line through the two longest of the shorter ones."""
    peaks = {10: 2 << 30, 20: 3 << 30}
    begun = []

    def measured(work: Callable[[train.Job], Any], job: train.Job) -> Any:
        begun.append(job.context)
        seconds = dict.fromkeys((f"{part}_seconds" for part in ("forward", "backward", "optimizer", "muon")), 1.0)
        return {**seconds, "matmul_tflops": 1.0, "loss": 1.0, "peak_rss": peaks[job.context], "profile": None}

    monkeypatch.setattr(train, "_apart", measured)
    monkeypatch.setattr(train, "available_bytes", lambda: 6 << 30)
    assert train.least_bytes({10: 100}, 40) == 0 and train.least_bytes({5: 0, 10: 100, 20: 300}, 40) == 700
    assert run(monkeypatch, "tiny", "--context", "10,20,60", "--out", str(tmp_path / "r.json")) == 1
    assert begun == [10, 20]
    assert "at 60: skipped: it would need at least 7 GiB of memory, and 6 GiB are there" in capsys.readouterr().out


def test_the_peers_matrices_are_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a step on the same weights and tokens the peer's parameters are ours, so Muon took the same matrices."""
    job = train.Job(trainstep.Plan("tiny", ModelConfig.preset("tiny").without_drafts(), "float32", [40]), 40, 1)
    with tempfile.TemporaryDirectory() as folder:
        trainstep.compared(dataclasses.replace(job, folder=folder))
        names = trainstep.counterparts(job)["names"]
        peer = trainstep._Peer(dataclasses.replace(job, folder=folder, names=names))
    ours = trainstep._Ours(job)
    parameters = dict(ours.model.named_parameters())
    before = {name: p.detach().clone() for name, p in parameters.items()}
    for step in (ours, peer):
        step()
    moved = {name for name, p in parameters.items() if not torch.equal(p, before[name])}
    # no gradient flows to indexers, nor to compressors none of whose groups closed
    assert all(".indexer." in name or ".compressor." in name for name in before.keys() - moved)
    # roundings of the gradients, which Muon carries into the update; found: 4e-7, each tensor moves by 4e-5 or more
    for name, p in peer.model.named_parameters():
        if not names[name].startswith("layers.0.hc_attn"):  # all streams are alike there: its gradients are roundings
            torch.testing.assert_close(p.flatten(), parameters[names[name]].flatten(), rtol=0, atol=2e-6)


def test_wrong_options_fail_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "_apart", lambda *_: pytest.fail("work began"))
    for wrong in (
        ["--context", ""], ["--dtype", "float16"], ["--against", "nano"], ["--context", "128k"], ["nobody"],
        ["--steps", "0"], ["--batch", "0"],
    ):  # fmt: skip
        assert run(monkeypatch, *(wrong if wrong == ["nobody"] else ["tiny", *wrong])) == 2


def test_time_of_the_backward_pass_goes_to_the_op_whose_nodes_take_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock that only moves inside one op's nodes, that op alone has taken time, and all of it."""
    model, now = small_model(), [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    class Slow(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            now[0] += 1
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            now[0] += 10
            return grads[0]

    real = ops.reference.hyper_write
    monkeypatch.setattr(ops.reference, "hyper_write", lambda *args: Slow.apply(real(*args)))
    monkeypatch.setitem(ops.TABLE["hyper_write"], "reference", ops.reference.hyper_write)
    with ops.using("reference"), spent() as found:
        model(tokens(model, 40)).sum().backward()
    calls = 2 * model.config.num_hidden_layers
    assert {n: (s.forward, s.backward) for n, s in found.items() if s.forward or s.backward} == {
        "hyper_write": (calls, 10 * calls)
    }
