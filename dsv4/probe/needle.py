"""fidelity.needle: what can the model read back from far before, by depth, length and phase?

A needle (needles.py) is put into filler and asked for at the end. Depth: where the value's group of 128 tokens lies
between the text's beginning (0) and end (1). Phase: the place of the value in its group of 4 and in its group of 128,
which is what a compressor's fault would show in; and the same of the length of the prompt, which decides which groups
are open when the question comes. Each text has a needle at every depth, all at one phase, with keys of their own; each
is asked for alone, on a copy of the memory. Every four texts of a length have each phase of 4 once, every 128 each
phase of 128.

Scores. Exact match: the likeliest of all tokens is the value. Bits: log2 of the value's probability among the C values
that there are, plus log2 C: 0 by chance, log2 C at most, negative for a model that is sure of something else; the mean
is a lower bound on the information that the answer has about the value. A model that cannot retrieve is right with a
probability of at most 1 / C and has at most 0 bits in the mean. Then there is nothing to compare phases by: the spread
over phases is left out with that reason (a spread of 0 between failures is no pass).

Spread: the share right at the best phase minus that at the worst, over the cells (length, depth) that are above chance.
It is above 0 by chance too, so beside it stand a simultaneous 95% interval (from Wilson's, Bonferroni) and the p-value
of a permutation of the phases among the texts of each length.

Does not cover: needles that take reasoning, several values for a key, the length that the model was trained at (its
files do not say), or a needle within the question's own windows: the nearest is a whole group away, `in_windows` says
which depths windows of all layers together could still hand on. Questions of one text share its filler and its other
needles; intervals count them as independent.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dsv4.config import AnyConfig, ModelConfig
from dsv4.model import LanguageModel
from dsv4.probe import stats
from dsv4.probe.needles import Task, answers, reading, task_of, text_of
from dsv4.probe.record import Record
from dsv4.probe.subject import Recorder, Settings, Subject

NAME = "fidelity.needle"
DEPTHS = 5  # where the length has room for as many
SHUFFLES = 999  # of the permutation test
SHORTEST = 4  # groups of the long ratio in the shortest text: one before the needle's, one after it


@dataclass(frozen=True)
class Ask:
    """One question. text: which of the texts of its length. depth 0 to 1; place: of the value, and prompt: tokens of
    text and question together. right: exact match. bits: of the value, relative to chance."""

    length: int
    text: int
    depth: float
    place: int
    prompt: int
    right: bool
    bits: float


@dataclass(frozen=True)
class Spread:
    """Over phases: best share minus worst, its interval, the p-value, and of each phase (right, asks)."""

    value: float
    low: float
    high: float
    p: float
    counts: list[tuple[int, int]]


def ratios(config: AnyConfig) -> tuple[int, int]:
    """The short and the long group that phases are counted in: the model's own, V4's for a model without."""
    return (config.compress_rate_csa, config.compress_rate_hca) if isinstance(config, ModelConfig) else (4, 128)


def lengths_of(config: AnyConfig, most: int) -> list[int]:
    """Lengths that double, up to `most` and to what the model has positions for."""
    long = ratios(config)[1]
    room = min(most, config.max_position_embeddings - long)
    return [n for i in range(32) if (n := SHORTEST * long << i) <= room]


def needs(config: AnyConfig) -> str | None:
    if lengths_of(config, 1 << 40):
        return None
    return f"its {config.max_position_embeddings} positions are too few for a needle that is far from its question"


# --- asking ----------------------------------------------------------------------------------------------------------


def ask(
    model: LanguageModel, task: Task, length: int, texts: int, generator: torch.Generator, kind: str = ""
) -> Iterator[Ask]:
    """The questions of `texts` texts, whose prompts have from `length` tokens on to one group more, less one.

    kind: of the layers by which alone a question reads the text ("window", "csa", "hca"); all of them without.
    """
    short, long = ratios(model.config)
    groups = length // long
    # none in the first group, which would have no room before it, nor in the last, which windows may reach
    some = torch.linspace(1, groups - 2, min(DEPTHS, groups - 2)).round().long().unique().tolist()
    phases, residues = (_balanced(texts, short, long, generator) for _ in range(2))
    for number in range(texts):
        needles = task.needles(len(some), generator)
        questions = [n.question for n in needles]
        places = [group * long + phases[number] for group in some]
        prompt = length + residues[number]
        text = text_of(task, prompt - len(questions[0]), needles, places, generator)
        config = model.config
        assert not kind or isinstance(config, ModelConfig)
        unders = [reading(config, kind, questions)] if kind and isinstance(config, ModelConfig) else []
        (logits,) = answers(model, text, questions, unders)
        for needle, place, row in zip(needles, places, logits, strict=True):
            right = int(row.argmax()) == int(task.candidates[needle.value])
            yield Ask(
                length, number, (place // long) / (groups - 1), place, prompt, right, bits_of(row, task, needle.value)
            )


def bits_of(logits: Tensor, task: Task, value: int) -> float:
    """log2 of a value's probability among all values, relative to an even one."""
    among = logits[task.candidates].double().log_softmax(dim=0)
    return (float(among[value]) + math.log(len(among))) / math.log(2)


def _balanced(count: int, short: int, long: int, generator: torch.Generator) -> list[int]:
    """`count` phases below `long` in random order: every `long` have each once, every `short` each mod short once."""
    rounds = []
    for _ in range(-(-count // long)):
        high = torch.stack([torch.randperm(long // short, generator=generator) for _ in range(short)], dim=1)
        order = torch.rand(high.shape, generator=generator).argsort(dim=1)
        rounds.append((high * short + torch.arange(short)).gather(1, order).flatten())
    return torch.cat(rounds)[:count].tolist()


# --- phases ----------------------------------------------------------------------------------------------------------


def retrieved(asks: Sequence[Ask], chance: float) -> list[Ask]:
    """Those of the cells (length, depth) in which the share right is above chance, by Wilson's interval."""
    cells: dict[tuple[int, float], list[Ask]] = {}
    for a in asks:
        cells.setdefault((a.length, a.depth), []).append(a)
    good = [c for c in cells.values() if stats.wilson(sum(a.right for a in c), len(c))[0] > chance]
    return [a for cell in good for a in cell]


def spread_of(asks: Sequence[Ask], phase: Callable[[Ask], int], modulus: int, seed: int) -> Spread:
    """The spread of the share right over phase(ask) in range(modulus)."""
    right = torch.tensor([a.right for a in asks], dtype=torch.float64)
    of_ask = torch.tensor([phase(a) for a in asks])
    counts = torch.bincount(of_ask, minlength=modulus)
    good = torch.bincount(of_ask, weights=right, minlength=modulus)

    def spread(phases: Tensor) -> float:
        n = torch.bincount(phases, minlength=modulus)
        shares = (torch.bincount(phases, weights=right, minlength=modulus) / n)[n > 0]
        return float(shares.max() - shares.min())

    value = spread(of_ask)
    pairs = [(int(g), int(n)) for g, n in zip(good, counts, strict=True)]
    each = [stats.wilson(g, n, 1 - 0.05 / modulus) for g, n in pairs if n]
    low = max(0.0, max(a for a, _ in each) - min(b for _, b in each))
    high = max(b for _, b in each) - min(a for a, _ in each)
    # the texts of a length change places, each with all its questions
    own = {(a.length, a.text): phase(a) for a in asks}
    number = {text: i for i, text in enumerate(sorted(own))}
    row, of_text = torch.tensor([number[a.length, a.text] for a in asks]), torch.tensor([own[t] for t in number])
    borders = list(Counter(length for length, _ in number).values())
    generator = torch.Generator().manual_seed(seed)
    beyond = 0
    for _ in range(SHUFFLES):
        mixed = torch.cat([p[torch.randperm(len(p), generator=generator)] for p in of_text.split(borders)])
        beyond += spread(mixed[row]) >= value - 1e-12
    return Spread(value, low, high, (1 + beyond) / (1 + SHUFFLES), pairs)


# --- what is said of it ----------------------------------------------------------------------------------------------


def run(subject: Subject, settings: Settings) -> Iterator[Record]:
    task, generator = task_of(subject), settings.generator(21)
    long = ratios(subject.config)[1]
    lengths = lengths_of(subject.config, long * settings.pick(16, 128))
    texts = settings.pick(long // 2, 2 * long)
    asks = (a for length in lengths for a in ask(subject.model, task, length, texts, generator))
    yield from told(Recorder(NAME, subject, settings), asks, len(task.candidates))


def told(record: Recorder, asks: Iterator[Ask], candidates: int) -> Iterator[Record]:
    """The records of questions that come in the order of their lengths, of a value among so many."""
    chance, most = 1 / candidates, math.log2(candidates)
    every: list[Ask] = []
    for length, own in _by_length(asks):
        every += own
        n, good = len(own), sum(a.right for a in own)
        low, high = stats.wilson(good, n)
        yield record(
            f"exact match at {length} tokens", good / n, "share", interval=(low, high), n=n,
            detail={"chance": chance, "by_depth": _cells(own, record.subject.config), **_bits(own, most)},
            finding=_said(length, good / n, low, chance),
        )  # fmt: skip
    yield _grid(record, every, chance)
    yield from _phases(record, every, chance)


def _by_length(asks: Iterator[Ask]) -> Iterator[tuple[int, list[Ask]]]:
    own: list[Ask] = []
    for a in asks:
        if own and a.length != own[0].length:
            yield own[0].length, own
            own = []
        own.append(a)
    if own:
        yield own[0].length, own


def _said(length: int, share: float, low: float, chance: float) -> str:
    if low <= chance:
        return f"At {length} tokens it is not above guessing: {share:.0%} right, guessing up to {chance:.0%}."
    return f"At {length} tokens it finds {share:.0%} of the needles (guessing: up to {chance:.0%})."


def _bits(asks: Sequence[Ask], most: float) -> dict[str, float]:
    return {"bits": sum(a.bits for a in asks) / len(asks), "bits_at_most": most}


def _cells(asks: Sequence[Ask], config: AnyConfig) -> list[dict[str, float | bool]]:
    """For each depth of one length what came of it."""
    reach = _reach(config)
    found = []
    for depth in sorted({a.depth for a in asks}):
        own = [a for a in asks if a.depth == depth]
        low, high = stats.wilson(sum(a.right for a in own), len(own))
        found.append({
            "depth": depth, "share": sum(a.right for a in own) / len(own), "low": low, "high": high,
            "bits": sum(a.bits for a in own) / len(own), "in_windows": min(a.prompt - a.place for a in own) <= reach,
        })  # fmt: skip
    return found


def _reach(config: AnyConfig) -> int:
    """How far windows alone can hand something on: each layer's from where the one below ends."""
    return config.num_hidden_layers * (config.sliding_window - 1) if isinstance(config, ModelConfig) else 0


def _grid(record: Recorder, asks: Sequence[Ask], chance: float) -> Record:
    """Depths in fifths, since not every length has room for the same ones."""
    lengths, rows = sorted({a.length for a in asks}), list(range(DEPTHS))
    z: list[list[float | None]] = []
    for row in rows:
        own = [
            [a.right for a in asks if a.length == n and min(DEPTHS - 1, int(a.depth * DEPTHS)) == row] for n in lengths
        ]
        z.append([sum(cell) / len(cell) if cell else None for cell in own])
    plot = {"kind": "heat", "title": "share of needles found", "x": lengths, "xlabel": "tokens",
            "y": [f"{r / DEPTHS:.1f} to {(r + 1) / DEPTHS:.1f}" for r in rows], "ylabel": "depth", "z": z}  # fmt: skip
    good, n = sum(a.right for a in asks), len(asks)
    return record(
        "exact match over the grid", good / n, "share", interval=stats.wilson(good, n), n=n,
        detail={"chance": chance, "plot": plot},
    )  # fmt: skip


def _phases(record: Recorder, every: Sequence[Ask], chance: float) -> Iterator[Record]:
    asks = retrieved(every, chance)
    if not asks:
        yield record.absent(
            "skipped",
            f"nowhere in the grid is the model above chance ({chance:.3g}), so phases cannot be compared: not to "
            "retrieve is not to retrieve evenly",
        )
        return
    short, long = ratios(record.subject.config)
    for what, place in (("place of the value", lambda a: a.place), ("length of the prompt", lambda a: a.prompt)):
        for modulus in (short, long):
            found = spread_of(asks, lambda a, m=modulus, f=place: f(a) % m, modulus, record.settings.seed)
            shares = [good / n if n else None for good, n in found.counts]
            plot = {"title": f"share found, by {what} mod {modulus}", "x": list(range(modulus)),
                    "series": {"share": shares}, "xlabel": f"{what} mod {modulus}", "ylabel": "share",
                    "kind": "bar"}  # fmt: skip
            worst = min((s, i) for i, s in enumerate(shares) if s is not None)[1]
            told_apart = found.p <= 0.01
            yield record(
                f"spread over the {what} mod {modulus}", found.value, "share", interval=(found.low, found.high),
                n=len(asks),
                detail={"p": found.p, "counts": found.counts, "worst_phase": worst,
                        "cells": len({(a.length, a.depth) for a in asks}), "plot": plot},
                finding=f"Needles are found less often at phase {worst} of {modulus} ({what}): the spread is "
                f"{found.value:.0%}, p = {found.p:.3f}." if told_apart else
                f"No phase of {modulus} ({what}) is told apart from the others (p = {found.p:.2f}); a spread above "
                f"{found.high:.0%} can be excluded.",
            )  # fmt: skip
