"""The questions of the kit: inputs from one seed, exact in BF16, chosen so that every known mistake shows somewhere.

`what` to which part, with which inputs, and which mistakes are looked for in a wrong answer. What is right is computed
by vectors.py.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dsv4.config import ModelConfig
from dsv4.conform.mistakes import HASH, LAYER, MEMORY, MTP, ROUNDING, TOP, WEIGHTS, WRONG_DRAFTER
from dsv4.conform.parts import Given

LAYERS = {"window": 0, "csa": 1, "hca": 2}
LENGTH, LONG = 144, 262  # tokens: one HCA entry and the window's edge; two HCA entries
IN_LAYERS = (
    *LAYER,
    *(name for name in ROUNDING if name not in ("angles in FP64", "norms hand on FP32", "expert weights after w2")),
)
IN_MODELS = (*IN_LAYERS, *HASH, *TOP)
EACH, MAX, SHARE, ROUNDED, TYPICAL = "each", "max", "share", "rounded", "typical"
BF16 = torch.bfloat16

_TURNING = (
    "rotation on the first channels", "rotation in halves", "thetas swapped", "YaRN on window layers", "YaRN missing",
    "YaRN amplitude", "queries with the window's theta", "queries and window with the window's theta",
    "compressed theta 40000", "cos and sin in BF16",
)  # fmt: skip
_POOLING = (
    "gate without position", "overlap lost", "overlap halves swapped", "overlap lost between calls",
    "compressor in BF16", "gain of the norms plus one",
)  # fmt: skip
_ENTRIES = (
    "entries not normed", "entries rotated at the pool index", "entries rotated at the last token",
    "entries not rotated",
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One question. call: the adapter's function (adapter.py); what, layer: of a part or layer; mistakes: what is
    looked for in a wrong answer; measure: how answers are compared (vectors.py); dtype: of the floating-point tensors
    given, None: the port's own."""

    component: str
    name: str
    call: str
    given: Given
    what: str = ""
    layer: int = 0
    mistakes: tuple[str, ...] = IN_LAYERS
    measure: str = MAX
    dtype: torch.dtype | None = None

    @property
    def id(self) -> str:
        return f"{self.component}: {self.name}"


class Draw:
    """Random inputs from one seed."""

    def __init__(self, config: ModelConfig, seed: int = 17):
        self.c, self.generator = config, torch.Generator().manual_seed(seed)

    def normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(shape, generator=self.generator)).bfloat16().float()

    def ids(self, count: int) -> Tensor:
        return torch.randint(0, self.c.vocab_size, (count,), generator=self.generator)

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=self.generator)

    def x(self, count: int) -> Tensor:
        return self.normal(count, self.c.hidden_size)

    def streams(self, count: int) -> Tensor:
        return self.normal(count, self.c.hc_mult, self.c.hidden_size)


def all_cases(config: ModelConfig) -> list[Case]:
    draw = Draw(config)
    return [
        *_rotary(draw), *_compression(draw), *_index(draw), *_attention(draw), *_streams(draw), *_experts(draw),
        *_formats(draw), *_layers(draw), *_models(draw),
    ]  # fmt: skip


def _part(component: str, name: str, what: str, layer: int, mistakes: tuple[str, ...], **given: Any) -> Case:
    return Case(component, name, "part", given, what, layer, mistakes)


def _in_bf16(case: Case, *mistakes: str) -> Case:
    """The same question where BF16 numbers come in and the answer's grid decides: rounding mistakes show."""
    return Case(
        "roundings of BF16", case.component, case.call, case.given, case.what, case.layer, mistakes, SHARE, BF16
    )


def _rotary(d: Draw) -> Iterator[Case]:
    c = d.c
    for kind in ("window", "csa"):
        yield Case("rotation", f"table of {kind} layers", "part", {}, "frequencies", LAYERS[kind], _TURNING, EACH)
    pairs = c.qk_rope_head_dim // 2
    table = (10000.0 ** (-torch.arange(pairs) / pairs)).float()
    x = d.normal(40, c.num_attention_heads, c.head_dim)
    near, far = torch.arange(40) * 7, d.integers(500_000, 1_048_576, 40)
    turning = ("rotation on the first channels", "rotation in halves", "cos and sin in BF16")
    for name, positions, back in (("near", near, 0), ("to a million", far, 0), ("back", near, 1)):
        yield _part(
            "rotation", name, "rotation", 1, (*turning, "angles in FP64"), x=x, positions=positions, frequencies=table,
            back=back,
        )  # fmt: skip


def _compression(d: Draw) -> Iterator[Case]:
    """Every residue: a prompt that ends at each place of a group, then single tokens until past the next groups."""
    x = d.x(LONG)
    keys = ("index keys rotated at the pool index",)
    for residue in range(4):
        calls = [16 + residue, *[1] * 9, 12 - residue]
        short = x[: sum(calls)]
        name = f"prompt of {residue} mod 4"
        yield _part("compressor", f"csa, {name}", "compressor", 1, (*_POOLING, *_ENTRIES, *_TURNING), x=short,
                    calls=calls)  # fmt: skip
        yield _part("indexer", f"keys, {name}", "index keys", 1, (*_POOLING, *keys, *_TURNING), x=short, calls=calls)
    yield _part("compressor", "csa, token by token", "compressor", 1, (*_POOLING, *_ENTRIES, *_TURNING), x=x[:27],
                calls=[1] * 27)  # fmt: skip
    whole = _part(
        "compressor", "csa, at once", "compressor", 1, (*_POOLING, *_ENTRIES, *_TURNING), x=x[:43], calls=[43]
    )
    yield whole
    yield _in_bf16(whole, "compressor in BF16", "cos and sin in BF16")
    for residue in range(128):
        calls = [128 + residue, 1, 1, LONG - 130 - residue]
        yield _part("compressor", f"hca, prompt of {residue} mod 128", "compressor", 2,
                    (*_POOLING, *_ENTRIES, *_TURNING), x=x, calls=[n for n in calls if n])  # fmt: skip


def _index(d: Draw) -> Iterator[Case]:
    c, count = d.c, 40
    positions = torch.arange(100, 100 + count)
    given = dict(x=d.x(count), latent=d.normal(count, c.q_lora_rank), positions=positions)
    keys = d.normal(36, c.index_head_dim)
    mistakes = (
        "indexer not asked", "index scores without relu", "index weights missing", "entries visible a token early",
        "entries visible a token late", "entries visible to all", *_TURNING,
    )  # fmt: skip
    yield _part("indexer", "scores and choices", "indexer", 1, mistakes, **given, keys=keys)
    # Six keys that may score above zero, and so fewer than are chosen; the others are zero and tie in every arithmetic.
    # Equal keys of other numbers need not: a matrix product adds them up in another order at the edge of its tiles.
    tied = torch.where(torch.arange(36)[:, None] % 6 == 5, keys, 0.0)
    yield _part("ties", "index scores", "indexer ties", 1, ("index ties to the highest entry",), **given, keys=tied)


def _attention(d: Draw) -> Iterator[Case]:
    c, count = d.c, 24
    for kind in ("window", "csa"):
        given = dict(x=d.x(count), positions=torch.arange(30, 30 + count))
        mistakes = ("no query norm", "query latent not normed", "gain of the norms plus one", *_TURNING)
        case = _part("projections", f"in, {kind}", "project_in", LAYERS[kind], mistakes, **given)
        yield case
        given = dict(o=d.normal(count, c.num_attention_heads, c.head_dim), positions=given["positions"])
        mistakes = (
            "output not rotated back", "output groups interleaved", "attention output in FP8", *_TURNING,
        )  # fmt: skip
        yield _part("projections", f"out, {kind}", "project_out", LAYERS[kind], mistakes, **given)
        if kind == "csa":
            yield _in_bf16(case, "norms hand on FP32", "cos and sin in BF16")
    positions = torch.arange(count)
    chosen = torch.stack([torch.randperm(12, generator=d.generator)[:5] for _ in range(count)])
    chosen = torch.where(chosen < positions[:, None] // 2, chosen, -1).sort(dim=1).values
    given = dict(
        q=d.normal(count, c.num_attention_heads, c.head_dim), rows=d.normal(count, c.head_dim),
        start=(positions - 7).clamp_min(0), stop=positions + 1, entries=d.normal(12, c.head_dim), chosen=chosen,
    )  # fmt: skip
    sink = d.normal(c.num_attention_heads)
    mistakes = ("sink missing", "sink scaled", "YaRN amplitude in the softmax", "window one wider",
                "window without the token itself")  # fmt: skip
    for name, value in (("sink", sink), ("sink far above", sink + 1000), ("sink far below", sink - 1000)):
        yield _part("attention", name, "attention", 1, mistakes, **given, sink=value)


def _streams(d: Draw) -> Iterator[Case]:
    n, count = d.c.hc_mult, 24
    streams = d.streams(count)
    yield _part("streams", "maps", "maps", 0, ("post not doubled", "streams not normalised", "one Sinkhorn round"),
                streams=streams)  # fmt: skip
    mix = d.normal(count, n, n).softmax(dim=2)
    given = dict(streams=streams, y=d.x(count), post=d.normal(count, n).sigmoid() * 2, mix=mix)
    case = _part("streams", "mixing", "mixing", 0, ("mixing transposed", "post and mixing in BF16"), **given)
    yield case
    yield _in_bf16(case, "mixing transposed", "post and mixing in BF16")
    yield _part("streams", "head", "collapse", 0, ("head reads the mean of the streams", "streams not normalised"),
                streams=streams)  # fmt: skip
    yield _part("streams", "norm", "norm", 0, ("gain of the norms plus one",), x=d.normal(count, d.c.hidden_size) * 3)


def _experts(d: Draw) -> Iterator[Case]:
    c, count = d.c, 40
    x, ids = d.x(count), d.ids(count)
    mistakes = ("bias in the weights", "weights not normalised", "route scale missing", "sigmoid gate",
                "router in BF16", *HASH)  # fmt: skip
    for name, layer in (("by token id", 0), ("by score", 1)):
        case = _part("gate", name, "gate", layer, mistakes, x=x, ids=ids)
        yield case
    yield _in_bf16(case, "router in BF16")
    best = d.normal(count, c.n_routed_experts).topk(c.num_experts_per_tok).indices
    weights = torch.zeros(count, c.n_routed_experts).scatter(1, best, 0.25 + d.normal(*best.shape).abs())
    clamps = ("gate clamped on both sides", "gate and up exchanged")
    case = _part("experts", "routed", "routed experts", 1, ("no clamp in the routed experts", *clamps), x=x,
                 weights=weights)  # fmt: skip
    yield case
    yield _in_bf16(case, "expert weights after w2", "SwiGLU in BF16")
    yield _part("experts", "shared", "shared expert", 1,
                ("no clamp in the shared expert", "shared expert missing", *clamps), x=x)  # fmt: skip


def _formats(d: Draw) -> Iterator[Case]:
    """The published widths. Blocks of tiny numbers, single large ones, ties, and powers of two at a scale's border."""
    rows = d.normal(24, 512)
    rows[1, :64] *= 2.0**-20
    rows[2] *= 2.0**-30
    rows[3, 64:128] = 0
    rows[4, 5], rows[4, 70] = 448.0, 449.0
    rows[5, :64] = torch.arange(64) / 16 + 1
    rows[6] *= 1000
    rows[7, 3], rows[7, 66] = 896.0, 2.0**-9
    row = ("rows not rounded", "rows truncated", "rows without a floor", "row scales not powers of two",
           "row scales rounded down", "rows in blocks of 128", "rotary channels in FP8")  # fmt: skip
    key = ("index rows not rotated", "rotated index rows not rounded", "index rows in FP8", "index rows truncated")
    assert {*row, *key} < set(MEMORY)
    yield Case("number formats", "rows", "part", {"rows": rows.bfloat16()}, "row format", 0, row, EACH)
    keys = d.normal(200, 128)
    keys[1] = 0
    keys[2] *= 2.0**-40
    keys[3, :32] = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0] * 4)
    yield Case("number formats", "index rows", "part", {"rows": keys.bfloat16()}, "index row format", 0, key, EACH)
    given = dict(q=d.normal(6, 8, 128), weights=d.normal(6, 8), keys=d.normal(20, 128))
    met = ("Hadamard on queries only", "Hadamard on keys only", *(m for m in key if "rotated index" not in m))
    yield Case("number formats", "index scores", "part", given, "packed index scores", 0, met, MAX, torch.float32)
    codes = d.integers(0, 256, 256, 256).to(torch.uint8)
    codes[(codes & 127) == 127] = 0x80  # NaN has no place in weights
    scales = d.integers(115, 125, 2, 2).to(torch.uint8)
    wrong = tuple(name for name in WEIGHTS if not name.startswith(("nibbles", "FP4")))
    yield Case("number formats", "FP8 weights", "part", dict(codes=codes, scales=scales), "FP8 weights", 0, wrong,
               EACH)  # fmt: skip
    codes, scales = d.integers(0, 256, 64, 64).to(torch.uint8), d.integers(115, 125, 64, 4).to(torch.uint8)
    wrong = ("scale bytes read as numbers", "scales divide", "nibbles exchanged", "FP4 scales per 16 columns")
    yield Case("number formats", "FP4 weights", "part", dict(codes=codes, scales=scales), "FP4 weights", 0, wrong,
               EACH)  # fmt: skip


def _layers(d: Draw) -> Iterator[Case]:
    streams, ids = d.streams(LONG), d.ids(LONG)
    for kind, layer in LAYERS.items():
        length, first = (LONG, 131) if kind == "hca" else (70, 51)
        for name, calls in (("at once", [length]), ("a prompt, then tokens", [first, *[1] * 6, length - first - 6])):
            given = dict(streams=streams[:length], ids=ids[:length], calls=calls)
            mistakes = (*IN_LAYERS, *HASH, "gain of the norms plus one", "overlap lost between calls")
            yield Case("layers", f"{kind}, {name}", "layer", given, "", layer, mistakes)


def _models(d: Draw) -> Iterator[Case]:
    ids, other, nothing = d.ids(LENGTH), d.ids(LENGTH), torch.zeros(0, dtype=torch.int64)
    streaming = (*IN_MODELS, "overlap lost between calls")
    for length in (*range(1, 10), *range(126, 132)):
        given = dict(ids=ids[: length + 6], calls=[length, *[1] * 6], before=nothing)
        yield Case("model", f"a prompt of {length}, then 6 tokens", "logits", given, mistakes=streaming)
    yield Case("model", "at once", "logits", dict(ids=ids, calls=[LENGTH], before=nothing), mistakes=IN_MODELS)
    given = dict(ids=ids[:70], calls=[7] * 10, before=nothing)
    yield Case("model", "in pieces of 7", "logits", given, mistakes=streaming)
    yield Case("memory", "after a prompt", "memory", dict(ids=torch.cat([ids, other])[:LONG]), mistakes=IN_MODELS)
    for length in (1, 2, 3):
        given = dict(ids=other[: length + 8], calls=[length, *[1] * 8], before=ids[:23])
        found = ("state of the sequence before", "overlap lost between calls")
        yield Case("sequences", f"a prompt of {length} after another sequence", "logits", given, mistakes=found)
    for back in (1, 2, 3, 6):
        fed = torch.cat([ids[:132], other[:12]])
        given = dict(ids=fed, calls=[132, -back, *[1] * 12], before=nothing)
        found = ("state not rewound", "overlap lost between calls")
        yield Case("rewind", f"{back} tokens at the end of a group", "logits", given, mistakes=found)
    given = dict(ids=torch.cat([ids[:40], other[:37]]), lengths=[40, 37])
    found = ("padding is pooled",)
    yield Case("padding", "40 and 37 tokens side by side", "batch", given, mistakes=found)
    given = dict(ids=torch.cat([ids, other[:16]]), lengths=[LENGTH, 16])
    yield Case("padding", "144 and 16 tokens side by side", "batch", given, mistakes=found)
    yield Case("MTP", "row t reads streams t and token t+1", "mtp", dict(ids=ids[:60]),
               mistakes=(*MTP, *IN_MODELS, WRONG_DRAFTER))  # fmt: skip
