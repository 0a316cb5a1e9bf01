"""V4 beside V3.2 and Llama: the report's claims, the ways of counting that miss them, and where costs cross.

The report says "equivalent FP8 FLOPs" and gives no formula. `claims` counts by scheme C; `grid` and `free_fit` are the
evidence that no other reading of the labels fits.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

from dsv4.config import CONTROLS, AnyConfig, ModelConfig, V32Config
from dsv4.cost import kv_bytes
from dsv4.cost.flops import SCHEMES, Work, decode, scheme_weights, weighted
from dsv4.cost.params import active_bytes

K = 1024
CONTEXTS = tuple(n * K for n in (4, 16, 32, 64, 128, 256, 512, 1024))
MILLION = 1024 * K
V32: V32Config = CONTROLS["v3.2"]  # type: ignore[assignment]


def targets() -> dict[str, ModelConfig]:
    """The two released models."""
    return {name: ModelConfig.preset(name) for name in ("pro", "flash")}


# --- the report's claims ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Claim:
    """What the report says of a model at a million tokens, in percent of V3.2 (or of a GQA8 cache), and our count."""

    name: str
    said: float
    counted: float
    rule: str

    @property
    def error(self) -> float:
        """Percentage points."""
        return self.counted - self.said


def claims(context: int = MILLION) -> list[Claim]:
    """The five claims (the last for both models), by the rules that reproduce them."""
    flops_rule = "FLOPs of one decoded token, everything counted, FP8 equivalents (scheme C)"
    cache_rule = "bytes held: 584 per entry and window row, 68 per FP4 index key, no open groups; V3.2 656 + 132"
    out = []
    for name, said in (("pro", 27), ("flash", 10)):
        out.append(Claim(f"{name} FLOPs", said, 100 * flops_share(targets()[name], context), flops_rule))
    for name, said in (("pro", 10), ("flash", 7)):
        out.append(Claim(f"{name} cache", said, 100 * cache_share(targets()[name], context, state=False), cache_rule))
    for name, config in targets().items():
        gqa = kv_bytes.gqa_bytes(config.num_hidden_layers, context)
        held = sum(kv_bytes.held(config, context, state=False).values())
        rule = "bytes held, over a BF16 cache of 8 KV heads of 128 with as many layers"
        out.append(Claim(f"{name} cache of GQA8", 2, 100 * held / gqa, rule))
    return out


def flops_share(config: ModelConfig, context: int, scheme: str | Mapping[str, float] = "C") -> float:
    """A V4 model's FLOPs per decoded token over V3.2's."""
    return weighted(decode(config, context), scheme) / weighted(decode(V32, context), scheme)


def cache_share(config: ModelConfig, context: int, format: str = "published", *, state: bool = True) -> float:
    """A V4 model's cache over V3.2's, in the same kind of format."""
    held = sum(kv_bytes.held(config, context, format, state=state).values())
    base = format if format in ("bfloat16", "float32") else "published"
    return held / sum(kv_bytes.held(V32, context, base).values())


def flops_alternatives(context: int = MILLION) -> dict[str, dict[str, Any]]:
    """Every counting scheme: V3.2, Pro and Flash FLOPs, and the two shares in percent beside the report's 27 and 10.

    K, L, M take the nominal active parameters (49, 13, 37 B) instead of counted ones, with attention counted as in H,
    I, and H with FP4 scores at a half.
    """
    out = {}
    for letter, (what, _) in SCHEMES.items():
        cost = {n: weighted(decode(c, context), letter) for n, c in {"v3.2": V32, **targets()}.items()}
        out[letter] = {"what": what, **cost}
    nominal = {"v3.2": 37e9, "pro": 49e9, "flash": 13e9}
    attention = {
        "K": ("H", scheme_weights("H")),
        "L": ("I", scheme_weights("I")),
        "M": ("H with FP4 scores 1/2", scheme_weights("H") | {"idx4": 0.5}),
    }
    for letter, (like, scheme) in attention.items():
        cost = {n: 2 * nominal[n] + weighted(decode(c, context), scheme) for n, c in {"v3.2": V32, **targets()}.items()}
        out[letter] = {"what": f"nominal active parameters, attention as {like}", **cost}
    for row in out.values():
        for name, said in (("pro", 27), ("flash", 10)):
            row[f"{name} %"] = 100 * row[name] / row["v3.2"]
            row[f"{name} error"] = row[f"{name} %"] - said
    return out


def cache_alternatives(context: int = MILLION) -> list[dict[str, Any]]:
    """Ways to count the cache: bytes of V3.2, Pro and Flash, and the factors beside the report's 9.5 and 13.7."""
    ways: list[tuple[str, str, str, bool]] = [
        ("as published, no open groups", "published", "published", False),
        ("as published, with fp32 open groups", "published", "published", True),
        ("FP8 index keys (132 B)", "published", "fp8", False),
        ("all BF16, both models", "bfloat16", "bfloat16", False),
        ("V4 as published, V3.2 all BF16", "bfloat16", "published", False),
    ]
    out: list[dict[str, Any]] = []
    for what, base_format, format, state in ways:
        base = sum(kv_bytes.held(V32, context, base_format).values())
        row: dict[str, Any] = {"what": what, "v3.2": base}
        for name, config in targets().items():
            held = sum(kv_bytes.held(config, context, format, state=state).values())
            row |= {name: held, f"{name} x": base / held, f"{name} %": 100 * held / base}
        out.append(row)
    return out


# --- which readings of "equivalent FP8 FLOPs" fit the labels ---------------------------------------------------------

LABELS = {"pro": 3.7, "flash": 9.8}
_CHOICES: dict[str, tuple[float, ...]] = {
    "idx4": (0.5, 1), "core": (1, 2), "aux": (1, 2), "head": (0, 1, 2), "mhc": (0, 1, 2), "wo_a": (1, 2),
    "absorb": (1, 2), "expert": (0.75, 1),
}  # fmt: skip
_MILLIONS = (1_000_000, 1_024_000, MILLION)


def grid() -> tuple[int, list[dict[str, float]]]:
    """(choices tried, those whose factors round to both labels, best first): weights per kind, and what "1M" is.

    A choice fits when the Pro factor rounds to 3.7 and the Flash factor to 9.8. V3.2's experts are never discounted.
    """
    tried, hits = 0, []
    for context in _MILLIONS:
        kinds = {n: _by_kind(decode(c, context)) for n, c in {"v3.2": V32, **targets()}.items()}
        for values in product(*_CHOICES.values()):
            weights = dict(zip(_CHOICES, values, strict=True))
            cost = {n: sum(weights.get(k, 1) * f for k, f in parts.items()) for n, parts in kinds.items()}
            factor = {n: cost["v3.2"] / cost[n] for n in LABELS}
            tried += 1
            if all(abs(factor[n] - label) <= 0.05 and factor[n] < label + 0.05 for n, label in LABELS.items()):
                hits.append({**weights, "context": context, "pro x": factor["pro"], "flash x": factor["flash"]})
    return tried, sorted(hits, key=lambda h: sum(abs(h[f"{n} x"] / label - 1) for n, label in LABELS.items()))


def free_fit(context: int, scheme: str | Mapping[str, float]) -> dict[str, tuple[float, float, float]]:
    """The weights of V4's indexer scores (x) and of the core (y) that give both labels, the others as in `scheme`.

    Each as (at the labels, least, most over all values that round to the labels).
    """
    weights = scheme_weights(scheme)
    parts = {}
    for name, config in {"v3.2": V32, **targets()}.items():
        kinds = _by_kind(decode(config, context))
        rest = sum(weights[k] * f for k, f in kinds.items() if k not in ("idx4", "core"))
        parts[name] = kinds.get("idx4", 0), kinds["core"], rest
    _, y_base, z_base = parts["v3.2"]

    def solve(labels: Mapping[str, float]) -> tuple[float, float]:
        # y_base y + z_base = label (X x + Y y + Z), for both models
        (a, b, e), (c, d, f) = (
            (labels[n] * parts[n][0], labels[n] * parts[n][1] - y_base, z_base - labels[n] * parts[n][2])
            for n in LABELS
        )
        det = a * d - b * c
        return (e * d - b * f) / det, (a * f - e * c) / det

    at = solve(LABELS)
    rounding = product((-0.05, 0.05), repeat=2)
    around = [solve({"pro": LABELS["pro"] + dp, "flash": LABELS["flash"] + df}) for dp, df in rounding]
    return {
        name: (at[i], min(s[i] for s in around), max(s[i] for s in around)) for i, name in enumerate(("idx4", "core"))
    }


def _by_kind(work: Iterable[Work]) -> dict[str, int]:
    out: dict[str, int] = {}
    for w in work:
        if w.kind != "sum":
            out[w.kind] = out.get(w.kind, 0) + w.flops
    return out


# --- crossovers ------------------------------------------------------------------------------------------------------


def csa_cheaper_than_hca(k: ModelConfig, scheme: str = "C", limit: int = 8 * MILLION) -> int | None:
    """The least context (in steps of 1K) from which a CSA layer costs fewer FLOPs than an HCA one; None below limit."""
    w, csa, hca = scheme_weights(scheme), k.compress_rate_csa, k.compress_rate_hca

    def core(rows: int) -> float:
        return w["core"] * 4 * k.num_attention_heads * k.head_dim * rows

    for context in range(4 * K, limit + 1, K):
        window = min(context, k.sliding_window)
        scores = w["idx4"] * 2 * k.index_n_heads * k.index_head_dim * (context // csa)
        if core(context // hca + window) > scores + core(min(context // csa, k.index_topk) + window):
            return context
    return None


def cache_outweighs_weights(
    config: AnyConfig, batch: int = 1, dtype: str = "published", limit: int = 64 * MILLION
) -> int | None:
    """The least context (in steps of 1K) at which a step of `batch` reads more cache than weights; None below limit."""

    def outweighs(thousands: int) -> bool:
        return batch * sum(kv_bytes.read(config, thousands * K, dtype).values()) > weights

    weights = active_bytes(config, dtype, batch)
    if not outweighs(limit // K):
        return None
    low, high = 0, limit // K
    while high - low > 1:  # reads only grow with the context
        middle = (low + high) // 2
        low, high = (low, middle) if outweighs(middle) else (middle, high)
    return high * K


def hybrids(context: int = MILLION) -> dict[str, tuple[float, float]]:
    """V4-Pro with other layers, in percent of V3.2: (FLOPs under scheme C, cache without open groups)."""
    pro = targets()["pro"]
    n = pro.num_hidden_layers
    variants = {"as released": pro}
    for name, ratio in (("all CSA", pro.compress_rate_csa), ("all HCA", pro.compress_rate_hca)):
        variants[name] = pro.with_(compress_ratios=(ratio,) * n + (0,))
    out = {
        name: (100 * flops_share(k, context), 100 * cache_share(k, context, state=False))
        for name, k in variants.items()
    }
    fp8_indexer = scheme_weights("C") | {"idx4": 1}
    out["indexer in FP8"] = 100 * flops_share(pro, context, fp8_indexer), out["as released"][1]
    return out
