"""Failures caught here: a token that is lost or comes twice in a pass where the length of sequences changes on the way;
a step that cannot be asked for by its number; a long stage that gets what short ones have left of long documents; a
ramp of the batch size that changes the order of the tokens; a run that is resumed at or around a border and is not the
uninterrupted one; a log that does not say what is in force; an evaluation at another length than the last update's;
stages that cannot be and are not named; a recipe or plan that does not count all of its stages.
"""

import itertools
import json
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dsv4 import ModelConfig, UserError
from dsv4.cli.progress import training_progress
from dsv4.model.head import IGNORE
from dsv4.settings import merge
from dsv4.text import Tokenizer
from dsv4.train import plan as planning
from dsv4.train.batches import Batch, Batches
from dsv4.train.log import read_log, reproducible
from dsv4.train.mixture import Mixture
from dsv4.train.packed import Packed, prepare
from dsv4.train.recipes import RECIPES, resolve
from dsv4.train.runconfig import RunConfig
from dsv4.train.schedule import decay_steps, lr_scale
from dsv4.train.stages import Course, Stage
from dsv4.train.trainer import Trainer

WORDS = "the of and to in a is that for it as was with be by on not he his but at are this have from".split()


class Numbers(Tokenizer):
    """Reads "17 18" as the ids 17, 18, so that every token of a data set can have its own id."""

    bos_id, eos_id, vocab_size, exact_bytes = 0, 1, 1 << 17, True

    def encode_batch(self, texts: Sequence[str], *, special: bool = False) -> list[list[int]]:
        return [[int(word) for word in text.split()] for text in texts]

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        return " ".join(str(i) for i in ids if i > 1)

    @cached_property
    def token_table(self) -> list[bytes]:
        return [b"", b"", *(b"x" * (i % 5) for i in range(2, self.vocab_size))]

    def to_json(self) -> str:
        return '{"numbers": true}'


NUMBERS = Numbers()


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory):
    """lengths of documents -> a packed split in which no token but bos and eos occurs twice."""

    def packed(lengths: Sequence[int], first: int = 2) -> Packed:
        fresh = itertools.count(first)
        texts = [" ".join(str(next(fresh)) for _ in range(n)) for n in lengths]
        return prepare(texts, NUMBERS, tmp_path_factory.mktemp("packed"), split_name="train")

    return packed


def segments(batch: Batch) -> list[tuple[list[int], list[int]]]:
    return list(
        zip(*([p.tolist() for p in whole.split(batch.lengths)] for whole in (batch.ids, batch.targets)), strict=True)
    )


def check_targets(batch: Batch, packed: Packed) -> None:
    """Every segment is a run of one document, and every target the token after it there."""
    tokens = packed.tokens.tolist()
    after = {a: (IGNORE if b == 0 else b) for a, b in itertools.pairwise(tokens) if a > 1}
    for ids, targets in segments(batch):
        assert targets[:-1] == ids[1:] and all(i != 0 for i in ids[1:])
        assert ids[-1] == 0 or targets[-1] == (IGNORE if ids[-1] == 1 else after[ids[-1]])


courses = st.lists(
    st.tuples(st.integers(1, 6), st.integers(1, 30), st.integers(30, 70)), min_size=1, max_size=4
)  # steps since the stage before, seq_len, tokens_per_step


def stages_of(course: list[tuple[int, int, int]], first: tuple[int, int]) -> list[Stage]:
    found, start, before = [], 0, first
    for steps, *now in course:
        start += steps
        if tuple(now) != before:
            found.append(Stage(start, *now))
            before = tuple(now)
    return found


# --- batches ---------------------------------------------------------------------------------------------------------


@given(
    lengths=st.lists(st.integers(0, 60), min_size=1, max_size=12), course=courses, seed=st.integers(0, 2**64 - 1),
    seq_len=st.integers(1, 30),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_every_token_comes_once_in_each_pass_whatever_the_stages(pack, lengths, course, seed: int, seq_len: int):
    packed = pack(lengths)
    batches = Batches(packed, 40, seed, seq_len, stages=stages_of(course, (seq_len, 40)))
    size, made = packed.num_tokens, []
    while sum(len(b.ids) for b in made) < 3 * size or len(made) < 25:
        made.append(next(batches))
    for step, batch in enumerate(made):
        stage = batches.course.at(step)
        assert len(batch.ids) == stage.tokens_per_step == batches.num_tokens(step)
        assert max(batch.lengths) <= stage.seq_len
        check_targets(batch, packed)
    line = [i for batch in made for i in batch.ids.tolist()]
    every = Counter(packed.tokens.tolist())
    for n in range(len(line) // size):
        assert Counter(line[n * size : (n + 1) * size]) == every, f"pass {n}"
    again = Batches(packed, 40, seed, seq_len, stages=batches.course.stages[1:])
    for step in random.Random(seed).sample(range(len(made)), 8):
        found = again.batch(step)
        assert torch.equal(found.ids, made[step].ids) and torch.equal(found.targets, made[step].targets)
        assert (found.lengths, found.num_bytes) == (made[step].lengths, made[step].num_bytes)


@given(course=courses, seed=st.integers(0, 2**64 - 1), weights=st.lists(st.floats(0.1, 1), min_size=3, max_size=3))
@settings(max_examples=25, deadline=None)
def test_so_does_every_token_of_every_source_of_a_mixture(pack, course, seed: int, weights: list[float]):
    parts = [pack([30, 5, 17, 40], 2), pack([9] * 14, 1000), pack([3, 80], 5000)]
    mixture = Mixture("abc", weights, parts)
    batches = Batches(mixture, 40, seed, 8, stages=stages_of(course, (8, 40)))
    line = [i for batch in itertools.islice(batches, 40) for i in batch.ids.tolist()]
    for low, high, part, name in zip((2, 1000, 5000), (1000, 5000, 9000), parts, "abc", strict=True):
        seen = [i for i in line if low <= i < high]
        every = [i for i in part.tokens.tolist() if i > 1]
        counts = Counter(seen)
        passes = batches.epochs_at(40)[name]
        assert all(int(passes) <= counts[i] <= -(-passes // 1) for i in every)
        assert passes == pytest.approx(len(seen) / len(every), abs=3 * 80 / len(every))
    share = batches.epochs_at(40)["b"] * parts[1].num_tokens / len(line)
    assert abs(share - mixture.shares[1]) * len(line) <= 5 * 2 * 30 * 3, "a unit or two of each length from its share"


def test_long_sequences_get_documents_that_are_whole(pack):
    """Short pieces drawn from everywhere would leave holes in all long documents."""
    packed = pack([300] * 40)  # 302 tokens each
    half = 40 * 302 // 2 // 100
    batches = Batches(packed, 100, 3, 10, stages=[Stage(half, 302, 302)])
    after = [segments(batches.batch(half + n)) for n in range(40 * 302 // 2 // 302)]
    found = [ids for batch in after for ids, _ in batch]
    short = {i for n in range(half) for i in batches.batch(n).ids.tolist() if i > 1}
    assert not short & {i for ids in found for i in ids}
    # of 20 documents the border cuts one; those of the line that a batch's border cuts stand side by side
    begun = [ids for ids in found if ids[0] == 0]
    assert len(begun) >= 19 and len(found) <= 2 * len(begun) + 2
    early = {int(i - 2) // 300 for i in batches.batch(0).ids if i > 1}
    assert len(early) >= 8, "short pieces of one batch come from many documents"


def test_larger_steps_of_the_same_length_take_the_tokens_in_the_same_order(pack):
    packed = pack([30, 5, 17, 90, 2, 2, 41])
    ramp = [Stage(3, 0, 20), Stage(7, 0, 55)]
    batches = Batches(packed, 10, 5, 6, stages=ramp)
    line = [i for batch in itertools.islice(batches, 20) for i in batch.ids.tolist()]
    plain = [i for batch in itertools.islice(Batches(packed, 10, 5, 6), 200) for i in batch.ids.tolist()]
    assert line == plain[: len(line)] and len(line) == 3 * 10 + 4 * 20 + 13 * 55
    assert [batches.course.tokens(n) for n in (0, 3, 4, 7, 8)] == [0, 30, 50, 110, 165]


def test_the_order_of_a_staged_line_stays_what_it_is(pack):
    """A change here would make every resumed run another run."""
    packed = pack([4] * 6)  # six documents of 6 tokens
    batches = Batches(packed, 6, 0, 3, stages=[Stage(3, 6, 0)])
    drawn = [[[i for i in ids if i > 1] for ids, _ in segments(batches.batch(n))] for n in (0, 1, 2, 3, 4, 5)]
    assert drawn == DRAWN


DRAWN = [
    [[24, 25], [20, 21]], [[22, 23], [12, 13]], [[18, 19], [10, 11]], [[14, 15, 16, 17]], [[6, 7, 8, 9]], [[2, 3, 4, 5]]
]  # fmt: skip


def test_batches_go_on_only_with_the_same_stages(pack):
    packed = pack([30, 5])
    staged, plain = Batches(packed, 10, 1, 5, stages=[Stage(2, 7)]), Batches(packed, 10, 1, 5)
    state = json.loads(json.dumps(staged.state_dict()))
    Batches(packed, 10, 1, 5, stages=[Stage(2, 7)]).load_state_dict(state)
    for other in (plain, Batches(packed, 10, 1, 5, stages=[Stage(3, 7)])):
        with pytest.raises(UserError, match="the run to resume has stages"):
            other.load_state_dict(state)
    with pytest.raises(UserError, match="the run to resume has stages None"):
        staged.load_state_dict(plain.state_dict())


def test_a_course_by_hand():
    course = Course(4, 8, [Stage(10, 16), Stage(15, 0, 64)])
    assert course.stages == [Stage(0, 4, 8), Stage(10, 16, 8), Stage(15, 16, 64)]
    assert [course.number(n) for n in (0, 9, 10, 14, 15, 1000)] == [0, 0, 1, 1, 2, 2]
    assert [course.tokens(n) for n in (0, 10, 15, 17)] == [0, 80, 120, 248]


# --- runs ------------------------------------------------------------------------------------------------------------

STAGES = [
    {"start": 2, "tokens_per_step": 320},
    {"start": 4, "seq_len": 150},
    {"start": 6, "seq_len": 400, "tokens_per_step": 400},
]
STEPS = 8


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = random.Random(0)
    lines = [json.dumps({"text": " ".join(rng.choices(WORDS, k=rng.randrange(1, 160)))}) for _ in range(20)]
    folder = tmp_path_factory.mktemp("text")
    (folder / "a.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="module")
def whole(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    """The uninterrupted run."""
    run = Trainer(config_for(text), tmp_path_factory.mktemp("whole") / "run")
    assert run.run()
    return run


def config_for(text: Path, **changes: Any) -> RunConfig:
    model = ModelConfig.preset(
        "tiny", vocab_size=258, num_hidden_layers=3, compress_ratios=(0, 4, 128, 0), hidden_size=32, index_topk=8,
        sliding_window=32,
    )  # fmt: skip
    given: dict[str, Any] = {
        "data": {"path": str(text), "tokenizer": "bytes", "seq_len": 40, "tokens_per_step": 160, "stages": STAGES},
        "schedule": {"steps": STEPS, "warmup": 1},
        "indexer": {"train": True, "from_stage": 2, "warmup": 1},
        "save": {"every": 100, "eval_every": 2, "eval_tokens": 800, "keep": 3},
    }
    return merge(merge(replace(RECIPES["tiny"](), model=model), given), changes)


def everything(run: Trainer) -> dict[str, Tensor]:
    return {**run.model.state_dict(), **{f"opt.{k}": v for k, v in run.optimizer.state_dict().items()}}


def test_the_log_says_what_is_in_force(
    text: Path, whole: Trainer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = [r for r in read_log(whole.folder.log) if "loss" in r]
    said = [(r["stage"], r["seq_len"], r["tokens_per_step"], r["phase"]) for r in records]
    assert said == [
        (0, 40, 160, "dense"), (0, 40, 160, "dense"), (1, 40, 320, "dense"), (1, 40, 320, "dense"),
        (2, 150, 320, "warmup"), (2, 150, 320, "sparse"), (3, 400, 400, "sparse"), (3, 400, 400, "sparse"),
    ]  # fmt: skip
    assert [r["tokens"] for r in records] == [160, 320, 640, 960, 1280, 1600, 2000, 2400]
    s = whole.config.schedule
    course = [0, 1, 2, 3, None, 4, 5, 6]  # updates that the trunk has had: its course stands still in the warm-up
    decay = decay_steps(STEPS - 1, s.decay_fraction)
    rates = [1e-3 if n is None else 4e-3 * lr_scale(n, STEPS - 1, s.warmup, decay, s.final) for n in course]
    assert [r["lr"] for r in records] == rates
    with training_progress(0, STEPS) as report:
        report(records[-1])
    assert "length 400" in capsys.readouterr().err
    plain = Trainer(config_for(text, data={"stages": []}, indexer={"from_stage": 0}), tmp_path / "plain").step()
    assert not {"stage", "seq_len", "tokens_per_step"} & plain.keys()


@pytest.mark.parametrize("at", range(1, STEPS))
def test_resume_at_and_around_every_border_is_no_interruption(
    text: Path, whole: Trainer, tmp_path: Path, at: int
) -> None:
    parts = Trainer(config_for(text), tmp_path / "parts")
    for _ in range(at):
        record = parts.step()
        if parts.progress.step % 2 == 0:
            record |= {"heldout_bpb": parts.evaluate()} | parts.look_inside()
        parts.log.write(record)
    parts.save()
    parts.close()
    resumed = Trainer(resolve("small", tmp_path / "parts/config.yaml"), tmp_path / "parts", resume="auto")
    assert resumed.progress.step == at and resumed.run()
    ours, theirs = everything(resumed), everything(whole)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)
    logs = [[reproducible(r) for r in read_log(run.folder.log)] for run in (whole, resumed)]
    assert logs[0] == logs[1]


def test_an_evaluation_has_the_length_of_the_last_update(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import dsv4.train.trainer as trainer

    run, seen, heldout = Trainer(config_for(text), tmp_path / "run"), [], trainer.heldout_batches

    def noted(*args: Any, **kwargs: Any) -> Any:
        seen.append(args[1:3])
        return heldout(*args, **kwargs)

    monkeypatch.setattr(trainer, "heldout_batches", noted)
    for _ in range(STEPS):
        run.evaluate()
        run.look_inside()
        run.step()
    evaluated = [(160, 40)] * 3 + [(320, 40)] * 2 + [(320, 150)] * 2 + [(400, 400)]
    assert seen[::2] == evaluated and [n for _, n in seen[1::2]] == [n for _, n in evaluated]


def test_a_run_does_not_go_on_with_other_stages(text: Path, tmp_path: Path) -> None:
    Trainer(config_for(text), tmp_path / "run").save()
    for stages in (STAGES[:2], [{**STAGES[0], "start": 1}, *STAGES[1:]]):
        with pytest.raises(UserError, match=r"was started with data\.stages="):
            Trainer(config_for(text, data={"stages": stages}), tmp_path / "run", resume="auto")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stages": [{"start": 0, "seq_len": 8}]}, r"data\.stages\[0\]\.start=0 must be at least 1"),
        ({"stages": [{"start": 4, "seq_len": 8}, {"start": 4, "seq_len": 16}]}, r"stages\[1\]\.start=4 must come"),
        ({"stages": [{"start": 8, "seq_len": 8}]}, r"stages\[0\]\.start=8 is not reached in the 8 steps"),
        ({"stages": [{"start": 2, "seq_len": 40}]}, r"stages\[0\] changes nothing \(seq_len=40, tokens_per_step=160"),
        ({"stages": [{"start": 2, "seq_len": 161}]}, r"tokens_per_step=160, which no sequence of seq_len=161 fits"),
        ({"stages": [{"start": 2, "seq_len": 10**7, "tokens_per_step": 10**7}]}, r"\.seq_len=10000000 exceeds"),
        ({"stages": [{"start": 2, "tokens_per_step": 41}], "micro_batches": 50}, r"at most data\.stages\[0\]\.tokens"),
        ({"stages": [{"start": 2, "seqlen": 8}]}, r"unknown .*'data\.stages\[0\]\.seqlen'; did you mean 'seq_len'"),
        ({"stages": [{"seq_len": 8}]}, r"data\.stages\[0\] lacks its start"),
        ({"stages": [{"start": 2, "seq_len": 1.5}]}, r"data\.stages\[0\]\.seq_len=1\.5 must be a whole number"),
        ({"stages": [{"start": True, "seq_len": 8}]}, r"data\.stages\[0\]\.start=True must be a whole number"),
        ({"stages": [{"start": -1, "seq_len": 8}]}, r"data\.stages\[0\]\.start=-1 must be a whole number"),
        ({"stages": [4096]}, r"data\.stages\[0\]=4096 must be a group such as"),
        ({"packing": "whole"}, r"data\.stages and packing=whole \(data\.packing\) do not go together"),
        ({"format": "chat", "tokenizer": "bpe"}, r"data\.stages and packing=whole \(which chat has\)"),
    ],
)  # fmt: skip
def test_stages_that_cannot_be_are_one_sentence(text: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        config_for(text, data=changes, indexer={"train": False, "from_stage": 0, "warmup": 0})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"from_stage": 4}, r"indexer\.from_stage=4 must be the number of one of the 3 data\.stages"),
        ({"from_stage": -1}, r"indexer\.from_stage=-1 must be"),
        ({"dense": 3}, r"indexer\.dense=3 and indexer\.from_stage=2 both say"),
        ({"from_stage": 3, "warmup": 3}, r"from_stage=3 \(step 6\) \+ indexer\.warmup=3 must leave the 8 steps"),
        ({"train": False}, r"indexer\.from_stage=2 and .* add indexer\.train=true"),
    ],
)
def test_phases_tied_to_a_stage_that_is_not_there(text: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        config_for(text, indexer=changes)


# --- the recipe ------------------------------------------------------------------------------------------------------


def test_the_recipe_goes_through_all_its_lengths(tmp_path: Path) -> None:
    """1 : 4 : 16 : 64, as 4K, 16K, 64K are 1 : 4 : 16; a step of each stage, on documents longer than the longest."""
    long = tmp_path / "long.jsonl"
    long.write_text(
        "\n".join(json.dumps({"text": " ".join(random.Random(n).choices(WORDS, k=9000))}) for n in range(4))
    )
    config = resolve("curriculum")
    assert config.indexer.from_stage == 3 and config.dense_steps == config.data.stages[2].start
    lengths = [s.seq_len for s in config.data.course.stages]
    assert [n // lengths[0] for n in lengths] == [1, 1, 4, 16, 64]
    short = [{**vars(stage), "start": n + 1} for n, stage in enumerate(config.data.stages)]
    overrides = [
        f"data.path={long}", f"data.stages={json.dumps(short)}", "schedule.steps=5", "schedule.warmup=1",
        "indexer.warmup=1", "save.eval_every=100", "save.eval_tokens=300",
    ]  # fmt: skip
    run = Trainer(resolve("curriculum", None, overrides), tmp_path / "run")
    assert run.run()
    records = [r for r in read_log(tmp_path / "run/log.jsonl") if "loss" in r]
    assert [r["seq_len"] for r in records] == [64, 64, 256, 1024, 4096]
    assert [r["phase"] for r in records] == ["dense"] * 3 + ["warmup", "sparse"]
    assert [r["tokens_per_step"] for r in records] == [512, 1024, 2048, 2048, 8192]
    assert max(run.batches.batch(4).lengths) == 4096, "no document was as long as the longest"


def test_a_plan_counts_every_stage(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_for(text)
    found = planning.plan(config)
    assert [s["tokens"] for s in found["stages"]] == [320, 640, 640, 800] and found["tokens"] == 2400
    assert found["days"] == pytest.approx(sum(s["seconds_per_step"] * s["steps"] for s in found["stages"]) / 86400)
    assert found["tokens_per_step"] == 400 and found["memory_per_rank"]["activations, at least"] == (
        planning.activation_bytes(config, 400)
    )
    said = "\n".join(planning.lines(found))
    assert "from step 4 on, sequences of 150:" in said and "for 2,400 tokens" in said
    small = merge(config, {"data": {"stages": []}, "indexer": {"from_stage": 0}})
    rows = planning.parameter_rows(planning.meta_model(config.model), config.model)
    needs = sum(planning.state_bytes(rows).values()) + planning.activation_bytes(replace(config, recompute=True), 200)
    monkeypatch.setattr(planning, "machine_bytes", lambda device: needs)
    planning.check_memory(small, torch.device("cpu"))
    with pytest.raises(UserError, match="at least"):
        planning.check_memory(config, torch.device("cpu"))
