"""fidelity.eclipse: how much of an HCA entry can one token take? fidelity.bleed: which entries mix two authors' texts?

An entry is a softmax over its group's tokens, channel by channel. Eclipse: the share of one token, mean over channels
(1 / 128 where all are equal); what it takes, the other 127 lose. Every token that text can hold is ranked in closed
form, by its gate scores at a layer as if no layer below had added anything to its embedding, against the scores that
the other tokens of a real group have; the best of the ranking are then put into the text and their share is measured in
the whole model. Exact where HCA is the first layer; elsewhere the measured share is one that is reached, not a bound.

Bleed: a boundary between texts (system, user, tool) at position b cuts a group unless b is a multiple of its ratio.
Counted exactly, for every residue: entries whose own group holds tokens of two texts (0 where texts are aligned), and
entries that pool tokens of two texts at all, since a CSA entry also pools the group before its own (1 where aligned: a
later text's first entry reads the end of the text before it, never the other way; 0 where a group of neutral tokens is
put between). Measured for HCA: the later text's gate mass in the entry at a boundary, for ordinary text.

Does not cover: what a query can still recover of a group (needle.py, recovery.py), gate mass in CSA entries, or tokens
chosen to eclipse from the later side of a boundary (at most what eclipse finds). The engine does not align texts:
`aligned` says what whoever writes a prompt would add. Entries are counted as a layer pools its own input, which below
the top already holds what attention has read elsewhere.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dsv4 import ops
from dsv4.config import AnyConfig, LayerKind, ModelConfig
from dsv4.model import LanguageModel, Segment, Transformer, hyper
from dsv4.probe import stats
from dsv4.probe.attacks import allowed_of
from dsv4.probe.record import Record
from dsv4.probe.subject import Recorder, Settings, Subject

ECLIPSE, BLEED = "fidelity.eclipse", "fidelity.bleed"
RUN = 4096  # tokens of the vocabulary that are ranked at once


def layers_of(config: AnyConfig, name: str) -> list[int]:
    """The trunk's layers of a kind ("hca", "csa")."""
    if not isinstance(config, ModelConfig):
        return []
    return [i for i in range(config.num_hidden_layers) if config.layer_kind(i).name == name]


def needs_hca(config: AnyConfig) -> str | None:
    if not isinstance(config, ModelConfig) or not layers_of(config, "hca"):
        return "the model has no HCA layer, so no entry stands for many tokens"
    if 2 * config.compress_rate_hca > config.max_position_embeddings:
        return f"within its {config.max_position_embeddings} positions there are not two HCA entries"
    return None


# --- gate scores -----------------------------------------------------------------------------------------------------


def gate_scores(model: LanguageModel, ids: Tensor) -> dict[int, Tensor]:
    """Of every HCA layer on a text [T], fp32 [T // r, r, D]: what its entries' softmaxes are over, positional bias
    included."""
    config = model.config
    assert isinstance(config, ModelConfig)
    layers, ratio, found = layers_of(config, "hca"), config.compress_rate_hca, list[Tensor]()

    def wrap(name: str, op: Callable) -> Callable:
        def rows(x: Tensor, wkv: Tensor, wgate: Tensor, ape: Tensor, positions: Tensor) -> Tensor:
            got = op(x, wkv, wgate, ape, positions)
            if len(ape) == ratio:
                found.append(got[:, 1].float().cpu())
            return got

        return rows

    with torch.no_grad(), ops.wrapped(["compressor_rows"], wrap):
        model.trunk(ids, [Segment(len(ids))])
    assert len(found) == len(layers), "an HCA layer has one compressor, which pools every token once"
    whole = len(ids) // ratio * ratio
    return {layer: scores[:whole].unflatten(0, (-1, ratio)) for layer, scores in zip(layers, found, strict=True)}


def shares(scores: Tensor) -> Tensor:
    """Of each token in its entry, mean over channels: [..., r, D] -> fp64 [..., r]."""
    return scores.double().softmax(dim=-2).mean(dim=-1)


@torch.no_grad()
def vocabulary_scores(model: Transformer, layer: int) -> Tensor:
    """Gate scores fp32 [V, D] of every token at an HCA layer, without positional bias, as if the layers below had
    written nothing: exact at the first layer."""
    blocks: Any = model.layers
    block, found = blocks[layer], []
    for ids in torch.arange(model.config.vocab_size, device=model.device).split(RUN):
        x = model.embedded(ids, None)[:, None].expand(-1, model.config.num_streams, -1).contiguous()
        h = block.attn_norm(x, hyper.parameters_of(block, "hc_attn"))[0]
        found.append(ops.linear(h.float(), block.attn.compressor.wgate.weight).cpu())
    return torch.cat(found)


def predicted_shares(scores: Tensor, group: Tensor, bias: Tensor, place: int) -> Tensor:
    """The share of each token, fp64 [V], were it at `place` of a group whose others stay: scores [V, D] without bias,
    group [r, D] with it, bias [r, D]."""
    others = torch.cat([group[:place], group[place + 1 :]]).double().logsumexp(dim=0)
    return torch.cat(
        [torch.sigmoid(some.double() + bias[place].double() - others).mean(dim=1) for some in scores.split(RUN)]
    )


@dataclass(frozen=True)
class Eclipse:
    """A token at a place of a layer's group: the share that was predicted, and the one measured in the model."""

    layer: int
    place: int
    token: int
    predicted: float
    measured: float


def eclipses(model: Transformer, ids: Tensor, places: Sequence[int], best: int, allowed: Tensor) -> list[Eclipse]:
    """In the last group of a text, for each HCA layer, the `best` pairs of token and place, put there.

    The whole vocabulary is ranked at `places`; the first `best` tokens of each, at every place of the group. allowed:
    bool [V], the tokens that there are to choose from.
    """
    blocks: Any = model.layers
    scores, found, best = gate_scores(model, ids), [], min(best, int(allowed.sum()))
    ratio = next(iter(scores.values())).shape[1]
    start = (len(ids) // ratio - 1) * ratio
    for layer, groups in scores.items():
        of_all, bias = vocabulary_scores(model, layer), blocks[layer].attn.compressor.ape.detach().float().cpu()
        ranked = [predicted_shares(of_all, groups[-1], bias, place).masked_fill(~allowed, -1.0) for place in places]
        tokens = torch.cat([r.topk(best).indices for r in ranked]).unique()
        table = torch.stack([predicted_shares(of_all[tokens], groups[-1], bias, place) for place in range(ratio)])
        for at in table.flatten().topk(min(best, table.numel())).indices.tolist():
            place, token = at // len(tokens), int(tokens[at % len(tokens)])
            text = ids.clone()
            text[start + place] = token
            measured = shares(gate_scores(model, text)[layer][-1])[place]
            found.append(Eclipse(layer, place, token, float(table.flatten()[at]), float(measured)))
    return found


def run_eclipse(subject: Subject, settings: Settings) -> Iterator[Record]:
    record = Recorder(ECLIPSE, subject, settings)
    model, c = subject.model, subject.config
    assert isinstance(model, Transformer) and isinstance(c, ModelConfig)
    r = c.compress_rate_hca
    ids = subject.ids(min(settings.pick(4, 16), c.max_position_embeddings // r) * r, settings, salt=14)
    natural = {layer: shares(s).amax(dim=1) for layer, s in gate_scores(model, ids).items()}
    every = torch.cat(list(natural.values()))
    yield record(
        "largest share in an entry of ordinary text", float(every.mean()), "share", n=len(every),
        interval=stats.bootstrap(every, seed=settings.seed),
        detail={"uniform": 1 / r, "by_layer": {str(layer): float(s.mean()) for layer, s in natural.items()}},
        finding=f"In ordinary text the strongest token has {float(every.mean()) * r:.1f} times its even share of an "
        f"entry of {r} tokens.",
    )  # fmt: skip
    places = [r * (2 * i + 1) // (2 * n) for n in (settings.pick(2, 8),) for i in range(n)]
    allowed = allowed_of(subject)
    found = eclipses(model, ids, places, settings.pick(8, 32), allowed)
    top = max(found, key=lambda e: e.measured)
    agreement = stats.spearman(
        *(torch.tensor(x) for x in zip(*((e.predicted, e.measured) for e in found), strict=True))
    )
    yield record(
        "share of the strongest token found", top.measured, "share", n=len(found),
        detail={"token": top.token, "layer": top.layer, "place": top.place, "predicted": top.predicted,
                "uniform": 1 / r, "ranked": int(allowed.sum()), "agreement_of_prediction": agreement},
        finding=f"The strongest token found (id {top.token}) takes {top.measured:.1%} of an entry of {r} tokens, "
        f"{top.measured * r:.1f} times its even share; the other {r - 1} share what is left.",
    )  # fmt: skip


# --- boundaries ------------------------------------------------------------------------------------------------------


def mixed(lengths: Sequence[int], kind: LayerKind, *, own: bool) -> list[int]:
    """The entries of a layer that mix tokens of two texts, of texts that follow each other. own: among the tokens of
    the entry's own group; else among all that it pools, with overlap those of the group before too."""
    ends, total = [sum(lengths[: i + 1]) for i in range(len(lengths))], sum(lengths)
    found = []
    for entry in range(total // kind.ratio):
        first = entry * kind.ratio
        begin = first if own or not kind.overlap else max(0, first - kind.ratio)
        if any(begin < end < first + kind.ratio for end in ends):
            found.append(entry)
    return found


def aligned(lengths: Sequence[int], multiple: int) -> list[int]:
    """How many neutral tokens after each text bring the next to a multiple of `multiple` (the last gets none)."""
    return [-n % multiple for n in lengths[:-1]] + [0] * bool(lengths)


def needs_entries(config: AnyConfig) -> str | None:
    return None if layers_of(config, "hca") or layers_of(config, "csa") else "no layer of the model pools tokens"


def run_bleed(subject: Subject, settings: Settings) -> Iterator[Record]:
    record = Recorder(BLEED, subject, settings)
    c = subject.config
    assert isinstance(c, ModelConfig)
    kinds = {c.layer_kind(i).name: c.layer_kind(i) for i in layers_of(c, "csa") + layers_of(c, "hca")}
    for name, kind in kinds.items():
        r = kind.ratio
        lengths = [(2 * r + residue, 4 * r) for residue in range(r)]
        own = [len(mixed(n, kind, own=True)) for n in lengths]
        pooled = [len(mixed(n, kind, own=False)) for n in lengths]
        apart = [len(mixed([a, -a % r + r, b], kind, own=False)) for a, b in lengths]
        padded = [(a + aligned((a, b), r)[0], b) for a, b in lengths]
        left = sum(len(mixed(n, kind, own=True)) for n in padded)
        yield record(
            f"{name.upper()} entries that mix two texts, a boundary", sum(own) / r, "entries", n=r,
            detail={"own_group_by_residue": own, "pooled_by_residue": pooled, "aligned": left,
                    "pooled_beside_a_neutral_group": apart},
            finding=f"A boundary at a random place mixes two texts in {sum(own) / r:.2f} {name.upper()} entries of "
            f"every such layer, and in {left} where texts begin at multiples of {r}.",
        )  # fmt: skip
    if needs_hca(c) is not None:
        return
    r = c.compress_rate_hca
    ids = subject.ids(min(settings.pick(4, 16), c.max_position_embeddings // r) * r, settings, salt=15)
    of_all = torch.cat([shares(s) for s in gate_scores(subject.model, ids).values()])  # [groups of all layers, r]
    mass = of_all.flip(1).cumsum(dim=1).flip(1)[:, 1:]  # of the tokens from residue 1, 2, ... on
    by_residue, each = mass.mean(dim=0), mass.mean(dim=1)
    even = [(r - residue) / r for residue in range(1, r)]
    plot = {"title": "gate mass of the later text in the HCA entry at a boundary", "x": list(range(1, r)),
            "series": {"measured": by_residue.tolist(), "if all tokens weighed the same": even},
            "xlabel": "tokens of the earlier text in the entry", "ylabel": "mass"}  # fmt: skip
    yield record(
        "gate mass of the later text in an HCA entry at a boundary", float(each.mean()), "share", n=len(each),
        interval=stats.bootstrap(each, seed=settings.seed), detail={"plot": plot},
    )  # fmt: skip
