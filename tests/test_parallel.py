"""Failures caught here: a run of several processes that is not that of one (data parallel, expert parallel, context
parallel, all together; in every phase of the indexers); rows of documents whose windows, open groups or MTP targets
lie in another process, lost or misplaced; a checkpoint of four processes that two or one read as something else;
numbers of processes that do not come out and end in a traceback; matrices of which one process owns too many; a worker
that is killed and takes the run with it.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import parallel
import pytest
import torch
from together import ROOT, compare, documents, job, run

from dsv4.config import ModelConfig, preset_of
from dsv4.errors import UserError
from dsv4.model.head import IGNORE
from dsv4.train.batches import Batch
from dsv4.train.parallel.config import ParallelConfig
from dsv4.train.parallel.ownership import owners
from dsv4.train.parallel.processes import Processes
from dsv4.train.parallel.shares import share_of


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return documents(tmp_path_factory.mktemp("text") / "text.jsonl")


@pytest.fixture(scope="module")
def one(text: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The run of one process, with its folder."""
    out = tmp_path_factory.mktemp("one") / "run"
    return {"out": out, **parallel.work(job(text, out, "save.every=2", "save.keep=3", digests=[2]), Processes())}


@pytest.fixture(scope="module")
def four(text: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The run of four, all together: two read each row, two hold the experts."""
    out = tmp_path_factory.mktemp("four") / "run"
    wanted = job(text, out, "save.every=2", "save.keep=3", "parallel.cp=2", "parallel.ep=2", digests=[2])
    found = run(4, [wanted], out.parent)
    assert len({json.dumps(each["run"]["digests"]) for each in found}) == 1, "processes have come to other numbers"
    return {**found[0]["run"], "out": out, "held": [each["run"]["held"] for each in found]}


# --- one = two = four ------------------------------------------------------------------------------------------------


def test_four_processes_train_as_one(one: dict[str, Any], four: dict[str, Any]) -> None:
    """Rows cut in the middle of documents, experts elsewhere, weights in shares; dense, warm-up and sparse phase."""
    assert [record["phase"] for record in one["records"]] == ["dense", "warmup", "sparse"]
    compare(one["records"], four["records"])
    assert all(0.2 < held / one["held"] < 0.3 for held in four["held"]), "each process holds about a quarter"


def test_two_processes_train_as_one(text: Path, one: dict[str, Any], four: dict[str, Any], tmp_path: Path) -> None:
    """Each kind of parallelism by itself; a checkpoint of four processes, or of one, goes on in two; and where one of
    them is asked to stop, as by a signal, all stop after the same step, which is saved."""
    point = "checkpoints/step-000002"
    kinds = ["parallel.dp=2", "parallel.ep=2", "parallel.cp=2"]
    jobs = [job(text, tmp_path / kind, kind, "data.micro_batches=2") for kind in kinds]
    jobs.append(job(text, tmp_path / "of-four", "parallel.cp=2", resume=str(four["out"] / point)))
    jobs.append(job(text, tmp_path / "of-one", "parallel.ep=2", resume=str(one["out"] / point)))
    jobs.append(job(text, tmp_path / "stopped", "data.tokens_per_step=640", stop_after=1))
    found, other = run(2, jobs, tmp_path)
    for kind in kinds:
        compare(one["records"], found[kind]["records"])
    assert found["of-four"]["digests"]["2"] == four["digests"]["2"]
    assert found["of-one"]["digests"]["2"] == one["digests"][2]
    compare(one["records"][2:], found["of-four"]["records"])
    compare(one["records"][2:], found["of-one"]["records"])
    assert len(found["stopped"]["records"]) == len(other["stopped"]["records"]) == 1
    assert [path.name for path in (tmp_path / "stopped/checkpoints").glob("step-*")] == ["step-000001"]


def test_a_checkpoint_of_four_processes_goes_on_in_one(
    text: Path, one: dict[str, Any], four: dict[str, Any], tmp_path: Path
) -> None:
    point = four["out"] / "checkpoints/step-000002"
    found = parallel.work(job(text, tmp_path / "run", resume=str(point)), Processes())
    assert found["digests"][2] == four["digests"]["2"]
    compare(one["records"][2:], found["records"])


def test_a_checkpoint_of_four_processes_is_a_model(four: dict[str, Any]) -> None:
    """The whole weights stand beside the parts, in the published layout, and nothing there is pickled."""
    from dsv4 import load

    assert torch.isfinite(load(four["out"])(torch.arange(20))).all()
    kept = [path.suffix for path in (four["out"] / "checkpoints").rglob("*") if path.is_file()]
    assert set(kept) <= {".safetensors", ".json", ""}, kept


def test_a_damaged_part_is_named(text: Path, four: dict[str, Any], tmp_path: Path) -> None:
    import shutil

    point = tmp_path / "other/checkpoints/step-000002"
    shutil.copytree(four["out"] / "checkpoints/step-000002", point)
    part = sorted((point / "sharded").glob("*.safetensors"))[1]
    data = bytearray(part.read_bytes())
    data[-1] ^= 1
    part.write_bytes(data)
    with pytest.raises(UserError, match=f"{part.name} has changed"):
        parallel.work(job(text, tmp_path / "run", resume=str(point)), Processes())


# --- who reads what --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 2, 3, 7])
@pytest.mark.parametrize("parts", [1, 2, 5])
def test_shares_are_the_batch_each_token_once(rows: int, parts: int) -> None:
    lengths = [3, 1, 9, 2, 1, 6]
    ids, targets = torch.arange(1, 23), torch.arange(2, 24)
    targets[torch.tensor(lengths).cumsum(0) - 1] = IGNORE
    batch = Batch(ids, targets, lengths, 0, (0,) * len(lengths))
    every = [
        share_of(batch, row, rows, place, parts, lambda borders: None) for row in range(rows) for place in range(parts)
    ]
    told = [share.ids[share.segments.documents < share.segments.counted] for share in every]
    assert torch.equal(torch.cat(told), ids)
    for share in every:
        shard = share.segments
        assert len(share.ids) == sum(segment.length for segment in shard) >= 1
        assert (shard.ends == (share.targets == IGNORE)).all()
        inside = ~shard.ends & (shard.documents < shard.counted)
        assert torch.equal(shard.following[inside], share.targets[inside])
        after = [t for t in shard.targets_after[inside].tolist() if t != IGNORE]
        assert all(t - 2 in share.ids for t in after), "the MTP target of a token is the one after the next"
    counted = [n for s in every if s.segments.place == 0 for n in s.segments.row.lengths[: s.segments.counted]]
    assert counted == lengths


def test_a_matrix_goes_to_whoever_has_least_to_do() -> None:
    draw = random.Random(0)
    costs = [draw.randint(1, 100) for _ in range(200)]
    for count in (1, 2, 7, 64):
        loads = [0] * count
        for cost, owner in zip(costs, owners(costs, count), strict=True):
            loads[owner] += cost
        assert max(loads) <= sum(costs) / count + max(costs)
    assert owners([5, 5, 5], 8) == [0, 1, 2]


# --- numbers that do not come out ------------------------------------------------------------------------------------

V4 = ModelConfig.preset("tiny")


@pytest.mark.parametrize(
    ("parallel_", "world", "sentence"),
    [
        (ParallelConfig(cp=2), 3, r"3 processes cannot be cut into groups of parallel\.cp=2 x .*start a multiple of 2"),
        (ParallelConfig(cp=2, ep=2), 6, r"6 processes .* = 4: start a multiple of 4 \(torchrun --nproc-per-node 8\)"),
        (ParallelConfig(ep=4), 1, r"1 processes .*start a multiple of 4"),
        (ParallelConfig(dp=3), 2, r"parallel\.dp=3 .* which is 2: start 3, or leave parallel\.dp at 0"),
    ],
)
def test_numbers_of_processes_that_do_not_come_out(parallel_: ParallelConfig, world: int, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        parallel_.sizes(world)


@pytest.mark.parametrize(
    ("parallel_", "model", "sentence"),
    [
        (ParallelConfig(ep=3), V4, r"parallel\.ep=3 must divide model\.n_routed_experts=8: choose one of 1, 2, 4, 8"),
        (ParallelConfig(cp=0), V4, r"parallel\.cp=0 must be from 1"),
        (ParallelConfig(dp=-1), V4, r"parallel\.dp=-1 must be from 0"),
        (ParallelConfig(cp=2), preset_of("llama", "tiny"), r"parallel\.cp=2: only V4's own attention"),
        (ParallelConfig(cp=2), V4.with_(attention="dense"), r"parallel\.cp=2: only V4's own attention"),
        (ParallelConfig(ep=2), preset_of("llama", "tiny"), r"parallel\.ep=2: only V4's experts"),
    ],
)
def test_models_that_cannot_be_shared(parallel_: ParallelConfig, model: Any, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        parallel_.check(model)


def test_the_command_line_says_it_once_before_anything_is_made(tmp_path: Path) -> None:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "RANK": "0", "WORLD_SIZE": "3", "LOCAL_RANK": "0"}
    words = [sys.executable, "-m", "dsv4", "train", "--recipe", "tiny", "--out", str(tmp_path / "run"), "parallel.cp=2"]
    done = subprocess.run(words, env=env, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("dsv4: 3 processes cannot be cut") and done.stderr.count("\n") == 1, done.stderr
    assert not (tmp_path / "run").exists()


# --- torchrun --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_goes_on_when_a_worker_is_killed(text: Path, tmp_path: Path) -> None:
    """torchrun starts all of them again, and they resume: the log is that of the undisturbed run of one process."""
    settings = [
        "data.tokenizer=bytes", "data.seq_len=256", "data.tokens_per_step=512", "model.vocab_size=258",
        "schedule.steps=12", "schedule.warmup=2", "save.every=2", "save.eval_every=12", "save.eval_tokens=512",
    ]  # fmt: skip
    train = ["-m", "dsv4", "train", "--recipe", "tiny", "--data", str(text), "--resume", "auto", *settings]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    alone = subprocess.run([sys.executable, *train, "--out", str(tmp_path / "one")], env=env, timeout=600)
    assert alone.returncode == 0
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=2"]
    shared = subprocess.Popen([*launcher, *train, "--out", str(tmp_path / "two"), "parallel.cp=2"], env=env)
    try:
        log, end = tmp_path / "two/log.jsonl", time.monotonic() + 600
        while not log.exists() or len(log.read_text().splitlines()) < 5:
            assert shared.poll() is None and time.monotonic() < end, "the run did not come to its fifth step"
            time.sleep(0.05)
        children = Path(f"/proc/{shared.pid}/task/{shared.pid}/children").read_text().split()
        os.kill(int(children[-1]), signal.SIGKILL)
        assert shared.wait(timeout=600) == 0
    finally:
        if shared.poll() is None:
            shared.terminate()
            shared.wait()
    logs = [
        [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    ]
    compare(*logs, limit=1e-5)
