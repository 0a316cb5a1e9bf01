"""The golden vectors: a small model in which every mistake shows, and what the plain float64 model answers.

Everything is drawn from one seed on the CPU and rounded to BF16, so a port in any precision reads the same numbers.
"""

from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from dsv4.config import ModelConfig
from dsv4.conform import codecs
from dsv4.conform.cases import EACH, MAX, ROUNDED, SHARE, TYPICAL, Case, all_cases
from dsv4.conform.parts import PARTS, Answer, prefix_of
from dsv4.conform.plain import PlainV4
from dsv4.measure.subjects import small_model

SEED = 3
# measure -> what is allowed, and why
TOLERANCE: dict[str, tuple[float, str]] = {
    EACH: (2e-6, "of every number by itself: one power or product in FP32 may miss its last bit, codes are exact"),
    MAX: (2e-5, "of the largest number: some hundred FP32 roundings in another order"),
    SHARE: (0.03, "of the numbers, which lie on the grid of BF16: FP32 sums in another order move a few by a step"),
    ROUNDED: (1e-3, "the median over rows of |difference| / |row|: in a packed memory a number on the border of two "
                    "roundings moves a few rows, and maybe a choice"),
    TYPICAL: (0.1, "the median over rows of |difference| / |row|: BF16 rounds by 2^-9, again and again, and a choice "
                    "that hangs on a rounding may be another"),
}  # fmt: skip


# the rest as in measure/subjects.py; positions: as many as its YaRN is for
CHANGES: dict[str, Any] = dict(
    hidden_size=64, sliding_window=16, vocab_size=96, swiglu_limit=10.0, max_position_embeddings=4096
)  # fmt: skip


@lru_cache(maxsize=1)
@torch.no_grad()
def kit_model() -> Any:
    """The model that every port loads: exact in BF16, its clamps at work."""
    model = small_model((0, 4, 128), mtp=1, seed=SEED, **CHANGES)
    for name, p in model.named_parameters():
        if name.endswith(("w13", "shared_experts.w1.weight", "shared_experts.w3.weight")):
            p.mul_(12)
        elif name.endswith(("experts.w2", "shared_experts.w2.weight")):
            p.mul_(0.05)
        p.copy_(p.bfloat16())
    for b in model.buffers():
        b.copy_(b.bfloat16() if b.is_floating_point() else b)
    return model.eval()


class Kit:
    """The model, its cases, and what is right; answers are kept, as a diagnosis asks again."""

    def __init__(self) -> None:
        model = kit_model()
        self.config: ModelConfig = model.config
        self.weights: dict[str, Tensor] = model.state_dict()
        self.cases = all_cases(self.config)
        self._kept: dict[Any, Answer] = {}

    def plain(self, flips: Iterable[str] = (), **options: Any) -> PlainV4:
        return PlainV4(self.config, self.weights, flips, **options)

    def answer(self, case: Case, *flips: str, packed: bool = False) -> Answer:
        """What the plain model answers, with these mistakes in it. packed: its memory rounds."""
        packed = packed and case.call != "part"
        key = case.id, frozenset(flips), packed
        if key not in self._kept:
            plain = self.plain(flips, packed=packed, bf16=case.measure == SHARE)
            self._kept[key] = _ANSWERS[case.call](plain, case)
        return self._kept[key]


# --- what the plain model answers to the calls of an adapter ---------------------------------------------------------


def _part(plain: PlainV4, case: Case) -> Answer:
    return PARTS[case.what].plain(plain, case.layer, case.given)


def _layer(plain: PlainV4, case: Case) -> Answer:
    plain.calls = case.given["calls"]
    prefix = prefix_of(plain, case.layer)
    return {"streams": plain.block(prefix, case.layer, case.given["streams"].double(), case.given["ids"])}


def _logits(plain: PlainV4, case: Case) -> Answer:
    """Of every token that is fed; a negative length in `calls` takes tokens back."""
    ids, out, kept, calls = case.given["ids"], [], torch.zeros(0, dtype=torch.int64), []
    if plain.made("state of the sequence before") and len(case.given["before"]):
        plain.streams(case.given["before"])
        plain.before = dict(plain.rows), 0
    done = 0
    for fed, back in _runs(case.given["calls"]):
        feed = sum(fed)
        kept, done, calls = torch.cat([kept, ids[done : done + feed]]), done + feed, [*calls, *fed]
        plain.calls = calls
        out.append(plain.logits(kept)[len(kept) - feed :])
        if back:
            kept = kept[: len(kept) - back]
            calls = [len(kept)]
            if plain.made("state not rewound"):
                plain.before = dict(plain.rows), len(kept) // plain.c.compress_rate_csa
    return {"logits": torch.cat(out)}


def _runs(calls: list[int]) -> Iterator[tuple[list[int], int]]:
    """(lengths of calls that feed, tokens then taken back)."""
    fed: list[int] = []
    for n in calls:
        if n > 0:
            fed.append(n)
        else:
            yield fed, -n
            fed = []
    yield fed, 0


def _batch(plain: PlainV4, case: Case) -> Answer:
    """Of sequences side by side; `padding is pooled`: all are filled up on the left to the longest."""
    ids, lengths = case.given["ids"], case.given["lengths"]
    longest, out = max(lengths), {}
    for number, part in enumerate(ids.split(lengths)):
        plain.padding = longest - len(part) if plain.made("padding is pooled") else 0
        padded = torch.cat([torch.zeros(plain.padding, dtype=torch.int64), part])
        out[f"logits {number}"] = plain.logits(padded)[plain.padding :]
    return out


def _mtp(plain: PlainV4, case: Case) -> Answer:
    return {"logits": plain.mtp_logits(case.given["ids"])}


def _memory(plain: PlainV4, case: Case) -> Answer:
    """What is in memory after a prompt: window rows, entries, index keys (not rotated by Hadamard)."""
    c, ids, out = plain.c, case.given["ids"], {}
    x = plain.w["embed.weight"][ids][:, None].repeat(1, c.hc_mult, 1)
    for i in range(c.num_hidden_layers):
        prefix, ratio = f"layers.{i}.", c.compress_ratios[i]
        pre, _, _ = plain.maps(x, f"{prefix}hc_attn_")
        h = plain.norm((pre[:, :, None] * x).sum(dim=1), f"{prefix}attn_norm.weight")
        freq, _, amplitude = plain.turning(i)
        row = plain.project_in(f"{prefix}attn.", i, h, torch.arange(len(ids)))[3]
        out[f"window {i}"] = plain.kept(row)[-c.sliding_window :]
        if ratio:
            entries = plain.compress(f"{prefix}attn.compressor.", h, ratio, c.head_dim, freq, amplitude)
            out[f"entries {i}"] = plain.kept(entries)
        if ratio == c.compress_rate_csa:
            keys = plain.compress(f"{prefix}attn.indexer.compressor.", h, ratio, c.index_head_dim, freq, amplitude)
            out[f"keys {i}"] = codecs.hadamard(codecs.index_row(keys)) if plain.packed else keys
        x = plain.block(prefix, i, x, ids)
    return out


_ANSWERS = {
    "part": _part, "layer": _layer, "logits": _logits, "batch": _batch, "mtp": _mtp, "memory": _memory,
}  # fmt: skip
