"""FLOPs of a decoded token, of a prefilled prompt and of a training token, as sums of labelled pieces of work.

2 per multiply-accumulate. Not counted, being small and not matrix products: norms, softmax, top-k, rotations, Hadamard,
Sinkhorn, quantisation, activations, pooling, the embedding lookup. docs/cost.md derives every line.
Symbols: L context (a token at position L-1 sees L tokens), r compress ratio.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache

from dsv4.config import AnyConfig, LayerKind, LlamaConfig, ModelConfig, V32Config
from dsv4.cost.params import families, mtp_families
from dsv4.errors import UserError, nearest


@dataclass(frozen=True)
class Work:
    """FLOPs of one component that run as one kind of arithmetic (a column of SCHEMES)."""

    component: str
    kind: str
    flops: int


# --- weights: what a FLOP of each kind counts for --------------------------------------------------------------------

# fp8: products with FP8 weights; expert: routed FP4 weights times FP8 activations; wo_a: grouped output; absorb: V3.2's
# absorbed kv_b; aux: compressor, gate, indexer head weights, anchor scores, low-rank rows (BF16); head; mhc:
# hyper-connections; core: attention over rows; idx4, idx8: indexer scores in FP4, FP8; llm: dense BF16 linears; sum:
# the indexer's weighted sum over heads, which no scheme counts.
KINDS = ("fp8", "expert", "wo_a", "absorb", "aux", "head", "mhc", "core", "idx4", "idx8", "llm", "sum")

MOST_WEIGHT = 1000  # that a FLOP can count for

_TYPED: dict[str, float] = {"absorb": 2, "aux": 2, "head": 2, "mhc": 2, "core": 2, "idx4": 0.5, "llm": 2}
_ATTENTION_ONLY: dict[str, float] = dict.fromkeys(KINDS, 0.0) | {"core": 1.0, "idx4": 1.0, "idx8": 1.0}

# Ways to count, by the letters that docs/cost.md and the tables use; a kind that is not named counts 1.
SCHEMES: dict[str, tuple[str, dict[str, float]]] = {
    "A": ("raw: every FLOP counts 1", {}),
    "B": ("raw, but FP4 indexer scores 1/2", {"idx4": 0.5}),
    "C": ("FP8 equivalents: FP4 x FP4 1/2, FP8 and FP4 x FP8 1, BF16 and FP32 2", _TYPED),
    "D": ("as C, grouped output wo_a in BF16", _TYPED | {"wo_a": 2}),
    "E": ("attention core BF16 and indexer FP4, all weight products 1", {"core": 2, "idx4": 0.5, "llm": 2}),
    "F": ("as C, FP4 x FP8 experts 3/4 (future hardware)", _TYPED | {"expert": 0.75}),
    "G": ("as C, without hyper-connections and head", _TYPED | {"head": 0, "mhc": 0}),
    "H": ("attention core and indexer scores only, raw", _ATTENTION_ONLY),
    "I": ("attention core and indexer scores only, FP8 equivalents", _ATTENTION_ONLY | {"core": 2, "idx4": 0.5}),
    "J": ("as C, without indexer scores", _TYPED | {"idx4": 0, "idx8": 0}),
}


def scheme_weights(scheme: str | Mapping[str, float]) -> dict[str, float]:
    """kind -> weight, for a scheme's letter or for weights of one's own (a kind that is not named counts 1)."""
    if isinstance(scheme, str):
        if scheme not in SCHEMES:
            raise UserError(
                f"counting scheme {scheme!r} is unknown: use one of {', '.join(SCHEMES)}, or weights such as core=2"
            )
        scheme = SCHEMES[scheme][1]
    for kind, weight in scheme.items():
        if kind not in KINDS:
            raise UserError(f"kind of work {kind!r} is unknown: use {', '.join(KINDS)}{nearest(kind, KINDS)}")
        if not 0 <= weight <= MOST_WEIGHT:
            raise UserError(f"weight {kind}={weight} must be a number from 0 to {MOST_WEIGHT:,}")
    return {kind: scheme.get(kind, 0.0 if kind == "sum" else 1.0) for kind in KINDS}


def weighted(work: Iterable[Work], scheme: str | Mapping[str, float] = "A") -> float:
    """The cost under a scheme: sum of weight(kind) x FLOPs."""
    weight = scheme_weights(scheme)
    return sum(weight[w.kind] * w.flops for w in work)


def by_component(work: Iterable[Work], scheme: str | Mapping[str, float] = "A") -> dict[str, float]:
    """The cost under a scheme, component by component (components that cost nothing under it are left out)."""
    weight = scheme_weights(scheme)
    out: dict[str, float] = {}
    for w in work:
        if weight[w.kind] * w.flops:
            out[w.component] = out.get(w.component, 0) + weight[w.kind] * w.flops
    return out


# --- work ------------------------------------------------------------------------------------------------------------


def attended(config: ModelConfig, kind: LayerKind, context: int) -> int:
    """Rows that one query reads in a V4 layer: its window, and what it sees or chooses of tokens before it."""
    return sum(rows(context) for rows in _rows_of(config, kind))


def rebuilt(config: ModelConfig, tokens: int) -> int:
    """Low-rank rows that a call rebuilds whose last token sees `tokens`: those that have left its window."""
    return max(0, tokens - config.sliding_window)


def decode(config: AnyConfig, context: int) -> list[Work]:
    """One token at position `context` - 1, without MTP."""
    _at_least_one(context)
    return _products(config) + _rows_work(config, lambda rows: rows(context)) + _rebuilding(config, context)


def prefill(config: AnyConfig, tokens: int) -> list[Work]:
    """A prompt of `tokens` in one call; the head runs for its last token only.

    Exactly the sum of `decode` over all positions, but for low-rank rows: a call rebuilds each once for all queries.
    """
    _at_least_one(tokens)
    return (
        [Work(w.component, w.kind, w.flops * (1 if w.component == "head" else tokens)) for w in _products(config)]
        + _rows_work(config, lambda rows: rows.up_to(tokens))
        + _rebuilding(config, tokens)
    )


def train(config: AnyConfig, tokens: int, *, mtp: bool = True) -> list[Work]:
    """One document of `tokens` forward and backward, the head at every token, the MTP block (V4) where there is one.

    Backward costs twice the forward pass, except for the indexer, whose choice carries no gradient. These are the
    FLOPs of the mathematics: what a backward pass computes again to save memory is not in them.
    """
    _at_least_one(tokens)
    work = [Work(w.component, w.kind, w.flops * tokens) for w in _products(config)]
    work += _rows_work(config, lambda rows: rows.up_to(tokens)) + _rebuilding(config, tokens)
    if mtp and isinstance(config, ModelConfig) and config.num_nextn_predict_layers and tokens > 1:
        work += _mtp_work(config, tokens - 1)
    return [Work(w.component, w.kind, w.flops * (1 if w.component.startswith("indexer") else 3)) for w in work]


def flops_by_component(config: AnyConfig, context: int) -> dict[str, int]:
    """Raw FLOPs of one decoded token by component, layer kinds of the core apart."""
    return {name: int(flops) for name, flops in by_component(decode(config, context)).items()}


def flops_per_token(config: AnyConfig, context: int) -> int:
    """Raw FLOPs of one decoded token."""
    return int(weighted(decode(config, context)))


class _Rows:
    """How many rows a token reads as a function of its context: min(floor(L / every), most)."""

    def __init__(self, every: int = 1, most: int | None = None):
        self.every, self.most = every, most

    def __call__(self, context: int) -> int:
        rows = context // self.every
        return rows if self.most is None else min(rows, self.most)

    def up_to(self, tokens: int) -> int:
        """Sum over contexts 1 .. tokens, in closed form."""
        r = self.every
        full = tokens if self.most is None else min(tokens, r * self.most)  # contexts before the cap acts
        q, rest = divmod(full, r)
        return r * q * (q - 1) // 2 + q * (rest + 1) + (tokens - full) * (self.most or 0)


class _Anchors(_Rows):
    """The square root of the context, rounded up."""

    def __call__(self, context: int) -> int:
        return math.isqrt(context - 1) + 1

    def up_to(self, tokens: int) -> int:
        # the root of m reaches i at m = i^2, so the roots of 0 .. n-1 add up to the sum over i of n - i^2
        most = math.isqrt(tokens - 1)
        return tokens + most * tokens - most * (most + 1) * (2 * most + 1) // 6


_Read = Callable[[_Rows], int]


@lru_cache
def _weight_products(config: AnyConfig) -> tuple[Work, ...]:
    return tuple(Work(f.component, f.kind, 2 * f.active) for f in families(config) if f.kind and not f.per_row)


def _products(config: AnyConfig) -> list[Work]:
    """Products with weights, and the mixing of streams: the same for every token."""
    work = list(_weight_products(config))
    if isinstance(config, ModelConfig):
        work.append(_mixing(config, config.num_hidden_layers))
    return work


def _mixing(k: ModelConfig, layers: int) -> Work:
    """Collapse n streams to one, mix them n x n, write the output back to n; for two sublayers per layer."""
    n, d = k.hc_mult, k.hidden_size
    layers = 0 if k.residual == "plain" else layers
    return Work("hyper-connections", "mhc", layers * 2 * 2 * (n * d + n * n * d + n * d))


def _rows_work(config: AnyConfig, read: _Read) -> list[Work]:
    """Work that depends on how many rows a token reads."""
    if isinstance(config, ModelConfig):
        return _v4_rows(config, read)
    n = config.num_hidden_layers
    if isinstance(config, V32Config):
        score = 2 * config.index_n_heads * n * read(_Rows())
        width = 2 * config.kv_lora_rank + config.qk_rope_head_dim
        core = 2 * config.num_attention_heads * width * read(_Rows(1, config.index_topk))
        return [
            Work("core: DSA", "core", n * core),
            Work("indexer scores", "idx8", score * config.index_head_dim),
            Work("indexer head sum", "sum", score),
        ]
    assert isinstance(config, LlamaConfig)
    return [Work("core: GQA", "core", n * 4 * config.num_attention_heads * config.head_dim * read(_Rows()))]


def _rows_of(k: ModelConfig, kind: LayerKind) -> list[_Rows]:
    """What a query of a layer reads, each as the number of its rows by context."""
    window = _Rows(1, k.sliding_window)
    if kind.name in ("dense", "lowrank"):  # every token: from one store, or within the window and before it
        return [_Rows()]
    if kind.name == "anchors":
        return [window, _Anchors()]
    return [window, _Rows(kind.ratio, k.index_topk if kind.indexed else None)] if kind.ratio else [window]


def _v4_rows(k: ModelConfig, read: _Read) -> list[Work]:
    work, scores = [], 0
    for kind, layers in k.trunk_kinds.items():
        rows = sum(read(part) for part in _rows_of(k, kind))
        work.append(Work(f"core: {kind.name}", "core", layers * 4 * k.num_attention_heads * k.head_dim * rows))
        if kind.indexed:
            scores += layers * 2 * k.index_n_heads * read(_Rows(kind.ratio))
    work.append(Work("indexer scores", "idx4", scores * k.index_head_dim))
    work.append(Work("indexer head sum", "sum", scores))
    return [w for w in work if w.flops]


def _rebuilding(config: AnyConfig, tokens: int) -> list[Work]:
    """The up-projection of the low-rank rows that a call over `tokens`, or the decoding of the last of them, reads."""
    if not isinstance(config, ModelConfig):
        return []
    work = [Work(f.component, f.kind, 2 * f.active * rebuilt(config, tokens)) for f in families(config) if f.per_row]
    return [w for w in work if w.flops]


def _mtp_work(k: ModelConfig, tokens: int) -> list[Work]:
    """The MTP block over `tokens` tokens, with the shared head run once more for each."""
    flops = [Work("MTP", f.kind, 2 * f.active * tokens) for f in mtp_families(k) if f.kind]
    mixing = _mixing(k, 1)
    flops.append(Work("MTP", mixing.kind, mixing.flops * tokens))
    flops.append(Work("MTP", "head", 2 * k.vocab_size * k.hidden_size * tokens))
    window = 4 * k.num_attention_heads * k.head_dim * _Rows(1, k.sliding_window).up_to(tokens)
    return [*flops, Work("MTP", "core", window)]


def _at_least_one(tokens: int) -> None:
    if tokens < 1:
        raise UserError(f"a context of {tokens} tokens cannot be counted: give at least 1")
