"""The adapter for transformers' `deepseek_v4` (5.23 and later), module by module.

It has no MTP block, no packed memory and no way back in its memory, and knows unequal sequences only as padded ones;
ties among index scores have no order there. Its attention needs a mask over rows and entries, which is made here.
"""

import inspect
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsv4.conform.adapter import Adapter, Missing
from dsv4.errors import UserError


class Transformers(Adapter):
    def __init__(self, dtype: torch.dtype = torch.float32):
        try:
            import transformers
            from transformers.models.deepseek_v4 import modeling_deepseek_v4
        except ImportError as error:
            raise UserError(
                f"transformers with deepseek_v4 is not installed ({error}): pip install transformers"
            ) from None
        transformers.utils.logging.disable_progress_bar()
        self.dtype, self.code = dtype, modeling_deepseek_v4
        self.name = f"transformers {transformers.__version__}, {str(dtype).removeprefix('torch.')}"

    def load(self, folder: Path) -> None:
        self.model = self.code.DeepseekV4ForCausalLM.from_pretrained(folder, dtype=self.dtype).eval()
        self.config = self.model.config
        forward = inspect.signature(self.model.forward).parameters
        self.cache = "cache" if "cache" in forward else "past_key_values"  # its name from 5.24 on

    @torch.no_grad()
    def logits(self, ids: Tensor, calls: list[int]) -> Tensor:
        if min(calls) < 0:
            raise Missing("a memory that takes tokens back")
        out, memory = [], None
        for part in ids.split(calls):
            given = {} if memory is None else {self.cache: memory}
            step = self.model(part[None], **given, use_cache=True)
            memory = step[self.cache]
            out.append(step.logits[0])
        return torch.cat(out)

    @torch.no_grad()
    def head(self, streams: Tensor) -> Tensor:
        """Streams [T, N, M] after the last layer -> logits."""
        m = self.model
        return m.lm_head(m.model.norm(m.model.hc_head(streams[None])))[0]

    @torch.no_grad()
    def batch(self, ids: list[Tensor]) -> list[Tensor]:
        """Padded on the left, with a mask, as `generate` would have it."""
        longest = max(len(part) for part in ids)
        rows = torch.zeros(len(ids), longest, dtype=torch.int64)
        mask = torch.zeros_like(rows)
        for i, part in enumerate(ids):
            rows[i, longest - len(part) :], mask[i, longest - len(part) :] = part, 1
        logits = self.model(rows, attention_mask=mask, use_cache=False).logits
        return [logits[i, longest - len(part) :] for i, part in enumerate(ids)]

    @torch.no_grad()
    def layer(self, layer: int, streams: Tensor, ids: Tensor, calls: list[int]) -> Tensor:
        from transformers.cache_utils import DynamicCache
        from transformers.masking_utils import create_sliding_window_causal_mask

        model, memory, done, out = self.model.model, DynamicCache(config=self.config), 0, []
        held_in: dict[str, Any] = {self.cache: memory}
        for x, own in zip(streams.split(calls), ids.split(calls), strict=True):
            positions = torch.arange(done, done + len(own))[None]
            flat = x[None, :, 0]
            # the mask asks the first layer how long the past is; here only one layer remembers
            held = memory.layers
            memory.layers = [held[layer], *held[1:]]
            mask = create_sliding_window_causal_mask(
                config=self.config, inputs_embeds=flat, attention_mask=None, position_ids=positions,
                **held_in,
            )  # fmt: skip
            memory.layers = held
            turn = {
                name: model.rotary_emb(flat, position_ids=positions, layer_type=name) for name in ("main", "compress")
            }
            out.append(model.layers[layer](
                x[None], position_embeddings=turn, position_ids=positions, attention_mask=mask, input_ids=own[None],
                **held_in,
            )[0])  # fmt: skip
            done += len(own)
        return torch.cat(out)

    @torch.no_grad()
    def memory(self, ids: Tensor) -> dict[str, Tensor]:
        """Its window holds one row less than a query reads, so the oldest is not there to be compared."""
        held, out = self.model(ids[None], use_cache=True)[self.cache], {}
        for i, layer in enumerate(held.layers):
            if hasattr(layer, "compressed_kv"):
                out[f"entries {i}"] = layer.compressed_kv["compressor"][0]
                if "indexer" in layer.compressed_kv:
                    out[f"keys {i}"] = layer.compressed_kv["indexer"][0]
        return out

    @torch.no_grad()
    def part(self, what: str, layer: int, given: dict[str, Any]) -> dict[str, Tensor]:
        ask = _PARTS.get(what)
        if ask is None:
            return super().part(what, layer, given)
        return ask(self, self.model.model.layers[layer], given)

    def turn(self, block: Any, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin [1, T, pairs] of the block's kind."""
        return self.model.model.rotary_emb(x, position_ids=positions[None], layer_type=block.self_attn.rope_layer_type)

    def memory_of(self, layer: int) -> Any:
        from transformers.cache_utils import DynamicCache

        return DynamicCache(config=self.config)


def _frequencies(a: Transformers, block: Any, g: dict[str, Any]) -> dict[str, Tensor]:
    rotary = a.model.model.rotary_emb
    return {"frequencies": getattr(rotary, f"{block.self_attn.rope_layer_type}_inv_freq")}


def _rotation(a: Transformers, block: Any, g: dict[str, Any]) -> dict[str, Tensor]:
    angle = (g["positions"].float()[:, None] * g["frequencies"])[None]  # as its DeepseekV4RotaryEmbedding
    cos, sin = angle.cos().to(a.dtype), angle.sin().to(a.dtype)
    x = g["x"].transpose(0, 1)[None]
    out = a.code.apply_rotary_pos_emb(x, cos, -sin if g["back"] else sin)
    return {"rotated": out[0].transpose(0, 1)}


def _project_in(a: Transformers, block: Any, g: dict[str, Any]) -> dict[str, Tensor]:
    m, x = block.self_attn, g["x"][None]
    cos, sin = a.turn(block, x, g["positions"])
    latent = m.q_a_norm(m.q_a_proj(x))
    shape = (1, x.shape[1], -1, m.head_dim)
    q = m.q_b_norm(m.q_b_proj(latent).view(shape).transpose(1, 2))
    row = m.kv_norm(m.kv_proj(x)).view(shape).transpose(1, 2)
    q, row = (a.code.apply_rotary_pos_emb(y, cos, sin) for y in (q, row))
    return {"latent": latent[0], "q": q[0].transpose(0, 1), "row": row[0, 0]}


def _pooled(module: Any, a: Transformers, block: Any, g: dict[str, Any]) -> Any:
    """A compressor or an indexer fed in calls; the memory that it filled."""
    number, done = block.self_attn.layer_idx, 0
    memory = a.memory_of(number)
    latent = g["x"].new_zeros(len(g["x"]), a.config.q_lora_rank)
    for part, own in zip(g["x"].split(g["calls"]), latent.split(g["calls"]), strict=True):
        module(part[None], own[None], torch.arange(done, done + len(part))[None], memory, number)
        done += len(part)
    return memory.layers[number].compressed_kv


def _compressor(a: Transformers, block: Any, g: dict[str, Any]) -> dict[str, Tensor]:
    return {"entries": _pooled(block.self_attn.compressor, a, block, g)["compressor"][0]}


def _index_keys(a: Transformers, block: Any, g: dict[str, Any]) -> dict[str, Tensor]:
    return {"keys": _pooled(block.self_attn.compressor.indexer, a, block, g)["indexer"][0]}


def _indexer(a: Transformers, block: Any, g: dict[str, Any]) -> dict[str, Tensor]:
    """Its scorer; the choice is inside its forward, which makes the keys itself, and so is not asked here."""
    m, x = block.self_attn.compressor.indexer, g["x"][None]
    cos, sin = a.turn(block, x, g["positions"])
    q = m.q_b_proj(g["latent"][None]).view(1, x.shape[1], -1, m.head_dim).transpose(1, 2)
    q = a.code.apply_rotary_pos_emb(q, cos, sin).transpose(1, 2)
    return {"scores": m.scorer(q, g["keys"][None], x)[0]}


def _attention(a: Transformers, block: Any, g: dict[str, Any]) -> dict[str, Tensor]:
    m, place = block.self_attn, torch.arange(len(g["rows"]))
    seen = (place >= g["start"][:, None]) & (place < g["stop"][:, None])
    read = torch.zeros(len(seen), len(g["entries"]) + 1, dtype=torch.bool).scatter(1, g["chosen"] + 1, True)[:, 1:]
    mask = torch.zeros(1, 1, len(seen), seen.shape[1] + read.shape[1], dtype=a.dtype)
    mask = mask.masked_fill(~torch.cat([seen, read], dim=1), float("-inf"))
    keys = torch.cat([g["rows"], g["entries"]])[None, None]
    held, m.sinks = m.sinks, torch.nn.Parameter(g["sink"])
    try:
        out, _ = a.code.eager_attention_forward(m, g["q"].transpose(0, 1)[None], keys, keys, mask, m.scaling)
    finally:
        m.sinks = held
    return {"out": out[0]}


def _project_out(a: Transformers, block: Any, g: dict[str, Any]) -> dict[str, Tensor]:
    m, o = block.self_attn, g["o"][None]
    cos, sin = a.turn(block, o, g["positions"])
    o = a.code.apply_rotary_pos_emb(o.transpose(1, 2), cos, -sin).transpose(1, 2)
    return {"y": m.o_b_proj(m.o_a_proj(o.reshape(1, o.shape[1], a.config.o_groups, -1)).flatten(2))[0]}


def _maps(a: Transformers, block: Any, g: dict[str, Any]) -> dict[str, Tensor]:
    post, mix, _ = block.attn_hc(g["streams"][None])  # the weights of the reading stay inside
    return {"post": post[0], "mix": mix[0]}


def _mixing(a: Transformers, block: Any, g: dict[str, Any]) -> dict[str, Tensor]:
    """The line of its decoder layer, which is in no module of its own."""
    x = g["streams"]
    mixed = torch.matmul(g["mix"].to(x.dtype).transpose(-1, -2), x)
    return {"streams": g["post"].to(x.dtype).unsqueeze(-1) * g["y"].unsqueeze(-2) + mixed}


def _gate(a: Transformers, block: Any, g: dict[str, Any]) -> dict[str, Tensor]:
    more = (g["ids"][None],) if block.mlp.is_hash else ()
    _, weights, chosen = block.mlp.gate(g["x"][None], *more)
    return {"weights": torch.zeros(len(chosen), a.config.num_local_experts, dtype=weights.dtype).scatter(
        1, chosen, weights)}  # fmt: skip


def _routed(a: Transformers, block: Any, g: dict[str, Any]) -> dict[str, Tensor]:
    weights, chosen = g["weights"].topk(a.config.num_experts_per_tok)
    return {"y": block.mlp.experts(g["x"], chosen, weights.to(a.dtype))}


_PARTS = {
    "frequencies": _frequencies,
    "rotation": _rotation,
    "norm": lambda a, block, g: {"y": block.input_layernorm(g["x"])},
    "project_in": _project_in,
    "compressor": _compressor,
    "index keys": _index_keys,
    "indexer": _indexer,
    "attention": _attention,
    "project_out": _project_out,
    "maps": _maps,
    "mixing": _mixing,
    "collapse": lambda a, block, g: {"hidden": a.model.model.hc_head(g["streams"][None])[0]},
    "gate": _gate,
    "routed experts": _routed,
    "shared expert": lambda a, block, g: {"y": block.mlp.shared_experts(g["x"])},
}
