"""Failures caught here: a loss that counts the wrong tokens or depends on how a step is split, a balance bias that
pushes the wrong way, a resumed run that is not the uninterrupted one bit for bit, a run that keeps the wrong
checkpoints or numbers that are none, a stopped or broken-off run that loses what was written, a damaged file that is
taken as whole.
"""

import json
import logging
import math
import os
import random
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from dsv4 import ModelConfig, Segment, Transformer, UserError, files
from dsv4.checkpoint import RunFolder
from dsv4.config import preset_of
from dsv4.engine import Engine, SamplingParams, Session
from dsv4.errors import FileError
from dsv4.model.moe import Routing
from dsv4.settings import merge
from dsv4.text import ByteTokenizer
from dsv4.train import state as train_state
from dsv4.train.balance import learned_gates, update_balance_bias
from dsv4.train.batches import split
from dsv4.train.log import FAR, WINDOW, LossWatch, plot_loss, read_log, reproducible, smoothed
from dsv4.train.loss import (
    balance_loss,
    count_totals,
    heldout_nll,
    training_loss,
)
from dsv4.train.recipes import RECIPES, resolve
from dsv4.train.runconfig import RunConfig
from dsv4.train.trainer import NotFinite, Trainer

WORDS = "the of and to in a is that for it as was with be by on not he his but at are this have from".split()


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A folder with one file of 40 small documents."""
    rng = random.Random(0)
    lines = [json.dumps({"text": " ".join(rng.choices(WORDS, k=60))}) for _ in range(40)]
    folder = tmp_path / "text"
    folder.mkdir()
    (folder / "a.jsonl").write_text("\n".join(lines))
    return folder


def config_for(text: Path, steps: int = 6) -> RunConfig:
    tiny = ModelConfig.preset(
        "tiny", vocab_size=258, num_hidden_layers=3, compress_ratios=(0, 4, 128, 0), hidden_size=32
    )
    changes = {
        "data": {"path": str(text), "tokenizer": "bytes", "seq_len": 150, "tokens_per_step": 320},
        "schedule": {"steps": steps, "warmup": 1},
        "save": {"every": 2, "eval_every": 3, "eval_tokens": 500, "keep": 3},
    }
    return merge(replace(RECIPES["tiny"](), model=tiny), changes)


def trained(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {**trainer.model.state_dict(), **{f"opt.{k}": v for k, v in trainer.optimizer.state_dict().items()}}


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def figures(folder: Path) -> list[dict]:
    """The log without its clock."""
    return [reproducible(r) for r in read_log(folder / "log.jsonl")]


# --- losses ---


@pytest.fixture
def model() -> Transformer:
    torch.manual_seed(0)
    return Transformer(ModelConfig.preset("tiny", initializer_range=0.1))


def test_the_loss_is_that_of_each_document_alone(model: Transformer) -> None:
    lengths = [5, 1, 140]
    ids = torch.randint(0, 512, (sum(lengths),))
    documents = ids.split(lengths)
    targets = torch.cat([F.pad(d[1:], (0, 1), value=-100) for d in documents])
    loss = training_loss(model, ids, targets, lengths, mtp_weight=0.3, balance_weight=0.0)
    nll, mtp, count, count_mtp = 0.0, 0.0, 0, 0
    with torch.no_grad():
        for d in (d for d in documents if len(d) > 1):
            nll += F.cross_entropy(model(d)[:-1], d[1:], reduction="sum").item()
            count += len(d) - 1
            hidden, rows, _ = model.predict_next(model.trunk(d, [Segment(len(d))]), d)
            assert rows.tolist() == list(range(len(d) - 1))
            mtp += F.cross_entropy(model.logits(hidden[:-1]), d[2:], reduction="sum").item()
            count_mtp += len(d) - 2
    totals = count_totals([(targets, lengths)])
    assert (totals.targets, totals.mtp_targets, totals.sequences, totals.mtp_sequences) == (count, count_mtp, 3, 2)
    assert loss.next_token == pytest.approx(nll / count, rel=1e-5)
    assert loss.mtp == pytest.approx(mtp / count_mtp, rel=1e-5)
    assert loss.total.item() == pytest.approx(nll / count + 0.3 * mtp / count_mtp, rel=1e-5)
    assert heldout_nll(model, ids, targets, lengths) == pytest.approx(nll, rel=1e-5)


def test_documents_of_one_token_have_no_mtp(model: Transformer) -> None:
    ids = torch.randint(0, 512, (3,))
    loss = training_loss(model, ids, torch.full((3,), -100), [1, 1, 1], mtp_weight=0.3, balance_weight=1.0)
    assert loss.mtp == loss.next_token == 0.0
    assert list(loss.loads) == [2, 3, 4]
    update_balance_bias(model, loss.loads, 0.001)


def test_balance_loss_by_hand() -> None:
    # 4 experts, 1 per token; first sequence sends both tokens to expert 0, the second is balanced over 0 and 1
    scores = torch.tensor([[3.0, 1, 0, 0], [1, 1, 1, 1], [2, 2, 0, 0], [0, 0, 2, 2]])
    routing = Routing(scores, torch.tensor([[0], [0], [0], [1]]), torch.ones(4, 1))
    first = 4 * (0.75 + 0.25) / 2  # f_0 = 4/2*2 = 4, P_0 = mean(3/4, 1/4)
    second = 2 * (0.5 + 0.0) / 2 + 2 * (0.5 + 0.0) / 2
    assert balance_loss(routing, [2, 2]).item() == pytest.approx((first + second) / 2)


def test_balance_loss_is_one_for_a_balanced_gate() -> None:
    chosen = torch.arange(64).view(32, 2) % 8
    routing = Routing(torch.ones(32, 8), chosen, torch.ones(32, 2))
    assert balance_loss(routing, [32]).item() == pytest.approx(1.0)


def test_the_bias_moves_towards_idle_experts_and_hash_layers_have_none(model: Transformer) -> None:
    gates = learned_gates(model)
    assert list(gates) == [2, 3, 4, 5]  # layers 0 and 1 are hash-routed, 5 is the MTP block
    loads = {layer: torch.tensor([9.0, 1, 5, 5, 5, 5, 5, 5]) for layer in gates}
    update_balance_bias(model, loads, 0.001)
    for gate in gates.values():
        assert gate.bias is not None
        assert gate.bias.tolist() == pytest.approx([-0.001, 0.001, 0, 0, 0, 0, 0, 0])


# --- runs ---


def test_resume_is_no_interruption(text: Path, tmp_path: Path) -> None:
    whole = Trainer(config_for(text), tmp_path / "whole")
    assert whole.run()
    parts = Trainer(config_for(text), tmp_path / "parts")

    def interrupt(record: dict) -> None:
        if record["step"] == 3:  # not a step at which the schedule saves
            os.kill(os.getpid(), signal.SIGTERM)

    assert not parts.run(interrupt)
    assert RunFolder(tmp_path / "parts").latest() == tmp_path / "parts" / "checkpoints" / "step-000003"
    resumed = Trainer(config_for(text), tmp_path / "parts", resume="auto")
    assert resumed.progress.step == 3
    assert resumed.run()
    assert_same(trained(whole), trained(resumed))
    assert figures(tmp_path / "whole") == figures(tmp_path / "parts")


def test_resume_from_an_older_checkpoint_replays_the_same_steps(text: Path, tmp_path: Path) -> None:
    run = Trainer(config_for(text), tmp_path / "run")
    run.run()
    before = figures(tmp_path / "run")
    again = Trainer(config_for(text), tmp_path / "run", resume=str(tmp_path / "run/checkpoints/step-000004"))
    assert [r["step"] for r in read_log(tmp_path / "run" / "log.jsonl")] == [1, 2, 3, 4]
    again.run()
    assert_same(trained(run), trained(again))
    assert figures(tmp_path / "run") == before


def test_training_learns(text: Path, tmp_path: Path) -> None:
    run = Trainer(config_for(text, steps=40), tmp_path / "run")
    start = run.evaluate()
    run.run()
    assert run.evaluate() < 0.6 * start


def gradient(model: Transformer) -> dict[str, torch.Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("parts", [2, 4, 8, 1000])
def test_the_gradient_does_not_depend_on_how_a_step_is_split(text: Path, tmp_path: Path, parts: int) -> None:
    """Micro-batches with unequal numbers of targets, of MTP rows and of sequences: weighed, not averaged."""
    config = merge(
        config_for(text),
        {"data": {"tokens_per_step": 1500, "seq_len": 97}, "loss": {"balance": 0.5, "mtp": 0.7}},
    )
    config = replace(config, model=config.model.with_(initializer_range=0.1))
    run = Trainer(config, tmp_path / "run")
    whole = run._gradient(0, 0.7)
    expected = gradient(run.model)
    run.config = merge(config, {"data": {"micro_batches": parts}})
    batches = split(run.batches.batch(0), parts)
    assert len(batches) == min(parts, len(run.batches.batch(0).lengths)) or len(batches) > 1
    shares = run._gradient(0, 0.7)
    assert len(shares) == len(batches) > 1
    for name, grad in gradient(run.model).items():
        scale = max(expected[name].abs().max().item(), 1e-3)
        assert (grad - expected[name]).abs().max().item() <= 1e-6 * max(scale, 1.0), name
    for field in ("next_token", "mtp", "balance"):
        assert sum(getattr(p, field) for p in shares) == pytest.approx(getattr(whole[0], field), rel=1e-6)
    loads = {n: sum(p.loads[n] for p in shares if n in p.loads) for n in whole[0].loads}
    assert all(torch.equal(loads[n], load) for n, load in whole[0].loads.items())


def test_micro_batches_see_the_same_tokens(text: Path, tmp_path: Path) -> None:
    config = config_for(text)
    a, b = Trainer(config, tmp_path / "a"), Trainer(merge(config, {"data": {"micro_batches": 2}}), tmp_path / "b")
    assert torch.equal(a.batches.batch(1).ids, b.batches.batch(1).ids)
    assert a.step()["loss"] == pytest.approx(b.step()["loss"], rel=1e-6)  # fp32 sums, split in two


def test_recomputing_activations_changes_nothing(text: Path, tmp_path: Path) -> None:
    config = config_for(text)
    a, b = Trainer(config, tmp_path / "a"), Trainer(replace(config, recompute=True), tmp_path / "b")
    a.step(), b.step()
    assert_same(trained(a), trained(b))


def test_only_the_newest_checkpoints_stay(text: Path, tmp_path: Path) -> None:
    config = merge(config_for(text), {"save": {"every": 1, "keep": 2}})
    Trainer(config, tmp_path / "run").run()
    assert sorted(p.name for p in (tmp_path / "run/checkpoints").glob("*")) == ["latest", "step-000005", "step-000006"]


def checkpoints(folder: Path) -> list[int]:
    return sorted(RunFolder(folder).numbered())


def test_rotation_counts_and_does_not_spell(text: Path, tmp_path: Path) -> None:
    """step-1000000 comes after step-999999, though not in the alphabet."""
    run = Trainer(merge(config_for(text), {"save": {"keep": 2}}), tmp_path / "run")
    for step in (999_998, 999_999, 1_000_000, 1_000_001):
        run.progress.step = step
        run.save()
    assert checkpoints(tmp_path / "run") == [1_000_000, 1_000_001]
    (tmp_path / "run/checkpoints/step-mine").mkdir()  # a folder of the user's own is not counted, nor removed
    run.progress.step += 1
    run.save()
    assert checkpoints(tmp_path / "run") == [1_000_001, 1_000_002]
    assert (tmp_path / "run/checkpoints/step-mine").is_dir()


def test_rotation_after_resuming_from_an_older_step_keeps_the_new_course(text: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    Trainer(config_for(text), folder).run()
    assert checkpoints(folder) == [2, 4, 6]
    older = Trainer(config_for(text), folder, resume=str(folder / "checkpoints/step-000002"))
    assert RunFolder(folder).latest() == folder / "checkpoints/step-000002", (
        "a crash now must go on from where this run does"
    )
    older.step(), older.save()
    assert checkpoints(folder) == [2, 3] and RunFolder(folder).latest() == folder / "checkpoints/step-000003"
    older.run()
    assert checkpoints(folder) == [3, 4, 6]


def test_leftovers_of_a_crash_are_removed(text: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    Trainer(config_for(text), folder).save()
    (folder / ".log.jsonl.tmp").write_text("half")
    (folder / "checkpoints/.step-000009.tmp").mkdir()
    (folder / "checkpoints/.step-000009.tmp/model.safetensors").write_text("half")
    Trainer(config_for(text), folder, resume="auto")
    assert not [p for p in folder.rglob(".*") if p.name.endswith(".tmp")]


def test_two_runs_in_one_folder_are_one_too_many(text: Path, tmp_path: Path) -> None:
    first = Trainer(config_for(text), tmp_path / "run")
    with pytest.raises(UserError, match="another process is working in"):
        Trainer(config_for(text), tmp_path / "run", resume="auto")
    first.run()
    assert Trainer(config_for(text), tmp_path / "run", resume="auto").finished


def test_every_file_is_on_the_disk_before_it_has_its_name(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Trainer(config_for(text), tmp_path / "run")
    run.step()
    synchronised: set[int] = set()
    fsync, rename = os.fsync, os.replace

    def noted(handle: int) -> None:
        synchronised.add(os.fstat(handle).st_ino)
        fsync(handle)

    def checked(source: Path, target: Path) -> None:
        held = [p for p in Path(source).rglob("*") if p.is_file()] if Path(source).is_dir() else [Path(source)]
        assert held and all(p.stat().st_ino in synchronised for p in held), f"{held} renamed before they are safe"
        rename(source, target)

    monkeypatch.setattr(os, "fsync", noted)
    monkeypatch.setattr(os, "replace", checked)
    run.save()
    assert (tmp_path / "run/checkpoints").stat().st_ino in synchronised
    assert (tmp_path / "run/log.jsonl").stat().st_ino in synchronised, "a checkpoint newer than its log line"


def test_the_log_line_is_there_before_the_checkpoint(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A crash between the two lost the line for ever, and with it the evaluation that the demo's summary needs."""
    run = Trainer(config_for(text), tmp_path / "run")
    save = run.save

    def checked() -> Path:
        assert read_log(tmp_path / "run/log.jsonl")[-1]["step"] == run.progress.step
        return save()

    monkeypatch.setattr(run, "save", checked)
    assert run.run()


def test_a_failure_while_saving_leaves_the_last_checkpoint(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Trainer(config_for(text), tmp_path / "run")
    run.step(), run.save()
    kept = RunFolder(tmp_path / "run").latest()

    def full(*args: object, **kwargs: object) -> None:
        raise FileError("cannot write optimizer.safetensors: No space left on device")

    run.step()
    monkeypatch.setattr(train_state, "write_tensors", full)
    with pytest.raises(FileError, match="No space left"):
        run.save()
    assert RunFolder(tmp_path / "run").latest() == kept
    assert [p.name for p in (tmp_path / "run/checkpoints").iterdir() if p.name.startswith(".")] == []
    monkeypatch.undo()
    run.close()
    assert Trainer(config_for(text), tmp_path / "run", resume="auto").progress.step == 1


# --- numbers that are none ---


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_remedy(text: Path, tmp_path: Path) -> None:
    run = Trainer(config_for(text), tmp_path / "run")
    run.save()
    with torch.no_grad():
        run.model.head.weight.fill_(math.nan)
    with pytest.raises(NotFinite, match="step-000000: resume from it with a lower optim.lr") as error:
        run.run()
    assert error.value.good == RunFolder(tmp_path / "run").latest() == tmp_path / "run" / "checkpoints" / "step-000000"


@pytest.mark.parametrize("where", ["weight", "momentum", "bias"])
def test_no_checkpoint_holds_a_number_that_is_not_finite(text: Path, tmp_path: Path, where: str) -> None:
    """The last update may overflow after a finite loss: such a state must not become `latest`, nor push others out."""
    run = Trainer(merge(config_for(text), {"save": {"keep": 1}}), tmp_path / "run")
    run.step(), run.save()
    good = RunFolder(tmp_path / "run").latest()
    run.step()
    tensors = {**run.model.state_dict(), **run.optimizer.state_dict()}
    name = {
        "weight": "layers.1.attn.wkv.weight",
        "momentum": "layers.1.attn.wkv.weight.momentum",
        "bias": "layers.2.ffn.gate.bias",
    }
    with torch.no_grad():
        tensors[name[where]].view(-1)[-1] = math.inf
    with pytest.raises(NotFinite, match=name[where].replace(".", r"\.")):
        run.save()
    assert RunFolder(tmp_path / "run").latest() == good and checkpoints(tmp_path / "run") == [1]
    run.close()
    assert Trainer(config_for(text), tmp_path / "run", resume="auto").run()


def test_an_evaluation_that_is_not_finite_stops_the_run(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Trainer(config_for(text), tmp_path / "run")
    monkeypatch.setattr("dsv4.train.trainer.heldout_nll", lambda *args: math.nan)
    with pytest.raises(NotFinite, match="the evaluation after step 3 gives nan"):
        run.run()
    assert checkpoints(tmp_path / "run") == [2]


def test_a_loss_far_above_its_own_past_is_said_and_the_last_good_state_stays(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config = merge(config_for(text, steps=40), {"save": {"every": 5, "keep": 1, "eval_every": 1000}})
    run = Trainer(config, tmp_path / "run")
    step = run.step
    monkeypatch.setattr(run, "step", lambda: {**step(), "loss": 3.0 if run.progress.step <= 17 else 9.0})
    with caplog.at_level(logging.WARNING, "dsv4"):
        run.run()
    said = [r.getMessage() for r in caplog.records if "far above its own past" in r.getMessage()]
    assert len(said) == 1 and "step-000015" in said[0]
    assert RunFolder(tmp_path / "run").last_good() == tmp_path / "run/checkpoints/step-000015"
    assert checkpoints(tmp_path / "run") == [15, 40]
    records = read_log(tmp_path / "run/log.jsonl")
    first = next(r["step"] for r in records if r.get("diverging"))
    assert 18 <= first <= 20
    again = Trainer(config, tmp_path / "run", resume="auto")
    assert again.watch.diverging, "a resumed run must know where its loss has been"


def test_the_loss_watch_by_hand() -> None:
    watch = LossWatch([5.0] * WINDOW)
    high = 5.0 * 1.1 + FAR
    assert not any(watch.push(high) for _ in range(2 * WINDOW)), "as high as allowed"
    assert not any(watch.push(5.0) for _ in range(WINDOW))
    assert watch.push(5.0 + 10 * (high - 5.0) + 0.1), "one spike that lifts the mean of ten too far"
    assert not LossWatch([9.0] * 3 + [1.0] * 3).diverging, "too few updates to tell"


# --- being asked to stop ---


def asking(run: Trainer, times: int, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Send SIGINT `times` times while step 3 is in `where`."""
    inner: Callable = getattr(run, where)

    def interrupted(*args: object) -> object:
        if run.progress.step == (2 if where == "_gradient" else 3) and run.stop.asked == 0:
            for _ in range(times):
                os.kill(os.getpid(), signal.SIGINT)
        return inner(*args)

    monkeypatch.setattr(run, where, interrupted)


@pytest.mark.parametrize(
    ("times", "where", "stands"), [(1, "_gradient", 3), (2, "_gradient", 2), (2, "save", 3), (2, "evaluate", 3)]
)
def test_however_often_one_presses_the_newest_whole_state_is_saved(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture, times: int, where: str,
    stands: int,
) -> None:  # fmt: skip
    config = merge(config_for(text), {"save": {"every": 3, "eval_every": 3}})
    whole = Trainer(config, tmp_path / "whole")
    whole.run()
    run = Trainer(config, tmp_path / "run")
    asking(run, times, where, monkeypatch)
    assert not run.run()
    said = capfd.readouterr().err
    assert "stopping after this step" in said, "the first request is answered at once"
    assert times == 1 or "giving up the step" in said or "saving" in said
    assert RunFolder(tmp_path / "run").latest() == tmp_path / f"run/checkpoints/step-{stands:06d}"
    resumed = Trainer(config, tmp_path / "run", resume="auto")
    assert resumed.run()
    assert_same(trained(whole), trained(resumed))


def test_a_third_request_interrupts_and_leaves_the_checkpoint_before(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Trainer(config_for(text), tmp_path / "run")
    inner = train_state.write_tensors

    def interrupted(*args: object, **kwargs: object) -> None:
        if run.progress.step == 4:
            for _ in range(3):
                os.kill(os.getpid(), signal.SIGINT)
        inner(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(train_state, "write_tensors", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run.run()
    assert RunFolder(tmp_path / "run").latest() == tmp_path / "run/checkpoints/step-000002"
    monkeypatch.undo()
    assert Trainer(config_for(text), tmp_path / "run", resume="auto").run()


# --- wrong use ---


def test_a_run_is_never_written_over(text: Path, tmp_path: Path) -> None:
    Trainer(config_for(text), tmp_path / "run").save()
    with pytest.raises(UserError, match="--resume auto"):
        Trainer(config_for(text), tmp_path / "run")


def test_the_optimiser_the_schedule_and_the_evaluation_may_change_on_resume(text: Path, tmp_path: Path) -> None:
    """What a message recommends ("lower optim.lr and resume") must be possible, and be on record."""
    Trainer(config_for(text, steps=2), tmp_path / "run").run()
    changed = merge(
        config_for(text),
        {
            "optim": {"lr": 1e-4, "clip": math.inf},
            "save": {"eval_every": 1},
            "data": {"micro_batches": 2},
            "recompute": True,
        },
    )
    run = Trainer(changed, tmp_path / "run", resume="auto")
    assert run.run()
    records = read_log(tmp_path / "run/log.jsonl")
    events = [r for r in records if "event" in r]
    assert [(r["step"], r["event"]) for r in events] == [(2, "resumed")]
    assert events[0]["changed"]["optim.lr"] == [0.004, 1e-4]
    assert set(events[0]["changed"]) == {
        "schedule.steps", "optim.lr", "optim.clip", "save.eval_every", "data.micro_batches", "recompute"
    }  # fmt: skip
    assert [r["step"] for r in records if "loss" in r] == [1, 2, 3, 4, 5, 6]
    assert records[-1]["lr"] <= 1e-4
    assert resolve("small", tmp_path / "run/config.yaml").optim.lr == 1e-4


@pytest.mark.parametrize(
    "override", ["seed=1", "loss.mtp=0.1", "data.seq_len=100", "model.index_topk=8", "data.path=elsewhere"]
)
def test_what_decides_what_was_learned_may_not_and_the_remedy_works(text: Path, tmp_path: Path, override: str) -> None:
    Trainer(config_for(text), tmp_path / "run").save()
    file = tmp_path / "run/config.yaml"
    with pytest.raises(UserError, match=rf"was started with {override.partition('=')[0]}=.*--config .*config.yaml"):
        Trainer(resolve("small", file, [override]), tmp_path / "run", resume="auto")
    assert Trainer(resolve("small", file), tmp_path / "run", resume="auto").progress.step == 0


def test_a_run_from_before_a_setting_existed_goes_on_with_its_default(text: Path, tmp_path: Path) -> None:
    Trainer(config_for(text), tmp_path / "run").run()
    latest = RunFolder(tmp_path / "run").latest()
    assert latest is not None
    state = json.loads((latest / "state.json").read_text())
    for name in ("format", "mix", "packing", "fim", "controls", "workers"):
        del state["settings"]["data"][name]
    del state["settings"]["start_from"]
    (latest / "state.json").write_text(json.dumps(state))
    files.write_digests(latest)
    assert Trainer(config_for(text), tmp_path / "run", resume="auto").progress.step == 6
    with pytest.raises(UserError, match="was started with data.packing='', not 'whole'"):
        Trainer(merge(config_for(text), {"data": {"packing": "whole"}}), tmp_path / "run", resume="auto")


def test_a_run_cannot_end_before_it_stands(text: Path, tmp_path: Path) -> None:
    Trainer(config_for(text), tmp_path / "run").run()
    with pytest.raises(UserError, match="stands at step 6 already: schedule.steps=3"):
        Trainer(config_for(text, steps=3), tmp_path / "run", resume="auto").run()


def test_a_checkpoint_goes_on_only_with_the_data_it_learned_from(text: Path, tmp_path: Path) -> None:
    """The batches are a function of the step: with other tokens under it, a resumed run would be of no run at all."""
    Trainer(config_for(text), tmp_path / "run").save()
    (text / "b.jsonl").write_text(json.dumps({"text": "one more"}) + "\n")
    with pytest.raises(UserError, match="trained on other data"):
        Trainer(config_for(text), tmp_path / "other", resume=str(tmp_path / "run/checkpoints/step-000000"))
    with pytest.raises(UserError, match="already holds a run of its own"):
        other = config_for(text)
        Trainer(other, tmp_path / "third").save()
        Trainer(other, tmp_path / "third", resume=str(tmp_path / "run/checkpoints/step-000000"))


def test_a_run_resumes_from_anywhere_and_after_its_texts_have_moved(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = merge(config_for(text), {"data": {"path": "text"}})
    Trainer(config, Path("run")).save()
    text.rename(tmp_path / "moved")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    assert Trainer(resolve("small", tmp_path / "run/config.yaml"), tmp_path / "run", resume="auto").run()


def test_the_model_ends_texts_where_its_tokenizer_does(text: Path, tmp_path: Path) -> None:
    """A preset's eos is a guess; the tokenizer of the run knows."""
    config = config_for(text)
    run = Trainer(replace(config, model=config.model.with_(bos_token_id=7, eos_token_id=9)), tmp_path / "run")
    assert (run.model.config.bos_token_id, run.model.config.eos_token_id) == (
        ByteTokenizer.bos_id,
        ByteTokenizer.eos_id,
    )


FILES = ["model.safetensors", "optimizer.safetensors", "state.json", "config.json", "tokenizer.json", "digests.json"]


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", ["half", "bit", "gone"])
def test_a_changed_checkpoint_is_refused(text: Path, tmp_path: Path, file: str, damage: str) -> None:
    """One bit in a tensor's body, or another step in state.json, loaded in silence."""
    Trainer(config_for(text), tmp_path / "run").save()
    damaged = tmp_path / "run/checkpoints/step-000000" / file
    data = damaged.read_bytes()
    if damage == "gone":
        damaged.unlink()
    else:
        at = len(data) * 2 // 3
        damaged.write_bytes(data[:at] if damage == "half" else data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :])
    if (file, damage) == ("digests.json", "gone"):  # the others are as they were: that is all it can say
        assert Trainer(config_for(text), tmp_path / "run", resume="auto").progress.step == 0
        return
    with pytest.raises(UserError, match=r"has changed since|not valid JSON|lacks"):
        Trainer(config_for(text), tmp_path / "run", resume="auto")


@pytest.mark.parametrize(
    "value", ["null", "[]", "3", "{}", '{"step": null}', '{"step": "1"}', '{"step": -1}', "[" * 200_000]
)
def test_a_state_of_the_wrong_kind_is_one_sentence(text: Path, tmp_path: Path, value: str) -> None:
    Trainer(config_for(text), tmp_path / "run").save()
    checkpoint = tmp_path / "run/checkpoints/step-000000"
    (checkpoint / "state.json").write_text(value)
    files.write_digests(checkpoint)  # as if it had been written so
    with pytest.raises(UserError, match="training state"):
        Trainer(config_for(text), tmp_path / "run", resume="auto")


@pytest.mark.parametrize("value", [b"null", b"", b"\xff\xfe", b"../..", b"step-000009", b"[" * 200_000])
def test_a_damaged_pointer_is_one_sentence_and_its_remedy_works(text: Path, tmp_path: Path, value: bytes) -> None:
    Trainer(config_for(text), tmp_path / "run").save()
    pointer = tmp_path / "run/checkpoints/latest"
    pointer.write_bytes(value)
    with pytest.raises(UserError, match="one of step-000000") as error:
        Trainer(config_for(text), tmp_path / "run", resume="auto")
    assert len(str(error.value)) < 500
    pointer.write_text("step-000000")
    assert Trainer(config_for(text), tmp_path / "run", resume="auto").progress.step == 0


def test_a_lost_pointer_loses_no_checkpoint(text: Path, tmp_path: Path) -> None:
    """A run that has checkpoints is not begun anew over them."""
    Trainer(config_for(text), tmp_path / "run").run()
    (tmp_path / "run/checkpoints/latest").unlink()
    with pytest.raises(UserError, match="already holds a run"):
        Trainer(config_for(text), tmp_path / "run")
    assert Trainer(config_for(text), tmp_path / "run", resume="auto").progress.step == 6


def test_damaged_lines_of_the_log_are_left_out_aloud(
    text: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    Trainer(config_for(text), tmp_path / "run").run()
    file = tmp_path / "run/log.jsonl"
    good = file.read_bytes()
    file.write_bytes(
        b"null\n[]\n{}\n\xff\n" + b"[" * 100_000 + b'\n{"step": "x"}\n{"step": 1, "loss": null}\n' + good + b'{"st'
    )
    with caplog.at_level(logging.WARNING, "dsv4"):
        records = read_log(file)
    assert [r["step"] for r in records] == [1, 2, 3, 4, 5, 6]
    assert "7 damaged lines" in caplog.text
    Trainer(config_for(text), tmp_path / "run", resume="auto")
    assert file.read_bytes() == good


@pytest.mark.parametrize("place", ["run", "run/log.jsonl", "run/config.yaml", "run/checkpoints", "run/data"])
def test_something_in_the_way_is_one_sentence(text: Path, tmp_path: Path, place: str) -> None:
    """A file where a folder belongs, a folder where a file belongs."""
    target = tmp_path / place
    target.parent.mkdir(parents=True, exist_ok=True)
    target.mkdir() if target.suffix else target.write_text("in the way")
    with pytest.raises(UserError, match=target.name):
        Trainer(config_for(text), tmp_path / "run").run()


@pytest.mark.parametrize("gone", ["run", "run/checkpoints"])
def test_a_folder_that_is_deleted_under_a_run(text: Path, tmp_path: Path, gone: str) -> None:
    """A sentence at the next thing to write, or a folder that is made again: never a traceback."""
    run = Trainer(config_for(text), tmp_path / "run")

    def delete(record: dict) -> None:
        if record["step"] == 3:
            shutil.rmtree(tmp_path / gone)

    if gone == "run":
        with pytest.raises(FileError, match=r"cannot write .*log\.jsonl: No such file"):
            run.run(delete)
    else:
        assert run.run(delete) and checkpoints(tmp_path / "run") == [4, 6]


def test_the_picture_shows_a_smoothed_line_and_the_final_values(text: Path, tmp_path: Path) -> None:
    import matplotlib.pyplot as plt

    assert smoothed([2.0, 2.0, 2.0]) == pytest.approx([2.0, 2.0, 2.0])
    assert smoothed([0.0, 1.0])[1] == pytest.approx(0.1 / 0.19)
    Trainer(config_for(text), tmp_path / "run").run()
    drawn = []
    closing = plt.close
    plt.close = lambda figure: drawn.append([[t.get_text() for t in a.get_legend().get_texts()] for a in figure.axes])
    try:
        plot_loss(tmp_path / "run", {"bigram": 2.5})
    finally:
        plt.close = closing
        plt.close("all")
    last = read_log(tmp_path / "run/log.jsonl")[-1]
    assert drawn[0][0][0].endswith("at step 6")
    assert drawn[0][1] == [f"dsv4; {last['heldout_bpb']:.3f} at step 6", "bigram; 2.500"]
    assert (tmp_path / "run/loss.png").stat().st_size > 10_000


def test_a_tokenizer_larger_than_the_vocabulary_is_refused_before_anything_is_written(
    text: Path, tmp_path: Path
) -> None:
    config = config_for(text)
    small = replace(config, model=config.model.with_(vocab_size=100))
    with pytest.raises(UserError, match="258 tokens but model.vocab_size=100"):
        Trainer(small, tmp_path / "run")
    assert not (tmp_path / "run" / "data" / "tokenizer.json").exists()


def test_data_prepared_for_another_tokenizer_is_not_used_silently(text: Path, tmp_path: Path) -> None:
    Trainer(config_for(text), tmp_path / "run")
    other = merge(config_for(text), {"data": {"tokenizer": "bpe"}, "model": {"vocab_size": 300}})
    with pytest.raises(UserError, match="was prepared for"):
        Trainer(other, tmp_path / "run")


# --- what V4 is compared with ------------------------------------------------------------------------


def control_for(text: Path, kind: str, steps: int = 6) -> RunConfig:
    small = {"vocab_size": 258, "num_hidden_layers": 2, "hidden_size": 32}
    return replace(config_for(text, steps), model=preset_of(kind, "tiny").with_(**small))


@pytest.mark.parametrize("kind", ["v32", "llama"])
def test_a_control_learns_in_fifty_steps_and_generates_from_its_run(text: Path, tmp_path: Path, kind: str) -> None:
    """Through the same Trainer and Engine as V4: evaluation, balance, checkpoints, memory."""
    config = merge(control_for(text, kind, steps=50), {"loss": {"bias_speed": 0.01}, "save": {"eval_every": 50}})
    run = Trainer(config, tmp_path / "run")
    start = run.evaluate()
    assert run.run()
    records = [r for r in read_log(tmp_path / "run" / "log.jsonl") if "loss" in r]
    losses = [r["loss"] for r in records]
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5]) and records[-1]["heldout_bpb"] < 0.7 * start
    assert all(r["mtp_loss"] == 0 for r in records), "there is no MTP block"
    gates = learned_gates(run.model)
    assert list(gates) == ([1] if kind == "v32" else []), "the first layer of V3.2 is dense"
    assert all(gate.bias.abs().max() >= 0.01 for gate in gates.values()), "the balance bias is nudged"
    assert all((r["balance"] > 0.9) == (kind == "v32") for r in records)

    engine = Engine.open(tmp_path / "run")
    assert type(engine.model) is type(run.model) and engine.model.config == run.model.config
    greedy = SamplingParams(temperature=0, max_tokens=12)
    prompts: list[str | list[int]] = ["the of", "it was as with be", "a"]
    together = engine.generate(prompts, greedy)
    for prompt, done in zip(prompts, together, strict=True):
        assert done.ids == engine.generate([prompt], greedy)[0].ids, "others in the batch change nothing"
        ids = torch.tensor(done.prompt_ids + done.ids)
        with torch.no_grad():
            assert run.model(ids)[len(done.prompt_ids) - 1 : -1].argmax(dim=-1).tolist() == done.ids
        assert done.memory_bytes > 0
    session = Session(engine)
    first = "".join(event.text for event in session.generate("the of", greedy))
    list(session.generate(" and", greedy))
    assert session.undo() and session.undo()
    assert first == "".join(event.text for event in session.generate("the of", greedy)) == together[0].text


@pytest.mark.parametrize("kind", ["v32", "llama"])
def test_resuming_a_control_is_no_interruption(text: Path, tmp_path: Path, kind: str) -> None:
    config = control_for(text, kind)
    whole = Trainer(config, tmp_path / "whole")
    assert whole.run()
    parts = Trainer(config, tmp_path / "parts")
    assert not parts.run(lambda record: os.kill(os.getpid(), signal.SIGTERM) if record["step"] == 3 else None)
    resumed = Trainer(resolve("small", tmp_path / "parts/config.yaml"), tmp_path / "parts", resume="auto")
    assert resumed.progress.step == 3 and resumed.run()
    assert_same(trained(whole), trained(resumed))
    assert figures(tmp_path / "whole") == figures(tmp_path / "parts")


def test_a_run_of_one_kind_is_not_resumed_as_another(text: Path, tmp_path: Path) -> None:
    Trainer(control_for(text, "llama"), tmp_path / "run").run()
    for other in (control_for(text, "v32"), config_for(text)):
        with pytest.raises(UserError, match=r"the run was started with model\."):
            Trainer(other, tmp_path / "run", resume="auto")


@pytest.mark.parametrize("kind", ["v32", "llama"])
def test_a_control_in_micro_batches_and_with_activations_computed_again(text: Path, tmp_path: Path, kind: str) -> None:
    config = replace(control_for(text, kind), recompute=True)
    a = Trainer(config, tmp_path / "a")
    b = Trainer(merge(replace(config, recompute=False), {"data": {"micro_batches": 3}}), tmp_path / "b")
    assert a.step()["loss"] == pytest.approx(b.step()["loss"], rel=1e-6)
    for name, tensor in a.model.state_dict().items():
        assert torch.allclose(tensor, b.model.state_dict()[name], atol=1e-4), name  # Muon makes much of a rounding
