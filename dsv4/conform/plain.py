"""DeepSeek-V4 once more, as plainly as it can be said: float64, whole sequences, dense masks, loops.

It is written from the specification and shares nothing with the model but the names of the weights, so it can say which
of two answers is right. Every mistake that ports of V4 have made (mistakes.py) can be put in by name (`flip`): a test
that a flip is far from the model shows that the model does not make it, and that the test would notice; and a port
whose numbers are those of a flip has made that mistake.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from dsv4.conform.mistakes import HASH, LAYER, MTP, TOP
from dsv4.conform.plain_attention import PlainAttention, rho, same, to_bf16

# What may be flipped in a layer, and the kinds of layer where it shows; what shows elsewhere.
FLIPS: dict[str, tuple[str, ...]] = {name: mistake.kinds for name, mistake in LAYER.items()}
HASH_FLIPS, TOP_FLIPS, MTP_FLIPS = tuple(HASH), tuple(TOP), tuple(MTP)


class PlainV4(PlainAttention):
    """The whole model; arguments as in PlainAttention."""

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
        if self.made("MTP reads the collapsed stream"):
            x = self.collapse(x, "")[:, None].expand_as(x)
        following = ids[:-1] if self.made("MTP embeds its own token") else ids[1:]
        embedded = self.norm(self.w["embed.weight"][following], "mtp.0.enorm.weight")
        x = self.norm(x, "mtp.0.hnorm.weight") @ self.w["mtp.0.h_proj.weight"].T
        x = x + (embedded @ self.w["mtp.0.e_proj.weight"].T)[:, None]
        return self.head(self.block("mtp.0.", self.c.num_hidden_layers, x, following), "mtp.0.")

    def head(self, x: Tensor, prefix: str) -> Tensor:
        return self.norm(self.collapse(x, prefix), f"{prefix}norm.weight") @ self.w["head.weight"].T

    def collapse(self, x: Tensor, prefix: str) -> Tensor:
        if self.made("head reads the mean of the streams"):
            return x.mean(dim=1)
        m = self.twenty_four(x, f"{prefix}hc_head_")
        pre = torch.sigmoid(self.w[f"{prefix}hc_head_scale"] * m + self.w[f"{prefix}hc_head_base"]) + self.c.hc_eps
        return self.cast(torch.stack([pre[:, j, None] * x[:, j] for j in range(self.c.hc_mult)]).sum(dim=0))

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
        return m if self.made("streams not normalised") else m * rho(v, self.c.rms_norm_eps)

    def around(self, x: Tensor, prefix: str, sublayer: Callable[[Tensor], Tensor]) -> Tensor:
        pre, post, mix = self.maps(x, prefix)
        y = sublayer(self.cast(torch.stack([pre[:, j, None] * x[:, j] for j in range(self.c.hc_mult)]).sum(dim=0)))
        return self.write(x, y, post, mix)

    def maps(self, x: Tensor, prefix: str) -> tuple[Tensor, Tensor, Tensor]:
        """pre, post [T, N] and the mixing matrix [T, N, N]."""
        n = self.c.hc_mult
        m, base, scale = self.twenty_four(x, prefix), self.w[f"{prefix}base"], self.w[f"{prefix}scale"]
        pre = torch.sigmoid(scale[0] * m[:, :n] + base[:n]) + self.c.hc_eps
        post = torch.sigmoid(scale[1] * m[:, n : 2 * n] + base[n : 2 * n])
        post = post if self.made("post not doubled") else 2 * post
        return pre, post, self.sinkhorn((scale[2] * m[:, 2 * n :] + base[2 * n :]).view(-1, n, n))

    def write(self, x: Tensor, y: Tensor, post: Tensor, mix: Tensor) -> Tensor:
        """The new streams."""
        n, cast = self.c.hc_mult, self.cast
        if self.made("mixing transposed"):
            mix = mix.transpose(1, 2)
        if self.made("post and mixing in BF16"):
            post, mix = to_bf16(post), to_bf16(mix)
            new = [cast(post[:, k, None] * y) + cast(torch.einsum("tj,tjm->tm", mix[:, :, k], x)) for k in range(n)]
        else:
            new = [post[:, k, None] * y + sum(mix[:, j, k, None] * x[:, j] for j in range(n)) for k in range(n)]
        return cast(torch.stack(new, dim=1))

    def sinkhorn(self, c: Tensor) -> Tensor:
        eps = self.c.hc_eps
        c = c.softmax(dim=2) + eps
        c = c / (c.sum(dim=1, keepdim=True) + eps)
        for _ in range(0 if self.made("one Sinkhorn round") else self.c.hc_sinkhorn_iters - 1):
            c = c / (c.sum(dim=2, keepdim=True) + eps)
            c = c / (c.sum(dim=1, keepdim=True) + eps)
        return c

    # --- experts

    def moe(self, prefix: str, layer: int, x: Tensor, ids: Tensor) -> Tensor:
        chosen, weights = self.gate(prefix, layer, x, ids)
        return self.cast(self.shared(prefix, x) + self.routed(prefix, x, chosen, weights))

    def gate(self, prefix: str, layer: int, x: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Chosen experts [T, K] and their weights."""
        c, w = self.c, self.w
        low = to_bf16 if self.made("router in BF16") else same
        logits = low(x @ w[f"{prefix}gate.weight"].T)
        scores = logits.sigmoid() if self.made("sigmoid gate") else low(low(torch.log1p(logits.exp())).sqrt())
        bias = w.get(f"{prefix}gate.bias", torch.zeros(c.n_routed_experts, dtype=torch.float64))
        chosen = (scores + bias).argsort(dim=1, descending=True, stable=True)[:, : c.num_experts_per_tok]
        table = w.get(f"{prefix}gate.tid2eid")
        if table is not None and not self.made("experts chosen by score"):
            chosen = table[ids]
        if self.made("MTP routes by token id") and layer == c.num_hidden_layers:
            chosen = w["layers.0.ffn.gate.tid2eid"][ids]
        weights = (scores + bias if self.made("bias in the weights") else scores).gather(1, chosen)
        if self.made("expert weights all equal"):
            weights = torch.ones_like(weights)
        if not self.made("weights not normalised"):
            weights = low(weights / low(weights.sum(dim=1, keepdim=True)))
        return chosen, low(weights * (1.0 if self.made("route scale missing") else c.routed_scaling_factor))

    def shared(self, prefix: str, x: Tensor) -> Tensor:
        if self.made("shared expert missing"):
            return torch.zeros_like(x)
        gate, up = (self.linear(x, f"{prefix}shared_experts.{name}") for name in ("w1", "w3"))
        act = self.swiglu(gate, up, not self.made("no clamp in the shared expert"))
        return self.linear(self.cast(act), f"{prefix}shared_experts.w2")

    def routed(self, prefix: str, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e, (w1, w3) in enumerate(self.w[f"{prefix}experts.w13"]):
            w2 = self.w[f"{prefix}experts.w2"][e]
            t, k = torch.where(chosen == e)
            gate, up = self.cast(x[t] @ w1.T), self.cast(x[t] @ w3.T)
            act = self.swiglu(gate, up, not self.made("no clamp in the routed experts"))
            if self.made("expert weights after w2"):
                out[t] += self.cast(self.cast(weights[t, k, None]) * self.cast(self.cast(act) @ w2.T))
            else:
                out[t] += self.cast(self.cast(weights[t, k, None] * act) @ w2.T)
        return out

    def swiglu(self, gate: Tensor, up: Tensor, clamp: bool) -> Tensor:
        if self.made("gate and up exchanged"):
            gate, up = up, gate
        if clamp:
            limit = self.c.swiglu_limit
            gate = gate.clamp(-limit, limit) if self.made("gate clamped on both sides") else gate.clamp(max=limit)
            up = up.clamp(-limit, limit)
        if self.made("SwiGLU in BF16"):
            gate, up = to_bf16(gate), to_bf16(up)
            return to_bf16(to_bf16(gate * torch.sigmoid(gate)) * up)
        return gate * torch.sigmoid(gate) * up
