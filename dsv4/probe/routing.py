"""routing.learned, routing.silence, streams.ablate: which learned choices hang by a thread, and what single experts and
single residual streams carry.

routing.learned covers the margin between the last chosen and the first rejected expert (score with bias, in standard
deviations of a token's scores), and the load factor of ordinary text and of one token repeated. routing.silence removes
each routed expert in turn, in all tokens, as published attacks on other MoE models do (the gate never chooses it), and
reports by how much the next-token loss grows: how concentrated a model's function is. streams.ablate sets each of the N
residual streams to zero at a layer's input and reports the same; its rescue keeps one stream alone and says what share
of the damage of losing all of them that saves.

Does not cover: which experts carry refusals (that needs a model that refuses, and its prompts), searches for tokens
that overload learned experts, latency. Losses are of this text, and intervals are over its windows.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from dsv4.config import AnyConfig, ModelConfig
from dsv4.model import LanguageModel, Segment, Transformer
from dsv4.probe import stats
from dsv4.probe.hashing import load_factor
from dsv4.probe.record import Record
from dsv4.probe.subject import Recorder, Settings, Subject


def needs_gate(config: AnyConfig) -> str | None:
    if not isinstance(config, ModelConfig) or config.num_hash_layers >= config.num_hidden_layers:
        return "the model has no layer with a learned router"
    return None


def gate_bias(model: Transformer, layer: int) -> Tensor:
    """The selection bias fp32 [X] of a learned layer, itself."""
    block: Any = model.layers[layer]
    return block.ffn.gate.bias


def learned_layers(model: Transformer) -> list[int]:
    return [i for i in range(len(model.layers)) if not model.config.uses_hash_routing(i)]


# --- routing.learned -------------------------------------------------------------------------------------------------


def run_learned(subject: Subject, settings: Settings) -> Iterator[Record]:
    record, model = Recorder("routing.learned", subject, settings), subject.model
    assert isinstance(model, Transformer)
    c = model.config
    ids = subject.ids(min(settings.pick(1024, 8192), c.max_position_embeddings), settings, salt=8)
    gaps, ordinary, repeated, ties = [], [], [], 0
    with torch.no_grad():
        text = model.trunk(ids, [Segment(len(ids))]).routing
        same = model.trunk(ids[:1].expand(256).contiguous(), [Segment(256)]).routing
    for i in learned_layers(model):
        gap = gate_margins(text[i].scores + gate_bias(model, i), c.num_experts_per_tok)
        gaps.append(gap)
        ties += int((gap == 0).sum())
        ordinary.append(load_factor(text[i].chosen, c.n_routed_experts))
        repeated.append(load_factor(same[i].chosen, c.n_routed_experts))
    every = torch.cat(gaps)
    medians = {str(i): float(g.median()) for i, g in zip(learned_layers(model), gaps, strict=True)}
    yield record(
        "median margin", float(every.median()), "std", n=len(every), detail={"by_layer": medians, "ties": ties},
        interval=stats.bootstrap(every[:2000], stats.median, seed=settings.seed, draws=500),
        finding=f"Half of all tokens choose their last expert by less than {float(every.median()):.2g} standard "
        "deviations of their scores.",
    )  # fmt: skip
    yield record("5th percentile of margins", float(every.quantile(0.05)), "std", n=len(every))
    worst = c.n_routed_experts / c.num_experts_per_tok
    yield record(
        "largest LF of one token repeated", max(repeated), "x", n=len(repeated),
        detail={"ordinary_text": ordinary, "repeated": repeated, "worst_case": worst},
        finding=f"One token repeated loads the busiest learned expert {max(repeated):.1f} times the mean (at most "
        f"{worst:.1f}); ordinary text {max(ordinary):.1f} times.",
    )  # fmt: skip


def gate_margins(scores: Tensor, k: int) -> Tensor:
    """(k-th best - next) / standard deviation of rows [n, X], fp64 [n]; X > k."""
    ordered = scores.double().sort(dim=1, descending=True).values
    return (ordered[:, k - 1] - ordered[:, k]) / ordered.std(dim=1, correction=0).clamp_min(1e-300)


# --- routing.silence -------------------------------------------------------------------------------------------------


@contextmanager
def silenced(model: Transformer, layer: int, expert: int) -> Iterator[None]:
    """Inside the block the gate of a learned layer never chooses an expert."""
    bias = gate_bias(model, layer)
    before = bias[expert].clone()
    bias[expert] = float("-inf")
    try:
        yield
    finally:
        bias[expert] = before


def run_silence(subject: Subject, settings: Settings) -> Iterator[Record]:
    record, model = Recorder("routing.silence", subject, settings), subject.model
    assert isinstance(model, Transformer)
    c = model.config
    texts = _texts(subject, settings)
    clean = losses(model, texts)
    harm: dict[tuple[int, int], float] = {}
    tried = [(i, e) for i in learned_layers(model) for e in range(c.n_routed_experts)]
    most = settings.pick(64, len(tried))
    tried = [
        tried[j] for j in torch.randperm(len(tried), generator=settings.generator(9))[:most].sort().values.tolist()
    ]
    differences = {}
    for layer, expert in tried:
        with silenced(model, layer, expert):
            differences[layer, expert] = losses(model, texts) - clean
        harm[layer, expert] = float(differences[layer, expert].mean())
    worst = max(harm, key=lambda at: harm[at])
    ordered = sorted(harm.values(), reverse=True)
    positive = sum(max(0.0, h) for h in ordered)
    share = ordered[0] / positive if positive > 0 else 0.0
    yield record(
        "loss of silencing the worst single expert", harm[worst], "nats/token",
        interval=stats.bootstrap(differences[worst], seed=settings.seed), n=len(texts),
        detail={"layer": worst[0], "expert": worst[1], "of": len(tried), "all": len(learned_layers(model)) *
                c.n_routed_experts, "clean": float(clean.mean()), "share_of_all_harm": share,
                "plot": {"title": "loss of silencing one expert", "x": list(range(1, len(ordered) + 1)),
                         "series": {"experts, worst first": ordered}, "xlabel": "expert", "ylabel": "nats/token"}},
        finding=f"Of {len(tried)} single experts silenced, the worst (layer {worst[0]}, expert {worst[1]}) costs "
        f"{harm[worst]:.3g} nats a token, {share:.0%} of what all of them cost one by one.",
    )  # fmt: skip


# --- streams.ablate --------------------------------------------------------------------------------------------------


def needs_streams(config: AnyConfig) -> str | None:
    if not isinstance(config, ModelConfig) or config.residual == "plain":
        return "the model has one residual stream"
    return None


@contextmanager
def streams_changed(model: Transformer, layer: int, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Inside the block the streams [T, N, M] that come into a layer are changed."""
    handle = model.layers[layer].register_forward_pre_hook(lambda module, args: (change(args[0]), *args[1:]))
    try:
        yield
    finally:
        handle.remove()


def run_streams(subject: Subject, settings: Settings) -> Iterator[Record]:
    record, model = Recorder("streams.ablate", subject, settings), subject.model
    assert isinstance(model, Transformer)
    n, texts = model.config.num_streams, _texts(subject, settings)
    clean = losses(model, texts)
    layers = sorted({len(model.layers) // 2, len(model.layers) - 1} if settings.suite == "quick" else
                    set(range(1, len(model.layers))))  # fmt: skip
    cost, alone, differences = {}, {}, {}
    for layer in layers:
        for stream in range(n):
            keep = torch.ones(n, device=model.device)
            keep[stream] = 0
            for name, mask, found in (("cost", keep, cost), ("alone", 1 - keep, alone)):
                with streams_changed(model, layer, lambda x, mask=mask: x * mask[:, None].to(x.dtype)):
                    gone = losses(model, texts) - clean
                found[layer, stream] = float(gone.mean())
                if name == "cost":
                    differences[layer, stream] = gone
        with streams_changed(model, layer, torch.zeros_like):
            cost[layer, n] = float((losses(model, texts) - clean).mean())  # all of them
    worst = max(differences, key=lambda at: cost[at])
    series = {f"stream {s}": [cost[layer, s] for layer in layers] for s in range(n)}
    plot = {"title": "loss of removing a stream", "kind": "bar", "x": [f"into layer {i}" for i in layers],
            "series": series, "ylabel": "nats/token"}  # fmt: skip
    rescue = {str(layer): [1 - alone[layer, s] / cost[layer, n] if cost[layer, n] > 0 else 0.0 for s in range(n)]
              for layer in layers}  # fmt: skip
    yield record(
        "loss of removing the worst stream", cost[worst], "nats/token", n=len(texts),
        interval=stats.bootstrap(differences[worst], seed=settings.seed),
        detail={"layer": worst[0], "stream": worst[1], "rescue": rescue, "plot": plot,
                "all_removed": {str(layer): cost[layer, n] for layer in layers}},
        finding=f"Removing one residual stream costs up to {cost[worst]:.3g} nats a token (stream {worst[1]} into "
        f"layer {worst[0]}); removing all of them there costs {cost[worst[0], n]:.3g}.",
    )  # fmt: skip


# --- losses ----------------------------------------------------------------------------------------------------------


def _texts(subject: Subject, settings: Settings) -> list[Tensor]:
    return list(subject.windows(settings.pick(8, 32), settings.pick(128, 512), settings, salt=10))


@torch.no_grad()
def losses(model: LanguageModel, texts: list[Tensor]) -> Tensor:
    """The mean next-token loss of each text in nats, fp64 [texts]."""
    lengths = [len(t) for t in texts]
    logits = model(torch.cat(texts), segments=lengths)
    found = []
    for text, own in zip(texts, logits.split(lengths), strict=True):
        found.append(torch.nn.functional.cross_entropy(own[:-1], text[1:].to(own.device)).double().cpu())
    return torch.stack(found)
