"""What the verbs share: their common options, and what the texts given for them mean."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
from typer import Argument, Option

from dsv4.cache import format_name
from dsv4.engine import Completion, Engine
from dsv4.errors import UserError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

ModelFolder = Annotated[
    str | None,
    Argument(
        help="A run folder (its latest checkpoint) or a checkpoint folder; none with --from-hub.", show_default=False
    ),
]
FromHub = Annotated[
    str,
    Option(metavar="NAME[@REVISION]", help="A model of the Hugging Face Hub in place of a folder; it is downloaded."),
]
MaxTokens = Annotated[int, Option(help="New tokens at most.")]
Temperature = Annotated[float, Option(help="Of what is drawn; 0: always the likeliest token.")]
TopK = Annotated[int, Option(help="Draw from the k most likely tokens; 0: off.")]
TopP = Annotated[float, Option(help="Draw from the most likely tokens with this total share; 1: off.")]
MinP = Annotated[float, Option(help="Leave out what is less likely than this times the likeliest; 0: off.")]
Seed = Annotated[int | None, Option(help="The same seed draws the same text.")]
Stop = Annotated[list[str] | None, Option(help="End before this string; repeatable.")]
Device = Annotated[str, Option(help="auto, cpu, cuda or cuda:N.")]
Dtype = Annotated[str, Option(help="Of the large matrices: float32, bfloat16 or float16.")]
Cache = Annotated[str, Option(help="Of the memory: packed (FP8 and FP4), float32, bfloat16, float16; default: dtype.")]

Speculative = Annotated[
    int, Option(help="Tokens that the MTP block or DSpark drafter drafts a step, such as 1; 0: off.")
]

Threads = Annotated[int, Option(min=0, help="Of the processor, for one operation; 0: as torch has them.")]

Weights = Annotated[str, Option(help="plain: all matrices in dtype; released: FP8 and FP4 as they are on file.")]
Numbers = Annotated[str, Option(help="published: rounded where the released code rounds, slowly; plain: not.")]
WeightMemory = Annotated[
    str, Option("--memory", help="Bytes for the weights, such as 16GiB; layers beyond are read from disk as they run.")
]


def resolve_device(name: str) -> torch.device:
    """auto (cuda where there is one), cpu, cuda, or cuda:N; UserError naming what exists."""
    there = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name not in there and (name != "cuda" or not torch.cuda.is_available()):
        raise UserError(f"device {name!r} is not available: this machine has {', '.join(there)}")
    return torch.device(name)


def find_model(folder: str | None, from_hub: str) -> Path:
    """The folder that was given, or that of a model of the hub; UserError unless it is one of them."""
    if not from_hub and folder is not None:
        return Path(folder)
    if folder is not None or not from_hub:
        raise UserError("give the folder of a model or --from-hub NAME, and not both")
    from dsv4.checkpoint.hub import download

    return download(from_hub)


def open_engine(
    folder: str | None, from_hub: str, device: str, dtype: str, cache: str, threads: int = 0, **options: Any
) -> Engine:
    """The engine of a run or checkpoint folder or of a model of the hub, as the options above say; all of them are
    judged first."""
    place, numbers, memory_format = resolve_device(device), resolve_dtype(dtype), resolve_cache(cache)
    if threads:
        torch.set_num_threads(threads)
    path = find_model(folder, from_hub)
    return Engine.open(path, device=place, dtype=numbers, memory_format=memory_format, **options)


def acceptance(done: Sequence[Completion]) -> str:
    """What speculation came to, for a person."""
    drafted, accepted, new = sum(c.drafted for c in done), sum(c.accepted for c in done), sum(len(c.ids) for c in done)
    if not drafted:
        return "nothing was drafted: the texts were too short"
    return f"{accepted} of {drafted} drafted tokens were accepted ({accepted / drafted:.0%}), for {new} new tokens"


def resolve_cache(name: str) -> str | None:
    """The format of memories, None for the model's dtype."""
    return format_name(name) if name else None


def resolve_dtype(name: str) -> torch.dtype:
    if name not in DTYPES:
        raise UserError(f"dtype {name!r} is unknown: use one of {', '.join(DTYPES)}")
    return DTYPES[name]
