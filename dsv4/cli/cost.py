"""`dsv4 cost`: what a model costs at a context (FLOPs, cache bytes, machines), and V4 beside V3.2 and Llama."""

import json
import re
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from dsv4.checkpoint import write_atomically
from dsv4.cli import cost_tables
from dsv4.cli.common import resolve_checkpoint
from dsv4.config import AnyConfig, read_any
from dsv4.cost import compare, hardware, report
from dsv4.errors import UserError, nearest


def cost(
    model: Annotated[str, typer.Argument(help="A preset, v3.2, llama-405b, a config.json or a folder.")] = "",
    context: Annotated[str, typer.Option(help="Tokens, such as 4k,128k,1m (k = 1024).")] = "",
    batch: Annotated[int, typer.Option(help="Sequences decoded together.")] = 1,
    hardware_: Annotated[str, typer.Option("--hardware", help="Machines, such as h200x8,b200x8,cpu.")] = "h200x8",
    rate: Annotated[float, typer.Option(help="Tokens per second for each sequence, for the smallest machines.")] = 0.0,
    dtype: Annotated[str, typer.Option(help="published, fp8, bfloat16 or float32: weights and cache.")] = "published",
    scheme: Annotated[str, typer.Option(help="What a FLOP counts: a letter, or kind=weight,kind=weight.")] = "C",
    page: Annotated[int, typer.Option(help="Round the cache up to pages of that many tokens.")] = 1,
    measure: Annotated[bool, typer.Option(help="Run real layers and set counted beside executed (minutes).")] = False,
    html: Annotated[Path | None, typer.Option(help="Also write a page with plots.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Count what a million tokens cost. Without a model: V4-Pro and V4-Flash beside V3.2 and Llama-3.1-405B.

    Example: dsv4 cost pro --context 4k,128k,1m --hardware h200x8 --batch 8
    """
    weights = parse_scheme(scheme)
    contexts = parse_contexts(context)
    machines = parse_machines(hardware_)
    out: dict[str, Any] = {}
    shown: dict[str, AnyConfig] = {}
    if model:
        config = resolve_model(model)
        shown[model] = config
        asked = contexts or [c for c in compare.CONTEXTS if c <= config.max_position_embeddings]
        out["model"] = report.of_model(
            model, config, asked or [config.max_position_embeddings], batch=batch, machines=machines, dtype=dtype,
            scheme=weights, rate=rate, page_tokens=page,
        )  # fmt: skip
    else:
        for name, value, usual in (("batch", batch, 1), ("rate", rate, 0.0), ("dtype", dtype, "published")):
            if value != usual:
                raise UserError(f"--{name} {value} needs a model to count: name one, such as  dsv4 cost pro")
        out["comparison"] = report.comparison(contexts or compare.CONTEXTS, scheme=weights)
    if measure:
        from dsv4.bench.cost import measure_all

        out["measured"] = measure_all(lambda line: print(line, file=sys.stderr, flush=True))
    if html is not None:
        from dsv4.cost.page import page_of

        text = page_of(out, shown, machines)
        html.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(html, lambda path: path.write_text(text, encoding="utf-8"))
        print(f"wrote {html}", file=sys.stderr)
    if as_json:
        print(json.dumps(out))
    else:
        cost_tables.show(out)


def resolve_model(name: str) -> AnyConfig:
    """A known model by name, or the configuration of a file, a checkpoint or a run folder."""
    if name in report.KNOWN:
        return report.KNOWN[name]
    path = Path(name)
    if path.is_dir():
        return read_any(resolve_checkpoint(path))
    if path.is_file():
        return read_any(path)
    known = ", ".join(report.KNOWN)
    raise UserError(f"{name!r} is neither a model ({known}) nor a file or folder{nearest(name, report.KNOWN)}")


def parse_contexts(text: str) -> list[int]:
    """ "4k,128k,1m" -> tokens; k is 1024 and m 1024 x 1024."""
    out = []
    for part in text.split(",") if text else []:
        found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([km]?)\s*", part.lower())
        tokens = float(found[1]) * {"": 1, "k": 1024, "m": 1024 * 1024}[found[2]] if found else 0.0
        if tokens < 1 or tokens != int(tokens):
            raise UserError(f"context {part!r} is not a number of tokens: write 4096, 4k or 1m, with commas between")
        out.append(int(tokens))
    return out


def parse_machines(text: str) -> list[hardware.Machine]:
    """ "h200x8,cpu" -> machines; the CPU's rates are measured now."""
    names = [part.strip() for part in text.split(",") if part.strip()]
    if not names:
        raise UserError("--hardware names no machine: give at least one, such as h200x8")
    cpu = None
    if any(re.fullmatch(r"cpu(x\d+)?", name.lower()) for name in names):
        from dsv4.bench.ceilings import measured_cpu

        cpu = measured_cpu()
    return [hardware.machine(name, cpu) for name in names]


def parse_scheme(text: str) -> str | dict[str, float]:
    """A scheme's letter, or weights of one's own as kind=number pairs."""
    from dsv4.cost.flops import scheme_weights

    if "=" not in text:
        scheme_weights(text.upper())
        return text.upper()
    weights = {}
    for part in text.split(","):
        kind, _, value = part.partition("=")
        try:
            weights[kind.strip()] = float(value)
        except ValueError:
            raise UserError(f"weight {part!r} is not kind=number, such as core=2") from None
    scheme_weights(weights)
    return weights
