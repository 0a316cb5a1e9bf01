"""Failures caught here: lm-eval or inspect-ai that cannot run on a model of ours; a log-likelihood that is not the
model's own log-softmax, or depends on what is scored beside it; a text too long that loses its bos or is scored twice;
a generation that is not the engine's. Both packages are optional (`pip install 'dsv4[eval]'`).
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dsv4.checkpoint import save
from dsv4.engine import Engine, SamplingParams
from dsv4.errors import UserError
from dsv4.measure.subjects import small_model
from dsv4.probe.behaviour.inprocess import transcript
from dsv4.text import ByteTokenizer

TASK = """task: harbour
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: {kind}
doc_to_text: "{{{{question}}}}"
{more}
metadata: {{version: 1}}
"""
CHOICE = """doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]"""
UNTIL = """doc_to_target: "{{wanted}}"
generation_kwargs: {until: ["zzz"], max_gen_toks: 5, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]"""


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(small_model(vocab_size=258, max_position_embeddings=600), ByteTokenizer(), max_batch=4)


@pytest.fixture
def harness():
    pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'dsv4[eval]'")
    from dsv4.probe.behaviour import harness

    return harness


@pytest.fixture
def request_of(harness):
    from lm_eval.api.instance import Instance

    return lambda *args: Instance("loglikelihood", {}, args, 0)


@torch.no_grad()
def by_hand(engine: Engine, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """One text alone, all of its logits."""
    told = engine.model(torch.tensor([*context, *continuation])).log_softmax(-1)[len(context) - 1 : -1]
    want = torch.tensor(continuation)
    score = sum(float(row[t].double()) for row, t in zip(told, want, strict=True))
    return score, bool((told.argmax(-1) == want).all())


def test_loglikelihood_is_the_models_own_log_softmax(harness, engine, request_of) -> None:
    model, text = harness.HarnessModel(engine), engine.tokenizer
    pairs = [("The harbour", " was quiet"), ("", "Day 1"), ("a" * 300, " b"), ("Trailing ", "space"), ("x", "y")]
    found = model.loglikelihood([request_of(*p) for p in pairs])
    for (context, continuation), (score, greedy) in zip(pairs, found, strict=True):
        whole = text.encode(context + continuation)
        split = len(text.encode(context.rstrip()))
        want = by_hand(engine, [text.bos_id, *whole[:split]], whole[split:])
        assert (score, greedy) == (pytest.approx(want[0], abs=1e-12, rel=0), want[1])
    context = [text.bos_id, *text.encode("The harbour")]
    likeliest = int(engine.model(torch.tensor(context))[-1].argmax())
    assert model._scores([(context, [likeliest])])[0][1] is True


def test_what_is_too_long_keeps_its_bos_and_says_so(harness, engine, request_of, caplog) -> None:
    model, text = harness.HarnessModel(engine, max_length=20), engine.tokenizer
    long = "".join(map(chr, range(65, 100)))
    score, _ = model.loglikelihood([request_of(long, "yes")])[0]
    kept = [text.bos_id, *text.encode(long)[-17:]]
    assert len(kept) + 2 == 20 and score == pytest.approx(
        by_hand(engine, kept, text.encode("yes"))[0], abs=1e-12, rel=0
    )
    assert "oldest tokens are left out" in caplog.text
    with pytest.raises(UserError, match="does not fit"):
        model.loglikelihood([request_of("a", "b" * 40)])
    with pytest.raises(UserError, match="no argument 'peft'"):
        harness.HarnessModel(engine, peft="x")


def test_rolling_scores_every_token_once(harness, engine, request_of) -> None:
    text = engine.tokenizer
    ids = text.encode("Day 1: the harbour was quiet, which nobody minded.")
    whole = harness.HarnessModel(engine).loglikelihood_rolling([request_of(text.decode(ids))])[0]
    assert whole == pytest.approx(by_hand(engine, [text.bos_id], ids)[0], abs=1e-12, rel=0)
    short = harness.HarnessModel(engine, max_length=16).loglikelihood_rolling([request_of(text.decode(ids))])[0]
    want, at = by_hand(engine, [text.bos_id], ids[:16])[0], 16
    while at < len(ids):
        end = min(at + 16, len(ids))
        before = ids[end - 17 : at]
        want, at = want + by_hand(engine, before, ids[at:end])[0], end
    assert short == pytest.approx(want, abs=1e-9, rel=0)


def test_generation_is_the_engines(harness, engine) -> None:
    from lm_eval.api.instance import Instance

    asked = [("The harbour", {"until": ["\n"], "max_gen_toks": 7}), ("A", {"until": "q", "max_gen_toks": 4})]
    found = harness.HarnessModel(engine).generate_until([Instance("generate_until", {}, a, 0) for a in asked])
    params = [SamplingParams(0, max_tokens=7, stop=["\n"]), SamplingParams(0, max_tokens=4, stop=["q"])]
    assert found == [c.text for c in engine.generate([a[0] for a in asked], params)]


def tasks(folder: Path, kind: str, more: str, rows: str) -> str:
    folder.mkdir()
    (folder / "rows.jsonl").write_text(rows)
    (folder / "harbour.yaml").write_text(TASK.format(data=folder / "rows.jsonl", kind=kind, more=more))
    return str(folder)


def test_lm_eval_runs_small_offline_tasks(harness, engine, tmp_path, monkeypatch) -> None:
    """Every second target is what the model says, so the figure is known: 0.5."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    first = engine.generate(["Q1", "Q2"], SamplingParams(0, max_tokens=5, stop=["zzz"]))
    rows = [{"question": "Q1", "wanted": first[0].text}, {"question": "Q2", "wanted": first[1].text + "!"}]
    folder = tasks(tmp_path / "a", "generate_until", UNTIL, "".join(json.dumps(r) + "\n" for r in rows))
    assert harness.capability(engine, ["harbour"], include=folder)["harbour"]["exact_match,none"] == 0.5

    text, rows = engine.tokenizer, []
    for i in range(4):
        context = [text.bos_id, *text.encode(f"Q{i}")]
        scores = [by_hand(engine, context, text.encode(f" {c}"))[0] for c in "ab"]
        best = int(scores[1] > scores[0])
        rows.append({"question": f"Q{i}", "choices": ["a", "b"], "answer": best if i % 2 else 1 - best})
    folder = tasks(tmp_path / "b", "multiple_choice", CHOICE, "".join(json.dumps(r) + "\n" for r in rows))
    assert harness.capability(engine, ["harbour"], include=folder)["harbour"]["acc,none"] == 0.5
    with pytest.raises(UserError, match="lm-eval cannot run no-such-task"):
        harness.capability(engine, ["no-such-task"])


def test_lm_evals_own_command_line_knows_the_model(harness, tmp_path) -> None:
    save(small_model(vocab_size=258, max_position_embeddings=600), tmp_path / "model")
    ByteTokenizer().save(tmp_path / "model")
    rows = '{"question": "Q", "wanted": "nothing like it"}\n'
    folder = tasks(tmp_path / "tasks", "generate_until", UNTIL, rows)
    command = [
        sys.executable, "-m", "dsv4.probe.behaviour.lm_eval_cli", "run", "--model", "dsv4", "--model_args",
        f"pretrained={tmp_path / 'model'}", "--tasks", "harbour", "--include_path", folder,
    ]  # fmt: skip
    ran = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0 and "exact_match" in ran.stdout, ran.stderr[-2000:]


@pytest.mark.filterwarnings("default")  # inspect's own
def test_inspect_runs_a_small_offline_task(engine, tmp_path, monkeypatch) -> None:
    """Half of the targets are what the model says: the accuracy is 0.5."""
    pytest.importorskip("inspect_ai", reason="inspect-ai is not installed: pip install 'dsv4[eval]'")
    monkeypatch.setenv("INSPECT_LOG_DIR", str(tmp_path / "logs"))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    from inspect_ai import Task, eval
    from inspect_ai.dataset import Sample
    from inspect_ai.model import GenerateConfig, get_model
    from inspect_ai.scorer import exact

    from dsv4.probe.behaviour import inspect_provider  # noqa: F401  what its entry point loads

    said = [{"role": "user", "content": f"Question {i}"} for i in range(4)]
    params = SamplingParams(0, max_tokens=6, stop=["\nUser:", "\nSystem:"])
    texts = [c.text.strip() for c in engine.generate([transcript([m]) for m in said], params)]
    samples = [
        Sample(input=m["content"], target=text if i % 2 else text + " and more")
        for i, (m, text) in enumerate(zip(said, texts, strict=True))
    ]
    model = get_model("dsv4/small", engine=engine, config=GenerateConfig(max_tokens=6, temperature=0))
    logs = eval(Task(dataset=samples, scorer=exact()), model=model, display="none", log_dir=str(tmp_path / "logs"))
    assert logs[0].status == "success", logs[0].error
    assert [s.output.completion for s in logs[0].samples] == texts
    assert logs[0].results.scores[0].metrics["mean"].value == 0.5
    assert logs[0].stats.model_usage["dsv4/small"].output_tokens == 24
