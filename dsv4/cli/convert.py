"""`dsv4 convert`: a checkpoint in another layout, or with its matrices in other formats."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

from dsv4.checkpoint.convert import FORMATS, TARGETS, Converted
from dsv4.checkpoint.convert import convert as run
from dsv4.checkpoint.stream import as_bytes
from dsv4.cli.progress import byte_progress


def convert(
    source: Annotated[Path, Argument(help="A run folder (its latest checkpoint) or a checkpoint folder.")],
    target: Annotated[Path, Argument(help="The folder to write.")],
    layout: Annotated[str, Option(help=f"Names of the tensors: {', '.join(TARGETS)}.")] = "published",
    weights: Annotated[str, Option(help=f"Formats of the matrices: {', '.join(FORMATS)}.")] = "released",
    shard: Annotated[str, Option(help="Bytes of a weight file at most.")] = "5GB",
    quiet: Annotated[bool, Option("--quiet", help="No line for every tensor.")] = False,
    as_json: Annotated[bool, Option("--json", help="Print a JSON object for every tensor, one a line.")] = False,
) -> None:
    """Write a checkpoint in another layout, or with its matrices in other formats.

    One tensor is in memory at a time. What was written is read again: for every tensor one line says its format before
    and after, the sha256 of its numbers, and whether they are the same numbers (they are not where they were rounded).
    released leaves formats as they are; fp8 and fp4 are the released files' (fp4: of routed experts, all else FP8). FP4
    becomes FP8 without changing a number, or is refused.

    Example: dsv4 convert DeepSeek-V4-Flash flash-fp8 --weights fp8
    For transformers: dsv4 convert runs/demo demo-hf --layout transformers --weights bfloat16
    """

    def say(row: Converted) -> None:
        if as_json:
            print(json.dumps({**vars(row), "same": row.same}))
        elif not quiet:
            print(_line(row))

    most = as_bytes(shard)
    with byte_progress() as shown:
        rows = run(source, target, layout, weights, max_shard_bytes=most, shown=shown, each=say)  # type: ignore[arg-type]
    sys.stdout.flush()
    changed = sum(not row.same for row in rows)
    note = f"; {changed} were rounded: their numbers are not those of the source" if changed else ""
    typer.echo(
        f"{target}: the numbers of {len(rows) - changed} of {len(rows)} tensors are those of {source}{note}", err=True
    )


def _line(row: Converted) -> str:
    format = row.before if row.before == row.after else f"{row.before} -> {row.after}"
    kept = row.digest_before if row.same else f"{row.digest_before} -> {row.digest_after} (rounded)"
    return f"{row.name}  {format}  {kept}"
