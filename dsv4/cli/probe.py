"""`dsv4 probe`: how a model bends and breaks. What is asked and how: dsv4/probe."""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Option

from dsv4.cli import common
from dsv4.errors import UserError

if TYPE_CHECKING:
    from dsv4.probe.record import Record
    from dsv4.probe.subject import Subject


def probe(
    model: common.ModelFolder = None,
    from_hub: common.FromHub = "",
    suite: Annotated[str, Option(help="quick: minutes on one core for a small model; full: everything.")] = "quick",
    only: Annotated[str, Option(metavar="NAME,...", help="These probes; gain stands for all gain.*.")] = "",
    out: Annotated[
        Path | None, Option(help="Where records and report go; a run that was stopped goes on there.")
    ] = None,
    seed: Annotated[int, Option(min=0, help="Of everything that is drawn.")] = 0,
    text: Annotated[Path | None, Option(help="A text to ask with; default: the embedded English.")] = None,
    device: common.Device = "cpu",
    dtype: common.Dtype = "float32",
    compare: Annotated[
        tuple[Path, Path] | None, Option(metavar="DIR DIR", help="A page of two runs beside each other.")
    ] = None,
    claims: Annotated[
        bool, Option("--claims", help="Statements of a security guide beside what --out's run has measured.")
    ] = False,
    list_them: Annotated[bool, Option("--list", help="The probes, with the question that each answers.")] = False,
    as_json: Annotated[bool, Option("--json", help="Print one JSON object a record.")] = False,
) -> None:
    """Measure how a model bends and breaks: gain, selection, compression, routing, numerics, attacks.

    Exit code 1 where a probe failed. What does not apply to a model is said to be skipped, never passed.

    Example: dsv4 probe runs/demo --suite quick --out probes/demo
    One question: dsv4 probe runs/demo --only gain.certificate
    The statements of a guide: dsv4 probe --claims --out probes/demo
    Two models: dsv4 probe --compare probes/a probes/b
    """
    from dsv4.probe import runner, table
    from dsv4.probe.subject import SUITES, Settings

    if suite not in SUITES:
        raise UserError(f"--suite {suite!r} is unknown: use {' or '.join(SUITES)}")
    if list_them:
        _list(as_json)
        return
    if compare is not None:
        if model is not None or from_hub:
            raise UserError("--compare takes two folders that --out has made, and no model")
        _compare(list(compare), out)
        return
    if claims:
        if out is None or model is not None or from_hub:
            raise UserError("--claims takes --out, the folder of a run that has measured, and no model")
        _claims(out, as_json)
        return
    settings = Settings(seed, "quick" if suite == "quick" else "full")
    wanted = table.chosen(settings.suite, [name for name in only.split(",") if name])
    subject = _open(model, from_hub, device, dtype, text)
    folder = out or Path("probes") / subject.name
    with _progress() as show:
        records = runner.run(subject, wanted, settings, folder, show)
    _write_report([folder], folder / "report.html")
    for record in records:
        print(json.dumps(record.to_json()) if as_json else line(record))
    if not as_json:
        print(f"\n{folder / 'report.html'} has the plots; {folder / runner.RECORDS} everything")
    if any(r.status == "failed" for r in records):
        raise typer.Exit(1)


def line(record: "Record") -> str:
    """A record for a terminal."""
    from dsv4.probe.report import cell

    if record.status != "measured":
        return f"{record.probe:24s} not measured ({record.status}): {record.reason}"
    head = f"{record.probe:24s} {record.name:36s} {cell(record)}"
    return f"{head} {record.unit}".rstrip() + (f"\n{'':24s} {record.finding}" if record.finding else "")


def _open(folder: str | None, from_hub: str, device: str, dtype: str, text: Path | None) -> "Subject":
    """The model with its tokenizer and a text; what is wrong with the arguments is said before weights are read."""
    from dsv4 import files
    from dsv4.checkpoint import load, resolve_checkpoint
    from dsv4.probe.subject import Subject
    from dsv4.text import load_tokenizer

    place, numbers = common.resolve_device(device), common.resolve_dtype(dtype)
    words = "" if text is None else files.read_text(text, "the text", "give a text file in UTF-8")
    path = common.find_model(folder, from_hub)
    checkpoint = resolve_checkpoint(path)
    tokenizer = load_tokenizer(checkpoint) if (checkpoint / "tokenizer.json").is_file() else None
    if tokenizer is None and text is not None:
        raise UserError(f"{checkpoint} has no tokenizer.json, which --text needs: leave it out, or copy one in")
    if tokenizer is not None and not words:
        words = _embedded()
    model = load(path, dtype=numbers, device=place)
    return Subject(model, tokenizer, name=path.resolve().name, text=words)


def _embedded(characters: int = 400_000) -> str:
    """Held-out English, which no model of ours was trained on."""
    from dsv4 import data

    parts, size = [], 0
    for document in data.documents("heldout"):
        parts.append(document)
        size += len(document)
        if size >= characters:
            break
    return "\n\n".join(parts)[:characters]


def _list(as_json: bool) -> None:
    from dsv4.probe.table import PROBES

    for p in PROBES.values():
        about = {"probe": p.name, "suite": p.suite, "question": p.question}
        print(json.dumps(about) if as_json else f"{p.name:24s} {p.suite:6s} {p.question}")


def _claims(out: Path, as_json: bool) -> None:
    from dataclasses import asdict

    from dsv4.probe.claims import rows
    from dsv4.probe.runner import read

    about, records = read(out)
    for row in rows(records):
        if as_json:
            print(json.dumps({"model": about["model"], **asdict(row)}))
        else:
            print(f"said      {row.said}\nis so     {row.is_so}\nmeasured  {row.measured}\nverdict   {row.verdict}\n")


def _compare(folders: list[Path], out: Path | None) -> None:
    path = out or Path("compare.html")
    path = path if path.suffix == ".html" else path / "compare.html"
    _write_report(folders, path)
    print(path)


def _write_report(folders: list[Path], path: Path) -> None:
    from dsv4 import files
    from dsv4.probe import report

    files.make_folder(path.parent)
    report.write(folders, path)


@contextmanager
def _progress() -> Iterator[Callable[[str, int, int, Any], None]]:
    """Yields what the runner calls: a bar on a terminal, a line for each probe elsewhere."""
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        columns = (TextColumn("{task.description}"), MofNCompleteColumn(), BarColumn(), TimeElapsedColumn())
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task("probes", total=None)
            yield lambda name, done, total, record: bar.update(
                task, description=name if record is None else f"{name}: {record.name}", completed=done, total=total
            )
        return

    def plain(name: str, done: int, total: int, record: Any) -> None:
        if record is None:
            print(f"probe {done + 1}/{total}: {name}", file=sys.stderr, flush=True)

    yield plain
