"""From a run's data settings to a tokenizer and packed tokens: the embedded corpus, the user's own texts, a mixture.

A run's `data` folder is there whole or not at all: tokenizer and all splits are made in a folder beside it, which is
renamed when all is on the disk. prepared_for.json in it says for which settings and files; it names no place on the
machine, so that the folder may move.
"""

import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

from dsv4.checkpoint import RunFolder
from dsv4.errors import UserError
from dsv4.files import TEMPORARY, explained, make_folder, read_json, synchronise, write_json
from dsv4.text import ByteTokenizer, Tokenizer, load_tokenizer, train_bpe
from dsv4.text.prompt import BEGIN, CONTROLS, END, FIM
from dsv4.train.dataconfig import HUB, OURS, DataConfig
from dsv4.train.encode import Encoder, plain_text
from dsv4.train.hub import HubSpec
from dsv4.train.mixture import Mixture
from dsv4.train.packed import Packed, check_file, is_prepared, prepare, read_manifest
from dsv4.train.runconfig import RunConfig
from dsv4.train.texts import HELDOUT, Texts, counted, train_split

Told = Callable[[str, int, int | None], None]  # what is being done, bytes done, bytes in all if known
Prepared = tuple[Tokenizer, Packed | Mixture, Packed]

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
        return _open(target, data, vocab, tell)
    given = None if data.tokenizer in OURS else load_tokenizer(data.tokenizer)
    asked = {
        "tokenizer": given.fingerprint() if given else data.tokenizer,
        "vocab_size": vocab,
        **_special(data, given),
    }
    texts = Texts(data)
    if is_prepared(target):
        note = read_json(target / NOTE, "the note", "choose another --out")
        was = {name: value for name, value in note.items() if name != "texts"}
        if was != asked:
            raise UserError(f"{target} was prepared for {was}, not {asked}: choose another --out")
        made = _open(target, data, vocab, tell)
        if note.get("texts") != texts.identity():
            _check_texts(texts, made, tell)
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
    return _open(target, data, vocab, tell)


def absolute(data: DataConfig) -> DataConfig:
    """The same settings with paths that mean the same from any working directory.

    UserError for a path that is not text in UTF-8, which settings are written in.
    """
    names = ["path", "heldout", *([] if data.tokenizer in OURS else ["tokenizer"])]
    places = {name: absolute_path(value, f"data.{name}") for name in names if (value := getattr(data, name))}
    mix = tuple(replace(s, path=absolute_path(s.path, f"data.mix {s.name!r}")) for s in data.mix)
    return replace(data, **places, mix=mix)


def absolute_path(value: str, setting: str) -> str:
    """The same place from any working directory; UserError for a name that is not UTF-8."""
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise UserError(f"{setting}={value!r} is not a name in UTF-8: rename it") from None
    if value.startswith(HUB):
        return str(HubSpec.read(value))
    with explained(value, "find"):
        return str(Path(value).absolute())  # ".." stays: behind a link it means something else


# --- making and opening ---


def _special(data: DataConfig, given: Tokenizer | None) -> dict[str, Any]:
    """What is asked of prepared data beyond plain text in the tokens of a vocabulary."""
    sources = [[source.name, source.format, source.text_field] for source in data.sources]
    markers = [] if given or data.tokenizer == "bytes" else _markers(data)
    asked = {"sources": sources if data.mix or data.has_chat else None, "fim": data.fim, "markers": markers}
    return {name: value for name, value in asked.items() if value}


def _markers(data: DataConfig) -> list[str]:
    """Names of the control tokens that a vocabulary learned for these data has, besides bos and eos."""
    chat = [c for c in CONTROLS if c not in (BEGIN, END)] if data.controls or data.has_chat else []
    return [control.name for control in (*chat, *(FIM if data.controls or data.fim else ()))]


def _make(
    scratch: Path,
    data: DataConfig,
    vocab: int,
    given: Tokenizer | None,
    note: dict[str, Any],
    texts: Texts,
    tell: Told,
) -> None:
    """Fill an empty folder: tokenizer, prepared_for.json, all splits."""
    if given is not None:
        tokenizer = given
    elif data.tokenizer == "bytes":
        tokenizer = ByteTokenizer()
    else:
        tokenizer = _learned_vocabulary(data, vocab, texts, tell)
    _check_size(tokenizer, vocab)
    tokenizer.save(scratch)
    write_json(scratch / NOTE, note)
    beside = [name for name in ("tokenizer.json", "tokenizer_config.json", NOTE) if (scratch / name).exists()]
    for split in texts.splits:
        meter = _meter(tell, f"tokenising {split}", texts.size(split))
        encoder = Encoder(tokenizer, texts.format(split), 0.0 if split == HELDOUT else data.fim)
        encoder.check()
        packed = prepare(
            texts.documents(split, meter), tokenizer, scratch,
            split_name=split, beside=beside, encoder=encoder, workers=data.workers,
        )  # fmt: skip
        if split == HELDOUT and not packed.has_text():
            raise UserError(
                "the held-out text has no token that stands for any bytes, so nothing can be measured on it: "
                "give other text, or another tokenizer"
            )


def _learned_vocabulary(data: DataConfig, vocab: int, texts: Texts, tell: Told) -> Tokenizer:
    """A BPE learned from the first documents of each source, as many of each as its weight says."""
    total = sum(source.weight for source in data.sources)
    sizes = [texts.size(split) for split in texts.splits[:-1]]
    size = BPE_BYTES if None in sizes else min(sum(n for n in sizes if n is not None), BPE_BYTES)
    meter = _meter(tell, "learning the vocabulary", size)
    each = []
    for source in data.sources:
        share, split = source.weight / total, train_split(source)
        first = _first(texts.documents(split, lambda done: None), share)
        each.append(text for document in first for text in plain_text(document, source.format))
    return train_bpe(counted(chain.from_iterable(each), meter), vocab, _markers(data))


def _first(documents: Iterable[str], share: float) -> Iterator[str]:
    """The documents that a vocabulary is learned from, of one source."""
    left = BPE_BYTES * share
    for text in islice(documents, max(1, round(BPE_DOCUMENTS * share))):
        yield text
        left -= len(text.encode())
        if left <= 0:
            return


def _open(target: Path, data: DataConfig, vocab: int, tell: Told) -> Prepared:
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
    sources = data.sources
    parts = [_open_split(target, train_split(source), vocab, tell) for source in sources]
    train = Mixture([s.name for s in sources], [s.weight for s in sources], parts) if data.mix else parts[0]
    return tokenizer, train, _open_split(target, HELDOUT, vocab, tell)


def _open_split(target: Path, split: str, vocab: int, tell: Told) -> Packed:
    packed = Packed.open(target, split, _meter(tell, f"checking {split}", _size_of(target / f"{split}.bin")))
    packed.check_vocab(vocab)
    return packed


def _size_of(file: Path) -> int | None:
    """Bytes of a file; None if it is not there, which whoever opens it says."""
    with explained(file, "read"):
        return file.stat().st_size if file.exists() else None


def _check_size(tokenizer: Tokenizer, vocab: int) -> None:
    if tokenizer.vocab_size > vocab:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} tokens but model.vocab_size={vocab}: raise model.vocab_size or "
            "use another tokenizer"
        )


def _check_texts(texts: Texts, made: Prepared, tell: Told) -> None:
    """UserError if prepared data were made from other texts."""
    train = made[1].parts if isinstance(made[1], Mixture) else [made[1]]
    for packed in (*train, made[2]):
        split = packed.split
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


def _meter(tell: Told, what: str, total: int | None) -> Callable[[int], None]:
    """Passes on how far a piece of work is: at its start, at its end, and a few times a second between."""
    tell(what, 0, total)
    due = time.monotonic() + TOLD_EVERY

    def told(done: int) -> None:
        nonlocal due
        if (now := time.monotonic()) >= due or (total is not None and done >= total):
            due = now + TOLD_EVERY
            tell(what, done if total is None else min(done, total), total)

    return told
