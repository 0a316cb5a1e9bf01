"""Whether what dsv4/cost counts is what runs: FLOPs executed and bytes allocated by real layers, beside the counts.

Every matrix product of a decoded token is seen by a dispatch mode, sized by torch's own formulas, and credited to the
parameter whose storage takes part in it, or else to the op it runs in. Memories are filled, not computed, so a context
costs its memory only. Models too large for the machine run one layer of each kind at their real width.
"""

import os
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from dsv4 import ops
from dsv4.config import CONTROLS, AnyConfig, LlamaConfig, ModelConfig, RopeScaling, V32Config
from dsv4.cost import kv_bytes
from dsv4.cost.flops import Work, decode, weighted
from dsv4.cost.params import families
from dsv4.model import Transformer
from dsv4.model.controls import DenseTransformer, V32Transformer

Place = str  # a kind of layer, or "ends" for what is outside of all layers
Counts = Counter[tuple[Place, str, str]]  # (place, component, kind of work) -> FLOPs
Progress = Callable[[str], None]

# Formats of live memories and what dsv4/cost calls them.
FORMATS = {"packed": "published", "bfloat16": "bfloat16", "float32": "float32"}
ENDS: Place = "ends"


# --- FLOPs executed --------------------------------------------------------------------------------------------------


class Executed(TorchDispatchMode):
    """Counts the products that run inside the `with`, in `counts`. Where they belong is read from the model."""

    def __init__(self, model: nn.Module, config: AnyConfig):
        super().__init__()
        self.counts: Counts = Counter()
        self.config, self.place, self.op = config, ENDS, ""
        self.owners: dict[int, tuple[str, str]] = {}
        found = [f for f in families(config) if f.kind]
        for name, p in model.named_parameters():
            for family in found:
                if family.matches(name):
                    self.owners[p.untyped_storage().data_ptr()] = (family.component, family.kind)
        self._open = ExitStack()
        self._layers: list[tuple[int, nn.Module]] = list(enumerate(model.layers))  # type: ignore[arg-type]

    def __enter__(self):
        for i, layer in self._layers:
            kind = place_of(self.config, i)
            before = layer.register_forward_pre_hook(lambda *_, kind=kind: self._stand(kind))
            after = layer.register_forward_hook(lambda *_: self._stand(ENDS))
            self._open.callback(before.remove)
            self._open.callback(after.remove)
        self._open.enter_context(ops.wrapped(("index_scores_topk", "sparse_attention", "hyper_write"), self._inside))
        return super().__enter__()

    def __exit__(self, *error):
        self._open.close()
        return super().__exit__(*error)

    def _stand(self, place: Place) -> None:
        self.place = place

    def _inside(self, name: str, op: Callable) -> Callable:
        def call(*args, **kwargs):
            self.op = name
            try:
                return op(*args, **kwargs)
            finally:
                self.op = ""

        return call

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        packet = func._overloadpacket
        if packet in flop_registry:
            self._add(args, flop_registry[packet](*args, **(kwargs or {}), out_val=out))
        elif packet in (torch.ops.aten.mv, torch.ops.aten.addmv, torch.ops.aten.dot):
            raise AssertionError(f"{packet} is a product that torch's counter has no formula for")
        elif packet in (torch.ops.aten.addcmul_, torch.ops.aten.addcmul) and self.op == "hyper_write":
            self._add((), 2 * out.numel())  # the output's part in the new streams is a product too
        return out

    def _add(self, args: Any, flops: int) -> None:
        tensors = [a for a in args if isinstance(a, Tensor)]
        owners = {self.owners.get(t.untyped_storage().data_ptr()) for t in tensors} - {None}
        component, kind = owners.pop() if owners else self._of_activations(tensors)  # type: ignore[misc]
        self.counts[self.place, component, kind] += flops

    def _of_activations(self, tensors: list[Tensor]) -> tuple[str, str]:
        """Products without a parameter: attention, scores, and the mixing of streams."""
        if self.op == "index_scores_topk":
            contracted = tensors[0].shape[-1]
            if contracted == self.config.index_n_heads:  # type: ignore[union-attr]
                return "indexer head sum", "sum"
            assert contracted == self.config.index_head_dim  # type: ignore[union-attr]
            return "indexer scores", "idx4" if isinstance(self.config, ModelConfig) else "idx8"
        if isinstance(self.config, ModelConfig):
            return (f"core: {self.place}", "core") if self.op == "sparse_attention" else ("hyper-connections", "mhc")
        return ("core: DSA" if isinstance(self.config, V32Config) else "core: GQA"), "core"


def place_of(config: AnyConfig, layer: int) -> Place:
    if isinstance(config, ModelConfig):
        return config.layer_kind(layer)
    if isinstance(config, V32Config):
        return "dense" if layer < config.first_k_dense_replace else "moe"
    return "gqa"


@torch.no_grad()
def run_one_token(model: Any, config: AnyConfig, context: int, format: str) -> tuple[Counts, int]:
    """Decode the token at position context - 1 over a memory of all before it: (FLOPs executed, bytes allocated)."""
    memory = new_memory(model, config, context, format)
    memory.fill(context - 1, torch.Generator().manual_seed(context))
    size = memory.bytes()
    with Executed(model, config) as executed:
        model(torch.tensor([1]), memory)
    assert memory.bytes() == size, "a preallocated memory does not grow"
    return executed.counts, size


def new_memory(model: Any, config: AnyConfig, context: int, format: str) -> Any:
    """An empty memory of one sequence with room for `context` tokens and no spare rows."""
    if isinstance(config, ModelConfig):
        return model.new_cache(format=format, capacity=context, max_rewind=0)[0]
    return model.new_cache(format=format, capacity=context)


# --- models that fit -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Slice:
    """One layer of a kind with both ends of its model, standing for `times` layers."""

    place: Place
    times: int
    config: AnyConfig


def slices(config: AnyConfig) -> list[Slice]:
    """A model as one layer of each kind, at its real width."""
    if isinstance(config, ModelConfig):
        one = dict(num_hidden_layers=1, num_nextn_predict_layers=0, num_hash_layers=0)
        kinds = {config.layer_kind(i): r for i, r in enumerate(config.trunk_ratios)}
        times = Counter(config.layer_kind(i) for i in range(config.num_hidden_layers))
        return [Slice(k, times[k], config.with_(**one, compress_ratios=(r,))) for k, r in kinds.items()]
    if isinstance(config, V32Config):
        dense = min(config.first_k_dense_replace, config.num_hidden_layers)
        one = replace(config, num_hidden_layers=1, first_k_dense_replace=0)
        both = [
            Slice("dense", dense, replace(one, first_k_dense_replace=1)),
            Slice("moe", config.num_hidden_layers - dense, one),
        ]
        return [s for s in both if s.times]
    return [Slice("gqa", config.num_hidden_layers, replace(config, num_hidden_layers=1))]


def build(config: AnyConfig, dtype: torch.dtype) -> Any:
    """A model whose experts share one set of weights, and its tokens one embedding row: the same products, less memory.

    The values are of no matter here, only that they are finite.
    """
    kinds = {ModelConfig: Transformer, V32Config: V32Transformer, LlamaConfig: DenseTransformer}
    with torch.device("meta"):
        model = kinds[type(config)](config, dtype)  # type: ignore[arg-type]
    pattern = 0.02 * torch.randn(1 << 20, generator=torch.Generator().manual_seed(0))
    for path, module in model.named_modules():
        for name, p in list(module.named_parameters(recurse=False)):
            full = f"{path}.{name}"
            shared = ".experts." in full or path == "embed"
            # logits are fp32: a narrower head would be copied for every token
            dtype_held = torch.float32 if path == "head" else p.dtype
            data = torch.empty((1, *p.shape[1:]) if shared else p.shape, dtype=dtype_held)
            if full.endswith("norm.weight"):
                data.fill_(1.0)
            else:
                for part in data.view(-1).split(len(pattern)):
                    part.copy_(pattern[: len(part)])
            module._parameters[name] = nn.Parameter(data.expand(p.shape), requires_grad=False)
        for name, b in list(module.named_buffers(recurse=False)):
            module._buffers[name] = torch.zeros(b.shape, dtype=b.dtype)
    return model


# --- counted beside measured -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pair:
    """One component of a model at a context, counted and executed."""

    model: str
    context: int
    component: str
    kind: str
    counted: int
    executed: int

    @property
    def off(self) -> float:
        """Executed over counted, less one."""
        return self.executed / self.counted - 1 if self.counted else float("inf") if self.executed else 0.0


@dataclass(frozen=True)
class Size:
    """A cache of a model in a format at a context: bytes counted and allocated."""

    model: str
    format: str
    context: int
    counted: int
    allocated: int


def measure_model(
    name: str, config: AnyConfig, contexts: list[int], *, whole: bool, dtype: torch.dtype, progress: Progress
) -> tuple[list[Pair], list[Size]]:
    """FLOPs by component and cache bytes by format at every context; `whole`: all layers, else one of each kind."""
    parts = [Slice("", 1, config)] if whole else slices(config)
    formats = [f for f in FORMATS if not (f == "packed" and isinstance(config, LlamaConfig))]
    flops: dict[int, Counts] = {c: Counter() for c in contexts}
    sizes: Counter[tuple[int, str]] = Counter()
    for number, part in enumerate(parts):
        progress(f"{name}: {part.place or 'all'} layers")
        model = build(part.config, dtype)
        for context in contexts:
            counts, size = run_one_token(model, part.config, context, formats[0])
            sizes[context, formats[0]] += part.times * size
            for format in formats[1:]:
                sizes[context, format] += part.times * new_memory(model, part.config, context, format).bytes()
            for (place, component, kind), executed in counts.items():
                if place != ENDS or number == 0:
                    flops[context][place, component, kind] += executed * (1 if place == ENDS else part.times)
    pairs = [p for c in contexts for p in _pairs(name, c, decode(config, c), flops[c])]
    held = [
        Size(name, f, c, sum(kv_bytes.held(config, c, FORMATS[f], allocated=True).values()), sizes[c, f])
        for c in contexts
        for f in formats
    ]
    return pairs, held


def _pairs(name: str, context: int, work: list[Work], flops: Counts) -> list[Pair]:
    counted: Counter[tuple[str, str]] = Counter()
    for w in work:
        counted[w.component, w.kind] += w.flops
    executed: Counter[tuple[str, str]] = Counter()
    for (_, component, kind), count in flops.items():
        executed[component, kind] += count
    return [Pair(name, context, *key, counted[key], executed[key]) for key in sorted(set(counted) | set(executed))]


SMALL: dict[str, AnyConfig] = {
    "small V4": ModelConfig.preset("small", index_topk=64),
    "small V3.2": V32Config(
        vocab_size=2048, hidden_size=256, num_hidden_layers=3, num_attention_heads=8, q_lora_rank=128, kv_lora_rank=128,
        qk_nope_head_dim=32, qk_rope_head_dim=32, v_head_dim=32, index_n_heads=4, index_head_dim=64, index_topk=128,
        intermediate_size=512, moe_intermediate_size=160, first_k_dense_replace=1, n_routed_experts=8,
        num_experts_per_tok=2, n_group=2, topk_group=1, rope_scaling=RopeScaling("default"),
        max_position_embeddings=65536,
    ),
}  # fmt: skip
SMALL_CONTEXTS = [300, 1021, 2048, 8190, 32768]  # beyond the top-k: below it nothing has to be chosen or scored
REAL: dict[str, AnyConfig] = {
    "v3.2": replace(V32Config(), max_position_embeddings=1 << 20),  # the comparison goes beyond its own 163,840
    "pro": ModelConfig.preset("pro"), "flash": ModelConfig.preset("flash"),
}  # fmt: skip
FITTED = [n * 1024 for n in (16, 32, 64, 128, 256)]  # beyond every top-k, where costs are straight lines
MILLION = 1 << 20


@dataclass(frozen=True)
class Ratio:
    """V4 over V3.2 at a million tokens in percent: counted, extrapolated from measurements, measured directly."""

    model: str
    what: str
    counted: float
    extrapolated: float
    direct: float | None


def ratios(pairs: list[Pair], sizes: list[Size], fitted: list[int]) -> list[Ratio]:
    """The claims from what was measured at `fitted`, along the fitted slope; and directly, where a million was run."""
    measured: dict[str, dict[str, dict[int, float]]] = {}
    for p in pairs:
        for what, scheme in (("FLOPs, FP8 equivalents", "C"), ("FLOPs, raw", "A")):
            at = measured.setdefault(what, {}).setdefault(p.model, {})
            at[p.context] = at.get(p.context, 0.0) + weighted([Work(p.component, p.kind, p.executed)], scheme)
    for s in sizes:
        measured.setdefault(f"cache, {s.format}", {}).setdefault(s.model, {})[s.context] = float(s.allocated)
    counted: dict[str, Callable[[AnyConfig], float]] = {
        "FLOPs, FP8 equivalents": lambda c: weighted(decode(c, MILLION), "C"),
        "FLOPs, raw": lambda c: weighted(decode(c, MILLION), "A"),
    }
    for format, name in FORMATS.items():
        counted[f"cache, {format}"] = lambda c, name=name: sum(kv_bytes.held(c, MILLION, name).values())
    out = []
    for what, of in counted.items():
        line = {model: _extrapolate(values, fitted) for model, values in measured[what].items()}
        for model in line.keys() - {"v3.2"}:
            both = [measured[what][m].get(MILLION) for m in (model, "v3.2")]
            direct = 100 * both[0] / both[1] if both[0] and both[1] else None
            count = 100 * of(REAL[model]) / of(REAL["v3.2"])
            out.append(Ratio(model, what, count, 100 * line[model] / line["v3.2"], direct))
    return sorted(out, key=lambda r: (r.model != "pro", r.what))


def _extrapolate(values: dict[int, float], fitted: list[int]) -> float:
    """The least-squares line through the values at `fitted`, at a million."""
    x, y = list(fitted), [values[c] for c in fitted]
    mx, my = sum(x) / len(x), sum(y) / len(y)
    slope = sum((a - mx) * (b - my) for a, b in zip(x, y, strict=True)) / sum((a - mx) ** 2 for a in x)
    return my + slope * (MILLION - mx)


def largest_context(limit: int = MILLION) -> int:
    """The largest power of two up to `limit` at which a V3.2 layer, its fp32 memory the largest, fits what is free."""
    row, key = kv_bytes.row_bytes(CONTROLS["v3.2"], "float32")
    free = 0.5 * available_bytes() - 8e9  # the layer with its embedding and head
    context = limit
    while context > FITTED[-1] and context * (row + key) > free:
        context //= 2
    return context


def available_bytes() -> int:
    """Memory that could be allocated now."""
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def measure_all(progress: Progress) -> dict[str, Any]:
    """Small models whole at five contexts; V3.2 and V4 by real-width layers up to what fits, with their ratios."""
    largest = largest_context()
    contexts = [*FITTED, *([largest] if largest > FITTED[-1] else [])]
    pairs: list[Pair] = []
    sizes: list[Size] = []
    for name, config in SMALL.items():
        more, held = measure_model(name, config, SMALL_CONTEXTS, whole=True, dtype=torch.float32, progress=progress)
        pairs, sizes = pairs + more, sizes + held
    real_pairs: list[Pair] = []
    real_sizes: list[Size] = []
    for name, config in REAL.items():
        more, held = measure_model(name, config, contexts, whole=False, dtype=torch.bfloat16, progress=progress)
        real_pairs, real_sizes = real_pairs + more, real_sizes + held
    return {
        "flops": [{**asdict(p), "off": p.off} for p in pairs + real_pairs],
        "caches": [asdict(s) for s in sizes + real_sizes],
        "ratios": [asdict(r) for r in ratios(real_pairs, real_sizes, FITTED)],
        "fitted": FITTED,
        "largest": largest,
    }
