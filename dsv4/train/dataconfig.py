"""The `data` settings of a run: where its text comes from, how it becomes tokens, and how these become batches."""

import math
import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from dsv4.errors import UserError, nearest, shown
from dsv4.train.stages import Course, Stage, read_stage

OURS = ("bpe", "bytes")  # tokenizers that are made, not loaded from a path
FORMATS = ("text", "chat")
PACKINGS = ("line", "whole")
HUB = "hf:"  # what the name of a source on the Hugging Face hub begins with
MOST_SOURCES = 64
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")


@dataclass(frozen=True)
class Source:
    """One part of a mixture. weight: its share of the tokens, relative to the other weights.

    path, text_field, format: as in DataConfig, whose settings are taken where these are empty. name: that of its part
    of the prepared data and of the log; default: the last part of its path.
    """

    path: str
    weight: float = 1.0
    name: str = ""
    text_field: str = ""
    format: str = ""


@dataclass(frozen=True)
class DataConfig:
    """path: a .txt, .jsonl (also .gz, .zst) or .parquet file, a folder of them, or hf:NAME[/CONFIG][:SPLIT][@REVISION],
    a data set of the Hugging Face hub or a local folder of one; empty = the embedded corpus.

    heldout: a source of its own, whose files are not trained on where they lie in `path`.
    mix: several sources instead of `path`, each with a weight. format: "text", or "chat": rows of `messages`, of which
    the assistant's part is learned (text/lessons.py). Of a mixture of both, the held-out text is of the first source's
    format.

    tokenizer: "bpe" (trained on the data, of the model's vocab_size), "bytes", or a folder or tokenizer.json. controls:
    a BPE trained here also has the control tokens of the chat format and of fill-in-the-middle; it always has those
    that format and fim need. fim: the share of documents that are learned with their middle last. workers: processes
    that tokenise; the tokens are the same.

    packing: "line", batches of exactly tokens_per_step, whose borders cut pieces; or "whole", which cuts none, so that
    batches have about tokens_per_step. Empty = "line" for text, "whole" where there is chat.
    micro_batches: a step's sequences are computed in at most so many parts, to save memory; the gradient is the same.
    stages: from which steps on seq_len and tokens_per_step are others (stages.py).
    """

    path: str = ""
    heldout: str = ""  # a source of its own; empty = the embedded held-out split, or every 20th document of `path`
    text_field: str = "text"
    tokenizer: str = "bpe"
    seq_len: int = 1024
    tokens_per_step: int = 8192
    micro_batches: int = 1
    mix: tuple[Source, ...] = ()
    format: str = "text"
    packing: str = ""
    fim: float = 0.0
    controls: bool = False
    workers: int = 1
    stages: tuple[Stage, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "mix", tuple(_source(given, n) for n, given in enumerate(self.mix)))
        _check_one_of("data.format", self.format, FORMATS)
        _check_one_of("data.packing", self.packing, ("", *PACKINGS))
        if not 0 <= self.fim <= 1:
            raise UserError(f"data.fim={self.fim} must be a share of the documents, from 0 to 1, such as 0.1")
        self._check_mix()
        object.__setattr__(self, "stages", tuple(read_stage(given, n) for n, given in enumerate(self.stages)))
        if self.stages and self.packs_whole:
            raise UserError(
                f"data.stages and packing=whole ({'data.packing' if self.packing else 'which chat has'}) do not go "
                "together, since a document would be cut where a stage ends: add data.packing=line, or leave the "
                "stages out"
            )
        if self.seq_len > 0 and self.tokens_per_step > 0:  # if not, RunConfig says so
            self.course.check()
        if self.tokenizer == "bytes" and (self.has_chat or self.fim or self.controls):
            why = "the chat format" if self.has_chat else "fill-in-the-middle" if self.fim else "data.controls"
            raise UserError(
                f"data.tokenizer=bytes has no control tokens, which {why} needs: use bpe or a tokenizer.json"
            )

    def _check_mix(self) -> None:
        if self.mix and self.path:
            raise UserError(
                "data.path and data.mix are both given: give one of them, or make the path a part of the mix"
            )
        if len(self.mix) > MOST_SOURCES:
            raise UserError(f"data.mix has {len(self.mix)} sources: at most {MOST_SOURCES}; join some in a folder")
        names = [source.name for source in self.mix]
        for name in names:
            if names.count(name) > 1:
                raise UserError(f"data.mix has several sources of the name {name!r}: give each a name of its own")
        total = sum(source.weight for source in self.mix)
        for source in self.mix:
            if source.weight / total < 1e-4:
                raise UserError(
                    f"the weight {source.weight:g} of {source.name!r} in data.mix is less than a 10,000th of all "
                    "weights: raise it, or leave the source out"
                )

    @property
    def sources(self) -> tuple[Source, ...]:
        """What is trained on, with all settings; the one source that is no mixture has no name."""
        given = self.mix or (Source(self.path),)
        return tuple(
            Source(s.path, s.weight, s.name, s.text_field or self.text_field, s.format or self.format) for s in given
        )

    @property
    def course(self) -> Course:
        """The length of sequences and the size of steps, at each step."""
        return Course(self.seq_len, self.tokens_per_step, self.stages)

    @property
    def has_chat(self) -> bool:
        return any(source.format == "chat" for source in self.sources)

    @property
    def packs_whole(self) -> bool:
        return (self.packing or ("whole" if self.has_chat else "line")) == "whole"


def _check_one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        rule = " or ".join(k for k in known if k)
        raise UserError(f"{name}={shown(value)} must be {rule}{nearest(str(value), known)}")


def _source(given: Any, number: int) -> Source:
    """A source of data.mix as it was written: a path, or a group of settings."""
    where = f"data.mix[{number}]"
    if isinstance(given, Source):
        given = vars(given)
    if isinstance(given, str):
        given = {"path": given}
    if not isinstance(given, dict):
        raise UserError(f"{where}={shown(given)} must be a path or a group such as {{path: texts/, weight: 2}}")
    kinds = {f.name: f.type for f in fields(Source)}
    for key, value in given.items():
        if key not in kinds:
            known = nearest(str(key), kinds) or f"; known here: {', '.join(kinds)}"
            raise UserError(f"unknown configuration key {f'{where}.{key}'!r}{known}")
        right = isinstance(value, str) if kinds[key] is str else type(value) in (int, float)
        if not right:
            raise UserError(f"{where}.{key}={shown(value)} must be a {'text' if kinds[key] is str else 'number'}")
    source = Source(**{"path": "", **given})
    if not source.path:
        raise UserError(f"{where} lacks its path: give a file, a folder or hf:NAME")
    if not 0 < source.weight < math.inf:
        raise UserError(f"{where}.weight={source.weight} must be a positive finite number")
    if source.format:
        _check_one_of(f"{where}.format", source.format, FORMATS)
    last = Path(source.path.rstrip("/")).name.partition(".")[0]
    name = source.name or re.sub(r"[^A-Za-z0-9_-]+", "-", last).strip("-")
    if not _NAME.fullmatch(name) or name == "heldout":
        raise UserError(f"{where}.name={shown(name)} is no name: give one of letters, digits, - and _")
    return Source(source.path, float(source.weight), name, source.text_field, source.format)
