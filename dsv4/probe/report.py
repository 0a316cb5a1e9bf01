"""The page of a probe run, or of two models side by side: one file, plots drawn into it, no script, nothing fetched.

A record whose detail has a "plot" is drawn: {"title", "x": [...], "series": {label: [y, ...]}, "xlabel", "ylabel",
"logx", "logy", "kind": "line" or "bar"}; None in a series is a gap. Two models share axes where both have the plot. A
heat map of shares has {"kind": "heat", "y": [...], "z": rows of y with columns of x}, and axes for each model.
"""

import html
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dsv4 import files
from dsv4.cost.page import document, figure, panels, table
from dsv4.probe.record import Record
from dsv4.probe.runner import read
from dsv4.probe.table import PROBES

COLOURS = ("#2f5fd0", "#d0752f", "#3f9c6b", "#8a4fbf", "#b0354a", "#777777", "#c9b458", "#7aa0ee")
MORE = """
.finding { background: #f4f6fb; border-left: 3px solid #2f5fd0; padding: .4rem .8rem; margin: .4rem 0; }
.absent { background: #fdf3ea; border-left: 3px solid #d0752f; padding: .4rem .8rem; margin: .4rem 0; }
"""
Run = tuple[dict[str, Any], list[Record]]  # what it was of, and what it found


def write(folders: Sequence[Path], path: Path) -> None:
    """The page of the runs in these folders, whole or not at all."""
    files.write_text(path, page([read(folder) for folder in folders]))


def page(runs: Sequence[Run]) -> str:
    """HTML of one run, or of two beside each other."""
    names = [about["model"] for about, _ in runs]
    title = "Probes: " + " and ".join(names)
    body = [f"<h1>{html.escape(title)}</h1>", _about(runs), _counts(runs)]
    for name in _probes(runs):
        body.append(_section(name, names, [[r for r in records if r.probe == name] for _, records in runs]))
    return document(title, body, MORE)


def _probes(runs: Sequence[Run]) -> list[str]:
    """Those with a record, in the table's order; what is no longer in the table comes last."""
    found = dict.fromkeys(r.probe for _, records in runs for r in records)
    return [*(p for p in PROBES if p in found), *(p for p in found if p not in PROBES)]


def _about(runs: Sequence[Run]) -> str:
    rows = [
        (a["model"], a["dtype"], a["settings"]["suite"], str(a["settings"]["seed"]), a["config_hash"], a["fingerprint"],
         "real text" if a["text"] else "random ids")
        for a, _ in runs
    ]  # fmt: skip
    return table(("model", "dtype", "suite", "seed", "configuration", "weights", "asked with"), rows)


def _counts(runs: Sequence[Run]) -> str:
    """How much was measured and what was not: never a row of ticks."""
    parts = []
    for about, records in runs:
        absent = {r.probe for r in records if r.status != "measured"}
        measured = {r.probe for r in records} - absent
        text = f"{about['model']}: {len(measured)} probes measured to their end, {len(absent)} not"
        parts.append(f"<p>{html.escape(text + (': ' + ', '.join(sorted(absent)) if absent else ''))}</p>")
    return "".join(parts)


def _section(name: str, models: Sequence[str], found: Sequence[list[Record]]) -> str:
    probe = PROBES.get(name)
    parts = [f"<h2>{html.escape(name)}</h2>"]
    if probe is not None:
        parts.append(f"<p>{html.escape(probe.question)}</p>")
    for model, records in zip(models, found, strict=True):
        said = f"{model}: " if len(models) > 1 else ""
        for r in records:
            if r.status != "measured":
                parts.append(f'<p class="absent">{html.escape(f"{said}not measured ({r.status}): {r.reason}")}</p>')
            elif r.finding:
                parts.append(f'<p class="finding">{html.escape(said + r.finding)}</p>')
    parts.append(_figures(name, models, found))
    quantities = dict.fromkeys(r.name for records in found for r in records if r.status == "measured")
    rows = []
    for quantity in quantities:
        both = [next((r for r in records if r.name == quantity), None) for records in found]
        some = next(r for r in both if r is not None)
        rows.append((quantity, some.unit, *(cell(r) for r in both)))
    if rows:
        heads = ("quantity", "unit", *(models if len(models) > 1 else ("value",)))
        parts.append(table(heads, rows))
    return "\n".join(parts)


def cell(record: Record | None) -> str:
    """A figure with its interval, or its residual, and the number of samples."""
    if record is None:
        return "-"
    if record.value is None:
        return json.dumps({k: v for k, v in record.detail.items() if k != "plot"})[:200]
    text = f"{record.value:.4g}"
    if record.low is not None and record.high is not None:
        text += f" [{record.low:.4g}, {record.high:.4g}]"
    if record.residual is not None:
        text += f" (residual {record.residual:.1e})"
    return text + (f", n={record.n}" if record.n > 1 else "")


def _figures(name: str, models: Sequence[str], found: Sequence[list[Record]]) -> str:
    plots: dict[str, list[tuple[str, dict[str, Any]]]] = {}
    for model, records in zip(models, found, strict=True):
        for r in records:
            if "plot" in r.detail:
                plots.setdefault(r.name, []).append((model, r.detail["plot"]))
    drawn = []
    for number, (quantity, of) in enumerate(plots.items()):
        key = f"{name}-{number}".replace(".", "-")
        drawn.append(figure(key, lambda of=of: _draw(of, len(models) > 1), f"{name}: {quantity}"))
    return "".join(drawn)


def _heat(plots: Sequence[tuple[str, dict[str, Any]]], named: bool) -> Any:
    """Shares from 0 to 1, each written into its cell; an empty cell is one that was not asked."""
    drawn, (row,) = panels(len(plots), 3.2)
    for axes, (model, plot) in zip(row, plots, strict=True):
        z = [[float("nan") if v is None else v for v in line] for line in plot["z"]]
        axes.imshow(z, vmin=0, vmax=1, cmap="Blues", aspect="auto", origin="lower")
        for i, line in enumerate(plot["z"]):
            for j, v in enumerate(line):
                if v is not None:
                    axes.text(j, i, f"{v:.2f}", ha="center", va="center", color="white" if v > 0.6 else "black")
        axes.set_xticks(range(len(plot["x"])), [str(x) for x in plot["x"]])
        axes.set_yticks(range(len(plot["y"])), [str(y) for y in plot["y"]])
        title = plot.get("title", "")
        axes.set(title=f"{model}: {title}" if named else title, xlabel=plot["xlabel"], ylabel=plot["ylabel"])
    return drawn


def _draw(plots: Sequence[tuple[str, dict[str, Any]]], named: bool) -> Any:
    if plots[0][1].get("kind") == "heat":
        return _heat(plots, named)
    drawn, ((axes,),) = panels(1, 3.2)
    number = 0
    bars = sum(len(plot["series"]) for _, plot in plots)
    for model, plot in plots:
        for label, y in plot["series"].items():
            colour = COLOURS[number % len(COLOURS)]
            label = f"{model}, {label}" if named else label
            y = [float("nan") if v is None else v for v in y]
            if plot.get("kind") == "bar":
                width = 0.8 / bars
                places = [i + (number - (bars - 1) / 2) * width for i in range(len(y))]
                axes.bar(places, y, width, color=colour, label=label)
                axes.set_xticks(range(len(y)), [str(x) for x in plot["x"]])
            else:
                axes.plot(plot["x"], y, color=colour, label=label, marker="." if len(y) < 60 else "")
            number += 1
    first = plots[0][1]
    axes.set(title=first.get("title", ""), xlabel=first.get("xlabel", ""), ylabel=first.get("ylabel", ""))
    if first.get("logx"):
        axes.set_xscale("log")
    if first.get("logy"):
        axes.set_yscale("log")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return drawn
