"""`dsv4 report`: a run's record as one page with plots."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from dsv4.cli.cost import check_place
from dsv4.files import write_text
from dsv4.train.page import page_of


def report(
    run: Annotated[Path, typer.Argument(help="A run folder, also of a run that still goes on.")],
    html: Annotated[Path | None, typer.Option(help="Where to; default: report.html in the run folder.")] = None,
) -> None:
    """Draw a run's record: one page with plots, which needs nothing beside it.

    Example: dsv4 report runs/demo
    """
    target = html or run / "report.html"
    page = page_of(run)
    check_place(target)
    write_text(target, page)
    print(f"wrote {target}", file=sys.stderr)
