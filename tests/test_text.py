"""Tokenizers lose nothing: text -> ids -> text, whole and streamed, trained, saved, loaded and published."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Library

from dsv4.errors import FileError, UserError
from dsv4.text import BPETokenizer, ByteTokenizer, StreamDecoder, Tokenizer, load_tokenizer, train_bpe
from dsv4.text.tokenizer import BOS, EOS, WORD_CHARS

SAMPLE = "the whale, the white whale! In 1851 there were 20,000 whales; naïve whalers sang “ahoy” 🐳. " * 20
BYTES = ByteTokenizer()
BPE = train_bpe([SAMPLE], 400)
BOTH = [BYTES, BPE]
both = pytest.mark.parametrize("tokenizer", BOTH, ids=["bytes", "bpe"])


def spaced_tokenizer() -> BPETokenizer:
    """As many a published one: not byte-level, ▁ for spaces, bytes for what the vocabulary lacks."""
    words = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *"▁abcdefghij", "▁a", "▁ab"]
    merges = [("▁", "a"), ("▁a", "b")]
    model = models.BPE({w: i for i, w in enumerate(words)}, merges, unk_token="<unk>", byte_fallback=True)
    library = Library(model)
    library.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    replace, strip = decoders.Replace("▁", " "), decoders.Strip(" ", 1, 0)
    library.decoder = decoders.Sequence([replace, decoders.ByteFallback(), decoders.Fuse(), strip])
    library.add_special_tokens(["<s>", "</s>"])
    return BPETokenizer(library.to_str())


def streamed(tokenizer: Tokenizer, ids: list[int]) -> str:
    decoder = StreamDecoder(tokenizer)
    return "".join(decoder.push(i) for i in ids) + decoder.flush()


# --- there and back ---


def test_the_byte_layout_is_fixed():
    assert BYTES.encode("A\n") == [ord("A") + 2, ord("\n") + 2]
    assert (BYTES.bos_id, BYTES.eos_id, BYTES.vocab_size) == (0, 1, 258)


def test_bpe_has_the_published_special_tokens_first():
    assert (BPE.bos_id, BPE.eos_id) == (0, 1)
    assert BPE.encode(BOS + EOS, special=True) == [0, 1]
    assert BPE.vocab_size <= 400 and max(BPE.encode(SAMPLE)) < BPE.vocab_size


@both
@given(text=st.text())
def test_every_text_survives(tokenizer: Tokenizer, text: str):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.bytes_of(ids) == len(text.encode())
    assert not {tokenizer.bos_id, tokenizer.eos_id} & set(ids)


@both
@given(texts=st.lists(st.text(max_size=20), max_size=5))
def test_a_batch_is_its_texts(tokenizer: Tokenizer, texts: list[str]):
    assert tokenizer.encode_batch(texts) == [tokenizer.encode(text) for text in texts]


@both
def test_a_text_cannot_spell_a_special_token(tokenizer: Tokenizer):
    text = f"ignore this {EOS} and {BOS} go on"
    ids = tokenizer.encode(text)
    assert not {0, 1} & set(ids)
    assert tokenizer.decode(ids) == text


@both
def test_special_tokens_are_skipped_unless_asked_for(tokenizer: Tokenizer):
    ids = [0, *tokenizer.encode("ahoy"), 1]
    assert tokenizer.decode(ids) == "ahoy"
    assert tokenizer.decode(ids, skip_special=False) == f"{BOS}ahoy{EOS}"
    assert tokenizer.bytes_of(ids) == 4


@both
def test_ids_without_a_token_and_broken_utf8_show_as_such(tokenizer: Tokenizer):
    assert tokenizer.decode([*tokenizer.encode("a"), tokenizer.vocab_size + 5, -1]) == "a\ufffd\ufffd"
    lone = tokenizer.token_table.index(b"\xff")
    assert tokenizer.decode([lone]) == "\ufffd"


@given(text=st.text())
def test_bpe_decodes_as_the_library_does(text: str):
    library = Library.from_str(BPE.to_json())
    ids = BPE.encode(text)
    assert library.decode(ids) == BPE.decode(ids)


def test_token_bytes_are_one_number_per_id():
    for tokenizer in BOTH:
        sizes = tokenizer.token_bytes()
        assert len(sizes) == tokenizer.vocab_size and sizes[:2] == [0, 0] and min(sizes[2:]) >= 1


@both
def test_half_a_surrogate_pair_is_refused(tokenizer: Tokenizer):
    with pytest.raises(UserError, match="U\\+D83D at character 2"):
        tokenizer.encode("ab\ud83d")


# --- streaming ---


@both
@given(text=st.text())
def test_streamed_text_is_the_text(tokenizer: Tokenizer, text: str):
    assert streamed(tokenizer, tokenizer.encode(text)) == text


@both
@given(data=st.data())
def test_streaming_any_ids_is_decoding_them(tokenizer: Tokenizer, data: st.DataObject):
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 3), max_size=40))
    assert streamed(tokenizer, ids) == tokenizer.decode(ids)


@given(text=st.text(alphabet="abé🐳 k"))
def test_streaming_a_vocabulary_with_spaces_is_decoding_it(text: str):
    tokenizer = spaced_tokenizer()
    ids = tokenizer.encode(text)
    assert streamed(tokenizer, ids) == tokenizer.decode(ids) == text


def test_words_of_a_vocabulary_with_spaces_come_out_one_by_one():
    tokenizer = spaced_tokenizer()
    decoder = StreamDecoder(tokenizer)
    assert [decoder.push(i) for i in tokenizer.encode("ab a é")] == ["ab", " a", " ", "", "é"]


def test_a_split_character_comes_out_when_it_is_complete():
    decoder = StreamDecoder(BYTES)
    assert [decoder.push(i) for i in BYTES.encode("é🐳!")] == ["", "é", "", "", "", "🐳", "!"]
    assert [decoder.push(i) for i in BYTES.encode("🐳")[:2]] == ["", ""]
    assert decoder.flush() == "\ufffd"
    assert decoder.push(BYTES.encode("a")[0]) + decoder.flush() == "a"


# --- training ---


def test_training_is_deterministic_and_compresses():
    again = train_bpe(iter([SAMPLE]), 400)
    assert again.fingerprint() == BPE.fingerprint()
    assert len(BPE.encode(SAMPLE)) * 3 < len(SAMPLE.encode())


def test_no_token_holds_more_than_three_digits():
    tokenizer = train_bpe(["1851 1851 1851 20000 20000"] * 50, 400)
    assert max(sum(chr(b).isdigit() for b in piece) for piece in tokenizer.token_table) == 3


runs = st.sampled_from(["a", "é", "字", "-", "\u0301", " ", "\n", "\t", "7", "🐳"]).flatmap(
    lambda character: st.integers(1, 3 * WORD_CHARS).map(lambda n: character * n)
)


@given(parts=st.lists(runs, max_size=6))
def test_no_word_is_longer_than_the_bound(parts: list[str]):
    """A text without word breaks is one word, and learning from it takes the square of its length: for ever."""
    text = "".join(parts)
    words = Library.from_str(BPE.to_json()).pre_tokenizer.pre_tokenize_str(text)
    assert "".join(text[start:end] for _, (start, end) in words) == text
    assert all(end - start <= WORD_CHARS + 1 for _, (start, end) in words)  # a word keeps the space before it
    assert BPE.decode(BPE.encode(text)) == text


@given(text=st.text(st.sampled_from("ab é字-.!'\n\t 7s"), max_size=WORD_CHARS - 1))
def test_the_bound_changes_nothing_where_no_run_is_long(text: str):
    spec = json.loads(BPE.to_json())
    bound = spec["pre_tokenizer"]["pretokenizers"].pop(0)
    assert str(WORD_CHARS) in bound["pattern"]["Regex"]
    without = BPETokenizer(json.dumps(spec))
    assert BPE.encode(f"{text} whales {text}") == without.encode(f"{text} whales {text}")


def test_a_vocabulary_is_learned_from_text_without_word_breaks():
    """Half a megabyte of unbroken letters took minutes, quietly."""
    letters = "".join(random.Random(0).choices("abcdefgh", k=1 << 19))
    tokenizer = train_bpe([letters], 400)
    assert tokenizer.vocab_size == 400 and tokenizer.decode(tokenizer.encode(letters)) == letters


@pytest.mark.parametrize("vocab_size", [-1, 0, 257])
def test_a_vocabulary_without_room_for_the_bytes_is_refused(vocab_size: int):
    with pytest.raises(UserError, match=f"{vocab_size} is too small.*at least 258"):
        train_bpe([SAMPLE], vocab_size)


@pytest.mark.parametrize("texts", [[], ["", ""]])
def test_training_on_nothing_is_refused(texts: list[str]):
    with pytest.raises(UserError, match="no text to train"):
        train_bpe(texts, 300)


# --- files ---


@both
def test_saved_is_loaded(tokenizer: Tokenizer, tmp_path: Path):
    file = tokenizer.save(tmp_path / "run")
    for place in (file, file.parent, str(file.parent)):
        loaded = load_tokenizer(place)
        assert type(loaded) is type(tokenizer)
        assert loaded.fingerprint() == tokenizer.fingerprint()
        assert loaded.encode(SAMPLE) == tokenizer.encode(SAMPLE)
    assert not [f for f in file.parent.iterdir() if f.name.endswith(".tmp")]


def test_fingerprints_tell_tokenizers_apart_and_ignore_layout():
    other = train_bpe([SAMPLE], 300)
    assert len({BYTES.fingerprint(), BPE.fingerprint(), other.fingerprint()}) == 3
    indented = BPETokenizer(json.dumps(json.loads(BPE.to_json()), indent=4))
    assert indented.fingerprint() == BPE.fingerprint()


def test_transformers_loads_a_saved_folder(tmp_path: Path):
    from transformers import PreTrainedTokenizerFast

    BPE.save(tmp_path)
    theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    for text in (SAMPLE, "x" * 200 + "-" * 200 + " " * 200 + "x"):  # the bound on words is in the file
        assert theirs.encode(text, add_special_tokens=False) == BPE.encode(text)
    assert (theirs.bos_token_id, theirs.eos_token_id) == (0, 1)


def test_a_published_folder_keeps_its_own_special_tokens(tmp_path: Path):
    library = Library.from_str(BPE.to_json())
    library.add_special_tokens(["<start>", "<stop>"])
    library.add_tokens([AddedToken("<｜User｜>", special=False)])
    library.enable_truncation(4)
    library.enable_padding(length=64)
    library.save(str(tmp_path / "tokenizer.json"))
    config = {"bos_token": {"content": "<start>", "lstrip": False}, "eos_token": "<stop>", "chat_template": "x"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))

    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (BPE.vocab_size, BPE.vocab_size + 1)
    assert len(tokenizer.encode(SAMPLE)) > 64  # neither truncated nor padded
    assert len(tokenizer.encode("<｜User｜>")) > 1, "a text is text, also where the file calls the token not special"
    user = tokenizer.encode("<｜User｜>", special=True)
    assert len(user) == 1 and tokenizer.decode(user) == "<｜User｜>" and streamed(tokenizer, user) == "<｜User｜>"

    tokenizer.save(tmp_path / "copy")
    again = load_tokenizer(tmp_path / "copy")
    assert (again.bos_id, again.eos_id) == (tokenizer.bos_id, tokenizer.eos_id)
    assert json.loads((tmp_path / "copy" / "tokenizer_config.json").read_text())["chat_template"] == "x"


def test_a_vocabulary_with_spaces_counts_its_bytes():
    tokenizer = spaced_tokenizer()
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.exact_bytes) == (1, 2, False)
    assert tokenizer.bytes_of(tokenizer.encode("ab é")) == len(" ab é".encode())  # it prepends a space


def wordless() -> str:
    library = Library(models.WordLevel({"a": 0}, unk_token="a"))
    library.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    return library.to_str()


@pytest.mark.parametrize(
    ("contents", "says"),
    [
        (b"", "is not valid JSON"),
        (b'{"version": "1.0", "mod', "is not valid JSON"),
        (b"\xff\xfe{}", "is not UTF-8 text"),
        (b"[1, 2]", "must hold a JSON object, not a list"),
        (b"[" * 200_000, "is not valid JSON"),
        (b'{"a":' * 200_000, "is not valid JSON"),
        (b'{"version": "1.0"}', "not a tokenizer"),
        (wordless().encode(), "bos_token"),
    ],
)
def test_a_bad_tokenizer_file_is_one_sentence(tmp_path: Path, contents: bytes, says: str):
    (tmp_path / "tokenizer.json").write_bytes(contents)
    with pytest.raises(UserError, match=says) as caught:
        load_tokenizer(tmp_path)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_config_that_names_a_missing_token_is_refused(tmp_path: Path):
    BPE.save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<nowhere>"}')
    with pytest.raises(UserError, match="eos_token '<nowhere>' is not in its vocabulary"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["", "nowhere", "nowhere/tokenizer.json"])
def test_a_missing_tokenizer_is_named(tmp_path: Path, name: str):
    with pytest.raises(UserError, match="no tokenizer at"):
        load_tokenizer(tmp_path / name)


@pytest.mark.parametrize("named", [3, True, ["</s>"], [], {}, {"content": 3}, {"content": []}, 1.5, {"content": {}}])
@pytest.mark.parametrize("role", ["bos_token", "eos_token"])
def test_a_config_that_names_no_text_as_special_token_is_refused(tmp_path: Path, role: str, named: Any):
    BPE.save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({role: named}))
    if named == {}:  # names nothing
        assert load_tokenizer(tmp_path).eos_id == 1
    else:
        with pytest.raises(UserError, match=f"its {role} is .*, not the text of a token"):
            load_tokenizer(tmp_path)


@pytest.mark.parametrize("contents", [b"[]", b"null", b"3", b"{", b"\xff", b"[" * 200_000, b'{"x": "\\ud83d"}'])
def test_a_bad_config_is_one_sentence(tmp_path: Path, contents: bytes):
    BPE.save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_bytes(contents)
    with pytest.raises(UserError) as caught:
        load_tokenizer(tmp_path)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def mutated(whole: bytes, draw: random.Random) -> bytes:
    """A tokenizer.json with one defect: changed, lost or doubled bytes, or one JSON value that is another."""
    kind, at = draw.randrange(5), draw.randrange(len(whole))
    other = draw.randrange(len(whole))
    if kind == 0:
        return whole[:at] + bytes([whole[at] ^ 1 << draw.randrange(8)]) + whole[at + 1 :]
    if kind == 1:
        return whole[: min(at, other)] + whole[max(at, other) :]
    if kind == 2:
        return whole[:at] + whole[other : other + draw.randrange(1, 30)] + whole[at:]
    if kind == 3:
        return whole[:at] + draw.choice(b'0123456789"abc{}[],:').to_bytes() + whole[at + 1 :]
    spec: Any = json.loads(whole)
    holder: Any = spec
    while True:
        keys = list(holder) if isinstance(holder, dict) else range(len(holder))
        key = draw.choice(keys)
        if not isinstance(holder[key], dict | list) or not holder[key] or draw.random() < 0.2:
            break
        holder = holder[key]
    holder[key] = draw.choice([None, 0, -1, 7, 2**32 - 1, 3_000_000_000, 2**70, 1.5, "", "x", "a", [], {}, True])
    return json.dumps(spec).encode()


def test_a_damaged_tokenizer_is_refused_or_loses_nothing(tmp_path: Path):
    """300 defects: a traceback or a panic of the library, a table of 3e9 rows, or text that does not come back."""
    BPE.save(tmp_path)
    file, draw = tmp_path / "tokenizer.json", random.Random(0)
    whole, refused = file.read_bytes(), 0
    for _ in range(300):
        file.write_bytes(mutated(whole, draw))
        try:
            tokenizer = load_tokenizer(tmp_path)
        except UserError as error:
            refused += 1
            assert str(tmp_path) in str(error) and "\n" not in str(error)
            continue
        for text in (SAMPLE, "".join(map(chr, range(1, 0x500))), "字" * 100 + " 🐳  \n\n it's 12345"):
            assert tokenizer.decode(tokenizer.encode(text)) in (text, " " + text)
        assert len(tokenizer.token_bytes()) == tokenizer.vocab_size < 1 << 20
    assert 100 < refused < 300


def test_tokens_that_share_an_id_are_refused(tmp_path: Path):
    """Two words become the same token, and one of them comes back as the other."""
    BPE.save(tmp_path)
    spec = json.loads((tmp_path / "tokenizer.json").read_text())
    vocab = spec["model"]["vocab"]
    first, second, *_ = (token for token in vocab if vocab[token] > 300)
    vocab[first] = vocab[second]
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(UserError, match="several of its tokens have the same id"):
        load_tokenizer(tmp_path)


def test_a_byte_that_is_missing_is_noticed(tmp_path: Path):
    """Characters with that byte would vanish without a word."""
    spec = json.loads(BPE.to_json())
    lost = "\u0101"  # byte 1 in the byte alphabet
    spec["model"]["vocab"]["lost"] = spec["model"]["vocab"].pop(lost)
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(UserError, match="it loses text: '.x01.*' comes back as"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_that_cannot_be_written_is_one_sentence(tmp_path: Path):
    (tmp_path / "file").touch()
    for tokenizer in BOTH:
        with pytest.raises(FileError, match="cannot make the folder .*file"):
            tokenizer.save(tmp_path / "file")
        (tmp_path / "taken" / "tokenizer.json").mkdir(parents=True, exist_ok=True)
        with pytest.raises(FileError, match="cannot write .*tokenizer.json"):
            tokenizer.save(tmp_path / "taken")
    with pytest.raises(UserError, match="cannot read the tokenizer"):
        load_tokenizer(tmp_path / "taken")
