"""Failures caught here: a plan that leaves a parameter out, sends it elsewhere than the optimiser does, or counts other
bytes than a run allocates; a cluster's recipe that cannot be planned on a laptop, or is begun on one and dies half
way; a run that would fit refused; numbers in a plan that do not belong together.
"""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from dsv4.cli import application
from dsv4.config import ModelConfig
from dsv4.errors import UserError
from dsv4.model import Transformer
from dsv4.settings import merge
from dsv4.train import plan as planning
from dsv4.train.memory import machine_bytes
from dsv4.train.optim import HybridOptimizer, parameter_groups
from dsv4.train.plan import check_memory, meta_model, parameter_rows, plan, state_bytes
from dsv4.train.recipes import RECIPES, resolve

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", ["small_cpu", "flash_shape"])
def test_every_parameter_is_in_one_row_and_goes_where_the_optimiser_sends_it(name: str) -> None:
    config = RECIPES[name]()
    model = meta_model(config.model)
    rows = parameter_rows(model, config.model)
    assert sum(r.numbers for r in rows) == sum(p.numel() for p in model.parameters())
    for group in parameter_groups(model.named_parameters(), config.model):
        numbers = sum(p.numel() for p in group["params"])
        assert sum(r.numbers for r in rows if r.kind == group["kind"]) == numbers
        tensors = sum(r.tensors for r in rows if r.kind == group["kind"])
        assert tensors == len(group["params"])
        matrices = {r.matrices for r in rows if r.kind == group["kind"]}
        if group["kind"] == "muon":
            held = {", ".join(f"{n} x [{a}, {b}]" for n, a, b in stacks) for stacks in group["matrices"]}
            assert matrices == held
        else:
            assert matrices == {""}
    assert all(r.why for r in rows)
    why = {r.name: r.why for r in rows}
    assert "no matrix" in why["layers.N.attn.attn_sink"] and "gate and up" in why["layers.N.ffn.experts.w13"]


def test_bytes_are_those_that_a_run_allocates() -> None:
    config = ModelConfig.preset("tiny")
    model = Transformer(config)
    counted = state_bytes(parameter_rows(model, config))
    optimizer = HybridOptimizer(parameter_groups(model.named_parameters(), config), 1e-3)
    momenta = sum(t.nbytes for name, t in optimizer.state_dict().items() if not name.endswith(".steps"))
    weights = sum(p.nbytes for p in model.parameters())
    assert counted == {"weights": weights, "gradients": weights, "momenta": momenta}


@pytest.mark.parametrize(("name", "preset", "parameters"), [
    ("flash_shape", "flash", 290_942_278_866), ("pro_shape", "pro", None)
])  # fmt: skip
def test_a_clusters_recipe_is_planned(name: str, preset: str, parameters: int | None) -> None:
    config = resolve(name)
    assert config.model == ModelConfig.preset(preset)
    one, many = plan(config, ranks=1), plan(config, ranks=1024, mfu=0.2)
    assert parameters in (None, many["parameters"])
    assert not one["fits"] and one["memory_per_rank"]["weights"] == 4 * one["parameters"]
    for part in ("weights", "gradients", "momenta"):
        assert many["memory_per_rank"][part] == math.ceil(one["memory_per_rank"][part] / 1024)
    assert many["tokens_per_second"] == pytest.approx(512 * one["tokens_per_second"])
    assert many["days"] * 86400 * many["tokens_per_second"] == pytest.approx(many["tokens"])
    assert many["seconds_per_step"] * 1024 * 0.2 * 989.5e12 == pytest.approx(many["flops_per_step"])


def test_what_the_paper_states_of_both() -> None:
    flash, pro = resolve("flash_shape"), resolve("pro_shape")
    assert (flash.optim.lr, pro.optim.lr) == (2.7e-4, 2.0e-4)
    for run, tokens in ((flash, 32e12), (pro, 33e12)):
        assert run.schedule.warmup == 2000 and run.schedule.final == 0.1
        assert run.schedule.steps * run.data.tokens_per_step == pytest.approx(tokens, rel=0.01)
        assert (run.loss.mtp, run.loss.mtp_in_decay, run.loss.balance, run.loss.bias_speed) == (0.3, 0.1, 1e-4, 1e-3)


def test_the_plan_is_printed_and_nothing_is_done(tmp_path: Path) -> None:
    given = ["train", "--recipe", "flash_shape", "--plan", "--ranks", "1024", "--out", str(tmp_path / "run")]
    said = CliRunner().invoke(application(["train"]), given)
    assert said.exit_code == 0, said.output
    for words in (
        "290,942,278,866 parameters",
        "512 x [2048, 4096]",
        "each expert's gate and up",
        "1,024 ranks",
        "days",
    ):
        assert words in said.stdout
    found = json.loads(CliRunner().invoke(application(["train"]), [*given, "--json"]).stdout)
    assert found["ranks"] == 1024 and found["rows"]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("given", "says"), [
    ({"ranks": 0}, "--ranks 0"), ({"mfu": 0.0}, "--mfu 0.0"), ({"mfu": 1.5}, "--mfu 1.5"),
    ({"hardware": "h201"}, "did you mean"),
])  # fmt: skip
def test_impossible_questions(given: dict, says: str) -> None:
    with pytest.raises(UserError, match=says):
        plan(resolve("tiny"), **given)


def test_what_does_not_fit_is_refused_before_anything_is_done(tmp_path: Path) -> None:
    result = CliRunner().invoke(
        application(["train"]), ["train", "--recipe", "pro_shape", "--out", str(tmp_path / "x")]
    )
    assert isinstance(result.exception, UserError)
    assert "GiB for weights, gradients and momenta" in str(result.exception) and "--plan" in str(result.exception)
    assert not (tmp_path / "x").exists()


def test_the_border_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused with a byte too little, and not with as much as is needed; processes of many machines share it."""
    config = resolve("tiny")
    needs = sum(state_bytes(parameter_rows(meta_model(config.model), config.model)).values())
    needs += planning.activation_bytes(replace(config, recompute=True), config.data.tokens_per_step)
    monkeypatch.setattr(planning, "machine_bytes", lambda device: needs)
    check_memory(config, CPU)
    monkeypatch.setattr(planning, "machine_bytes", lambda device: needs - 1)
    with pytest.raises(UserError, match="at least"):
        check_memory(config, CPU)
    monkeypatch.setenv("WORLD_SIZE", "2")
    check_memory(config, CPU)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")  # both on this machine
    with pytest.raises(UserError, match="at least"):
        check_memory(config, CPU)


def test_micro_batches_lower_what_is_asked_for() -> None:
    config = resolve("small")
    whole = planning.activation_bytes(config, config.data.tokens_per_step)
    assert planning.activation_bytes(config, config.data.tokens_per_step // 4) == whole // 4
    assert planning.activation_bytes(replace(config, recompute=True), 8192) < whole / 2
    assert machine_bytes(CPU) > 1 << 28


def test_the_old_name_of_newton_schulz_is_still_read(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("optim: {ns: svd, lr: 0.001}\n")
    optim = resolve("tiny", file).optim
    assert optim.newton_schulz == "svd" and optim.lr == 0.001
    assert merge(resolve("tiny"), {"optim": {"newton_schulz": "polar_express"}}).optim.newton_schulz == "polar_express"
