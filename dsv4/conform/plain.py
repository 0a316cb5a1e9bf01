"""DeepSeek-V4 once more, as plainly as it can be said: float64, whole sequences, dense masks, loops, no module of dsv4.

It is written from the specification and shares nothing with the model but the names of the weights, so it can say which
of two answers is right. Every mistake that ports of V4 have made can be put in by name (`flip`): a test that a flip is
far from the model shows that the model does not make it, and that the test would notice.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# What may be flipped, and the kinds of layer where it shows.
WINDOW, CSA, HCA = "window", "csa", "hca"
EVERY, COMPRESSED = (WINDOW, CSA, HCA), (CSA, HCA)
FLIPS: dict[str, tuple[str, ...]] = {
    # residual streams
    "mixing transposed": EVERY,
    "post not doubled": EVERY,
    "streams not normalised": EVERY,
    "one Sinkhorn round": EVERY,
    # rotary
    "rotation on the first channels": EVERY,
    "rotation in halves": EVERY,
    "output not rotated back": EVERY,
    "thetas swapped": EVERY,
    "YaRN on window layers": (WINDOW,),
    "YaRN missing": COMPRESSED,
    "YaRN amplitude": COMPRESSED,
    "queries with the window's theta": COMPRESSED,
    "entries rotated at the pool index": COMPRESSED,
    "entries rotated at the last token": COMPRESSED,
    "entries not rotated": COMPRESSED,
    # attention
    "no query norm": EVERY,
    "query latent not normed": EVERY,
    "window without the token itself": EVERY,
    "window one wider": EVERY,
    "sink missing": EVERY,
    "sink scaled": EVERY,
    "output groups interleaved": EVERY,
    "entries visible a token early": COMPRESSED,
    "entries visible a token late": COMPRESSED,
    # compression
    "overlap lost": (CSA,),
    "overlap halves swapped": (CSA,),
    "gate without position": COMPRESSED,
    "entries not normed": COMPRESSED,
    # indexer
    "indexer not asked": (CSA,),
    "index scores without relu": (CSA,),
    "index weights missing": (CSA,),
    "index keys rotated at the pool index": (CSA,),
    # experts
    "bias in the weights": EVERY,
    "weights not normalised": EVERY,
    "route scale missing": EVERY,
    "sigmoid gate": EVERY,
    "no clamp in the shared expert": EVERY,
    "no clamp in the routed experts": EVERY,
    "gate clamped on both sides": EVERY,
    "gate and up exchanged": EVERY,
    "shared expert missing": EVERY,
}
HASH_FLIPS = ("experts chosen by score", "expert weights all equal")
TOP_FLIPS = ("gain of the norms plus one", "head reads the mean of the streams")
MTP_FLIPS = ("MTP reads the collapsed stream", "MTP embeds its own token", "MTP with YaRN", "MTP routes by token id")


class PlainV4:
    """`weights` by published name, experts stacked (a state dict of ours); `flip` names the mistake to make, or None.

    config: anything with the published field names (a ModelConfig has them).
    """

    def __init__(self, config: Any, weights: dict[str, Tensor], flip: str | None = None):
        self.c, self.flip = config, flip
        published = {n.replace("mtp.0.block.", "mtp.0."): t for n, t in weights.items()}
        self.w = {n: t.double() if t.is_floating_point() else t for n, t in published.items()}

    # --- whole model

    def streams(self, ids: Tensor) -> Tensor:
        x = self.w["embed.weight"][ids][:, None].repeat(1, self.c.hc_mult, 1)
        for layer in range(self.c.num_hidden_layers):
            x = self.block(f"layers.{layer}.", layer, x, ids)
        return x

    def logits(self, ids: Tensor) -> Tensor:
        return self.head(self.streams(ids), "")

    def mtp_logits(self, ids: Tensor) -> Tensor:
        """Row t: from the streams at t and the token at t+1, the logits of the token at t+2."""
        x = self.streams(ids)[:-1]
        if self.flip == "MTP reads the collapsed stream":
            x = self.collapse(x, "")[:, None].expand_as(x)
        following = ids[:-1] if self.flip == "MTP embeds its own token" else ids[1:]
        embedded = self.norm(self.w["embed.weight"][following], "mtp.0.enorm.weight")
        x = self.norm(x, "mtp.0.hnorm.weight") @ self.w["mtp.0.h_proj.weight"].T
        x = x + (embedded @ self.w["mtp.0.e_proj.weight"].T)[:, None]
        return self.head(self.block("mtp.0.", self.c.num_hidden_layers, x, following), "mtp.0.")

    def head(self, x: Tensor, prefix: str) -> Tensor:
        return self.norm(self.collapse(x, prefix), f"{prefix}norm.weight") @ self.w["head.weight"].T

    def collapse(self, x: Tensor, prefix: str) -> Tensor:
        if self.flip == "head reads the mean of the streams":
            return x.mean(dim=1)
        m = self.twenty_four(x, f"{prefix}hc_head_")
        pre = torch.sigmoid(self.w[f"{prefix}hc_head_scale"] * m + self.w[f"{prefix}hc_head_base"]) + self.c.hc_eps
        return torch.stack([pre[:, j, None] * x[:, j] for j in range(self.c.hc_mult)]).sum(dim=0)

    def block(self, prefix: str, layer: int, x: Tensor, ids: Tensor) -> Tensor:
        """Streams [T, N, M] through one layer."""
        x = self.around(x, f"{prefix}hc_attn_", lambda u: self.attention(
            f"{prefix}attn.", layer, self.norm(u, f"{prefix}attn_norm.weight")))  # fmt: skip
        return self.around(x, f"{prefix}hc_ffn_", lambda u: self.moe(
            f"{prefix}ffn.", layer, self.norm(u, f"{prefix}ffn_norm.weight"), ids))  # fmt: skip

    # --- residual streams

    def twenty_four(self, x: Tensor, prefix: str) -> Tensor:
        v = x.flatten(1)
        m = v @ self.w[f"{prefix}fn"].T
        return m if self.flip == "streams not normalised" else m * rho(v, self.c.rms_norm_eps)

    def around(self, x: Tensor, prefix: str, sublayer: Callable[[Tensor], Tensor]) -> Tensor:
        n = self.c.hc_mult
        m, base, scale = self.twenty_four(x, prefix), self.w[f"{prefix}base"], self.w[f"{prefix}scale"]
        pre = torch.sigmoid(scale[0] * m[:, :n] + base[:n]) + self.c.hc_eps
        post = torch.sigmoid(scale[1] * m[:, n : 2 * n] + base[n : 2 * n])
        post = post if self.flip == "post not doubled" else 2 * post
        mix = self.sinkhorn((scale[2] * m[:, 2 * n :] + base[2 * n :]).view(-1, n, n))
        if self.flip == "mixing transposed":
            mix = mix.transpose(1, 2)
        y = sublayer(torch.stack([pre[:, j, None] * x[:, j] for j in range(n)]).sum(dim=0))
        new = [post[:, k, None] * y + sum(mix[:, j, k, None] * x[:, j] for j in range(n)) for k in range(n)]
        return torch.stack(new, dim=1)

    def sinkhorn(self, c: Tensor) -> Tensor:
        eps = self.c.hc_eps
        c = c.softmax(dim=2) + eps
        c = c / (c.sum(dim=1, keepdim=True) + eps)
        for _ in range(0 if self.flip == "one Sinkhorn round" else self.c.hc_sinkhorn_iters - 1):
            c = c / (c.sum(dim=2, keepdim=True) + eps)
            c = c / (c.sum(dim=1, keepdim=True) + eps)
        return c

    # --- rotary

    def frequencies(self, ratio: int, *, yarn: bool | None = None) -> Tensor:
        dim, s = self.c.qk_rope_head_dim, self.c.rope_scaling
        plain = (ratio == 0) != (self.flip == "thetas swapped")
        base = self.c.rope_theta if plain else self.c.compress_rope_theta
        freq = torch.tensor([base ** (-2 * i / dim) for i in range(dim // 2)], dtype=torch.float64)
        yarn = ratio != 0 and self.flip != "YaRN missing" if yarn is None else yarn
        if not yarn or s.type == "default":
            return freq

        def cd(turns: float) -> float:
            return dim * math.log(s.original_max_position_embeddings / (2 * math.pi * turns)) / (2 * math.log(base))

        low, high = max(math.floor(cd(s.beta_fast)), 0), min(math.ceil(cd(s.beta_slow)), dim - 1)
        ramp = ((torch.arange(dim // 2) - low) / (high - low)).clamp(0, 1)
        return freq * (1 - ramp) + freq / s.factor * ramp

    def rotate(self, x: Tensor, positions: Tensor, freq: Tensor, amplitude: float = 1.0, sign: int = 1) -> Tensor:
        """x [n, ..., D]: the last channels as pairs (2i, 2i+1), each turned by sign * position * freq_i."""
        dim = 2 * len(freq)
        angle = (sign * positions.double()[:, None] * freq).view(len(x), *[1] * (x.ndim - 2), dim // 2)
        cos, sin = amplitude * angle.cos(), amplitude * angle.sin()
        first = self.flip == "rotation on the first channels"
        rest, part = (x[..., dim:], x[..., :dim]) if first else (x[..., :-dim], x[..., -dim:])
        halves = self.flip == "rotation in halves"
        a, b = (part[..., : dim // 2], part[..., dim // 2 :]) if halves else (part[..., 0::2], part[..., 1::2])
        a, b = a * cos - b * sin, a * sin + b * cos
        part = torch.cat([a, b], dim=-1) if halves else torch.stack([a, b], dim=-1).flatten(-2)
        return torch.cat([part, rest] if first else [rest, part], dim=-1)

    # --- attention

    def attention(self, prefix: str, layer: int, x: Tensor) -> Tensor:
        c, w, flip = self.c, self.w, self.flip
        length, heads, width, ratio = len(x), c.num_attention_heads, c.head_dim, c.compress_ratios[layer]
        t = torch.arange(length)
        mtp_yarn = flip == "MTP with YaRN" and layer == c.num_hidden_layers
        yarn = True if mtp_yarn or (flip == "YaRN on window layers" and ratio == 0) else None
        freq = self.frequencies(ratio, yarn=yarn)
        q_freq = self.frequencies(0) if flip == "queries with the window's theta" else freq
        amplitude = 0.1 * math.log(c.rope_scaling.factor) + 1 if flip == "YaRN amplitude" and ratio else 1.0

        qr = x @ w[f"{prefix}wq_a.weight"].T
        qr = qr if flip == "query latent not normed" else self.norm(qr, f"{prefix}q_norm.weight")
        q = (qr @ w[f"{prefix}wq_b.weight"].T).view(length, heads, width)
        q = q if flip == "no query norm" else q * rho(q, c.rms_norm_eps)
        q = self.rotate(q, t, q_freq, amplitude)
        kv = self.norm(x @ w[f"{prefix}wkv.weight"].T, f"{prefix}kv_norm.weight")
        plain, kv = kv, self.rotate(kv, t, freq, amplitude)

        reach = c.sliding_window + (flip == "window one wider")
        seen = (t[None] <= t[:, None]) & (t[None] > t[:, None] - reach)
        if flip == "window without the token itself":
            seen &= t[None] < t[:, None]
        keys, masks = kv, seen
        if ratio and c.attention != "compressed":
            keys, masks = self.other_rows(prefix, x, plain, kv, seen)
        elif ratio:
            entries = self.compress(f"{prefix}compressor.", x, ratio, width, freq, amplitude)
            visible = self.visible(t, len(entries), ratio)
            if ratio == c.compress_rate_csa and flip != "indexer not asked":
                visible = self.choose(f"{prefix}indexer.", x, qr, visible, freq)
            keys, masks = torch.cat([kv, entries]), torch.cat([seen, visible], dim=1)

        scores = torch.einsum("thd,kd->thk", q, keys) * width**-0.5
        scores = scores.masked_fill(~masks[:, None], -math.inf)
        sink = w[f"{prefix}attn_sink"] * (width**-0.5 if flip == "sink scaled" else 1.0)
        if flip == "sink missing":
            sink = torch.full_like(sink, -1e30)
        p = torch.cat([scores, sink[None, :, None].expand(length, -1, 1)], dim=2).softmax(dim=2)[..., :-1]
        o = torch.einsum("thk,kd->thd", p, keys)
        if flip != "output not rotated back":
            o = self.rotate(o, t, q_freq, amplitude, sign=-1)

        groups = o.view(length, c.o_groups, -1)
        if flip == "output groups interleaved":
            groups = o.view(length, -1, c.o_groups, width).transpose(1, 2).reshape(length, c.o_groups, -1)
        low = w[f"{prefix}wo_a.weight"].view(c.o_groups, c.o_lora_rank, -1)
        return torch.cat([groups[:, g] @ low[g].T for g in range(c.o_groups)], dim=1) @ w[f"{prefix}wo_b.weight"].T

    def other_rows(self, prefix: str, x: Tensor, plain: Tensor, kv: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and masks of the attentions that V4 is compared with; `plain` is kv before the rotation."""
        c, w, length = self.c, self.w, len(x)
        past = torch.ones(length, length, dtype=torch.bool).tril()
        if c.attention == "dense":
            return kv, past
        if c.attention == "anchors":
            score = x @ w[f"{prefix}anchor_score.weight"][0]
            anchor = torch.zeros(length, length, dtype=torch.bool)
            for p in range(length):
                order = sorted(range(p + 1), key=lambda j: (-score[j].item(), j))
                anchor[p, order[: math.ceil(math.sqrt(p + 1))]] = True
            return torch.cat([kv, kv * 2 * score.sigmoid()[:, None]]), torch.cat([seen, anchor], dim=1)
        nope = c.head_dim - c.qk_rope_head_dim
        low = plain[:, :nope] @ w[f"{prefix}far_down.weight"].T
        far = torch.cat([low @ w[f"{prefix}far_up.weight"].T, kv[:, nope:]], dim=1)
        return torch.cat([kv, far]), torch.cat([seen, past & ~seen], dim=1)

    def visible(self, t: Tensor, entries: int, ratio: int) -> Tensor:
        """bool [T, entries]: entry w is there from the token on that closes its group."""
        shift = {"entries visible a token early": 2, "entries visible a token late": 0}.get(self.flip or "", 1)
        return torch.arange(entries)[None] < ((t + shift) // ratio)[:, None]

    def compress(self, prefix: str, x: Tensor, ratio: int, width: int, freq: Tensor, amplitude: float) -> Tensor:
        """Entries [T // ratio, width]."""
        values, gates = x @ self.w[f"{prefix}wkv.weight"].T, x @ self.w[f"{prefix}wgate.weight"].T
        if self.flip != "gate without position":
            gates = gates + self.w[f"{prefix}ape"][torch.arange(len(x)) % ratio]
        own, before = slice(None), None
        if ratio == self.c.compress_rate_csa:
            # the first half of the channels speaks for the next group, the second for its own
            own, before = slice(width, None), slice(0, width)
            if self.flip == "overlap halves swapped":
                own, before = before, own
            if self.flip == "overlap lost":
                before = None
        entries = []
        for g in range(len(x) // ratio):
            mine, last = slice(g * ratio, (g + 1) * ratio), slice((g - 1) * ratio, g * ratio)
            a, s = values[mine, own], gates[mine, own]
            if before is not None and g:
                a, s = torch.cat([values[last, before], a]), torch.cat([gates[last, before], s])
            entries.append((s.softmax(dim=0) * a).sum(dim=0))
        pooled = torch.stack(entries) if entries else x.new_zeros(0, width)
        if self.flip != "entries not normed" or "indexer" in prefix:
            pooled = self.norm(pooled, f"{prefix}norm.weight")
        number = torch.arange(len(entries))
        place = number * ratio
        if self.flip == "entries rotated at the pool index" and "indexer" not in prefix:
            place = number
        if self.flip == "index keys rotated at the pool index" and "indexer" in prefix:
            place = number
        if self.flip == "entries rotated at the last token" and "indexer" not in prefix:
            place = number * ratio + ratio - 1
        if self.flip == "entries not rotated" and "indexer" not in prefix:
            return pooled
        return self.rotate(pooled, place, freq, amplitude)

    def choose(self, prefix: str, x: Tensor, qr: Tensor, visible: Tensor, freq: Tensor) -> Tensor:
        """Of the visible entries the index_topk with the largest scores."""
        c, heads, width = self.c, self.c.index_n_heads, self.c.index_head_dim
        q = (qr @ self.w[f"{prefix}wq_b.weight"].T).view(len(x), heads, width)
        q = self.rotate(q, torch.arange(len(x)), freq)
        keys = self.compress(f"{prefix}compressor.", x, c.compress_rate_csa, width, freq, 1.0)
        products = torch.einsum("thd,kd->thk", q, keys)
        if self.flip != "index scores without relu":
            products = products.relu()
        weights = x @ self.w[f"{prefix}weights_proj.weight"].T * (heads * width) ** -0.5
        if self.flip == "index weights missing":
            weights = torch.ones_like(weights)
        scores = torch.einsum("th,thk->tk", weights, products).masked_fill(~visible, -math.inf)
        best = scores.argsort(dim=1, descending=True, stable=True)[:, : c.index_topk]
        return torch.zeros_like(visible).scatter(1, best, True) & visible

    # --- experts

    def moe(self, prefix: str, layer: int, x: Tensor, ids: Tensor) -> Tensor:
        c, w, flip = self.c, self.w, self.flip
        logits = x @ w[f"{prefix}gate.weight"].T
        scores = logits.sigmoid() if flip == "sigmoid gate" else torch.log1p(logits.exp()).sqrt()
        bias = w.get(f"{prefix}gate.bias", torch.zeros(c.n_routed_experts, dtype=torch.float64))
        chosen = (scores + bias).argsort(dim=1, descending=True, stable=True)[:, : c.num_experts_per_tok]
        table = w.get(f"{prefix}gate.tid2eid")
        if table is not None and flip != "experts chosen by score":
            chosen = table[ids]
        if flip == "MTP routes by token id" and layer == c.num_hidden_layers:
            chosen = w["layers.0.ffn.gate.tid2eid"][ids]
        weights = (scores + bias if flip == "bias in the weights" else scores).gather(1, chosen)
        if flip == "expert weights all equal":
            weights = torch.ones_like(weights)
        if flip != "weights not normalised":
            weights = weights / weights.sum(dim=1, keepdim=True)
        weights = weights * (1.0 if flip == "route scale missing" else c.routed_scaling_factor)
        out = torch.zeros_like(x)
        if flip != "shared expert missing":
            w1, w2, w3 = (w[f"{prefix}shared_experts.{name}.weight"] for name in ("w1", "w2", "w3"))
            out = out + self.swiglu(x @ w1.T, x @ w3.T, flip != "no clamp in the shared expert") @ w2.T
        w13, w2 = w[f"{prefix}experts.w13"], w[f"{prefix}experts.w2"]
        for t in range(len(x)):
            for k in range(c.num_experts_per_tok):
                e = chosen[t, k]
                act = self.swiglu(w13[e, 0] @ x[t], w13[e, 1] @ x[t], flip != "no clamp in the routed experts")
                out[t] += w2[e] @ (weights[t, k] * act)
        return out

    def swiglu(self, gate: Tensor, up: Tensor, clamp: bool) -> Tensor:
        if self.flip == "gate and up exchanged":
            gate, up = up, gate
        if clamp:
            limit = self.c.swiglu_limit
            gate = gate.clamp(-limit, limit) if self.flip == "gate clamped on both sides" else gate.clamp(max=limit)
            up = up.clamp(-limit, limit)
        return gate * torch.sigmoid(gate) * up

    # --- norm

    def norm(self, x: Tensor, weight: str) -> Tensor:
        gain = self.w[weight] + (1 if self.flip == "gain of the norms plus one" else 0)
        return x * rho(x, self.c.rms_norm_eps) * gain


def rho(x: Tensor, eps: float) -> Tensor:
    return (x.square().mean(dim=-1, keepdim=True) + eps).rsqrt()
