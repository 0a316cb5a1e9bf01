"""Bytes of a sequence's memory: what is held, and what one decoded token reads, store by store.

Every store holds rows of one size; their number is fixed or grows by one every `every` tokens, so a model's memory is
two numbers per layer kind and format: (fixed, per token). Equal to the byte to `bytes()` of a live, preallocated memory
(`allocated=True`); docs/cost.md derives the sizes.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

from dsv4.config import AnyConfig, LayerKind, LlamaConfig, ModelConfig, V32Config
from dsv4.errors import UserError

FORMATS = ("published", "fp8", "bfloat16", "float32")
MOST_PAGE_TOKENS = 1 << 20
_PLAIN = {"bfloat16": 2, "float32": 4}


@dataclass(frozen=True)
class Store:
    """Rows of `row_bytes` in `layers` layers of one kind.

    every: a row for that many tokens; 0 for a store that does not grow. most: rows that are kept (or, if fixed, that
    there are). read: of so many rows, how many one decoded token reads (None: all). state: it is part of no row that
    attention reads (a compressor's open rows).
    """

    part: str
    kind: str
    layers: int
    row_bytes: int
    every: int = 1
    most: int | None = None
    read: Callable[[int], int] | None = None
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
    if isinstance(config, V32Config):
        if format in _PLAIN:
            return _PLAIN[format] * (config.kv_lora_rank + rope), _PLAIN[format] * ic
        return config.kv_lora_rank + 4 * -(-config.kv_lora_rank // 128) + 2 * rope, ic + 4
    key = _PLAIN[format] * ic if format in _PLAIN else ic + 4 if format == "fp8" else -(-ic // 2) + -(-ic // 32)
    indexed = any(kind.indexed for kind in config.trunk_kinds)
    return _v4_row(config.head_dim - rope, rope, format), key if indexed else 0


def far_row_bytes(config: ModelConfig, format: str) -> int:
    """Bytes of a row of the low-rank attention: attention_rank numbers and the rotary tail, packed as others are."""
    return _v4_row(config.attention_rank, config.qk_rope_head_dim, format)


def _v4_row(coded: int, rope: int, format: str) -> int:
    """Bytes of `coded` numbers in FP8 with a scale per 64 and `rope` in BF16, padded to 8; or all of them plain."""
    if format in _PLAIN:
        return _PLAIN[format] * (coded + rope)
    return -(-(coded + -(-coded // 64) + 2 * rope) // 8) * 8


def stores(config: AnyConfig, format: str = "published", *, max_rewind: int = 0) -> list[Store]:
    """What one sequence's memory consists of; max_rewind: spare rows in V4's rings, for rewinding."""
    row, key = row_bytes(config, format)
    n = config.num_hidden_layers
    if isinstance(config, LlamaConfig):
        return [Store("keys and values", "gqa", n, row)]
    if isinstance(config, V32Config):
        return [
            Store("latent rows", "dsa", n, row, read=_at_most(config.index_topk)),
            Store("index keys", "dsa", n, key),
        ]
    out = []
    for kind, layers in config.trunk_kinds.items():
        if kind.name != "dense":
            window = config.sliding_window
            out.append(Store("window", kind.name, layers, row, most=window + max_rewind, read=_at_most(window)))
        out += _v4_far(config, kind, layers, format, max_rewind)
    return out


def _v4_far(k: ModelConfig, kind: LayerKind, layers: int, format: str, max_rewind: int) -> list[Store]:
    """What layers of a kind keep beside the window's rows."""
    row, key = row_bytes(k, format)
    name, r = kind.name, kind.ratio
    if name == "dense":
        return [Store("rows", name, layers, row)]
    if name == "anchors":  # every token may become an anchor; all scores are read to find those that are
        return [Store("scaled rows", name, layers, row, read=_root), Store("anchor scores", name, layers, 4)]
    if name == "lowrank":  # written when a token arrives, read once it has left the window
        return [Store("low-rank rows", name, layers, far_row_bytes(k, format), read=_all_but(k.sliding_window))]
    if not r:
        return []
    # fp32 values and scores of the open group; with overlap also of the group before, and the indexer's own
    series, width = (2 if kind.overlap else 1), k.head_dim + (k.index_head_dim if kind.indexed else 0)
    rows = series * r + max_rewind
    if kind.indexed:
        return [
            Store("entries", name, layers, row, every=r, read=_at_most(k.index_topk)),
            Store("index keys", name, layers, key, every=r),
            Store("open groups", name, layers, 8 * series * width, 0, rows, state=True),
        ]
    # its bank is read only when an entry closes, so a decoded token is not charged for it
    return [
        Store("entries", name, layers, row, every=r),
        Store("open groups", name, layers, 8 * series * width, 0, rows, read=_at_most(0), state=True),
    ]


def _at_most(most: int) -> Callable[[int], int]:
    return lambda rows: min(rows, most)


def _all_but(newest: int) -> Callable[[int], int]:
    return lambda rows: max(0, rows - newest)


def _root(rows: int) -> int:
    """The square root, rounded up."""
    return math.isqrt(rows - 1) + 1 if rows else 0


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
        out[f"{s.kind}: {s.part}"] = s.layers * s.row_bytes * (rows if s.read is None else s.read(rows))
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
