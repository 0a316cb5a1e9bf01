"""routing.hash: what do the published hash tables let anyone do to the load of the experts?

Covers, in closed form from the tables alone: how evenly experts occur in them; the load factor LF of a batch (tokens of
the busiest expert over the mean, without any capacity limit); that one token repeated reaches the worst case X / K in
every hash layer at once; the largest sets of token ids that share all K experts (LF stays X / K for any mixture of
them), and how many expert-parallel ranks of a given number then do all of the routed work of a layer.

Does not cover: measured latency (a rank's share of the work is its lower bound: no engine can do better than its
busiest rank), the learned layers (routing.learned), or integrity: no token is ever dropped, so load costs time and
changes no output. A log of the experts of a hash layer is a log of token classes: treat it as the prompt.
"""

import math
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from dsv4.config import AnyConfig, ModelConfig
from dsv4.model import Transformer
from dsv4.probe.record import Record
from dsv4.probe.subject import Recorder, Settings, Subject

NAME = "routing.hash"
RANKS = (2, 4, 8, 16, 32)


def needs(config: AnyConfig) -> str | None:
    if not isinstance(config, ModelConfig) or not config.num_hash_layers:
        return "the model has no hash-routed layer"
    return None


def run(subject: Subject, settings: Settings) -> Iterator[Record]:
    record = Recorder(NAME, subject, settings)
    c, model = subject.config, subject.model
    assert isinstance(c, ModelConfig) and isinstance(model, Transformer)
    experts, k = c.n_routed_experts, c.num_experts_per_tok
    tables = hash_tables(model)
    uneven = max(float(loads(t, experts).max() / loads(t, experts).double().mean()) for t in tables.values())
    yield record(
        "busiest expert of a table over the mean", uneven, "x", n=c.vocab_size,
        finding=f"Over all {c.vocab_size:,} token ids the busiest expert has {uneven:.3f} times the mean.",
    )  # fmt: skip
    text = subject.ids(min(4096, c.max_position_embeddings), settings, salt=7)
    ordinary = max(load_factor(t[text], experts) for t in tables.values())
    worst = experts / k
    repeated = min(load_factor(t[text[:1].expand(100)], experts) for t in tables.values())
    yield record(
        "LF of one token repeated", repeated, "x", n=len(tables),
        detail={"worst_case": worst, "ordinary_text": ordinary, "ordinary_is_text": subject.reads_text},
        finding=f"One token repeated loads {k} of {experts} experts {repeated:.1f} times as much as the mean in every "
        f"hash layer at once, the worst case there is; ordinary text {ordinary:.1f} times.",
    )  # fmt: skip
    classes = {layer: collisions(t) for layer, t in tables.items()}
    sizes = {str(layer): [len(ids) for ids in found[:5]] for layer, found in classes.items()}
    everywhere = collisions(torch.cat(list(tables.values()), dim=1), k)
    largest = max(len(found[0]) for found in classes.values())
    expected = expected_pairs(c.vocab_size, experts, k)
    pairs = {str(layer): sum(len(i) * (len(i) - 1) // 2 for i in found) for layer, found in classes.items()}
    yield record(
        "largest set of ids with the same experts in a layer", largest, "ids", n=c.vocab_size,
        detail={"sizes": sizes, "colliding_pairs": pairs, "expected_pairs_if_random": expected,
                "in_all_hash_layers": len(everywhere[0]), "example": next(iter(classes.values()))[0][:20]},
        finding=f"{largest} token ids share their experts in one layer"
        + (f", {len(everywhere[0])} in all of them" if len(everywhere[0]) > 1 else " and none in all of them")
        + ": a text need not repeat one token to load them so.",
    )  # fmt: skip
    for ranks in RANKS:
        if experts % ranks:
            continue
        attack = rank_share(tables, text[:1].expand(64), experts, ranks)
        yield record(
            f"busiest of {ranks} ranks, one token repeated", attack * ranks, "x",
            detail={"ordinary_text": rank_share(tables, text, experts, ranks) * ranks},
            finding=f"With experts split over {ranks} ranks in order, a repeated token gives the busiest {attack:.0%} "
            "of a hash layer's routed work." if ranks == RANKS[2] else "",
        )  # fmt: skip


def hash_tables(model: Transformer) -> dict[int, Tensor]:
    """tid2eid int64 [V, K] of every hash layer."""
    blocks: Any = model.layers
    found = {i: block.ffn.gate.tid2eid for i, block in enumerate(blocks)}
    return {i: t.cpu() for i, t in found.items() if isinstance(t, Tensor)}


def loads(chosen: Tensor, experts: int) -> Tensor:
    """How many tokens each expert has, int64 [X], of choices [n, K]."""
    return torch.bincount(chosen.flatten(), minlength=experts)


def load_factor(chosen: Tensor, experts: int) -> float:
    """Tokens of the busiest expert over the mean of all, of choices [n, K]: at most X / K."""
    count = loads(chosen, experts)
    return float(count.max()) * experts / float(count.sum())


def collisions(table: Tensor, width: int = 0) -> list[list[int]]:
    """Sets of token ids that go to the same experts, the largest first, those of one id included. width: where a table
    is several side by side, the columns of each: the same experts in every one."""
    width = width or table.shape[1]
    ordered = torch.cat([part.sort(dim=1).values for part in table.split(width, dim=1)], dim=1)
    _, inverse = ordered.unique(dim=0, return_inverse=True)
    found: dict[int, list[int]] = {}
    for token, of in enumerate(inverse.tolist()):
        found.setdefault(of, []).append(token)
    return sorted(found.values(), key=lambda ids: (-len(ids), ids[0]))


def expected_pairs(vocab: int, experts: int, k: int) -> float:
    """How many pairs of ids would share all experts if each drew K of X at random: C(V, 2) / C(X, K)."""
    return math.comb(vocab, 2) / math.comb(experts, k)


def rank_share(tables: dict[int, Tensor], ids: Tensor, experts: int, ranks: int) -> float:
    """The largest share of a hash layer's routed work that one of `ranks` ranks has, experts split in order."""
    shares = []
    for table in tables.values():
        count = Counter((table[ids].flatten() // (experts // ranks)).tolist())
        shares.append(max(count.values()) / sum(count.values()))
    return max(shares)
