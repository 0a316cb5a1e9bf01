"""The page of `dsv4 report`: a run's record as one file of plots and tables, no script, nothing fetched.

Everything comes from config.yaml and log.jsonl, so that a run that still goes on, or that broke off, has a page too.
What a record does not have is left out: a model without an MTP block has no acceptance.
"""

import html
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsv4.checkpoint import RunFolder
from dsv4.cost.page import PARTS, document, figure, panels, table
from dsv4.errors import UserError, shown
from dsv4.settings import flat, read_yaml
from dsv4.train.log import read_log, smoothed

Record = dict[str, Any]
Curve = tuple[list[int], list[float]]  # steps and values
Curves = dict[str, dict[str, Curve]]
MOST_POINTS = 500  # of a curve: more than these are not seen, and a page of a long run stays small


@dataclass(frozen=True)
class Panel:
    """A plot: its title, the figures in it by their names in the log and what they are called, and how it is drawn.

    A figure that is kept by layer is a curve for each layer. smooth: single values are faint, their smoothed course is
    in front. scale: what a value is multiplied by.
    """

    title: str
    names: dict[str, str]
    smooth: bool = False
    log: bool = False
    scale: float = 1.0


@dataclass(frozen=True)
class Figure:
    name: str
    heading: str
    caption: str
    panels: tuple[Panel, ...]


FIGURES = (
    Figure(
        "loss", "Loss", "Nats per token of each update and its smoothed course; bits per byte of text.",
        (
            Panel("nats per token", {"loss": "next token", "mtp_loss": "the token after it (MTP)"}, smooth=True),
            Panel("bits per byte", {"bpb": "training, smoothed", "heldout_bpb": "held out"}, smooth=True),
        ),
    ),
    Figure(
        "course", "Course", "The learning rate, and the gradient's norm before it is clipped.",
        (
            Panel("learning rate", {"lr": "rate"}),
            Panel("gradient norm", {"grad_norm": "all but indexers", "index_grad_norm": "indexers"}, True, log=True),
        ),
    ),
    Figure(
        "speed", "Speed and memory",
        "Tokens per second; shares of the machine's best and of a step's time; the most memory held.",
        (
            Panel("tokens per second", {"tokens_per_second": "tokens/s"}, smooth=True),
            Panel("%", {"mfu": "MFU", "optimizer_share": "optimiser's share"}, smooth=True, scale=100),
            Panel("memory, GiB", {"memory_bytes": "most held"}, scale=2**-30),
        ),
    ),
    Figure(
        "experts", "Experts", "The worst layer of each update: 1 and 0 are balanced.",
        (
            Panel("largest load over the mean", {"load_max": "load"}, smooth=True),
            Panel("coefficient of variation", {"load_cv": "load"}, smooth=True),
        ),
    ),
    Figure(
        "inside", "Inside the model", "On held-out text: mHC's composite mixing, attention to the sink by layer.",
        (
            Panel("mHC gain", {"mhc_row_gain": "largest row", "mhc_column_gain": "largest column"}),
            Panel("sink mass, %", {"sink_mass": "layer"}, scale=100),
        ),
    ),
    Figure(
        "drafts", "Multi-token prediction", "Drafts of the MTP block that the trunk would accept, on held-out text.",
        (Panel("acceptance, %", {"mtp_acceptance": "accepted"}, scale=100),),
    ),
    Figure(
        "indexer", "Indexers", "By layer: KL to the attention, recall of the true top-k, share of their mass.",
        (
            Panel("KL, nats", {"index_kl": "layer"}, log=True),
            Panel("recall", {"index_recall": "layer"}),
            Panel("mass", {"index_mass": "layer"}),
        ),
    ),
)  # fmt: skip


def page_of(folder: Path) -> str:
    """The whole page as HTML for the run in a folder. UserError where there is none, or nothing of it yet."""
    run = RunFolder(folder)
    if not run.log.is_file():
        raise UserError(f"{folder} holds no run (it has no {run.log.name}): give the --out of a dsv4 train or demo")
    records = read_log(run.log)
    updates = [r for r in records if "loss" in r]
    if not updates:
        raise UserError(f"{run.log} has no update yet: wait for the first step")
    settings = read_yaml(run.config) if run.config.is_file() else {}
    name, found = folder.resolve().name, all_curves(updates)
    parts = [f"<h1>{html.escape(name)}</h1>", f"<p>{html.escape(_state(updates[-1], settings))}</p>", _newest(found)]
    for drawn in FIGURES:
        shown_panels = [p for p in drawn.panels if any(found.get(name) for name in p.names)]
        if shown_panels:
            parts.append(f"<h2>{html.escape(drawn.heading)}</h2>")
            parts.append(figure(drawn.name, lambda p=shown_panels: _draw(found, p), drawn.caption))
    parts += _events(records)
    if settings:
        parts.append("<h2>Settings</h2>" + table(("setting", "value"), [(n, shown(v)) for n, v in flat(settings)]))
    return document(name, parts)


def all_curves(records: Iterable[Record]) -> Curves:
    """The curves of every figure by its name, and then by layer, or under "" where it is not kept so; values that are
    no number are left out."""
    found: Curves = {}
    for record in records:
        for name, value in record.items():
            for layer, number in value.items() if isinstance(value, dict) else [("", value)]:
                if type(number) in (int, float) and math.isfinite(number):
                    steps, values = found.setdefault(name, {}).setdefault(str(layer), ([], []))
                    steps.append(record["step"])
                    values.append(float(number))
    return found


def _state(last: Record, settings: Record) -> str:
    steps = settings.get("schedule", {}).get("steps")
    whole = f" of {steps:,}" if isinstance(steps, int) else ""
    return f"Step {last['step']:,}{whole}; {last.get('tokens', 0):,} tokens."


def _newest(found: Curves) -> str:
    """The last value of every figure, and where it was best."""
    rows = []
    for name, what in (
        ("heldout_bpb", "held-out bits per byte"), ("loss", "loss, smoothed"),
        ("bpb", "training bits per byte, smoothed"),
        ("mtp_loss", "MTP loss, smoothed"), ("tokens_per_second", "tokens per second, smoothed"),
        ("mfu", "MFU, smoothed"), ("optimizer_share", "optimiser's share of a step, smoothed"),
        ("mtp_acceptance", "MTP acceptance"), ("load_max", "largest load of an expert over the mean, smoothed"),
        ("mhc_row_gain", "mHC gain, rows"), ("mhc_column_gain", "mHC gain, columns"),
    ):  # fmt: skip
        for steps, values in found.get(name, {}).values():
            course = smoothed(values) if what.endswith("smoothed") else values
            rows.append((what, f"{course[0]:,.4g}", f"{course[-1]:,.4g}", f"{steps[-1]:,}"))
    return table(("figure", "first", "last", "at step"), rows)


def _events(records: list[Record]) -> list[str]:
    """What else happened, and where the loss was said to diverge."""
    rows = [(f"{r['step']:,}", str(r["event"]), _details(r)) for r in records if "event" in r]
    diverging = [r["step"] for r in records if r.get("diverging")]
    if diverging:
        rows.append((f"{diverging[0]:,}", "diverging", f"{len(diverging)} updates, the last at step {diverging[-1]:,}"))
    return ["<h2>Events</h2>" + table(("after step", "event", "details"), rows)] if rows else []


def _details(record: Record) -> str:
    return ", ".join(f"{name}: {shown(v)}" for name, v in record.items() if name not in ("step", "event"))


# --- plots -----------------------------------------------------------------------------------------------------------


def _draw(found: Curves, shown_panels: Sequence[Panel]) -> Any:
    drawn, (row,) = panels(len(shown_panels))
    for axes, panel in zip(row, shown_panels, strict=True):
        colour = iter(PARTS * 8)
        for name, label in panel.names.items():
            for layer, (steps, values) in found.get(name, {}).items():
                values = [v * panel.scale for v in values]
                _curve(axes, steps, values, next(colour), f"{label} {layer}".strip(), panel)
        axes.set(title=panel.title, xlabel="step")
        if panel.log:
            axes.set_yscale("log")
        axes.legend(fontsize=7.5)
        axes.grid(alpha=0.3)
    return drawn


def _curve(axes: Any, steps: list[int], values: list[float], colour: str, label: str, panel: Panel) -> None:
    few = _thinned(len(steps))
    at = [steps[i] for i in few]
    if not panel.smooth or len(steps) < 20:
        style: dict[str, Any] = {"marker": "o", "markersize": 3} if len(steps) < 60 else {}
        axes.plot(
            at, [values[i] for i in few], color=colour, label=f"{label}; {values[-1]:.4g}", linewidth=1.2, **style
        )
        return
    course = smoothed(values)
    axes.plot(at, [values[i] for i in few], color=colour, alpha=0.25, linewidth=0.7)
    axes.plot(at, [course[i] for i in few], color=colour, label=f"{label}; {course[-1]:.4g}", linewidth=1.4)


def _thinned(count: int) -> list[int]:
    """At most about MOST_POINTS of `count` places, the last one among them."""
    step = max(1, -(-count // MOST_POINTS))
    return sorted({*range(0, count, step), count - 1})
