"""Failures caught here: a verb that does not run, a mistake of the user that ends in a traceback or with the wrong exit
code, and a run folder that `generate` cannot use.
"""

import json
import sys
from pathlib import Path

import pytest

from dsv4.cli import main

TINY = ["--recipe", "tiny", "data.tokenizer=bytes", "data.seq_len=64", "data.tokens_per_step=128", "schedule.steps=2"]
TINY += ["schedule.warmup=1", "save.eval_tokens=256", "save.eval_every=1", "model.hidden_size=32"]


@pytest.fixture
def dsv4(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Run the command line in this process: (exit code, stdout, stderr)."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["dsv4", *arguments])
        capsys.readouterr()
        try:
            main()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture
def story(tmp_path: Path) -> Path:
    file = tmp_path / "story.txt"
    file.write_text("It was a dark and stormy night; the rain fell in torrents. " * 60)
    return file


def test_train_then_generate(dsv4, story: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    code, out, err = dsv4("train", *TINY, "--data", str(story), "--out", str(run), "--json")
    assert code == 0, err
    records = [json.loads(line) for line in out.splitlines()]
    assert [r["step"] for r in records] == [1, 2]
    assert {"config.yaml", "log.jsonl", "loss.png", "checkpoints", "data"} <= {p.name for p in run.iterdir()}
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    code, out, err = dsv4("generate", str(run), "It was", "--max-tokens", "5", "--seed", "1", "--json")
    assert code == 0, err
    assert json.loads(out)


def test_a_finished_run_needs_resume_and_then_has_nothing_to_do(dsv4, story: Path, tmp_path: Path) -> None:
    arguments = ("train", *TINY, "--data", str(story), "--out", str(tmp_path / "run"))
    assert dsv4(*arguments)[0] == 0
    code, _, err = dsv4(*arguments)
    assert code == 2 and "--resume auto" in err
    before = (tmp_path / "run/log.jsonl").read_text()
    assert dsv4(*arguments, "--resume", "auto")[0] == 0
    assert (tmp_path / "run/log.jsonl").read_text() == before


def write(path: Path, contents: bytes) -> str:
    path.write_bytes(contents)
    return str(path)


def test_wrong_use_is_one_sentence_and_exit_code_2(dsv4, story: Path, tmp_path: Path) -> None:
    out = ["--out", str(tmp_path / "run")]
    data = ["--data", str(story)]
    cases = [
        (["train", "optim.lrr=1"], "did you mean 'lr'"),
        (["train", "model.compress_ratios=[0,4]"], "compress_ratios has 2 entries"),
        (["train", "--recipe", "tiny", "--recipe", "tinny"], "unknown recipe"),
        (["train", *TINY, "--data", write(tmp_path / "empty.txt", b"")], "is empty"),
        (["train", *TINY, "--data", write(tmp_path / "latin.txt", b"caf\xe9 " * 9)], "UTF-8"),
        (["train", *TINY, "--data", write(tmp_path / "x.jsonl", b'{"a": 1}\n')], "lacks the field 'text'"),
        (["train", *TINY, "--data", str(tmp_path / "nowhere")], "there is no file or folder"),
        (["train", *TINY, *data, "model.vocab_size=200"], "vocab_size"),
        (["train", *TINY, *data, "--device", "cuda:7"], "not available"),
        (["train", *TINY, *data, "--dtype", "float7"], "float7"),
        (["train", *TINY, *data, "--config", str(tmp_path / "no.yaml")], "cannot read"),
        (["train", *TINY, *data, "--resume", str(tmp_path / "no")], "there is no checkpoint"),
    ]
    for arguments, message in cases:
        code, _, err = dsv4(*arguments, *out)
        assert code == 2, (arguments[10:], err)
        assert message in err and "Traceback" not in err, (arguments, err)
        assert len(err.strip().splitlines()) == 1, err
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_damaged_checkpoint_is_refused_and_left_alone(dsv4, story: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    dsv4("train", *TINY, "--data", str(story), "--out", str(run))
    weights = next(run.glob("checkpoints/step-*/model.safetensors"))
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    code, _, err = dsv4("generate", str(run), "It")
    assert code == 2 and "truncated or damaged" in err
    weights.write_bytes(whole)
    config = weights.with_name("config.json")
    config.write_text(config.read_text().replace('"hidden_size": 32', '"hidden_size": 64'))
    code, _, err = dsv4("generate", str(run), "It")
    assert code == 2 and "has shape" in err
    assert weights.read_bytes() == whole


def test_doctor_finds_the_installation_sound(dsv4) -> None:
    code, out, _ = dsv4("doctor", "--json")
    report = json.loads(out)
    assert code == 0 and report["self-test"].startswith("ok")
    assert report["backends"]["sparse_attention"].startswith("blocked")


def test_demo_in_two_steps(dsv4, tmp_path: Path) -> None:
    """The whole path of `make demo`; what it reaches in full length is in the README."""
    code, out, err = dsv4("demo", "--steps", "2", "--tokens", "5", "--out", str(tmp_path / "demo"), "--json")
    assert code == 0, err
    summary = json.loads(out)
    assert summary == json.loads((tmp_path / "demo/summary.json").read_text())
    assert summary["loss_last"] < summary["loss_first"]
    assert 2 < summary["heldout_bpb_bigram"] < summary["heldout_bpb_unigram"] < 3.5
    assert summary["parameters"] > summary["active_parameters"] > 0 and summary["cache_bytes_per_token"] > 0


@pytest.mark.slow
def test_the_demo_beats_counting(dsv4, tmp_path: Path) -> None:
    """The demo in full: clearly better on held-out text than models that count the same tokens (minutes)."""
    code, out, err = dsv4("demo", "--out", str(tmp_path / "demo"), "--json")
    assert code == 0, err
    summary = json.loads(out)
    assert summary["heldout_bpb"] < 0.95 * summary["heldout_bpb_bigram"]
