"""What is probed, and how much of it: the model with its tokenizer, the settings of a run, and the maker of records."""

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from dsv4.config import AnyConfig
from dsv4.model import LanguageModel
from dsv4.probe.record import Record
from dsv4.text import Tokenizer

Suite = Literal["quick", "full"]
SUITES = ("quick", "full")
T = TypeVar("T")


@dataclass(frozen=True)
class Settings:
    """How a run asks. seed: of everything that is drawn. suite: quick is minutes on one core for a small model."""

    seed: int = 0
    suite: Suite = "quick"

    def pick(self, quick: T, full: T) -> T:
        """A size: how much the suite in use can afford."""
        return quick if self.suite == "quick" else full

    def generator(self, salt: int = 0) -> torch.Generator:
        """A random state of this run's seed; salt keeps the draws of two uses apart."""
        return torch.Generator().manual_seed((self.seed * 1_000_003 + salt) % (1 << 63))


class Subject:
    """A model under probe. tokenizer and text are None for a model without; then random ids stand in for text."""

    def __init__(
        self, model: LanguageModel, tokenizer: Tokenizer | None = None, *, name: str = "model", text: str = ""
    ):
        self.model, self.tokenizer, self.name, self.text = model.eval(), tokenizer, name, text

    @property
    def config(self) -> AnyConfig:
        return self.model.config

    @property
    def dtype(self) -> str:
        return str(self.model.compute_dtype).removeprefix("torch.")

    @cached_property
    def config_hash(self) -> str:
        """16 hex digits of the sha256 of the configuration."""
        return hash_of(self.config.to_json())

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits that tell weights apart: of up to 4,096 numbers, evenly spread, of every tensor."""
        digest = hashlib.sha256(self.config_hash.encode())
        for name, tensor in sorted([*self.model.named_parameters(), *self.model.named_buffers()]):
            flat = tensor.detach().flatten()
            some = flat[:: max(1, len(flat) // 4096)].double().cpu()
            digest.update(name.encode() + some.numpy().tobytes())
        return digest.hexdigest()[:16]

    @cached_property
    def _encoded(self) -> Tensor | None:
        if self.tokenizer is None or not self.text:
            return None
        return torch.tensor(self.tokenizer.encode(self.text))

    @property
    def reads_text(self) -> bool:
        """Whether `ids` are of real text, not random ones."""
        return self._encoded is not None

    def ids(self, count: int, settings: Settings, salt: int = 0) -> Tensor:
        """Ids int64 [count]: a piece of the text from a place that seed and salt decide; random ones without text."""
        generator = settings.generator(salt)
        text = self._encoded
        if text is None or len(text) < count:
            return torch.randint(0, self.config.vocab_size, (count,), generator=generator)
        start = int(torch.randint(0, len(text) - count + 1, (1,), generator=generator))
        return text[start : start + count].clone()

    def windows(self, number: int, count: int, settings: Settings, salt: int = 0) -> Iterator[Tensor]:
        """`number` independent pieces of `count` ids."""
        for i in range(number):
            yield self.ids(count, settings, salt * 4096 + i)


def hash_of(value: Any) -> str:
    """16 hex digits of the sha256 of plain JSON, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


class Recorder:
    """Makes the records of one probe: fills in what they share; `seconds` is the time since the record before."""

    def __init__(
        self, probe: str, subject: Subject, settings: Settings, clock: Callable[[], float] = time.perf_counter
    ):
        self.probe, self.subject, self.settings, self._clock = probe, subject, settings, clock
        self._since = clock()

    def __call__(
        self,
        name: str,
        value: float | None,
        unit: str = "",
        *,
        interval: tuple[float, float] | None = None,
        residual: float | None = None,
        n: int = 1,
        detail: dict[str, Any] | None = None,
        finding: str = "",
        dtype: str = "",
    ) -> Record:
        """A measured quantity; dtype: where it is not the model's."""
        now = self._clock()
        seconds, self._since = now - self._since, now
        low, high = interval or (None, None)
        return Record(
            self.probe, name, value, low, high, residual, unit, self.settings.seed, dtype or self.subject.dtype,
            self.subject.config_hash, seconds, n, detail or {}, finding,
        )  # fmt: skip

    def absent(self, status: Literal["skipped", "failed"], reason: str) -> Record:
        """What stands for a probe that was not measured, or not to its end."""
        seconds = self._clock() - self._since
        return Record(
            self.probe, status, None, None, None, None, "", self.settings.seed, self.subject.dtype,
            self.subject.config_hash, seconds, 0, status=status, reason=reason,
        )  # fmt: skip
