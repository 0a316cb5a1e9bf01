"""What causes V4's savings: each change from V3.2 as a switch, its share as a multiplicative Shapley value.

The share of a cause is exp of the mean, over all orders in which causes can be switched on, of the log of the cost
before over the cost after; so shares multiply to the whole factor. The report isolates none of them.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import permutations

from dsv4.config import ModelConfig
from dsv4.cost import kv_bytes
from dsv4.cost.compare import MILLION, V32, targets
from dsv4.cost.flops import decode, scheme_weights


@dataclass(frozen=True)
class Share:
    """The factor a cause contributes: its Shapley value (factors multiply to the total), alone, and as the last."""

    shapley: float
    alone: float
    last: float


def shapley(causes: tuple[str, ...], cost: Callable[[frozenset[str]], float]) -> dict[str, Share]:
    """The multiplicative Shapley value of each cause in cost(no cause) / cost(all causes)."""
    known: dict[frozenset[str], float] = {}

    def log(some: frozenset[str]) -> float:
        if some not in known:
            known[some] = math.log(cost(some))
        return known[some]

    gain = dict.fromkeys(causes, 0.0)
    orders = list(permutations(causes))
    for order in orders:
        switched: frozenset[str] = frozenset()
        for cause in order:
            gain[cause] += log(switched) - log(switched | {cause})
            switched |= {cause}
    everything, nothing = frozenset(causes), frozenset()
    return {
        c: Share(
            math.exp(gain[c] / len(orders)),
            math.exp(log(nothing) - log(frozenset({c}))),
            math.exp(log(everything - {c}) - log(everything)),
        )
        for c in causes
    }


FLOP_CAUSES = {
    "m4": "the indexer and CSA see one entry for 4 tokens",
    "hca": "HCA (or a bare window) replaces CSA in part of the layers",
    "fp4": "FP4 indexer scores",
    "core": "smaller top-k, 512-wide shared key = value, window",
    "shape": "experts, projections, layers, heads",
}
CACHE_CAUSES = {
    "m4": "one entry for 4 tokens",
    "hca": "HCA (or a bare window) replaces CSA in part of the layers",
    "fp4": "FP4 index keys",
    "entry": "584-byte entries instead of 656",
    "shape": "layers",
}
# "~3x CSA, ~10x HCA KV compression, ~1.5x MoE routing": the popular split, as bundles of the causes
BUNDLES = {"CSA": ("m4", "fp4", "core", "entry"), "HCA": ("hca",), "MoE and backbone": ("shape",)}


def flops_switched(k: ModelConfig, on: frozenset[str], context: int, scheme: str = "C") -> float:
    """FLOPs of a V3.2 in which some causes of V4 are switched on; none is V3.2 and all of them V4."""
    w = scheme_weights(scheme)
    layers, heads, full, hca, window_only = _layers(k, on)
    width = 4 * k.head_dim
    window = min(context, k.sliding_window)
    csa, hca_rate = k.compress_rate_csa, k.compress_rate_hca
    scores = 2 * k.index_n_heads * k.index_head_dim * (context / csa if "m4" in on else context)
    if "core" in on:
        core = width * (min(context // csa, k.index_topk) + window)
    else:
        core = 2 * (2 * V32.kv_lora_rank + V32.qk_rope_head_dim) * min(context, V32.index_topk)
    rows = full * core + hca * width * (context // hca_rate + window) + window_only * width * window
    rest = decode(k if "shape" in on else V32, context)
    return (
        full * scores * w["idx4" if "fp4" in on else "idx8"]
        + w["core"] * heads * rows
        + sum(w[x.kind] * x.flops for x in rest if x.kind not in ("core", "idx4", "idx8", "sum"))
    )


def cache_switched(k: ModelConfig, on: frozenset[str], context: int) -> float:
    """Growing bytes held by a V3.2 in which some causes of V4 are switched on (windows and open groups left out)."""
    latent, key8 = kv_bytes.row_bytes(V32, "published")
    entry, key4 = kv_bytes.row_bytes(k, "published")
    row = entry if "entry" in on else latent
    key = key4 if "fp4" in on else key8
    _, _, full, hca, _ = _layers(k, on)
    grouped = k.compress_rate_csa if "m4" in on else 1
    return full * context / grouped * (row + key) + hca * context / k.compress_rate_hca * row


def _layers(k: ModelConfig, on: frozenset[str]) -> tuple[int, int, float, float, float]:
    """Layers and heads of the hybrid, and how many of its layers scan all tokens, are HCA, are a bare window."""
    layers, heads = (
        (k.num_hidden_layers, k.num_attention_heads)
        if "shape" in on
        else (V32.num_hidden_layers, V32.num_attention_heads)
    )
    ratios, n = k.trunk_ratios, k.num_hidden_layers
    hca = layers * ratios.count(k.compress_rate_hca) / n if "hca" in on else 0.0
    window_only = layers * ratios.count(0) / n if "hca" in on else 0.0
    return layers, heads, layers - hca - window_only, hca, window_only


def flops_causes(k: ModelConfig, context: int = MILLION, scheme: str = "C") -> dict[str, Share]:
    return shapley(tuple(FLOP_CAUSES), lambda on: flops_switched(k, on, context, scheme))


def cache_causes(k: ModelConfig, context: int = MILLION) -> dict[str, Share]:
    return shapley(tuple(CACHE_CAUSES), lambda on: cache_switched(k, on, context))


def bundled(cost: Callable[[frozenset[str]], float]) -> dict[str, Share]:
    """The popular split's three causes, each a bundle of ours."""
    return shapley(tuple(BUNDLES), lambda on: cost(frozenset(c for b in on for c in BUNDLES[b])))


@dataclass(frozen=True)
class Verdict:
    """A public statement about where the saving comes from, what we count, and whether it holds."""

    statement: str
    counted: str
    holds: bool


def verdicts() -> list[Verdict]:
    """The popular split "3x CSA, 10x HCA cache compression, 1.5x MoE routing", tested on V4-Pro at a million tokens."""
    pro = targets()["pro"]
    weighted_split = bundled(lambda on: flops_switched(pro, on, MILLION, "C"))
    raw_split = bundled(lambda on: flops_switched(pro, on, MILLION, "A"))
    cache_split = bundled(lambda on: cache_switched(pro, on, MILLION))
    total = cache_switched(pro, frozenset(), MILLION) / cache_switched(pro, frozenset(CACHE_CAUSES), MILLION)
    csa, raw, moe = weighted_split["CSA"].shapley, raw_split["CSA"].shapley, weighted_split["MoE and backbone"].shapley
    hca = cache_split["HCA"].shapley
    three = 2.5 <= raw <= 3.5 or 2.5 <= csa <= 3.5
    return [
        Verdict("CSA saves about 3x", f"{csa:.1f}x of the FLOPs ({raw:.1f}x raw)", three),
        Verdict(
            "HCA compresses the cache about 10x",
            f"{hca:.1f}x; the whole cache is {total:.1f}x smaller, {cache_split['CSA'].shapley:.1f}x of it by CSA",
            9 <= hca <= 11,
        ),
        Verdict("MoE routing saves about 1.5x", f"{moe:.2f}x of the FLOPs: V4-Pro activates more", 1.25 <= moe <= 1.75),
    ]
