"""`dsv4 cost`: what a model costs at a context (FLOPs, cache bytes, machines), and V4 beside V3.2 and Llama."""

import json
import os
import re
import sys
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any

import typer

from dsv4.checkpoint import resolve_checkpoint
from dsv4.config import AnyConfig, read_any
from dsv4.cost import compare, hardware, report, tables
from dsv4.errors import FileError, UserError, nearest
from dsv4.files import make_folder, write_text

MOST_TOKENS = 1 << 30  # in a context; each model has a limit of its own below it
USUAL_MACHINE = "h200x8"


def cost(
    model: Annotated[str, typer.Argument(help="A preset, v3.2, llama-405b, a config.json or a folder.")] = "",
    context: Annotated[str, typer.Option(help="Tokens, such as 4k,128k,1m (k = 1024).")] = "",
    batch: Annotated[int, typer.Option(help="Sequences decoded together.")] = 1,
    hardware_: Annotated[
        str | None, typer.Option("--hardware", help=f"Machines, such as h200x8,b200x8,cpu; default {USUAL_MACHINE}.")
    ] = None,
    rate: Annotated[float, typer.Option(help="Tokens per second for each sequence, for the smallest machines.")] = 0.0,
    dtype: Annotated[str, typer.Option(help="published, fp8, bfloat16 or float32: weights and cache.")] = "published",
    scheme: Annotated[str, typer.Option(help="What a FLOP counts: a letter, or kind=weight,kind=weight.")] = "C",
    page: Annotated[int, typer.Option(help="Round the cache up to pages of that many tokens.")] = 1,
    measure: Annotated[
        bool, typer.Option(help="Run real layers, and show what they executed beside what is counted (minutes).")
    ] = False,
    details: Annotated[bool, typer.Option("--details", help="All tables, not only the summary.")] = False,
    html: Annotated[Path | None, typer.Option(help="Also write a page with plots.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object, with everything in it.")] = False,
) -> None:
    """Count what a million tokens cost. Without a model: V4-Pro and V4-Flash beside V3.2 and Llama-3.1-405B.

    Example: dsv4 cost pro --context 4k,128k,1m --hardware h200x8 --batch 8
    """
    weights = parse_scheme(scheme)
    contexts = parse_contexts(context)
    report.check_load(batch, rate, dtype, page)
    config = resolve_model(model) if model else None
    if config is None:
        _only_with_a_model(batch=(batch, 1), rate=(rate, 0.0), dtype=(dtype, "published"), page=(page, 1))
        if hardware_ is not None and html is None:
            raise UserError(f"--hardware {hardware_} needs a model or --html: name one, such as  dsv4 cost pro")
    report.check_context(config or report.KNOWN["pro"], contexts)
    check_names(hardware_)
    if html is not None:
        check_place(html)
    machines = parse_machines(USUAL_MACHINE if hardware_ is None else hardware_)
    out: dict[str, Any] = {}
    if config is not None:
        asked = contexts or [c for c in compare.CONTEXTS if c <= config.max_position_embeddings]
        out["model"] = report.of_model(
            model, config, asked or [config.max_position_embeddings], batch=batch, machines=machines, dtype=dtype,
            scheme=weights, rate=rate, page_tokens=page,
        )  # fmt: skip
    else:
        out["comparison"] = report.comparison(contexts or compare.CONTEXTS, scheme=weights)
    if measure:
        from dsv4.bench.cost import measure_all

        out["measured"] = measure_all(lambda line: print(line, file=sys.stderr, flush=True))
    if as_json:
        print(json.dumps(out))
    else:
        tables.show(out, details=details)
    if html is not None:  # last: what was counted is told by then, should the disk be full
        from dsv4.cost.page import page_of

        write_text(html, page_of(out, {model: config} if config is not None else {}, machines))
        print(f"wrote {html}", file=sys.stderr)


def _only_with_a_model(**given: tuple[object, object]) -> None:
    for name, (value, usual) in given.items():
        if value != usual:
            raise UserError(f"--{name} {value} needs a model to count: name one, such as  dsv4 cost pro")


def check_place(html: Path) -> None:
    """FileError, before anything is counted, where a page cannot be written; makes its folder."""
    if os.path.isdir(html):  # unlike Path.is_dir it does not raise for a name that is too long
        raise FileError(f"cannot write {html}: it is a folder; name a file in it, such as {html / 'cost.html'}")
    make_folder(html.parent)
    if not os.access(html.parent, os.W_OK):
        raise FileError(f"cannot write {html}: {html.parent} is read-only; name a file in a folder of yours")


def resolve_model(name: str) -> AnyConfig:
    """A known model by name, or the configuration of a file, a checkpoint or a run folder."""
    if name in report.KNOWN:
        return report.KNOWN[name]
    if os.path.isdir(name):
        return read_any(resolve_checkpoint(name))
    if os.path.isfile(name):
        return read_any(Path(name))
    known = ", ".join(report.KNOWN)
    raise UserError(f"{name[:100]!r} is neither a model ({known}) nor a file or folder{nearest(name, report.KNOWN)}")


def parse_contexts(text: str) -> list[int]:
    """ "4k,128k,1m" -> tokens, each once; k is 1024 and m 1024 x 1024."""
    out: dict[int, None] = {}
    for part in text.split(",") if text else []:
        found = re.fullmatch(r"\s*0*([0-9]+)(\.[0-9]{1,20})?\s*([km]?)\s*", part.lower())
        tokens = Fraction(0)
        if found and len(found[1]) > len(str(MOST_TOKENS)):
            tokens = Fraction(MOST_TOKENS + 1)  # not read: int itself refuses thousands of digits
        elif found:
            tokens = Fraction(found[1] + (found[2] or "")) * {"": 1, "k": 1024, "m": 1024 * 1024}[found[3]]
        if tokens < 1 or tokens.denominator != 1:
            raise UserError(
                f"context {part[:40]!r} is not a number of tokens: write 4096, 4k or 1m, with commas between"
            )
        if tokens > MOST_TOKENS:
            raise UserError(f"context {part[:40]!r} is beyond all models: give at most {MOST_TOKENS:,} tokens")
        out[int(tokens)] = None
    return list(out)


def check_names(text: str | None) -> None:
    """UserError for a machine that is not known, before any work; a CPU has no rates yet."""
    for name in _names(text) if text is not None else []:
        if not _is_cpu(name):
            hardware.machine(name)


def _names(text: str) -> list[str]:
    names = [part.strip() for part in text.split(",") if part.strip()]
    if not names:
        raise UserError(f"--hardware names no machine: give at least one, such as {USUAL_MACHINE}")
    return names


def _is_cpu(name: str) -> bool:
    return re.fullmatch(r"cpu(x[0-9]+)?", name.lower()) is not None


def parse_machines(text: str) -> list[hardware.Machine]:
    """ "h200x8,cpu" -> machines; the CPU's rates are measured now."""
    names, cpu = _names(text), None
    if any(_is_cpu(name) for name in names):
        from dsv4.measure.ceilings import measured_cpu

        cpu = measured_cpu()
    return [hardware.machine(name, cpu) for name in names]


def parse_scheme(text: str) -> str | dict[str, float]:
    """A scheme's letter, or weights of one's own as kind=number pairs."""
    from dsv4.cost.flops import scheme_weights

    if "=" not in text:
        letter = text.strip().upper()
        scheme_weights(letter)
        return letter
    weights = {}
    for part in text.split(","):
        kind, _, value = part.partition("=")
        try:
            weights[kind.strip()] = float(value)
        except ValueError:
            raise UserError(f"weight {part[:40]!r} is not kind=number, such as core=2") from None
    scheme_weights(weights)
    return weights
