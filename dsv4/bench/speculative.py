"""`dsv4 bench speculative`: how many drafts are accepted and what that is worth, beside plain decoding in the same run.

Prompts from the held-out documents of the embedded corpus are decoded together by one engine after the other, without
drafts and with 1, 2, ... a step, and that again for each repeat, so that a machine which slows down slows all of them.
What is timed begins when every prompt has its first token. Random weights foresee nothing: their rows are what drafting
costs where it does not help.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from dsv4.config import PRESETS, ModelConfig
from dsv4.data import documents
from dsv4.engine import Completion, Engine, SamplingParams
from dsv4.engine.speculative import check_depth
from dsv4.errors import UserError
from dsv4.measure.clock import synchronise
from dsv4.measure.rows import Row
from dsv4.measure.subjects import randomise
from dsv4.model import LanguageModel, Transformer
from dsv4.text import ByteTokenizer, Tokenizer

PROMPT_CHARACTERS = 600

Say = Callable[[str], None]


@dataclass(frozen=True)
class Subject:
    """What decodes: `name` is what it was called by."""

    name: str
    model: LanguageModel
    tokenizer: Tokenizer
    format: str


@dataclass
class Passes:
    """What the repeats of one engine came to: a number each, beside the tokens of the first."""

    rates: list[float] = field(default_factory=list)  # tokens per second, of all requests together
    tokens: int = 0
    events: int = 0
    drafted: int = 0
    accepted: int = 0
    ids: list[list[int]] = field(default_factory=list)


def open_subject(name: str, dtype: torch.dtype, device: torch.device, format: str) -> Subject:
    """A run or checkpoint folder, or a preset with random weights and bytes for tokens; UserError, before weights are
    read, for a model without a drafter."""
    if name in PRESETS and not Path(name).exists():
        config = ModelConfig.preset(name)
        check_depth(1, config.num_draft_blocks)
        model = randomise(Transformer(config, dtype), std=None).to(device).eval()
        return Subject(name, model, ByteTokenizer(), format)
    engine = Engine.open(name, dtype=dtype, device=device, memory_format=format, speculative=1)
    return Subject(name, engine.model, engine.tokenizer, format)


def prompts(count: int, tokenizer: Tokenizer) -> list[list[int]]:
    """The beginnings of as many equal parts of the held-out text, each with a bos."""
    text = "\n\n".join(documents("heldout"))
    part = len(text) // count
    return [[tokenizer.bos_id, *tokenizer.encode(text[i * part :][:PROMPT_CHARACTERS])] for i in range(count)]


def decode(engine: Engine, given: Sequence[list[int]], params: Sequence[SamplingParams], passes: Passes) -> None:
    """One pass: the prompts together, timed from when each has its first token."""
    device, done = engine.model.device, dict[int, Completion]()
    numbers = [engine.add(ids, p) for ids, p in zip(given, params, strict=True)]
    began: set[int] = set()
    while len(began) < len(numbers):
        events = engine.step()
        began |= {e.request for e in events}
        done |= {e.request: e.completion for e in events if e.completion}
    known = sum(len(r.ids) - r.num_prompt for r in engine.scheduler) + sum(len(c.ids) for c in done.values())
    count = 0
    synchronise(device)
    start = time.perf_counter()
    while len(done) < len(numbers):
        events = engine.step()
        count += len(events)
        done |= {e.request: e.completion for e in events if e.completion}
    synchronise(device)
    seconds = time.perf_counter() - start
    all_done = [done[n] for n in numbers]
    new = sum(len(c.ids) for c in all_done) - known
    passes.rates.append(new / seconds)
    passes.tokens += new
    passes.events += count
    passes.drafted += sum(c.drafted for c in all_done)
    passes.accepted += sum(c.accepted for c in all_done)
    passes.ids += [c.ids for c in all_done]


@torch.inference_mode()
def measure(
    subject: Subject,
    drafts: Sequence[int],
    batches: Sequence[int],
    temperatures: Sequence[float],
    new_tokens: int,
    repeats: int,
    say: Say,
) -> list[Row]:
    """A row for each temperature, batch and number of drafts, of which 0 is plain decoding.

    tokens_per_second: of all requests together, the median of the repeats; times_plain: that over plain decoding's.
    tokens_per_call: new tokens over the calls of the model that a request took part in. acceptance: of the tokens that
    were drafted and verified (None where none was). same_as_plain: whether all tokens are those of plain decoding (None
    where they are drawn).
    """
    for depth in drafts:
        check_depth(depth, len(subject.model.mtp))
    if not drafts or min(drafts) < 1 or min(batches) < 1 or new_tokens < 2:
        raise UserError("drafts and batches must be from 1, and at least 2 new tokens are needed to time one")
    rows: list[Row] = []
    for temperature in temperatures:
        for batch in batches:
            rows += _rows(subject, [0, *drafts], batch, temperature, new_tokens, repeats, say)
    return rows


def _rows(
    subject: Subject,
    depths: Sequence[int],
    batch: int,
    temperature: float,
    new_tokens: int,
    repeats: int,
    say: Say,
) -> list[Row]:
    given = prompts(batch, subject.tokenizer)
    longest = max(len(ids) for ids in given)
    engines = {
        depth: Engine(
            subject.model, subject.tokenizer, max_batch=batch, tokens_per_step=max(2048, batch * (1 + depth)),
            memory_format=subject.format, speculative=depth,
        )
        for depth in depths
    }  # fmt: skip
    passes = {depth: Passes() for depth in depths}
    for repeat in range(-1, repeats):  # the first warms up
        for depth, engine in engines.items():
            seeds = [1000 * max(0, repeat) + i for i in range(batch)]
            params = [SamplingParams(temperature=temperature, seed=seed, max_tokens=new_tokens) for seed in seeds]
            decode(engine, given, params, Passes() if repeat < 0 else passes[depth])
        if repeat >= 0:
            say(f"temperature {temperature:g}, batch {batch}: repeat {repeat + 1} of {repeats}")
    plain = passes[0]
    return [
        {
            "who": "dsv4", "what": "speculative decoding", "model": subject.name, "drafts": depth,
            "temperature": temperature, "batch": batch, "prompt_tokens": longest, "new_tokens": new_tokens,
            "dtype": str(subject.model.dtype).removeprefix("torch."), "cache": subject.format,
            "device": subject.model.device.type, "threads": torch.get_num_threads(), "repeats": repeats,
            "tokens_per_second": statistics.median(p.rates), "slowest": min(p.rates), "fastest": max(p.rates),
            "times_plain": statistics.median(p.rates) / statistics.median(plain.rates),
            "tokens_per_call": p.tokens / p.events, "drafted": p.drafted, "accepted": p.accepted,
            "acceptance": p.accepted / p.drafted if p.drafted else None,
            "same_as_plain": p.ids == plain.ids if temperature == 0 else None,
        }
        for depth, p in passes.items()
    ]  # fmt: skip


def lines(rows: Sequence[Row]) -> list[str]:
    """The rows for a person, under a head."""
    out = [
        f"{'temperature':>11s} {'batch':>5s} {'drafts':>6s} {'accepted':>8s} {'tokens/call':>11s} {'tokens/s':>9s} "
        f"{'x plain':>7s}  tokens"
    ]
    for r in rows:
        accepted = "" if r["acceptance"] is None else f"{r['acceptance']:.0%}"
        same = {None: "drawn", True: "those of plain decoding", False: "OTHERS THAN PLAIN DECODING'S"}
        out.append(
            f"{r['temperature']:11g} {r['batch']:5d} {r['drafts']:6d} {accepted:>8s} {r['tokens_per_call']:11.2f} "
            f"{r['tokens_per_second']:9,.1f} {r['times_plain']:7.2f}  {same[r['same_as_plain']]}"
        )
    return out
