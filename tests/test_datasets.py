"""Failures caught here: a data set of the hub, or a local folder of one, that is read as something else than it holds;
a spelling that means another data set; a missing package, network, split or column that ends in a traceback.
"""

import json
import sys
from pathlib import Path

import pytest

from dsv4.errors import UserError
from dsv4.train.hub import HubSource, HubSpec
from dsv4.train.recipes import resolve
from dsv4.train.rows import ChatRows, TextRows
from dsv4.train.runconfig import RunConfig
from dsv4.train.rundata import prepare_data

pytest.importorskip("datasets", reason="the datasets package is an extra")


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import datasets
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A data set of two splits, with a column `body` beside `text`."""
    folder = tmp_path / "set"
    folder.mkdir()
    for split, count in (("train", 60), ("test", 3)):
        rows = [{"text": f"{split} text {n}", "body": f"{split} body {n}"} for n in range(count)]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def config_for(path: str, *overrides: str) -> RunConfig:
    settings = ["data.tokenizer=bytes", "data.seq_len=32", "data.tokens_per_step=64", *overrides]
    return resolve("tiny", overrides=settings, data=path)


@pytest.mark.parametrize(
    ("path", "spec"),
    [
        ("hf:imdb", HubSpec("imdb")),
        ("hf:a/b", HubSpec("a/b")),
        ("hf:a/b/c-1.0", HubSpec("a/b", "c-1.0")),
        ("hf:a/b:validation", HubSpec("a/b", split="validation")),
        ("hf:a/b/c:train[:10%]@v1.2/x", HubSpec("a/b", "c", "train[:10%]", "v1.2/x")),
        ("hf:a/b@0123abc", HubSpec("a/b", revision="0123abc")),
        ("hf:/data/set:test", HubSpec("/data/set", split="test")),
    ],
)
def test_a_data_set_is_what_its_name_says(path: str, spec: HubSpec):
    assert HubSpec.read(path) == spec
    assert HubSpec.read(str(spec)) == spec


@pytest.mark.parametrize("path", ["hf:", "hf:a/b/c/d", "hf:a b", "hf:a/b:", "hf:a/b@", "hf:-x"])
def test_a_name_that_is_none_is_one_sentence(path: str):
    with pytest.raises(UserError, match="is no data set: write hf:OWNER/NAME"):
        HubSpec.read(path)


def test_a_local_folder_is_streamed_by_split_and_column(folder: Path):
    told: list[int] = []
    assert list(HubSource(f"hf:{folder}:test", TextRows()).documents(told.append)) == [
        f"test text {n}" for n in range(3)
    ]
    assert told == [11, 22, 33]
    assert len(list(HubSource(f"hf:{folder}", TextRows("body")).documents(told.append))) == 60


def test_a_run_reads_it_as_any_other_text(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    told = []
    _, train, heldout = prepare_data(
        config_for("hf:./set", f"data.heldout=hf:{folder}:test"),
        tmp_path / "run",
        on_progress=lambda *at: told.append(at),
    )
    assert (train.num_documents, heldout.num_documents) == (60, 3)
    assert ("tokenising train", 0, None) in told
    _, train, heldout = prepare_data(config_for(f"hf:{folder}"), tmp_path / "other")
    assert (train.num_documents, heldout.num_documents) == (57, 3)
    prepare_data(config_for(f"hf:{folder}"), tmp_path / "other")
    (folder / "train.jsonl").write_text('{"text": "another", "body": ""}\n' * 60)
    with pytest.raises(UserError, match="was made from other text"):
        prepare_data(config_for(f"hf:{folder}"), tmp_path / "other")


def test_conversations_come_from_a_data_set_too(tmp_path: Path):
    (tmp_path / "set").mkdir()
    row = {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}
    (tmp_path / "set" / "train.jsonl").write_text((json.dumps(row) + "\n") * 3)
    (document, *_) = HubSource(f"hf:{tmp_path}/set", ChatRows()).documents(lambda done: None)
    assert json.loads(document) == row


def test_what_is_wrong_is_one_sentence(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for path, field, says in (
        (f"hf:{folder}:valid", "text", "cannot read hf:.*:valid .*check its name, split and revision"),
        (f"hf:{folder}", "txt", "lacks the column 'txt' .it has text, body.: name another column"),
        (f"hf:{tmp_path}/none", "text", "there is no folder .*none"),
        ("hf:nobody/has-this", "text", "cannot read hf:nobody/has-this:train .*this machine reaches the hub"),
    ):
        with pytest.raises(UserError, match=says) as caught:
            list(HubSource(path, TextRows(field)).documents(lambda done: None))
        assert "\n" not in str(caught.value)
    (folder / "test.jsonl").write_text('{"text": "x", "body": "y"}\n{"text": ')
    with pytest.raises(UserError, match="cannot read hf:.*:test"):
        list(HubSource(f"hf:{folder}:test", TextRows()).documents(lambda done: None))
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match="needs the datasets package: pip install 'dsv4.data.'"):
        HubSource("hf:a/b", TextRows())
