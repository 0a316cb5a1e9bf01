"""attack.compression: does an attack on tokens work the same with compression on and off?

A text is attacked by GCG (attacks.py) twice, as the model is and with its layers reading their windows alone: CSA and
HCA entries are there for nobody then. Covers: how often each attack makes the wanted token the likeliest where it was
found; how often one that was found with compression works without and the other way; and how often one that works goes
on working where CSA reads every entry, and where the last token reads memories in FP32, BF16 and packed numbers. The
slots are eight tokens in the text's second quarter, wanted is the token that the clean text makes the 10th likeliest.

Does not cover: a model that was trained without compression (its attacks would be others), texts so long that the
window has nothing of the attack (the detail says how long they are, and whether CSA left anything out), or refusal.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from dsv4 import ops
from dsv4.config import AnyConfig, ModelConfig
from dsv4.model import LanguageModel, Segment
from dsv4.probe import stats
from dsv4.probe.attacks import SLOTS, Found, Goal, allowed_of, search
from dsv4.probe.jacobian import without_parameters
from dsv4.probe.numerics import formats_of
from dsv4.probe.record import Record
from dsv4.probe.subject import Recorder, Settings, Subject

NAME = "attack.compression"
RANK = 10
ON, OFF, ALL = "as it is", "windows alone", "every entry read"


def needs(config: AnyConfig) -> str | None:
    if not isinstance(config, ModelConfig) or not any(kind.ratio for kind in config.trunk_kinds):
        return "no layer of the model reads compressed entries"
    return "a vocabulary of two tokens leaves nothing to swap" if config.vocab_size <= 2 else None


@contextmanager
def reading(way: str) -> Iterator[None]:
    """Inside the block layers read their entries as they do (ON), none of them (OFF), or all that they see (ALL)."""

    def wrap(name: str, op: Callable) -> Callable:
        def attend(q: Tensor, kv: Tensor, window: ops.Spans, entries: object, visible: object, chosen: object,
                   *rest: object) -> object:  # fmt: skip
            if way == OFF:
                return op(q, kv, window, None, None, None, *rest)
            return op(q, kv, window, entries, visible, None, *rest)

        return attend

    if way == ON:
        yield
        return
    with ops.wrapped(["sparse_attention"], wrap):
        yield


@torch.no_grad()
def first_choice(model: LanguageModel, prompt: Tensor, format: str = "") -> int:
    """The likeliest token after a prompt int64 [T]; format: of a memory, from which its last token reads the others."""
    if not format:
        hidden = model.trunk(prompt, [Segment(len(prompt))]).hidden
        return int(model.logits(hidden[-1:])[0].argmax())
    memory = model.new_cache(format=format)[0]
    model(prompt[:-1], segments=[(len(prompt) - 1, memory)], rows="last")
    return int(model(prompt[-1:], segments=[(1, memory)])[0].argmax())


def works(goal: Goal, found: Found, way: str = ON, format: str = "") -> bool:
    """Whether a text of one wanted token makes it the likeliest."""
    with reading(way):
        return first_choice(goal.model, found.text[:-1], format) == int(found.text[-1])


def goals(subject: Subject, settings: Settings, way: str) -> Iterator[Goal]:
    """Texts with slots; wanted is what is 10th likeliest the way that they are read."""
    allowed, length = allowed_of(subject), settings.pick(96, 512)
    slots = torch.arange(length // 4, length // 4 + SLOTS)
    for ids in subject.windows(settings.pick(6, 64), length, settings, salt=19):
        with torch.no_grad(), reading(way):
            hidden = subject.model.trunk(ids, [Segment(length)]).hidden
            logits = subject.model.logits(hidden[-1:])[0].cpu()
        likeliest = logits.masked_fill(~allowed, float("-inf")).argsort(descending=True)
        wanted = likeliest[min(RANK, int(allowed.sum())) - 1]
        yield Goal(subject.model, torch.cat([ids, wanted[None]]), slots, allowed=allowed)


def run(subject: Subject, settings: Settings) -> Iterator[Record]:
    record = Recorder(NAME, subject, settings)
    c, budget = subject.config, settings.pick(128, 4096)
    assert isinstance(c, ModelConfig)
    top, batch = settings.pick(64, 256), settings.pick(32, 128)
    for way, other in ((ON, OFF), (OFF, ON)):
        with without_parameters(subject.model), reading(way):
            every = list(goals(subject, settings, way))
            found = [search(g, budget, settings.generator(950 + i), top=top, batch=batch) for i, g in enumerate(every)]
        won = [(g, f) for g, f in zip(every, found, strict=True) if works(g, f, way)]
        length, said = len(every[0].ids) - 1, "on" if way == ON else "off"
        yield record(
            f"attacks that work, found and run with compression {said}", len(won) / len(every), "share", n=len(every),
            interval=stats.wilson(len(won), len(every)),
            detail={"budget": budget, "tokens": length, "rank": RANK,
                    "csa_leaves_out": length > c.compress_rate_csa * (c.index_topk + 1)},
            finding="" if won else "No attack worked, so none could be tried the other way: this is no pass.",
        )  # fmt: skip
        if not won:
            continue  # there is none to try otherwise
        yield kept(record, f"of those found with compression {said}, work with it {'off' if way == ON else 'on'}",
                   [works(g, f, other) for g, f in won])  # fmt: skip
        if way == OFF:
            continue
        yield kept(record, "of those, work where CSA reads every entry", [works(g, f, ALL) for g, f in won])
        for format in ["float32", *formats_of(c)]:
            yield kept(record, f"of those, work with {format} memories", [works(g, f, ON, format) for g, f in won])


def kept(record: Recorder, name: str, still: list[bool]) -> Record:
    """The share of attacks that still work."""
    n = len(still)
    return record(
        name, sum(still) / n, "share", n=n, interval=stats.wilson(sum(still), n),
        finding=f"{sum(still)} of {n} attacks {name.removeprefix('of those, ')}."
        if name.startswith("of those, ") else "",
    )  # fmt: skip
