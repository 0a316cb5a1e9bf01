"""Failures caught here: a figure of a run's log that is not what its name says (bits per byte, the experts' load, MFU,
the optimiser's share, mHC's gain, the mass of sinks, MTP acceptance); a look inside that changes the run, or that is
taken at every update; a figure of the machine that makes two equal runs look different; a page's or tracker's name
for it lost.
"""

import json
import math
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dsv4 import ModelConfig, Segment, Transformer
from dsv4.config import preset_of
from dsv4.controls import build
from dsv4.cost.flops import prefill, train, weighted
from dsv4.settings import merge
from dsv4.train.batches import Batch
from dsv4.train.figures import LOOKED_AT, Peak, flops_of, look_inside, update_figures
from dsv4.train.log import MACHINE, read_log, reproducible
from dsv4.train.recipes import RECIPES
from dsv4.train.runconfig import RunConfig
from dsv4.train.trainer import Trainer

CPU = torch.device("cpu")
WORDS = "the of and to in a is that for it as was with be by on not he his but at are this have from".split()


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    rng = random.Random(0)
    lines = [json.dumps({"text": " ".join(rng.choices(WORDS, k=50)) + " é"}) for _ in range(30)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    model = ModelConfig.preset("tiny", vocab_size=258, num_hidden_layers=3, compress_ratios=(0, 4, 128, 0))
    changes = {
        "data": {"path": str(tmp_path / "a.jsonl"), "tokenizer": "bytes", "seq_len": 150, "tokens_per_step": 320},
        "schedule": {"steps": 4, "warmup": 1},
        "save": {"every": 4, "eval_every": 2, "eval_tokens": 500, "keep": 1},
    }
    return merge(replace(RECIPES["tiny"](), model=model), changes)


def of(ids: Tensor, lengths: list[int]) -> Batch:
    """A batch of documents, with a byte for each target."""
    targets = torch.cat([F.pad(d[1:], (0, 1), value=-100) for d in ids.split(lengths)])
    return Batch(ids, targets, lengths, len(ids) - len(lengths))


def lively(config: ModelConfig, change: Callable[[Transformer], None] = lambda model: None) -> Transformer:
    torch.manual_seed(0)
    model = Transformer(config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(("_fn", "_base", "attn_sink")):
                p.normal_(0, 0.5)
        change(model)
    return model


def test_the_log_has_them_when_it_should(config: RunConfig, tmp_path: Path) -> None:
    run = Trainer(config, tmp_path / "run", peak=lambda: 1e9)
    run.run()
    records = read_log(tmp_path / "run" / "log.jsonl")
    inside = {"sink_mass", "mhc_row_gain", "mhc_column_gain", "mtp_acceptance"}
    for record in records:
        assert {"bpb", "load_max", "load_cv", "mfu", "optimizer_share", "memory_bytes", "grad_norm"} <= record.keys()
        assert (inside <= record.keys()) == (record["step"] in (2, 4)) == ("heldout_bpb" in record)
        assert 0 < record["optimizer_share"] < 1 and record["memory_bytes"] > 1 << 20
    assert not inside & records[0].keys()


def test_figures_of_the_machine_are_not_the_runs(config: RunConfig, tmp_path: Path) -> None:
    for name, peak in (("a", None), ("b", lambda: 1e9)):
        Trainer(config, tmp_path / name, peak=peak).run()
    a, b = (read_log(tmp_path / name / "log.jsonl") for name in "ab")
    assert [reproducible(r) for r in a] == [reproducible(r) for r in b] and a != b
    assert set(b[0]) - set(reproducible(b[0])) == set(MACHINE) - {"anticipatory_share"} and "mfu" not in a[0]


def test_who_does_more_than_the_machine_could_has_it_measured_again() -> None:
    """The largest counts; three times at most, and never while less is done."""
    rates = iter([100.0, 80.0, 130.0, 120.0, 1000.0])
    peak = Peak(lambda: next(rates), devices=2)
    assert peak.share(150.0) == 0.75 and peak.share(240.0) == pytest.approx(240 / 260)
    assert peak.share(390.0) == pytest.approx(390 / 260) and next(rates) == 1000.0, "it was measured three times more"


def test_bits_per_byte_are_those_of_the_text(config: RunConfig, tmp_path: Path) -> None:
    """With single bytes as tokens a target is a byte, but for the end of a text, which has none."""
    run = Trainer(merge(config, {"data": {"tokens_per_step": 900}}), tmp_path / "run")
    batch = run.batches.batch(0)
    known = batch.targets[batch.targets != -100]
    written = int((known >= 2).sum())  # the first two ids begin and end a text
    record = run.step()
    assert written < len(known), "the batch should have the end of a text"
    assert record["bpb"] == pytest.approx(record["loss"] * len(known) / math.log(2) / written, rel=1e-12)


def test_loads_of_experts_by_hand() -> None:
    loads = {3: torch.tensor([4.0, 4, 4, 4]), 5: torch.tensor([1.0, 2, 3, 10])}
    batch = of(torch.zeros(4, dtype=torch.int64), [4])
    figures = update_figures(ModelConfig.preset("tiny"), batch, 1.0, loads, 2.0, 0.5, CPU, None)
    assert figures["load_max"] == 2.5
    assert figures["load_cv"] == pytest.approx(math.sqrt((9 + 4 + 1 + 36) / 4) / 4)
    assert figures["optimizer_share"] == 0.25 and "mfu" not in figures
    none = update_figures(ModelConfig.preset("tiny"), batch, 1.0, {}, 2.0, 0.5, CPU, None)
    assert (none["load_max"], none["load_cv"]) == (1.0, 0.0)


def test_mfu_is_the_counted_flops_over_what_could_have_been_done() -> None:
    config = ModelConfig.preset("small")
    batch = of(torch.zeros(1500, dtype=torch.int64), [1000, 500])
    figures = update_figures(config, batch, 1.0, {}, 2.0, 0.5, CPU, Peak(lambda: 1e12))
    counted = weighted(train(config, 1000)) + weighted(train(config, 500))
    assert figures["mfu"] == pytest.approx(counted / 2.0 / 1e12, rel=1e-12)
    assert figures["mfu"] * 2e12 / 1500 == pytest.approx(6 * 5.3e6, rel=0.5)  # 6 times the active parameters, roughly


def test_flops_without_a_backward_pass_are_those_of_a_prompt() -> None:
    """Of a model without MTP: those of a prompt whose head runs for every token."""
    config = ModelConfig.preset("tiny", num_nextn_predict_layers=0, num_hidden_layers=3, compress_ratios=(0, 4, 128))
    n = 700
    forward = weighted(prefill(config, n)) + (n - 1) * 2 * config.vocab_size * config.hidden_size
    assert flops_of(config, [n], backward=False) == pytest.approx(forward, rel=1e-12)


def test_the_mass_of_a_sink_has_a_closed_form() -> None:
    """Queries of zeros score every row 0: beside n rows a sink of logit s has e^s / (e^s + n)."""
    config = ModelConfig.preset("tiny", num_hidden_layers=2, compress_ratios=(0, 4, 0), sliding_window=5)

    def blind(model: Transformer) -> None:
        for layer in model.layers:
            layer.attn.wq_b.weight.zero_()
            layer.attn.attn_sink.copy_(torch.tensor([0.0, 1.0, -2.0, 3.0])[: config.num_attention_heads])

    model = lively(config, blind)
    lengths = [11, 2]
    found = look_inside(model, of(torch.randint(0, 512, (13,)), lengths))["sink_mass"]
    sinks = model.layers[0].attn.attn_sink.exp()
    for layer, entries in (("0", lambda t: 0), ("1", lambda t: (t + 1) // 4)):
        rows = [min(t + 1, 5) + entries(t) for n in lengths for t in range(n)]
        expected = torch.stack([sinks / (sinks + n) for n in rows]).mean().item()
        assert found[layer] == pytest.approx(expected, rel=1e-5)


def test_the_gain_of_unconstrained_mixing_has_a_closed_form() -> None:
    """Without input dependence every sublayer mixes by the same matrix I + tanh(B), whose power is the composite."""
    config = ModelConfig.preset("tiny", residual="hc", num_hidden_layers=3, compress_ratios=(0, 4, 128, 0))
    n = config.hc_mult
    logits = torch.randn(n, n, generator=torch.Generator().manual_seed(1))

    def fixed(model: Transformer) -> None:
        for layer in model.layers:
            for part in ("attn", "ffn"):
                getattr(layer, f"hc_{part}_fn").zero_()
                getattr(layer, f"hc_{part}_base")[2 * n :] = logits.flatten()

    model = lively(config, fixed)
    ids = torch.randint(0, 512, (9,))
    found = look_inside(model, of(ids, [9]))
    # a stream k of the next layer is the sum over j of comb[j, k] stream j
    mixing = (torch.eye(n) + torch.tanh(logits)).double().mT
    composite = torch.linalg.matrix_power(mixing, 6).abs()
    assert found["mhc_row_gain"] == pytest.approx(composite.sum(dim=1).max().item(), rel=1e-5)
    assert found["mhc_column_gain"] == pytest.approx(composite.sum(dim=0).max().item(), rel=1e-5)
    assert found["mhc_row_gain"] != pytest.approx(found["mhc_column_gain"], rel=0.01)


def test_sinkhorn_keeps_the_gain_near_one() -> None:
    model = lively(ModelConfig.preset("tiny"))
    found = look_inside(model, of(torch.randint(0, 512, (200,)), [200]))
    for name in ("mhc_row_gain", "mhc_column_gain"):
        assert 0.98 < found[name] < 1.1, name


def test_acceptance_is_counted_document_by_document() -> None:
    """Of each pair of neighbouring tokens, whether block and trunk would say the same next one."""
    model = lively(ModelConfig.preset("tiny", initializer_range=0.3))
    lengths = [40, 1, 90, 2]
    ids = torch.randint(0, 512, (sum(lengths),))
    same, count = 0, 0
    with torch.no_grad():
        for document in ids.split(lengths):
            if len(document) < 2:
                continue
            likeliest = model(document).argmax(dim=1)
            hidden, _, _ = model.predict_next(model.trunk(document, [Segment(len(document))]), document)
            drafts = model.logits(hidden).argmax(dim=1)
            same += int((drafts == likeliest[1:]).sum())
            count += len(document) - 1
    assert look_inside(model, of(ids, lengths))["mtp_acceptance"] == pytest.approx(same / count, abs=1e-7)
    assert 0 < same < count, "the case should tell"


def test_a_block_that_says_what_the_trunk_says_is_always_accepted() -> None:
    """A head that knows one word makes both say it."""

    def one_word(model: Transformer) -> None:
        model.head.weight.zero_()

    model = lively(ModelConfig.preset("tiny"), one_word)
    assert look_inside(model, of(torch.randint(0, 512, (30,)), [30]))["mtp_acceptance"] == 1.0


@pytest.mark.parametrize("kind", ["v32", "llama"])
def test_models_without_the_parts_have_no_such_figures(kind: str) -> None:
    model = build(preset_of(kind, "tiny"))
    assert look_inside(model, of(torch.randint(0, 256, (30,)), [30])) == {}


def test_no_more_is_looked_at_than_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    model = lively(ModelConfig.preset("tiny"))
    seen: list[int] = []
    trunk = model.trunk
    monkeypatch.setattr(model, "trunk", lambda ids, *rest: (seen.append(len(ids)), trunk(ids, *rest))[1])
    look_inside(model, of(torch.randint(0, 512, (LOOKED_AT + 500,)), [300, LOOKED_AT, 200]))
    assert seen == [LOOKED_AT]


def test_a_look_inside_changes_nothing(config: RunConfig, tmp_path: Path) -> None:
    """Neither the generator nor weights nor gradients: the next update is the one of a run that was not looked into."""
    a, b = (Trainer(config, tmp_path / name) for name in "ab")
    for _ in range(2):
        a.step(), b.step()
        a.look_inside()
    state = a.model.state_dict()
    assert all(torch.equal(state[name], t) for name, t in b.model.state_dict().items())
