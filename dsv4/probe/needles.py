"""Texts with needles: a key and a value somewhere in filler, and the question for the value, as ids of a model.

A task makes them: `TextTask` in English through a tokenizer, `IdTask` of ids alone, for models without one. A value is
always a single token, one of C that are equally likely whatever the rest of the text is. So a model that has not read
it has it right with a probability of exactly 1 / C if it names one of the C, of at most that if it may name anything.

`answers` reads a text once and asks each question on a copy of the memory: what is measured is the serving path, and no
question sees another.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from dsv4 import ops
from dsv4.config import ModelConfig
from dsv4.errors import UserError
from dsv4.model import LanguageModel
from dsv4.ops import Pool, Spans
from dsv4.probe.subject import Subject
from dsv4.text import Tokenizer

CHUNK = 4096  # tokens read at once
FORMS = ("\nThe number of {} is {}", "\nThe number of {} is: {}", "\nThe number of {}={}")
AFTER = ".\n"
TAKEN = 64  # ids of keys, and of values, at most


@dataclass(frozen=True)
class Needle:
    """Ids int64 of what stands before the value, the value's number among the candidates, what stands after it, and the
    question, after which the value is to come."""

    before: Tensor
    value: int
    after: Tensor
    question: Tensor


class Task(Protocol):
    """candidates: ids int64 [C] of the values that there are. most: needles of different keys."""

    @property
    def candidates(self) -> Tensor: ...

    @property
    def most(self) -> int: ...

    def filler(self, count: int, generator: torch.Generator) -> Tensor:
        """Ids int64 [count] without any needle."""
        ...

    def needles(self, count: int, generator: torch.Generator) -> list[Needle]:
        """Needles of different keys, equally long, each with a value of its own drawn evenly."""
        ...


@dataclass(frozen=True)
class IdTask:
    """A needle is a key and its value, two ids; the question is the key. The three ranges must not overlap."""

    keys: range
    values: range
    fill: range

    @staticmethod
    def of(vocabulary: int) -> "IdTask":
        """For a model of which nothing else is known: keys and values of the last ids, a quarter of them at most."""
        taken = max(1, min(TAKEN, vocabulary // 8))
        return IdTask(
            range(vocabulary - 2 * taken, vocabulary - taken), range(vocabulary - taken, vocabulary),
            range(vocabulary - 2 * taken),
        )  # fmt: skip

    @property
    def candidates(self) -> Tensor:
        return torch.tensor(self.values)

    @property
    def most(self) -> int:
        return len(self.keys)

    def filler(self, count: int, generator: torch.Generator) -> Tensor:
        return torch.randint(self.fill.start, self.fill.stop, (count,), generator=generator)

    def needles(self, count: int, generator: torch.Generator) -> list[Needle]:
        assert count <= self.most, "each needle has a key of its own"
        keys = torch.randperm(len(self.keys), generator=generator)[:count] + self.keys.start
        values = torch.randint(0, len(self.values), (count,), generator=generator).tolist()
        none = torch.zeros(0, dtype=torch.int64)
        return [Needle(key[None], value, none, key[None]) for key, value in zip(keys, values, strict=True)]


class TextTask:
    """A sentence such as "The number of BAKOMI is 7." in a text; the question is the same sentence up to the digit.

    UserError where the tokenizer makes no digit a token of its own.
    """

    most = TAKEN

    def __init__(self, tokenizer: Tokenizer, text: Tensor):
        self.text, self.tokenizer = text, tokenizer
        for form in FORMS:
            ends = [tokenizer.encode(form.format("BAKOMI", digit)) for digit in range(10)]
            if len({tuple(ids[:-1]) for ids in ends}) == 1 and len({ids[-1] for ids in ends}) == 10:
                self.form, self.candidates = form, torch.tensor([ids[-1] for ids in ends])
                break
        else:
            raise UserError("the tokenizer joins a digit with what stands before it, so a value is no single token")
        self.after = torch.tensor(tokenizer.encode(AFTER))

    def filler(self, count: int, generator: torch.Generator) -> Tensor:
        """A piece of the text from a place that is drawn, going on at its beginning where it ends."""
        start = int(torch.randint(0, len(self.text), (1,), generator=generator))
        return self.text[(start + torch.arange(count)) % len(self.text)]

    def needles(self, count: int, generator: torch.Generator) -> list[Needle]:
        found: dict[str, Needle] = {}
        size = 0
        while len(found) < count:
            letters = torch.randint(0, 1 << 30, (6,), generator=generator).tolist()
            name = "".join("BDFGKLMNPRSTVZ"[n % 14] if i % 2 == 0 else "AEIOU"[n % 5] for i, n in enumerate(letters))
            ids = torch.tensor(self.tokenizer.encode(self.form.format(name, 0))[:-1])
            size = size or len(ids)
            if len(ids) != size or name in found:  # equally long, so that all of them fit where one does
                continue
            value = int(torch.randint(0, 10, (1,), generator=generator))
            found[name] = Needle(ids, value, self.after, ids)
        return list(found.values())


def task_of(subject: Subject) -> Task:
    """In English for a model that reads text, else of ids."""
    if subject.tokenizer is None or not subject.text:
        return IdTask.of(subject.config.vocab_size)
    return TextTask(subject.tokenizer, torch.tensor(subject.tokenizer.encode(subject.text)))


def text_of(
    task: Task, length: int, needles: Sequence[Needle], places: Sequence[int], generator: torch.Generator
) -> Tensor:
    """Ids int64 [length]: filler with the needles, each with its value at its place. They must have room there."""
    ids, free = task.filler(length, generator), torch.ones(length, dtype=torch.bool)
    for needle, place in zip(needles, places, strict=True):
        start, end = place - len(needle.before), place + 1 + len(needle.after)
        assert 0 <= start and end <= length and bool(free[start:end].all()), "a needle has no room"
        ids[start:end] = torch.cat([needle.before, task.candidates[needle.value][None], needle.after])
        free[start:end] = False
    return ids


@torch.no_grad()
def answers(
    model: LanguageModel, text: Tensor, questions: Sequence[Tensor], unders: Sequence[AbstractContextManager] = ()
) -> list[Tensor]:
    """The logits fp32 [len(questions), V] after the text and each question, on the CPU; unders: once for each of what
    is to hold while the questions are read, such as `reading` (default: once, with nothing)."""
    pool = model.new_pool()
    memory = pool.new(len(text) + max(map(len, questions)))
    for part in text.split(CHUNK):
        model(part.to(model.device), segments=[(len(part), memory)], rows="last")
    ids, found = torch.cat(list(questions)).to(model.device), []
    for under in unders or [nullcontext()]:
        copies = [memory.fork() for _ in questions]
        with under:
            asked = [(len(q), copy) for q, copy in zip(questions, copies, strict=True)]
            found.append(model(ids, segments=asked, rows="last").float().cpu())
        for copy in copies:
            copy.release()
    memory.release()
    return found


@contextmanager
def reading(config: ModelConfig, kind: str, questions: Sequence[Tensor]) -> Iterator[None]:
    """While it holds, the tokens of these questions read of the text before them only entries of layers of one kind
    ("csa", "hca"), or its last rows in the window ("window"). A question always reads its own rows."""
    own = torch.cat([torch.arange(1, len(q) + 1) for q in questions])
    calls = itertools.count()

    def wrap(name: str, op: Callable) -> Callable:
        def attend(q: Tensor, window_kv: Tensor, window: Spans, entries: Pool | None, visible: Spans | None,
                   chosen: Tensor | None, *rest: object) -> object:  # fmt: skip
            layer = config.layer_kind(next(calls))
            if kind != "window":
                window = Spans(torch.maximum(window.start, window.stop - own), window.stop)
            if layer.name != kind:
                entries = visible = chosen = None
            return op(q, window_kv, window, entries, visible, chosen, *rest)

        return attend

    with ops.wrapped(["sparse_attention"], wrap):
        yield
    assert next(calls) == config.num_hidden_layers, "each layer attends once"
