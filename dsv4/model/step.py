"""Blocks for a few tokens in one call of a backend, where it has one: the functions that block.py calls op by op, in
the same order and so with the same bits, but without Python between them.

It serves memories alone, without gradients. While somebody watches (a hook on a part of a block or another `forward`
in its place, wrapped ops, a graph that is being compiled), or where any of the ops would go to another form, the blocks
run op by op. A model asks for all of its blocks at once, and a block that was left out, or the MTP block, for itself.
"""

import math
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import chain, repeat
from operator import attrgetter
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from dsv4 import ops
from dsv4.cache import Compressed, LayerMemory
from dsv4.config import ModelConfig
from dsv4.model import hyper
from dsv4.model.attention import Attention
from dsv4.model.compressor import Compressor
from dsv4.model.moe import Routing
from dsv4.model.rope import both_turns
from dsv4.model.segments import Run
from dsv4.ops import Spans
from dsv4.ops.formats import Packed, PagedRows, Plain, RowFormat

Block = Any  # that of block.py, which imports this file

FEW = 64  # tokens: with more, what lies between the ops takes no time, and what stands between them much room


class Ran(NamedTuple):
    """What blocks made of a run: streams [T, N, M], these collapsed [T, M] where that was asked for, and what their
    gates decided."""

    streams: Tensor
    hidden: Tensor | None
    routing: "Decided"


def run_blocks(
    owner: nn.Module,
    blocks: Sequence[Block],
    x: Tensor,
    ids: Tensor,
    run: Run,
    views: Sequence[LayerMemory | None],
    end: hyper.Hyper | None = None,
) -> Ran | None:
    """x through blocks, each with its memory; or None: the blocks are to run by themselves.

    owner: what has them, and lives as long: a block itself, or the list of a model's. x: streams [T, N, M], or rows
    [T, M] of which all streams of their token are copies. end: the maps by which the streams are collapsed at last.
    """
    n = x.shape[0]
    if n > FEW or None in views or torch.is_grad_enabled() or torch.compiler.is_compiling() or run.pinned:
        return None
    backend = ops.whole_blocks(x.device)
    if backend is None or ids.dtype != torch.int64:
        return None
    laid = _laid_out(owner, blocks, x, views, end or (), backend)
    if not laid.layers or laid.outline.watched():
        return None
    step, _ = run.derived.get("step") or _step(run, backend)
    gate, config = blocks[0].ffn.gate, blocks[0].config
    if not (x.is_contiguous() and ids.is_contiguous()):
        x, ids = x.contiguous(), ids.contiguous()
    out = x.new_empty(n, config.num_streams, config.hidden_size)
    hidden = None if end is None else x.new_empty(n, config.hidden_size)
    decided = Decided(ids, len(blocks), n, gate.weight.shape[0], gate.topk)
    backend.run(
        laid.order, step, ids.data_ptr(), x.data_ptr(), x.ndim == 2, out.data_ptr(), *decided.places(),
        laid.end, None if hidden is None else hidden.data_ptr(),
    )  # fmt: skip
    return Ran(out, hidden, decided)


class Decided(Sequence[Routing]):
    """What the gates of some blocks decided. It lies in one piece and is cut up when somebody asks, as few do."""

    def __init__(self, like: Tensor, blocks: int, tokens: int, experts: int, topk: int):
        self.shapes = (blocks, tokens, topk), (blocks, tokens, topk), (blocks, tokens, experts)
        self.chosen = self.weights = blocks * tokens * topk  # how many numbers
        size = self.chosen + (self.weights + blocks * tokens * experts + 1) // 2
        self.room = like.new_empty(size)  # chosen int64, then weights and scores fp32

    def places(self) -> tuple[int, int, int]:
        """Where scores, chosen and weights lie."""
        chosen = self.room.data_ptr()
        weights = chosen + 8 * self.chosen
        return weights + 4 * self.weights, chosen, weights

    def __len__(self) -> int:
        return self.shapes[0][0]

    def __getitem__(self, index):
        return self._all[index]

    @cached_property
    def _all(self) -> list[Routing]:
        chosen, rest = self.room[: self.chosen], self.room[self.chosen :].view(torch.float32)
        weights, scores = rest[: self.weights], rest[self.weights :][: math.prod(self.shapes[2])]
        cut = (part.view(shape) for part, shape in zip((chosen, weights, scores), self.shapes, strict=True))
        return [Routing(s, c, w) for c, w, s in zip(*cut, strict=True)]


# --- blocks and their stores, laid out once --------------------------------------------------------------------------


class Outline:
    """Where everything lies that blocks and their memories are made of: by it is known that nothing has moved.

    It is asked at every step, so its loops are those of the interpreter's own functions.
    """

    def __init__(
        self, owner: nn.Module, blocks: Sequence[nn.Module], views: Sequence[LayerMemory], end: Sequence[Tensor]
    ):
        modules = [m for block in blocks for m in block.modules()]
        # held, or another could come to lie where one was; not the owner, which must be free to go, and around whose
        # call its own hooks run as around any other
        self.parts = [m for m in modules if m is not owner]
        every = [d for m in modules for d in (m._modules, m._parameters, m._buffers)]
        self.held = [d for d in every if d]  # what is empty is only filled by taking away elsewhere
        self.tensors = [*end, *(t for d in self.held for t in d.values() if isinstance(t, Tensor))]
        self.stores = [store for view in views for _, store in view.stores()]
        self.hooks = [d for m in self.parts for d in (m._forward_hooks, m._forward_pre_hooks)]
        self.hooks += [torch_module._global_forward_hooks, torch_module._global_forward_pre_hooks]  # of all modules
        self.own = [m.__dict__ for m in self.parts]

    def watched(self) -> bool:
        """Whether a part of the blocks must run by itself."""
        return any(self.hooks) or any(map(dict.__contains__, self.own, repeat("forward")))

    def places(self, blocks: Sequence[nn.Module], x: Tensor, end: Sequence[Tensor]) -> list[object]:
        parts = map(id, chain.from_iterable(map(dict.values, self.held)))
        stores = map(Tensor.data_ptr, map(_data, self.stores))
        return [
            x.dtype, *map(id, blocks), *map(id, end), *parts, *map(Tensor.data_ptr, self.tensors), *stores,
            *map(id, map(_format, self.stores)),
        ]  # fmt: skip


_data, _format = attrgetter("data"), attrgetter("format")


class Laid:
    """Blocks and their stores as the backend takes them, all or none: `layers` is empty where it cannot."""

    def __init__(
        self,
        owner: nn.Module,
        blocks: Sequence[Block],
        x: Tensor,
        views: Sequence[LayerMemory],
        end: Sequence[Tensor],
        backend: Any,
    ):
        self.outline = Outline(owner, blocks, views, end)
        self.places = self.outline.places(blocks, x, end)
        c: ModelConfig = blocks[0].config
        streams, eps = x.new_empty(1, c.num_streams, c.hidden_size), (c.hc_eps, c.rms_norm_eps)
        fits = all(_fits(block, streams, view, backend) for block, view in zip(blocks, views, strict=True))
        fits = fits and not (end and ops.refusal("head_collapse", x.device.type, streams, *end, *eps))
        self.collapse = backend.Collapse(*map(backend.address, end), *eps) if end else None
        self.end = None if self.collapse is None else backend.where(self.collapse)
        self.layers = [_layer(*both, x, backend) for both in zip(blocks, views, strict=True)] if fits else []
        self.order = backend.in_order(self.layers)


_known: WeakKeyDictionary[nn.Module, WeakKeyDictionary[LayerMemory, Laid]] = WeakKeyDictionary()


def _laid_out(
    owner: nn.Module, blocks: Sequence[Block], x: Tensor, views: Any, end: Sequence[Tensor], backend: Any
) -> Laid:
    of_owner = _known.get(owner)
    if of_owner is None:
        of_owner = _known[owner] = WeakKeyDictionary()
    laid = of_owner.get(views[0])  # of one pool, as all of them are
    if laid is None or laid.places != laid.outline.places(blocks, x, end):
        laid = of_owner[views[0]] = Laid(owner, blocks, x, views, end, backend)
    return laid


def _fits(block: Block, x: Tensor, view: LayerMemory, backend: Any) -> bool:
    """Whether this is V4's block, of plain parameters, with stores in known formats that are read in x's dtype, and the
    backend serves its ops."""
    plain = all(type(p) is nn.Parameter for p in block.parameters()) and block._compiled_call_impl is None
    formats = [store.format for _, store in view.stores()]
    read = all(type(f) is Plain or (type(f) is Packed and f.numbers == x.dtype and not f.fp32_scales) for f in formats)
    if not (type(block.attn) is Attention and block.config.residual == "mhc" and plain and read):
        return False
    if len(block.config.compressed_kinds) > backend.KINDS:
        return False
    return not any(ops.refusal(op, x.device.type, *given) for op, *given in _calls(block, x, view))


def _calls(block: Block, x: Tensor, view: LayerMemory) -> Iterator[tuple[Any, ...]]:
    """The ops of a block on a token, for the table to say whether the backend's form serves them."""
    attn, ffn, c = block.attn, block.ffn, block.config
    h, q, index = x.new_empty(1, x.shape[2]), x.new_empty(1, attn.heads, attn.width), torch.zeros(1, dtype=torch.int64)
    turn, span = torch.empty(1, c.qk_rope_head_dim // 2, dtype=torch.complex64), Spans(index, index)
    weights, chosen = torch.empty(1, ffn.gate.topk), torch.zeros(1, ffn.gate.topk, dtype=torch.int64)

    def rows(data: Tensor, format: RowFormat) -> PagedRows:
        return PagedRows(data, format, index, index.numpy(), 1)

    def compressor(m: Compressor, store: Compressed) -> Iterator[tuple[Any, ...]]:
        own = torch.empty(m.kind.ratio, m.wkv.weight.shape[0])
        yield "compressor_rows", h, m.wkv.weight, m.wgate.weight, m.ape, index
        yield (
            "compress", own, own, index, index.bool(), m.kind.ratio, m.kind.overlap, m.norm.weight, 0.0, turn, x.dtype,
        )  # fmt: skip
        if isinstance(store.entries.format, Packed):
            yield "pack_rows", x.new_empty(1, store.entries.format.width), store.entries.format

    for name, enter in (("hc_attn", block.attn_norm), ("hc_ffn", block.ffn_norm)):
        yield "hyper_enter", x[:1], *(hyper.parameters_of(block, name) or ()), enter.weight, 1, 0.0, 0.0
    yield (
        "project_in", h, attn.wq_a.weight, attn.q_norm.weight, attn.wq_b.weight, attn.wkv.weight,
        attn.kv_norm.weight, attn.heads, 0.0, turn,
    )  # fmt: skip
    assert view.window is not None
    window, entries = rows(view.window.data, view.window.format), None
    if attn.compressor is not None and view.attention is not None:
        yield from compressor(attn.compressor, view.attention)
        entries = rows(view.attention.entries.data, view.attention.entries.format)
    if attn.indexer is not None and view.index is not None:
        i, keys = attn.indexer, view.index.entries
        yield from compressor(i.compressor, view.index)
        yield "linear", x.new_empty(1, i.wq_b.weight.shape[1]), i.wq_b.weight
        yield "linear", h, i.weights_proj.weight
        asking = x.new_empty(1, i.heads, i.width)
        yield "index_scores_topk", asking, weights, rows(keys.data, keys.format), span, i.topk
    yield "sparse_attention", q, window, span, entries, span, None, attn.attn_sink, 1.0
    yield "project_out", q, turn, attn.wo_a.weight, attn.groups, attn.wo_b.weight
    given = None if ffn.gate.tid2eid is None else chosen
    yield "gate", h, ffn.gate.weight, ffn.gate.bias, given, ffn.gate.topk, 1.0
    yield "experts", h, chosen, weights, ffn.experts.w13, ffn.experts.w2, 1.0
    s = ffn.shared_experts
    yield "mlp", h, s.w1.weight, s.w3.weight, s.w2.weight, 1.0


def _layer(block: Block, view: LayerMemory, x: Tensor, b: Any) -> Any:
    c, attn, ffn, kind = block.config, block.attn, block.ffn, view.kind
    kinds = [k.name for k in c.compressed_kinds]

    def streams(name: str, enter: hyper.Enter) -> Any:
        return b.Hyper(*map(b.address, (*(hyper.parameters_of(block, name) or ()), enter.weight)))

    def compressor(m: Compressor, store: Compressed, width: int) -> Any:
        places = map(b.address, (m.wkv.weight, m.wgate.weight, m.ape, m.norm.weight))
        e = store.entries
        laid = b.store(e.data, e.format, e.per_page)
        return b.Compressor(
            *places, m.wkv.weight.shape[0], kind.ratio, kind.overlap, width, store.rows.data.data_ptr(), laid
        )

    def matrices(m: nn.Module, *names: str) -> dict[str, Any]:
        return {name: b.matrix(getattr(m, name).weight) for name in names}

    assert view.window is not None
    laid = b.Attention(
        **matrices(attn, "wq_a", "wq_b", "wkv", "wo_a", "wo_b"), q_gain=b.address(attn.q_norm.weight),
        kv_gain=b.address(attn.kv_norm.weight), sink=b.address(attn.attn_sink), heads=attn.heads, groups=attn.groups,
        scale=attn.width**-0.5, window=b.store(view.window.data, view.window.format),
    )  # fmt: skip
    if attn.compressor is not None and view.attention is not None:
        laid.compressor = compressor(attn.compressor, view.attention, attn.width)
    if attn.indexer is not None and view.index is not None:
        i = attn.indexer
        laid.indexer = b.Indexer(
            **matrices(i, "wq_b", "weights_proj"), heads=i.heads, width=i.width, topk=i.topk,
            scale=(i.width * i.heads) ** -0.5, compressor=compressor(i.compressor, view.index, i.width),
        )  # fmt: skip
    gate, shared = ffn.gate, ffn.shared_experts
    experts = b.Experts(
        gate=b.matrix(gate.weight), bias=b.address(gate.bias), table=b.address(gate.tid2eid), k=gate.topk,
        scale=gate.scale, limit=ffn.experts.limit, routed=b.routed(ffn.experts.w13, ffn.experts.w2),
        shared=b.shared(shared.w1.weight, shared.w3.weight, shared.w2.weight),
    )  # fmt: skip
    return b.Layer(
        is_bf16=x.dtype == torch.bfloat16, streams=c.num_streams, width=c.hidden_size, iters=c.hc_sinkhorn_iters,
        pairs=c.qk_rope_head_dim // 2, kind=kinds.index(kind.name) if kind.ratio else -1, hc_eps=c.hc_eps,
        eps=c.rms_norm_eps, attn=streams("hc_attn", block.attn_norm), ffn=streams("hc_ffn", block.ffn_norm),
        attention=laid, experts=experts,
    )  # fmt: skip


# --- a step, laid out once for all layers ----------------------------------------------------------------------------


def _step(run: Run, backend: Any) -> tuple[Any, Any]:
    """The run as the backend takes it, and what holds its numbers."""
    if not run.is_causal:
        run.derived["step"] = _of_windows(run, backend)
        return run.derived["step"]
    memories = run.memories()
    pool, config = memories[0].pool, run.config
    kinds = tuple((kind.ratio, kind.overlap) for kind in config.compressed_kinds)
    tables = [table.ctypes.data for table in run.tables]  # type: ignore[union-attr]
    turned = [both_turns(config, at, n, pool.page_tokens) for at, n in zip(run.starts, run.lengths, strict=True)]
    run.derived["step"] = backend.plan(
        [m.slot for m in memories], run.starts, run.lengths, tables, config.sliding_window, pool.max_rewind,
        pool.page_tokens, kinds, turned,
    )  # fmt: skip
    return run.derived["step"]


def _of_windows(run: Run, b: Any) -> tuple[Any, Any]:
    """`_step` of a run of window layers alone whose one part says what each token sees."""
    (part,), turned = run.parts, (run.turn["window"], run.turn["compressed"])
    rows, window = part.ring, part.window
    assert rows is not None and not part.groups
    before, stored = len(rows.read), len(rows.write)
    joined = before + sum(run.lengths) if rows.order is None else len(rows.order)
    ring = b.RingRows(*map(b.address, (rows.read, rows.order, rows.write, rows.kept)), before, joined, stored)
    places = map(b.address, (run.positions, window.start, window.stop, part.table, *turned))
    return b.Step(sum(run.lengths), len(part.pages), *places, ring), (part, turned)
