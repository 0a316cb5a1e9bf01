"""`dsv4 doctor`: what this machine has, which form serves each op and why others do not, and whether they agree."""

import json
import os
import platform
from importlib import metadata
from typing import Annotated, Any

import torch
import typer

from dsv4 import ModelConfig, Transformer, __version__, ops


def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False) -> None:
    """Check the installation.

    Example: dsv4 doctor
    """
    report = examine()
    if as_json:
        print(json.dumps(report))
    else:
        for key, value in report.items():
            if isinstance(value, dict):
                print(f"{key}:")
                for name, what in value.items():
                    print(f"  {name:22s} {what}")
            else:
                print(f"{key:24s} {value}")
    if not report["self-test"].startswith("ok"):
        raise typer.Exit(1)


def examine() -> dict[str, Any]:
    """Everything doctor prints, as one dict."""
    return {
        "dsv4": __version__,
        "python": platform.python_version(),
        "cpu": f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}",
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "packages": {name: _version(name) for name in ("torch", "safetensors", "tokenizers", "numpy", "transformers")},
        "ops, by DSV4_OPS": ops.wanted(),
        "backends": backends(),
        "self-test": _self_test(),
    }  # fmt: skip


def backends() -> dict[str, str]:
    """For every op the forms that serve plain fp32 tensors on the CPU, the fastest first, and why others do not."""
    found = {}
    for op in ops.TABLE:
        reasons = ops.explain(op)
        serving = [form for form, reason in reasons.items() if not reason]
        others = "; ".join(f"{form}: {reason}" for form, reason in reasons.items() if reason)
        first, *rest = serving
        found[op] = first + (f", then {', '.join(rest)}" if rest else "") + (f" ({others})" if others else "")
    return found


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


@torch.no_grad()
def _self_test() -> str:
    """A tiny model: the active backends against the reference, and token by token against the whole."""
    torch.manual_seed(0)
    model = Transformer(ModelConfig.preset("tiny"))
    ids = torch.randint(0, model.config.vocab_size, (140,))
    whole = model(ids)
    with ops.using("reference"):
        backend = (model(ids) - whole).abs().max().item()
    cache = model.new_cache()
    stream = torch.cat([model(ids[i : i + 1], cache=cache) for i in range(len(ids))])
    paths = (stream - whole).abs().max().item()
    verdict = "ok" if max(backend, paths) < 1e-4 else "FAILED"
    return f"{verdict}: active ops = reference within {backend:.1e}, token by token = whole within {paths:.1e}"
