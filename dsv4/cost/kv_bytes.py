"""Bytes of a sequence's memory: what is held, and what one decoded token reads, store by store.

Every store holds rows of one size; their number is fixed or grows by one every `every` tokens, so a model's memory is
two numbers per layer kind and format: (fixed, per token). Equal to the byte to `bytes()` of a live, preallocated memory
(`allocated=True`); docs/cost.md derives the sizes.
"""

from dataclasses import dataclass
from fractions import Fraction

from dsv4.config import KIND_OF_RATIO, AnyConfig, LlamaConfig, ModelConfig, V32Config
from dsv4.errors import UserError

FORMATS = ("published", "fp8", "bfloat16", "float32")
MOST_PAGE_TOKENS = 1 << 20
_PLAIN = {"bfloat16": 2, "float32": 4}


@dataclass(frozen=True)
class Store:
    """Rows of `row_bytes` in `layers` layers of one kind.

    every: a row for that many tokens; 0 for a store that does not grow. most: rows that are kept (or, if fixed, that
    there are). read: rows of it that one decoded token reads at most (None: all). state: it is part of no row that
    attention reads (a compressor's open rows).
    """

    part: str
    kind: str
    layers: int
    row_bytes: int
    every: int = 1
    most: int | None = None
    read: int | None = None
    state: bool = False

    def rows(self, context: int, *, allocated: bool = False) -> int:
        """Rows per layer after `context` tokens; allocated: a window has all its rows from the start."""
        if not self.every or (allocated and self.most is not None):
            return self.most or 0
        rows = context // self.every
        return rows if self.most is None else min(rows, self.most)

    @property
    def per_token(self) -> Fraction:
        """Bytes that a token adds in all layers once fixed stores are full."""
        grows = self.every and self.most is None
        return Fraction(self.layers * self.row_bytes, self.every) if grows else Fraction(0)


def row_bytes(config: AnyConfig, format: str) -> tuple[int, int]:
    """Bytes of an attention row and of an index key (0 where there is none).

    published: V4 448 FP8 channels + 64 BF16 rotary ones + 7 block scales, padded to 8 bytes = 584, index key FP4 with
    a scale per 32 = 68; V3.2 latent 512 FP8 + 4 FP32 scales + 64 BF16 = 656, index key FP8 + FP32 scale = 132; Llama
    BF16.
    fp8: as published, but with FP8 index keys (132).
    """
    if format not in FORMATS:
        raise UserError(f"cache format {format!r} is unknown: use one of {', '.join(FORMATS)}")
    if isinstance(config, LlamaConfig):
        return 2 * config.num_key_value_heads * config.head_dim * _PLAIN.get(format, 2), 0
    rope, ic = config.qk_rope_head_dim, config.index_head_dim
    if format in _PLAIN:
        width = config.head_dim if isinstance(config, ModelConfig) else config.kv_lora_rank + rope
        return _PLAIN[format] * width, _PLAIN[format] * ic
    if isinstance(config, V32Config):
        return config.kv_lora_rank + 4 * -(-config.kv_lora_rank // 128) + 2 * rope, ic + 4
    nope = config.head_dim - rope
    entry = nope + -(-nope // 64) + 2 * rope
    return -(-entry // 8) * 8, ic + 4 if format == "fp8" else -(-ic // 2) + -(-ic // 32)


def stores(config: AnyConfig, format: str = "published", *, max_rewind: int = 0) -> list[Store]:
    """What one sequence's memory consists of; max_rewind: spare rows in V4's rings, for rewinding."""
    row, key = row_bytes(config, format)
    n = config.num_hidden_layers
    if isinstance(config, LlamaConfig):
        return [Store("keys and values", "gqa", n, row)]
    if isinstance(config, V32Config):
        return [
            Store("latent rows", "dsa", n, row, read=config.index_topk),
            Store("index keys", "dsa", n, key),
        ]
    out = []
    for ratio, kind in KIND_OF_RATIO.items():
        layers = config.trunk_ratios.count(ratio)
        if not layers:
            continue
        window = config.sliding_window
        out.append(Store("window", kind, layers, row, most=window + max_rewind, read=window))
        if ratio:
            chosen = config.index_topk if ratio == 4 else None
            out.append(Store("entries", kind, layers, row, every=ratio, read=chosen))
        if ratio == 4:
            out.append(Store("index keys", kind, layers, key, every=4))
        # fp32 values and scores of the open group; with overlap also of the group before, and the indexer's own
        if ratio == 4:
            width = 2 * (config.head_dim + config.index_head_dim)
            out.append(Store("open groups", kind, layers, 8 * width, 0, 8 + max_rewind, state=True))
        elif ratio:
            rows = ratio + max_rewind
            # its bank is read only when an entry closes, so a decoded token is not charged for it
            out.append(Store("open groups", kind, layers, 8 * config.head_dim, 0, rows, read=0, state=True))
    return out


def held(
    config: AnyConfig,
    context: int,
    format: str = "published",
    *,
    state: bool = True,
    page_tokens: int = 1,
    allocated: bool = False,
    max_rewind: int = 0,
) -> dict[str, int]:
    """Bytes held after `context` tokens, by "kind: part"; sum the values for all.

    state: with the compressors' open groups. page_tokens: growing stores are rounded up to whole pages of that many
    tokens. allocated: as a live memory of that capacity has allocated them, windows whole.
    """
    if context < 0:
        raise UserError(f"context={context} must not be negative")
    check_page(page_tokens)
    out = {}
    for s in stores(config, format, max_rewind=max_rewind):
        if s.state and not state:
            continue
        tokens = context if s.most is not None else -(-context // page_tokens) * page_tokens
        out[f"{s.kind}: {s.part}"] = s.layers * s.row_bytes * s.rows(tokens, allocated=allocated)
    return {name: size for name, size in out.items() if size}


def check_page(page_tokens: int) -> None:
    """UserError for a page of no tokens, or of more than any context has."""
    if not 1 <= page_tokens <= MOST_PAGE_TOKENS:
        raise UserError(f"a page of {str(page_tokens)[:20]} tokens is not one: give from 1 to {MOST_PAGE_TOKENS:,}")


def read(config: AnyConfig, context: int, format: str = "published") -> dict[str, int]:
    """Bytes that one decoded token reads at a context of `context`, by "kind: part": chosen rows, not whole stores."""
    out = {}
    for s in stores(config, format):
        rows = s.rows(context)
        out[f"{s.kind}: {s.part}"] = s.layers * s.row_bytes * (rows if s.read is None else min(rows, s.read))
    return {name: size for name, size in out.items() if size}


def fixed_and_per_token(config: AnyConfig, format: str = "published") -> dict[str, tuple[int, Fraction]]:
    """(bytes that do not grow, bytes per token) by layer kind: the whole memory of a long sequence, in two numbers."""
    out: dict[str, tuple[int, Fraction]] = {}
    for s in stores(config, format):
        fixed, per_token = out.get(s.kind, (0, Fraction(0)))
        if not s.per_token:
            fixed += s.layers * s.row_bytes * (s.most or 0)
        out[s.kind] = fixed, per_token + s.per_token
    return out


def gqa_bytes(layers: int, context: int) -> int:
    """A BF16 cache of grouped queries, 8 heads of 128, with as many layers: the report's "2%" baseline."""
    return layers * context * 2 * 8 * 128 * 2
