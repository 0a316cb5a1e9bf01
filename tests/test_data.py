"""From text to batches: bad input is named, packing loses and repeats nothing, and any step can be asked for.

And: text held out is neither lost nor trained on; what was prepared is whole, unchanged and made for this run, or
there is one sentence; memory does not grow with the longest line.
"""

import codecs
import gzip
import hashlib
import io
import itertools
import json
import logging
import lzma
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dsv4 import data as corpus
from dsv4 import files as dsv4_files
from dsv4.errors import FileError, UserError
from dsv4.model.head import IGNORE
from dsv4.text import ByteTokenizer, Tokenizer, train_bpe
from dsv4.train import rows, rundata, sources
from dsv4.train.batches import Batch, Batches, heldout_batches
from dsv4.train.batches import split as split_batch
from dsv4.train.dataconfig import DataConfig
from dsv4.train.ngram import ngram_bits_per_byte
from dsv4.train.packed import FORMAT, Packed, prepare
from dsv4.train.recipes import RECIPES
from dsv4.train.runconfig import RunConfig
from dsv4.train.rundata import absolute, prepare_data
from dsv4.train.sources import hold_out, read_documents


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
    monkeypatch.setattr(rows, "DOCUMENT_CHARS", 100)
    text = "".join(f"line {n}\n" for n in range(100))
    (tmp_path / "a.txt").write_text(text)
    documents = list(read_documents(tmp_path / "a.txt"))
    assert len(documents) > 5 and "".join(documents) == text
    assert all(document.endswith("\n") and len(document) <= 100 for document in documents)


long_texts = st.lists(st.sampled_from(["word ", "字", "e\u0301", "🐳", "\n", "x" * 30]), min_size=1, max_size=80)


@given(pieces=long_texts, block=st.integers(1, 50))
def test_long_texts_of_every_kind_are_cut_and_nothing_is_lost(tmp_path_factory, pieces: list[str], block: int):
    """A long line, JSON text, table row or embedded document costs memory without bound, or loses characters."""
    folder, text = tmp_path_factory.mktemp("long"), "a" + "".join(pieces) + "z"
    (folder / "a.txt").write_bytes(text.encode())
    (folder / "a.jsonl").write_text(json.dumps({"text": text}))
    write_parquet(folder / "a.parquet", text=[text])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows, "DOCUMENT_CHARS", 20)
        patch.setattr(sources, "BLOCK_BYTES", block)
        found = [list(read_documents(folder / f"a.{kind}")) for kind in ("txt", "jsonl")]
        patch.setattr(sources, "BLOCK_BYTES", 1 << 20)  # pyarrow's buffer has a smallest size
        found.append(list(read_documents(folder / "a.parquet")))
        found.append(list(rows.bounded([text])))
    for documents in found:
        assert "".join(documents).split() == text.split()
        assert max(map(len, documents)) <= 20
        if not any(part.isspace() for part in sources_cut(text, 20)):
            assert "".join(documents) == text


def sources_cut(text: str, chars: int) -> list[str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows, "DOCUMENT_CHARS", chars)
        return list(rows.bounded([text]))


def test_line_ends_are_joined_across_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A "\\r\\n" or a character that two blocks share is broken."""
    (tmp_path / "a.txt").write_bytes("\ufeffé\r\n\r\r\n🐳\u2028\r".encode())
    for block in range(1, 20):
        monkeypatch.setattr(sources, "BLOCK_BYTES", block)
        assert list(read_documents(tmp_path / "a.txt")) == ["é\n\r\n🐳\u2028\r"]


def test_only_line_ends_end_a_jsonl_line(tmp_path: Path):
    text = "a\u2028b\u2029c\u0085d"
    (tmp_path / "a.jsonl").write_bytes(f'\ufeff{{"text": "{text}"}}\r\n{{"text": "y"}}'.encode())
    assert list(read_documents(tmp_path / "a.jsonl")) == [text, "y"]


def test_a_jsonl_line_beyond_the_bound_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sources, "LINE_BYTES", 40)
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n{"text": "' + "y" * 40 + '"}\n')
    with pytest.raises(UserError, match="line 2 of .*a.jsonl is longer than 40 bytes"):
        list(read_documents(tmp_path / "a.jsonl"))


MEMORY = """
import re, resource, sys
from dataclasses import replace
from pathlib import Path
from dsv4.train import rundata
from dsv4.train.packed import FORMAT, Packed, prepare
from dsv4.train.recipes import RECIPES

rundata.BPE_BYTES = 1 << 20  # the vocabulary of the whole would take a minute
folder, run = Path(sys.argv[1]), RECIPES["tiny"]()
rundata.prepare_data(replace(run, data=replace(run.data, path=str(folder / "line.txt"))), folder / "run")
status = Path("/proc/self/status")  # getrusage's peak includes that of the process this one was started from
peak = re.search(r"VmHWM:\\s+(\\d+) kB", status.read_text()) if status.exists() else None
print(int(peak[1]) if peak else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def test_a_line_of_30_megabytes_takes_a_bounded_memory(tmp_path: Path):
    """One unbroken line costs gigabytes, and minutes of merging: 140 bytes for each of its own, quadratic time."""
    letters = "".join(random.Random(0).choices("abcdefghijklmnopqrstuvwxyz", k=64_000))
    (tmp_path / "line.txt").write_text(letters * 470)
    result = subprocess.run([sys.executable, "-c", MEMORY, tmp_path], capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) < 1 << 20, "kilobytes at the peak, of which the modules take about a quarter"


@pytest.mark.parametrize(
    ("name", "contents", "says"),
    [  # mtime=0: workers that collect a second apart must find tests of the same name
        ("a.txt", b"", "a.txt is empty"),
        ("a.txt", b" \n\t\n", "a.txt holds no text"),
        ("a.txt", b"fine\nb\xffd", "line 2 of .*a.txt is not UTF-8 .byte 0xff."),
        ("a.txt", "utf-16".encode("utf-16"), "line 1 of .*a.txt is not UTF-8 .it begins with the mark of UTF-16"),
        ("a.txt", codecs.BOM_UTF32_BE + "x".encode("utf-32-be"), "not UTF-8 .it begins with the mark of UTF-16 or"),
        ("a.txt", "a\nbc".encode("utf-16-le"), "line 1 of .*a.txt holds NUL characters, as UTF-16 does"),
        ("a.txt", b"a\nb\0c", "line 2 of .*a.txt holds NUL characters"),
        ("a.jsonl", '{"text": "x"}'.encode("utf-16-le"), "line 1 of .*a.jsonl holds NUL characters"),
        ("a.jsonl", '{"text": "x"}'.encode("utf-16"), "not UTF-8 .it begins with the mark of UTF-16"),
        ("a.txt", "\u00e9".encode()[:1], "line 1 of .*a.txt is not UTF-8 .byte 0xc3."),
        ("a.jsonl", b"", "a.jsonl is empty"),
        ("a.jsonl", b"\n\n", "a.jsonl holds no text"),
        ("a.jsonl", b'{"text": ""}', "a.jsonl holds no text"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "y', "line 2 of .*a.jsonl is not valid JSON"),
        ("a.jsonl", b'{"text": "x"}\n' + b"[" * 200_000, "line 2 of .*a.jsonl is not valid JSON"),
        ("a.jsonl", b'{"text": ' + b"9" * 5000 + b"}", "line 1 of .*a.jsonl is not valid JSON"),
        ("a.jsonl", b'{"text": "x"}\n\n["y"]', "line 3 of .*a.jsonl must hold a JSON object, not a list"),
        ("a.jsonl", b'{"body": "x", "n": 1}', "line 1 of .* lacks the field 'text' .it has body, n."),
        ("a.jsonl", b'{"text": null}', "'text' in line 1 of .*a.jsonl is a NoneType, not text"),
        ("a.jsonl", b'{"text": "\\ud83d"}', "half a surrogate pair"),
        ("a.jsonl", b'{"text": "\xff"}', "line 1 of .*a.jsonl is not UTF-8"),
        ("a.parquet", b"", "a.parquet is empty"),
        ("a.parquet", b"PAR1 no PAR1", "a.parquet is not a readable parquet file"),
        ("a.pdf", b"%PDF", "a.pdf is not a .txt, .jsonl or .parquet file"),
        ("a.gz", gzip.compress(b"x", mtime=0), "a.gz is not a .txt, .jsonl or .parquet file"),
        ("a.txt.gz", gzip.compress(b"x" * 999, mtime=0)[:-9], "a.txt.gz is damaged or cut short"),
        ("a.txt.gz", b"plain text", "a.txt.gz is damaged or cut short .Not a gzipped file"),
        ("a.txt.gz", gzip.compress(b"fine\n\xff", mtime=0), "line 2 of .*a.txt.gz is not UTF-8 .byte 0xff."),
        ("a.txt.gz", gzip.compress(b"", mtime=0), "a.txt.gz holds no text"),
        ("a.jsonl.zst", b"plain text", "a.jsonl.zst is damaged or cut short"),
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
    with pytest.raises(UserError, match="b.txt is empty"):
        read_documents(tmp_path)
    file = write_parquet(tmp_path / "c.parquet", text=["x"])
    packed = tmp_path / "d.txt.zst"
    packed.write_bytes(zstd(b"x"))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(UserError, match="c.parquet needs pyarrow: pip install pyarrow"):
        read_documents(file)
    monkeypatch.setitem(sys.modules, "compression", None)
    with pytest.raises(UserError, match="d.txt.zst needs Python 3.14 or pyarrow: pip install pyarrow"):
        read_documents(packed)


def test_an_unreadable_file_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file = tmp_path / "a.txt"
    file.write_text("x")

    def denied(self: Path, mode: str):  # permission bits do not stop a test that runs as root
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", denied)
    with pytest.raises(UserError, match="cannot read .*a.txt: Permission denied"):
        list(read_documents(file))


# --- folders as people have them ---


def zstd(contents: bytes) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(contents)
    return sink.getvalue().to_pybytes()


@pytest.mark.parametrize(("ending", "pack"), [("gz", gzip.compress), ("zst", zstd)])
def test_compressed_shards_are_read(tmp_path: Path, ending: str, pack: Callable[[bytes], bytes]):
    (tmp_path / f"a.TXT.{ending}").write_bytes(pack("\ufeffone\r\ntwo é".encode()))
    (tmp_path / f"b.v2.jsonl.{ending}").write_bytes(pack(b'{"text": "x"}\n') + pack(b'{"text": "y"}'))  # two members
    assert list(read_documents(tmp_path)) == ["one\ntwo é", "x", "y"]


@pytest.mark.parametrize(("ending", "pack"), [("gz", gzip.compress), ("zst", zstd)])
def test_a_damaged_shard_is_one_sentence_wherever_it_is_damaged(
    tmp_path: Path, ending: str, pack: Callable[[bytes], bytes]
):
    """Cut or changed bytes end in a traceback of a decompressor, or in less text without a word."""
    text = "".join(f"line {n} of the log\n" for n in range(500))
    whole, file = pack(text.encode()), tmp_path / f"a.txt.{ending}"
    draw = random.Random(0)
    for _ in range(60):
        at = draw.randrange(len(whole))
        changed = bytes([whole[at] ^ 1 << draw.randrange(8)])
        file.write_bytes(whole[:at] if draw.random() < 0.5 else whole[:at] + changed + whole[at + 1 :])
        try:
            found = "".join(read_documents(file))
        except UserError as error:
            assert str(file) in str(error) and "\n" not in str(error)
        else:
            assert found == text or ending == "zst", "gzip has a check sum; what pyarrow packs has none"


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """What was said on the logger "dsv4"."""
    caplog.set_level(logging.WARNING, logger="dsv4")
    return lambda: [record.getMessage() for record in caplog.records if record.name == "dsv4"]


def test_what_is_passed_over_is_listed_once(tmp_path: Path, said: Callable[[], list[str]]):
    """Text that nobody reads: a .gz of something, .json, .csv, a folder behind a link, without a word about it."""
    folder, elsewhere = tmp_path / "texts", tmp_path / "elsewhere"
    (folder / "sub").mkdir(parents=True)
    elsewhere.mkdir()
    for name in ("a.txt", "b.csv", "sub/c.json", "d.gz", "e.parquet.gz", "f.md", "g.zip", ".hidden"):
        (folder / name).write_text(name)
    (folder / "linked").symlink_to(elsewhere)
    for _ in range(3):
        assert list(read_documents(folder)) == ["a.txt"]
    (sentence,) = said()
    assert "passed over" in sentence and "b.csv, c.json, d.gz, e.parquet.gz, f.md, ... (7 in all)" in sentence


def test_a_linked_folder_is_named(tmp_path: Path, said: Callable[[], list[str]]):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("x")
    (tmp_path / "texts" / "more").symlink_to(tmp_path)
    assert list(read_documents(tmp_path / "texts")) == ["x"]
    assert "more/ (a link)" in said()[0]


def test_a_broken_link_is_an_error(tmp_path: Path):
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "b.txt").symlink_to(tmp_path / "nowhere.txt")
    with pytest.raises(UserError, match="b.txt is a link to something that is not there"):
        read_documents(tmp_path)


@pytest.mark.parametrize(("contents", "says"), [("", "are empty"), (" \n", "every document in them is empty")])
def test_one_empty_shard_among_others_is_a_warning(
    tmp_path: Path, said: Callable[[], list[str]], contents: str, says: str
):
    for name, text in (("a.txt", "x"), ("b.txt", contents), ("c.txt", "y")):
        (tmp_path / name).write_text(text)
    for _ in range(2):
        assert list(read_documents(tmp_path)) == ["x", "y"]
    assert len(said()) == 1 and says in said()[0] and "b.txt" in said()[0]
    for name in ("a.txt", "c.txt"):
        (tmp_path / name).write_text(contents)
    with pytest.raises(UserError, match="are empty: give|hold no text"):
        list(read_documents(tmp_path))


def test_a_damaged_parquet_page_is_one_sentence(tmp_path: Path):
    """pyarrow raises its own errors while it iterates, not only when it opens."""
    file = write_parquet(tmp_path / "a.parquet", text=[f"row {n} " * 20 for n in range(2000)])
    whole, draw, refused = file.read_bytes(), random.Random(0), 0
    for _ in range(60):
        at = draw.randrange(4, len(whole) * 3 // 4)
        file.write_bytes(whole[:at] + draw.randbytes(40) + whole[at + 40 :])
        try:
            list(read_documents(file))
        except UserError as error:
            refused += 1
            assert str(file) in str(error) and "\n" not in str(error)
    assert refused >= 10


def test_columns_of_text_of_every_type_are_read(tmp_path: Path):
    texts = ["x", "y", "x"] * 20
    plain = pyarrow.array(texts)
    for number, column in enumerate((plain, plain.dictionary_encode(), plain.cast(pyarrow.large_string()))):
        file = write_parquet(tmp_path / f"{number}.parquet", text=column)
        assert list(read_documents(file)) == texts
    for column, kind in ((plain.cast(pyarrow.binary()), "bytes"), (pyarrow.array([["x"]]), "list")):
        with pytest.raises(UserError, match=f"'text' in row 1 of .* is a {kind}, not text"):
            list(read_documents(write_parquet(tmp_path / "other.parquet", text=column)))
    raw = pyarrow.array([b"fine", b"\xff\xfe"]).view(pyarrow.string())
    with pytest.raises(UserError, match="broken.parquet is not a readable parquet file"):
        list(read_documents(write_parquet(tmp_path / "broken.parquet", text=raw)))


# --- holding out ---

SCRIPTS = {
    "Chinese": "白鲸记是一部小说",
    "one word a line": "ab\n",
    "tabs": "x\t",
    "emoji": "🐳👩\u200d👧🏽",
    "combining": "e\u0301\u0308o\u0327",
    "Thai": "ปลาวาฬ",
    "line ends": "a\r\n",
    "all white": " \u3000\u2028",
}


@pytest.mark.parametrize("script", SCRIPTS)
@given(data=st.data())
def test_holding_out_leaves_most_of_any_text_to_train_on(script: str, data: st.DataObject):
    """In a text without spaces near the cut, all but a few characters are held out."""
    alphabet = st.one_of(st.sampled_from(SCRIPTS[script]), st.sampled_from("字a \n\t"))
    text = data.draw(st.text(st.sampled_from(SCRIPTS[script]), min_size=20, max_size=300))
    text = data.draw(st.text(alphabet, max_size=5)) + text
    (train,), (heldout,) = hold_out([text], "train"), hold_out([text], "heldout")
    assert train + heldout == text and unicodedata.normalize("NFC", train + heldout) == unicodedata.normalize(
        "NFC", text
    )
    assert 1 <= len(text) // 20 <= len(heldout) <= len(text) // 20 + len(text) // 10
    assert len(train) >= len(text) * 0.85


def test_a_text_without_spaces_is_cut_where_the_share_says():
    text = "一 " + "字" * 998
    (train,), (heldout,) = hold_out([text], "train"), hold_out([text], "heldout")
    assert (len(train), len(heldout)) == (950, 50) and train + heldout == text


@pytest.mark.parametrize("text", ["a", "a b", "x" * 19])
def test_a_very_short_text_is_trained_on_whole(text: str):
    assert (list(hold_out([text], "train")), list(hold_out([text], "heldout"))) == ([text], [])


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


def test_damage_is_named(words: Packed):
    folder = words.folder
    with pytest.raises(UserError, match="no split 'test' .it has train."):
        Packed.open(folder, "test")

    whole = (folder / "train.bin").read_bytes()
    (folder / "train.bin").write_bytes(b"\x05" + whole[1:])
    with pytest.raises(UserError, match="train.bin has changed since it was written"):
        Packed.open(folder, "train")
    (folder / "train.bin").write_bytes(whole[:-1])
    with pytest.raises(UserError, match=f"train.bin has {len(whole) - 1} bytes instead of {len(whole)}"):
        Packed.open(folder, "train")
    (folder / "train.bin").unlink()
    with pytest.raises(UserError, match="train.bin is missing"):
        Packed.open(folder, "train")
    for manifest in (b"{", b"[]", b"null", b"3", b'"x"', b"[" * 200_000, b'{"a":' * 200_000, b"\xff", b"", b"{}"):
        (folder / "manifest.json").write_bytes(manifest)
        with pytest.raises(UserError, match="manifest.json (is not|must hold|has changed)") as caught:
            Packed.open(folder, "train")
        assert "\n" not in str(caught.value)
    for number in (1, 99, None, "2", [2]):  # 1: what was written before files had digests
        (folder / "manifest.json").write_text(json.dumps({"format": number}))
        with pytest.raises(UserError, match=f"has format .*, not {FORMAT}, as another version of dsv4 wrote it"):
            Packed.open(folder, "train")


def resigned(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change a manifest as somebody would who also brings its digests up to date."""
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    manifest.pop("sha256")
    manifest["sha256"] = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *itertools.product(("documents", "tokens", "text_bytes", "max_id"), ("12", -1, True, None, 1.5, [], 2**70)),
        *itertools.product(("sha256", "idx_sha256", "text_sha256"), (None, 3, [])),
        *itertools.product(("dtype",), ("<f2", "<i2", ">u2", 2, None, "<u4", "O")),
        ("documents", 0),
        ("documents", 7),
        ("tokens", 1),
        ("max_id", 258),
        ("max_id", 100),
    ],
)
def test_impossible_facts_are_refused_whatever_the_digest_says(words: Packed, key: str, value: Any):
    if key == "text_bytes" and value == 2**70:
        value = -(2**70)  # a large number is only large
    resigned(words.folder, lambda manifest: manifest["splits"]["train"].update({key: value}))
    with pytest.raises(UserError, match="has changed since it was written|bytes instead of|impossible offsets"):
        Packed.open(words.folder, "train")


@pytest.mark.parametrize(
    "changes",
    [
        {"splits": []}, {"splits": None}, {"splits": {"train": []}}, {"files": []}, {"files": {}}, {"tokenizer": 3},
        {"files": {"token_bytes.bin": None}}, {"files": {"../token_bytes.bin": ""}}, {"vocab_size": "258"},
        {"vocab_size": 2**70}, {"vocab_size": 0},
    ],
)  # fmt: skip
def test_a_manifest_of_the_wrong_types_is_refused(words: Packed, changes: dict[str, Any]):
    resigned(words.folder, lambda manifest: manifest.update(changes))
    with pytest.raises(UserError):
        Packed.open(words.folder, "train")


@pytest.mark.parametrize("ends", ["0 1", "first", "back", "same", "beyond", "huge"])
def test_impossible_offsets_are_refused_whatever_the_digest_says(words: Packed, ends: str):
    """Offsets that do not increase cut other texts, or hang the reader for a minute."""
    found = np.array(words.ends)
    found[{"first": 0, "beyond": -1, "huge": 3}.get(ends, 2)] = {
        "0 1": found[1] + 1, "first": 1, "back": found[1] - 1, "same": found[1], "beyond": found[-1] + 2, "huge": 2**62,
    }[ends]  # fmt: skip
    raw = found.astype("<i8").tobytes()
    (words.folder / "train.idx").write_bytes(raw)
    facts = {"idx_sha256": hashlib.sha256(raw).hexdigest()}
    resigned(words.folder, lambda manifest: manifest["splits"]["train"].update(facts))
    with pytest.raises(UserError, match="train.idx holds impossible offsets"):
        Packed.open(words.folder, "train")


def test_checking_says_how_far_it_is(words: Packed):
    told: list[int] = []
    Packed.open(words.folder, "train", told.append)
    assert told[-1] == (words.folder / "train.bin").stat().st_size


# --- the data of a run ---


def settings(path: Path | str = "", heldout: Path | str = "", tokenizer: str = "bytes", **others: Any) -> RunConfig:
    run = RECIPES["tiny"]()
    data = DataConfig(str(path), str(heldout), tokenizer=tokenizer, seq_len=32, tokens_per_step=64, **others)
    return replace(run, data=data)


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """A folder of three texts."""
    folder = tmp_path / "texts"
    folder.mkdir()
    for n in range(3):
        (folder / f"{n}.txt").write_text(f"text {n}: the whale and the sea. " * 5)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def text_of(packed: Packed) -> list[str]:
    return [ByteTokenizer().decode(packed.document(n)) for n in range(packed.num_documents)]


def test_files_of_the_held_out_source_are_not_trained_on(texts: Path, tmp_path: Path, said: Callable[[], list[str]]):
    """The held-out file inside the data folder, or a link to it there, is trained on."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "h.txt").write_text("held out")
    (texts / "soft.txt").symlink_to(outside / "h.txt")
    os.link(outside / "h.txt", texts / "hard.txt")
    _, train, heldout = prepare_data(settings(texts, outside / "h.txt"), tmp_path / "run")
    assert text_of(heldout) == ["held out"] and len(text_of(train)) == 3 and "held out" not in text_of(train)
    (sentence,) = said()
    assert "not trained on" in sentence and "soft.txt" in sentence and "hard.txt" in sentence
    _, train, heldout = prepare_data(settings(texts, texts / "1.txt"), tmp_path / "run2")
    assert len(text_of(train)) == 4 and text_of(heldout) == [(texts / "1.txt").read_text()]


def test_a_held_out_source_that_is_the_training_source_is_refused(texts: Path, tmp_path: Path):
    (tmp_path / "same").symlink_to(texts)
    for heldout in (texts, tmp_path / "same", f"{texts}/../texts"):
        with pytest.raises(UserError, match="is data.path itself"):
            prepare_data(settings(texts, heldout), tmp_path / "run")
    for path, heldout in ((texts / "1.txt", texts), (texts, tmp_path)):
        with pytest.raises(UserError, match="leaves nothing to train on"):
            prepare_data(settings(path, heldout), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_held_out_source_goes_with_the_embedded_corpus(texts: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """data.heldout is ignored without a word when data.path is empty."""
    monkeypatch.setattr(corpus, "documents", lambda split: iter([f"embedded {split}"]))
    _, train, heldout = prepare_data(settings("", texts / "0.txt"), tmp_path / "run")
    assert text_of(train) == ["embedded train"] and text_of(heldout) == [(texts / "0.txt").read_text()]


def test_text_too_short_to_hold_anything_out_is_refused(tmp_path: Path):
    (tmp_path / "a.txt").write_text("short")
    with pytest.raises(UserError, match="no text can be held out of .*a.txt"):
        prepare_data(settings(tmp_path / "a.txt"), tmp_path / "run")
    assert not any((tmp_path / "run").iterdir())


def test_held_out_text_without_bytes_is_refused(tmp_path: Path):
    """Evaluation would divide by zero."""
    from tokenizers import Tokenizer as Library
    from tokenizers import models, pre_tokenizers

    library = Library(models.WordLevel({"<s>": 0, "</s>": 1, "<unk>": 2, "a": 3}, unk_token="<unk>"))
    library.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    library.add_special_tokens(["<s>", "</s>", "<unk>"])
    library.save(str(tmp_path / "tokenizer.json"))
    for name, text in (("train.txt", "a a"), ("heldout.txt", "other words")):
        (tmp_path / name).write_text(text)
    run = settings(tmp_path / "train.txt", tmp_path / "heldout.txt", str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match="the held-out text has no token that stands for any bytes"):
        prepare_data(run, tmp_path / "run")


def test_every_changed_bit_of_prepared_data_is_noticed(texts: Path, tmp_path: Path):
    """Any file of the folder: the data are refused, or are the same (white space in a small file)."""
    run, folder = settings(texts), tmp_path / "run"
    before = [(packed.facts, packed.tokens.tolist()) for packed in prepare_data(run, folder)[1:]]
    draw, names = random.Random(0), sorted(contents(folder / "data"))
    assert len(names) == 8
    refused = 0
    for number in range(350):
        file = folder / "data" / names[number % len(names)]
        whole = file.read_bytes()
        at = draw.randrange(len(whole))
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << draw.randrange(8)]) + whole[at + 1 :])
        try:
            after = [(p.facts, p.tokens.tolist()) for p in prepare_data(run, folder, resuming=True)[1:]]
        except UserError as error:
            refused += 1
            assert "\n" not in str(error) and str(folder) in str(error)
        else:
            assert after == before and file.name == "manifest.json"
        file.write_bytes(whole)
    assert refused > 340
    for name in names:
        file = folder / "data" / name
        whole = file.read_bytes()
        file.unlink()
        with pytest.raises(UserError):
            prepare_data(run, folder, resuming=True)
        file.write_bytes(whole)


def test_mutated_manifests_are_one_sentence(texts: Path, tmp_path: Path):
    """300 of them: values of other types, lost and doubled parts, with a digest that fits and without."""
    run, folder = settings(texts), tmp_path / "run"
    before = [(packed.facts, packed.tokens.tolist()) for packed in prepare_data(run, folder)[1:]]
    file = folder / "data" / "manifest.json"
    whole, draw = file.read_bytes(), random.Random(0)
    values = [None, [], {}, "", "x", -1, 0, 3, True, 1e300, 2**63, 2**200, [[]], {"a": 1}]

    def place(value: Any) -> Iterator[tuple[Any, Any]]:
        if isinstance(value, dict):
            for key in value:
                yield value, key
                yield from place(value[key])

    for number in range(300):
        file.write_bytes(whole)
        if number % 3:
            holder, key = draw.choice(list(place(manifest := json.loads(whole))))
            if draw.random() < 0.2:
                del holder[key]
            else:
                holder[key] = draw.choice(values)
            if number % 3 == 1:
                file.write_text(json.dumps(manifest))
                resigned(folder / "data", lambda found: found.setdefault("sha256", ""))
            else:
                file.write_text(json.dumps(manifest))
        else:
            a, b = sorted(draw.randrange(len(whole)) for _ in range(2))
            file.write_bytes(draw.choice([whole[:a], whole[:a] + whole[b:], whole[:b] + whole[a:], draw.randbytes(a)]))
        try:
            after = [(p.facts, p.tokens.tolist()) for p in prepare_data(run, folder, resuming=True)[1:]]
        except UserError as error:
            assert "\n" not in str(error)
        else:  # with a digest that fits, a manifest may say that the text had another length or digest
            assert [tokens for _, tokens in after] == [tokens for _, tokens in before]
            assert after == before or number % 3 == 1


def prepared_in_a_child(run: RunConfig, folder: Path, stop_at: int) -> bool:
    """Prepare in a forked process that is killed at its file operation number `stop_at`; whether it finished before."""
    child = os.fork()
    if child == 0:
        count = 0

        def counted(operation: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                nonlocal count
                count += 1
                if count == stop_at:
                    os.kill(os.getpid(), signal.SIGKILL)
                return operation(*args, **kwargs)

            return call

        for name in ("mkdir", "replace", "rename", "fsync", "rmdir", "unlink"):
            setattr(os, name, counted(getattr(os, name)))
        io.open, write = counted(io.open), Path.write_bytes
        Path.write_bytes = counted(write)  # type: ignore[method-assign]
        try:
            prepare_data(run, folder)
            os._exit(0)
        finally:
            os._exit(1)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, -signal.SIGKILL)
    return code == 0


def test_a_preparation_killed_at_any_moment_can_be_repeated(texts: Path, tmp_path: Path):
    """A killed preparation blocks its folder for ever, or leaves half of the data to be used."""
    run = settings(texts)
    prepare_data(run, tmp_path / "whole")
    right = contents(tmp_path / "whole")
    for stop_at in range(1, 1000):
        folder = tmp_path / f"run{stop_at}"
        finished = prepared_in_a_child(run, folder, stop_at)
        left = contents(folder)
        assert not (folder / "data").exists() or {n: left[n] for n in right} == right
        prepare_data(run, folder)
        assert contents(folder) == right
        if finished:
            break
        shutil.rmtree(folder)
    assert 40 < stop_at < 900


@pytest.mark.parametrize("bad", ["heldout", "train"])
def test_a_preparation_that_failed_can_be_repeated(texts: Path, tmp_path: Path, bad: str):
    """The split that did succeed stays behind, and refuses all that comes after."""
    heldout = tmp_path / "h.txt"
    heldout.write_text("held out")
    broken = heldout if bad == "heldout" else texts / "1.txt"
    whole = broken.read_bytes()
    broken.write_bytes(b"fine\nb\xffd")
    for _ in range(2):
        with pytest.raises(UserError, match="line 2 of .* is not UTF-8"):
            prepare_data(settings(texts, heldout), tmp_path / "run")
        assert not any((tmp_path / "run").iterdir())
    broken.write_bytes(whole)
    assert text_of(prepare_data(settings(texts, heldout), tmp_path / "run")[2]) == ["held out"]


def test_what_a_killed_preparation_left_is_not_used(texts: Path, tmp_path: Path):
    """It may have been made for other settings, from other texts."""
    prepare_data(settings(texts), tmp_path / "run")
    (tmp_path / "run" / "data").rename(tmp_path / "run" / ".data.tmp")
    (tmp_path / "run" / ".data.tmp" / "stray").touch()
    (texts / "1.txt").write_text("other text " * 9)
    made = prepare_data(settings(texts, tokenizer="bpe"), tmp_path / "run")
    assert made[0].vocab_size > 258 and not (tmp_path / "run" / "data" / "stray").exists()
    assert [file.name for file in (tmp_path / "run").iterdir()] == ["data"]


def test_a_disk_that_fills_up_at_any_write_is_one_sentence(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run, synchronise = settings(texts), dsv4_files.synchronise
    for fails_at in range(1, 100):
        count = 0

        def full(path: Path, fails_at: int = fails_at) -> None:
            nonlocal count
            count += 1
            if count == fails_at:
                raise OSError(28, "No space left on device")
            synchronise(path)

        with monkeypatch.context() as patch:
            patch.setattr(dsv4_files, "synchronise", full)
            patch.setattr(rundata, "synchronise", full)
            try:
                prepare_data(run, tmp_path / f"run{fails_at}")
                break
            except FileError as error:
                assert "No space left on device" in str(error) and "\n" not in str(error)
        prepare_data(run, tmp_path / f"run{fails_at}")
    assert 10 < fails_at < 99


def test_something_else_in_the_place_of_the_data_is_left_alone(texts: Path, tmp_path: Path):
    for name, make in (("file", Path.touch), ("own", lambda path: (path.mkdir(), (path / "mine.txt").touch()))):
        folder = tmp_path / name
        folder.mkdir()
        make(folder / "data")
        with pytest.raises(UserError, match="data is no finished preparation .* move it away"):
            prepare_data(settings(texts), folder)
        assert (folder / "data").exists()
        shutil.move(folder / "data", tmp_path / f"{name} moved")
        prepare_data(settings(texts), folder)
    (tmp_path / "empty" / "data").mkdir(parents=True)
    prepare_data(settings(texts), tmp_path / "empty")
    (tmp_path / "in the way").touch()
    with pytest.raises(UserError, match="in the way"):
        prepare_data(settings(texts), tmp_path / "in the way")


def test_a_run_goes_on_without_its_texts_and_from_anywhere(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    train_bpe(["the whale " * 50], 300).save(tmp_path / "own")
    for tokenizer in ("bytes", "bpe", "own"):
        run = settings("texts", tokenizer=tokenizer)
        run = replace(run, data=absolute(run.data))
        first = prepare_data(run, tmp_path / f"run-{tokenizer}")
        shutil.move(tmp_path / "texts", tmp_path / "moved")
        shutil.move(tmp_path / f"run-{tokenizer}", tmp_path / f"gone-{tokenizer}")
        again = prepare_data(run, tmp_path / f"gone-{tokenizer}", resuming=True)
        assert [p.tokens.tolist() for p in again[1:]] == [p.tokens.tolist() for p in first[1:]]
        with pytest.raises(UserError, match="no file or folder"):
            prepare_data(run, tmp_path / f"gone-{tokenizer}")
        shutil.move(tmp_path / "moved", tmp_path / "texts")
        for kept in contents(tmp_path / f"gone-{tokenizer}").values():
            assert str(tmp_path).encode() not in kept
    with pytest.raises(UserError, match="holds no prepared data"):
        prepare_data(run, tmp_path / "nothing", resuming=True)


def test_the_same_texts_are_trusted_by_name_size_and_time(texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run = settings(texts)
    prepare_data(run, tmp_path / "run")
    read = sources.READERS[".txt"]
    seen: list[str] = []
    monkeypatch.setitem(sources.READERS, ".txt", lambda file, field: (seen.append(file.name), read(file, field))[1])
    prepare_data(run, tmp_path / "run")
    assert seen == []
    os.utime(texts / "1.txt", (1, 1))
    prepare_data(run, tmp_path / "run")
    assert set(seen) == {"0.txt", "1.txt", "2.txt"}
    before = contents(tmp_path / "run")
    (texts / "1.txt").write_text("other")
    with pytest.raises(UserError, match="the train split in .* was made from other text"):
        prepare_data(run, tmp_path / "run")
    assert contents(tmp_path / "run") == before


def test_data_made_for_other_settings_are_refused(texts: Path, tmp_path: Path):
    prepare_data(settings(texts), tmp_path / "run")
    train_bpe(["the whale " * 50], 300).save(tmp_path / "own")
    for other in (settings(texts, tokenizer="bpe"), settings(texts, tokenizer=str(tmp_path / "own"))):
        with pytest.raises(UserError, match="was prepared for .*bytes.*: choose another --out"):
            prepare_data(other, tmp_path / "run")
    (tmp_path / "h.txt").write_text("of its own")
    with pytest.raises(UserError, match="split in .* was made from other text"):
        prepare_data(settings(texts, tmp_path / "h.txt"), tmp_path / "run")


def test_a_given_tokenizer_is_known_by_what_it_does_and_not_by_its_place(texts: Path, tmp_path: Path):
    train_bpe(["the whale " * 50], 300).save(tmp_path / "own")
    prepare_data(settings(texts, tokenizer=str(tmp_path / "own")), tmp_path / "run")
    shutil.move(tmp_path / "own", tmp_path / "moved")
    prepare_data(settings(texts, tokenizer=str(tmp_path / "moved")), tmp_path / "run")


def test_progress_is_told_in_bytes_of_the_sources(texts: Path, tmp_path: Path):
    told: list[tuple[str, int, int | None]] = []
    size = sum(file.stat().st_size for file in texts.iterdir())
    prepare_data(settings(texts, tokenizer="bpe"), tmp_path / "run", on_progress=lambda *at: told.append(at))
    stages = list(dict.fromkeys(what for what, _, _ in told))
    assert stages == [
        "learning the vocabulary", "tokenising train", "tokenising heldout", "checking train", "checking heldout",
    ]  # fmt: skip
    for stage in stages:
        done = [(done, total) for what, done, total in told if what == stage]
        assert done == sorted(done) and done[0][0] == 0 and len({total for _, total in done}) == 1
        if stage != "learning the vocabulary":  # only of the train split, so less than what there is to read
            assert done[-1][0] == done[-1][1]
        if stage.startswith("tokenising"):
            assert done[-1][1] == size
    told.clear()
    os.utime(texts / "1.txt", (1, 1))
    prepare_data(settings(texts, tokenizer="bpe"), tmp_path / "run", on_progress=lambda *at: told.append(at))
    assert {"reading train", "reading heldout"} <= {what for what, _, _ in told}


def test_paths_are_made_absolute_and_mean_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    data = absolute(DataConfig(path="a/../b 🐳", heldout="/c", tokenizer="t/tokenizer.json"))
    here = os.getcwd()
    assert (data.path, data.heldout, data.tokenizer) == (f"{here}/a/../b 🐳", "/c", f"{here}/t/tokenizer.json")
    for kept in (DataConfig(), DataConfig(tokenizer="bytes"), data):
        assert absolute(kept) == kept
    for name in ("path", "heldout", "tokenizer"):
        with pytest.raises(UserError, match=f"data.{name}='b.udcff' is not a name in UTF-8"):
            absolute(DataConfig(**{name: "b\udcff"}))


def test_a_damaged_corpus_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    whole = (files("dsv4.data") / "corpus.heldout.jsonl.xz").read_bytes()
    monkeypatch.setattr(corpus, "files", lambda name: tmp_path)
    with pytest.raises(FileError, match="embedded corpus.*install dsv4 again"):
        corpus.facts()
    (tmp_path / "corpus.json").write_bytes(b"{")
    with pytest.raises(FileError, match="embedded corpus.*install dsv4 again"):
        corpus.facts()
    for raw in (whole[:5000], whole[:5000] + b"\0" + whole[5001:], b"x" * 50, lzma.compress(b"{")):
        (tmp_path / "corpus.heldout.jsonl.xz").write_bytes(raw)
        with pytest.raises(FileError, match="embedded corpus.*install dsv4 again"):
            list(corpus.documents("heldout"))


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
                assert target == IGNORE
            elif token == 0:
                assert target in firsts
            else:
                assert target == following[token]
        at += length
    sizes = packed.token_bytes
    assert batch.num_bytes == sum(int(sizes[t]) for t in targets if t != IGNORE)


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


@given(shape=shapes, count=st.integers(1, 12))
def test_the_parts_of_a_batch_are_the_batch(pack, shape, count: int):
    lengths, tokens_per_batch, seq_len, seed = shape
    packed = pack(lengths)
    batch = Batches(packed, tokens_per_batch, seed, seq_len).batch(0)
    parts = split_batch(batch, count)
    assert 1 <= len(parts) <= min(count, len(batch.lengths))
    for part in parts:
        check_batch(part, packed, seq_len)
    assert torch.equal(torch.cat([part.ids for part in parts]), batch.ids)
    assert torch.equal(torch.cat([part.targets for part in parts]), batch.targets)
    assert [n for part in parts for n in part.lengths] == batch.lengths
    assert sum(part.num_bytes for part in parts) == batch.num_bytes
    borders = list(itertools.accumulate(batch.lengths, initial=0))
    cuts = set(itertools.accumulate((len(part.ids) for part in parts), initial=0))
    for share in range(1, count):  # each share of the tokens has a cut as near as a border can be
        at = len(batch.ids) * share / count
        assert min(abs(cut - at) for cut in cuts) == min(abs(border - at) for border in borders)


def test_a_batch_is_split_at_segments_alone():
    whole = batch_of([(0, 2)] * 4, 3)
    assert split_batch(whole, 8) == [whole]  # one segment
    ids = torch.arange(10)
    batch = Batch(ids, ids, [1, 1, 1, 5, 1, 1], 6, (1, 0, 2, 0, 3, 0))
    assert [(part.lengths, part.num_bytes) for part in split_batch(batch, 2)] == [([1, 1, 1], 3), ([5, 1, 1], 3)]
    assert [part.lengths for part in split_batch(batch, 3)] == [[1, 1, 1], [5], [1, 1]]
    assert [part.lengths for part in split_batch(batch, 99)] == [[n] for n in batch.lengths]
    assert split_batch(batch, 1) == [batch]


@given(shape=shapes)
def test_evaluation_takes_every_token_in_order(pack, shape):
    lengths, tokens_per_batch, seq_len, _ = shape
    packed = pack(lengths)
    batches = list(heldout_batches(packed, tokens_per_batch, seq_len))
    assert line_of(batches) == packed.tokens.tolist()
    assert [len(b.ids) for b in batches[:-1]] == [tokens_per_batch] * (len(batches) - 1)
    assert sum((b.targets == IGNORE).sum() for b in batches) == packed.num_documents
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
    train = [batch_of([(0, 2), (2, 3), (3, 2)], 0), batch_of([(2, 1), (1, IGNORE)], 0)]
    # Four targets 2, 3, 2, 1: add-one gives P1 = (0+1, 1+1, 2+1, 1+1) / 8.
    heldout = [batch_of([(0, 2), (2, 2), (1, 3), (1, IGNORE)], 5)]
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
