"""Training data on the disk: documents -> one packed file of ids per split, and that file again.

A prepared folder holds, per split, <split>.bin (every document as bos, its tokens, eos; uint16, or uint32
for a vocabulary beyond 65,536), <split>.idx (int64: where each document starts, and the end) and, where not all
is learned, <split>.mask (a bit for each token: whether it is), and for all splits token_bytes.bin (int32 [vocab])
and manifest.json, which is written last: what it does not list is not there. It has the sha256 of every file and of
itself, and they are compared whenever a split is opened. Files are little-endian and mapped, not read. Reading the
user's files is left to sources.py, tokenising to encode.py, cutting batches to batches.py.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from dsv4.errors import UserError
from dsv4.files import explained, make_folder, read_json, sha256_of, write_atomically, write_json
from dsv4.text import Tokenizer
from dsv4.train.bits import BitWriter, num_bytes_of, read_bits
from dsv4.train.encode import Encoded, Encoder, encoded

FORMAT = 2
BLOCK_BYTES = 1 << 22  # read at once when a file is checked

Checked = Callable[[int], None]  # told how many bytes have been checked so far


# --- documents -> a prepared folder ---


def prepare(
    documents: Iterable[str],
    tokenizer: Tokenizer,
    out_folder: str | Path,
    *,
    split_name: str,
    beside: Sequence[str] = (),
    encoder: Encoder | None = None,
    workers: int = 1,
) -> "Packed":
    """Tokenise documents into one split of a prepared folder, or reuse that split if it is there already.

    A split that is there is reused if it was made with the same tokenizer from the same documents, which are
    then read but not tokenised. beside: names of files in the folder that belong to the data, whose sha256 the
    manifest is to hold as well. encoder: how documents become tokens (default: as texts), by `workers` processes.
    Everything is on the disk before the manifest names it.

    UserError, and nothing written: the folder was prepared with another tokenizer, or this split from other
    documents (nothing is ever overwritten), or there are no documents. FileError if the machine cannot write.
    """
    folder, encoder = Path(out_folder), encoder or Encoder(tokenizer)
    manifest = _manifest_for(folder, tokenizer)
    if split_name in manifest["splits"]:
        packed = Packed.open(folder, split_name)
        packed.check_text(documents)
        return packed
    make_folder(folder)
    facts: dict[str, Any] = {}

    def write(paths: list[Path]) -> None:
        with ExitStack() as stack:
            files = [stack.enter_context(path.open("wb")) for path in paths]
            facts.update(_write_split(encoded(documents, encoder, workers), encoder.dtype, *files))

    endings = ("bin", "idx", "mask") if encoder.masks else ("bin", "idx")
    _write_together([folder / f"{split_name}.{ending}" for ending in endings], write)
    token_bytes = np.asarray(tokenizer.token_bytes(), dtype="<i4").tobytes()
    write_atomically(folder / "token_bytes.bin", lambda path: path.write_bytes(token_bytes))
    manifest["splits"][split_name] = facts
    manifest["files"] = {name: sha256_of(folder / name) for name in ("token_bytes.bin", *beside)}
    manifest["sha256"] = _manifest_sha256(manifest)
    write_json(folder / "manifest.json", manifest)
    return Packed(folder, split_name, facts, np.frombuffer(token_bytes, dtype="<i4"))


def _write_together(paths: list[Path], write: Callable[[list[Path]], None], opened: tuple[Path, ...] = ()) -> None:
    """Write several files at once, each whole or not at all."""
    if not paths:
        write(list(opened))
        return
    write_atomically(paths[0], lambda temporary: _write_together(paths[1:], write, (*opened, temporary)))


def _manifest_for(folder: Path, tokenizer: Tokenizer) -> dict[str, Any]:
    """The folder's manifest, or a new one; UserError if the folder was prepared with another tokenizer."""
    fingerprint, vocab_size = tokenizer.fingerprint(), tokenizer.vocab_size
    if not is_prepared(folder):
        return {"format": FORMAT, "tokenizer": fingerprint, "vocab_size": vocab_size, "splits": {}, "files": {}}
    manifest = read_manifest(folder)
    if manifest["tokenizer"] != fingerprint:
        was, now = manifest["tokenizer"][:12], fingerprint[:12]
        raise UserError(f"{folder} was prepared with tokenizer {was}, not {now}: use that or another folder")
    return manifest


def _write_split(
    chunks: Iterable[Encoded], dtype: str, ids: BinaryIO, ends: BinaryIO, mask: BinaryIO | None = None
) -> dict[str, Any]:
    """Stream tokenised documents into the open files; returns the split's entry in the manifest."""
    digests = {file: hashlib.sha256() for file in (ids, ends, mask) if file}
    text_digest, count, end, num_bytes, max_id, learned = hashlib.sha256(), 0, 0, 0, 0, 0

    def put(file: BinaryIO, numbers: np.ndarray) -> None:
        raw = numbers.tobytes()
        file.write(raw)
        digests[file].update(raw)

    bits = BitWriter(lambda packed: put(mask, packed)) if mask else None
    put(ends, np.zeros(1, dtype="<i8"))
    for chunk in chunks:
        put(ids, chunk.ids)
        put(ends, (end + np.cumsum(chunk.lengths)).astype("<i8"))
        end, count, num_bytes = end + len(chunk.ids), count + len(chunk.lengths), num_bytes + chunk.text_bytes
        max_id = max(max_id, int(chunk.ids.max()))
        for digest in chunk.digests:
            text_digest.update(digest)  # as in text_sha256
        if bits is not None and chunk.learned is not None:
            bits.write(chunk.learned)
            learned += int(chunk.learned.sum())
    if not count:
        raise UserError("there are no documents to prepare: give a source with text in it")
    facts = {
        "documents": count,
        "tokens": end,
        "text_bytes": num_bytes,
        "dtype": dtype,
        "max_id": max_id,
        "sha256": digests[ids].hexdigest(),
        "idx_sha256": digests[ends].hexdigest(),
        "text_sha256": text_digest.hexdigest(),
    }
    if mask and bits is not None:
        bits.close()
        facts |= {"learned": learned, "mask_sha256": digests[mask].hexdigest()}
    return facts


def text_sha256(documents: Iterable[str]) -> str:
    """What identifies documents: the sha256 over the sha256 of each, so that their borders count too."""
    digest = hashlib.sha256()
    for text in documents:
        digest.update(hashlib.sha256(text.encode()).digest())
    return digest.hexdigest()


# --- the manifest ---


def is_prepared(folder: Path) -> bool:
    """Whether a preparation was finished there."""
    with explained(folder, "read"):
        return (folder / "manifest.json").exists()


def read_manifest(folder: Path) -> dict[str, Any]:
    """A prepared folder's manifest; UserError if there is none, or it is not as it was written."""
    file = folder / "manifest.json"
    if not is_prepared(folder):
        raise UserError(f"{folder} holds no prepared data (no manifest.json): prepare it first")
    manifest = read_json(file, "the manifest", _remedy(folder))
    if "format" in manifest and manifest["format"] != FORMAT:
        given = repr(manifest["format"])[:40]
        raise UserError(
            f"{file} has format {given}, not {FORMAT}, as another version of dsv4 wrote it: "
            f"move {folder} away to have the data prepared again"
        )
    if manifest.get("sha256") != _manifest_sha256(manifest) or not _is_manifest(manifest):
        raise UserError(f"{file} has changed since it was written: {_remedy(folder)}")
    return manifest


def check_file(folder: Path, name: str, sha256: str) -> None:
    """UserError if a file of a prepared folder is missing or has another sha256 than the manifest says."""
    file = folder / name
    with explained(file, "read"):
        missing = not file.is_file()
    if missing:
        raise UserError(f"{file} is missing: {_remedy(folder)}")
    if sha256_of(file) != sha256:
        raise UserError(f"{file} has changed since it was written: {_remedy(folder)}")


def _remedy(folder: Path) -> str:
    return f"put back a copy of it, or move {folder} away to have the data prepared again"


def _manifest_sha256(manifest: dict[str, Any]) -> str:
    """The digest of everything in a manifest but the digest itself; the layout of the JSON plays no part."""
    rest = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _is_manifest(manifest: dict[str, Any]) -> bool:
    """Whether every entry is there, of its type, and possible."""
    splits, files = manifest.get("splits"), manifest.get("files")
    return (
        isinstance(manifest.get("tokenizer"), str)
        and _is_whole(manifest.get("vocab_size"), 1)
        and isinstance(splits, dict)
        and all(isinstance(facts, dict) and _are_facts(facts, manifest["vocab_size"]) for facts in splits.values())
        and isinstance(files, dict)
        and "token_bytes.bin" in files
        and all(Path(name).name == name and isinstance(digest, str) for name, digest in files.items())
    )


def _are_facts(facts: dict[str, Any], vocab_size: int) -> bool:
    """Whether these can be the facts of a split: each document has a bos and an eos at least."""
    return (
        _is_whole(facts.get("documents"), 1)
        and _is_whole(facts.get("tokens"), 2 * facts["documents"])
        and _is_whole(facts.get("text_bytes"), 0)
        and _is_whole(facts.get("max_id"), 0)
        and facts["max_id"] < vocab_size
        and facts.get("dtype") in ("<u2", "<u4")
        and all(isinstance(facts.get(key), str) for key in ("sha256", "idx_sha256", "text_sha256"))
        and ("mask_sha256" in facts) == ("learned" in facts)
        and (
            "learned" not in facts
            or (_is_whole(facts["learned"], 0) and facts["learned"] <= facts["tokens"])
            and isinstance(facts["mask_sha256"], str)
        )
    )


def _is_whole(value: Any, least: int) -> bool:
    return type(value) is int and value >= least


# --- a prepared split ---


class Packed:
    """One split of a prepared folder: all its documents one after another, on disk.

    tokens: [num_tokens] uint16 or uint32, mapped. ends: [num_documents + 1] int64, document d is
    tokens[ends[d]:ends[d + 1]], bos and eos included. token_bytes: [vocab] int32, UTF-8 bytes of each token.
    """

    def __init__(self, folder: Path, split: str, facts: dict[str, Any], token_bytes: np.ndarray):
        self.folder, self.split, self.facts, self.token_bytes = folder, split, facts, token_bytes
        self.tokens = _mapped(folder / f"{split}.bin", facts["dtype"], facts["tokens"])
        self.ends = _mapped(folder / f"{split}.idx", "<i8", facts["documents"] + 1)
        self._mask = None
        if "learned" in facts:
            self._mask = _mapped(folder / f"{split}.mask", "<u1", num_bytes_of(facts["tokens"]))
        if self.ends[0] != 0 or self.ends[-1] != facts["tokens"] or (np.diff(self.ends) < 2).any():
            raise UserError(f"{folder / f'{split}.idx'} holds impossible offsets: {_remedy(folder)}")

    @classmethod
    def open(cls, folder: str | Path, split: str, on_checked: Checked = lambda done: None) -> "Packed":
        """UserError for a folder that is not prepared or lacks the split, and for files that are not as written.

        Every byte is read for that; on_checked is told how many of the split's tokens' bytes have been.
        """
        folder = Path(folder)
        manifest = read_manifest(folder)
        if split not in manifest["splits"]:
            have = ", ".join(manifest["splits"]) or "none"
            raise UserError(f"{folder} has no split {split!r} (it has {have}): prepare it first")
        token_bytes = _mapped(folder / "token_bytes.bin", "<i4", manifest["vocab_size"])
        check_file(folder, "token_bytes.bin", manifest["files"]["token_bytes.bin"])
        packed = cls(folder, split, manifest["splits"][split], token_bytes)
        packed.verify(on_checked)
        return packed

    @property
    def num_tokens(self) -> int:
        """Ids in the split, a bos and an eos per document included."""
        return self.facts["tokens"]

    @property
    def num_documents(self) -> int:
        return self.facts["documents"]

    @property
    def num_bytes(self) -> int:
        """UTF-8 bytes of the text."""
        return self.facts["text_bytes"]

    @property
    def num_learned(self) -> int:
        """Ids that are to be learned: all, or the model's own part of conversations."""
        return self.facts.get("learned", self.facts["tokens"])

    def learned(self, first: int, end: int) -> np.ndarray | None:
        """Which of tokens[first:end] are to be learned, bool; None if all of the split are."""
        return None if self._mask is None else read_bits(self._mask, first, end)

    def document(self, index: int) -> np.ndarray:
        """Ids of one document, [n] in the file's dtype, bos and eos included."""
        return self.tokens[self.ends[index] : self.ends[index + 1]]

    def check_vocab(self, vocab_size: int) -> None:
        """UserError if some token has no row in the embedding of a model with this vocabulary."""
        if (max_id := self.facts["max_id"]) >= vocab_size:
            raise UserError(
                f"token id {max_id} in {self.folder} is beyond the model's vocabulary of {vocab_size}: "
                "use a smaller tokenizer or a model with a larger vocab_size"
            )

    def check_text(self, documents: Iterable[str]) -> None:
        """UserError if the split was made from other documents, all of which are read for that."""
        if self.facts["text_sha256"] != text_sha256(documents):
            raise UserError(
                f"the {self.split} split in {self.folder} was made from other text: use another folder, or move this "
                "one away"
            )

    def verify(self, on_checked: Checked = lambda done: None) -> None:
        """Read every token and offset; UserError if a bit is not as the manifest says, or an id above its max_id."""
        file, digest, max_id, done = self.folder / f"{self.split}.bin", hashlib.sha256(), 0, 0
        with explained(file, "read"), file.open("rb") as tokens:
            while block := tokens.read(BLOCK_BYTES):
                digest.update(block)
                max_id, done = max(max_id, int(np.frombuffer(block, self.facts["dtype"]).max())), done + len(block)
                on_checked(done)
        if digest.hexdigest() != self.facts["sha256"] or max_id > self.facts["max_id"]:
            raise UserError(f"{file} has changed since it was written: {_remedy(self.folder)}")
        check_file(self.folder, f"{self.split}.idx", self.facts["idx_sha256"])
        if self._mask is not None:
            check_file(self.folder, f"{self.split}.mask", self.facts["mask_sha256"])

    def has_text(self) -> bool:
        """Whether some token to be learned stands for at least one byte: without one, bits per byte have no meaning."""
        step = BLOCK_BYTES // self.tokens.itemsize
        for start in range(0, self.num_tokens, step):
            tokens = self.tokens[start : start + step]
            learned = self.learned(start, start + len(tokens))
            if self.token_bytes[tokens if learned is None else tokens[learned]].any():
                return True
        return False

    def pieces(self, seq_len: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Every document cut into pieces of at most seq_len tokens, in order: (first, end, closes), each [P].

        first and end (int64) index tokens; closes (bool) tells whether the document ends with the piece.
        """
        return cut(self.ends[:-1], self.ends[1:], seq_len)


def cut(begins: np.ndarray, ends: np.ndarray, seq_len: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Runs of tokens, int64 [R] each, cut into pieces of at most seq_len: (first, end, whether the run ends there)."""
    counts = -(-(ends - begins) // seq_len)
    run = np.repeat(np.arange(len(begins)), counts)
    number = np.arange(len(run)) - np.repeat(np.cumsum(counts) - counts, counts)
    first = begins[run] + number * seq_len
    end = np.minimum(first + seq_len, ends[run])
    return first, end, end == ends[run]


def _mapped(file: Path, dtype: str, count: int) -> np.ndarray:
    """A read-only array over a file that must have exactly this many elements."""
    with explained(file, "read"):
        want, have = count * np.dtype(dtype).itemsize, file.stat().st_size if file.exists() else -1
        if have != want:
            state = "is missing" if have < 0 else f"has {have} bytes instead of {want}"
            raise UserError(f"{file} {state}: {_remedy(file.parent)}")
        return np.memmap(file, dtype=dtype, mode="r", shape=(count,))
