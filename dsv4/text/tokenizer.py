"""Tokenizers: text -> ids -> text, over the `tokenizers` library and, for bytes, over nothing at all.

Both kinds offer the same few methods. Text is only ever text: a document that happens to spell a special
token does not become that token (pass special=True where a prompt is rendered on purpose), and encoding adds
neither bos nor eos. Decoding a stream token by token is stream.py; chat formats are left to others.
"""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

from dsv4.errors import UserError
from dsv4.files import explained, make_folder, parse_json, read_json, read_text, reason_of, write_text

BOS = "<｜begin▁of▁sentence｜>"
EOS = "<｜end▁of▁sentence｜>"
UNKNOWN = "\N{REPLACEMENT CHARACTER}".encode()  # what an id without a token decodes to
SMALLEST_BPE = 2 + 256  # bos, eos and one token for each byte
WORD_CHARS = 64  # longer runs of letters, of signs or of white space are several words to a BPE trained here

REMEDY = "copy or save it again"

# Loading tries a byte-level vocabulary on this: ASCII, then characters with every byte that UTF-8 can hold.
_OTHERS = (*range(0x80, 0xC0), *range(0xC0, 0x800, 0x40), *range(0x800, 0xD800, 0x800), *range(0xE000, 0x10000, 0x800))
PROBE = (
    "".join(map(chr, (*range(128), *_OTHERS, 0x10000, 0x40000, 0x80000, 0xC0000, 0x100000)))
    + " the whale's 1851 whales, whales whales"
)

# The usual names of bos and eos, for a published tokenizer.json without a tokenizer_config.json beside it.
KNOWN_BOS = (BOS, "<|begin_of_text|>", "<s>", "<bos>", "<|endoftext|>", "[CLS]")
KNOWN_EOS = (EOS, "<|end_of_text|>", "</s>", "<eos>", "<|endoftext|>", "[SEP]")


class Tokenizer(ABC):
    """What the rest of dsv4 knows of a tokenizer."""

    bos_id: int
    eos_id: int
    vocab_size: int  # one more than the largest id
    exact_bytes: bool  # decoding is joining the bytes of the tokens, so bytes_of is exact

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Ids of a text. special=True lets the names of special tokens in the text become those tokens."""
        return self.encode_batch([text], special=special)[0]

    @abstractmethod
    def encode_batch(self, texts: Sequence[str], *, special: bool = False) -> list[list[int]]:
        """Ids of each text, in parallel where the library can; UserError for half a surrogate pair."""

    @abstractmethod
    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """Text of ids; broken UTF-8 and ids without a token become U+FFFD, since a model may emit either."""

    @property
    @abstractmethod
    def token_table(self) -> list[bytes]:
        """[vocab_size] UTF-8 bytes that each id stands for; none for special tokens and unused ids."""

    @property
    def markers(self) -> dict[str, int]:
        """Name -> id of the tokens that stand for no text: special ones, and those spelled like one (<think>)."""
        return {}

    def token_id(self, name: str) -> int | None:
        """Id of a marker by its name, None where the vocabulary has none."""
        return self.markers.get(name)

    @abstractmethod
    def to_json(self) -> str:
        """The contents of tokenizer.json."""

    def token_bytes(self) -> list[int]:
        """[vocab_size] number of UTF-8 bytes of each token, for bits per byte (0 for special tokens)."""
        return [len(piece) for piece in self.token_table]

    def bytes_of(self, ids: Iterable[int]) -> int:
        """UTF-8 bytes that the ids stand for, special tokens not counted."""
        return sum(len(self.token_table[i]) for i in ids)

    def fingerprint(self) -> str:
        """sha256 (64 hex digits) of what decides the ids; the layout of the JSON plays no part."""
        facts = json.dumps([json.loads(self.to_json()), self.bos_id, self.eos_id], sort_keys=True)
        return hashlib.sha256(facts.encode()).hexdigest()

    def save(self, folder: str | Path) -> Path:
        """Writes folder/tokenizer.json, which load_tokenizer reads, and returns its path."""
        return _write(Path(folder), "tokenizer.json", self.to_json())


class ByteTokenizer(Tokenizer):
    """Every UTF-8 byte is a token: bos 0, eos 1, byte b is b + 2. Needs no training and no library."""

    bos_id, eos_id, vocab_size, exact_bytes = 0, 1, 258, True

    def encode_batch(self, texts: Sequence[str], *, special: bool = False) -> list[list[int]]:
        return [[byte + 2 for byte in _utf8(text)] for text in texts]  # its special tokens have no spelling

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        return _join(ids, self.token_table, {} if skip_special else {self.bos_id: BOS, self.eos_id: EOS})

    @cached_property
    def token_table(self) -> list[bytes]:
        return [b"", b"", *(bytes([byte]) for byte in range(256))]

    @property
    def markers(self) -> dict[str, int]:
        return {BOS: self.bos_id, EOS: self.eos_id}

    def to_json(self) -> str:
        return '{"dsv4_tokenizer": "bytes"}\n'


class BPETokenizer(Tokenizer):
    """A tokenizer.json of the `tokenizers` library: our own byte-level BPE, or any published one.

    spec: the text of tokenizer.json. config: a published tokenizer_config.json, which names bos and eos;
    without it they are found by their usual names. Anything but a byte-level vocabulary decodes through the
    library, and its token_bytes are an estimate (exact_bytes is False).
    """

    def __init__(self, spec: str, config: dict[str, Any] | None = None):
        from tokenizers import Tokenizer as Library

        self._spec, self._config = spec, dict(config or {})
        self._library = Library.from_str(spec)
        parsed = json.loads(spec)
        self._literal = Library.from_str(_without_markers(spec, parsed))
        self._literal.encode_special_tokens = True  # names of markers in a text stay letters
        for library in (self._library, self._literal):
            library.no_truncation()  # a published file may ask for either; neither may touch our data
            library.no_padding()
        vocab = self._library.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocab.values(), default=-1) + 1
        _check_ids(vocab)
        self.bos_id = _special_id("bos_token", self._config, KNOWN_BOS, vocab)
        self.eos_id = _special_id("eos_token", self._config, KNOWN_EOS, vocab)
        self.exact_bytes = "ByteLevel" in _types(parsed.get("decoder"))
        self._check_that_text_survives(parsed)

    def encode_batch(self, texts: Sequence[str], *, special: bool = False) -> list[list[int]]:
        for text in texts:
            _utf8(text)
        library = self._library if special else self._literal
        return [e.ids for e in library.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        if not self.exact_bytes:
            return self._library.decode(list(ids), skip_special_tokens=skip_special)
        return _join(ids, self.token_table, {} if skip_special else self._special_names)

    @cached_property
    def token_table(self) -> list[bytes]:
        added = self._library.get_added_tokens_decoder()
        table = [b""] * self.vocab_size
        for token, i in self._library.get_vocab(with_added_tokens=True).items():
            if i in added:  # spelled literally, never in the byte alphabet
                table[i] = b"" if added[i].special else added[i].content.encode()
            else:
                table[i] = _byte_level_piece(token) if self.exact_bytes else _estimated_piece(token)
        return table

    @cached_property
    def markers(self) -> dict[str, int]:
        added = self._library.get_added_tokens_decoder()
        return {t.content: i for i, t in added.items() if t.special or _is_marker(t.content)}

    @cached_property
    def _special_names(self) -> dict[int, str]:
        return {i: t.content for i, t in self._library.get_added_tokens_decoder().items() if t.special}

    def _check_that_text_survives(self, spec: dict[str, Any]) -> None:
        """UserError if a byte-level vocabulary does not give back what it was given, as a damaged one may not.

        A normaliser or a prefix space changes text on purpose, and other vocabularies may lack characters: for these
        it is enough that encoding and decoding work.
        """
        ids = self.encode(PROBE)
        back = self.decode(ids)
        if not self.exact_bytes:
            if "ByteLevel" in _types(spec.get("pre_tokenizer")):
                raise UserError("it spells text in bytes but its decoder does not read them; save it again")
        elif back not in (PROBE, " " + PROBE) and _types(spec.get("normalizer")) <= {"Sequence"}:
            pairs = zip(PROBE, back + "\0", strict=False)
            at = next((i for i, (a, b) in enumerate(pairs) if a != b), len(PROBE))
            raise UserError(f"it loses text: {PROBE[at : at + 8]!r} comes back as {back[at : at + 8]!r}; save it again")

    def to_json(self) -> str:
        return self._spec

    def save(self, folder: str | Path) -> Path:
        """Also writes tokenizer_config.json: bos and eos survive, and transformers can load the folder."""
        bos, eos = (self._library.id_to_token(i) for i in (self.bos_id, self.eos_id))
        ours = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": bos, "eos_token": eos}
        config = ours | self._config
        _write(Path(folder), "tokenizer_config.json", json.dumps(config, ensure_ascii=False, indent=2) + "\n")
        return super().save(folder)


def train_bpe(texts: Iterable[str], vocab_size: int, markers: Sequence[str] = ()) -> BPETokenizer:
    """Byte-level BPE learned from texts: bos 0, eos 1, the 256 bytes, then merges in order of discovery.

    Digits are taken in groups of at most three, as the published tokenizer does, so that no number eats the
    vocabulary. A run of more than WORD_CHARS letters, signs or white space is cut into words of that length, as
    merging costs the square of a word's length; tokenizer.json holds that rule. The same texts give the same
    tokenizer. vocab_size counts everything; fewer tokens come back when the texts run out of pairs that occur twice.
    markers: names of more special tokens, which follow eos. UserError for a vocab_size without room for these, bos,
    eos and the bytes (258 without markers), and for no text.
    """
    from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
    from tokenizers import Tokenizer as Library

    smallest = SMALLEST_BPE + len(markers)
    if vocab_size < smallest:
        raise UserError(
            f"a BPE vocabulary of {vocab_size} is too small: it must hold {2 + len(markers)} special tokens and 256 "
            f"bytes; ask for at least {smallest}{'' if markers else ', or use the byte tokenizer'}"
        )
    library = Library(models.BPE())
    n = WORD_CHARS  # a word keeps the space before it, hence " ?" and, of white space, one that is left over
    runs = Regex(rf" ?\p{{L}}{{{n}}}| ?[^\s\p{{L}}\p{{N}}]{{{n}}}|\s{{{n}}}(?=\s)")
    bound = pre_tokenizers.Split(runs, behavior="isolated")
    digits = pre_tokenizers.Split(Regex(r"\p{N}{1,3}"), behavior="isolated")
    words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    library.pre_tokenizer = pre_tokenizers.Sequence([bound, digits, words])  # type: ignore[assignment]
    library.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[BOS, EOS, *markers],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    library.train_from_iterator(_non_empty(texts), trainer)
    return BPETokenizer(library.to_str())


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer stored at path: a tokenizer.json, or a folder that holds one.

    UserError when it is missing, unreadable, not a tokenizer, or does not say which tokens are bos and eos.
    """
    path = Path(path)
    with explained(path, "read"):
        file = path / "tokenizer.json" if path.is_dir() else path
        if not file.exists():
            raise UserError(f"no tokenizer at {path}: name a tokenizer.json or a folder that holds one")
        beside = file.with_name("tokenizer_config.json")
        configured = beside.exists()
    text = read_text(file, "the tokenizer", REMEDY)
    if parse_json(text, f"the tokenizer {file}", REMEDY).get("dsv4_tokenizer") == "bytes":
        return ByteTokenizer()
    config = read_json(beside, "the tokenizer's settings", REMEDY) if configured else None
    try:
        _utf8(json.dumps(config, ensure_ascii=False))  # saving it later must not fail
        return BPETokenizer(text, config)
    except UserError as error:
        raise UserError(f"cannot use the tokenizer {file}: {error}") from None
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the library raises bare Exception, or panics, for a JSON that is no tokenizer
        raise UserError(
            f"{file} is not a tokenizer that the tokenizers library reads ({reason_of(error)}); save it again"
        ) from None


def _write(folder: Path, name: str, text: str) -> Path:
    """Writes a text file whole or not at all."""
    make_folder(folder)
    write_text(folder / name, text)
    return folder / name


def _special_id(role: str, config: dict[str, Any], usual: tuple[str, ...], vocab: dict[str, int]) -> int:
    """The id of bos_token or eos_token: as the config says, else the first usual name the vocabulary has."""
    named = config.get(role)
    if isinstance(named, dict):  # some publish {"content": "<s>", "lstrip": false, ...}
        named = named.get("content")
    if named is not None and not isinstance(named, str):
        raise UserError(f"its {role} is {str(named)[:80]}, not the text of a token; correct tokenizer_config.json")
    for name in (named,) if named else usual:
        if name in vocab:
            return vocab[name]
    if named:
        raise UserError(f"its {role} {named!r} is not in its vocabulary; correct tokenizer_config.json")
    raise UserError(f"it does not say what its {role} is; put a tokenizer_config.json that does beside it")


def _check_ids(vocab: dict[str, int]) -> None:
    """UserError if two tokens share an id, or an id is so large that tables of that size would fill the memory."""
    largest = max(vocab.values(), default=0)
    if len(set(vocab.values())) < len(vocab):
        raise UserError("several of its tokens have the same id; save it again")
    if largest >= 4 * len(vocab) + (1 << 16):
        raise UserError(f"its largest id is {largest}, though it has {len(vocab)} tokens only; save it again")


def _types(part: Any) -> set[str]:
    """The "type" of a tokenizer.json component and, for a Sequence, of its members."""
    if not isinstance(part, dict):
        return set()
    members = chain.from_iterable(part.get(key) or () for key in ("decoders", "pretokenizers", "normalizers"))
    return {part.get("type", "")}.union(*map(_types, members))


def _is_marker(name: str) -> bool:
    """Whether an added token is spelled as a control token is: between signs, as <think>, <|EOT|>, ｜DSML｜ or [INST].

    A published file need not say so: V4's calls <｜User｜> and all that its chat format is made of not special.
    """
    ends = name[:1] + name[-1:]
    return any(map(str.isalpha, name)) and not any(c.isalnum() or c.isspace() for c in ends)


def _without_markers(spec: str, parsed: dict[str, Any]) -> str:
    """The tokenizer.json for text: without added tokens that look like control tokens and are not called special.

    Special ones stay, as the library can leave them be; it cannot with the others. Added words and spaces are text.
    """
    added = parsed.get("added_tokens") or []
    kept = [token for token in added if token.get("special") or not _is_marker(token.get("content", ""))]
    return spec if len(kept) == len(added) else json.dumps(parsed | {"added_tokens": kept}, ensure_ascii=False)


def _byte_alphabet() -> dict[str, int]:
    """The 256 characters in which a byte-level vocabulary is spelled -> the byte each stands for.

    Printable Latin-1 characters stand for themselves; the other 68 bytes, in order, for U+0100 and following.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + n): b for n, b in enumerate(others)}


_BYTE_OF = _byte_alphabet()


def _byte_level_piece(token: str) -> bytes:
    if all(c in _BYTE_OF for c in token):
        return bytes(_BYTE_OF[c] for c in token)
    return token.encode()


def _estimated_piece(token: str) -> bytes:
    """Bytes of a token that is not byte-level: ▁ is a space, <0x0A> a byte, ## joins to the word before."""
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return bytes([int(token[3:5], 16)])
    return token.removeprefix("##").replace("▁", " ").encode()


def _join(ids: Iterable[int], table: list[bytes], names: dict[int, str]) -> str:
    """Decoding by bytes. names: special tokens to be spelled out."""
    known = range(len(table))
    pieces = (names[i].encode() if i in names else table[i] if i in known else UNKNOWN for i in ids)
    return b"".join(pieces).decode("utf-8", errors="replace")


def _utf8(text: str) -> bytes:
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        half = f"U+{ord(text[error.start]):04X}"
        raise UserError(
            f"the text holds {half} at character {error.start}, half of a surrogate pair and no character; "
            "remove it, or decode the text with errors='replace'"
        ) from None


def _non_empty(texts: Iterable[str]) -> Iterable[str]:
    found = False
    for text in texts:
        _utf8(text)
        found = found or bool(text)
        yield text
    if not found:
        raise UserError("there is no text to train a tokenizer on: every document is empty; give some text")
