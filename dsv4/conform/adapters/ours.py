"""The adapter for this package: any backend of the ops, any dtype, any memory."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsv4 import ops
from dsv4.cache import SequenceMemory
from dsv4.checkpoint import load
from dsv4.conform.adapter import Adapter
from dsv4.errors import UserError
from dsv4.model import Segment, Transformer, hyper
from dsv4.model.rope import frequencies, turns
from dsv4.model.segments import plan
from dsv4.ops.formats import Packed, hadamard
from dsv4.ops.weights import PackedMatrix

CPU = torch.device("cpu")


class Ours(Adapter):
    """dtype: of the large matrices and activations; cache: the memory's format, None for dtype; backend: as in
    DSV4_OPS, None for whatever serves first."""

    model: Transformer

    def __init__(self, dtype: torch.dtype = torch.float32, cache: str | None = None, backend: str | None = None):
        self.dtype, self.cache, self.backend = dtype, cache, backend
        self.packed = cache == "packed"
        self.name = f"dsv4, {str(dtype).removeprefix('torch.')}" + (f", {cache} memory" if cache else "")
        self.name += f", {backend} ops" if backend else ""

    def load(self, folder: Path, layers: Iterable[int] | None = None) -> None:
        """layers: of these alone, as `dsv4.load` has it."""
        model = load(folder, self.dtype, layers=layers)
        if (
            not isinstance(model, Transformer)
            or model.config.residual != "mhc"
            or model.config.attention != "compressed"
        ):
            raise UserError(f"{folder} holds no DeepSeek-V4 but what it is compared with: give a checkpoint of V4")
        self.model = model.eval()

    @torch.no_grad()
    def head(self, streams: Tensor) -> Tensor:
        """Streams [T, N, M] after the last layer -> logits."""
        m = self.model
        return m.logits(m.norm(hyper.collapse(streams, hyper.parameters_of(m, "hc_head"), m.config)))

    def _memory(self, count: int, *, mtp: bool = False) -> SequenceMemory:
        return self.model.new_cache(format=self.cache, capacity=count, mtp=mtp)[0]

    @torch.no_grad()
    def logits(self, ids: Tensor, calls: list[int]) -> Tensor:
        memory, done, out = self._memory(len(ids)), 0, []
        with ops.using(self.backend or ops.wanted()):
            for n in calls:
                if n < 0:
                    memory.rewind(-n)
                    continue
                out.append(self.model(ids[done : done + n], segments=[(n, memory)]))
                done += n
        return torch.cat(out)

    @torch.no_grad()
    def batch(self, ids: list[Tensor]) -> list[Tensor]:
        lengths = [len(part) for part in ids]
        memories = self.model.new_cache(batch=len(ids), format=self.cache)
        with ops.using(self.backend or ops.wanted()):
            out = self.model(torch.cat(ids), segments=list(zip(lengths, memories, strict=True)))
        return list(out.split(lengths))

    @torch.no_grad()
    def layer(self, layer: int, streams: Tensor, ids: Tensor, calls: list[int]) -> Tensor:
        memory, out = self._memory(len(ids)), []
        with ops.using(self.backend or ops.wanted()):
            for x, own in zip(streams.split(calls), ids.split(calls), strict=True):
                run = plan(self.model.config, [Segment(len(own), memory)], CPU)
                memory.begin()
                out.append(self.model.layers[layer](x, own, run, [memory.layers[layer]])[0])
                memory.advance(len(own))
        return torch.cat(out)

    @torch.no_grad()
    def mtp(self, ids: Tensor) -> Tensor:
        with ops.using(self.backend or ops.wanted()):
            if self.packed:
                memory = self._memory(len(ids), mtp=True)
                hidden, _, _ = self.model.draft(self.model.trunk(ids[:-1], [Segment(len(ids) - 1, memory)]), ids[1:])
            else:
                hidden, _, _ = self.model.predict_next(self.model.trunk(ids, [Segment(len(ids))]), ids)
            return self.model.logits(hidden)

    @torch.no_grad()
    def memory(self, ids: Tensor) -> dict[str, Tensor]:
        memory, out = self._memory(len(ids)), {}
        with ops.using(self.backend or ops.wanted()):
            self.model(ids, segments=[(len(ids), memory)])
        for i, layer in enumerate(memory.layers):
            assert layer.window is not None
            out[f"window {i}"] = memory.last(layer.window, min(len(ids), self.model.config.sliding_window))
            if layer.attention is not None:
                out[f"entries {i}"] = memory.entries(layer.attention.entries, len(ids) // layer.kind.ratio)[:]
            if layer.index is not None:
                keys = memory.entries(layer.index.entries, len(ids) // layer.kind.ratio)[:]
                out[f"keys {i}"] = hadamard(keys.float()) if self.packed else keys
        return out

    @torch.no_grad()
    def part(self, what: str, layer: int, given: dict[str, Any]) -> dict[str, Tensor]:
        ask = _PARTS.get(what)
        if ask is None:
            return super().part(what, layer, given)
        with ops.using(self.backend or ops.wanted()):
            return ask(self, self.model.layers[layer], given)

    def turn(self, block: Any, positions: Tensor) -> Tensor:
        return turns(frequencies(self.model.config, table(block)), positions)

    def pooled(self, compressor: Any, name: str, block: Any, given: dict[str, Any]) -> Tensor:
        """What a compressor leaves in a memory of its own."""
        x, config = given["x"], self.model.config
        memory = self.model.new_cache(format=str(x.dtype).removeprefix("torch."))[0]
        layer = next(i for i, b in enumerate(self.model.layers) if b is block)
        store = getattr(memory.layers[layer], name)
        for part in x.split(given["calls"]):
            run = plan(config, [Segment(len(part), memory)], CPU)
            memory.begin()
            compressor(part, run, [store])
            memory.advance(len(part))
        return memory.entries(store.entries, len(x) // compressor.kind.ratio)[:]


def table(block: Any) -> str:
    return "compressed" if block.attn.kind.ratio else "window"


def _project_in(a: Ours, block: Any, g: dict[str, Any]) -> dict[str, Tensor]:
    m = block.attn
    latent, q, _, row = ops.project_in(
        g["x"], m.wq_a.weight, m.q_norm.weight, m.wq_b.weight, m.wkv.weight, m.kv_norm.weight, m.heads, m.eps,
        a.turn(block, g["positions"]),
    )  # fmt: skip
    return {"latent": latent, "q": q, "row": row}


def _indexer(a: Ours, block: Any, g: dict[str, Any]) -> dict[str, Tensor]:
    m, x, keys = block.attn.indexer, g["x"], g["keys"]
    q = ops.rotate(m.wq_b(g["latent"]).view(len(x), m.heads, m.width), a.turn(block, g["positions"]))
    weights = m.weights_proj(x).float() * (m.width * m.heads) ** -0.5
    stop = ((g["positions"] + 1) // m.kind.ratio).clamp_max(len(keys))
    chosen = ops.index_scores_topk(q, weights, keys, ops.Spans(torch.zeros_like(stop), stop), m.topk)
    read = torch.zeros(len(x), len(keys) + 1).scatter(1, chosen + 1, 1.0)[:, 1:]
    return {"scores": ops.index_scores(q, weights, keys), "chosen": read}


def _attention(a: Ours, block: Any, g: dict[str, Any]) -> dict[str, Tensor]:
    window, q = ops.Spans(g["start"], g["stop"]), g["q"]
    out, _ = ops.sparse_attention(q, g["rows"], window, g["entries"], None, g["chosen"], g["sink"], q.shape[-1] ** -0.5)
    return {"out": out}


def _project_out(a: Ours, block: Any, g: dict[str, Any]) -> dict[str, Tensor]:
    m = block.attn
    turn = a.turn(block, g["positions"])
    return {"y": ops.project_out(g["o"], turn, m.wo_a.weight, m.groups, m.wo_b.weight)}


def _maps(a: Ours, block: Any, g: dict[str, Any]) -> dict[str, Tensor]:
    c, maps = a.model.config, hyper.parameters_of(block, "hc_attn")
    assert maps is not None
    found = ops.hyper_maps(g["streams"], *maps, c.hc_sinkhorn_iters, c.hc_eps, c.rms_norm_eps)
    return dict(zip(("pre", "post", "mix"), found, strict=True))


def _gate(a: Ours, block: Any, g: dict[str, Any]) -> dict[str, Tensor]:
    routing = block.ffn.gate(g["x"], g["ids"])
    return {"weights": torch.zeros_like(routing.scores).scatter(1, routing.chosen, routing.weights)}


def _routed(a: Ours, block: Any, g: dict[str, Any]) -> dict[str, Tensor]:
    weights, chosen = g["weights"].topk(a.model.config.num_experts_per_tok)
    return {"y": block.ffn.experts(g["x"], chosen, weights).to(g["x"].dtype)}


def _rotation(a: Ours, block: Any, g: dict[str, Any]) -> dict[str, Tensor]:
    turn = turns(g["frequencies"], g["positions"])
    return {"rotated": ops.rotate(g["x"], turn.conj().resolve_conj() if g["back"] else turn)}


def _index_meeting(a: Ours, block: Any, g: dict[str, Any]) -> dict[str, Tensor]:
    key = Packed(128, "fp4", 32, rotated=True)
    return {"scores": ops.index_scores(key.as_query(g["q"]), g["weights"], key.as_read(g["keys"]))}


_ROW, _KEY = Packed(512, "fp8", 64, tail=64, align=8), Packed(128, "fp4", 32, rotated=True)
_PARTS = {
    "frequencies": lambda a, block, g: {"frequencies": frequencies(a.model.config, table(block))},
    "rotation": _rotation,
    "norm": lambda a, block, g: {"y": ops.rms_norm(g["x"], block.attn_norm.weight, block.attn_norm.eps)},
    "project_in": _project_in,
    "compressor": lambda a, block, g: {"entries": a.pooled(block.attn.compressor, "attention", block, g)},
    "index keys": lambda a, block, g: {"keys": a.pooled(block.attn.indexer.compressor, "index", block, g)},
    "indexer": _indexer,
    "indexer ties": _indexer,
    "attention": _attention,
    "project_out": _project_out,
    "maps": _maps,
    "mixing": lambda a, block, g: {"streams": ops.hyper_write(g["streams"], g["y"], g["post"], g["mix"])},
    "collapse": lambda a, block, g: {
        "hidden": hyper.collapse(g["streams"], hyper.parameters_of(a.model, "hc_head"), a.model.config)
    },
    "gate": _gate,
    "routed experts": _routed,
    "shared expert": lambda a, block, g: {"y": block.ffn.shared_experts(g["x"])},
    "row format": lambda a, block, g: {"read": _ROW.as_read(g["rows"])},
    "index row format": lambda a, block, g: {"read": _KEY.as_read(g["rows"])},
    "packed index scores": _index_meeting,
    "FP8 weights": lambda a, block, g: {"matrix": PackedMatrix("fp8", g["codes"], g["scales"]).unpack()},
    "FP4 weights": lambda a, block, g: {"matrix": PackedMatrix("fp4", g["codes"], g["scales"]).unpack()},
}
