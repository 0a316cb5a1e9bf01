"""Failures caught here: a loss that counts the wrong tokens, a balance bias that pushes the wrong way, a resumed run
that is not the uninterrupted one bit for bit, a stopped or broken-off run that loses what was written, bad settings
that start to work before they are refused.
"""

import json
import math
import os
import random
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from dsv4 import ModelConfig, Segment, Transformer, UserError
from dsv4.model.moe import Routing
from dsv4.train import state as train_state
from dsv4.train.log import read_log
from dsv4.train.loss import balance_loss, heldout_nll, learned_gates, training_loss, update_balance_bias
from dsv4.train.recipes import RECIPES, RunConfig, merge, read_yaml, resolve
from dsv4.train.state import latest
from dsv4.train.trainer import Trainer

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
    return [{k: v for k, v in r.items() if k != "tokens_per_second"} for r in read_log(folder / "log.jsonl")]


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
    assert loss.tokens == count
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
    assert latest(tmp_path / "parts") == tmp_path / "parts" / "checkpoints" / "step-000003"
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


def test_micro_batches_see_the_same_tokens(text: Path, tmp_path: Path) -> None:
    config = config_for(text)
    micro = merge(config, {"data": {"micro_batches": 2}})
    a, b = Trainer(config, tmp_path / "a"), Trainer(micro, tmp_path / "b")
    assert torch.equal(a.batches.batch(1).ids, torch.cat([b.batches.batch(2).ids, b.batches.batch(3).ids]))
    record = b.step()
    assert record["tokens"] == 320 and math.isfinite(record["loss"])


def test_recomputing_activations_changes_nothing(text: Path, tmp_path: Path) -> None:
    config = config_for(text)
    a, b = Trainer(config, tmp_path / "a"), Trainer(replace(config, recompute=True), tmp_path / "b")
    a.step(), b.step()
    assert_same(trained(a), trained(b))


def test_only_the_newest_checkpoints_stay(text: Path, tmp_path: Path) -> None:
    config = merge(config_for(text), {"save": {"every": 1, "keep": 2}})
    Trainer(config, tmp_path / "run").run()
    assert sorted(p.name for p in (tmp_path / "run/checkpoints").glob("*")) == ["latest", "step-000005", "step-000006"]


def test_a_failure_while_saving_leaves_the_last_checkpoint(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Trainer(config_for(text), tmp_path / "run")
    run.step(), run.save()
    kept = latest(tmp_path / "run")

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    run.step()
    monkeypatch.setattr(train_state, "save_file", full)
    with pytest.raises(OSError):
        run.save()
    assert latest(tmp_path / "run") == kept
    monkeypatch.undo()
    assert Trainer(config_for(text), tmp_path / "run", resume="auto").progress.step == 1


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_remedy(text: Path, tmp_path: Path) -> None:
    run = Trainer(config_for(text), tmp_path / "run")
    run.save()
    with torch.no_grad():
        run.model.head.weight.fill_(math.nan)
    with pytest.raises(FloatingPointError, match="lower optim.lr"):
        run.run()
    assert latest(tmp_path / "run") == tmp_path / "run" / "checkpoints" / "step-000000"


# --- wrong use ---


def test_a_run_is_never_written_over(text: Path, tmp_path: Path) -> None:
    Trainer(config_for(text), tmp_path / "run").save()
    with pytest.raises(UserError, match="--resume auto"):
        Trainer(config_for(text), tmp_path / "run")


def test_resume_refuses_other_settings(text: Path, tmp_path: Path) -> None:
    Trainer(config_for(text), tmp_path / "run").save()
    other = merge(config_for(text), {"optim": {"lr": 0.5}})
    with pytest.raises(UserError, match=r"optim\.lr=0\.004, not 0\.5"):
        Trainer(other, tmp_path / "run", resume="auto")
    saves_differently = merge(config_for(text), {"save": {"every": 5}})
    assert Trainer(saves_differently, tmp_path / "run", resume="auto").progress.step == 0


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors", "state.json"])
def test_a_truncated_checkpoint_is_refused(text: Path, tmp_path: Path, file: str) -> None:
    Trainer(config_for(text), tmp_path / "run").save()
    damaged = tmp_path / "run/checkpoints/step-000000" / file
    damaged.write_bytes(damaged.read_bytes()[: damaged.stat().st_size // 2])
    with pytest.raises(UserError, match="truncated|not a complete"):
        Trainer(config_for(text), tmp_path / "run", resume="auto")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.lrr=1", r"unknown configuration key 'optim\.lrr'; did you mean 'lr'"),
        ("model.index_topkk=3", r"'model\.index_topkk'; did you mean 'index_topk'"),
        ("model.compress_ratios=[0,4]", "compress_ratios has 2 entries"),
        ("optim.lr=fast", "must be of type float"),
        ("schedule.steps=1.5", "must be of type int"),
        ("optim=3", "must be a group of settings"),
        ("schedule.warmup=100000", "exceed"),
        ("data.micro_batches=3", "must be a multiple"),
        ("data.seq_len=0", "must be positive"),
        ("nonsense", "not of the form key=value"),
    ],
)
def test_bad_settings(override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        resolve("demo", None, [override])


def test_settings_round_trip_through_yaml(tmp_path: Path) -> None:
    import yaml

    for name, recipe in RECIPES.items():
        file = tmp_path / f"{name}.yaml"
        file.write_text(yaml.safe_dump(recipe().to_dict()))
        assert resolve("tiny", file) == recipe()
    assert resolve("demo", None, ["optim.lr=3e-4"]).optim.lr == 3e-4
    assert resolve("demo", None, ["model.preset=tiny"]).model == ModelConfig.preset("tiny")


def test_yaml_errors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot read"):
        read_yaml(tmp_path / "none.yaml")
    (tmp_path / "a.yaml").write_text("a: [")
    with pytest.raises(UserError, match="not valid YAML"):
        read_yaml(tmp_path / "a.yaml")
    (tmp_path / "b.yaml").write_text("just text")
    with pytest.raises(UserError, match="holds no settings"):
        read_yaml(tmp_path / "b.yaml")


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
