"""Failures caught here: tokens that depend on how many processes made them; a middle that is moved in another share of
the texts than was asked, moved elsewhere the next time, or lost; a control token made of text; work that goes on, or a
traceback, when a process of it is ended.
"""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conversations import v4_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from workers import Killer, Refuser

from dsv4.errors import UserError
from dsv4.text import ByteTokenizer, train_bpe
from dsv4.text.prompt import CONTROLS, FIM
from dsv4.train import encode
from dsv4.train.encode import Encoder, encoded, middle_last
from dsv4.train.packed import prepare
from dsv4.train.recipes import resolve
from dsv4.train.rundata import prepare_data
from dsv4.train.state import CHANGEABLE

TEXTS = [f"document {n}: " + "the whale and the sea 🐳 " * (n % 7) for n in range(60)]
NAMES = [control.name for control in FIM]


@given(text=st.text(max_size=60), rate=st.floats(0, 1))
def test_a_text_with_its_middle_last_is_that_text(text: str, rate: float):
    parts = middle_last(text, rate)
    assert parts == middle_last(text, rate)
    if len(parts) == 3:
        prefix, suffix, middle = parts
        assert prefix + middle + suffix == text
        assert middle_last(text, 1.0) == parts  # the places do not depend on the rate
    else:
        assert parts == (text,)


def test_the_share_of_texts_is_that_asked_for_and_the_places_are_spread():
    texts = [f"text {n} " * 20 for n in range(4000)]
    moved = [parts for text in texts if len(parts := middle_last(text, 0.3)) == 3]
    assert 0.27 < len(moved) / len(texts) < 0.33
    assert not [text for text in texts if len(middle_last(text, 0.0)) == 3]
    assert all(len(middle_last(text, 1.0)) == 3 for text in texts)
    shares = np.array([[len(part) / sum(map(len, parts)) for part in parts] for parts in moved])
    assert np.allclose(shares.mean(axis=0), 1 / 3, atol=0.03)


def test_the_tokens_are_in_the_order_of_v4s_names():
    tokenizer = v4_tokenizer()
    prefix, suffix, middle = middle_last(TEXTS[5], 1.0)
    ids = Encoder(tokenizer, fim=1.0)([TEXTS[5]]).ids.tolist()
    text = tokenizer.decode(ids, skip_special=False)
    begin, hole, end = NAMES
    assert text == f"<｜begin▁of▁sentence｜>{begin}{prefix}{hole}{suffix}{end}{middle}<｜end▁of▁sentence｜>"
    assert [i for i in ids if i in (128800, 128801, 128802)] == [128801, 128800, 128802]


def test_a_text_that_spells_the_tokens_does_not_make_them():
    tokenizer = train_bpe(TEXTS, 300, NAMES)
    names = {tokenizer.token_id(name) for name in NAMES}
    assert len(names) == 3 and None not in names
    ids = Encoder(tokenizer)(["".join(NAMES)]).ids.tolist()
    assert names.isdisjoint(ids) and tokenizer.decode(ids) == "".join(NAMES)
    moved = Encoder(tokenizer, fim=1.0)(["".join(NAMES)]).ids.tolist()
    assert sum(i in names for i in moved) == 3


def test_a_run_with_fim_adds_the_tokens_and_leaves_the_held_out_text_alone(tmp_path: Path):
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))
    plain = resolve("tiny", overrides=["data.seq_len=32", "data.tokens_per_step=64"], data=str(tmp_path / "a.jsonl"))
    run = replace(plain, data=replace(plain.data, fim=0.5), model=plain.model.with_(vocab_size=300))
    tokenizer, train, heldout = prepare_data(run, tmp_path / "run")
    begin = tokenizer.token_id(NAMES[0])
    assert begin is not None and 20 < (train.tokens == begin).sum() < 40 and not (heldout.tokens == begin).any()
    assert train.num_bytes + heldout.num_bytes == sum(len(text.encode()) for text in TEXTS)
    with pytest.raises(UserError, match="was prepared for .*'fim': 0.5.*: choose another --out"):
        prepare_data(replace(run, data=replace(run.data, fim=0.25)), tmp_path / "run")
    with pytest.raises(UserError, match="was prepared for .*: choose another --out"):
        prepare_data(replace(run, data=replace(run.data, fim=0.0)), tmp_path / "run")


def test_fim_without_its_tokens_is_one_sentence(tmp_path: Path):
    for rate in (-0.1, 1.5):
        with pytest.raises(UserError, match="must be a share of the documents, from 0 to 1"):
            resolve("tiny", overrides=[f"data.fim={rate}"])
    with pytest.raises(UserError, match="data.tokenizer=bytes has no control tokens, which fill-in-the-middle needs"):
        resolve("tiny", overrides=["data.fim=0.1", "data.tokenizer=bytes"])
    train_bpe(TEXTS, 300).save(tmp_path / "own")
    run = resolve("tiny", overrides=["data.fim=0.1", f"data.tokenizer={tmp_path / 'own'}"])
    with pytest.raises(UserError, match="lacks the tokens of fill-in-the-middle"):
        prepare_data(run, tmp_path / "run")
    assert not (tmp_path / "run" / "data").exists()


def test_a_vocabulary_has_room_for_its_markers():
    with pytest.raises(UserError, match="must hold 5 special tokens and 256 bytes; ask for at least 261"):
        train_bpe(TEXTS, 260, NAMES)


# --- processes ---


def test_the_files_are_the_same_whatever_the_number_of_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(encode, "CHUNK_CHARS", 500)  # a dozen chunks, in more hands than there are chunks in flight
    tokenizer = train_bpe(TEXTS, 340, [control.name for control in (*CONTROLS[2:], *FIM)])
    turns = ([{"role": "user", "content": text}, {"role": "assistant", "content": "x"}] for text in TEXTS)
    chat = [json.dumps({"messages": messages}) for messages in turns]
    for number, encoder in enumerate((Encoder(tokenizer, fim=0.5), Encoder(tokenizer, "chat"))):
        documents = chat if encoder.format == "chat" else TEXTS
        found = []
        for workers in (1, 3):
            folder = tmp_path / f"{number}-{workers}"
            prepare(documents, encoder.tokenizer, folder, split_name="train", encoder=encoder, workers=workers)
            found.append({file.name: file.read_bytes() for file in folder.iterdir()})
        assert found[0] == found[1] and len(found[0]) == 4 + (number == 1)


def test_the_trouble_of_a_process_is_one_sentence_and_leaves_nothing(tmp_path: Path):
    with pytest.raises(UserError, match="one of the 2 processes that tokenise was ended from outside"):
        list(encoded(TEXTS, Encoder(Killer()), workers=2))
    with pytest.raises(UserError, match="cannot use document 0"):
        prepare(TEXTS, ByteTokenizer(), tmp_path, split_name="train", encoder=Encoder(Refuser()), workers=2)
    assert not list(tmp_path.iterdir())


def test_workers_may_change_when_a_run_is_resumed():
    assert "data.workers".startswith(CHANGEABLE)
    with pytest.raises(UserError, match="data.workers=0 must be positive"):
        resolve("tiny", overrides=["data.workers=0"])
