"""From a run's data settings to a tokenizer and packed tokens: the embedded corpus, or the user's own text.

A run's `data` folder is there whole or not at all: tokenizer and both splits are made in a folder beside it, which is
renamed when all is on the disk. prepared_for.json in it says for which settings and files; it names no place on the
machine, so that the folder may move.
"""

import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from dsv4 import data as corpus
from dsv4.checkpoint import RunFolder
from dsv4.errors import UserError
from dsv4.files import TEMPORARY, explained, make_folder, read_json, synchronise, write_json
from dsv4.text import ByteTokenizer, Tokenizer, load_tokenizer, train_bpe
from dsv4.train.packed import Packed, check_file, is_prepared, prepare, read_manifest
from dsv4.train.recipes import DataConfig, RunConfig
from dsv4.train.sources import (
    HOLD_OUT_EVERY,
    bounded,
    data_files,
    hold_out,
    names_of,
    read_files,
    say_once,
    size_of,
    without,
)

Split = Literal["train", "heldout"]
Told = Callable[[str, int, int | None], None]  # what is being done, bytes done, bytes in all if known
Prepared = tuple[Tokenizer, Packed, Packed]

SPLITS: tuple[Split, Split] = ("train", "heldout")
OURS = ("bpe", "bytes")  # tokenizers that are made, not loaded from a path
NOTE = "prepared_for.json"
# A vocabulary is learned from the first documents up to these two: merging needs up to 150 bytes per byte of text
# that has no word twice, so this bound is what bounds the memory of preparing data.
BPE_DOCUMENTS = 20000
BPE_BYTES = 12 << 20
TOLD_EVERY = 0.25  # seconds


def prepare_data(
    config: RunConfig, folder: Path, *, resuming: bool = False, on_progress: Told | None = None
) -> Prepared:
    """Tokenizer, training tokens and held-out tokens of a run, made once in `folder`/data and reused after that.

    resuming: use what is in `folder`/data as it is; the texts are not needed. Otherwise it is used if it was made for
    these settings from these texts: their names, sizes and times are compared, and where these differ the texts.
    on_progress(what, bytes done, bytes in all or None) is called a few times a second. The memory this takes stays
    below 2 GiB beyond what the modules take, whatever the texts (1.6 GiB is the most that was measured, on 2 cores, a
    line of 30 MB of random Chinese); only of a .parquet 16 rows are held, however long they are.

    UserError for unreadable, damaged or empty sources, for prepared data that were changed or made for something
    else, and for a tokenizer that does not fit the model's vocabulary; FileError if the machine cannot write. A
    failure leaves no part of a `data` folder.
    """
    data, vocab, target, tell = config.data, config.model.vocab_size, RunFolder(folder).data, on_progress or _silent
    if resuming:
        return _open(target, vocab, tell)
    given = None if data.tokenizer in OURS else load_tokenizer(data.tokenizer)
    asked = {"tokenizer": given.fingerprint() if given else data.tokenizer, "vocab_size": vocab}
    texts = Texts(data)
    if is_prepared(target):
        made = _open(target, vocab, tell)
        _check_made_for(target, asked, texts, made, tell)
        return made
    _check_free(target)
    scratch = folder / f".data{TEMPORARY}"
    _remove(scratch)
    make_folder(scratch)
    try:
        _make(scratch, data, vocab, given, {**asked, "texts": texts.identity()}, texts, tell)
        with explained(target):
            if target.is_dir():
                target.rmdir()
            os.replace(scratch, target)
            synchronise(folder)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
    return _open(target, vocab, tell)


def absolute(data: DataConfig) -> DataConfig:
    """The same settings with paths that mean the same from any working directory.

    UserError for a path that is not text in UTF-8, which settings are written in.
    """
    names = ["path", "heldout", *([] if data.tokenizer in OURS else ["tokenizer"])]
    places = {name: value for name in names if (value := getattr(data, name))}
    for name, value in places.items():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            raise UserError(f"data.{name}={value!r} is not a name in UTF-8: rename it") from None
        with explained(value, "find"):
            places[name] = str(Path(value).absolute())  # ".." stays: behind a link it means something else
    return replace(data, **places)


# --- the texts ---


class Texts:
    """Where the documents of both splits come from; a None among `files` is the embedded corpus.

    The held-out split is data.heldout if given, else held out of data.path, else that of the embedded corpus. Files
    of data.heldout that lie in data.path are not trained on.
    """

    def __init__(self, data: DataConfig):
        self.data = data
        train = data_files(data.path) if data.path else None
        heldout = data_files(data.heldout) if data.heldout else None
        if train and heldout:
            with explained(data.heldout, "read"):
                if os.path.samefile(data.path, data.heldout):
                    raise UserError(
                        f"data.heldout={data.heldout} is data.path itself: leave data.heldout empty to have every "
                        f"{HOLD_OUT_EVERY}th document held out, or give other text"
                    )
            train, shared = without(train, heldout)
            if shared and train:
                say_once(f"not trained on, as they belong to data.heldout={data.heldout}: {names_of(shared)}")
            if not train:
                raise UserError(
                    f"data.heldout={data.heldout} leaves nothing to train on, as every file of data.path={data.path} "
                    "belongs to it too: give other text as one of them"
                )
        self.parted = bool(train) and not heldout
        self.files = {"train": train, "heldout": train if self.parted else heldout}

    def size(self, split: Split) -> int:
        """Bytes of the files that a split is read from; of the text itself for the embedded corpus."""
        files = self.files[split]
        return corpus.facts()[split]["text_bytes"] if files is None else sum(map(size_of, files))

    def documents(self, split: Split, on_read: Callable[[int], None]) -> Iterator[str]:
        """The documents of one split, read as they are needed; on_read is told the bytes of `size` read so far."""
        files = self.files[split]
        if files is None:
            return bounded(_counted(corpus.documents(split), on_read))
        documents = read_files(files, self.data.text_field, on_read)
        if not self.parted:
            return documents
        return _some(hold_out(documents, split), self.data.path)

    def identity(self) -> dict[str, Any]:
        """What tells texts apart without reading them: name, size and time of change of every file."""
        field = {"text_field": self.data.text_field, "parted": self.parted}
        return field | {split: self._identity(split) for split in SPLITS}

    def _identity(self, split: Split) -> Any:
        files = self.files[split]
        if files is None:
            return corpus.facts()[split]["sha256"]
        root = Path(self.data.heldout if split == "heldout" and not self.parted else self.data.path)
        return [[_name(file, root), *_size_and_time(file)] for file in files]


def _name(file: Path, root: Path) -> str:
    """The name of a file below the source it was found in, as text that JSON can hold."""
    name = file.name if file == root else file.relative_to(root).as_posix()
    return name.encode("utf-8", "backslashreplace").decode()


def _size_and_time(file: Path) -> tuple[int, int]:
    with explained(file, "read"):
        found = file.stat()
    return found.st_size, found.st_mtime_ns


def _some(documents: Iterator[str], path: str) -> Iterator[str]:
    """Documents held out of a source; UserError when there is none."""
    for text in documents:
        yield text
        break
    else:
        raise UserError(
            f"no text can be held out of {path}, as its few documents have less than {HOLD_OUT_EVERY} characters "
            "each: give more text, or a source of its own as data.heldout"
        )
    yield from documents


def _counted(documents: Iterable[str], on_read: Callable[[int], None]) -> Iterator[str]:
    done = 0
    for text in documents:
        done += len(text.encode())
        on_read(done)
        yield text


# --- making and opening ---


def _make(
    scratch: Path,
    data: DataConfig,
    vocab: int,
    given: Tokenizer | None,
    note: dict[str, Any],
    texts: Texts,
    tell: Told,
) -> None:
    """Fill an empty folder: tokenizer, prepared_for.json, both splits."""
    if given is not None:
        tokenizer = given
    elif data.tokenizer == "bytes":
        tokenizer = ByteTokenizer()
    else:
        meter = _meter(tell, "learning the vocabulary", min(texts.size("train"), BPE_BYTES))
        tokenizer = train_bpe(_counted(_first(texts.documents("train", lambda done: None)), meter), vocab)
    _check_size(tokenizer, vocab)
    tokenizer.save(scratch)
    write_json(scratch / NOTE, note)
    beside = [name for name in ("tokenizer.json", "tokenizer_config.json", NOTE) if (scratch / name).exists()]
    for split in SPLITS:
        meter = _meter(tell, f"tokenising {split}", texts.size(split))
        packed = prepare(texts.documents(split, meter), tokenizer, scratch, split_name=split, beside=beside)
        if split == "heldout" and not packed.has_text():
            raise UserError(
                "the held-out text has no token that stands for any bytes, so nothing can be measured on it: "
                "give other text, or another tokenizer"
            )


def _first(documents: Iterable[str]) -> Iterator[str]:
    """The documents that a vocabulary is learned from."""
    left = BPE_BYTES
    for text in islice(documents, BPE_DOCUMENTS):
        yield text
        left -= len(text.encode())
        if left <= 0:
            return


def _open(target: Path, vocab: int, tell: Told) -> Prepared:
    """What was prepared, every byte of it checked."""
    manifest = read_manifest(target)
    for name, digest in manifest["files"].items():
        check_file(target, name, digest)
    tokenizer = load_tokenizer(target)
    if tokenizer.fingerprint() != manifest["tokenizer"]:
        raise UserError(
            f"{target}/tokenizer.json is not the tokenizer that the data beside it were made with: move {target} away "
            "to have them prepared again"
        )
    _check_size(tokenizer, vocab)
    train, heldout = (_open_split(target, split, vocab, tell) for split in SPLITS)
    return tokenizer, train, heldout


def _open_split(target: Path, split: Split, vocab: int, tell: Told) -> Packed:
    packed = Packed.open(target, split, _meter(tell, f"checking {split}", size_of(target / f"{split}.bin")))
    packed.check_vocab(vocab)
    return packed


def _check_size(tokenizer: Tokenizer, vocab: int) -> None:
    if tokenizer.vocab_size > vocab:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} tokens but model.vocab_size={vocab}: raise model.vocab_size or "
            "use another tokenizer"
        )


def _check_made_for(target: Path, asked: dict[str, Any], texts: Texts, made: Prepared, tell: Told) -> None:
    """UserError if prepared data were made for other settings or from other texts."""
    note = read_json(target / NOTE, "the note", "choose another --out")
    was = {name: note.get(name) for name in asked}
    if was != asked:
        raise UserError(f"{target} was prepared for {was}, not {asked}: choose another --out")
    if note.get("texts") == texts.identity():
        return
    for packed, split in zip(made[1:], SPLITS, strict=True):
        packed.check_text(texts.documents(split, _meter(tell, f"reading {split}", texts.size(split))))


def _check_free(target: Path) -> None:
    """UserError if something that is not prepared data stands where they are to go."""
    with explained(target, "read"):
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise UserError(
                f"{target} is no finished preparation (it has no manifest.json), and nothing there is overwritten: "
                "move it away, or choose another --out"
            )


def _remove(scratch: Path) -> None:
    """Remove what a preparation that was killed left behind."""
    with explained(scratch, "remove"):
        if scratch.is_dir() and not scratch.is_symlink():
            shutil.rmtree(scratch)
        else:
            scratch.unlink(missing_ok=True)


# --- progress ---


def _silent(what: str, done: int, total: int | None) -> None:
    pass


def _meter(tell: Told, what: str, total: int) -> Callable[[int], None]:
    """Passes on how far a piece of work is: at its start, at its end, and a few times a second between."""
    tell(what, 0, total)
    due = time.monotonic() + TOLD_EVERY

    def told(done: int) -> None:
        nonlocal due
        if (now := time.monotonic()) >= due or done >= total:
            due = now + TOLD_EVERY
            tell(what, min(done, total), total)

    return told
