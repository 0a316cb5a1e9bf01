"""What the parts of a model take and give, and what plain.py gives for them.

A part is asked of the model that was loaded, in one of its layers: `PARTS` says with which tensors, and what comes
back. Legend: T tokens, M model width, N streams, H heads, D head width, L query latent, E entries, X experts.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dsv4.conform import codecs
from dsv4.conform.plain import PlainV4

Given = dict[str, Any]  # tensors; `calls` is a list of lengths
Answer = dict[str, Tensor]


@dataclass(frozen=True)
class Part:
    """takes, gives: for people, by name; about: the rule in a sentence; plain: what the plain model answers."""

    takes: dict[str, str]
    gives: dict[str, str]
    about: str
    plain: Callable[[PlainV4, int, Given], Answer]


def prefix_of(plain: PlainV4, layer: int) -> str:
    return "mtp.0." if layer == plain.c.num_hidden_layers else f"layers.{layer}."


def _frequencies(p: PlainV4, layer: int, g: Given) -> Answer:
    return {"frequencies": p.turning(layer)[0]}


def _rotation(p: PlainV4, layer: int, g: Given) -> Answer:
    return {"rotated": p.rotate(g["x"].double(), g["positions"], g["frequencies"], sign=-1 if g["back"] else 1)}


def _project_in(p: PlainV4, layer: int, g: Given) -> Answer:
    latent, q, _, row = p.project_in(f"{prefix_of(p, layer)}attn.", layer, g["x"].double(), g["positions"])
    return {"latent": latent, "q": q, "row": row}


def _compressor(p: PlainV4, layer: int, g: Given) -> Answer:
    freq, _, amplitude = p.turning(layer)
    p.calls, ratio = g["calls"], p.c.compress_ratios[layer]
    prefix = f"{prefix_of(p, layer)}attn.compressor."
    return {"entries": p.compress(prefix, g["x"].double(), ratio, p.c.head_dim, freq, amplitude)}


def _index_keys(p: PlainV4, layer: int, g: Given) -> Answer:
    p.calls, ratio = g["calls"], p.c.compress_ratios[layer]
    prefix = f"{prefix_of(p, layer)}attn.indexer.compressor."
    freq, _, amplitude = p.turning(layer)
    return {"keys": p.compress(prefix, g["x"].double(), ratio, p.c.index_head_dim, freq, amplitude)}


def _indexer(p: PlainV4, layer: int, g: Given) -> Answer:
    x, keys, t = g["x"].double(), g["keys"].double(), g["positions"]
    prefix = f"{prefix_of(p, layer)}attn.indexer."
    freq, _, amplitude = p.turning(layer)
    scores = p.index_scores(prefix, x, g["latent"].double(), t, keys, freq, amplitude)
    visible = p.visible(t, len(keys), p.c.compress_ratios[layer])
    chosen = visible if p.made("indexer not asked") else p.best(scores, visible)
    return {"scores": scores, "chosen": chosen.double()}


def _ties(p: PlainV4, layer: int, g: Given) -> Answer:
    return {"chosen": _indexer(p, layer, g)["chosen"]}


def _attention(p: PlainV4, layer: int, g: Given) -> Answer:
    rows, entries = g["rows"].double(), g["entries"].double()
    place = torch.arange(len(rows))
    start = g["start"] - int(p.made("window one wider"))
    stop = g["stop"] - int(p.made("window without the token itself"))
    seen = (place >= start[:, None]) & (place < stop[:, None])
    read = torch.zeros(len(seen), len(entries) + 1, dtype=torch.bool).scatter(1, g["chosen"] + 1, True)[:, 1:]
    p.w["sink.attn_sink"] = g["sink"].double()
    out = p.attend("sink.", layer, g["q"].double(), torch.cat([rows, entries]), torch.cat([seen, read], dim=1))
    return {"out": out}


def _project_out(p: PlainV4, layer: int, g: Given) -> Answer:
    return {"y": p.project_out(f"{prefix_of(p, layer)}attn.", layer, g["o"].double(), g["positions"])}


def _maps(p: PlainV4, layer: int, g: Given) -> Answer:
    return dict(
        zip(("pre", "post", "mix"), p.maps(g["streams"].double(), f"{prefix_of(p, layer)}hc_attn_"), strict=True)
    )


def _mixing(p: PlainV4, layer: int, g: Given) -> Answer:
    return {"streams": p.write(*(g[name].double() for name in ("streams", "y", "post", "mix")))}


def _collapse(p: PlainV4, layer: int, g: Given) -> Answer:
    return {"hidden": p.collapse(g["streams"].double(), "")}


def _norm(p: PlainV4, layer: int, g: Given) -> Answer:
    return {"y": p.norm(g["x"].double(), f"{prefix_of(p, layer)}attn_norm.weight")}


def _gate(p: PlainV4, layer: int, g: Given) -> Answer:
    chosen, weights = p.gate(f"{prefix_of(p, layer)}ffn.", layer, g["x"].double(), g["ids"])
    dense = torch.zeros(len(chosen), p.c.n_routed_experts, dtype=torch.float64)
    return {"weights": dense.scatter(1, chosen, weights)}


def _routed(p: PlainV4, layer: int, g: Given) -> Answer:
    weights, chosen = g["weights"].double().topk(p.c.num_experts_per_tok)
    return {"y": p.cast(p.routed(f"{prefix_of(p, layer)}ffn.", g["x"].double(), chosen, weights))}


def _shared(p: PlainV4, layer: int, g: Given) -> Answer:
    return {"y": p.shared(f"{prefix_of(p, layer)}ffn.", g["x"].double())}


def _row(p: PlainV4, layer: int, g: Given) -> Answer:
    return {"read": codecs.row(g["rows"].double(), 64, p.flips)}


def _index_row(p: PlainV4, layer: int, g: Given) -> Answer:
    return {"read": codecs.index_row(g["rows"].double(), p.flips, bf16=g["rows"].dtype == torch.bfloat16)}


def _index_meeting(p: PlainV4, layer: int, g: Given) -> Answer:
    q, keys = codecs.meeting(g["q"].double(), g["keys"].double(), p.flips)
    return {"scores": torch.einsum("th,thk->tk", g["weights"].double(), torch.einsum("thd,kd->thk", q, keys).relu())}


def _fp8_weights(p: PlainV4, layer: int, g: Given) -> Answer:
    return {"matrix": codecs.fp8_weights(g["codes"], g["scales"], p.flips)}


def _fp4_weights(p: PlainV4, layer: int, g: Given) -> Answer:
    return {"matrix": codecs.fp4_weights(g["codes"], g["scales"], p.flips)}


_X, _T, _STREAMS = "[T, M], a sublayer's normed input", "int64 [T]", "[T, N, M]"
_CALLS = "lengths: the tokens come in so many calls of one sequence"
PARTS: dict[str, Part] = {
    "frequencies": Part({}, {"frequencies": "[pairs] radians a position"}, "the table of this layer's kind",
                        _frequencies),
    "rotation": Part(
        {"x": "[T, H, D]", "positions": _T, "frequencies": "FP32 [pairs]", "back": "0, or 1 for the inverse"},
        {"rotated": "[T, H, D]"}, "the last channels as pairs (2i, 2i+1); angles are FP32 products", _rotation),
    "norm": Part({"x": "[T, M]"}, {"y": "[T, M]"}, "attn_norm: FP32, no +1, cast once", _norm),
    "project_in": Part(
        {"x": _X, "positions": _T}, {"latent": "[T, L]", "q": "[T, H, D]", "row": "[T, D]"},
        "the normed query latent, queries (normed per head, rotated), the rotated key = value row", _project_in),
    "compressor": Part({"x": _X, "calls": _CALLS}, {"entries": "[T // ratio, D]"},
                       "the entries that have closed, normed and rotated", _compressor),
    "index keys": Part({"x": _X, "calls": _CALLS}, {"keys": "[T // ratio, Di]"},
                       "the indexer's own compressor; rotated by position, not by Hadamard", _index_keys),
    "indexer": Part(
        {"x": _X, "latent": "[T, L]", "positions": _T, "keys": "[E, Di]"},
        {"scores": "[T, E] (left out where there is no such tensor)", "chosen": "[T, E]: 1 where chosen, else 0"},
        "sum_h weight_h relu(q_h . key); the index_topk best of those visible", _indexer),
    "indexer ties": Part(
        {"x": _X, "latent": "[T, L]", "positions": _T, "keys": "[E, Di], many of them zero"},
        {"chosen": "[T, E]: 1 where chosen, else 0"}, "of equal scores the lowest entry first", _ties),
    "attention": Part(
        {"q": "[T, H, D]", "rows": "[P, D], window rows", "start": "int64 [T]: a query reads rows start..stop-1",
         "stop": _T, "entries": "[E, D]", "chosen": "int64 [T, k], the entries read, -1: none", "sink": "[H]"},
        {"out": "[T, H, D]"}, "one softmax over rows, chosen entries and the sink, whose value is 0", _attention),
    "project_out": Part({"o": "[T, H, D]", "positions": _T}, {"y": "[T, M]"},
                        "rotated back, groups through wo_a, then wo_b", _project_out),
    "maps": Part({"streams": _STREAMS}, {"pre": "[T, N]", "post": "[T, N]", "mix": "[T, N, N]"},
                 "hc_attn: sigmoid + eps, 2 sigmoid, Sinkhorn", _maps),
    "mixing": Part({"streams": _STREAMS, "y": "[T, M]", "post": "[T, N]", "mix": "[T, N, N]"},
                   {"streams": _STREAMS}, "post_k y + sum_j mix[j,k] x_j", _mixing),
    "collapse": Part({"streams": _STREAMS}, {"hidden": "[T, M]"}, "hc_head: weighted by sigmoid + eps", _collapse),
    "gate": Part({"x": _X, "ids": _T}, {"weights": "[T, X], 0 where not chosen"},
                 "sqrt(softplus); by score + bias or by token id; normalised, times routed_scaling_factor", _gate),
    "routed experts": Part({"x": _X, "weights": "[T, X], 0 where not chosen"}, {"y": "[T, M]"},
                           "sum of w2 (weight * silu(min(w1 x, limit)) * clamp(w3 x))", _routed),
    "shared expert": Part({"x": _X}, {"y": "[T, M]"}, "the same clamp as the routed experts", _shared),
    "row format": Part({"rows": "BF16 [n, 512]"}, {"read": "[n, 512]"},
                       "448 channels through e4m3 in blocks of 64, the rest BF16", _row),
    "index row format": Part({"rows": "BF16 [n, 128]"}, {"read": "[n, 128], rotated"},
                             "Hadamard, BF16, e2m1 in blocks of 32", _index_row),
    "packed index scores": Part(
        {"q": "FP32 [T, h, 128]", "weights": "[T, h]", "keys": "FP32 [E, 128]"}, {"scores": "[T, E]"},
        "queries and keys both rotated and rounded", _index_meeting),
    "FP8 weights": Part({"codes": "uint8 [n, m]", "scales": "uint8 [n / 128, m / 128]"}, {"matrix": "[n, m]"},
                        "e4m3 times 2^(byte - 127)", _fp8_weights),
    "FP4 weights": Part({"codes": "uint8 [n, m / 2]", "scales": "uint8 [n, m / 32]"}, {"matrix": "[n, m]"},
                        "e2m1, the even column in the low nibble, times 2^(byte - 127)", _fp4_weights),
}  # fmt: skip
