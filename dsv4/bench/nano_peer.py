"""nano-deepseek-v4 as a peer: its PyTorch model with its cache. Runs in its own Python (peerside.py).

It reads our published folder by its own loader; every tensor has to find its place. The head runs for the last token of
a chunk alone, as ours does. Version 0.2.0 is refused by agree.py: it computes another function.
"""

import importlib
import importlib.metadata
import time
from pathlib import Path
from typing import Any


def missing() -> str:
    """Why it cannot be run here; empty if it can."""
    try:
        importlib.metadata.version("nano-deepseek-v4")
    except importlib.metadata.PackageNotFoundError:
        return "it has no nano-deepseek-v4: pip install nano-deepseek-v4"
    return ""


def version() -> str:
    return "nano-deepseek-v4 " + importlib.metadata.version("nano-deepseek-v4")


def environment(threads: int) -> dict[str, str]:
    return {"OMP_NUM_THREADS": str(threads)}


class Peer:
    """The model, and one cache at a time."""

    def __init__(self, job: dict[str, Any]):
        self.torch, nano = importlib.import_module("torch"), importlib.import_module("nano_deepseek_v4")
        self.torch.set_num_threads(job["threads"])
        config = nano.DeepSeekV4Config.from_official_json(Path(job["folder"]) / "config.json")
        self.model = nano.DeepSeekV4ForCausalLM(config)
        report = nano.load_deepseek_official_checkpoint(self.model, job["folder"])
        weights = {name for name, _ in self.model.named_parameters()}  # each layer also has the other routing's buffer
        missed = [name for name in report.missing_keys if name in weights]
        if lost := [*missed, *report.unexpected_keys, *report.conversion.unconverted_keys]:
            raise RuntimeError(f"nano-deepseek-v4 finds no place for {len(lost)} tensors, {lost[0]} among them")
        self.model = self.model.to(getattr(self.torch, job["dtype"])).eval()
        self.chunk = job["chunk"]

    def best(self, ids: list[int], count: int) -> tuple[list[int], list[float]]:
        with self.torch.inference_mode():
            logits, _ = self._read(ids, None)
            found = logits.float().log_softmax(-1).topk(count)
        return found.indices.tolist(), found.values.tolist()

    def measure(self, ids: list[int], steps: int) -> tuple[float, list[float]]:
        with self.torch.inference_mode():
            began = time.perf_counter()
            _, cache = self._read(ids, None)
            prefill, decode = time.perf_counter() - began, []
            for step in range(steps):
                began = time.perf_counter()
                _, cache = self._read([ids[step % len(ids)]], cache)
                decode.append(time.perf_counter() - began)
        return prefill, decode

    def _read(self, ids: list[int], cache: Any) -> tuple[Any, Any]:
        """Logits of the last token [vocab], and the cache after `ids` more."""
        hidden: Any = None
        for part in self.torch.tensor(ids).split(self.chunk):
            hidden, _, cache = self.model.model(part[None], past_key_values=cache, use_cache=True)
        return self.model.lm_head(hidden[0, -1]), cache
