"""nano-deepseek-v4's side of run.py, in the Python that has it: reads a job from stdin, prints its result as JSON."""

import json
import math
import sys
import time
from typing import Any

import nano_deepseek_v4 as nano  # type: ignore[import-not-found]
import numpy as np
import torch
import torch.nn.functional as F


def main() -> None:
    job = json.load(sys.stdin)
    torch.set_num_threads(job["threads"])
    torch.manual_seed(0)
    model = nano.DeepSeekV4ForCausalLM(nano.DeepSeekV4Config.from_official_json(job["config"]))
    optimizers = nano.build_deepseek_v4_optimizers(model, lr=job["lr"])
    rows = stream(job)
    order = np.random.default_rng(0).permutation(len(rows))
    each = job["tokens_per_step"] // job["seq_len"]
    routers = watched(model) if job["helped"] else {}
    steps, spent = 0, 0.0
    while spent < job["seconds"]:
        began = time.perf_counter()
        ids = rows[[order[(steps * each + i) % len(order)] for i in range(each)]]
        if job["helped"]:
            helped_step(model, ids, optimizers, job, spent / job["seconds"])
            for router, chosen in routers.items():
                router.update_balance_bias(chosen)
        else:
            nano.train_step(model, ids, optimizers)
        steps, spent = steps + 1, spent + time.perf_counter() - began
    print(json.dumps({
        "seconds": spent, "steps": steps, "tokens": steps * each * job["seq_len"],
        "parameters": sum(p.numel() for p in model.parameters()), "nats": heldout(model, job),
    }))  # fmt: skip


def stream(job: dict[str, Any]) -> torch.Tensor:
    """Rows of seq_len tokens, cut from the documents' stream one after another, as its own packing does it."""
    tokens = torch.from_numpy(np.load(job["train"]).astype(np.int64))
    length = job["seq_len"]
    return tokens[: len(tokens) // length * length].view(-1, length)


def watched(model: Any) -> dict[Any, torch.Tensor]:
    """Layers with a learned router and what it chose last, kept up to date; its own recipe leaves the biases at 0."""
    last: dict[Any, torch.Tensor] = {}

    def watch(layer: Any) -> None:
        route = layer.route

        def noted(*given: Any) -> Any:
            found = route(*given)
            last[layer] = found[0].detach()
            return found

        layer.route = noted

    for module in model.modules():
        if getattr(module, "layer_type", "") == "moe" and hasattr(module, "update_balance_bias"):
            watch(module)
    return last


def helped_step(model: Any, ids: torch.Tensor, optimizers: Any, job: dict[str, Any], done: float) -> None:
    """A step with what its own recipe leaves out: a course of the rate by the time that has gone, clipping, bias."""
    scale = min(1.0, (done + 1e-3) / max(1e-3, job["warmup_share"]))
    into = (done - (1 - job["decay_share"])) / job["decay_share"]
    if into > 0:
        scale = job["final"] + (1 - job["final"]) * 0.5 * (1 + math.cos(math.pi * min(1.0, into)))
    for optimizer in (optimizers.muon, optimizers.adamw):
        for group in optimizer.param_groups:
            group["lr"] = job["lr"] * scale
    model.train()
    optimizers.zero_grad()
    model(ids, labels=ids).loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), job["clip"])
    optimizers.step()


@torch.no_grad()
def heldout(model: Any, job: dict[str, Any]) -> float:
    """Sum of -log p over the targets, each piece a sequence of its own."""
    model.eval()
    found = np.load(job["heldout"])
    ids, targets = torch.from_numpy(found["ids"]), torch.from_numpy(found["targets"])
    nats, at = 0.0, 0
    for n in found["lengths"].tolist():
        logits = model(ids[None, at : at + n]).logits[0].float()
        nats += F.cross_entropy(logits, targets[at : at + n], ignore_index=-100, reduction="sum").item()
        at += n
    return nats


if __name__ == "__main__":
    main()
