"""Failures caught here: a tracker that is asked for and missing said after the data are prepared, or in a traceback; a
figure that does not reach it, under its name and step; a resumed run that is another one there, or that says steps
twice; a tracker that breaks down and takes the run with it; a package that is imported by who did not ask, or that
wants a network or an account.

The packages are stood in for by modules of the calls that we make; where one is installed, it is tried itself as
well.
"""

import importlib.util
import json
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from typer.testing import CliRunner

from dsv4.cli import application
from dsv4.errors import UserError
from dsv4.train.log import read_log
from dsv4.train.trackers import TRACKERS, check_tracker, numbers, run_id, tracking

RECORD = {
    "step": 7, "loss": 2.5, "sink_mass": {"0": 0.1, "3": 0.2}, "phase": "sparse", "diverging": True, "tokens": 9,
}  # fmt: skip
SETTINGS = {"optim": {"lr": 1e-3}, "seed": 0}


class Spy:
    """What was called, in order."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any, **named: Any) -> "Spy":
            self.calls.append((name, args, named))
            return self

        return call

    def named(self, name: str) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
        return [(args, named) for what, args, named in self.calls if what == name]


def stand_in(monkeypatch: pytest.MonkeyPatch, name: str) -> Spy:
    """A module that only remembers; tensorboard's is reached through torch's."""
    spy = Spy()
    for module_name in (name, "torch.utils.tensorboard") if name == "tensorboard" else (name,):
        module = ModuleType(module_name)
        module.__spec__ = ModuleSpec(module_name, None)
        for call in ("init", "log", "finish", "SummaryWriter"):
            setattr(module, call, getattr(spy, call))
        monkeypatch.setitem(sys.modules, module_name, module)
    return spy


def test_figures_by_flat_names() -> None:
    assert numbers(RECORD) == {"loss": 2.5, "sink_mass/0": 0.1, "sink_mass/3": 0.2, "diverging": 1.0, "tokens": 9.0}


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_records_reach_it(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    spy = stand_in(monkeypatch, name)
    folder = tmp_path / "mine"
    with tracking(name, folder, SETTINGS, 0) as track:
        track(RECORD)
        track({**RECORD, "step": 8})
    ((_, options),) = spy.named("init")
    assert options["project"] == "dsv4" and options["resume"] == "allow" and options["config"] == SETTINGS
    assert "mine" in options["name"]
    if name == "wandb":
        assert options["mode"] == "offline" and options["dir"] == str(folder) and options["id"] == run_id(folder)
    assert [(args[0], named["step"]) for args, named in spy.named("log")] == [
        (numbers(RECORD), 7), (numbers(RECORD), 8)
    ]  # fmt: skip
    assert len(spy.named("finish")) == 1 and spy.calls[-1][0] == "finish"


def test_tensorboard_forgets_what_a_resumed_run_repeats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spy = stand_in(monkeypatch, "tensorboard")
    for step in (0, 6):
        with tracking("tensorboard", tmp_path, SETTINGS, step) as track:
            track(RECORD)
    assert [named["purge_step"] for _, named in spy.named("SummaryWriter")] == [None, 7]
    assert [args for args, _ in spy.named("add_scalar")] == 2 * [(n, v, 7) for n, v in numbers(RECORD).items()]
    assert len(spy.named("add_text")) == 1 and len(spy.named("close")) == 2


def test_wandb_goes_online_when_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spy = stand_in(monkeypatch, "wandb")
    monkeypatch.setenv("WANDB_MODE", "online")
    with tracking("wandb", tmp_path, SETTINGS, 0):
        pass
    assert spy.named("init")[0][1]["mode"] == "online"


def test_a_resumed_run_is_the_same_one_there(tmp_path: Path) -> None:
    first = run_id(tmp_path / "run")
    assert run_id(tmp_path / "run") == first != run_id(tmp_path / "other")
    (tmp_path / "run" / "tracker.json").write_text('{"id": "../up"}')
    with pytest.raises(UserError, match="no id of letters and digits"):
        run_id(tmp_path / "run")


def test_one_that_breaks_down_is_left_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    spy = stand_in(monkeypatch, "trackio")
    tries: list[int] = []

    def broken(figures: dict[str, float], step: int) -> None:
        tries.append(step)
        raise RuntimeError("database is locked")

    monkeypatch.setattr(sys.modules["trackio"], "log", broken)
    with tracking("trackio", tmp_path, SETTINGS, 0) as track:
        track(RECORD)
        track({**RECORD, "step": 8})
    assert tries == [7] and not spy.named("finish")
    assert [r.getMessage() for r in caplog.records] == [
        "--log trackio failed (database is locked): the run goes on, its records are in log.jsonl"
    ]


def test_one_that_does_not_start_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, "wandb")

    def refuses(**options: Any) -> None:
        raise ValueError("no such project")

    monkeypatch.setattr(sys.modules["wandb"], "init", refuses)
    with (
        pytest.raises(UserError, match=r"--log wandb did not start \(no such project\)"),
        tracking("wandb", tmp_path, SETTINGS, 0),
    ):
        pass


@pytest.mark.parametrize("name", TRACKERS)
def test_a_missing_package_is_one_sentence_before_any_work(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda wanted: None)
    result = CliRunner().invoke(
        application(["train"]), ["train", "--recipe", "tiny", "--out", str(tmp_path / "run"), "--log", name]
    )
    assert isinstance(result.exception, UserError) and f"pip install {name}" in str(result.exception)
    assert not (tmp_path / "run").exists()


def test_unknown_ones() -> None:
    with pytest.raises(UserError, match="did you mean 'tensorboard'"):
        check_tracker("tensorbord")


def test_a_run_is_tracked_and_nothing_is_imported_unasked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spy = stand_in(monkeypatch, "trackio")
    small = ["schedule.steps=2", "schedule.warmup=0", "data.tokens_per_step=256", "save.eval_tokens=256"]
    small += ["data.tokenizer=bytes", "model.vocab_size=258"]
    text = tmp_path / "a.txt"
    text.write_text("the sea is wide and the sky is high. " * 400)
    for name, asked in (("plain", []), ("tracked", ["--log", "trackio"])):
        out = tmp_path / name
        given = ["train", "--recipe", "tiny", "--data", str(text), "--out", str(out), *asked, *small]
        result = CliRunner().invoke(application(["train"]), given)
        assert result.exit_code == 0, result.output
        assert (out / "tracker.json").exists() == bool(asked)
        assert len(spy.named("log")) == 2 * bool(asked)
    records = [r for r in read_log(tmp_path / "tracked" / "log.jsonl") if "loss" in r]
    assert [(args[0], named["step"]) for args, named in spy.named("log")] == [(numbers(r), r["step"]) for r in records]
    assert spy.named("init")[0][1]["config"]["schedule"]["steps"] == 2


# --- the packages themselves -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TRACKERS)
@pytest.mark.filterwarnings("ignore")  # theirs
def test_the_package_itself(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed here: pip install {name}")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.delenv("WANDB_MODE", raising=False)
    folder = tmp_path / "run"
    for step in (0, 7):
        with tracking(name, folder, SETTINGS, step) as track:
            track({**RECORD, "step": step + 1})
    where = {"tensorboard": folder / "tensorboard", "wandb": folder / "wandb", "trackio": tmp_path / "trackio"}[name]
    kept = [path for path in where.rglob("*") if path.is_file()]
    assert kept and sum(path.stat().st_size for path in kept) > 100
    assert json.loads((folder / "tracker.json").read_text())["id"] == run_id(folder)
