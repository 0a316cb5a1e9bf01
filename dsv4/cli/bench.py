"""`dsv4 bench`: the reports of dsv4/bench. What is measured, and how, is said there."""

import json
import sys
from pathlib import Path
from typing import Annotated, TypeVar

import typer

bench = typer.Typer(
    no_args_is_help=True,
    help="""Measure: is it right, and how fast? One subcommand a report.

    Example: dsv4 bench decode --format packed
    """,
)
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object; what is shown meanwhile goes to stderr.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Preset = Annotated[str, typer.Argument(help="Of the model: tiny, small, bench or base; default: as the device bears.")]
Threads = Annotated[int, typer.Option(min=0, help="Of the processor; 0: as torch has them.")]
Minutes = Annotated[float, typer.Option(help="Budget; what does not fit is skipped, and said.")]


def _note(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


@bench.command()
def decode(
    format: Annotated[str, typer.Option(help="Of the memory, such as packed,float32; default: all.")] = "",
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """What a decode step costs beside its arithmetic, batch 1 to 64: torch operations, planning, time.

    Example: dsv4 bench decode --format packed --json
    """
    from dsv4.bench.decode import TINY, lines, measure
    from dsv4.cli.common import resolve_device

    rows = measure(TINY(), [f.strip() for f in format.split(",")] if format else None, resolve_device(device), _note)
    if as_json:
        print(json.dumps({"rows": rows}))
    else:
        print("\n".join(lines(rows)))


@bench.command()
def frontier(
    preset: Preset = "bench",
    context: Annotated[str, typer.Option(help="Tokens, such as 1k,8k,32k (k = 1024).")] = "1k,4k,8k,32k",
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16; default: float32, with vllm bfloat16.")] = "",
    cache: Annotated[str, typer.Option(help="float32, bfloat16, packed; default: the dtype, with vllm packed.")] = "",
    weights: Annotated[str, typer.Option(help="released: in FP8 and FP4; default: in the dtype.")] = "",
    batch: Annotated[int, typer.Option(min=1, help="Also decode so many sequences side by side.")] = 1,
    against: Annotated[str, typer.Option(help="Peers on the same weights: transformers,llama,vllm,nano.")] = "",
    peer_python: Annotated[
        str, typer.Option(help="The Python that has llama, vllm or nano; default: DSV4_LLAMA_PYTHON and so on.")
    ] = "",
    repeats: Annotated[int, typer.Option(min=1, help="Passes over the prompt; figures are medians.")] = 3,
    threads: Threads = 0,
    ceiling: Annotated[bool, typer.Option("--ceiling", help="Show what this machine would do at best.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Draw all who ran into this .svg.")] = None,
    out: Annotated[Path, typer.Option(help="The rows, as JSON.")] = Path("reports/frontier.json"),
    as_json: AsJson = False,
) -> None:
    """Prefill and decode over the length of the context on this processor, as shares of what it can do at best.

    Example: dsv4 bench frontier --context 1k,8k --against transformers --ceiling --plot reports/frontier.svg
    """
    import torch

    from dsv4.bench import show
    from dsv4.bench.frontier import measure, plan
    from dsv4.cli.cost import parse_contexts
    from dsv4.errors import UserError
    from dsv4.files import make_folder, write_json, write_text

    if not context.strip():
        raise UserError("--context is empty: give numbers of tokens, such as 1k,8k")
    if plot and plot.suffix != ".svg":
        raise UserError(f"--plot {plot} is no .svg file: give one, such as reports/frontier.svg")
    contexts = sorted(parse_contexts(context))
    if threads:
        torch.set_num_threads(threads)
    names = list(dict.fromkeys(name.strip() for name in against.split(",") if name.strip()))
    planned = plan(preset, dtype, cache, contexts, repeats, names, peer_python, weights=weights, batch=batch)
    for path in (out, plot):
        if path:
            make_folder(path.parent)
    rows = []
    report = {"model": planned.name, "config": planned.config.to_json(), "peers": planned.versions, "rows": rows}
    for row in measure(planned, _note):
        rows.append(row)
        write_json(out, report)  # what is there when somebody stops it is kept
    if plot:
        write_text(plot, show.plot(rows))
    print(json.dumps(report) if as_json else "\n".join(show.lines(rows, ceiling)))
    if any("skipped" in row for row in rows):
        raise typer.Exit(1)


@bench.command()
def inspect(
    shards: Annotated[int, typer.Option(min=1, max=10_000, help="Files that each model is in.")] = 60,
    repeats: Annotated[int, typer.Option(min=1, help="Runs; the time is their median.")] = 5,
    as_json: AsJson = False,
) -> None:
    """How long dsv4 inspect takes on the released models: real headers and index, the tensors holes in sparse files.

    Example: dsv4 bench inspect --shards 60
    """
    from tempfile import TemporaryDirectory

    from dsv4.bench.inspect import lines, measure

    with TemporaryDirectory() as folder:
        rows = measure(Path(folder), shards, repeats, _note)
    print(json.dumps({"rows": rows}) if as_json else "\n".join(lines(rows)))


@bench.command()
def layer(
    layers: Annotated[str, typer.Option(help="Models or kinds, such as flash:csa,pro,v3.2; default: all.")] = "",
    context: Annotated[str, typer.Option(help="Tokens that are remembered, such as 64k or 1m.")] = "1m",
    repeats: Annotated[int, typer.Option(min=1, help="Tokens decoded by each layer; figures are medians.")] = 9,
    each_op: Annotated[
        bool, typer.Option("--ops", help="Also the time of each op, as a share of its roofline.")
    ] = False,
    threads: Threads = 0,
    out: Annotated[Path, typer.Option(help="The rows, as JSON.")] = Path("reports/layer.json"),
    as_json: AsJson = False,
) -> None:
    """One layer of each kind of V4-Flash, V4-Pro and V3.2 at its real width, decoding at the end of a million tokens.

    Example: dsv4 bench layer --layers flash,v3.2 --context 256k
    """
    import torch

    from dsv4.bench.layer import choose, lines, measure
    from dsv4.files import make_folder, write_json

    tokens, chosen = _one_context(context), choose(layers)
    if threads:
        torch.set_num_threads(threads)
    make_folder(out.parent)
    found = measure(chosen, tokens, repeats, _note, each_op=each_op)
    write_json(out, found)
    print(json.dumps(found) if as_json else "\n".join(lines(found)))


@bench.command()
def million(
    preset: Preset = "bench",
    context: Annotated[str, typer.Option(help="Tokens of the prompt, such as 16k or 1m.")] = "1m",
    dtype: Annotated[
        str, typer.Option(help="float32, bfloat16, or auto: which the processor multiplies faster.")
    ] = "auto",
    cache: Annotated[str, typer.Option(help="Its format: packed, bfloat16, float32.")] = "packed",
    needle: Annotated[bool, typer.Option("--needle", help="Also whether a few tokens far back reach a query.")] = False,
    needle_depth: Annotated[
        float | None, typer.Option(help="Where it stands, 0 to 1; default: drawn, of a long context in the last 1/16.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the weights and of the needle's place.")] = 0,
    threads: Threads = 0,
    out: Annotated[Path, typer.Option(help="The report, as JSON.")] = Path("reports/million.json"),
    as_json: AsJson = False,
) -> None:
    """A million tokens of real text: prefill, decoding on the way, the cache beside its formula, memory in all.

    Takes about ten minutes for 1m; Ctrl-C ends it with what was measured.

    Example: dsv4 bench million --context 64k --needle
    """
    import torch

    from dsv4.bench.million import Options, lines, measure
    from dsv4.cache import format_name
    from dsv4.cli.common import resolve_dtype
    from dsv4.cli.progress import reading_progress
    from dsv4.files import make_folder, write_json

    tokens, number = _one_context(context), None if dtype == "auto" else resolve_dtype(dtype)
    options = Options(preset, tokens, number, format_name(cache), needle, needle_depth, seed)
    if threads:
        torch.set_num_threads(threads)
    make_folder(out.parent)
    with reading_progress() as show:
        found = measure(options, _note, show)
    write_json(out, found)
    print(json.dumps(found) if as_json else "\n".join(lines(found)))
    if found["stopped_at"] is not None:
        raise typer.Exit(1)


@bench.command()
def ops(
    preset: Preset = "bench",
    context: Annotated[str, typer.Option(help="Tokens at whose end the step and the chunk stand.")] = "8k",
    dtype: Annotated[str, typer.Option(help="Of weights and activations: float32 or bfloat16.")] = "float32",
    cache: Annotated[str, typer.Option(help="Its format: float32, bfloat16, packed; default: that of the dtype.")] = "",
    repeats: Annotated[int, typer.Option(min=1, help="Steps and chunks; figures are medians.")] = 9,
    threads: Threads = 0,
    out: Annotated[Path, typer.Option(help="The rows, as JSON.")] = Path("reports/ops.json"),
    as_json: AsJson = False,
) -> None:
    """Every op of a decode step and of a chunk of prefill, timed in place, as a share of this processor's best.

    Example: dsv4 bench ops --context 8k --dtype bfloat16 --cache packed
    """
    import torch

    from dsv4.bench.ops import lines, measure
    from dsv4.cache import format_name
    from dsv4.cli.common import resolve_dtype
    from dsv4.files import make_folder, write_json

    tokens, number = _one_context(context), resolve_dtype(dtype)
    format = format_name(cache or dtype)
    if threads:
        torch.set_num_threads(threads)
    make_folder(out.parent)
    rows = measure(preset, number, format, tokens, repeats, _note)
    write_json(out, {"rows": rows})
    print(json.dumps({"rows": rows}) if as_json else "\n".join(lines(rows)))


def _one_context(text: str) -> int:
    from dsv4.cli.cost import parse_contexts
    from dsv4.errors import UserError

    contexts = parse_contexts(text)
    if len(contexts) != 1:
        raise UserError(f"--context {text[:40]!r} must be one number of tokens, such as 8k")
    return contexts[0]


@bench.command()
def speculative(
    model: Annotated[str, typer.Argument(help="A run or checkpoint folder, or a preset with random weights.")],
    drafts: Annotated[str, typer.Option(help="Tokens drafted a step, such as 1,2,3.")] = "1,2",
    batch: Annotated[str, typer.Option(help="Prompts that decode together, such as 1,8.")] = "1,8",
    temperature: Annotated[str, typer.Option(help="Such as 0,0.8; 0 is greedy.")] = "0,1",
    tokens: Annotated[int, typer.Option(min=2, help="New tokens of each prompt.")] = 128,
    dtype: Annotated[str, typer.Option(help="Of weights and activations: float32 or bfloat16.")] = "float32",
    cache: Annotated[str, typer.Option(help="Its format: float32, bfloat16, packed; default: that of the dtype.")] = "",
    device: Device = "auto",
    repeats: Annotated[int, typer.Option(min=1, help="Of everything; figures are medians.")] = 3,
    threads: Threads = 0,
    out: Annotated[Path, typer.Option(help="The rows, as JSON.")] = Path("reports/speculative.json"),
    as_json: AsJson = False,
) -> None:
    """Speculative decoding beside plain decoding: drafts accepted, tokens per model call, tokens per second.

    A model accepts drafts when its MTP block was trained with it; random weights show what drafting costs.

    Example: dsv4 bench speculative runs/mine --drafts 1,2,3 --batch 1
    """
    import torch

    from dsv4.bench.speculative import lines, measure, open_subject
    from dsv4.cache import format_name
    from dsv4.cli.common import resolve_device, resolve_dtype
    from dsv4.files import make_folder, write_json

    depths, batches = _numbers("drafts", drafts, int), _numbers("batch", batch, int)
    temperatures = _numbers("temperature", temperature, float)
    number, place, format = resolve_dtype(dtype), resolve_device(device), format_name(cache or dtype)
    if threads:
        torch.set_num_threads(threads)
    make_folder(out.parent)
    subject = open_subject(model, number, place, format)
    rows = measure(subject, depths, batches, temperatures, tokens, repeats, _note)
    write_json(out, {"rows": rows})
    print(json.dumps({"rows": rows}) if as_json else "\n".join(lines(rows)))


Number = TypeVar("Number", int, float)


def _numbers(name: str, text: str, kind: type[Number]) -> list[Number]:
    """Numbers with commas between them; UserError for anything else."""
    from dsv4.errors import UserError

    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"--{name} {text!r} must be numbers with commas between them, such as 1,2") from None


@bench.command()
def speed(
    preset: Preset = "",
    device: Device = "auto",
    minutes: Minutes = 9.0,
    out: Annotated[Path, typer.Option(help="The report.")] = Path("reports/speed.json"),
    as_json: AsJson = False,
) -> None:
    """Prefill, decode and training beside what the device can do at best; on a CPU at small sizes.

    Example: dsv4 bench speed base --minutes 5
    """
    _stages(("ceilings", "speed"), preset, device, minutes, out, as_json)


@bench.command()
def train(
    preset: Preset = "bench",
    context: Annotated[str, typer.Option(help="Tokens of a document, such as 1k,4k,16k (k = 1024).")] = "1k,4k",
    batch: Annotated[int, typer.Option(min=1, help="Documents in a step.")] = 1,
    dtype: Annotated[
        str, typer.Option(help="Of the computation: float32 or bfloat16; weights are float32.")
    ] = "float32",
    against: Annotated[str, typer.Option(help="A peer on the same weights and tokens: transformers.")] = "",
    steps: Annotated[int, typer.Option(min=1, help="Figures are medians; the first of several is left out.")] = 4,
    recompute: Annotated[
        bool, typer.Option("--recompute", help="Compute blocks again in the backward pass: slower, less memory.")
    ] = False,
    profile: Annotated[bool, typer.Option("--profile", help="Also where the time goes, op by op.")] = False,
    threads: Threads = 0,
    out: Annotated[Path, typer.Option(help="The rows, as JSON.")] = Path("reports/train.json"),
    as_json: AsJson = False,
) -> None:
    """Training steps over the length of a document, as a share of what this processor can do at best; memory; Muon.

    Example: dsv4 bench train --context 1k,4k,16k --against transformers
    """
    import torch

    from dsv4.bench.train import lines, measure, plan
    from dsv4.cli.cost import parse_contexts
    from dsv4.errors import UserError
    from dsv4.files import make_folder, write_json

    if not context.strip():
        raise UserError("--context is empty: give numbers of tokens, such as 1k,4k")
    if threads:
        torch.set_num_threads(threads)
    names = list(dict.fromkeys(name.strip() for name in against.split(",") if name.strip()))
    planned = plan(
        preset, dtype, sorted(parse_contexts(context)), names, batch=batch, steps=steps, recompute=recompute,
        profile=profile,
    )  # fmt: skip
    make_folder(out.parent)
    rows = []
    report = {"model": planned.name, "config": planned.config.to_json(), "rows": rows}
    for row in measure(planned, _note):
        rows.append(row)
        write_json(out, report)  # what is there when somebody stops it is kept
    print(json.dumps(report) if as_json else "\n".join(lines(rows)))
    if any("skipped" in row for row in rows):
        raise typer.Exit(1)


@bench.command()
def peers(
    preset: Preset = "",
    device: Device = "auto",
    minutes: Minutes = 9.0,
    out: Annotated[Path, typer.Option(help="The report.")] = Path("reports/peers.json"),
    as_json: AsJson = False,
) -> None:
    """The same beside transformers with the same weights; without a transformers that has V4 it says so.

    Example: dsv4 bench peers tiny --device cpu
    """
    _stages(("ceilings", "speed", "peers"), preset, device, minutes, out, as_json)


def _stages(stages: tuple[str, ...], preset: str, device: str, minutes: float, out: Path, as_json: bool) -> None:
    from dsv4.bench.gpu_check import run
    from dsv4.cli.common import resolve_device

    place, presets = resolve_device(device), [preset] if preset else []
    dry = place.type == "cpu"
    raise typer.Exit(run(stages, place, dry=dry, minutes=minutes, out=out, as_json=as_json, presets=presets))


@bench.command()
def cost(as_json: AsJson = False) -> None:
    """FLOPs executed and bytes allocated by real layers beside what `dsv4 cost` counts (minutes).

    Example: dsv4 bench cost --json
    """
    from dsv4.bench.cost import measure_all
    from dsv4.cost import tables

    out = {"measured": measure_all(_note)}
    if as_json:
        print(json.dumps(out))
    else:
        tables.show(out, details=False)


@bench.command()
def count(
    update: Annotated[
        bool, typer.Option("--update", help="Rewrite dsv4/bench/counts.json with what is found.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Instructions of each C++ op in a chunk of prefill and a decode step, beside the committed ones (valgrind).

    Fails where one grew by more than 5%.

    Example: dsv4 bench count
    """
    from dsv4.bench import count as counting
    from dsv4.errors import UserError

    _note("counting, which takes about half a minute")
    try:
        found = counting.measure()
    except ImportError as error:
        raise UserError(f"the C++ ops {error}") from None
    before = counting.committed()
    rows = counting.compare(found, before)
    print(json.dumps(found | {"rows": rows}) if as_json else "\n".join(counting.lines(found, before, rows)))
    if update:
        counting.update(found)
    elif more := counting.worse(rows):
        names = ", ".join(f"{r['op']} ({r['phase']})" for r in more)
        _note(f"more instructions than committed: {names}; if that is meant, dsv4 bench count --update")
        raise typer.Exit(1)


# Its own options, --help among them, are read there: it also has to run where typer is not installed.
@bench.command(
    "gpu-check",
    add_help_option=False,
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
)
def gpu_check(context: typer.Context) -> None:
    """Parity and timings on a GPU in under ten minutes; runs with torch alone.

    Example: dsv4 bench gpu-check --minutes 5
    """
    from dsv4.bench.gpu_check import main

    raise typer.Exit(main(context.args))
