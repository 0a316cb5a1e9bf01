"""Documents -> tokens, in chunks, by one process or many; the tokens are the same whoever made them.

A text is bos, its tokens, eos. A share of the texts is learned with its middle last: bos <fim_begin> prefix
<fim_hole> suffix <fim_end> middle eos (prefix-suffix-middle, at the level of documents, as DeepSeek-V3 was trained;
paper 4.1 keeps it). A conversation is its lessons, with a bit per token: whether it is to be learned.
"""

import hashlib
import json
import os
import signal
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context

import numpy as np

from dsv4.errors import UserError
from dsv4.text import Tokenizer
from dsv4.text.lessons import lessons_of
from dsv4.text.prompt import CONTROLS, FIM_BEGIN, FIM_END, FIM_HOLE, control_id

CHUNK_CHARS = 1 << 21  # text handed to the tokenizer at once: enough to keep its threads busy; 150 bytes each
WAITING = 2  # chunks in hand for each process: one being read or done, one being tokenised


@dataclass(frozen=True)
class Encoded:
    """A chunk of documents in tokens. learned: bool [n], None if all are; digests: sha256 of each document's text."""

    ids: np.ndarray  # [n] <u2 or <u4
    lengths: np.ndarray  # [documents] int64
    learned: np.ndarray | None
    text_bytes: int
    digests: tuple[bytes, ...]


@dataclass(frozen=True)
class Encoder:
    """format: of the documents, "text" or "chat" (JSON of a conversation). fim: the share of texts with middle last."""

    tokenizer: Tokenizer
    format: str = "text"
    fim: float = 0.0

    @property
    def dtype(self) -> str:
        return "<u2" if self.tokenizer.vocab_size <= 1 << 16 else "<u4"

    @property
    def masks(self) -> bool:
        """Whether some tokens are read and not learned."""
        return self.format == "chat"

    def check(self) -> None:
        """UserError, before any work, for a tokenizer without the control tokens that are needed."""
        if self.fim and self.format == "text":
            self._fim_ids()
        lacking = [c.name for c in CONTROLS if self.tokenizer.token_id(c.name) is None] if self.format == "chat" else []
        if lacking:
            raise UserError(
                f"this tokenizer lacks {lacking[0]}, which the chat format needs: use the tokenizer.json of "
                "DeepSeek-V4, or a model whose vocabulary was learned with data.controls=true"
            )

    def __call__(self, documents: list[str]) -> Encoded:
        """The tokens of a chunk. UserError for a conversation that this tokenizer has no control tokens for."""
        digests = tuple(hashlib.sha256(text.encode()).digest() for text in documents)
        rows, learned, text_bytes = self._chat(documents) if self.format == "chat" else self._texts(documents)
        lengths = np.array([len(row) for row in rows], dtype="<i8")
        ids = np.concatenate([np.asarray(row, dtype=np.int64) for row in rows]).astype(self.dtype)
        return Encoded(ids, lengths, learned, text_bytes, digests)

    def _texts(self, documents: list[str]) -> tuple[list[list[int]], None, int]:
        bos, eos = self.tokenizer.bos_id, self.tokenizer.eos_id
        size = sum(len(text.encode()) for text in documents)
        if not self.fim:
            return [[bos, *row, eos] for row in self.tokenizer.encode_batch(documents)], None, size
        split = [middle_last(text, self.fim) for text in documents]
        found = iter(self.tokenizer.encode_batch([part for parts in split for part in parts]))
        begin, hole, end = self._fim_ids()
        rows = []
        for parts in split:
            if len(parts) == 1:
                rows.append([bos, *next(found), eos])
            else:
                prefix, suffix, middle = (next(found) for _ in parts)
                rows.append([bos, begin, *prefix, hole, *suffix, end, *middle, eos])
        return rows, None, size

    def _chat(self, documents: list[str]) -> tuple[list[list[int]], np.ndarray, int]:
        lessons = [lesson for text in documents for lesson in lessons_of(json.loads(text))]
        found = [lesson.ids(self.tokenizer) for lesson in lessons]
        learned = np.array([bit for _, bits in found for bit in bits], dtype=bool)
        size = sum(len(text.encode()) for lesson in lessons for text in lesson.texts)
        return [ids for ids, _ in found], learned, size

    def _fim_ids(self) -> tuple[int, int, int]:
        try:
            begin, hole, end = (control_id(self.tokenizer, control) for control in (FIM_BEGIN, FIM_HOLE, FIM_END))
        except UserError:
            raise UserError(
                "this tokenizer lacks the tokens of fill-in-the-middle (<｜fim▁begin｜> and two more), which data.fim "
                "needs: use data.tokenizer=bpe or the tokenizer.json of DeepSeek-V4, or set data.fim=0"
            ) from None
        return begin, hole, end


def middle_last(text: str, rate: float) -> tuple[str, ...]:
    """(text,), or for a share `rate` of all texts (prefix, suffix, middle), cut at two places evenly drawn.

    Drawn from the text itself, so that a text comes out the same in any order, process or mixture.
    """
    draws = np.frombuffer(hashlib.sha256(b"fill in the middle:" + text.encode()).digest(), dtype="<u8")
    if int(draws[0]) >= rate * 2.0**64:
        return (text,)
    first, second = sorted(int(draw) % (len(text) + 1) for draw in draws[1:3])
    return text[:first], text[second:], text[first:second]


def plain_text(document: str, format: str) -> Iterator[str]:
    """The texts in a document that a vocabulary is to be learned from."""
    if format == "text":
        yield document
    else:
        yield from (text for lesson in lessons_of(json.loads(document)) for text in lesson.texts)


def encoded(documents: Iterable[str], encoder: Encoder, workers: int = 1) -> Iterator[Encoded]:
    """The chunks of documents in tokens, in order.

    With several workers each is a process that tokenises whole chunks, while this one reads the documents and takes
    the results; at most WAITING chunks for each are held. UserError of a chunk comes when it is its turn.
    """
    if workers == 1:
        yield from map(encoder, _chunks(documents))
        return
    pool = ProcessPoolExecutor(workers, get_context("spawn"), _begin, (encoder,))
    waiting: deque[Future[Encoded]] = deque()
    try:
        for chunk in _chunks(documents):
            waiting.append(pool.submit(_work, chunk))
            if len(waiting) >= WAITING * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool:
        raise UserError(
            f"one of the {workers} processes that tokenise was ended from outside, perhaps as the memory was full: "
            "set data.workers to fewer"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


_encoder: Encoder | None = None  # of a worker


def _begin(encoder: Encoder) -> None:
    global _encoder
    _encoder = encoder
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are as many as are wanted
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all of them; the parent ends the work


def _work(chunk: list[str]) -> Encoded:
    assert _encoder is not None, "a worker begins with its encoder"
    return _encoder(chunk)


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
