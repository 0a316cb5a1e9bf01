"""Failures caught here: a source of a mixture that has another share of the tokens than its weight says; a step of a
mixture that cannot be asked for again, or loses or repeats tokens of a source; a resumed mixture that is another one;
weights, names or paths that are wrong and are not named; held-out text of a source that is trained on.
"""

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv4.errors import UserError
from dsv4.settings import read_yaml, write_yaml
from dsv4.text import ByteTokenizer
from dsv4.train.batches import Batches
from dsv4.train.dataconfig import DataConfig, Source
from dsv4.train.log import read_log
from dsv4.train.mixture import PERIOD, Mixture, Shares
from dsv4.train.packed import Packed, prepare
from dsv4.train.recipes import resolve
from dsv4.train.runconfig import RunConfig
from dsv4.train.rundata import prepare_data
from dsv4.train.trainer import Trainer

weights = st.lists(st.floats(0.01, 1.0), min_size=2, max_size=6)


@given(weights=weights, unit=st.integers(1, 50), positions=st.lists(st.integers(0, 10**9), min_size=1, max_size=8))
def test_every_place_of_the_line_has_each_source_as_often_as_its_weight_says(weights, unit: int, positions: list[int]):
    shares = [w / sum(weights) for w in weights]
    line = Shares(shares, unit)
    assert int(line.counts.sum()) == PERIOD
    assert np.abs(line.counts / PERIOD - shares).max() <= 1 / PERIOD
    for position in positions:
        taken = line.taken(position)
        assert sum(taken) == position
        for found, count in zip(taken, line.counts.tolist(), strict=True):
            assert abs(found - position * count / PERIOD) <= 2 * unit * len(weights)
        later = line.taken(position + unit)
        assert all(a <= b for a, b in zip(taken, later, strict=True))


def packed_of(folder: Path, letter: str, lengths: list[int]) -> Packed:
    return prepare([letter * n for n in lengths], ByteTokenizer(), folder, split_name=f"train.{letter}")


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[Packed]:
    """Three sources, each of a letter of its own."""
    folder = tmp_path_factory.mktemp("mixture")
    return [packed_of(folder, "a", [30, 5, 17, 40]), packed_of(folder, "b", [9] * 30), packed_of(folder, "c", [3, 300])]


@given(weights=st.lists(st.floats(0.05, 1.0), min_size=3, max_size=3), seed=st.integers(0, 2**64 - 1))
@settings(max_examples=25, deadline=None)
def test_a_mixture_goes_through_each_source_as_if_it_were_alone(sources: list[Packed], weights, seed: int):
    """Nothing of a source is lost or comes twice in an epoch, its share is right, and any step can be asked for."""
    mixture = Mixture("abc", weights, sources)
    batches = Batches(mixture, 64, seed, 16)
    made = [batches.batch(step) for step in range(120)]
    assert all(len(batch.ids) == 64 == sum(batch.lengths) for batch in made)
    seen: dict[str, list[list[int]]] = {name: [] for name in "abc"}
    for batch in made:
        at = 0
        for length in batch.lengths:
            ids = batch.ids[at : at + length].tolist()
            letters = set(ByteTokenizer().decode(ids))
            assert len(letters) <= 1  # no segment of two sources
            if letters:
                seen[letters.pop()].append(ids)
            at += length
    for name, part, share in zip("abc", sources, mixture.shares, strict=True):
        tokens = sum(map(len, seen[name]))
        assert abs(tokens - share * 120 * 64) < 120 + 4 * 16 * 3  # a piece of a bos or an eos alone has no letter
        alone = Batches(part, 64, seed, 16)
        line = [i for batch in itertools.islice(alone, tokens // 64 + 2) for i in batch.ids.tolist() if i > 1]
        mine = [i for ids in seen[name] for i in ids if i > 1]
        assert mine == line[: len(mine)]
    again = Batches(mixture, 64, seed, 16).batch(77)
    assert torch.equal(again.ids, made[77].ids) and torch.equal(again.targets, made[77].targets)
    assert again.num_bytes == sum(again.segment_bytes) == made[77].num_bytes
    epochs = batches.epochs_at(120)
    assert sum(epochs[n] * p.num_tokens for n, p in zip("abc", sources, strict=True)) == pytest.approx(120 * 64)


def test_whole_pieces_of_a_mixture_keep_the_shares(sources: list[Packed]):
    batches = Batches(Mixture("abc", [2, 1, 1], sources), 64, seed=1, seq_len=32, whole=True)
    found = {letter: 0 for letter in "abc"}
    for batch in itertools.islice(batches, 256):
        assert 32 < len(batch.ids) < 96
        for letter in found:
            found[letter] += int((batch.ids == ord(letter) + 2).sum())
    total = sum(found.values())
    assert [round(found[letter] / total, 1) for letter in "abc"] == [0.5, 0.2, 0.3]  # bos and eos counted, not seen


def test_a_mixture_is_known_by_its_sources_and_weights(sources: list[Packed]):
    state = Batches(Mixture("abc", [2, 1, 1], sources), 64, 1, 16).state_dict()
    same = Batches(Mixture("abc", [4, 2, 2], sources), 64, 1, 16)
    same.load_state_dict(json.loads(json.dumps(state)))
    for other in (Mixture("abc", [1, 1, 1], sources), Mixture("abd", [2, 1, 1], sources), sources[0]):
        with pytest.raises(UserError, match="the run to resume has data"):
            Batches(other, 64, 1, 16).load_state_dict(state)


# --- settings ---


def test_a_mixture_is_written_in_yaml_and_on_the_command_line(tmp_path: Path):
    (tmp_path / "mix.yaml").write_text(
        "data:\n  mix:\n    - path: books/\n      weight: 3\n    - {path: web.jsonl.gz, text_field: body}\n"
    )
    mix = resolve("tiny", tmp_path / "mix.yaml").data.mix
    assert mix == (Source("books/", 3.0, "books"), Source("web.jsonl.gz", 1.0, "web", "body"))
    said = resolve("tiny", overrides=['data.mix=[{"path": "books/", "weight": 3}, "web.jsonl.gz"]']).data
    assert said.mix == (Source("books/", 3.0, "books"), Source("web.jsonl.gz", 1.0, "web"))
    (tmp_path / "again.yaml").write_text(write_yaml(resolve("tiny", tmp_path / "mix.yaml").to_dict()))
    assert resolve("tiny", tmp_path / "again.yaml").data.mix == mix
    assert read_yaml(tmp_path / "again.yaml")["data"]["mix"][1]["text_field"] == "body"


@pytest.mark.parametrize(
    ("mix", "says"),
    [
        ([3], "data.mix.0.=3 must be a path or a group"),
        ([{"weight": 2}], "data.mix.0. lacks its path"),
        ([{"path": "a", "wieght": 2}], "unknown configuration key 'data.mix.0..wieght'; did you mean 'weight'"),
        ([{"path": "a", "weight": "2"}], "data.mix.0..weight='2' must be a number"),
        ([{"path": "a", "weight": True}], "data.mix.0..weight=True must be a number"),
        ([{"path": "a", "weight": 0}], "data.mix.0..weight=0 must be a positive finite number"),
        ([{"path": "a", "weight": float("inf")}], "weight=inf must be a positive finite number"),
        (["a.txt", "b/a.jsonl"], "several sources of the name 'a'"),
        ([{"path": "a", "name": "x/y"}], "name='x/y' is no name"),
        ([{"path": "a", "format": "caht"}], "format='caht' must be text or chat; did you mean 'chat'"),
        (["a", {"path": "b", "weight": 1e-6}], "the weight 1e-06 of 'b' in data.mix is less than a 10,000th"),
        ([f"s{n}" for n in range(65)], "data.mix has 65 sources: at most 64"),
    ],
)
def test_a_wrong_mixture_is_one_sentence(mix: list[Any], says: str):
    with pytest.raises(UserError, match=says):
        DataConfig(mix=tuple(mix))


def test_settings_that_do_not_go_with_a_mixture_are_refused(sources: list[Packed]):
    with pytest.raises(UserError, match="data.path and data.mix are both given"):
        resolve("tiny", overrides=['data.mix=["a"]'], data="b")
    with pytest.raises(UserError, match="whole pieces need tokens_per_batch=20 to be at least twice seq_len=16"):
        Batches(Mixture("abc", [1, 1, 1], sources), 20, 0, 16, whole=True)


# --- the data of a run ---


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    for name, letter in (("books", "x"), ("web", "y")):
        lines = [json.dumps({"text": f"{letter * 40} {n}"}) for n in range(60)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    return tmp_path


def config_for(texts: Path, **data: Any) -> RunConfig:
    mix = [{"path": str(texts / "books.jsonl"), "weight": 3}, {"path": str(texts / "web.jsonl")}]
    overrides = ["data.tokenizer=bytes", "data.seq_len=32", "data.tokens_per_step=128", "schedule.steps=4"]
    overrides += ["schedule.warmup=1", "save.every=2", "save.eval_every=4", "save.eval_tokens=200"]
    config = resolve("tiny", overrides=[*overrides, f"data.mix={json.dumps(mix)}"])
    return replace(config, data=replace(config.data, **data))


def test_the_manifest_counts_each_source_and_nothing_held_out_is_trained_on(texts: Path, tmp_path: Path):
    _, train, heldout = prepare_data(config_for(texts), tmp_path / "run")
    assert isinstance(train, Mixture) and train.names == ("books", "web") and train.shares == (0.75, 0.25)
    manifest = json.loads((tmp_path / "run/data/manifest.json").read_text())
    assert list(manifest["splits"]) == ["train.books", "train.web", "heldout"]
    documents = {name: facts["documents"] for name, facts in manifest["splits"].items()}
    assert documents == {"train.books": 57, "train.web": 57, "heldout": 6}
    read = [ByteTokenizer().decode(p.document(n)) for p in (*train.parts, heldout) for n in range(p.num_documents)]
    assert sorted(read) == sorted(f"{letter * 40} {n}" for letter in "xy" for n in range(60))
    told = []
    prepare_data(config_for(texts), tmp_path / "other", on_progress=lambda *at: told.append(at))
    for name in ("train.books", "train.web", "heldout"):
        done = [done for what, done, _ in told if what == f"tokenising {name}"]
        assert done == sorted(done)
    last = [at for at in told if at[0] == "tokenising heldout"][-1]
    assert last[1] == last[2] == sum((texts / f"{n}.jsonl").stat().st_size for n in ("books", "web"))


def test_data_prepared_for_one_mixture_are_not_another_ones(texts: Path, tmp_path: Path):
    prepare_data(config_for(texts), tmp_path / "run")
    prepare_data(config_for(texts), tmp_path / "run")
    mix = config_for(texts).data.mix
    for other in ((replace(mix[0], text_field="body"), mix[1]), (replace(mix[0], name="novels"), mix[1])):
        with pytest.raises(UserError, match="was prepared for .*'books', 'text', 'text'.*: choose another --out"):
            prepare_data(config_for(texts, mix=other), tmp_path / "run")
    with (texts / "web.jsonl").open("a") as file:
        file.write('\n{"text": "more"}')
    with pytest.raises(UserError, match="the train.web split in .* was made from other text"):
        prepare_data(config_for(texts), tmp_path / "run")


def test_a_bad_file_of_a_mixture_is_named_and_nothing_is_left(texts: Path, tmp_path: Path):
    with (texts / "web.jsonl").open("a") as file:
        file.write('\n{"text": ')
    with pytest.raises(UserError, match="line 61 of .*web.jsonl is not valid JSON"):
        prepare_data(config_for(texts), tmp_path / "run")
    assert not list((tmp_path / "run").iterdir())


def test_a_vocabulary_is_learned_from_every_source(texts: Path, tmp_path: Path):
    tokenizer, _, _ = prepare_data(config_for(texts, tokenizer="bpe"), tmp_path / "run")
    assert len(tokenizer.encode("x" * 40)) < 10 and len(tokenizer.encode("y" * 40)) < 10


def test_resuming_a_mixture_is_no_interruption_and_epochs_are_told(texts: Path, tmp_path: Path):
    whole = Trainer(config_for(texts), tmp_path / "whole")
    whole.run()
    part = Trainer(config_for(texts), tmp_path / "part")
    part.run(lambda record: setattr(part.stop, "asked", True) if record["step"] == 1 else None)
    resumed = Trainer(config_for(texts), tmp_path / "part", resume="auto")
    assert resumed.progress.step == 1
    resumed.run()
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], tensor), name
    assert isinstance(whole.train_data, Mixture)
    sizes = dict(zip(whole.train_data.names, (part.num_tokens for part in whole.train_data.parts), strict=True))
    last = read_log(tmp_path / "part" / "log.jsonl")[-1]
    assert sum(last["epochs"][name] * sizes[name] for name in sizes) == pytest.approx(4 * 128)
    assert last["epochs"]["books"] > last["epochs"]["web"] and whole.passes == max(last["epochs"].values())
    changed = config_for(texts)
    mix = tuple(replace(source, weight=1.0) for source in changed.data.mix)
    with pytest.raises(UserError, match="was started with data.mix="):
        Trainer(replace(changed, data=replace(changed.data, mix=mix)), tmp_path / "part", resume="auto")


def test_text_and_conversations_are_mixed(texts: Path, tmp_path: Path):
    row = {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "yy"}]}
    (texts / "chats.jsonl").write_text((json.dumps(row) + "\n") * 30)
    mix = (
        Source(str(texts / "chats.jsonl"), 1.0, "chats", format="chat"),
        Source(str(texts / "web.jsonl"), 1.0, "web"),
    )
    config = config_for(texts, mix=mix, tokenizer="bpe")
    _, train, heldout = prepare_data(replace(config, model=config.model.with_(vocab_size=300)), tmp_path / "run")
    assert isinstance(train, Mixture) and config.data.packs_whole
    talk, web = train.parts
    assert talk.num_learned < talk.num_tokens and web.num_learned == web.num_tokens
    assert heldout.num_learned < heldout.num_tokens and web.num_documents == 60  # held out of conversations alone
