"""Training data: documents -> one packed file of ids per split -> batches that any step can ask for.

A prepared folder holds, per split, <split>.bin (every document as bos, its tokens, eos; uint16, or uint32
for a vocabulary beyond 65,536) and <split>.idx (int64: where each document starts, and the end), and for
all splits token_bytes.bin (int32 [vocab]) and manifest.json, which is written last: what it does not list
is not there. Files are little-endian and mapped, not read. Reading the user's files is left to sources.py.

A document is cut into pieces of at most seq_len tokens. Each piece is a segment of its own, so the model
sees it as the start of a document. A batch is a flat run of pieces without padding. Which tokens stand in
batch n is a function of (n, seed, sizes) alone, so that resuming a run needs no more than the number of the
step.

T tokens of a batch
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dsv4.checkpoint import write_atomically
from dsv4.errors import UserError
from dsv4.text import Tokenizer
from dsv4.train.sources import hold_out, read_documents

__all__ = ["Batch", "Batches", "Packed", "heldout_batches", "hold_out", "prepare", "read_documents"]

FORMAT = 1
IGNORED = -100  # the target where there is none, as torch's cross entropy has it
CHUNK_CHARS = 1 << 22  # text handed to the tokenizer at once: enough to keep its threads busy

Span = tuple[int, int, bool]  # first token, end, whether a document ends there


# --- documents -> a prepared folder ---


def prepare(
    documents: Iterable[str],
    tokenizer: Tokenizer,
    out_folder: str | Path,
    *,
    split_name: str,
    on_progress: Callable[[int], None] | None = None,
) -> "Packed":
    """Tokenise documents into one split of a prepared folder, or reuse that split if it is there already.

    A split that is there is reused if it was made with the same tokenizer from the same documents, which are
    then read but not tokenised. on_progress is told the UTF-8 bytes of text done so far.

    UserError, and nothing written: the folder was prepared with another tokenizer, or this split from other
    documents (nothing is ever overwritten), or there are no documents.
    """
    folder = Path(out_folder)
    manifest = _manifest_for(folder, tokenizer)
    if split_name in manifest["splits"]:
        packed = Packed.open(folder, split_name)
        if packed.facts["text_sha256"] != _text_sha256(documents):
            raise UserError(f"the {split_name} split in {folder} was made from other text: use another folder")
        return packed
    folder.mkdir(parents=True, exist_ok=True)
    scratch = {kind: folder / f".{split_name}.{kind}.{os.getpid()}.tmp" for kind in ("bin", "idx")}
    try:
        facts = _write_split(documents, tokenizer, scratch["bin"], scratch["idx"], on_progress)
        for kind, file in scratch.items():
            os.replace(file, folder / f"{split_name}.{kind}")
    finally:
        for file in scratch.values():
            file.unlink(missing_ok=True)
    manifest["splits"][split_name] = facts
    token_bytes = np.asarray(tokenizer.token_bytes(), dtype="<i4").tobytes()
    write_atomically(folder / "token_bytes.bin", lambda path: path.write_bytes(token_bytes))
    text = json.dumps(manifest, indent=2) + "\n"
    write_atomically(folder / "manifest.json", lambda path: path.write_text(text, encoding="utf-8"))
    return Packed.open(folder, split_name)


def _manifest_for(folder: Path, tokenizer: Tokenizer) -> dict[str, Any]:
    """The folder's manifest, or a new one; UserError if the folder was prepared with another tokenizer."""
    fingerprint, vocab_size = tokenizer.fingerprint(), tokenizer.vocab_size
    if not (folder / "manifest.json").exists():
        return {"format": FORMAT, "tokenizer": fingerprint, "vocab_size": vocab_size, "splits": {}}
    manifest = _read_manifest(folder)
    if manifest["tokenizer"] != fingerprint:
        was, now = manifest["tokenizer"][:12], fingerprint[:12]
        raise UserError(f"{folder} was prepared with tokenizer {was}, not {now}: use that or another folder")
    return manifest


def _write_split(
    documents: Iterable[str],
    tokenizer: Tokenizer,
    bin_file: Path,
    idx_file: Path,
    on_progress: Callable[[int], None] | None,
) -> dict[str, Any]:
    """Stream documents into the two files; returns the split's entry in the manifest."""
    dtype = "<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4"
    ids_digest, text_digest = hashlib.sha256(), hashlib.sha256()
    ends, num_bytes, max_id = [0], 0, 0
    with bin_file.open("wb") as out:
        for chunk in _chunks(documents):
            for text, ids in zip(chunk, tokenizer.encode_batch(chunk), strict=True):
                row = np.array([tokenizer.bos_id, *ids, tokenizer.eos_id])
                raw, utf8 = row.astype(dtype).tobytes(), text.encode()
                out.write(raw)
                ids_digest.update(raw)
                text_digest.update(hashlib.sha256(utf8).digest())  # as in _text_sha256
                ends.append(ends[-1] + len(row))
                num_bytes += len(utf8)
                max_id = max(max_id, int(row.max()))
            if on_progress:
                on_progress(num_bytes)
    if len(ends) == 1:
        raise UserError("there are no documents to prepare: give a source with text in it")
    idx_file.write_bytes(np.asarray(ends, dtype="<i8").tobytes())
    return {
        "documents": len(ends) - 1,
        "tokens": ends[-1],
        "text_bytes": num_bytes,
        "dtype": dtype,
        "max_id": max_id,
        "sha256": ids_digest.hexdigest(),
        "text_sha256": text_digest.hexdigest(),
    }


def _text_sha256(documents: Iterable[str]) -> str:
    """What identifies documents: the sha256 over the sha256 of each, so that their borders count too."""
    digest = hashlib.sha256()
    for text in documents:
        digest.update(hashlib.sha256(text.encode()).digest())
    return digest.hexdigest()


def _chunks(documents: Iterable[str]) -> Iterator[list[str]]:
    """Lists of documents of about CHUNK_CHARS together."""
    chunk, size = [], 0
    for text in documents:
        chunk.append(text)
        size += len(text)
        if size >= CHUNK_CHARS:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _read_manifest(folder: Path) -> dict[str, Any]:
    file = folder / "manifest.json"
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT:
            raise UserError(f"{file} has format {manifest['format']}, not {FORMAT}: prepare the data again")
        assert {"tokenizer", "vocab_size", "splits"} <= manifest.keys()
    except FileNotFoundError:
        raise UserError(f"{folder} holds no prepared data (no manifest.json): prepare it first") from None
    except (OSError, json.JSONDecodeError, KeyError, TypeError, AssertionError):
        raise UserError(f"{file} is damaged: delete {folder} and prepare the data again") from None
    return manifest


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

    @classmethod
    def open(cls, folder: str | Path, split: str) -> "Packed":
        """UserError for a folder that is not prepared or lacks the split, and for files cut short."""
        folder = Path(folder)
        manifest = _read_manifest(folder)
        if split not in manifest["splits"]:
            have = ", ".join(manifest["splits"]) or "none"
            raise UserError(f"{folder} has no split {split!r} (it has {have}): prepare it first")
        token_bytes = _mapped(folder / "token_bytes.bin", "<i4", manifest["vocab_size"])
        return cls(folder, split, manifest["splits"][split], token_bytes)

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

    def verify(self) -> None:
        """Read every token and compare with the manifest's sha256; UserError if a bit has changed."""
        if hashlib.sha256(self.tokens.tobytes()).hexdigest() != self.facts["sha256"]:
            file = self.folder / f"{self.split}.bin"
            raise UserError(f"{file} is damaged: delete {self.folder} and prepare the data again")

    def pieces(self, seq_len: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Every document cut into pieces of at most seq_len tokens, in order: (first, end, closes), each [P].

        first and end (int64) index tokens; closes (bool) tells whether the document ends with the piece.
        """
        lengths = np.diff(self.ends)
        counts = -(-lengths // seq_len)
        document = np.repeat(np.arange(len(lengths)), counts)
        number = np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts)
        first = self.ends[document] + number * seq_len
        end = np.minimum(first + seq_len, self.ends[document + 1])
        return first, end, end == self.ends[document + 1]


def _mapped(file: Path, dtype: str, count: int) -> np.ndarray:
    """A read-only array over a file that must have exactly this many elements."""
    want, have = count * np.dtype(dtype).itemsize, file.stat().st_size if file.exists() else -1
    if have != want:
        state = "is missing" if have < 0 else f"has {have} bytes instead of {want}"
        raise UserError(f"{file} {state}: delete {file.parent} and prepare the data again")
    return np.memmap(file, dtype=dtype, mode="r", shape=(count,))


# --- batches ---


@dataclass(frozen=True)
class Batch:
    """A flat run of T tokens: segments one after another, each the start of a document for the model.

    ids: int64 [T]. targets: int64 [T], the token that follows in the document, or -100 after its last
    token; where a piece ends inside a document, the next token is known and is the target. lengths: of the
    segments, summing to T. num_bytes: UTF-8 bytes of the targets, so that bits per byte = (sum of losses in
    nats) / ln 2 / num_bytes; eos is a target of 0 bytes, whose loss counts.
    """

    ids: Tensor
    targets: Tensor
    lengths: list[int]
    num_bytes: int


class Batches:
    """Endless training batches; batch(step) is any of them, iterating goes on from `step`.

    In each epoch the pieces of all documents, in an order drawn from (seed, epoch), stand one after
    another, and epoch follows epoch; batch n is tokens n*T to (n+1)*T of that line. So a row may cut its
    last piece, whose rest begins the next row as a piece of its own; in an epoch every token occurs exactly
    once. Pieces are shuffled and not whole documents, since a document may be longer than many batches,
    which would then all be alike.
    """

    def __init__(self, packed: Packed, tokens_per_batch: int, seed: int, seq_len: int):
        for name, value in (("tokens_per_batch", tokens_per_batch), ("seq_len", seq_len)):
            if value < 1:
                raise UserError(f"{name} is {value}: a batch needs at least 1 token")
        if not 0 <= seed < 1 << 64:
            raise UserError(f"seed {seed} is out of range: choose one from 0 to 2**64 - 1")
        self.packed, self.tokens_per_batch, self.seed, self.seq_len = packed, tokens_per_batch, seed, seq_len
        self.step = 0
        self._first, self._end, self._closes = packed.pieces(seq_len)
        self._epoch = lru_cache(maxsize=2)(self._draw_epoch)  # a batch may span two

    def batch(self, step: int) -> Batch:
        """Batch number `step`, from 0; leaves the iteration where it is."""
        if step < 0:
            raise IndexError(f"there is no batch {step}: steps count from 0")
        return _batch(self.packed, list(self._line(step * self.tokens_per_batch, self.tokens_per_batch)))

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        self.step += 1
        return self.batch(self.step - 1)

    @property
    def epochs(self) -> float:
        """How often the data has been gone through up to `step`."""
        return self.step * self.tokens_per_batch / self.packed.num_tokens

    def state_dict(self) -> dict[str, int | str]:
        """What a checkpoint must keep: the step, and what must not change for it to mean the same."""
        return {"step": self.step, **self._identity()}

    def load_state_dict(self, state: dict[str, int | str]) -> None:
        """Go on where another run stood. UserError if the data, the seed or a size differ from that run's."""
        for name, ours in self._identity().items():
            if state.get(name) != ours:
                raise UserError(
                    f"the run to resume has {name} {state.get(name)}, this one {ours}: "
                    "resume with the same data and settings, or start a new run"
                )
        self.step = int(state["step"])

    def _identity(self) -> dict[str, int | str]:
        sizes = {"tokens_per_batch": self.tokens_per_batch, "seq_len": self.seq_len}
        return {"data": self.packed.facts["sha256"], "seed": self.seed, **sizes}

    def _draw_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """(which piece stands where, the number of tokens up to its end), each int64 [P].

        Sorting the raw output of a counter-based generator: numpy promises it never changes, unlike shuffles.
        """
        key = np.array([self.seed, epoch], dtype=np.uint64)
        draws = np.random.Philox(key=key).random_raw(len(self._first))
        order = np.argsort(draws, kind="stable")
        return order, np.cumsum(self._end[order] - self._first[order])

    def _line(self, position: int, count: int) -> Iterator[Span]:
        """The spans of `count` tokens from `position` in the endless line of epochs."""
        while count > 0:
            epoch, offset = divmod(position, self.packed.num_tokens)
            order, line_ends = self._epoch(epoch)
            place = int(np.searchsorted(line_ends, offset, side="right"))
            while count > 0 and place < len(order):
                piece, left = order[place], int(line_ends[place]) - offset
                end, take = int(self._end[piece]), min(left, count)
                yield end - left, end - left + take, bool(self._closes[piece]) and take == left
                offset, position, count, place = offset + take, position + take, count - take, place + 1


def heldout_batches(
    packed: Packed, tokens_per_batch: int, seq_len: int, limit_tokens: int | None = None
) -> Iterator[Batch]:
    """Batches for evaluation: all pieces in order, each token once; the last batch may be short.

    With limit_tokens, pieces at even distances over the whole split are taken, at most that many tokens in
    all. Pieces are cut at the ends of batches as in training.
    """
    if min(tokens_per_batch, seq_len) < 1 or (limit_tokens is not None and limit_tokens < 1):
        raise UserError(
            f"tokens_per_batch {tokens_per_batch}, seq_len {seq_len}, limit_tokens {limit_tokens}: "
            "evaluation needs at least 1 of each"
        )
    return _heldout(packed, tokens_per_batch, seq_len, min(limit_tokens or packed.num_tokens, packed.num_tokens))


def _heldout(packed: Packed, tokens_per_batch: int, seq_len: int, budget: int) -> Iterator[Batch]:
    first, end, closes = packed.pieces(seq_len)
    num_chosen = -(-len(first) * budget // packed.num_tokens)
    chosen = np.arange(num_chosen) * len(first) // num_chosen
    row: list[Span] = []
    room = min(tokens_per_batch, budget)
    for piece in chosen:
        at, stop, closing = int(first[piece]), int(end[piece]), bool(closes[piece])
        while at < stop and budget > 0:
            take = min(stop - at, room)
            row.append((at, at + take, closing and at + take == stop))
            at, room, budget = at + take, room - take, budget - take
            if room == 0:
                yield _batch(packed, row)
                row, room = [], min(tokens_per_batch, budget)
    if row:
        yield _batch(packed, row)


def _batch(packed: Packed, spans: list[Span]) -> Batch:
    """Read the spans of a batch from the mapped file."""
    lengths = [end - first for first, end, _ in spans]
    ids = np.empty(sum(lengths), dtype=np.int64)
    targets = np.full(len(ids), IGNORED, dtype=np.int64)
    at = 0
    for (first, end, closes), length in zip(spans, lengths, strict=True):
        known = length - closes
        ids[at : at + length] = packed.tokens[first:end]
        targets[at : at + known] = packed.tokens[first + 1 : first + 1 + known]
        at += length
    num_bytes = int(packed.token_bytes[targets[targets != IGNORED]].sum())
    return Batch(torch.from_numpy(ids), torch.from_numpy(targets), lengths, num_bytes)
