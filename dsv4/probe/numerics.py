"""numerics: is a text computed the same whatever is beside it, what do narrow memories change, does long text loop?

numerics.invariance: the logits of every token of a prompt, alone in one call, beside other prompts, and in chunks, with
a memory; equal or not in every bit. Where a bit can differ, an observer of log-probabilities can learn that there is
somebody else, and greedy texts differ from run to run. Covers the ops and the format in use on this machine.

numerics.drift: memories in packed, BF16 and FP32 numbers on the same text, by context length: the KL divergence of the
next token's distribution from that of FP32 memories, and how often the likeliest token is another one. Rows are read
from memory by every later token, so this is what a long chat accumulates.

numerics.loops: the share of 4-grams of a greedy text that have come before in it, by length, and how many texts end in
an exact cycle. Greedy text of an untrained or small model loops readily: compare models, not with zero.

Does not cover: other machines, speculation, load with real time in it, or whole evaluations with narrow memories.
Lengths are small in quick: drift at 128K tokens is for full runs of models that have them.
"""

import random
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from dsv4 import ops
from dsv4.config import AnyConfig, ModelConfig
from dsv4.model import LanguageModel
from dsv4.probe import stats
from dsv4.probe.record import Record
from dsv4.probe.subject import Recorder, Settings, Subject

INVARIANCE, DRIFT, LOOPS = "numerics.invariance", "numerics.drift", "numerics.loops"
CHUNK = 512  # tokens of a text that are run at once
GRAM, LONGEST_CYCLE = 4, 64


# --- the same text, elsewhere ----------------------------------------------------------------------------------------


def batched(model: LanguageModel, prompts: Sequence[Tensor]) -> list[Tensor]:
    """Logits [n, V] of each prompt, all in one call with a memory each."""
    lengths = [len(p) for p in prompts]
    memories = model.new_cache(batch=len(prompts))
    segments = list(zip(lengths, memories, strict=True))
    return list(model(torch.cat(list(prompts)), segments=segments).split(lengths))


def chunked(model: LanguageModel, prompt: Tensor, cuts: Sequence[int]) -> Tensor:
    """Logits [n, V] of a prompt that is run in pieces of these lengths."""
    memory = model.new_cache()[0]
    return torch.cat([model(part, segments=[(len(part), memory)]) for part in prompt.split(list(cuts))])


def cut(rng: random.Random, length: int) -> list[int]:
    """Lengths of pieces that add up: single tokens, short ones and long ones."""
    pieces: list[int] = []
    while (left := length - sum(pieces)) > 0:
        pieces.append(min(left, rng.choice((1, 1, 3, 7, 40, 130))))
    return pieces


def differing(a: Tensor, b: Tensor) -> int:
    """How many bits two fp32 tensors of one shape differ in."""
    x = (a.contiguous().view(torch.int32) ^ b.contiguous().view(torch.int32)).long() & 0xFFFFFFFF
    return int(sum(((x >> bit) & 1).sum() for bit in range(32)))


@torch.no_grad()
def layouts(
    model: LanguageModel, prompts: Sequence[Tensor], times: int, seed: int
) -> dict[str, list[tuple[int, float]]]:
    """For each way of running a prompt, bits that differ from those of it alone and the largest difference, of `times`
    compositions each."""
    rng, found = random.Random(seed), dict[str, list[tuple[int, float]]](batch=[], chunks=[])
    alone = [batched(model, [p])[0] for p in prompts]
    for _ in range(times):
        some = rng.sample(range(len(prompts)), rng.randint(2, len(prompts)))
        for i, got in zip(some, batched(model, [prompts[i] for i in some]), strict=True):
            found["batch"].append((differing(got, alone[i]), float((got - alone[i]).abs().max())))
        i = rng.randrange(len(prompts))
        got = chunked(model, prompts[i], cut(rng, len(prompts[i])))
        found["chunks"].append((differing(got, alone[i]), float((got - alone[i]).abs().max())))
    return found


def needs_nothing(config: AnyConfig) -> str | None:
    return None


def run_invariance(subject: Subject, settings: Settings) -> Iterator[Record]:
    record = Recorder(INVARIANCE, subject, settings)
    most = min(settings.pick(200, 1000), subject.config.max_position_embeddings)
    lengths = [1, 3, *(most * i // 4 for i in (1, 2, 3, 4))]
    prompts = [subject.ids(max(1, n), settings, salt=1600 + i) for i, n in enumerate(lengths)]
    for way, found in layouts(subject.model, prompts, settings.pick(6, 60), settings.seed).items():
        same, n = sum(bits == 0 for bits, _ in found), len(found)
        worst = max(difference for _, difference in found)
        what = "beside other prompts" if way == "batch" else "in chunks"
        yield record(
            f"prompts with the same bits {what}", same / n, "share", interval=stats.wilson(same, n), n=n,
            detail={"bits": [bits for bits, _ in found], "largest_difference": worst, "ops": ops.active("linear")},
            finding=f"Of {n} prompts run {what}, {same} have every bit of their logits alone"
            + (f"; the largest difference is {worst:.2g}." if same < n else ": no sign of a neighbour."),
        )  # fmt: skip


# --- narrow memories -------------------------------------------------------------------------------------------------


@torch.no_grad()
def last_logits(model: LanguageModel, ids: Tensor, format: str, rows: int) -> Tensor:
    """Logits fp32 [rows, V] of the last `rows` tokens of a text that is streamed through a memory of a format."""
    memory, found = model.new_cache(format=format)[0], list[Tensor]()
    for part in ids.split(CHUNK):
        last = torch.arange(max(0, len(part) - rows), len(part))
        found.append(model(part, segments=[(len(part), memory)], rows=last))
    return torch.cat(found)[-rows:].cpu()


def apart(got: Tensor, want: Tensor) -> tuple[Tensor, Tensor]:
    """KL(want || got) of each row in nats, fp64 [n], and whether its likeliest token is another, bool [n]."""
    p, q = want.double().log_softmax(dim=1), got.double().log_softmax(dim=1)
    return (p.exp() * (p - q)).sum(dim=1), got.argmax(dim=1) != want.argmax(dim=1)


def formats_of(config: AnyConfig) -> list[str]:
    """Those beside FP32 that are compared: BF16, and packed for a V4 whose index keys have a width that can be."""
    packable = isinstance(config, ModelConfig) and config.index_head_dim & (config.index_head_dim - 1) == 0
    return ["packed", "bfloat16"] if packable else ["bfloat16"]


def run_drift(subject: Subject, settings: Settings) -> Iterator[Record]:
    record = Recorder(DRIFT, subject, settings)
    longest = min(settings.pick(1024, 131072), subject.config.max_position_embeddings)
    lengths = [n for i in (4, 3, 2, 1, 0) if (n := longest >> 2 * i) >= 16] or [longest]
    rows, texts = min(16, lengths[0]), settings.pick(4, 8)
    formats = formats_of(subject.config)
    kl, flips = {f: [[] for _ in lengths] for f in formats}, {f: [[] for _ in lengths] for f in formats}
    for at, length in enumerate(lengths):
        for ids in subject.windows(texts, length, settings, salt=17):
            want = last_logits(subject.model, ids, "float32", rows)
            for f in formats:
                k, flip = apart(last_logits(subject.model, ids, f, rows), want)
                kl[f][at].append(float(k.mean()))
                flips[f][at].append(int(flip.sum()))
    for f in formats:
        series = {other: [sum(x) / len(x) for x in kl[other]] for other in formats}
        plot = {"title": "drift of the next token's distribution", "x": lengths, "series": series, "logx": True,
                "xlabel": "context, tokens", "ylabel": "KL from FP32 memories, nats"}  # fmt: skip
        changed, n = sum(flips[f][-1]), rows * texts
        yield record(
            f"KL with {f} memories at {lengths[-1]} tokens", series[f][-1], "nats", n=texts,
            interval=stats.bootstrap(kl[f][-1], seed=settings.seed),
            detail={"lengths": lengths, "by_length": series[f]} | ({"plot": plot} if f == formats[0] else {}),
        )  # fmt: skip
        yield record(
            f"other likeliest tokens with {f} memories at {lengths[-1]} tokens", changed / n, "share", n=n,
            interval=stats.wilson(changed, n), detail={"lengths": lengths, "by_length": [sum(x) / n for x in flips[f]]},
            finding=f"With {f} memories {changed} of {n} next tokens at {lengths[-1]:,} tokens are others than with "
            "FP32 memories.",
        )  # fmt: skip


# --- loops -----------------------------------------------------------------------------------------------------------


def repeated(ids: Sequence[int], gram: int = GRAM) -> float:
    """The share of n-grams that have come before; 0 for a text shorter than one."""
    grams = [tuple(ids[i : i + gram]) for i in range(len(ids) - gram + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def cycle(ids: Sequence[int], longest: int = LONGEST_CYCLE) -> int:
    """The smallest period, up to `longest`, with which a text ends, three times over; 0: none."""
    for period in range(1, min(longest, len(ids) // 3) + 1):
        if all(ids[-i] == ids[-i - period] for i in range(1, 2 * period + 1)):
            return period
    return 0


@torch.no_grad()
def greedy(model: LanguageModel, prompts: Sequence[Tensor], count: int) -> list[list[int]]:
    """`count` tokens that continue each prompt, the likeliest each time; ends of texts are not heeded."""
    memories = model.new_cache(batch=len(prompts))
    given, texts = list(prompts), [list[int]() for _ in prompts]
    for _ in range(count):
        segments = [(len(ids), memory) for ids, memory in zip(given, memories, strict=True)]
        best = model(torch.cat(given), segments=segments, rows="last").argmax(dim=1).cpu()
        for text, token in zip(texts, best.tolist(), strict=True):
            text.append(token)
        given = list(best[:, None])
    return texts


def run_loops(subject: Subject, settings: Settings) -> Iterator[Record]:
    record = Recorder(LOOPS, subject, settings)
    prompt = 16
    longest = min(settings.pick(256, 8192), subject.config.max_position_embeddings - prompt)
    prompts = list(subject.windows(settings.pick(8, 32), prompt, settings, salt=18))
    texts = greedy(subject.model, prompts, longest)
    lengths = [longest >> i for i in (4, 3, 2, 1, 0)]
    rates = [[repeated(t[:n]) for t in texts] for n in lengths]
    looped, n = sum(cycle(t) > 0 for t in texts), len(texts)
    means = [sum(r) / n for r in rates]
    plot = {"title": "repetition of greedy text", "x": lengths, "series": {f"repeated {GRAM}-grams": means},
            "logx": True, "xlabel": "tokens", "ylabel": "share"}  # fmt: skip
    yield record(
        f"repeated {GRAM}-grams in greedy text", means[-1], "share", n=n,
        interval=stats.bootstrap(rates[-1], seed=settings.seed), detail={"plot": plot, "tokens": longest},
    )  # fmt: skip
    yield record(
        "greedy texts that end in a cycle", looped / n, "share", n=n, interval=stats.wilson(looped, n),
        detail={"periods": [cycle(t) for t in texts], "tokens": longest},
        finding=f"{looped} of {n} greedy texts of {longest:,} tokens end in a cycle of at most {LONGEST_CYCLE} tokens.",
    )  # fmt: skip
