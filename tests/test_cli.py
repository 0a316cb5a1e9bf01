"""Failures caught here: a verb that does not run, a mistake of the user that ends in a traceback or with the wrong exit
code, a printed command that does not work, a reader that leaves and takes the work with it, and a run folder that
`generate` cannot use.
"""

import json
import math
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dsv4 import __version__, ops
from dsv4.cli import hints, main
from dsv4.train.trainer import Trainer

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
        (["train", *TINY, *data, "--resume", str(tmp_path / "no")], "there is no training checkpoint"),
        (["train", "lr=1e-3"], "did you mean 'optim.lr'"),
        (["train", *TINY[:-5], "schedule.steps=1:03", *data], "must be of type int"),
        (["train", *TINY, *data, "data.path=other"], "data.path is given twice"),
        (["train", *TINY, *data, "optim.clip=0"], "optim.clip=0.0 must be a positive norm"),
        (["demo", "--tokens", "0"], "max_tokens=0 must be"),
        (["demo", "--steps", "0"], "schedule.steps=0 must be positive"),
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
    assert code == 2 and "has changed since it was written" in err
    weights.write_bytes(whole)
    config = weights.with_name("config.json")
    config.write_text(config.read_text().replace('"hidden_size": 32', '"hidden_size": 64'))
    code, _, err = dsv4("generate", str(run), "It")
    assert code == 2 and "has changed since it was written" in err
    weights.with_name("digests.json").unlink()
    code, _, err = dsv4("generate", str(run), "It")
    assert code == 2 and "has shape" in err
    assert weights.read_bytes() == whole


def test_doctor_finds_the_installation_sound(dsv4) -> None:
    code, out, _ = dsv4("doctor", "--json")
    report = json.loads(out)
    assert code == 0 and report["self-test"].startswith("ok")
    assert report["backends"]["sparse_attention"].split(",")[0] == ops.active("sparse_attention")


def test_version_and_help(dsv4) -> None:
    assert dsv4("--version")[:2] == (0, f"dsv4 {__version__}\n")
    for arguments in (["-h"], ["--help"], ["train", "-h"], ["demo", "-h"]):
        code, out, _ = dsv4(*arguments)
        assert code == 0 and "Usage" in out


def test_data_with_an_emoji_in_its_name(dsv4, story: Path, tmp_path: Path) -> None:
    """The path went through JSON into YAML 1.1, which takes halves of a surrogate pair for characters."""
    named = tmp_path / "smile 😀 1:03.txt"
    story.rename(named)
    code, _, err = dsv4("train", *TINY, "--data", str(named), "--out", str(tmp_path / "run"))
    assert code == 0, err
    assert "😀" in (tmp_path / "run/config.yaml").read_text(encoding="utf-8")


def test_a_run_over_few_tokens_says_how_often_it_sees_them(dsv4, story: Path, tmp_path: Path) -> None:
    few = ["schedule.steps=200", "optim.lr=nan"]  # judged first: nothing is trained
    assert dsv4("train", *TINY[:-5], *few, "--data", str(story), "--out", str(tmp_path / "a"))[0] == 2
    small = tmp_path / "small.txt"
    small.write_text("one two three four five six seven " * 4)
    code, _, err = dsv4("train", *TINY, "data.tokens_per_step=512", "--data", str(small), "--out", str(tmp_path / "b"))
    assert code == 2 and "data.tokens_per_step is given twice" in err
    arguments = [a for a in TINY if not a.startswith("data.tokens_per_step")]
    code, _, err = dsv4(
        "train", *arguments, "data.tokens_per_step=512", "--data", str(small), "--out", str(tmp_path / "c")
    )
    assert code == 0 and re.search(r"the text has \d+ tokens; this run sees each about \d+ times", err), err


# --- commands that are printed work ----------------------------------------------------------------------------------


def printed(err: str) -> list[str]:
    """The words of the command that stderr recommends."""
    return shlex.split(re.search(r"go on with: (.*)", err)[1])  # type: ignore[index]


def shell(words: list[str], folder: Path, **more) -> subprocess.CompletedProcess:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"}  # no virtual environment is active
    return subprocess.run(words, cwd=folder, env=env, capture_output=True, text=True, timeout=120, **more)


def test_a_hint_starts_this_dsv4_from_where_one_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    monkeypatch.chdir(tmp_path)
    assert shell(shlex.split(hints.command("--version")), tmp_path).stdout == f"dsv4 {__version__}\n"
    assert hints.command("generate", "a b", "it's").endswith(""" generate 'a b' 'it'"'"'s'""")
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent))
    assert hints.command("chat") == "dsv4 chat"


def test_what_a_diverged_run_recommends_works(
    dsv4, story: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit code 1, the good checkpoint kept, and the printed command goes on from it: no remedy that is refused."""
    out = tmp_path / "run with space"
    step = Trainer.step

    def diverging(self: Trainer) -> dict:
        record = step(self)
        if self.progress.step == 3:
            with torch.no_grad():
                self.model.head.weight[0, 0] = math.nan
        return record

    monkeypatch.setattr(Trainer, "step", diverging)
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    monkeypatch.chdir(tmp_path)
    arguments = [a for a in TINY if not a.startswith("schedule.steps")]
    code, _, err = dsv4(
        "train", *arguments, "schedule.steps=4", "save.every=1", "--data", str(story), "--out", str(out)
    )
    assert code == 1 and "step-000002: resume from it" in err and "Traceback" not in err, err
    done = shell(printed(err), tmp_path)
    assert done.returncode == 0, done.stderr
    assert "optim.lr=0.002 (was 0.004)" in done.stderr
    assert (out / "checkpoints/latest").read_text() == "step-000004"


# --- readers that leave, consoles without the character ---------------------------------------------------------------


def test_a_run_goes_on_when_nobody_reads_its_records(story: Path, tmp_path: Path) -> None:
    arguments = [a for a in TINY if not a.startswith("schedule.steps")]
    words = ["train", *arguments, "schedule.steps=6", "--data", str(story), "--out", str(tmp_path / "run"), "--json"]
    with subprocess.Popen(
        [sys.executable, "-m", "dsv4", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    ) as child:  # fmt: skip
        assert child.stdout and child.stderr
        assert json.loads(child.stdout.readline())["step"] == 1
        child.stdout.close()
        err = child.stderr.read()
        assert child.wait(timeout=120) == 0, err
    assert "nobody reads the records any more; the run goes on" in err and "Traceback" not in err
    assert (tmp_path / "run/checkpoints/latest").read_text() == "step-000006"


def test_generate_ends_quietly_when_its_reader_leaves(dsv4, story: Path, tmp_path: Path) -> None:
    assert dsv4("train", *TINY, "--data", str(story), "--out", str(tmp_path / "run"))[0] == 0
    command = f"{shlex.quote(sys.executable)} -m dsv4 generate run It --max-tokens 400 --seed 0 2>err | head -c 5; sync"
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.stdout.startswith("It")
    said = (tmp_path / "err").read_text()
    assert "Traceback" not in said and "Exception" not in said, said


def test_a_console_that_lacks_a_character_shows_a_question_mark(dsv4, story: Path, tmp_path: Path) -> None:
    assert dsv4("train", *TINY, "--data", str(story), "--out", str(tmp_path / "run"))[0] == 0
    env = {**os.environ, "PYTHONIOENCODING": "cp1252", "PYTHONUTF8": "0", "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-m", "dsv4", "generate", "run", "smile 😀", "--max-tokens", "20", "--temperature", "0"]
    done = subprocess.run(words, cwd=tmp_path, env=env, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(b"smile ?")


def test_the_last_net_makes_one_sentence_of_any_machine_error(dsv4, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> torch.device:
        raise PermissionError(13, "Permission denied", "/some/file")

    monkeypatch.setattr("dsv4.cli.train.resolve_device", broken)
    assert dsv4("train", *TINY) == (1, "", "dsv4: /some/file: Permission denied: mend that and try again\n")


# --- the demo --------------------------------------------------------------------------------------------------------


def test_demo_in_two_steps(dsv4, tmp_path: Path) -> None:
    """The whole path of `make demo`; what it reaches in full length is in the README."""
    code, out, err = dsv4("demo", "--steps", "2", "--tokens", "5", "--out", str(tmp_path / "demo"), "--json")
    assert code == 0, err
    summary = json.loads(out)
    assert summary == json.loads((tmp_path / "demo/summary.json").read_text())
    assert summary["loss_last"] < summary["loss_first"]
    assert 2 < summary["heldout_bpb_bigram"] < summary["heldout_bpb_unigram"] < 3.5
    assert summary["parameters"] > summary["active_parameters"] > 0 and summary["cache_bytes_per_token"] > 0
    # a crash after the checkpoint used to lose the last line, and a second call then failed for ever
    log = tmp_path / "demo/log.jsonl"
    log.write_text(log.read_text().splitlines()[0] + "\n")
    code, out, err = dsv4("demo", "--steps", "2", "--tokens", "5", "--out", str(tmp_path / "demo"), "--json")
    assert code == 0, err
    # evaluated once more, from the checkpoint: the same fp32 sums
    assert json.loads(out)["heldout_bpb"] == pytest.approx(summary["heldout_bpb"], rel=1e-6)


@pytest.mark.slow
def test_the_demo_beats_counting(dsv4, tmp_path: Path) -> None:
    """The demo in full: clearly better on held-out text than models that count the same tokens (minutes)."""
    code, out, err = dsv4("demo", "--out", str(tmp_path / "demo"), "--json")
    assert code == 0, err
    summary = json.loads(out)
    assert summary["heldout_bpb"] < 0.95 * summary["heldout_bpb_bigram"]
