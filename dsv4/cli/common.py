"""What the verbs share: their common options, finding a checkpoint, opening its model and tokenizer on a device."""

from pathlib import Path
from typing import Annotated

import torch
from typer import Argument, Option

from dsv4.cache import format_name
from dsv4.checkpoint import load
from dsv4.errors import UserError
from dsv4.model import Transformer
from dsv4.text import Tokenizer, load_tokenizer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

ModelFolder = Annotated[Path, Argument(help="A run folder (its latest checkpoint) or a checkpoint folder.")]
MaxTokens = Annotated[int, Option(help="New tokens at most.")]
Temperature = Annotated[float, Option(help="0 is greedy.")]
TopK = Annotated[int, Option(help="Draw from the k most likely tokens; 0: off.")]
TopP = Annotated[float, Option(help="Draw from the most likely tokens with this total share; 1: off.")]
MinP = Annotated[float, Option(help="Leave out what is less likely than this times the likeliest; 0: off.")]
Seed = Annotated[int | None, Option(help="The same seed draws the same text.")]
Stop = Annotated[list[str] | None, Option(help="End before this string; repeatable.")]
Device = Annotated[str, Option(help="auto, cpu, cuda or cuda:N.")]
Dtype = Annotated[str, Option(help="Of the large matrices: float32, bfloat16 or float16.")]
Cache = Annotated[str, Option(help="Of the memory: packed (FP8 and FP4), float32, bfloat16, float16; default: dtype.")]


def resolve_checkpoint(path: str | Path) -> Path:
    """The checkpoint folder that `path` means: itself, or the latest checkpoint of a run folder.

    A run folder holds `checkpoints/latest`, a text file that names one of the folders beside it. UserError if
    there is no such folder, or nothing in it to load.
    """
    path = Path(path)
    if not path.is_dir():
        what = "is a file" if path.exists() else "does not exist"
        raise UserError(f"{path} {what}: give the folder of a run or of a checkpoint")
    latest = path / "checkpoints" / "latest"
    if latest.is_file():
        return _named_by(latest)
    if (path / "config.json").is_file():
        return path
    if (path / "checkpoints").is_dir():
        raise UserError(f"the run {path} has no finished checkpoint yet: train until it has saved one")
    raise UserError(f"{path} holds neither config.json nor checkpoints/latest: give a run or checkpoint folder")


def _named_by(latest: Path) -> Path:
    name = latest.read_text(encoding="utf-8", errors="replace").strip()
    folder = latest.parent / name
    if name != folder.name or not folder.is_dir():
        there = ", ".join(sorted(p.name for p in latest.parent.glob("[!.]*") if p.is_dir())) or "no folder"
        raise UserError(f"{latest} names {name!r}, which is not a checkpoint beside it: name one of {there}")
    return folder


def open_model(path: str | Path, device: str = "auto", dtype: str = "float32") -> tuple[Transformer, Tokenizer]:
    """Model and tokenizer of a run or checkpoint folder; UserError, before weights are read, if one is missing."""
    folder = resolve_checkpoint(path)
    place, number_format = resolve_device(device), resolve_dtype(dtype)
    if not (folder / "tokenizer.json").is_file():
        raise UserError(f"{folder} has no tokenizer.json: copy in the one that the model was trained with")
    tokenizer = load_tokenizer(folder)
    return load(folder, dtype=number_format, device=place), tokenizer


def resolve_device(name: str) -> torch.device:
    """auto (cuda where there is one), cpu, cuda, or cuda:N; UserError naming what exists."""
    there = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name not in there and (name != "cuda" or not torch.cuda.is_available()):
        raise UserError(f"device {name!r} is not available: this machine has {', '.join(there)}")
    return torch.device(name)


def resolve_cache(name: str) -> str | None:
    """The format of memories, None for the model's dtype."""
    return format_name(name) if name else None


def resolve_dtype(name: str) -> torch.dtype:
    if name not in DTYPES:
        raise UserError(f"dtype {name!r} is unknown: use one of {', '.join(DTYPES)}")
    return DTYPES[name]
