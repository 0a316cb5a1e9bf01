"""selection.stability: how little does it take to change what CSA reads?

Covers, for queries of real text that see more entries than they may read, in every CSA layer: the margin between the
last entry that is chosen and the first that is not, in standard deviations of the query's scores; how often the two
are exactly equal (then the tie rule decides: lowest entry first); the share of queries whose choice changes, and the
Jaccard index of the two choices, when every key moves by Gaussian noise of a given relative size; and the recall of the
fp32 choice when scores are rounded to BF16 (the report of V4 states 99.7%), or queries and keys to FP8 or FP4 as the
packed memory has them.

Does not cover: what a changed choice does to the output (an entry at the border mostly has little weight), or keys that
somebody has chosen (selection.hijack). Queries of one text are not independent: intervals are over texts' queries as if
they were, and so too narrow for a text of another kind.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from dsv4.config import ModelConfig
from dsv4.ops.formats import Packed
from dsv4.probe import stats
from dsv4.probe.indexed import Asked, best, enough_tokens, margins, overlap, watch
from dsv4.probe.record import Record
from dsv4.probe.subject import Recorder, Settings, Subject

NAME = "selection.stability"
NOISE = (1e-4, 1e-3, 1e-2, 3e-2, 1e-1)
VENDOR = 0.997  # recall of entries when scores go from FP32 to BF16, report of V4


def run(subject: Subject, settings: Settings) -> Iterator[Record]:
    record = Recorder(NAME, subject, settings)
    assert isinstance(subject.config, ModelConfig)
    asked, _ = watch(subject.model, subject.ids(enough_tokens(subject.config), settings, salt=3))
    gaps, ties = [], []
    jaccard: dict[float, list[Tensor]] = {e: [] for e in NOISE}
    recall: dict[str, list[Tensor]] = {"bf16": [], "fp8": [], "fp4": []}
    for layer in asked:
        rows = layer.choosers(settings.pick(128, 1024), settings.generator(300 + layer.layer))
        scores = layer.scores(rows)
        clean = best(scores, layer.k)
        gap, tie = margins(scores, layer.k)
        gaps.append(gap)
        ties.append(tie)
        for size in NOISE:
            moved = layer.scores(rows, keys=noisy(layer.keys, size, settings.generator(400 + layer.layer)))
            jaccard[size].append(overlap(best(moved, layer.k), clean)[0])
        for name, rounded in narrowed(layer, rows, scores).items():
            recall[name].append(overlap(best(rounded, layer.k), clean)[1])
    per_layer = {str(a.layer): float(g.median()) for a, g in zip(asked, gaps, strict=True)}
    all_gaps, all_ties = torch.cat(gaps), torch.cat(ties)
    n = len(all_gaps)
    yield record(
        "median margin", float(all_gaps.median()), "std", n=n, detail={"by_layer": per_layer},
        interval=stats.bootstrap(all_gaps, stats.median, seed=settings.seed, draws=500),
        finding=f"Half of all queries choose their last entry by less than {float(all_gaps.median()):.3g} standard "
        "deviations of the scores; a change smaller than that can move the choice.",
    )  # fmt: skip
    yield record("5th percentile of margins", float(all_gaps.quantile(0.05)), "std", n=n)
    tied = int(all_ties.sum())
    yield record(
        "choices decided by the tie rule", tied / n, "share", interval=stats.wilson(tied, n), n=n,
        finding=f"{tied} of {n} choices hang on an exact tie: an engine with another tie rule reads other entries."
        if tied else "",
    )  # fmt: skip
    flips = {size: torch.cat(found) < 1 for size, found in jaccard.items()}
    share = [float(f.double().mean()) for f in flips.values()]
    means = [float(torch.cat(found).mean()) for found in jaccard.values()]
    plot = {"title": "choices under noise on the keys", "x": list(NOISE), "logx": True, "xlabel": "relative noise",
            "ylabel": "share", "series": {"queries with another choice": share, "Jaccard index": means}}  # fmt: skip
    changed = int(flips[1e-2].sum())
    yield record(
        "queries with another choice at 1% noise", changed / n, "share", interval=stats.wilson(changed, n), n=n,
        detail={"noise": list(NOISE), "flips": share, "jaccard": means, "plot": plot},
    )  # fmt: skip
    for name, found in recall.items():
        values = torch.cat(found)
        value, low_high = float(values.mean()), stats.bootstrap(values, seed=settings.seed, draws=500)
        said = f" (the report of V4 states {VENDOR:.1%})" if name == "bf16" else ""
        yield record(
            f"recall of the fp32 choice in {name}", value, "share", interval=low_high, n=n,
            finding=f"With {'scores' if name == 'bf16' else 'queries and keys'} in {name}, {value:.2%} of the entries "
            f"that fp32 chooses are chosen{said}.",
        )  # fmt: skip


def noisy(keys: Tensor, size: float, generator: torch.Generator) -> Tensor:
    """Keys [E, D], each moved by Gaussian noise whose expected length is `size` times its own."""
    noise = torch.randn(keys.shape, generator=generator)
    return keys + size * keys.norm(dim=1, keepdim=True) / keys.shape[1] ** 0.5 * noise


def narrowed(layer: Asked, rows: Tensor, scores: Tensor) -> dict[str, Tensor]:
    """The scores [n, E] once more: rounded to BF16, and of queries and keys in FP8 and FP4 (blocks of 32, UE8M0 scales,
    after the Hadamard rotation where the width allows one: as the packed memory has them)."""
    found, width = {"bf16": scores.bfloat16().float()}, layer.keys.shape[1]
    for code in ("fp8", "fp4"):
        rounding = Packed(width, code, 32, rotated=width & (width - 1) == 0)
        q = layer.q[rows]
        q = rounding.as_read(q.flatten(0, -2)).view(q.shape)
        found[code] = layer.scores(rows, q, rounding.as_read(layer.keys))
    return found
