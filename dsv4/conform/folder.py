"""The kit as files, for ports that read no Python: a checkpoint, the cases, and their answers.

    model/config.json, model/model.safetensors   the model to load, published names, every number exact in BF16
    vectors.safetensors                          what is given and what is right: NNN.given.NAME, NNN.right.NAME
    manifest.json                                the cases in order, tolerances and reasons, the mistakes looked for

A port may also write its answers into a .safetensors file, NNN.right.NAME each, and have that judged.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsv4 import files
from dsv4.checkpoint import save, write_tensors
from dsv4.conform.cases import SHARE, Case
from dsv4.conform.mistakes import MISTAKES
from dsv4.conform.parts import PARTS
from dsv4.conform.vectors import SEED, TOLERANCE, Kit, kit_model

CALLS = {
    "part": "one part of the model, in one of its layers",
    "layer": "one layer: streams [T, N, M], ids and the lengths of calls -> streams",
    "logits": "a new sequence, fed in calls (below 0: so many tokens are taken back) -> logits of every token fed; "
              "`before`, if not empty, is another sequence that runs first in the same engine",
    "batch": "several new sequences side by side -> the logits of each",
    "mtp": "row t: the streams at t and the token at t+1 -> the MTP block's logits of the token at t+2",
    "memory": "after a prompt: window rows, entries, and index keys (not rotated by Hadamard) of each layer",
}  # fmt: skip


def write(kit: Kit, folder: Path) -> dict[str, Any]:
    """Write all of it; returns the manifest. FileError if the machine does not let it be written."""
    files.make_folder(folder)
    save(kit_model(), folder / "model")
    tensors: dict[str, Tensor] = {}
    known: dict[tuple[str, tuple[int, ...], bytes], str] = {}  # what is in the file already -> its name there

    def place(name: str, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        value = value.detach().clone().contiguous()
        key = str(value.dtype), tuple(value.shape), value.reshape(-1).view(torch.uint8).numpy().tobytes()
        if key not in known:
            known[key] = name
            tensors[name] = value
        return known[key]

    rows = []
    for number, case in enumerate(kit.cases):
        given = {name: place(tensor_name(number, "given", name), value) for name, value in case.given.items()}
        answers = kit.answer(case)
        right = {name: place(tensor_name(number, "right", name), value) for name, value in answers.items()}
        rows.append({**describe(case), "number": number, "given": given, "right": right})
    write_tensors(folder / "vectors.safetensors", tensors)
    manifest = {
        "birth": birth(kit),
        "calls": CALLS,
        "parts": {name: {"takes": p.takes, "gives": p.gives, "about": p.about} for name, p in PARTS.items()},
        "measures": {name: {"allowed": allowed, "why": why} for name, (allowed, why) in TOLERANCE.items()},
        "mistakes": {name: {"right": m.right, "seen": m.seen} for name, m in MISTAKES.items()},
        "sha256": {name: files.sha256_of(folder / name) for name in ("model/model.safetensors", "vectors.safetensors")},
        "cases": rows,
    }
    files.write_json(folder / "manifest.json", manifest)
    return manifest


def tensor_name(number: int, side: str, name: str) -> str:
    return f"{number:03d}.{side}.{name}"


def birth(kit: Kit) -> dict[str, Any]:
    """How the vectors came to be."""
    return {
        "made by": "dsv4/conform/plain.py: the model in plain float64, written from the specification, sharing no code "
                   "with the package's model; number formats by dsv4/conform/codecs.py",
        "precision": "float64 throughout; what is given is exact in BF16. Cases of measure `share` are rounded to BF16 "
                     "where the released code casts to it",
        "checked against": "transformers 5.23 wherever it has the part, and numbers of the released inference code",
        "seed": SEED,
        "config": kit.config.to_json(),
    }  # fmt: skip


def describe(case: Case) -> dict[str, Any]:
    return {
        "component": case.component, "name": case.name, "call": case.call, "what": case.what, "layer": case.layer,
        "measure": case.measure, "bf16": case.measure == SHARE, "mistakes": list(case.mistakes),
    }  # fmt: skip
