"""From a run's data settings to a tokenizer and packed tokens: the embedded corpus, or the user's own text."""

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Literal

from dsv4 import data as corpus
from dsv4.checkpoint import write_atomically
from dsv4.errors import UserError
from dsv4.text import ByteTokenizer, Tokenizer, load_tokenizer, train_bpe
from dsv4.train.data import Packed, prepare
from dsv4.train.recipes import DataConfig, RunConfig
from dsv4.train.sources import hold_out, read_documents

Split = Literal["train", "heldout"]
BPE_DOCUMENTS = 20000  # enough text to learn a vocabulary from


def prepare_data(config: RunConfig, folder: Path) -> tuple[Tokenizer, Packed, Packed]:
    """Tokenizer, training tokens and held-out tokens of a run, made once in `folder`/data and reused after that.

    Raises UserError for unreadable or empty sources and for a tokenizer that does not fit the model's vocabulary.
    """
    data, vocab = config.data, config.model.vocab_size
    target = folder / "data"
    tokenizer = _tokenizer(data, vocab, target)
    train, heldout = (
        prepare(documents(data, split), tokenizer, target, split_name=split) for split in ("train", "heldout")
    )
    for packed in (train, heldout):
        packed.check_vocab(vocab)
    return tokenizer, train, heldout


def documents(data: DataConfig, split: Split) -> Iterator[str]:
    """The documents of one split, read as they are needed."""
    if not data.path:
        return corpus.documents(split)
    if data.heldout:
        return read_documents(data.path if split == "train" else data.heldout, data.text_field)
    return hold_out(read_documents(data.path, data.text_field), split)


def _tokenizer(data: DataConfig, vocab: int, target: Path) -> Tokenizer:
    """The run's tokenizer: the one its data were prepared with, else a new one or a given one, which is then kept."""
    asked, note = {"tokenizer": data.tokenizer, "vocab_size": vocab}, target / "prepared_for.json"
    kept = note.exists()
    if kept:
        if (was := json.loads(note.read_text(encoding="utf-8"))) != asked:
            raise UserError(f"{target} was prepared for {was}, not {asked}: choose another --out")
        tokenizer: Tokenizer = load_tokenizer(target)
    elif data.tokenizer == "bytes":
        tokenizer = ByteTokenizer()
    elif data.tokenizer == "bpe":
        tokenizer = train_bpe(islice(documents(data, "train"), BPE_DOCUMENTS), vocab)
    else:
        tokenizer = load_tokenizer(data.tokenizer)
    if tokenizer.vocab_size > vocab:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} tokens but model.vocab_size={vocab}: raise model.vocab_size or "
            "use another tokenizer"
        )
    if not kept:
        target.mkdir(parents=True, exist_ok=True)
        tokenizer.save(target)
        text = json.dumps(asked)
        write_atomically(note, lambda path: path.write_text(text, encoding="utf-8"))
    return tokenizer
