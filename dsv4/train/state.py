"""Checkpoints of a run: everything the next step depends on, written whole or not at all.

The batches depend on the step number only, and nothing else in a step is random, so weights, buffers, momenta and step
are the whole state. Where it lies is checkpoint/folder.py's.
"""

import logging
import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from dsv4 import controls
from dsv4.checkpoint import RunFolder, load, read_config, save
from dsv4.checkpoint.save import write_tensors
from dsv4.errors import UserError, shown
from dsv4.files import (
    DIGESTS,
    TEMPORARY,
    check_digests,
    make_folder,
    read_json,
    reason_of,
    write_digests,
    write_json,
)
from dsv4.model import LanguageModel
from dsv4.model.init import fill, own_rows
from dsv4.settings import flat
from dsv4.text import Tokenizer
from dsv4.train.anticipate import FILE as ANTICIPATED
from dsv4.train.anticipate import Anticipation
from dsv4.train.optim import HybridOptimizer
from dsv4.train.parallel.processes import Processes
from dsv4.train.recipes import renamed
from dsv4.train.runconfig import RunConfig

log = logging.getLogger("dsv4")

SHARDED = "sharded"  # the folder of a checkpoint that several processes have written together

# Settings that a resumed run may change; what they were and are is logged. All others decide what was learned from.
CHANGEABLE = (
    "optim.",
    "schedule.",
    "indexer.",
    "anticipatory.",
    "save.",
    "parallel.",
    "recompute",
    "data.micro_batches",
    "data.workers",
)


@dataclass
class Progress:
    """Where a run stands: updates done, tokens seen, seconds spent training; the spike that it last went back from, and
    the update before which anticipatory routing ends then."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    anticipatory_until: int = 0
    spike: dict[str, Any] = field(default_factory=dict)


def save_state(
    folder: RunFolder,
    model: LanguageModel,
    optimizer: HybridOptimizer,
    tokenizer: Tokenizer,
    progress: Progress,
    settings: dict[str, Any],
    data: dict[str, Any],
    *,
    keep: int,
    diverging: bool = False,
    anticipation: Anticipation | None = None,
    processes: Processes | None = None,
    whole: bool = True,
) -> Path:
    """Write a checkpoint beside the others under a temporary name, rename it, then drop all but the newest `keep`.

    data: what identifies the training data. diverging: the loss is far above its past; the checkpoint from before
    that stays. FileError, and the older checkpoints as they were, if the machine does not let it be written.
    processes: those that share the run, all of which call this: each writes its part (parallel/state.py), the first one
    everything else. whole: with the whole weights besides, which go through the first one's memory.
    """
    processes = processes or Processes()
    about = {**vars(progress), "settings": settings, "data": data}
    before = folder.latest()
    temporary = folder.checkpoints / f".{folder.checkpoint(progress.step).name}{TEMPORARY}"
    safe = f"{before} is whole" if before else "there was no checkpoint before"
    if processes.is_first:
        make_folder(folder.checkpoints)
        shutil.rmtree(temporary, ignore_errors=True)
    try:
        if processes.several:
            _write_shares(temporary, model, optimizer, processes, whole=whole, safe=safe)
        else:
            save(model, temporary)
            tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in optimizer.state_dict().items()}
            write_tensors(temporary / "optimizer.safetensors", tensors, safe=safe)
        if anticipation is not None:
            anticipation.write(temporary, progress.step, safe=safe)
        if processes.is_first:
            tokenizer.save(temporary)
            write_json(temporary / "state.json", about, safe=safe)
            write_digests(temporary)
    except BaseException:
        if processes.is_first:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    if processes.is_first:  # a finished checkpoint gets its name and is the newest
        target = folder.put(temporary, progress.step, safe=safe)
        if diverging and before is not None:
            folder.set_last_good(before)
        folder.set_latest(target)
        if not diverging:
            folder.all_good()
        folder.drop_old(progress.step, keep)
    processes.wait()
    return folder.checkpoint(progress.step)


def _write_shares(
    temporary: Path, model: LanguageModel, optimizer: HybridOptimizer, processes: Processes, *, whole: bool, safe: str
) -> None:
    """What each process has of model and optimiser, and of the first one the whole weights or the configuration alone.
    FileError in all of them if it is one in any."""
    from dsv4.train.parallel.state import save_sharded, whole_weights

    if processes.is_first:
        make_folder(temporary)
    processes.wait()
    save_sharded(temporary / SHARDED, model, optimizer, safe=safe)
    weights = whole_weights(model) if whole else {}
    if not processes.is_first:
        return
    if not whole:
        write_json(temporary / "config.json", model.config.to_json(), safe=safe)
        return
    with torch.device("meta"):
        plain = controls.build(model.config)
    plain.load_state_dict(weights, assign=True)
    plain.stop_ids = model.stop_ids
    save(plain, temporary)


def load_state(
    path: Path,
    model: LanguageModel,
    optimizer: HybridOptimizer,
    settings: dict[str, Any],
    data: dict[str, Any],
    anticipation: Anticipation | None = None,
) -> tuple[Progress, dict[str, tuple[Any, Any]]]:
    """Continue from a checkpoint: fills model, optimiser and what was anticipated in place.

    Returns where it stands and which settings have changed since, each with the old and the new value. UserError,
    and nothing filled, if a file is damaged, or if the checkpoint belongs to another run.
    """
    if not (path / DIGESTS).exists():
        log.warning("%s has no %s: whether its files are as they were written cannot be told", path, DIGESTS)
    check_digests(path)
    remedy = "resume from another checkpoint"
    state = read_json(path / "state.json", "the training state", remedy)
    progress = _progress(state, path, remedy)
    changed = changes(_completed(state["settings"]), settings)
    for name, (old, new) in changed.items():
        if not name.startswith(CHANGEABLE):
            raise UserError(
                f"the run was started with {name}={shown(old)}, not {shown(new)}: leave that setting as it was (with "
                f"--config {RunFolder(path.parent.parent).config}), or start anew with another --out"
            )
    for name, value in data.items():
        if name in state["data"] and state["data"][name] != value:
            raise UserError(
                f"{path} was trained on other data ({name} {shown(state['data'][name])}, not {shown(value)}): "
                "resume it in its own run folder, or start anew with another --out"
            )
    if read_config(path) != model.config:
        raise UserError(f"{path} holds a model of another configuration: resume with the one it was started with")
    if (path / SHARDED).is_dir():
        from dsv4.train.parallel.state import load_sharded

        load_sharded(path / SHARDED, model, optimizer)
    else:
        momenta = _tensors(path / "optimizer.safetensors", remedy)
        loaded = load(path, dtype=torch.float32)
        optimizer.load_state_dict(momenta)
        copy_weights(loaded, model)
    if anticipation is not None and (path / ANTICIPATED).exists():
        anticipation.read(_tensors(path / ANTICIPATED, remedy))
    return progress, changed


def _tensors(path: Path, remedy: str) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} is damaged ({reason_of(error)}): {remedy}") from None


def copy_weights(source: LanguageModel, target: LanguageModel) -> None:
    """Fill a model in place with the weights and buffers of another of the same parts and sizes.

    UserError if they are not of the same parts, as with an MTP block that one of them lacks.
    """
    own, given = target.state_dict(), source.state_dict()
    if own.keys() != given.keys():
        lacking = next(iter(own.keys() ^ given.keys()))
        raise UserError(
            f"the weights to start from and the model do not have the same parts ({lacking} is in one alone): "
            f"set model.num_nextn_predict_layers={int(getattr(source, 'mtp', None) is not None)}"
        )
    with torch.no_grad():
        for name, tensor in own.items():
            fill(tensor, given[name])


def _completed(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings of a run, those that did not exist yet when it was started at their defaults."""
    full = {name: value for name, value in RunConfig().to_dict().items() if name != "model"}
    for name, value in renamed(settings).items():
        default = full.get(name)
        full[name] = {**default, **value} if isinstance(value, dict) and isinstance(default, dict) else value
    return full


def _progress(state: dict[str, Any], path: Path, remedy: str) -> Progress:
    found = {"anticipatory_until": 0, "spike": {}} | state  # runs of before have neither
    kinds = {"step": int, "tokens": int, "seconds": float, "settings": dict, "data": dict}
    kinds |= {"anticipatory_until": int, "spike": dict}
    for name, kind in kinds.items():
        value: Any = found.get(name)
        if type(value) is not kind or (kind is not dict and not 0 <= value < math.inf):
            raise UserError(f"{path / 'state.json'} is no training state ({name}={shown(value)}): {remedy}")
    return Progress(**{name: found[name] for name in vars(Progress())})


def changes(old: dict[str, Any], new: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The settings that differ, by dotted name: (old value, new value)."""
    was, now = dict(flat(old)), dict(flat(new))
    names = [*now, *(name for name in was if name not in now)]
    return {n: (was.get(n), now.get(n)) for n in names if was.get(n) != now.get(n)}


def not_finite(model: LanguageModel, optimizer: HybridOptimizer) -> str:
    """The name of a weight or momentum that holds a NaN or an infinity, "" if all are finite: of a sharded one, in what
    this process has of it."""
    return next((name for name, t in _state_tensors(model, optimizer) if not bool(torch.isfinite(t).all())), "")


def _state_tensors(model: LanguageModel, optimizer: HybridOptimizer) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in (*model.state_dict().items(), *optimizer.state_dict().items()):
        if tensor.is_floating_point():
            yield name, own_rows(tensor)[0]
