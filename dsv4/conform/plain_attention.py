"""The attention of the plain model: rotation, projections, compression, the indexer; see plain.py."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from dsv4.conform import codecs

Rows = dict[str, tuple[Tensor, Tensor]]  # of each compressor what a sequence put in: values and gates [T, c*d]


class PlainAttention:
    """`weights` by published name, experts stacked (a state dict of ours); `flip` names the mistake to make,
    or several, or None.

    config: anything with the published field names (a ModelConfig has them). packed: rows and keys are rounded as a
    packed memory keeps them. bf16: everything is rounded to BF16 where the released code casts to it.
    `calls`, `padding` and `before` say how the sequence came, for the mistakes that depend on it: the lengths of the
    calls; how many of its first tokens are padding; rows that are in memory when it begins, where it is said from
    which group on they are taken for those of the group before.
    """

    calls: Sequence[int] = ()
    padding = 0
    before: tuple[Rows, int] | None = None

    def __init__(
        self,
        config: Any,
        weights: dict[str, Tensor],
        flip: str | Iterable[str] | None = None,
        *,
        packed: bool = False,
        bf16: bool = False,
    ):
        self.c, self.packed, self.bf16 = config, packed, bf16
        self.flips = frozenset([flip] if isinstance(flip, str) else flip or ())
        self.rows: Rows = {}
        published = {n.replace("mtp.0.block.", "mtp.0."): t for n, t in weights.items()}
        self.w = {n: t.double() if t.is_floating_point() else t for n, t in published.items()}

    def made(self, mistake: str) -> bool:
        return mistake in self.flips

    def cast(self, x: Tensor) -> Tensor:
        return to_bf16(x) if self.bf16 else x

    def linear(self, x: Tensor, name: str) -> Tensor:
        return self.cast(x @ self.w[f"{name}.weight"].T)

    def norm(self, x: Tensor, weight: str) -> Tensor:
        gain = self.w[weight] + (1 if self.made("gain of the norms plus one") else 0)
        normed = x * rho(x, self.c.rms_norm_eps) * gain
        return normed if self.made("norms hand on FP32") else self.cast(normed)

    # --- rotary

    def frequencies(self, ratio: int, *, yarn: bool | None = None) -> Tensor:
        dim, s = self.c.qk_rope_head_dim, self.c.rope_scaling
        plain = (ratio == 0) != (self.made("thetas swapped"))
        base = self.c.rope_theta if plain else self.c.compress_rope_theta
        if self.made("compressed theta 40000") and ratio:
            base = 40000.0
        freq = torch.tensor([base ** (-2 * i / dim) for i in range(dim // 2)], dtype=torch.float64)
        yarn = ratio != 0 and not self.made("YaRN missing") if yarn is None else yarn
        if not yarn or s.type == "default":
            return freq

        def cd(turns: float) -> float:
            return dim * math.log(s.original_max_position_embeddings / (2 * math.pi * turns)) / (2 * math.log(base))

        low, high = max(math.floor(cd(s.beta_fast)), 0), min(math.ceil(cd(s.beta_slow)), dim - 1)
        ramp = ((torch.arange(dim // 2) - low) / (high - low)).clamp(0, 1)
        return freq * (1 - ramp) + freq / s.factor * ramp

    def rotate(
        self, x: Tensor, positions: Tensor, freq: Tensor, amplitude: float = 1.0, sign: int = 1, *, cast: bool = True
    ) -> Tensor:
        """x [n, ..., D]: the last channels as pairs (2i, 2i+1), each turned by sign * position * freq_i."""
        dim = 2 * len(freq)
        if freq.dtype == torch.float32 and not self.made("angles in FP64"):
            angle = (positions.float()[:, None] * freq).double()  # the product is FP32: far out that decides the angle
        else:
            angle = positions.double()[:, None] * freq.double()
        angle = sign * angle.view(len(x), *[1] * (x.ndim - 2), dim // 2)
        cos, sin = amplitude * angle.cos(), amplitude * angle.sin()
        if self.made("cos and sin in BF16"):
            cos, sin = to_bf16(cos), to_bf16(sin)
        first = self.made("rotation on the first channels")
        rest, part = (x[..., dim:], x[..., :dim]) if first else (x[..., :-dim], x[..., -dim:])
        halves = self.made("rotation in halves")
        a, b = (part[..., : dim // 2], part[..., dim // 2 :]) if halves else (part[..., 0::2], part[..., 1::2])
        a, b = a * cos - b * sin, a * sin + b * cos
        part = torch.cat([a, b], dim=-1) if halves else torch.stack([a, b], dim=-1).flatten(-2)
        out = torch.cat([part, rest] if first else [rest, part], dim=-1)
        return self.cast(out) if cast else out

    # --- attention

    def turning(self, layer: int) -> tuple[Tensor, Tensor, float]:
        """The frequencies of a layer, those of its queries, and the factor on cos and sin."""
        c, ratio = self.c, self.c.compress_ratios[layer]
        if self.made("MTP with the compressed layers' table") and layer == c.num_hidden_layers:
            ratio = c.compress_rate_csa
        mtp_yarn = self.made("MTP with YaRN") and layer == c.num_hidden_layers
        yarn = True if mtp_yarn or (self.made("YaRN on window layers") and ratio == 0) else None
        freq = self.frequencies(ratio, yarn=yarn)
        windows = ("queries with the window's theta", "queries and window with the window's theta")
        q_freq = self.frequencies(0) if any(map(self.made, windows)) else freq
        amplitude = 0.1 * math.log(c.rope_scaling.factor) + 1 if self.made("YaRN amplitude") and ratio else 1.0
        return freq, q_freq, amplitude

    def attention(self, prefix: str, layer: int, x: Tensor) -> Tensor:
        c = self.c
        length, width, ratio = len(x), c.head_dim, c.compress_ratios[layer]
        t = torch.arange(length)
        freq, q_freq, amplitude = self.turning(layer)
        qr, q, plain, kv = self.project_in(prefix, layer, x, t)
        kv = self.kept(kv)

        reach = c.sliding_window + (self.made("window one wider"))
        seen = (t[None] <= t[:, None]) & (t[None] > t[:, None] - reach) & (t[None] >= self.padding)
        if self.made("window without the token itself"):
            seen &= t[None] < t[:, None]
        keys, masks = kv, seen
        if ratio and c.attention != "compressed":
            keys, masks = self.other_rows(prefix, x, plain, kv, seen)
        elif ratio:
            entries = self.kept(self.compress(f"{prefix}compressor.", x, ratio, width, freq, amplitude))
            visible = self.visible(t, len(entries), ratio)
            if ratio == c.compress_rate_csa and not self.made("indexer not asked"):
                visible = self.choose(f"{prefix}indexer.", x, qr, visible, freq, amplitude)
            keys, masks = torch.cat([kv, entries]), torch.cat([seen, visible], dim=1)
        return self.project_out(prefix, layer, self.attend(prefix, layer, q, keys, masks), t)

    def project_in(self, prefix: str, layer: int, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of tokens at positions t the query latent, the queries [T, H, D], the row [T, D] before and after turning."""
        freq, q_freq, amplitude = self.turning(layer)
        qr = self.linear(x, f"{prefix}wq_a")
        qr = qr if self.made("query latent not normed") else self.norm(qr, f"{prefix}q_norm.weight")
        q = self.linear(qr, f"{prefix}wq_b").view(len(x), self.c.num_attention_heads, self.c.head_dim)
        if not self.made("no query norm"):
            norm = rho(q, self.c.rms_norm_eps)
            q = self.cast(q * (self.cast(norm) if self.made("query norm in BF16") else norm))
        plain = self.norm(self.linear(x, f"{prefix}wkv"), f"{prefix}kv_norm.weight")
        row_freq = q_freq if self.made("queries and window with the window's theta") else freq
        cast = not self.made("norms hand on FP32")
        return qr, self.rotate(q, t, q_freq, amplitude), plain, self.rotate(plain, t, row_freq, amplitude, cast=cast)

    def attend(self, prefix: str, layer: int, q: Tensor, keys: Tensor, masks: Tensor) -> Tensor:
        """q [T, H, D] over the rows [K, D] where masks [T, K]; values are the keys."""
        width = self.c.head_dim
        scale = width**-0.5
        if self.made("YaRN amplitude in the softmax") and self.c.compress_ratios[layer]:
            scale *= (0.1 * math.log(self.c.rope_scaling.factor) + 1) ** 2
        scores = torch.einsum("thd,kd->thk", q, keys) * scale
        scores = scores.masked_fill(~masks[:, None], -math.inf)
        sink = self.w[f"{prefix}attn_sink"] * (width**-0.5 if self.made("sink scaled") else 1.0)
        if self.made("sink missing"):
            sink = torch.full_like(sink, -1e30)
        p = torch.cat([scores, sink[None, :, None].expand(len(q), -1, 1)], dim=2).softmax(dim=2)[..., :-1]
        return self.cast(torch.einsum("thk,kd->thd", p, keys))

    def project_out(self, prefix: str, layer: int, o: Tensor, t: Tensor) -> Tensor:
        c, (_, q_freq, amplitude) = self.c, self.turning(layer)
        if not self.made("output not rotated back"):
            o = self.rotate(o, t, q_freq, amplitude, sign=-1)
        groups = o.reshape(len(o), c.o_groups, -1)
        if self.made("output groups interleaved"):
            groups = o.view(len(o), -1, c.o_groups, c.head_dim).transpose(1, 2).reshape(len(o), c.o_groups, -1)
        if self.made("attention output in FP8"):
            groups = codecs.fp8(groups, 128)
        low = self.w[f"{prefix}wo_a.weight"].view(c.o_groups, c.o_lora_rank, -1)
        low = self.cast(torch.cat([groups[:, g] @ low[g].T for g in range(c.o_groups)], dim=1))
        return self.linear(low, f"{prefix}wo_b")

    def kept(self, rows: Tensor) -> Tensor:
        """Window rows and entries as a memory gives them back."""
        return codecs.row(rows, self.c.qk_rope_head_dim, self.flips) if self.packed else rows

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
        shift = 1 + self.made("entries visible a token early") - self.made("entries visible a token late")
        last = (t[:, None] + shift) // ratio
        if self.made("entries visible to all"):
            last = torch.full_like(last, entries)
        if self.calls:  # what has not closed within the call is not there to be seen
            ends = torch.tensor(self.calls).cumsum(0)
            last = torch.minimum(last, ends[torch.searchsorted(ends, t, right=True)][:, None] // ratio)
        return torch.arange(entries)[None] < last

    def compress(self, prefix: str, x: Tensor, ratio: int, width: int, freq: Tensor, amplitude: float) -> Tensor:
        """Entries [T // ratio, width]."""
        values, gates = x @ self.w[f"{prefix}wkv.weight"].T, x @ self.w[f"{prefix}wgate.weight"].T
        low = to_bf16 if self.made("compressor in BF16") else same
        values, gates = low(values), low(gates)
        if not self.made("gate without position"):
            gates = gates + self.w[f"{prefix}ape"][torch.arange(len(x)) % ratio]
        self.rows[prefix] = values, gates
        own, before = slice(None), None
        if ratio == self.c.compress_rate_csa:
            # the first half of the channels speaks for the next group, the second for its own
            own, before = slice(width, None), slice(0, width)
            if self.made("overlap halves swapped"):
                own, before = before, own
            if self.made("overlap lost"):
                before = None
        entries = []
        for g in range(len(x) // ratio):
            mine = slice(g * ratio, (g + 1) * ratio)
            a, s = values[mine, own], gates[mine, own]
            old = self.group_before(prefix, g, ratio)
            if before is not None and old is not None:
                a, s = torch.cat([old[0][:, before], a]), torch.cat([old[1][:, before], s])
            entries.append(low(low(low(s.softmax(dim=0)) * a).sum(dim=0)))
        pooled = self.cast(torch.stack(entries) if entries else x.new_zeros(0, width))
        if not self.made("entries not normed") or "indexer" in prefix:
            pooled = self.norm(pooled, f"{prefix}norm.weight")
        number = torch.arange(len(entries))
        place = number * ratio
        if self.made("entries rotated at the pool index") and "indexer" not in prefix:
            place = number
        if self.made("index keys rotated at the pool index") and "indexer" in prefix:
            place = number
        if self.made("entries rotated at the last token") and "indexer" not in prefix:
            place = number * ratio + ratio - 1
        if self.made("entries not rotated") and "indexer" not in prefix:
            return pooled
        return self.rotate(pooled, place, freq, amplitude)

    def group_before(self, prefix: str, g: int, ratio: int) -> tuple[Tensor, Tensor] | None:
        """The rows of the group before g, as a memory has them."""
        here = g * ratio
        if self.before is not None and g == self.before[1]:  # what was left there by another sequence
            (values, gates), _ = self.before[0][prefix], None
            last = min(len(values) // ratio, g + 1 if g else len(values)) * ratio
            return (values[last - ratio : last], gates[last - ratio : last]) if last else None
        if g == 0:
            return None
        if self.made("overlap lost between calls") and self.calls:
            ends = torch.tensor(self.calls).cumsum(0)
            if int((ends < here).sum()) != int((ends < here + ratio).sum()):
                return None
        values, gates = self.rows[prefix]
        return values[here - ratio : here], gates[here - ratio : here]

    def choose(
        self, prefix: str, x: Tensor, qr: Tensor, visible: Tensor, freq: Tensor, amplitude: float = 1.0
    ) -> Tensor:
        """Of the visible entries the index_topk with the largest scores."""
        c, t = self.c, torch.arange(len(x))
        keys = self.compress(f"{prefix}compressor.", x, c.compress_rate_csa, c.index_head_dim, freq, amplitude)
        return self.best(self.index_scores(prefix, x, qr, t, keys, freq, amplitude), visible)

    def index_scores(
        self, prefix: str, x: Tensor, qr: Tensor, t: Tensor, keys: Tensor, freq: Tensor, amplitude: float = 1.0
    ) -> Tensor:
        """Of tokens at positions t for all keys: [T, E]."""
        heads, width = self.c.index_n_heads, self.c.index_head_dim
        q = self.rotate(self.linear(qr, f"{prefix}wq_b").view(len(x), heads, width), t, freq, amplitude)
        weights = self.linear(x, f"{prefix}weights_proj") * (heads * width) ** -0.5
        if self.made("index weights missing"):
            weights = torch.ones_like(weights)
        if self.packed:
            q, keys = codecs.meeting(q, keys, self.flips)
        products = torch.einsum("thd,kd->thk", q, keys)
        if not self.made("index scores without relu"):
            products = products.relu()
        return torch.einsum("th,thk->tk", weights, products)

    def best(self, scores: Tensor, visible: Tensor) -> Tensor:
        """bool [T, E]: the index_topk best of the visible ones, of equal ones the lowest."""
        scores = (scores + 0.0).masked_fill(~visible, -math.inf)
        if self.made("index ties to the highest entry"):
            last = scores.flip(1).argsort(dim=1, descending=True, stable=True)
            best = (scores.shape[1] - 1 - last)[:, : self.c.index_topk]
        else:
            best = scores.argsort(dim=1, descending=True, stable=True)[:, : self.c.index_topk]
        return torch.zeros_like(visible).scatter(1, best, True) & visible


def rho(x: Tensor, eps: float) -> Tensor:
    return (x.square().mean(dim=-1, keepdim=True) + eps).rsqrt()


def to_bf16(x: Tensor) -> Tensor:
    """Rounded to BF16, by way of FP32 as a machine would."""
    return x.float().bfloat16().double()


def same(x: Tensor) -> Tensor:
    return x
