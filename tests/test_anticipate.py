"""Failures caught here: experts chosen by other parameters than those of `delay` updates ago, or others in the backward
pass; anticipation with no delay that is not the plain run; a spike that is missed, a run without one that goes back, a
run that goes back for ever; a run that is stopped in the midst and goes on as another one.
"""

import copy
import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dsv4 import ModelConfig, UserError
from dsv4.checkpoint import RunFolder
from dsv4.model.moe import Gate
from dsv4.settings import merge
from dsv4.train.anticipate import FILE, AnticipatoryConfig, Spikes, choose, parted, routed
from dsv4.train.balance import learned_gates
from dsv4.train.log import read_log, reproducible
from dsv4.train.parallel.processes import Processes
from dsv4.train.recipes import RECIPES
from dsv4.train.runconfig import RunConfig
from dsv4.train.trainer import NotFinite, Trainer

WORDS = "the of and to in a is that for it as was with be by on not he his but at are this have from".split()


@pytest.fixture
def text(tmp_path: Path) -> Path:
    rng = random.Random(0)
    lines = [json.dumps({"text": " ".join(rng.choices(WORDS, k=60))}) for _ in range(40)]
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.jsonl").write_text("\n".join(lines))
    return tmp_path / "text"


def config_for(text: Path, updates: int = 10, **anticipatory) -> RunConfig:
    """A hash layer, two whose gates learn and an MTP block; router biases that move fast enough to matter."""
    model = ModelConfig.preset(
        "tiny", vocab_size=258, num_hidden_layers=3, compress_ratios=(0, 4, 128, 0), hidden_size=32, num_hash_layers=1,
        num_nextn_predict_layers=1,
    )  # fmt: skip
    changes = {
        "data": {"path": str(text), "tokenizer": "bytes", "seq_len": 150, "tokens_per_step": 320},
        "schedule": {"steps": updates, "warmup": 1},
        "loss": {"bias_speed": 0.05},
        "save": {"every": 4, "eval_every": 100, "eval_tokens": 300, "keep": 3},
        "anticipatory": anticipatory,
    }
    return merge(replace(RECIPES["tiny"](), model=model), changes)


def trained(run: Trainer) -> dict[str, torch.Tensor]:
    return {**run.model.state_dict(), **{f"opt.{k}": v for k, v in run.optimizer.state_dict().items()}}


def assert_same(a: Trainer, b: Trainer) -> None:
    mine, other = trained(a), trained(b)
    assert mine.keys() == other.keys() and [n for n in mine if not torch.equal(mine[n], other[n])] == []
    logs = [[reproducible(r) for r in read_log(t.folder.log)] for t in (a, b)]
    for records in logs:
        for record in records:
            record.pop("anticipatory", None)
    assert logs[0] == logs[1]


def noting(run: Trainer, monkeypatch: pytest.MonkeyPatch) -> list[dict[int, list[torch.Tensor]]]:
    """What every learned gate of a run decides in passes with a graph, update by update."""
    seen: list[dict[int, list[torch.Tensor]]] = []
    layers = {id(gate): n for n, gate in learned_gates(run.model).items()}
    plain, step = Gate.forward, run.step

    def forward(self, x, ids):
        decided = plain(self, x, ids)
        if torch.is_grad_enabled() and id(self) in layers:
            parts = seen[-1].setdefault(layers[id(self)], [])
            parts.append(decided.chosen)
        return decided

    def stepping():
        seen.append({})
        return step()

    monkeypatch.setattr(Gate, "forward", forward)
    monkeypatch.setattr(run, "step", stepping)
    return seen


@pytest.mark.parametrize("more", [{}, {"data.micro_batches": 2, "recompute": True}])
def test_without_a_delay_it_is_the_plain_run(text: Path, tmp_path: Path, more: dict) -> None:
    words = {"recompute": more.get("recompute", False), "data": {"micro_batches": more.get("data.micro_batches", 1)}}
    plain = Trainer(merge(config_for(text), words), tmp_path / "plain")
    ahead = Trainer(merge(config_for(text, when="always", delay=0), words), tmp_path / "ahead")
    assert plain.run() and ahead.run()
    assert_same(plain, ahead)
    assert {r["anticipatory"] for r in read_log(ahead.folder.log)} == {0}
    assert all("anticipatory" not in r for r in read_log(plain.folder.log))


@pytest.mark.parametrize("recompute", [False, True])
def test_experts_are_chosen_by_the_parameters_of_delay_updates_ago(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recompute: bool
) -> None:
    """Against whole copies of the model of each update, asked by themselves."""
    delay, config = 3, config_for(text, 8, when="always", delay=3)
    run = Trainer(merge(config, {"recompute": recompute, "data": {"micro_batches": 2}}), tmp_path / "run")
    seen, copies = noting(run, monkeypatch), []
    for _ in range(8):
        copies.append(copy.deepcopy(run.model))
        run.step()
    run.close()
    apart = 0
    for step, taken in enumerate(seen):
        batch = run.batches.batch(step)
        for then in (max(0, step - delay), step):
            with torch.no_grad():
                routing = copies[then](batch.ids, segments=batch.lengths, targets=batch.targets).routing
            assert taken.keys() == {1, 2, 3} and set(routing) == {0, 1, 2, 3}
            for layer, parts in taken.items():
                each = len(parts) // 2  # of two micro-batches: once, or once more in the backward pass
                assert each == 1 + (recompute and layer < 3)
                chosen, again = torch.cat(parts[::each]), torch.cat(parts[each - 1 :: each])
                assert torch.equal(chosen, again)
                if then == max(0, step - delay):
                    assert torch.equal(chosen, routing[layer][0].chosen)
                else:
                    apart += int((chosen != routing[layer][0].chosen).sum())
    assert apart > 100, "the parameters chose the same all the time: nothing is shown"


def test_a_part_without_a_second_token_has_no_choice_for_mtp(text: Path, tmp_path: Path) -> None:
    run = Trainer(config_for(text), tmp_path / "run")
    run.close()
    batch = run.batches.batch(0)
    ones = replace(batch, lengths=[1] * 3, ids=batch.ids[:3], targets=batch.targets[:3])
    some = replace(batch, lengths=[1, 4, 2], ids=batch.ids[:7], targets=batch.targets[:7])
    shares = [Processes().share(part) for part in (ones, some)]
    chosen = choose(run.model, shares, "off")
    assert {n: len(rows) for n, rows in chosen.items()} == {1: 10, 2: 10, 3: 4}
    first, second = parted(chosen, shares, 3)
    assert {n: len(rows) for n, rows in first.items()} == {1: 3, 2: 3}
    assert {n: len(rows) for n, rows in second.items()} == {1: 7, 2: 7, 3: 4}
    with routed(run.model, second):
        decided = run.model(some.ids, segments=some.lengths, targets=some.targets).routing
    assert all(torch.equal(decided[n][0].chosen, rows) for n, rows in second.items())
    assert all(gate.anticipated is None for gate in learned_gates(run.model).values())


def spoil(monkeypatch: pytest.MonkeyPatch, run: Trainer, steps: dict[int, float]) -> None:
    """The loss of these updates is so many times as high, once, unless experts are chosen ahead; nan for 0."""
    plain = run._gradient

    def gradient(step, weight, chosen=None):
        parts = plain(step, weight, chosen)
        if step in steps and chosen is None:
            factor = steps[step] or float("nan")
            parts = [replace(part, next_token=part.next_token * factor) for part in parts]
        return parts

    monkeypatch.setattr(run, "_gradient", gradient)


SPIKING = {"when": "spike", "delay": 2, "steps": 3, "window": 4, "threshold": 20.0}


@pytest.mark.parametrize("factor", [3.0, 0.0])
def test_a_spike_is_gone_back_from_once(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, factor: float
) -> None:
    run = Trainer(config_for(text, 14, **SPIKING), tmp_path / "run")
    assert RunFolder(tmp_path / "run").latest() is None
    spoil(monkeypatch, run, {9: factor})
    assert run.run()
    records = read_log(run.folder.log)
    assert [r["step"] for r in records] == list(range(1, 15))
    ahead = {r["step"]: r["anticipatory"] for r in records if "anticipatory" in r}
    assert ahead == {9: 0, 10: 1, 11: 2, 12: 2, 13: 2}  # back to 8, until three updates after the tenth
    assert [r["step"] for r in records if "spike" in r] == [9]
    spike = records[8]["spike"]
    assert spike["step"] == 10 and spike["back_to"] == 8 and (spike["loss"] is None) == (factor == 0.0)
    assert caplog.text.count("going back to step 8") == 1
    assert not any((path / FILE).exists() for path in run.folder.numbered().values() if path.name == "step-000014")


def test_a_spike_before_any_checkpoint_goes_back_to_the_start(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = merge(config_for(text, 8, **SPIKING), {"save": {"every": 100}})
    run = Trainer(config, tmp_path / "run")
    spoil(monkeypatch, run, {5: 3.0})
    assert run.run()
    assert {r["step"]: r["anticipatory"] for r in read_log(run.folder.log) if "anticipatory" in r} == {
        1: 0, 2: 1, 3: 2, 4: 2, 5: 2, 6: 2, 7: 2, 8: 2,
    }  # fmt: skip


def test_one_spike_after_the_other_ends(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each time to the same checkpoint, each time past one more of them."""
    config = merge(config_for(text, 14, **SPIKING), {"save": {"every": 100}})
    run = Trainer(config, tmp_path / "run")
    spoil(monkeypatch, run, {5: 3.0, 9: 3.0})
    assert run.run()
    records = read_log(run.folder.log)
    assert [r["step"] for r in records] == list(range(1, 15)) and records[0]["spike"]["step"] == 10
    assert {r["step"] for r in records if "anticipatory" in r} == set(range(1, 14))


def test_a_run_without_a_spike_is_the_plain_run(text: Path, tmp_path: Path) -> None:
    plain = Trainer(config_for(text, 12), tmp_path / "plain")
    watched = Trainer(config_for(text, 12, when="spike", window=4, threshold=20.0), tmp_path / "watched")
    assert plain.run() and watched.run()
    assert_same(plain, watched)


def test_what_is_not_finite_still_stops_a_run_that_has_gone_back(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Trainer(config_for(text, 8, **{**SPIKING, "when": "always"}), tmp_path / "run")
    plain = run._gradient
    monkeypatch.setattr(run, "_gradient", lambda *given: [replace(p, next_token=float("nan")) for p in plain(*given)])
    with pytest.raises(NotFinite):
        run.run()


@pytest.mark.parametrize("stop", [8, 9, 10, 12])
def test_a_run_that_is_stopped_in_the_midst_is_no_interruption(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: int
) -> None:
    """Killed after update `stop` with a checkpoint of every update, before, on and after the spike."""
    config = merge(config_for(text, 14, **SPIKING), {"save": {"every": 1, "keep": 20}})
    whole = Trainer(config, tmp_path / "whole")
    spoil(monkeypatch, whole, {9: 3.0})
    assert whole.run()

    class Killed(Exception):
        pass

    def until(record):
        if record["step"] == stop and (stop < 10 or "anticipatory" in record):
            raise Killed

    first = Trainer(config, tmp_path / "parts")
    spoil(monkeypatch, first, {9: 3.0})
    with pytest.raises(Killed):
        first.run(until)
    second = Trainer(config, tmp_path / "parts", resume="auto")
    spoil(monkeypatch, second, {9: 3.0})
    assert second.run()
    assert_same(whole, second)
    logs = [[r.get("anticipatory") for r in read_log(t.folder.log)] for t in (whole, second)]
    assert logs[0] == logs[1]


def test_spikes_by_hand() -> None:
    config = AnticipatoryConfig("spike", window=4, threshold=5.0)
    spikes = Spikes(config, [{"step": n, "loss": x} for n, x in enumerate([9.0, 2.0, 2.1, 1.9, 2.0])])
    # median 2.0, distances 0, 0.1, 0.1, 0: 1.4826 * 0.05 = 0.074
    assert spikes.judge({"loss": 2.36}) is None  # 2.0 + 5 * 0.074 = 2.371
    spikes = Spikes(config, [{"loss": x} for x in [2.0, 2.1, 1.9, 2.0]])
    assert spikes.judge({"loss": 2.38}) == 2.0
    assert spikes.judge({"loss": float("nan")}) == 2.0
    assert spikes.judge({"loss": 2.0}) is None  # what was a spike is no past
    flat = Spikes(config, [{"loss": 2.0}] * 4)
    assert flat.judge({"loss": 2.09}) is None and flat.judge({"loss": 2.11}) == 2.0  # 5 times 1% of 2
    assert flat.judge({"loss": 9.0, "seq_len": 512}) is None  # longer sequences are another kind
    assert flat.judge({"loss": 9.0, "phase": "sparse"}) is None


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"when": "spkie"}, "did you mean"),
        ({"delay": -1}, "anticipatory.delay=-1 must be from 0"),
        ({"steps": 0}, "anticipatory.steps=0"),
        ({"window": 3}, "anticipatory.window=3"),
        ({"threshold": float("inf")}, "anticipatory.threshold=inf"),
    ],
)
def test_settings_that_cannot_be(text: Path, given: dict, says: str) -> None:
    with pytest.raises(UserError, match=says):
        config_for(text, **given)


def test_models_that_cannot_have_it(text: Path) -> None:
    config = config_for(text)
    hashed = config.model.with_(num_hash_layers=3, num_nextn_predict_layers=0, compress_ratios=(0, 4, 128))
    with pytest.raises(UserError, match="nothing is chosen"):
        replace(config, model=hashed, anticipatory=AnticipatoryConfig("always"))


def test_what_is_kept_is_that_of_the_batch_whatever_its_parts(text: Path, tmp_path: Path) -> None:
    """A resumed run may cut its steps otherwise."""
    run = Trainer(config_for(text), tmp_path / "run")
    run.close()
    batch = run.batches.batch(0)
    for phase in ("off", "dense", "warmup", "sparse"):
        whole = choose(run.model, Processes().shares(batch, 1), phase)
        losses = run.model(batch.ids, segments=batch.lengths, targets=batch.targets, phase=phase)
        assert all(torch.equal(whole[n], losses.routing[n][0].chosen) for n in whole) and set(whole) == {1, 2, 3}
    for count in (2, 3):
        parts = Processes().shares(batch, count)
        cut = choose(run.model, parts, "off")
        assert all(torch.equal(whole[n], cut[n]) for n in whole)
        again = [parted(whole, parts, 3), parted(cut, parts, 3)]
        assert all(torch.equal(a[n], b[n]) for a, b in zip(*again, strict=True) for n in a)
