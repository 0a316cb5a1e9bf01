"""Checkpoints of a run: everything the next step depends on, written whole or not at all.

A run folder holds `checkpoints/step-000123/` (weights in the published layout, config.json, tokenizer.json, the
optimiser's tensors, state.json) and `checkpoints/latest`, a text file with the newest name. The batches depend on the
step number only, and nothing else in a step is random, so weights, buffers, momenta and step are the whole state.
"""

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from dsv4.checkpoint import load, read_config, save, write_atomically
from dsv4.errors import UserError
from dsv4.model import Transformer
from dsv4.text import Tokenizer
from dsv4.train.optim import HybridOptimizer


@dataclass
class Progress:
    """Where a run stands: updates done, tokens seen, seconds spent training."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0


def latest(folder: Path) -> Path | None:
    """The newest complete checkpoint of a run folder."""
    pointer = folder / "checkpoints" / "latest"
    if not pointer.exists():
        return None
    path = folder / "checkpoints" / pointer.read_text(encoding="utf-8").strip()
    if not path.is_dir():
        raise UserError(f"{pointer} names {path.name}, which is missing: write the name of a checkpoint into it")
    return path


def save_state(
    folder: Path,
    model: Transformer,
    optimizer: HybridOptimizer,
    tokenizer: Tokenizer,
    progress: Progress,
    settings: dict[str, Any],
    keep: int,
) -> Path:
    """Write a checkpoint beside the others under a temporary name, rename it, then drop all but the newest `keep`."""
    checkpoints = folder / "checkpoints"
    target = checkpoints / f"step-{progress.step:06d}"
    temporary = checkpoints / f".{target.name}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    save(model, temporary)
    tokenizer.save(temporary)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in optimizer.state_dict().items()}
    save_file(tensors, temporary / "optimizer.safetensors")
    state = {**vars(progress), "settings": settings}
    (temporary / "state.json").write_text(json.dumps(state, indent=1), encoding="utf-8")
    shutil.rmtree(target, ignore_errors=True)
    os.replace(temporary, target)
    write_atomically(checkpoints / "latest", lambda path: path.write_text(target.name, encoding="utf-8"))
    for old in sorted(checkpoints.glob("step-*"))[:-keep]:
        if old != target:
            shutil.rmtree(old, ignore_errors=True)
    return target


def load_state(path: Path, model: Transformer, optimizer: HybridOptimizer, settings: dict[str, Any]) -> Progress:
    """Continue from a checkpoint: fills model and optimiser in place. UserError if it belongs to another run."""
    try:
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        progress = Progress(state["step"], state["tokens"], state["seconds"])
        momenta = load_file(path / "optimizer.safetensors")
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise UserError(f"{path} is not a complete training checkpoint ({error}): resume from another one") from None
    different = _difference(state["settings"], settings)
    if different:
        raise UserError(
            f"the run was started with {different}: resume it with the same settings, or start anew with another --out"
        )
    if read_config(path) != model.config:
        raise UserError(f"{path} holds a model of another configuration: resume with the one it was started with")
    loaded = load(path, dtype=torch.float32)
    with torch.no_grad():
        for own, saved in zip(model.state_dict().values(), loaded.state_dict().values(), strict=True):
            own.copy_(saved)
    optimizer.load_state_dict(momenta)
    return progress


def _difference(old: dict[str, Any], new: dict[str, Any], where: str = "") -> str:
    """The first setting that differs, as `key=old value`; checkpoint and evaluation rhythm may differ freely."""
    for key in old.keys() | new.keys():
        name, a, b = f"{where}{key}", old.get(key), new.get(key)
        if name == "save" or a == b:
            continue
        if isinstance(a, dict) and isinstance(b, dict):
            return _difference(a, b, f"{name}.")
        return f"{name}={a!r}, not {b!r}"
    return ""
