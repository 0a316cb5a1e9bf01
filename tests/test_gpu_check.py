"""Failures caught here: a check that a wrong op passes, that needs more than torch, that loses what it found when it is
stopped, that hides what it left out, or that speaks about a GPU where there is none.

The whole script runs in a dry run on the CPU with the smallest sizes; nothing here says how fast anything is.
"""

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_imports import ONLY_TORCH, ROOT
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dsv4 import ops
from dsv4.bench import gpu_check, peers, report, speed
from dsv4.cache import Pool
from dsv4.config import ModelConfig
from dsv4.cost import flops_by_component, flops_per_token
from dsv4.measure import clock, parity, rows, sizes, subjects, whole
from dsv4.measure.cases import SINGLE, cases
from dsv4.model import Segment, Transformer
from dsv4.model.segments import plan
from dsv4.ops import blocked, reference
from dsv4.ops.blocked import blocks

SMALLEST = replace(
    sizes.DRY, documents=(140, 9), stream=48, prefill=(16, 40), decode_after=(20,), decode_batches=(1, 2),
    decode_steps=2, train=(2, 24), matmul=32, copy_bytes=1 << 12,
)  # fmt: skip
PARITY = {
    "name", "dtype", "max_abs", "max_rel", "rms_rel", "typical_rel", "measure", "tolerance", "passed", "error"
}  # fmt: skip
SPEED = {
    "who", "preset", "what", "context", "batch", "dtype", "tokens_per_call", "seconds", "fastest", "slowest", "repeats",
    "tokens_per_second", "tflops", "share_of_matmul", "share_of_copy", "peak_bytes", "times_transformers",
}  # fmt: skip


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Models run the forms that a GPU has; single ops are compared in the C++ form as well."""
    monkeypatch.setenv("DSV4_OPS", "blocked")
    with ops.using("blocked"):
        yield


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "DRY", SMALLEST)
    monkeypatch.setattr(clock, "MOST", 3)


@pytest.fixture
def ops_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subjects, "MODELS", {})


def check(out: Path, *options: str) -> tuple[int, dict]:
    code = gpu_check.main(["--dry", "--out", str(out), *options])
    return code, json.loads(out.read_text(encoding="utf-8"))


def test_a_dry_run_fills_the_report(small, tmp_path, capsys):
    code, found = check(tmp_path / "deep" / "gpu.json")
    assert code == 0 and found["passed"] and found["finished"] and found["dry"]
    assert found["failed"] == [] and found["skipped"] == []
    assert found["torch"] == torch.__version__ and found["device"]["type"] == "cpu" and found["elapsed_seconds"] > 0
    assert all(set(row) == PARITY and row["passed"] for row in found["parity"])
    for dtype in ("float32", "bfloat16"):
        names = [row["name"] for row in found["parity"] if row["dtype"] == dtype]
        assert len(names) == len(set(names))
        compared = {name.split(" ")[0].rstrip(",") for name in names}
        assert compared >= {case.op for case in cases() if case.low and not case.fp32_only} | {"tiny", "csa"}
    assert [row["unit"] for row in found["ceilings"]] == ["TFLOP/s", "TFLOP/s", "GB/s"]
    assert all(row["value"] > 0 for row in found["ceilings"])
    assert all(set(row) - {"rms_rel_to_dsv4"} == SPEED for row in found["speed"])
    rows = {(row["who"], row["what"], row["context"], row["batch"]): row for row in found["speed"]}
    work = [("prefill", 16, 1), ("prefill", 40, 1), ("decode", 20, 1), ("decode", 20, 2), ("forward+backward", 24, 2)]
    assert set(rows) == {(who, *w) for who in ("dsv4", "transformers") for w in work} | {("dsv4", "train", 24, 2)}
    for (who, what, _, _), row in rows.items():
        assert row["repeats"] >= 3 and row["fastest"] <= row["seconds"] <= row["slowest"]
        assert row["share_of_matmul"] > 0 and (row["share_of_copy"] is not None) == (what == "decode")
        if who == "transformers":
            assert row["rms_rel_to_dsv4"] < 1e-4, "the peer computes something else"
        elif what != "train":
            theirs = rows["transformers", what, row["context"], row["batch"]]["tokens_per_second"]
            assert row["times_transformers"] == pytest.approx(row["tokens_per_second"] / theirs)
    shown = capsys.readouterr().out
    assert "x transformers" in shown and "sparse_attention (gather)" in shown and "0 pieces of work skipped" in shown


# --- it finds what is wrong -----------------------------------------------------------------------------------------


def test_every_op_of_the_table_is_tried():
    assert {case.op for case in cases()} == set(ops.TABLE) | set(SINGLE)
    assert len({case.name for case in cases()}) == len(cases())


@pytest.mark.parametrize("name", sorted(name for name, forms in ops.TABLE.items() if "blocked" in forms))
def test_a_broken_op_fails_the_check(name, ops_only, small, tmp_path, monkeypatch, capsys):
    """By 3 percent in one number of its first output, or a choice off by one."""
    right = ops.TABLE[name]["blocked"]

    def wrong(*args):
        out = right(*args)
        first = (out if isinstance(out, torch.Tensor) else out[0]).detach().clone()
        flat = first.view(-1)
        place = flat.abs().argmax()
        flat[place] = flat[place] + 1 if first.dtype == torch.int64 else flat[place] * 1.03
        shift = first - (out if isinstance(out, torch.Tensor) else out[0]).detach()
        return out + shift if isinstance(out, torch.Tensor) else (out[0] + shift, *out[1:])

    monkeypatch.setitem(ops.TABLE[name], "blocked", wrong)
    code, found = check(tmp_path / "gpu.json", "--only", "parity")
    failed = {row["name"].split(" ")[0].rstrip(",") for row in found["parity"] if not row["passed"]}
    assert code == 1 and failed == {name} and not found["passed"] and found["finished"]
    assert f"FAILED: {name}" in capsys.readouterr().out


def test_a_wrong_gradient_fails_the_check(ops_only, small, tmp_path, monkeypatch):
    def wrong(x, *rest):
        return reference.hyper_write(x.detach() + 0.97 * (x - x.detach()), *rest)

    monkeypatch.setitem(ops.TABLE["hyper_write"], "blocked", wrong)
    code, found = check(tmp_path / "gpu.json", "--only", "parity")
    assert code == 1
    assert {r["name"] for r in found["parity"] if not r["passed"]} == {"hyper_write, blocked: gradients"}


def test_an_op_that_raises_or_gives_nonsense_fails_the_check(ops_only, small, tmp_path, monkeypatch):
    def raises(*args):
        raise RuntimeError("no kernel\nfor this device")

    monkeypatch.setitem(ops.TABLE["experts"], "blocked", raises)
    monkeypatch.setitem(ops.TABLE["sinkhorn"], "blocked", lambda logits, *rest: logits * float("nan"))
    code, found = check(tmp_path / "gpu.json", "--only", "parity")
    broken = {row["name"]: row["error"] for row in found["parity"] if not row["passed"]}
    assert code == 1 and broken["experts"] == "RuntimeError: no kernel"
    assert "not finite" in broken["sinkhorn, blocked: values"] and set(broken) >= {"experts"}
    assert all(name.startswith(("experts", "sinkhorn")) for name in broken)


def test_an_op_that_is_wrong_only_in_models_fails_the_check(small, tmp_path, monkeypatch):
    """The single ops are left out here, so it is the whole model that shows it."""

    def wrong(q, *rest):
        return blocked.sparse_attention(q * 1.01, *rest)

    monkeypatch.setattr(gpu_check, "cases", lambda: [])
    monkeypatch.setattr(gpu_check, "DTYPES", (torch.float32,))
    monkeypatch.setattr(subjects, "MODELS", {"tiny": subjects.MODELS["tiny"]})
    monkeypatch.setattr(whole, "CHUNKS", ())
    monkeypatch.setitem(ops.TABLE["sparse_attention"], "blocked", wrong)
    code, found = check(tmp_path / "gpu.json", "--only", "parity")
    failed = [row["name"] for row in found["parity"] if not row["passed"]]
    assert code == 1 and "tiny model: logits" in failed and any("gradient of" in name for name in failed)


def test_work_of_ours_that_raises_fails_the_check(small, tmp_path, monkeypatch):
    def raises(model, length):
        raise RuntimeError("device-side assert")

    monkeypatch.setattr(speed, "prefill_once", raises)
    code, found = check(tmp_path / "gpu.json", "--only", "ceilings,speed")
    assert code == 1 and {"what": "tiny prefill of 16", "why": "RuntimeError: device-side assert"} in found["failed"]
    assert [row["what"] for row in found["speed"]] == ["forward+backward", "train"], "the rest goes on"


def test_both_ways_to_read_chosen_entries_are_tried(monkeypatch):
    seen: set[bool] = set()

    class Spy(blocks.Piece):
        def __init__(self, keys, hidden, rows):
            super().__init__(keys, hidden, rows)
            seen.add(isinstance(rows, torch.Tensor))

    monkeypatch.setattr(blocks, "Piece", Spy)
    for label, gathers in (("dense", {False}), ("gather", {False, True})):
        seen.clear()
        case = next(c for c in cases() if c.label == label)
        list(parity.op_rows(case, torch.device("cpu"), torch.float32))
        assert seen == gathers
    seen.clear()
    with torch.no_grad():
        model = subjects.MODELS["csa"]()
        model(subjects.tokens(model, SMALLEST.documents[0]))
    assert True in seen


def test_no_choice_of_the_models_hangs_on_a_rounding(monkeypatch):
    """The smallest gap between what is chosen and the runner-up, of experts and of entries, over the scores' spread."""
    gaps: list[float] = []

    def note(scores: torch.Tensor, k: int, spread: float) -> None:
        ordered = scores.sort(dim=1, descending=True).values
        gap = (ordered[:, k - 1] - ordered[:, k]) / spread
        gaps.append(gap[ordered[:, k].isfinite() & (gap > 0)].min().item())  # exact ties are decided by the rule

    def gate(x, weight, bias, chosen, k, scale):
        out = reference.gate(x, weight, bias, chosen, k, scale)
        if chosen is None:
            scores = out[0] + bias
            note(scores, k, scores.std().item())
        return out

    def entries(q, weights, keys, visible, k):
        scores = reference.index_scores(q, weights, keys)
        spread = scores.std().item()
        hidden = visible.hidden(0, len(q), 0, len(keys), q.device)
        note(scores.masked_fill(hidden, float("-inf")), k, spread)
        return reference.index_scores_topk(q, weights, keys, visible, k)

    monkeypatch.setitem(ops.TABLE["gate"], "blocked", gate)
    monkeypatch.setitem(ops.TABLE["index_scores_topk"], "blocked", entries)
    for make in subjects.MODELS.values():
        model = make()
        for lengths in (sizes.FULL.documents, (sizes.FULL.stream,)):
            with torch.no_grad():
                model(subjects.tokens(model, sum(lengths)), segments=lengths)
    assert len(gaps) > 10 and min(gaps) > 1e-4


# --- it says what it left out, and keeps what it has ----------------------------------------------------------------


def test_what_does_not_fit_the_budget_is_skipped_and_said(small, tmp_path, capsys):
    code, found = check(tmp_path / "gpu.json", "--minutes", "1e-6")
    assert code == 0 and found["parity"] == found["speed"] == found["ceilings"] == []
    skipped = [row["what"] for row in found["skipped"]]
    assert len(skipped) == 2 * (len(cases()) + 2) + 3 and "csa model in bfloat16" in skipped
    assert all("of the budget are left" in row["why"] for row in found["skipped"])
    assert f"{len(skipped)} pieces of work skipped" in capsys.readouterr().out


def test_a_stage_that_was_not_asked_for_is_listed(small, tmp_path):
    code, found = check(tmp_path / "gpu.json", "--only", "ceilings")
    assert code == 0 and len(found["ceilings"]) == 3
    assert [row["what"] for row in found["skipped"]] == ["parity", "speed", "peers"]


def test_a_stopped_run_leaves_what_it_has(small, tmp_path, monkeypatch, capsys):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(speed, "prefill_once", interrupted)
    code, found = check(tmp_path / "gpu.json", "--only", "ceilings,speed")
    assert code == 1 and len(found["ceilings"]) == 3 and not found["finished"] and found["passed"] is None
    assert str(tmp_path / "gpu.json") in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["gpu.json"], "no temporary file is left"


def test_a_peer_that_cannot_be_loaded_is_a_reason_not_a_failure(small, tmp_path, monkeypatch):
    def missing():
        raise clock.Skip("no such architecture")

    monkeypatch.setattr(peers, "installed", missing)
    code, found = check(tmp_path / "gpu.json", "--only", "peers")
    assert code == 0 and {"what": "transformers", "why": "no such architecture"} in found["skipped"]
    assert found["transformers"] is None and found["speed"] == []


def test_numbers_that_json_lacks_become_null(tmp_path):
    found = report.Report(tmp_path / "r.json", {})
    found.add("skipped", {"what": "x", "why": "y", "number": float("inf"), "more": [float("nan"), 1.0]})
    assert json.loads((tmp_path / "r.json").read_text())["skipped"][0]["number"] is None


# --- where and how it runs ------------------------------------------------------------------------------------------


def test_no_gpu_is_one_sentence(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.chdir(tmp_path)
    assert gpu_check.main([]) == 2
    shown = capsys.readouterr()
    assert "no CUDA device" in shown.err and "--dry" in shown.err and shown.err.count("\n") == 1
    assert not shown.out and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "code", "says"),
    [
        (["--only", "speed,party"], 2, "'party'"),
        (["--minutes", "0"], 2, "--minutes 0.0 must be positive"),
        (["--out", "file/gpu.json"], 1, "cannot make the folder file"),  # the machine's refusal, not wrong use
    ],
)
def test_wrong_use_is_one_sentence(options, code, says, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.chdir(tmp_path)
    assert gpu_check.main(["--dry", *options]) == code
    shown = capsys.readouterr().err
    assert says in shown and shown.count("\n") == 1


ONE_PASS = """
from dataclasses import replace
import dsv4.bench.gpu_check as check
from dsv4.measure import subjects
subjects.MODELS = {}
check.DRY = replace(
    check.DRY, prefill=(16,), decode_after=(16,), decode_batches=(1,), train=(1, 24), matmul=32, copy_bytes=4096
)
raise SystemExit(check.main(["--dry", "--out", OUT]))
"""


def test_it_runs_with_torch_alone(tmp_path):
    """Imports and everything behind them, the optimiser included, in an interpreter that finds nothing else."""
    out = tmp_path / "gpu.json"
    # torch.optim brings the compiler along, which looks for packages of its own
    script = "import torch._dynamo\n" + ONLY_TORCH + ONE_PASS.replace("OUT", repr(str(out)))
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr or result.stdout
    found = json.loads(out.read_text(encoding="utf-8"))
    assert found["passed"] and [row["what"] for row in found["speed"]] == [
        "prefill", "decode", "forward+backward", "train",
    ]  # fmt: skip
    assert [row["what"] for row in found["skipped"]] == ["transformers"]
    assert "not installed" in found["skipped"][0]["why"]


# --- what a device asks of the model ------------------------------------------------------------------------------


def test_fp32_weights_compute_in_the_dtype_of_the_model():
    """As in training on a GPU: with fp32 weights it is `dtype` that makes the activations bf16."""
    model = Transformer(ModelConfig.preset("tiny"))
    model.compute_dtype = torch.bfloat16
    ids = subjects.tokens(model, 20)
    trunk = model.trunk(ids, [Segment(20)])
    hidden, _, _ = model.predict_next(trunk, ids)
    assert trunk.streams.dtype == trunk.hidden.dtype == hidden.dtype == torch.bfloat16
    trunk.hidden.float().sum().backward()
    assert model.embed.weight.grad is not None and model.embed.weight.grad.dtype == torch.float32


def test_a_run_is_planned_on_the_host_whatever_the_default_device():
    config, memory = ModelConfig.preset("tiny"), Pool(ModelConfig.preset("tiny")).new()
    with torch.device("meta"):  # stands for any device that is not the CPU
        run = plan(config, [Segment(9), Segment(150), Segment(7, memory)], torch.device("cpu"))
    assert run.positions.device.type == "cpu" and run.positions.tolist() == [*range(9), *range(150), *range(7)]


class Counts:
    """What stands for `bincount`: the number of rows of each expert is the one thing that a layer waits for."""

    def __init__(self, chosen: torch.Tensor, minlength: int):
        each, self.device = chosen.numel() // minlength, chosen.device
        self.counts = [*[each] * (minlength - 1), chosen.numel() - each * (minlength - 1)]

    def tolist(self) -> list[int]:
        return self.counts


class OneDevice(TorchDispatchMode):
    """Raises when an op other than a copy gets tensors of two devices."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        devices = {t.device.type for t in tensors if t.ndim}
        assert len(devices) < 2 or "copy" in str(func), f"{func} mixes {devices}"
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_waits_for_the_device_or_mixes_devices(dtype, monkeypatch):
    """The meta device stands for a GPU: it has no numbers, so asking for one raises."""
    monkeypatch.setattr(torch, "bincount", Counts)
    with torch.device("meta"):
        model = Transformer(subjects.MODELS["csa"]().config, dtype)
    ids = torch.zeros(400, dtype=torch.int64)
    with OneDevice():
        trunk = model.trunk(ids, [Segment(300), Segment(100)])
        loss = ops.cross_entropy(trunk.hidden, model.head.weight, ids.to("meta"))
        loss.backward()
        with torch.no_grad():
            first, second = model.new_cache(2)
            model(ids[:300], segments=[(300, first)])
            logits = model(ids[:7], segments=[(1, first), (4, second), 2], rows="last")
            assert logits.shape == (3, model.config.vocab_size)
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    assert len(grads) > 100 and all(grad.is_meta for grad in grads)


def test_the_watch_sees_mixed_devices():
    here, there = torch.ones(3, 3), torch.ones(3, 3, device="meta")
    rows = torch.zeros(3, 1, dtype=torch.int64)
    for mix in (
        lambda: here @ there,
        lambda: there.gather(1, rows),
        lambda: there[rows],
        lambda: here[rows.to("meta")],
    ):
        with OneDevice(), pytest.raises(AssertionError, match="mixes"):
            mix()


# --- what the numbers mean ------------------------------------------------------------------------------------------


def test_differences_by_hand():
    want = torch.tensor([[3.0, 4.0], [0.0, 10.0], [6.0, 8.0]])
    got = want + torch.tensor([[0.3, 0.4], [0.0, 1.0], [0.0, 0.0]])
    assert rows.difference(got, want) == pytest.approx({
        "max_abs": 1.0, "max_rel": 0.1, "rms_rel": (0.25 + 1.0) ** 0.5 / 225**0.5, "typical_rel": 0.1,
    })  # fmt: skip
    for wrong in (want[:2], want * float("nan"), want * float("inf")):
        assert set(rows.difference(wrong, want).values()) == {float("inf")}
    assert rows.difference(torch.full((4,), 2.0), torch.zeros(4))["rms_rel"] == 2.0


@pytest.mark.parametrize("length", [64, 1000])
def test_flops_of_work_follow_the_count_per_token(length):
    """A prompt and a training document are sums over their positions; the indexer has no backward pass."""
    config = ModelConfig.preset("tiny")
    parts = [flops_by_component(config, t + 1) for t in range(length)]
    total = sum(sum(p.values()) for p in parts)
    indexer = sum(f for p in parts for name, f in p.items() if name.startswith("indexer"))
    assert speed._flops(config, "forward+backward", length) == pytest.approx((3 * total - 2 * indexer) / length)
    assert speed._flops(config, "prefill", length) == pytest.approx((total - (length - 1) * parts[0]["head"]) / length)
    assert speed._flops(config, "decode", length) == flops_per_token(config, length)


def test_a_measurement_is_a_median_of_several_or_nothing():
    cpu, calls = torch.device("cpu"), []
    timing = clock.timed(lambda: calls.append(1), cpu, clock.Budget(1))
    assert timing.repeats >= 3 and len(calls) > timing.repeats, "a warm-up is not counted"
    with pytest.raises(clock.Skip, match="of the budget are left"):
        clock.timed(lambda: None, cpu, clock.Budget(-1))
