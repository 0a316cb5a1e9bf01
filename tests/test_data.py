"""From text to batches: bad input is named, packing loses and repeats nothing, and any step can be asked for."""

import hashlib
import itertools
import json
import lzma
import math
import sys
from collections.abc import Iterable, Sequence
from functools import cached_property
from importlib.resources import files
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dsv4 import data as corpus
from dsv4.errors import UserError
from dsv4.text import ByteTokenizer, Tokenizer, train_bpe
from dsv4.train import sources
from dsv4.train.data import (
    IGNORED,
    Batch,
    Batches,
    Packed,
    heldout_batches,
    hold_out,
    prepare,
    read_documents,
)
from dsv4.train.ngram import ngram_bits_per_byte


class NumberTokenizer(Tokenizer):
    """Reads "17 18" as the ids 17, 18, so that a test can give every token of a data set its own id."""

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


NUMBERS = NumberTokenizer()


def unique_documents(lengths: Sequence[int]) -> list[str]:
    """Documents of these many tokens, no token occurring twice in all of them."""
    fresh = itertools.count(2)
    return [" ".join(str(next(fresh)) for _ in range(n)) for n in lengths]


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory):
    """lengths of documents -> a packed split of unique tokens."""

    def packed(lengths: Sequence[int]) -> Packed:
        folder = tmp_path_factory.mktemp("packed")
        return prepare(unique_documents(lengths), NUMBERS, folder, split_name="train")

    return packed


@pytest.fixture
def words(tmp_path: Path) -> Packed:
    """A small real split, in bytes."""
    texts = [f"document {n}: " + "the whale 🐳 " * n for n in range(1, 9)]
    return prepare(texts, ByteTokenizer(), tmp_path / "words", split_name="train")


def line_of(batches: Iterable[Batch]) -> list[int]:
    return [i for batch in batches for i in batch.ids.tolist()]


# --- the embedded corpus ---


def test_the_corpus_is_what_its_facts_say():
    facts = corpus.facts()
    assert sum(facts[split]["text_bytes"] for split in ("train", "heldout")) >= 5_000_000
    for split in ("train", "heldout"):
        texts = list(corpus.documents(split))
        assert len(texts) == facts[split]["documents"]
        assert sum(len(text.encode()) for text in texts) == facts[split]["text_bytes"]
        packed = files("dsv4.data") / f"corpus.{split}.jsonl.xz"
        assert hashlib.sha256(lzma.decompress(packed.read_bytes())).hexdigest() == facts[split]["sha256"]
        assert len(packed.read_bytes()) < 3_000_000


def test_the_splits_of_the_corpus_share_nothing():
    train, heldout = list(corpus.records("train")), list(corpus.records("heldout"))
    for key in ("source", "text"):
        values = [record[key] for record in train + heldout]
        assert len(set(values)) == len(values)
    kinds = {record["source"].split("/")[0] for record in heldout}
    assert kinds == {"sotu", "moby-dick"}  # both sources are in both


def test_the_corpus_is_clean_text():
    text = "".join(itertools.chain(corpus.documents("train"), corpus.documents("heldout")))
    assert not [c for c in set(text) if not c.isprintable() and c != "\n"]
    assert "&quot;" not in text and "  " not in text


# --- reading the user's files ---


def write_parquet(file: Path, **columns: list) -> Path:
    pyarrow.parquet.write_table(pyarrow.table(columns), file)
    return file


def test_each_kind_of_file_is_read(tmp_path: Path):
    (tmp_path / "b.txt").write_bytes("\ufeffone\r\ntwo é".encode())
    (tmp_path / "a.jsonl").write_text('{"text": "x", "n": 1}\n\n{"text": ""}\n{"text": "y\\nz"}')
    write_parquet(tmp_path / "c.parquet", text=["p", " ", "q"] + ["r"] * 600)
    assert list(read_documents(tmp_path / "b.txt")) == ["one\ntwo é"]
    assert list(read_documents(str(tmp_path / "a.jsonl"))) == ["x", "y\nz"]
    assert list(read_documents(tmp_path / "c.parquet")) == ["p", "q"] + ["r"] * 600


def test_a_folder_is_its_files_in_order(tmp_path: Path):
    for name in ("b/2.txt", "a.TXT", "b/1.txt", ".hidden/x.txt", "b/.x.txt", "notes.md", "c.txt.swp"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert list(read_documents(tmp_path)) == ["a.TXT", "b/1.txt", "b/2.txt"]


def test_another_field_can_be_named(tmp_path: Path):
    (tmp_path / "a.jsonl").write_text('{"body": "x"}')
    write_parquet(tmp_path / "b.parquet", body=["y"])
    assert list(read_documents(tmp_path, field="body")) == ["x", "y"]


def test_a_long_txt_is_cut_at_line_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sources, "TXT_DOCUMENT_BYTES", 100)
    text = "".join(f"line {n}\n" for n in range(100))
    (tmp_path / "a.txt").write_text(text)
    documents = list(read_documents(tmp_path / "a.txt"))
    assert len(documents) > 5 and "".join(documents) == text
    assert all(document.endswith("\n") for document in documents)


@pytest.mark.parametrize(
    ("name", "contents", "says"),
    [
        ("a.txt", b"", "a.txt is empty"),
        ("a.txt", b" \n\t\n", "a.txt holds no text"),
        ("a.txt", b"fine\nb\xffd", "line 2 of .*a.txt is not UTF-8 .byte 0xff."),
        ("a.txt", "utf-16".encode("utf-16"), "line 1 of .*a.txt is not UTF-8"),
        ("a.txt", "\u00e9".encode()[:1], "line 1 of .*a.txt is not UTF-8 .byte 0xc3."),
        ("a.jsonl", b"", "a.jsonl is empty"),
        ("a.jsonl", b"\n\n", "a.jsonl holds no text"),
        ("a.jsonl", b'{"text": ""}', "a.jsonl holds no text"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "y', "line 2 of .*a.jsonl is not JSON"),
        ("a.jsonl", b'{"text": "x"}\n' + b"[" * 100_000, "line 2 of .*a.jsonl is not JSON"),
        ("a.jsonl", b'{"text": "x"}\n\n["y"]', "line 3 of .*a.jsonl is a list, not a JSON object"),
        ("a.jsonl", b'{"body": "x", "n": 1}', "line 1 of .* lacks the field 'text' .it has body, n."),
        ("a.jsonl", b'{"text": null}', "'text' in line 1 of .*a.jsonl is a NoneType, not text"),
        ("a.jsonl", b'{"text": "\\ud83d"}', "half a surrogate pair"),
        ("a.jsonl", b'{"text": "\xff"}', "line 1 of .*a.jsonl is not UTF-8"),
        ("a.parquet", b"", "a.parquet is empty"),
        ("a.parquet", b"PAR1 no PAR1", "a.parquet is not a readable parquet file"),
        ("a.pdf", b"%PDF", "a.pdf is not a .txt, .jsonl or .parquet file"),
    ],
)
def test_a_bad_file_is_one_sentence(tmp_path: Path, name: str, contents: bytes, says: str):
    (tmp_path / name).write_bytes(contents)
    with pytest.raises(UserError, match=says) as caught:
        list(read_documents(tmp_path / name))
    assert "\n" not in str(caught.value)


def test_bad_parquet_contents_are_named(tmp_path: Path):
    other = write_parquet(tmp_path / "other.parquet", body=["x"], n=[1])
    with pytest.raises(UserError, match="lacks the column 'text' .it has body, n."):
        list(read_documents(other))
    with pytest.raises(UserError, match="'n' in row 1 of .*other.parquet is a int, not text"):
        list(read_documents(other, field="n"))
    holes = write_parquet(tmp_path / "holes.parquet", text=["x", None])
    with pytest.raises(UserError, match="'text' in row 2 of .* is a NoneType"):
        list(read_documents(holes))
    empty = write_parquet(tmp_path / "empty.parquet", text=pyarrow.array([], pyarrow.string()))
    with pytest.raises(UserError, match="holds no text"):
        list(read_documents(empty))


def test_what_can_be_known_is_said_before_reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(UserError, match="no file or folder"):
        read_documents(tmp_path / "nowhere.txt")
    (tmp_path / "notes.md").write_text("x")
    with pytest.raises(UserError, match="holds no .txt, .jsonl or .parquet file"):
        read_documents(tmp_path)
    (tmp_path / "b.txt").write_text("")
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(UserError, match="b.txt is empty"):
        read_documents(tmp_path)
    file = write_parquet(tmp_path / "c.parquet", text=["x"])
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(UserError, match="c.parquet needs pyarrow: pip install pyarrow"):
        read_documents(file)


def test_an_unreadable_file_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file = tmp_path / "a.txt"
    file.write_text("x")

    def denied(self: Path, mode: str):  # permission bits do not stop a test that runs as root
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", denied)
    with pytest.raises(UserError, match="cannot read .*a.txt .Permission denied."):
        list(read_documents(file))


@given(texts=st.lists(st.text(), max_size=70), every=st.integers(2, 25))
def test_holding_out_parts_every_text_once(texts: list[str], every: int):
    train, heldout = list(hold_out(texts, "train", every)), list(hold_out(texts, "heldout", every))
    if len(texts) < every:
        assert sorted("".join(train + heldout)) == sorted("".join(texts))
    else:
        assert sorted(train + heldout) == sorted(texts)
        assert len(heldout) == sum(n % every == every // 2 for n in range(len(texts)))


def test_a_single_document_is_parted_at_a_space():
    text = "some words " * 100
    (train,), (heldout,) = hold_out([text], "train"), hold_out([text], "heldout")
    assert train + heldout == text and heldout.startswith(" ") and 50 <= len(heldout) <= 60


# --- preparing ---


def test_a_document_is_bos_tokens_eos(tmp_path: Path):
    texts = ["ahoy", "é", "the whale"]
    tokenizer = ByteTokenizer()
    packed = prepare(iter(texts), tokenizer, tmp_path, split_name="train")
    for n, text in enumerate(texts):
        assert packed.document(n).tolist() == [0, *tokenizer.encode(text), 1]
    assert (packed.num_documents, packed.num_bytes, packed.num_tokens) == (3, 15, 21)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    facts = manifest["splits"]["train"]
    assert manifest["tokenizer"] == tokenizer.fingerprint() and facts["dtype"] == "<u2"
    assert facts["sha256"] == hashlib.sha256((tmp_path / "train.bin").read_bytes()).hexdigest()
    packed.verify()


def test_a_large_vocabulary_takes_four_bytes(tmp_path: Path):
    packed = prepare(["70000 2", "131071"], NUMBERS, tmp_path, split_name="train")
    assert packed.tokens.dtype == np.uint32
    assert packed.tokens.tolist() == [0, 70000, 2, 1, 0, 131071, 1]


def test_a_prepared_split_is_reused_without_tokenising(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    tokenizer = ByteTokenizer()
    first = prepare(["a", "b"], tokenizer, tmp_path, split_name="train")
    prepare(["c"], tokenizer, tmp_path, split_name="heldout")
    monkeypatch.setattr(ByteTokenizer, "encode_batch", None)
    again = prepare(iter(["a", "b"]), tokenizer, tmp_path, split_name="train")
    assert again.tokens.tolist() == first.tokens.tolist()


@pytest.mark.parametrize("texts", [["a", "c"], ["ab"], ["a"], ["a", "b", "c"]])
def test_other_text_is_refused_and_nothing_is_lost(tmp_path: Path, texts: list[str]):
    prepare(["a", "b"], ByteTokenizer(), tmp_path, split_name="train")
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(UserError, match="the train split in .* was made from other text"):
        prepare(texts, ByteTokenizer(), tmp_path, split_name="train")
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_another_tokenizer_is_refused_and_nothing_is_lost(tmp_path: Path):
    prepare(["a", "b"], ByteTokenizer(), tmp_path, split_name="train")
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    for split in ("train", "heldout"):
        with pytest.raises(UserError, match="was prepared with tokenizer"):
            prepare(["a", "b"], train_bpe(["a b"], 258), tmp_path, split_name=split)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_a_failure_half_way_leaves_no_split(tmp_path: Path):
    def breaks():
        yield "a"
        raise UserError("line 2 is bad")

    with pytest.raises(UserError, match="line 2 is bad"):
        prepare(breaks(), ByteTokenizer(), tmp_path, split_name="train")
    with pytest.raises(UserError, match="no documents"):
        prepare([], ByteTokenizer(), tmp_path, split_name="train")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UserError, match="holds no prepared data"):
        Packed.open(tmp_path, "train")


def test_progress_counts_bytes(tmp_path: Path):
    told: list[int] = []
    prepare(["ab", "é"], ByteTokenizer(), tmp_path, split_name="train", on_progress=told.append)
    assert told[-1] == 4


def test_damage_is_named(words: Packed):
    folder = words.folder
    with pytest.raises(UserError, match="no split 'test' .it has train."):
        Packed.open(folder, "test")

    whole = (folder / "train.bin").read_bytes()
    (folder / "train.bin").write_bytes(b"\x05" + whole[1:])
    with pytest.raises(UserError, match="train.bin is damaged"):
        Packed.open(folder, "train").verify()
    (folder / "train.bin").write_bytes(whole[:-1])
    with pytest.raises(UserError, match=f"train.bin has {len(whole) - 1} bytes instead of {len(whole)}"):
        Packed.open(folder, "train")
    (folder / "train.bin").unlink()
    with pytest.raises(UserError, match="train.bin is missing"):
        Packed.open(folder, "train")
    for manifest in ("{", "[]", "{}", '{"format": 1}'):
        (folder / "manifest.json").write_text(manifest)
        with pytest.raises(UserError, match="manifest.json is damaged"):
            Packed.open(folder, "train")
    (folder / "manifest.json").write_text('{"format": 99}')
    with pytest.raises(UserError, match="has format 99, not 1"):
        Packed.open(folder, "train")


def test_a_token_beyond_the_vocabulary_is_refused(pack):
    packed = pack([10])  # ids 2 to 11
    packed.check_vocab(12)
    with pytest.raises(UserError, match="token id 11 in .* is beyond the model's vocabulary of 11"):
        packed.check_vocab(11)


# --- batches ---

shapes = st.tuples(
    st.lists(st.integers(0, 40), min_size=1, max_size=12),  # tokens of each document
    st.integers(1, 70),  # tokens_per_batch
    st.integers(1, 30),  # seq_len
    st.integers(0, 2**64 - 1),  # seed
)


def check_batch(batch: Batch, packed: Packed, seq_len: int) -> None:
    """Every segment is a run of one document, and every target the token after it there."""
    following = {}
    for n in range(packed.num_documents):
        ids = packed.document(n).tolist()
        following |= {token: after for token, after in itertools.pairwise(ids) if token != 0}
    firsts = {packed.document(n)[1] for n in range(packed.num_documents)}  # what may follow a bos
    ids, targets = batch.ids.tolist(), batch.targets.tolist()
    assert batch.ids.dtype == batch.targets.dtype == torch.int64
    assert len(ids) == len(targets) == sum(batch.lengths)
    assert 1 <= min(batch.lengths) and max(batch.lengths) <= seq_len
    at = 0
    for length in batch.lengths:
        segment, after = ids[at : at + length], targets[at : at + length]
        assert after[:-1] == segment[1:]
        for token, target in zip(segment, after, strict=True):
            if token == 1:
                assert target == IGNORED
            elif token == 0:
                assert target in firsts
            else:
                assert target == following[token]
        at += length
    sizes = packed.token_bytes
    assert batch.num_bytes == sum(int(sizes[t]) for t in targets if t != IGNORED)


@given(shape=shapes)
def test_an_epoch_holds_every_token_once(pack, shape):
    lengths, tokens_per_batch, seq_len, seed = shape
    packed = pack(lengths)
    batches = Batches(packed, tokens_per_batch, seed, seq_len)
    num_batches = -(-2 * packed.num_tokens // tokens_per_batch)
    made = [next(batches) for _ in range(num_batches)]
    for batch in made:
        check_batch(batch, packed, seq_len)
        assert len(batch.ids) == tokens_per_batch
    line, every = line_of(made), sorted(packed.tokens.tolist())
    assert sorted(line[: packed.num_tokens]) == every
    assert sorted(line[packed.num_tokens : 2 * packed.num_tokens]) == every


@given(shape=shapes, steps=st.lists(st.integers(0, 50), min_size=1, max_size=5))
def test_seeking_is_iterating(pack, shape, steps: list[int]):
    lengths, tokens_per_batch, seq_len, seed = shape
    packed = pack(lengths)
    jumping = Batches(packed, tokens_per_batch, seed, seq_len)
    iterated = list(itertools.islice(Batches(packed, tokens_per_batch, seed, seq_len), max(steps) + 1))
    for step in steps:
        found = jumping.batch(step)
        assert torch.equal(found.ids, iterated[step].ids)
        assert torch.equal(found.targets, iterated[step].targets)
        assert (found.lengths, found.num_bytes) == (iterated[step].lengths, iterated[step].num_bytes)


def test_a_resumed_run_sees_what_an_uninterrupted_one_sees(pack):
    packed = pack([30, 5, 17])
    through = Batches(packed, 8, seed=3, seq_len=6)
    line = line_of(itertools.islice(through, 20))
    first = Batches(packed, 8, seed=3, seq_len=6)
    head = line_of(itertools.islice(first, 7))
    second = Batches(packed, 8, seed=3, seq_len=6)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert head + line_of(itertools.islice(second, 13)) == line
    assert second.epochs == 20 * 8 / packed.num_tokens


def test_resuming_with_other_settings_is_refused(pack):
    packed, other = pack([30, 5, 17]), pack([30, 5, 18])
    state = Batches(packed, 8, seed=3, seq_len=6).state_dict()
    for batches, name in (
        (Batches(packed, 9, seed=3, seq_len=6), "tokens_per_batch 8, this one 9"),
        (Batches(packed, 8, seed=4, seq_len=6), "seed 3, this one 4"),
        (Batches(packed, 8, seed=3, seq_len=7), "seq_len 6, this one 7"),
        (Batches(other, 8, seed=3, seq_len=6), "data"),
    ):
        with pytest.raises(UserError, match=f"the run to resume has {name}"):
            batches.load_state_dict(state)


def test_the_order_depends_on_seed_and_epoch_and_on_nothing_else(pack):
    packed = pack([3] * 6)  # 30 tokens: six documents, each one piece

    def order(seed: int, epoch: int) -> list[int]:
        return [(i - 2) // 3 for i in Batches(packed, 30, seed, 5).batch(epoch).ids.tolist()[1::5]]

    drawn = [order(seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(o) for o in drawn}) == 4 and all(sorted(o) == [0, 1, 2, 3, 4, 5] for o in drawn)
    assert drawn[:2] == [
        [0, 2, 1, 5, 4, 3],
        [5, 3, 2, 4, 1, 0],
    ]  # a change here would make every resumed run another run


def test_neighbouring_batches_come_from_many_documents(pack):
    packed = pack([1000] * 8)
    batch = Batches(packed, 256, seed=0, seq_len=16).batch(0)
    assert len({int(i - 2) // 1000 for i in batch.ids if i > 1}) >= 6


@pytest.mark.parametrize(
    ("tokens", "seq_len", "seed", "says"),
    [(0, 4, 0, "tokens_per_batch is 0"), (4, 0, 0, "seq_len is 0"), (4, 4, -1, "seed -1"), (4, 4, 2**64, "seed")],
)
def test_impossible_batches_are_refused(pack, tokens: int, seq_len: int, seed: int, says: str):
    with pytest.raises(UserError, match=says):
        Batches(pack([4]), tokens, seed, seq_len)


@given(shape=shapes)
def test_evaluation_takes_every_token_in_order(pack, shape):
    lengths, tokens_per_batch, seq_len, _ = shape
    packed = pack(lengths)
    batches = list(heldout_batches(packed, tokens_per_batch, seq_len))
    assert line_of(batches) == packed.tokens.tolist()
    assert [len(b.ids) for b in batches[:-1]] == [tokens_per_batch] * (len(batches) - 1)
    assert sum((b.targets == IGNORED).sum() for b in batches) == packed.num_documents
    for batch in batches:
        check_batch(batch, packed, seq_len)


@given(shape=shapes, limit=st.integers(1, 300))
def test_limited_evaluation_is_spread_and_in_order(pack, shape, limit: int):
    lengths, tokens_per_batch, seq_len, _ = shape
    packed = pack(lengths)
    batches = list(heldout_batches(packed, tokens_per_batch, seq_len, limit))
    line = [i for i in line_of(batches) if i > 1]
    assert 1 <= len(line_of(batches)) <= limit
    assert line == sorted(line) and len(set(line)) == len(line)
    for batch in batches:
        check_batch(batch, packed, seq_len)


def test_limited_evaluation_reaches_all_documents(pack):
    packed = pack([98] * 10)
    line = line_of(heldout_batches(packed, 64, 10, limit_tokens=200))
    assert len(line) == 200
    assert len({(i - 2) // 98 for i in line if i > 1}) == 10


def test_impossible_evaluation_is_refused_at_once(pack):
    packed = pack([4])
    for arguments in ((0, 4, None), (4, 0, None), (4, 4, 0)):
        with pytest.raises(UserError, match="evaluation needs at least 1"):
            heldout_batches(packed, *arguments)


def test_the_bytes_of_the_targets_are_the_bytes_of_the_text(words: Packed, tmp_path: Path):
    assert sum(b.num_bytes for b in heldout_batches(words, 10, 7)) == words.num_bytes
    texts = ["naïve whalers 🐳 " * 5, f"a text that spells {'<｜end▁of▁sentence｜>'}"]
    packed = prepare(texts, train_bpe(texts, 290), tmp_path / "bpe", split_name="train")
    assert sum(b.num_bytes for b in heldout_batches(packed, 10, 7)) == sum(len(t.encode()) for t in texts)


# --- the baselines ---


def batch_of(pairs: list[tuple[int, int]], num_bytes: int) -> Batch:
    ids, targets = (torch.tensor(side, dtype=torch.int64) for side in zip(*pairs, strict=True))
    return Batch(ids, targets, [len(ids)], num_bytes)


def test_the_baselines_equal_a_hand_count():
    # Vocabulary 4. Seen: 0->2, 2->3, 3->2, 2->1, then the end of a document, which predicts nothing.
    train = [batch_of([(0, 2), (2, 3), (3, 2)], 0), batch_of([(2, 1), (1, IGNORED)], 0)]
    # Four targets 2, 3, 2, 1: add-one gives P1 = (0+1, 1+1, 2+1, 1+1) / 8.
    heldout = [batch_of([(0, 2), (2, 2), (1, 3), (1, IGNORED)], 5)]
    unigram = [3 / 8, 3 / 8, 2 / 8]
    bigram = [
        (1 + 1 * 3 / 8) / (1 + 1),  # after 0: seen once, one kind of follower, which was 2
        (0 + 2 * 3 / 8) / (2 + 2),  # after 2: seen twice, two kinds, neither was 2
        2 / 8,  # after 1 nothing was ever seen: the unigram
    ]
    found = ngram_bits_per_byte(train, heldout, vocab_size=4)
    assert found["unigram"] == pytest.approx(-sum(map(math.log2, unigram)) / 5, rel=1e-12)
    assert found["bigram"] == pytest.approx(-sum(map(math.log2, bigram)) / 5, rel=1e-12)


def test_baselines_without_training_are_uniform():
    heldout = [batch_of([(0, 2), (2, 3)], 2)]
    assert ngram_bits_per_byte([], heldout, vocab_size=8) == {"unigram": 3.0, "bigram": 3.0}


def test_the_baselines_are_probabilities():
    """Over all that may follow, each adds up to 1: bits of every target, turned back into probabilities."""
    train = [batch_of([(0, 2), (2, 3), (3, 2), (2, 1), (2, 2)], 0)]
    for before in range(5):
        scores = [ngram_bits_per_byte(train, [batch_of([(before, w)], 1)], 5) for w in range(5)]
        for kind in ("unigram", "bigram"):
            assert sum(2 ** -score[kind] for score in scores) == pytest.approx(1, rel=1e-12)


def test_baselines_do_not_depend_on_how_batches_are_cut(words: Packed):
    cuts = [list(heldout_batches(words, tokens, seq_len)) for tokens, seq_len in ((7, 3), (1000, 1000))]
    first, second = (ngram_bits_per_byte(cut, cut, 258) for cut in cuts)
    assert first == pytest.approx(second, rel=1e-12)
    assert first["bigram"] < first["unigram"] < 8
