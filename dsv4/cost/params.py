"""Parameters of a model, tensor family by tensor family: how many, how many a token uses, how they are stored.

Everything else about weights (totals, bytes, file sizes, FLOPs of their products) is a sum over these families. Counted
from the configuration alone; equal, to the unit, to the models built on the meta device. Routing biases and hash tables
are buffers there, so `total` leaves them out; they stand apart as `routing_biases`.
Symbols: d hidden, c head width, r compress ratio, E experts, I their inner width.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import lru_cache

from dsv4.config import AnyConfig, LayerKind, LlamaConfig, ModelConfig, V32Config
from dsv4.errors import UserError

# Bytes per element, scales included: FP4 has one 1-byte scale per 32, FP8 one per 128 x 128 (V3.2's are FP32 there).
STORAGE_BYTES: dict[str, Fraction] = {
    "fp4": Fraction(1, 2) + Fraction(1, 32),
    "fp8": 1 + Fraction(1, 16384),
    "fp8s4": 1 + Fraction(4, 16384),
    "bf16": Fraction(2),
    "fp32": Fraction(4),
}

# What `--dtype` makes of a family's published storage.
_AS: dict[str, dict[str, str]] = {
    "published": {},
    "fp8": {"fp4": "fp8"},
    "bfloat16": {"fp4": "bf16", "fp8": "bf16", "fp8s4": "bf16"},
    "float32": {"fp4": "fp32", "fp8": "fp32", "fp8s4": "fp32", "bf16": "fp32"},
}
DTYPES = tuple(_AS)


@dataclass(frozen=True)
class Family:
    """Tensors of one name over all layers; `name` is a pattern of their names in the model.

    count: elements. active: elements that one token multiplies by (or reads), at batch 1. storage: a key of
    STORAGE_BYTES. kind: what sort of matrix product it takes part in (a column of flops.SCHEMES), "" for none. per_row:
    what it multiplies are rows of the memory, however many are read, and not the token.
    """

    name: str
    component: str
    count: int
    active: int
    storage: str
    kind: str = ""
    per_row: bool = False

    def matches(self, tensor: str) -> bool:
        """Whether a tensor of the model belongs here."""
        return re.search(self.name, tensor) is not None


@lru_cache
def families(config: AnyConfig) -> tuple[Family, ...]:
    """The families of a trunk (MTP apart: `mtp_families`), like ones of different layers added up."""
    if isinstance(config, ModelConfig):
        found = _v4(config)
    elif isinstance(config, V32Config):
        found = _v32(config)
    else:
        found = _llama(config)
    return _added_up(found)


@lru_cache
def mtp_families(config: ModelConfig) -> tuple[Family, ...]:
    """The families of the MTP block, or of the DSpark drafter in its place; embedding and head are the trunk's. Empty
    where there is none."""
    if config.dspark_stages:
        return _added_up(_dspark(config))
    if not config.num_nextn_predict_layers:
        return ()
    d, n = config.hidden_size, config.hc_mult
    return _added_up([
        *_v4_layer(config, config.num_hidden_layers),
        _all(r"\.[eh]_proj\.", "MTP projections", 2 * d * d, "fp8", "fp8"),
        _all(r"\.\d+\.([eh]norm|norm)\.", "norms and sinks", 3 * d, "bf16"),
        *([] if config.residual == "plain" else _collapse(d, n)),
    ])  # fmt: skip


def parameters(config: AnyConfig) -> dict[str, int]:
    """Counts by component of the trunk; then `total`, `active`, `embedding_table`, `routing_biases`, `mtp`.

    total and mtp are what the model on the meta device counts (no routing biases). active is what one token uses:
    everything but the embedding and the experts it is not sent to; here biases count, as they are read.
    """
    found = families(config)
    counts: dict[str, int] = {}
    for f in found:
        if f.component != BIAS:
            counts[f.component] = counts.get(f.component, 0) + f.count
    mtp = mtp_families(config) if isinstance(config, ModelConfig) else ()
    return {
        **counts,
        "total": sum(counts.values()),
        "active": sum(f.active for f in found if f.component != "embedding"),
        "embedding_table": counts["embedding"],
        "routing_biases": sum(f.count for f in found if f.component == BIAS),
        "mtp": sum(f.count for f in mtp if f.component != BIAS),
    }


def active_by_component(config: AnyConfig) -> dict[str, int]:
    """Elements that one token uses, by component."""
    out: dict[str, int] = {}
    for f in families(config):
        out[f.component] = out.get(f.component, 0) + f.active
    return out


def storage_of(family: Family, config: AnyConfig, dtype: str) -> str:
    """How a family is stored under `--dtype`: published, fp8 (no FP4), bfloat16 or float32."""
    if dtype not in _AS:
        raise UserError(f"dtype {dtype!r} is unknown: use one of {', '.join(DTYPES)}")
    if dtype == "fp8" and isinstance(config, LlamaConfig) and family.kind == "llm":
        return "fp8"
    return _AS[dtype].get(family.storage, family.storage)


def weight_bytes(config: AnyConfig, dtype: str = "published", *, mtp: bool = False) -> int:
    """Bytes of all weights, scales and routing biases included; with `mtp` its block or drafter as well."""
    found = families(config)
    if mtp and isinstance(config, ModelConfig):
        found += mtp_families(config)
    return _bytes(found, config, dtype, lambda f: f.count)


def active_bytes(config: AnyConfig, dtype: str = "published", batch: int = 1) -> int:
    """Bytes of weights that one step of `batch` tokens reads, each once; rounded down to a whole byte.

    The routed experts that a batch touches are an expectation: E (1 - (1 - k/E)^batch) of E, as if every token drew its
    k experts at random.
    """

    def read(f: Family) -> Fraction | int:
        if f.name != ROUTED or batch == 1:
            return f.active * batch if f.component == "embedding" else f.active
        return int(f.count * (1 - (1 - f.active / f.count) ** batch))

    return _bytes(families(config), config, dtype, read)


def on_file(config: ModelConfig) -> tuple[int, int]:
    """(elements, bytes) of a released checkpoint with its MTP block or drafter, scales and hash tables included."""
    elements = size = 0
    for f in (*families(config), *mtp_families(config)):
        if f.storage == "fp4":
            stored, each = f.count // 2 + f.count // 32, 1
        elif f.storage == "fp8":
            stored, each = f.count + f.count // 16384, 1
        else:
            stored, each = f.count, {"bf16": 2, "fp32": 4}[f.storage]
        elements, size = elements + stored, size + stored * each
    tables = min(config.num_hash_layers, config.num_hidden_layers) * config.vocab_size * config.num_experts_per_tok
    return elements + tables, size + 8 * tables


BIAS = "routing biases"
NORMS = r"(attn_norm|ffn_norm|attn\.q_norm|attn\.kv_norm)\."
ROUTED = r"\.ffn\.experts\."


def _bytes(found: Iterable[Family], config: AnyConfig, dtype: str, of: Callable[[Family], Fraction | int]) -> int:
    return int(sum((of(f) * STORAGE_BYTES[storage_of(f, config, dtype)] for f in found), Fraction(0)))


def _all(name: str, component: str, count: int, storage: str, kind: str = "") -> Family:
    """A family of which every token uses all."""
    return Family(name, component, count, count, storage, kind)


def _added_up(found: Iterable[Family]) -> tuple[Family, ...]:
    by_name: dict[str, Family] = {}
    for f in found:
        if f.name in by_name:
            known = by_name[f.name]
            f = replace(f, count=known.count + f.count, active=known.active + f.active)
        by_name[f.name] = f
    return tuple(f for f in by_name.values() if f.count)


def _ends(d: int, vocab: int) -> list[Family]:
    """Embedding (one row per token), head and final norm."""
    return [
        Family("^embed", "embedding", vocab * d, d, "bf16"),
        _all("^head", "head", vocab * d, "bf16", "head"),
        _all("^norm", "norms and sinks", d, "bf16"),
    ]


def _collapse(d: int, n: int) -> list[Family]:
    """The head's weighted sum of the n streams."""
    return [
        _all("hc_head_fn", "hyper-connections", n * n * d, "fp32", "mhc"),
        _all("hc_head_(base|scale)", "hyper-connections", n + 1, "fp32"),
    ]


def _v4(k: ModelConfig) -> list[Family]:
    layers = [f for i in range(k.num_hidden_layers) for f in _v4_layer(k, i)]
    collapse = [] if k.residual == "plain" else _collapse(k.hidden_size, k.hc_mult)
    return [*layers, *_ends(k.hidden_size, k.vocab_size), *collapse]


def _v4_layer(k: ModelConfig, layer: int) -> list[Family]:
    d, c, ql = k.hidden_size, k.head_dim, k.q_lora_rank
    heads, n = k.num_attention_heads, k.hc_mult
    rows = (2 + n) * n
    expert = 3 * d * k.moe_intermediate_size
    hashed = k.uses_hash_routing(layer)
    found = [
        _all(r"\.attn\.wq_a\.", "attention projections", d * ql, "fp8", "fp8"),
        _all(r"\.attn\.wq_b\.", "attention projections", ql * heads * c, "fp8", "fp8"),
        _all(r"\.attn\.wkv\.", "attention projections", d * c, "fp8", "fp8"),
        _all(r"\.attn\.wo_a\.", "attention projections", heads * c * k.o_lora_rank, "fp8", "wo_a"),
        _all(r"\.attn\.wo_b\.", "attention projections", k.o_groups * k.o_lora_rank * d, "fp8", "fp8"),
        _all(NORMS, "norms and sinks", 2 * d + ql + c, "bf16"),
        _all(r"\.attn\.attn_sink", "norms and sinks", heads, "fp32"),
        _all(r"\.ffn\.gate\.weight", "router", k.n_routed_experts * d, "bf16", "aux"),
        _all(r"\.ffn\.gate\.bias", BIAS, 0 if hashed else k.n_routed_experts, "fp32"),
        _all(r"\.ffn\.shared_experts\.", "experts", expert, "fp8", "fp8"),
        Family(ROUTED, "experts", k.n_routed_experts * expert, k.num_experts_per_tok * expert, "fp4", "expert"),
    ]
    if k.residual != "plain":
        found += [
            _all(r"\.hc_(attn|ffn)_fn", "hyper-connections", 2 * rows * n * d, "fp32", "mhc"),
            _all(r"\.hc_(attn|ffn)_(base|scale)", "hyper-connections", 2 * (rows + 3), "fp32"),
        ]
    return [*found, *_v4_far(k, k.layer_kind(layer))]


def _dspark(k: ModelConfig) -> list[Family]:
    """What a slot of a block uses; the rows that the stages remember of the text take main_proj and wkv alone."""
    d, n, rank = k.hidden_size, k.hc_mult, k.dspark_markov_rank
    tables = [
        Family(r"\.markov_w1\.", "Markov head", k.vocab_size * rank, rank, "bf16"),  # one row of it
        _all(r"\.markov_w2\.", "Markov head", k.vocab_size * rank, "bf16", "head"),
    ]
    return [
        *(f for stage in range(k.dspark_stages) for f in _v4_layer(k, k.num_hidden_layers + stage)),
        _all(r"\.main_proj\.", "drafter's input", len(k.dspark_target_layer_ids) * d * d, "fp8", "fp8"),
        _all(r"\.\d+\.(main_norm|norm)\.", "norms and sinks", 2 * d, "bf16"),
        *([] if k.residual == "plain" else _collapse(d, n)),
        *tables,
        _all(r"\.confidence_head\.", "confidence head", d + rank, "bf16", "aux"),
    ]


def _v4_far(k: ModelConfig, kind: LayerKind) -> list[Family]:
    """What a layer has beside its window's attention, for tokens further back."""
    r, d, c, ql, ih, ic = kind.ratio, k.hidden_size, k.head_dim, k.q_lora_rank, k.index_n_heads, k.index_head_dim
    series = 2 if kind.overlap else 1  # two overlapping series
    if kind.name == "anchors":
        return [_all(r"\.attn\.anchor_score\.", "anchor scores", d, "fp32", "aux")]
    if kind.name == "lowrank":
        size = k.attention_rank * (c - k.qk_rope_head_dim)
        return [
            _all(r"\.attn\.far_down\.", "low-rank rows", size, "bf16", "aux"),
            replace(_all(r"\.attn\.far_up\.", "low-rank rows", size, "bf16", "aux"), per_row=True),
        ]
    found: list[Family] = []
    if r > 1:
        found += [
            _all(r"\.attn\.compressor\.(wkv|wgate)\.", "compressor", 2 * d * series * c, "bf16", "aux"),
            _all(r"\.attn\.compressor\.ape", "compressor", r * series * c, "fp32"),
            _all(r"\.attn\.compressor\.norm\.", "compressor", c, "bf16"),
        ]
    if kind.indexed:
        found += [
            _all(r"\.attn\.indexer\.wq_b\.", "indexer projections", ql * ih * ic, "fp8", "fp8"),
            _all(r"\.attn\.indexer\.weights_proj\.", "indexer projections", d * ih, "bf16", "aux"),
            _all(
                r"\.attn\.indexer\.compressor\.(wkv|wgate)\.", "indexer projections", 2 * d * series * ic, "bf16", "aux"
            ),
            _all(r"\.attn\.indexer\.compressor\.ape", "indexer projections", r * series * ic, "fp32"),
            _all(r"\.attn\.indexer\.compressor\.norm\.", "indexer projections", ic, "bf16"),
        ]
    return found


def _v32(k: V32Config) -> list[Family]:
    d, ql, kvl, heads, n = k.hidden_size, k.q_lora_rank, k.kv_lora_rank, k.num_attention_heads, k.num_hidden_layers
    ih, ic = k.index_n_heads, k.index_head_dim
    dense = min(k.first_k_dense_replace, n)
    expert = 3 * d * k.moe_intermediate_size
    sparse = n - dense
    return [
        _all(r"\.attn\.wq_a\.", "attention projections", n * d * ql, "fp8s4", "fp8"),
        _all(
            r"\.attn\.wq_b\.", "attention projections", n * ql * heads * (k.qk_nope_head_dim + k.qk_rope_head_dim),
            "fp8s4", "fp8",
        ),
        _all(r"\.attn\.wkv_a\.", "attention projections", n * d * (kvl + k.qk_rope_head_dim), "fp8s4", "fp8"),
        _all(
            r"\.attn\.wkv_b\.", "attention projections", n * kvl * heads * (k.qk_nope_head_dim + k.v_head_dim),
            "fp8s4", "absorb",
        ),
        _all(r"\.attn\.wo\.", "attention projections", n * heads * k.v_head_dim * d, "fp8s4", "fp8"),
        _all(NORMS, "norms and sinks", n * (2 * d + ql + kvl), "bf16"),
        _all(r"\.attn\.indexer\.wq_b\.", "indexer projections", n * ql * ih * ic, "fp8s4", "fp8"),
        _all(r"\.attn\.indexer\.wk\.", "indexer projections", n * d * ic, "fp8s4", "fp8"),
        _all(r"\.attn\.indexer\.weights_proj\.", "indexer projections", n * d * ih, "bf16", "aux"),
        _all(r"\.attn\.indexer\.k_norm\.", "indexer projections", n * 2 * ic, "bf16"),
        _all(r"\.ffn\.w[123]\.", "MLP", dense * 3 * d * k.intermediate_size, "fp8s4", "fp8"),
        _all(r"\.ffn\.gate\.weight", "router", sparse * k.n_routed_experts * d, "bf16", "aux"),
        _all(r"\.ffn\.gate\.bias", BIAS, sparse * k.n_routed_experts, "fp32"),
        _all(r"\.ffn\.shared_experts\.", "experts", sparse * k.n_shared_experts * expert, "fp8s4", "fp8"),
        Family(
            ROUTED, "experts", sparse * k.n_routed_experts * expert, sparse * k.num_experts_per_tok * expert,
            "fp8s4", "fp8",
        ),
        *_ends(d, k.vocab_size),
    ]  # fmt: skip


def _llama(k: LlamaConfig) -> list[Family]:
    d, n, hd = k.hidden_size, k.num_hidden_layers, k.head_dim
    width = k.num_attention_heads * hd
    return [
        _all(r"\.attn\.w[qo]\.", "attention projections", n * 2 * d * width, "bf16", "llm"),
        _all(r"\.attn\.w[kv]\.", "attention projections", n * 2 * d * k.num_key_value_heads * hd, "bf16", "llm"),
        _all(r"\.ffn\.w[123]\.", "MLP", n * 3 * d * k.intermediate_size, "bf16", "llm"),
        _all(NORMS, "norms and sinks", n * 2 * d, "bf16"),
        *_ends(d, k.vocab_size),
    ]
