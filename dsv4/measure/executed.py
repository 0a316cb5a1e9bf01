"""FLOPs executed and bytes allocated: every matrix product of a run is seen by a dispatch mode and sized by torch's own
formulas, and credited to the parameter whose storage takes part in it, or else to the op it runs in.
"""

from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from dsv4 import ops
from dsv4.config import AnyConfig, ModelConfig, V32Config
from dsv4.cost.params import families
from dsv4.measure.subjects import fill
from dsv4.model import LanguageModel

Place = str  # a kind of layer, or "ends" for what is outside of all layers
Counts = Counter[tuple[Place, str, str]]  # (place, component, kind of work) -> FLOPs
ENDS: Place = "ends"


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
        self._open.enter_context(ops.using("blocked"))  # the same products, as torch operations that can be seen
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
        elif packet is torch.ops.aten.mul_ and self.op == "index_scores_topk":  # weights times products, then added up
            self.counts[self.place, "indexer head sum", "sum"] += 2 * out.numel()
        return out

    def _add(self, args: Any, flops: int) -> None:
        tensors = [a for a in args if isinstance(a, Tensor)]
        owners = {self.owners.get(t.untyped_storage().data_ptr()) for t in tensors} - {None}
        component, kind = owners.pop() if owners else self._of_activations(tensors)  # type: ignore[misc]
        self.counts[self.place, component, kind] += flops

    def _of_activations(self, tensors: list[Tensor]) -> tuple[str, str]:
        """Products without a parameter: attention, scores, and the mixing of streams."""
        if self.op == "index_scores_topk":
            assert tensors[0].shape[-1] == self.config.index_head_dim  # type: ignore[union-attr]
            return "indexer scores", "idx4" if isinstance(self.config, ModelConfig) else "idx8"
        if isinstance(self.config, ModelConfig):
            return (f"core: {self.place}", "core") if self.op == "sparse_attention" else ("hyper-connections", "mhc")
        return ("core: DSA" if isinstance(self.config, V32Config) else "core: GQA"), "core"


def place_of(config: AnyConfig, layer: int) -> Place:
    if isinstance(config, ModelConfig):
        return config.layer_kind(layer).name
    if isinstance(config, V32Config):
        return "dense" if layer < config.first_k_dense_replace else "moe"
    return "gqa"


@torch.no_grad()
def run_one_token(model: LanguageModel, config: AnyConfig, context: int, format: str) -> tuple[Counts, int]:
    """Decode the token at position context - 1 over a memory of all before it: (FLOPs executed, bytes allocated)."""
    memory = new_memory(model, context, format)
    fill(memory, context - 1, torch.Generator().manual_seed(context))
    size = memory.bytes()
    with Executed(model, config) as executed:
        model(torch.tensor([1]), memory)
    assert memory.bytes() == size, "a preallocated memory does not grow"
    return executed.counts, size


def new_memory(model: LanguageModel, context: int, format: str) -> Any:
    """An empty memory of one sequence with room for `context` tokens and no spare rows."""
    return model.new_cache(format=format, capacity=context, max_rewind=0)[0]
