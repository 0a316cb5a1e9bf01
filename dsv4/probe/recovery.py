"""fidelity.hca: how many bits about the 128 tokens of a group can be read back from its one HCA entry?

By a linear decoder, for any weights: at m places of a group stands one of two tokens, one bit each, drawn evenly; the
rest is ordinary text. From the entries of many such groups (each the beginning of a text of its own, so that nothing
else can tell) a ridge regression learns every bit, a second part of the groups makes probabilities of its outputs, and
a third counts: the mean of sum_j (1 + log2 p(bit_j)). For independent bits that is a lower bound on the information
that the entry has about them, whatever p is (Barber and Agakov): 0 or a little less where nothing can be read. Linear,
because attention adds entries up and maps them linearly. Bits per entry: of the best number of bits put in, which the
second part chooses.

By the model itself, HCA alone: needles in one group of a long text, and while the question is read CSA and the window
are closed to it (needles.py). The text before it was read with everything. Bits of all needles of the entry, by how
many there are; probabilities are flattened by one temperature, which half of the texts choose, along with the number of
needles, and the other half measures. A model that finds nothing with everything open is left out with that reason; one
that finds needles, but not by HCA alone, has 0 bits here, and that is a finding.

Does not cover: what a decoder that is not linear could read, entries of groups further on in a text (where attention
below has mixed in other groups), places that depend on each other as those of real text do, CSA's entries, or keys
that the model was not asked by.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from dsv4 import ops
from dsv4.config import AnyConfig, ModelConfig
from dsv4.model import LanguageModel, Segment
from dsv4.probe import stats
from dsv4.probe.fidelity import layers_of, needs_hca
from dsv4.probe.needles import Task, answers, reading, task_of, text_of
from dsv4.probe.record import Record
from dsv4.probe.subject import Recorder, Settings, Subject

NAME = "fidelity.hca"
GROUPS = 4  # of the long ratio in a text with needles, which are in the second
AT_ONCE = 32  # groups read in one call
RIDGES = (1e-4, 1e-2, 1.0)  # of the entries' mean square; the second part chooses
HEAT = (0.0, 0.1, 0.2, 0.4, 0.7, 1.0, 1.5)  # factors on the logits


# --- a linear decoder ------------------------------------------------------------------------------------------------


@torch.no_grad()
def entries_of(model: LanguageModel, groups: Tensor) -> dict[int, Tensor]:
    """What each HCA layer has of groups of ids int64 [G, r], each a text of its own: entries fp32 [G, D]."""
    config = model.config
    assert isinstance(config, ModelConfig) and groups.shape[1] == config.compress_rate_hca
    layers, found = layers_of(config, "hca"), list[Tensor]()

    def wrap(name: str, op: Callable) -> Callable:
        def compress(values: Tensor, scores: Tensor, first: Tensor, previous: Tensor, r: int, *rest: object) -> Tensor:
            got = op(values, scores, first, previous, r, *rest)
            if r == config.compress_rate_hca:
                found.append(got.float().cpu())
            return got

        return compress

    with ops.wrapped(["compress"], wrap):
        for part in groups.split(AT_ONCE):
            model.trunk(part.flatten().to(model.device), [Segment(groups.shape[1])] * len(part))
    return {layer: torch.cat(found[i :: len(layers)]) for i, layer in enumerate(layers)}


@dataclass(frozen=True)
class Decoded:
    """Of m bits put into an entry: fp64 [G] bits read back of each group of the third part, [m] of each place (means),
    and what the second part expected."""

    bits: Tensor
    by_place: Tensor
    expected: float


def decode(entries: Tensor, bits: Tensor) -> Decoded:
    """entries [G, D], bits int64 [G, m] of 0 and 1: half of the groups teach, a quarter each calibrate and count."""
    half, most = len(entries) // 2, len(entries) * 3 // 4
    signs = bits.double() * 2 - 1
    x = entries.double()
    x = (x - x[:half].mean(dim=0)) / x[:half].std(dim=0).clamp_min(1e-6)
    x = torch.cat([x, torch.ones(len(x), 1, dtype=torch.float64)], dim=1)
    gram, right = x[:half].T @ x[:half], x[:half].T @ signs[:half]
    best: tuple[float, Tensor] | None = None
    for ridge in RIDGES:
        said = x @ torch.linalg.solve(gram + ridge * half * torch.eye(x.shape[1], dtype=torch.float64), right)
        read = _calibrated(said, signs, slice(half, most))
        expected = float(read[half:most].sum(dim=1).mean())
        if best is None or expected > best[0]:
            best = expected, read
    assert best is not None
    return Decoded(best[1][most:].sum(dim=1), best[1][most:].mean(dim=0), best[0])


def _calibrated(said: Tensor, signs: Tensor, part: slice) -> Tensor:
    """1 + log2 of the probability of each bit [G, m], if outputs of either sign were normal with equal spread, as they
    are in `part`. Of certainty one part in as many as `part` has groups is kept back: no sample ever shows it."""
    right = said[part] * signs[part]
    n = len(right)
    mean, spread = right.mean(dim=0), right.var(dim=0).clamp_min(1e-12)
    odds = 2 * mean.clamp_min(0) / spread * said * signs
    return 1 + ((1 - 1 / n) * torch.sigmoid(odds) + 0.5 / n).log2()


def put_in(ids: Tensor, pairs: Tensor, bits: Tensor, places: Tensor) -> Tensor:
    """Groups int64 [G, r] with one of two ids, pairs int64 [m, 2], at each place [m], by bits int64 [G, m]."""
    groups = ids.clone()
    groups[:, places] = pairs[torch.arange(len(places)), bits]
    return groups


def spread_places(r: int, m: int) -> Tensor:
    """m places of a group of r, evenly spread."""
    return torch.tensor([r * (2 * i + 1) // (2 * m) for i in range(m)])


def needs(config: AnyConfig) -> str | None:
    why = needs_hca(config)
    if (
        why is None
        and isinstance(config, ModelConfig)
        and GROUPS * config.compress_rate_hca > config.max_position_embeddings
    ):
        why = f"its {config.max_position_embeddings} positions are too few for a needle that has left the window"
    return why


def run(subject: Subject, settings: Settings) -> Iterator[Record]:
    record = Recorder(NAME, subject, settings)
    yield decoded(record, subject, settings)
    task = task_of(subject)
    yield from told(record, by_needles(subject.model, task, settings), len(task.candidates))


def decoded(record: Recorder, subject: Subject, settings: Settings) -> Record:
    """The record of what a linear decoder reads, of ordinary text with bits put in."""
    c = subject.config
    assert isinstance(c, ModelConfig)
    r, number = c.compress_rate_hca, settings.pick(512, 4096)
    generator = settings.generator(31)
    loads = [m for m in (1, 8, 32, r) if m <= r]
    found: dict[int, dict[int, Decoded]] = {}
    for m in loads:
        ids = torch.stack(list(subject.windows(number, r, settings, salt=32)))
        pairs = torch.stack([torch.randperm(c.vocab_size, generator=generator)[:2] for _ in range(m)])
        bits = torch.randint(0, 2, (number, m), generator=generator)
        for layer, entries in entries_of(subject.model, put_in(ids, pairs, bits, spread_places(r, m))).items():
            found.setdefault(layer, {})[m] = decode(entries, bits)
    layer, load = max(((n, m) for n in found for m in loads), key=lambda at: found[at[0]][at[1]].expected)
    best = found[layer][load]
    value = float(best.bits.mean())
    plot = {
        "title": "bits read back from one HCA entry", "x": loads, "logx": True, "xlabel": f"bits put into {r} tokens",
        "ylabel": "bits", "series": {f"layer {n}": [float(d.bits.mean()) for d in of.values()]
                                     for n, of in found.items()},
    }  # fmt: skip
    return record(
        "bits per entry, linear decoder", value, "bits", interval=stats.bootstrap(best.bits, seed=settings.seed),
        n=len(best.bits),
        detail={"put_in": load, "layer": layer, "numbers": c.head_dim, "by_place": best.by_place.tolist(),
                "by_load": {str(n): {str(m): float(d.bits.mean()) for m, d in of.items()} for n, of in found.items()},
                "plot": plot},
        finding=f"Of {load} bits put into {r} tokens, a linear decoder reads {max(0.0, value):.1f} from their entry "
        f"(layer {layer}, {c.head_dim} numbers): as much as {max(0.0, value) / r:.3f} bits a token.",
    )  # fmt: skip


# --- the model itself ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Asked:
    """Questions of texts with m needles in one group: log-probabilities of all C values before flattening, as logits
    fp64 [texts, m, C], and the values int64 [texts, m]; with HCA alone, and with everything open."""

    alone: Tensor
    everything: Tensor
    values: Tensor


def by_needles(model: LanguageModel, task: Task, settings: Settings) -> dict[int, Asked]:
    """By number of needles in a group."""
    c = model.config
    assert isinstance(c, ModelConfig)
    r, generator, texts = c.compress_rate_hca, settings.generator(33), settings.pick(32, 256)
    length = GROUPS * r
    found: dict[int, Asked] = {}
    for m in (1, 2, 4, 8, 16):
        if m > task.most:
            break
        drawn = [task.needles(m, generator) for _ in range(texts)]
        size = max(len(needles[0].before) + 1 + len(needles[0].after) for needles in drawn)  # a name's tokens differ
        room = r // m
        if size > room:
            break
        alone, everything, values = [], [], []
        for needles in drawn:
            questions = [n.question for n in needles]
            jitter = torch.randint(0, room - size + 1, (m,), generator=generator).tolist()
            places = [r + room * i + jitter[i] + len(needles[0].before) for i in range(m)]
            text = text_of(task, length - len(questions[0]), needles, places, generator)
            one, all_of_it = answers(model, text, questions, [reading(c, "hca", questions), nullcontext()])
            alone.append(one[:, task.candidates])
            everything.append(all_of_it[:, task.candidates])
            values.append(torch.tensor([n.value for n in needles]))
        found[m] = Asked(torch.stack(alone).double(), torch.stack(everything).double(), torch.stack(values))
    return found


def bits_each(logits: Tensor, values: Tensor, heat: float) -> Tensor:
    """fp64 [texts]: bits of all of a text's needles, with logits [texts, m, C] times `heat`."""
    among = (logits * heat).log_softmax(dim=-1).gather(-1, values[..., None])[..., 0]
    return ((among + math.log(logits.shape[-1])) / math.log(2)).sum(dim=1)


def told(record: Recorder, found: dict[int, Asked], candidates: int) -> Iterator[Record]:
    """The record of what the model reads by HCA alone."""
    chance = 1 / candidates
    hits = torch.cat([(a.everything.argmax(-1) == a.values).flatten() for a in found.values()]) if found else []
    good, n = int(sum(hits)), len(hits)
    if not n or stats.wilson(good, n)[0] <= chance:
        why = f"{good} of {n} needles found with everything open, where guessing finds {chance:.3g} of them"
        yield record.absent("skipped", f"the model does not retrieve ({why}), so nothing can be asked of HCA alone")
        return
    best: tuple[float, int, float] | None = None
    for m, asked in found.items():
        for heat in HEAT:
            expected = float(bits_each(asked.alone[::2], asked.values[::2], heat).mean())
            if best is None or expected > best[0]:
                best = expected, m, heat
    assert best is not None
    _, m, heat = best
    counted = bits_each(found[m].alone[1::2], found[m].values[1::2], heat)
    value = float(counted.mean())
    by_load = {}
    for number, asked in found.items():
        right = [(x.argmax(-1) == asked.values).flatten() for x in (asked.alone, asked.everything)]
        by_load[str(number)] = {
            "alone": float(right[0].double().mean()), "everything": float(right[1].double().mean()),
            "alone_interval": stats.wilson(int(right[0].sum()), len(right[0])),
        }  # fmt: skip
    plot = {"title": "needles found, by how many share one HCA entry", "x": list(found), "xlabel": "needles in a group",
            "ylabel": "share", "series": {name: [v[key] for v in by_load.values()]
                                          for name, key in (("HCA alone", "alone"), ("everything", "everything"))}
            | {"guessing": [chance] * len(found)}}  # fmt: skip
    yield record(
        "bits per entry, read by HCA alone", value, "bits", n=len(counted),
        interval=stats.bootstrap(counted, seed=record.settings.seed),
        detail={"needles": m, "temperature_factor": heat, "bits_put_in": m * math.log2(candidates), "chance": chance,
                "by_needles": by_load, "plot": plot},
        finding=f"With CSA and the window closed, the model reads {max(0.0, value):.2f} bits from one HCA entry; with "
        f"everything open it finds {good / n:.0%} of the same needles.",
    )  # fmt: skip
