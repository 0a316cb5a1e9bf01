"""Failures caught here: a frontier whose rows lack a context or a figure, whose peer computes something else than ours,
or that fails late on a wrong option. Nothing here says how fast anything is.
"""

import json
import sys
from pathlib import Path

import pytest
import torch

from dsv4.bench import frontier
from dsv4.bench.peers import twin
from dsv4.cli import main
from dsv4.measure.subjects import small_model, tokens


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["dsv4", "bench", "frontier", *arguments])
    try:
        main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


ROW = {
    "who", "dtype", "cache", "ctx", "prefill_tok_s", "decode_ms", "cache_bytes", "peak_rss", "prefill_share",
    "decode_share", "matmul_tflops", "read_gb_s",
}  # fmt: skip


def test_every_context_has_a_row_of_ours_and_of_the_peer(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "deep" / "frontier.json"
    options = ["--context", "40,100", "--repeats", "1", "--cache", "packed", "--against", "transformers", "--json"]
    assert run(monkeypatch, "tiny", *options, "--out", str(out)) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert rows == json.loads(out.read_text(encoding="utf-8"))["rows"]
    assert [(r["who"], r["ctx"]) for r in rows] == [(w, n) for w in ("dsv4", "transformers") for n in (40, 100)]
    assert all(set(r) == ROW and r["prefill_tok_s"] > 0 and r["decode_ms"] > 0 and r["peak_rss"] > 0 for r in rows)
    assert all((r["cache_bytes"] is None) == (r["who"] == "transformers") for r in rows)
    text = "\n".join(frontier.lines(rows))
    assert text.count("x as fast") == 2 and "packed" not in text


@torch.inference_mode()
def test_ours_and_the_peer_read_the_same() -> None:
    """In chunks, and the token that is decoded on a memory of its own, which leaves the first as it was."""
    model = small_model()
    ids = tokens(model, 90)
    ours, theirs = frontier.Ours(model, "float32", 100), frontier.Theirs(twin(model, torch.float32))
    want = model(ids)
    for who in (ours, theirs):
        who.begin()
        who.read(ids[:50])
        for _ in range(2):
            assert (who.decoding()(ids[50:51]) - want[50]).abs().max() < 1e-4
        assert (who.read(ids[50:89]) - want[88]).abs().max() < 1e-4


@pytest.mark.parametrize(
    "options", [["--against", "nobody"], ["--context", "many"], ["--dtype", "int8"], ["--cache", "paper"]]
)
def test_a_wrong_option_ends_in_one_sentence(
    options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(monkeypatch, "tiny", *options, "--out", str(tmp_path / "f.json")) == 2
    told = capsys.readouterr().err.strip()
    assert told and "Traceback" not in told and options[1] in told
    assert not (tmp_path / "f.json").exists()
