"""Makes the numbers beside it: a training run of 30 steps, its gradients, and logits from memories of three formats.

`python tests/golden/run/make.py` prints how far today's code is from them; `--write` replaces them, which a refactoring
never does. Everything is seeded, on one thread, in fp32; every layer kind, hash layers, MTP, Muon and AdamW take part.
"""

import argparse
import json
import math
import platform
import random
import re
import sys
import tempfile
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dsv4.config import ModelConfig
from dsv4.model import Transformer
from dsv4.model.init import draw_order
from dsv4.settings import merge
from dsv4.train.recipes import RECIPES
from dsv4.train.trainer import Trainer

HERE = Path(__file__).parent
STEPS, PROMPT, DECODED = 30, 150, 40
FORMATS = ("float32", "bfloat16", "packed")
WORDS = "the of and to in a is that for it as was with be by on not he his but at are this have from".split()


def config() -> ModelConfig:
    """All layer kinds, sparse selection, two hash layers and MTP in some 100 thousand parameters."""
    return ModelConfig.preset(
        "tiny", vocab_size=258, hidden_size=64, sliding_window=32, index_topk=8, index_n_heads=32, head_dim=80,
        initializer_range=0.05,
    )  # fmt: skip


def train(folder: Path) -> tuple[list[dict[str, float]], dict[str, float], Transformer]:
    """The figures of every step, the gradient norms of the first by family of parameters, and the trained model."""
    rng = random.Random(0)
    texts = folder / "texts.jsonl"
    documents = (" ".join(rng.choices(WORDS, k=rng.randrange(1, 90))) for _ in range(60))
    texts.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    changes: dict[str, Any] = {
        "data": {"path": str(texts), "tokenizer": "bytes", "seq_len": 300, "tokens_per_step": 512, "micro_batches": 2},
        "schedule": {"steps": STEPS, "warmup": 5, "decay_fraction": 0.4},
        "loss": {"balance": 1e-2},
        "save": {"every": STEPS, "eval_every": STEPS, "eval_tokens": 1000},
    }
    run = Trainer(merge(replace(RECIPES["tiny"](), model=config()), changes), folder / "run")
    run._gradient(0, 0.3)
    norms: dict[str, float] = defaultdict(float)
    for name, p in run.model.named_parameters():
        if p.grad is not None:
            norms[family(name)] += p.grad.double().square().sum().item()
    records: list[dict[str, float]] = []
    kept = ("loss", "mtp_loss", "balance", "load_max", "grad_norm", "heldout_bpb")
    run.run(lambda record: records.append({name: record[name] for name in kept if name in record}))
    return records, {name: math.sqrt(square) for name, square in sorted(norms.items())}, run.model


def family(name: str) -> str:
    """A parameter's published name without the number of its layer, so that a kind of parameter is one figure."""
    return ".".join("N" if part.isdigit() else part for part in name.split(".") if part != "block")


@torch.no_grad()
def logits(model: Transformer) -> dict[str, Tensor]:
    """By format of the memory: fp32 [PROMPT + 40, vocab], of the prompt in one call, then of single tokens."""
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(0, model.config.vocab_size, (PROMPT + DECODED,), generator=generator)
    out = {}
    for format in FORMATS:
        memory = model.new_cache(format=format)
        parts = [model(ids[:PROMPT], cache=memory)]
        parts += [model(ids[i : i + 1], cache=memory) for i in range(PROMPT, PROMPT + DECODED)]
        out[format] = torch.cat(parts)
    return out


def seeded() -> Transformer:
    """The model of `config`, lively, from a fixed seed."""
    generator = torch.Generator().manual_seed(3)
    model = Transformer(config())
    with torch.no_grad():
        for name, p in sorted(model.named_parameters(), key=lambda item: draw_order(item[0])):
            noise = torch.randn(p.shape, generator=generator)
            p.copy_(1 + 0.1 * noise if name.endswith("norm.weight") else (0.3 if p.ndim < 2 else 0.08) * noise)
    return model


def machine() -> dict[str, str]:
    """What decides the order in which sums are taken: the versions, and the family of the processor."""
    info = Path("/proc/cpuinfo")
    vendor = re.search(r"vendor_id\s*:\s*(\S+)", info.read_text()) if info.exists() else None
    cpu = f"{vendor[1] if vendor else platform.processor()} {torch.backends.cpu.get_cpu_capability()}"
    return {"torch": torch.__version__, "cpu": cpu, "python": platform.python_version()}


def everything() -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(figures of the run, logits) as they are computed now."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        records, norms, _ = train(Path(folder))
    return {"steps": records, "gradient_norms": norms}, logits(seeded())


def kept() -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(figures of the run, logits) as they are on file."""
    return json.loads((HERE / "run.json").read_text()), load_file(HERE / "logits.safetensors")


def differences(
    now: tuple[dict[str, Any], dict[str, Tensor]], then: tuple[dict[str, Any], dict[str, Tensor]]
) -> dict[str, float]:
    """The largest relative difference of the figures (by name) and the absolute one of the logits (largest, mean)."""
    out: dict[str, float] = {}
    (run, logits_now), (run_then, logits_then) = now, then
    for a, b in zip(run["steps"], run_then["steps"], strict=True):
        assert a.keys() == b.keys()
        for name in a:
            out[name] = max(out.get(name, 0.0), abs(a[name] - b[name]) / max(abs(b[name]), 1e-9))
    assert run["gradient_norms"].keys() == run_then["gradient_norms"].keys()
    out["first loss"] = abs(run["steps"][0]["loss"] / run_then["steps"][0]["loss"] - 1)
    norms = ((run["gradient_norms"][n], v) for n, v in run_then["gradient_norms"].items())
    out["gradient_norms"] = max(abs(a - b) / max(b, 1e-9) for a, b in norms)
    for format in FORMATS:
        difference = (logits_now[format] - logits_then[format]).abs()
        out[f"logits, {format}, largest"], out[f"logits, {format}, mean"] = (
            difference.max().item(),
            difference.mean().item(),
        )
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="replace the numbers on file")
    now = everything()
    if parser.parse_args().write:
        (HERE / "run.json").write_text(json.dumps({"birth": machine(), **now[0]}, indent=1) + "\n")
        save_file(now[1], HERE / "logits.safetensors", metadata={"format": "pt"})
    for name, value in differences(now, kept()).items():
        print(f"{value:9.2e}  {name}")


if __name__ == "__main__":
    sys.exit(main())
