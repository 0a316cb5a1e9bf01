"""The DSpark drafter once more, as plainly as it can be said: float64, one block at a time, no module of the model.

Written from the description of the released code, beside plain.py, whose streams, experts and norms it takes. Every
mistake that ports have made can be put in by name (`flip`), as there.
"""

import math
import re
from typing import Any

import torch
from torch import Tensor

from dsv4.conform.plain import PlainV4

# What may be flipped; those from the confidence on change no draft before it.
DSPARK_FLIPS = (
    "target layers reversed",
    "first stream in place of the mean",
    "newest row of the context missing",
    "block causal",
    "block a position early",
    "block a position late",
    "window by distance",
    "context through the block's norm",
    "drafter with YaRN and the compressed base",
    "output not rotated back",
    "no query norm",
    "sink missing",
    "another noise token",
    "drafter without its own norm",
    "Markov head missing",
    "Markov head reads the block",
)
CONFIDENCE_FLIPS = ("confidence of the normed state", "confidence of the token itself")


class PlainDSpark(PlainV4):
    """`weights` and `config` as in PlainV4, of a model with a drafter."""

    def __init__(self, config: Any, weights: dict[str, Tensor], flip: str | None = None):
        super().__init__(config, {re.sub(r"^(mtp\.\d+)\.block\.", r"\1.", n): t for n, t in weights.items()}, flip)
        self.last = f"mtp.{config.dspark_stages - 1}."

    def features(self, ids: Tensor) -> list[Tensor]:
        """Streams [T, N, M] after each target layer."""
        x = self.w["embed.weight"][ids][:, None].repeat(1, self.c.hc_mult, 1)
        found = []
        for layer in range(self.c.num_hidden_layers):
            x = self.block(f"layers.{layer}.", layer, x, ids)
            if layer in self.c.dspark_target_layer_ids:
                found.append(x)
        return found

    def main(self, features: list[Tensor]) -> Tensor:
        """What the stages remember of each token, [T, M]."""
        if self.made("target layers reversed"):
            features = features[::-1]
        first = self.made("first stream in place of the mean")
        means = [x[:, 0] if first else x.mean(dim=1) for x in features]
        return self.norm(torch.cat(means, dim=1) @ self.w["mtp.0.main_proj.weight"].T, "mtp.0.main_norm.weight")

    def draft(self, main: Tensor, anchor: int, size: int) -> tuple[Tensor, Tensor]:
        """The context [L, M] of the tokens before the anchor -> states [size, M] and base logits [size, V]."""
        noise = self.c.dspark_noise_token_id
        if self.made("another noise token"):
            noise = (noise - 1) % self.c.vocab_size
        if self.made("newest row of the context missing"):
            main = main[:-1]
        x = self.w["embed.weight"][[anchor] + [noise] * (size - 1)][:, None].repeat(1, self.c.hc_mult, 1)
        for stage in range(self.c.dspark_stages):
            x = self.stage(f"mtp.{stage}.", x, main)
        states = self.collapse(x, self.last)
        normed = states if self.made("drafter without its own norm") else self.norm(states, f"{self.last}norm.weight")
        return states, normed @ self.w["head.weight"].T

    def drafts(self, logits: Tensor, anchor: int) -> tuple[list[int], Tensor]:
        """Base logits [size, V] of a block -> the likeliest drafts, and the logits that they are drawn from."""
        w1, w2 = (self.w[f"{self.last}markov_head.markov_{name}.weight"] for name in ("w1", "w2"))
        out, corrected = list[int](), list[Tensor]()
        for k in range(len(logits)):
            before = out[-1] if out else anchor
            if k and self.made("Markov head reads the block"):
                before = self.c.dspark_noise_token_id
            more = 0 if self.made("Markov head missing") else w2 @ w1[before]
            corrected.append(logits[k] + more)
            out.append(int(corrected[-1].argmax()))
        return out, torch.stack(corrected)

    def confidence(self, states: Tensor, anchor: int, drafts: list[int]) -> Tensor:
        """A logit for each slot, [size]."""
        if self.made("confidence of the normed state"):
            states = self.norm(states, f"{self.last}norm.weight")
        before = drafts if self.made("confidence of the token itself") else [anchor, *drafts[:-1]]
        embedded = self.w[f"{self.last}markov_head.markov_w1.weight"][before]
        return torch.cat([states, embedded], dim=1) @ self.w[f"{self.last}confidence_head.proj.weight"][0]

    def stage(self, prefix: str, x: Tensor, main: Tensor) -> Tensor:
        """Streams [size, N, M] of the block's slots through one stage."""
        layer, ids = self.c.num_hidden_layers, torch.zeros(len(x), dtype=torch.int64)
        x = self.around(
            x, f"{prefix}hc_attn_", lambda u: self.slots(prefix, self.norm(u, f"{prefix}attn_norm.weight"), main)
        )
        return self.around(x, f"{prefix}hc_ffn_", lambda u: self.moe(
            f"{prefix}ffn.", layer, self.norm(u, f"{prefix}ffn_norm.weight"), ids))  # fmt: skip

    def slots(self, prefix: str, x: Tensor, main: Tensor) -> Tensor:
        """The attention of the slots [size, M] to the context, a window's width of it, and to each other."""
        c = self.c
        w = {name.removeprefix(f"{prefix}attn."): t for name, t in self.w.items() if name.startswith(f"{prefix}attn.")}
        size, length, heads, width = len(x), len(main), c.num_attention_heads, c.head_dim
        other = self.made("drafter with YaRN and the compressed base")
        freq = self.frequencies(c.compress_rate_csa if other else 0)
        place = int(self.made("block a position late")) - int(self.made("block a position early"))
        own, past = length + place + torch.arange(size), torch.arange(length)
        if self.made("context through the block's norm"):
            main = self.norm(main, f"{prefix}attn_norm.weight")

        def keys(rows: Tensor, positions: Tensor) -> Tensor:
            return self.rotate(self.norm(rows @ w["wkv.weight"].T, f"{prefix}attn.kv_norm.weight"), positions, freq)

        kv = torch.cat([keys(main, past), keys(x, own)])
        seen = torch.zeros(size, length + size, dtype=torch.bool)
        seen[:, max(0, length - c.sliding_window) : length] = True
        seen[:, length:] = True
        if self.made("block causal"):
            seen[:, length:] = torch.ones(size, size, dtype=torch.bool).tril()
        if self.made("window by distance"):
            seen[:, :length] &= own[:, None] - past[None] < c.sliding_window
        q = self.norm(x @ w["wq_a.weight"].T, f"{prefix}attn.q_norm.weight") @ w["wq_b.weight"].T
        q = q.view(size, heads, width)
        if not self.made("no query norm"):
            q = q * (q.square().mean(dim=-1, keepdim=True) + c.rms_norm_eps).rsqrt()
        q = self.rotate(q, own, freq)
        out = torch.zeros(size, heads, width, dtype=torch.float64)
        for i in range(size):
            rows = kv[seen[i]]
            for h in range(heads):
                scores = rows @ q[i, h] * width**-0.5
                sink = -math.inf if self.made("sink missing") else w["attn_sink"][h].item()
                p = torch.cat([scores, torch.tensor([sink], dtype=torch.float64)]).softmax(dim=0)[:-1]
                out[i, h] = p @ rows
        if not self.made("output not rotated back"):
            out = self.rotate(out, own, freq, sign=-1)
        low = w["wo_a.weight"].view(c.o_groups, c.o_lora_rank, -1)
        groups = out.view(size, c.o_groups, -1)
        return torch.cat([groups[:, g] @ low[g].T for g in range(c.o_groups)], dim=1) @ w["wo_b.weight"].T
