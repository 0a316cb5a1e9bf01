"""`dsv4 inspect`: what a checkpoint is and what is wrong with it, from the headers of its files."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Argument, Option

from dsv4 import files
from dsv4.checkpoint.diagnose import Finding, pattern_of
from dsv4.checkpoint.inspect import Report
from dsv4.checkpoint.inspect import inspect as look
from dsv4.cost.params import parameters
from dsv4.errors import UserError

if TYPE_CHECKING:
    from dsv4.engine.acceptance import Acceptance

SHOWN = 40  # findings that are printed


def inspect(
    path: Annotated[
        Path | None, Argument(help="A run folder, a checkpoint folder or a .safetensors file.", show_default=False)
    ] = None,
    from_hub: Annotated[
        str, Option(metavar="NAME[@REVISION]", help="A model of the Hugging Face Hub; only headers are fetched.")
    ] = "",
    statistics: Annotated[bool, Option(help="Read every tensor: smallest, largest, mean, NaNs, saturation.")] = False,
    tensors: Annotated[bool, Option(help="List every tensor.")] = False,
    draft: Annotated[
        Path | None,
        Option(
            metavar="TEXT_FILE",
            show_default=False,
            help="Load the model and measure its drafter on a text: does it know this trunk?",
        ),
    ] = None,
    as_json: Annotated[bool, Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Look into a checkpoint: what it is, its layers, dtypes, sizes and parameters, and what is missing or wrong.

    Reads headers only, unless --statistics or --draft asks for more. Exit code 1 if something is wrong, also with a
    drafter that is no better than chance.

    Example: dsv4 inspect runs/demo
    Of the hub: dsv4 inspect --from-hub deepseek-ai/DeepSeek-V4-Flash
    """
    if (path is None) == (not from_hub):
        raise UserError("give a folder or --from-hub NAME, and not both")
    if from_hub:
        from dsv4.checkpoint.hub import headers_of

        if statistics or draft is not None:
            raise UserError(
                "--statistics and --draft read weights, and of the hub only headers are fetched: download it first"
            )
        with headers_of(from_hub) as (folder, source):
            report = look(folder)
            report.path = report.checkpoint = source
            report.findings = [
                Finding(f.kind, f.says.replace(f"{folder}/", ""), f.tensors, f.harmless) for f in report.findings
            ]
    else:
        assert path is not None
        report = look(path)
    numbers = _statistics(report) if statistics else {}
    drafts = None if draft is None else _acceptance(report, draft)
    if as_json:
        out = _as_json(report, numbers, statistics, tensors)
        print(json.dumps(out if drafts is None else {**out, "draft": _draft_as_json(drafts)}))
    else:
        _print(report)
        if statistics or tensors:
            _print_tensors(report, numbers, tensors)
        _print_findings(report)
        if drafts is not None:
            print("\n" + "\n".join(drafts.lines()))
    if not report.whole or (drafts is not None and drafts.is_chance):
        raise typer.Exit(1)


def _acceptance(report: Report, file: Path) -> "Acceptance":
    """How the drafter of a checkpoint fares on a text; the weights stay in the formats in which they are."""
    from dsv4.checkpoint import load
    from dsv4.engine.acceptance import acceptance
    from dsv4.text import load_tokenizer

    text = files.read_text(file, "the text", "give a text file in UTF-8")
    folder = Path(report.checkpoint)
    if not (folder / "tokenizer.json").is_file():
        raise UserError(f"{folder} has no tokenizer.json: copy in the one that the model was trained with")
    return acceptance(load(folder, weights="released"), load_tokenizer(folder), text)


def _draft_as_json(drafts: "Acceptance") -> dict[str, Any]:
    return {**asdict(drafts), "rate": drafts.rate, "chance": drafts.chance, "is_chance": drafts.is_chance}


def _statistics(report: Report) -> dict[str, Any]:
    from rich.console import Console
    from rich.progress import track

    from dsv4.checkpoint.statistics import measure

    console = Console(stderr=True)
    return measure(
        report,
        lambda names: track(list(names), "reading", console=console, transient=True, disable=not console.is_terminal),
    )


def _as_json(report: Report, numbers: dict[str, Any], statistics: bool, tensors: bool) -> dict[str, Any]:
    out = report.to_json()
    if report.config is not None:
        out["configured"] = parameters(report.config)
    if statistics or tensors:
        out["tensor_list"] = {
            name: {"dtype": info.dtype, "shape": info.shape, "bytes": info.num_bytes, "file": file.name}
            | ({"statistics": numbers[name].to_json()} if numbers.get(name) else {})
            for name, (info, file) in report.places.items()
        }
    return out


def _print(report: Report) -> None:
    where = report.path if report.path == report.checkpoint else f"{report.checkpoint} (of the run {report.path})"
    rows = [("checkpoint", where), ("is", report.what), ("dsv4", report.reads)]
    rows += [("differs", line) for line in report.differs]
    layout = f"{report.layout} layout, " if report.layout else ""
    rows.append(("holds", f"{layout}{len(report.files)} files, {report.tensors:,} tensors, {report.bytes:,} bytes"))
    if report.layers:
        kinds = ", ".join(f"{count} {kind}" for kind, count in report.layers.items())
        hashed = f"; the first {report.hash_layers} hash-routed" if report.hash_layers else ""
        rows.append(("layers", f"{sum(report.layers.values())}: {kinds}{hashed}"))
    if report.tensors:
        rows.append(("parameters", _parameters(report)))
    for key, value in rows:
        print(f"{key:12s} {value}")
    for title, table in (("dtype", report.dtypes), ("part", report.parts)):
        if table:
            print(f"\n{title:20s} {'tensors':>9s} {'bytes':>19s} {'parameters':>19s}")
        for name, row in sorted(table.items(), key=lambda item: -item[1].bytes):
            print(f"{name:20s} {row.tensors:9,} {row.bytes:19,} {row.parameters:19,}")


def _parameters(report: Report) -> str:
    own = "" if len(report.parts) == 1 else " (drafting apart)"
    text = f"{report.parameters:,}{own}"
    if report.active is not None:
        text += f", {report.active:,} of them used for a token"
    if report.config is not None:
        want = parameters(report.config)["total"]
        text += "; as configured" if want == report.parameters else f"; the configuration has {want:,}"
    return text


def _print_tensors(report: Report, numbers: dict[str, Any], each: bool) -> None:
    """A row for each tensor, or with statistics for tensors of like names together."""
    from dsv4.checkpoint.statistics import Statistics

    head = f"{'min':>11s} {'max':>11s} {'mean':>11s} {'rms':>10s} {'NaN':>6s} {'inf':>6s} {'saturated':>9s}"
    print(f"\n{'tensor':58s} {'dtype':8s} " + (head if numbers else "shape"))
    groups: dict[str, list[str]] = {}
    for name in report.places:
        groups.setdefault(name if each else pattern_of(name), []).append(name)
    for label, names in groups.items():
        info = report.places[names[0]][0]
        line = f"{label:58s} {info.dtype:8s} "
        known = [numbers[name] for name in names if numbers.get(name)]
        if not numbers:
            line += str(list(info.shape))
        elif known:
            sums = Statistics()
            for one in known:
                sums.merge(one)
            line += f"{sums.min:11.4g} {sums.max:11.4g} {sums.mean:11.3g} {sums.rms:10.4g} {sums.nan:6,} {sums.inf:6,} "
            line += f"{sums.saturated:9,}"
        print(line)


def _print_findings(report: Report) -> None:
    if not report.findings:
        print("\nevery tensor that the configuration asks for is there, of its shape and in a dtype that fits")
        return
    print()
    for finding in report.findings[:SHOWN]:
        print(f"{'note' if finding.harmless else finding.kind + '!':12s} {finding.says}")
    if len(report.findings) > SHOWN:
        print(f"... and {len(report.findings) - SHOWN:,} findings more, all of them with --json")
