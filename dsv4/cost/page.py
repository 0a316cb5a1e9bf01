"""The page of `dsv4 cost --html`: one file with plots and tables, no script, nothing fetched.

Plots: FLOPs and cache against context (the report's first figure), what a token's FLOPs and a sequence's bytes consist
of, the causes of the savings, and a map of what fits.
"""

import html
import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dsv4.config import AnyConfig
from dsv4.cost import compare, hardware, kv_bytes, report
from dsv4.cost.flops import decode, weighted

COLOURS = {"v3.2": "#777777", "pro": "#2f5fd0", "flash": "#d0752f", "llama-405b": "#3f9c6b"}
PARTS = (
    "#2f5fd0", "#7aa0ee", "#d0752f", "#f0b184", "#3f9c6b", "#93cfae", "#8a4fbf", "#c7a5e3", "#b0354a", "#e59aa7",
    "#777777", "#bdbdbd", "#c9b458",
)  # fmt: skip
MAP_MACHINES = ("h200x4", "h200x8", "b200x4", "b200x8", "gb300x8", "mi355x8", "rtxpro6000x8", "h200x32")
MAP_CONTEXTS = tuple(n * 1024 for n in (16, 64, 128, 256, 512, 1024))

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; } p, li { max-width: 46rem; }
figure { margin: 1rem 0; } figcaption { color: #555; font-size: .9rem; } svg { max-width: 100%; height: auto; }
table { border-collapse: collapse; font-size: .88rem; margin: .8rem 0; display: block; overflow-x: auto; }
th, td { padding: .2rem .6rem; border-bottom: 1px solid #ddd; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
td.text, th.text { text-align: left; white-space: normal; min-width: 18rem; }
"""


def page_of(
    out: dict[str, Any], models: Mapping[str, AnyConfig] | None = None, machines: Sequence[hardware.Machine] = ()
) -> str:
    """The whole page as HTML for what `dsv4 cost` found; without a comparison in it, one is counted for the plots.

    A model that was asked for comes first. models: those whose map of what fits is drawn, by default the two released
    ones; machines: rows it has as well.
    """
    found = out.get("comparison") or report.comparison()
    scheme = found["scheme"]
    parts = [
        "<h1>What a million tokens cost: DeepSeek-V4</h1>",
        f"<p>Counted from the configurations alone, FLOPs by scheme {html.escape(report.scheme_name(scheme))}. "
        "The figures are those of <code>dsv4 cost --json</code>; docs/cost.md of the project derives them.</p>",
        *([_model(out["model"])] if "model" in out else []),
        *(_what_fits(models, machines) if models else []),
        _claims(found),
        "<h2>Against the context</h2>",
        figure("against-context", lambda: _against_context(scheme), "Per decoded token, and per sequence held."),
        "<h2>What it consists of, at 1M tokens</h2>",
        figure("components", lambda: _components(found), "Parts of a token's FLOPs and of a sequence's bytes."),
        "<h2>What causes the savings</h2>",
        figure("causes", lambda: _causes(found), "Multiplicative Shapley values: the factors multiply to the whole."),
        *([] if models else _what_fits(compare.targets(), machines)),
    ]
    return document("What a million tokens cost", parts)


def document(title: str, parts: Sequence[str], style: str = "") -> str:
    """A whole page of these parts, which needs nothing beside it. style: CSS beside STYLE."""
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    head += f"<title>{html.escape(title)}</title><style>{STYLE}{style}</style>"
    body = "\n".join(parts)
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>{body}</body></html>\n'


def _what_fits(models: Mapping[str, AnyConfig], machines: Sequence[hardware.Machine]) -> list[str]:
    parts = ["<h2>What fits</h2>"]
    for number, (name, config) in enumerate(models.items()):
        caption = f"Sequences beside the weights of {name}, 90% of the memory usable; empty: the weights do not fit."
        parts.append(figure(f"fits-{number}", lambda c=config: _fits(c, machines), caption))
    return parts


def _claims(found: dict[str, Any]) -> str:
    rows = [
        (c["name"], f"{c['said']:g}%", f"{c['counted']:.2f}%", f"{c['error']:+.2f}", c["rule"]) for c in found["claims"]
    ]
    return "<h2>The report's claims, at 1,048,576 tokens</h2>" + table(
        ("claim", "said", "counted", "off", "rule"), rows
    )


def _model(r: dict[str, Any]) -> str:
    rows = [
        (f"{c['context']:,}", f"{c['decode_flops_weighted'] / 1e9:,.1f}", f"{c['decode_flops'] / 1e9:,.1f}",
         f"{c['prefill_flops'] / 1e15:,.2f}", f"{c['cache_bytes'] / 1e6:,.1f}", f"{c['cache_read_bytes'] / 1e6:,.1f}")
        for c in r["contexts"]
    ]  # fmt: skip
    head = ("context", "GFLOP per token", "raw", "PFLOP per prompt", "cache MB", "read MB")
    return f"<h2>{html.escape(r['model'])}</h2>" + table(head, rows)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def line(cells: Sequence[str], tag: str) -> str:
        long = [' class="text"' if any(len(row[i]) > 40 for row in rows) else "" for i in range(len(head))]
        written = (f"<{tag}{style}>{html.escape(c)}</{tag}>" for c, style in zip(cells, long, strict=True))
        return f"<tr>{''.join(written)}</tr>"

    return f"<table>{line(head, 'th')}{''.join(line(row, 'td') for row in rows)}</table>"


# --- plots -----------------------------------------------------------------------------------------------------------


def svg(name: str, draw: Callable[[], Any]) -> str:
    """A matplotlib figure as SVG: text stays text, ids begin with its name, nothing is fetched."""
    import matplotlib

    settings: Any = {"svg.fonttype": "none", "svg.hashsalt": name, "font.size": 10, "font.family": "sans-serif"}
    with matplotlib.rc_context(settings):
        figure = draw()
        text = io.StringIO()
        figure.savefig(text, format="svg", bbox_inches="tight", metadata={"Date": None, "Creator": None})
    drawn = text.getvalue()
    drawn = drawn[drawn.index("<svg") :]
    for known in ('id="', 'href="#', "url(#"):  # several figures share a page
        drawn = drawn.replace(known, f"{known}{name}-")
    return drawn


def figure(name: str, draw: Callable[[], Any], caption: str) -> str:
    return f'<figure id="{name}">{svg(name, draw)}<figcaption>{html.escape(caption)}</figcaption></figure>'


def panels(columns: int, height: float = 3.4, rows: int = 1) -> tuple[Any, Any]:
    """A figure, and its axes as rows of columns."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def _against_context(scheme: report.Scheme) -> Any:
    drawn, ((left, right),) = panels(2)
    contexts = [max(1, n * 8 * 1024) for n in range(129)]
    for name in ("v3.2", "pro", "flash"):
        config, colour = report.KNOWN[name], COLOURS[name]
        x = [c / 1024 for c in contexts]
        left.plot(x, [weighted(decode(config, c), scheme) / 1e12 for c in contexts], color=colour, label=name)
        right.plot(x, [sum(kv_bytes.held(config, c).values()) / 1e9 for c in contexts], color=colour, label=name)
    for axes, title in ((left, "TFLOP per decoded token"), (right, "cache, GB")):
        axes.set(title=title, xlabel="context, K tokens", xlim=(0, 1024), ylim=(0, None))
        axes.legend()
        axes.grid(alpha=0.3)
    return drawn


def _components(found: dict[str, Any]) -> Any:
    drawn, ((left, right),) = panels(2, 4.2)
    for axes, what, unit, title in (
        (left, "components", 1e9, "GFLOP per decoded token"),
        (right, "cache_parts", 1e9, "cache, GB"),
    ):
        _stacked(axes, {n: found[what][n] for n in ("v3.2", "pro", "flash")}, unit)
        axes.set(title=title)
    return drawn


def _stacked(axes: Any, models: dict[str, dict[str, float]], unit: float) -> None:
    parts = sorted({p for m in models.values() for p in m}, key=lambda p: -max(m.get(p, 0) for m in models.values()))
    below = dict.fromkeys(models, 0.0)
    for part, colour in zip(parts, PARTS * 2, strict=False):
        sizes = [models[m].get(part, 0) / unit for m in models]
        axes.bar(list(models), sizes, bottom=list(below.values()), color=colour, label=part, width=0.6)
        below = {m: b + s for (m, b), s in zip(below.items(), sizes, strict=True)}
    for i, total in enumerate(below.values()):
        axes.text(i, total, f"{total:,.1f}", ha="center", va="bottom")
    axes.set_ylim(0, 1.08 * max(below.values()))
    axes.legend(fontsize=7.5)


def _causes(found: dict[str, Any]) -> Any:
    drawn, ((left, right),) = panels(2, 3.6)
    for axes, what, title in ((left, "flops_causes", "FLOPs"), (right, "cache_causes", "cache")):
        causes = list(found[what]["pro"])
        for shift, name in ((-0.2, "pro"), (0.2, "flash")):
            values = [found[what][name][c]["shapley"] for c in causes]
            bars = axes.barh(
                [i + shift for i in range(len(causes))], values, 0.36, color=COLOURS[name], label=name
            )  # fmt: skip
            axes.bar_label(bars, [f"{v:.2f}x" for v in values], padding=2, fontsize=8)
        axes.axvline(1, color="#222", linewidth=0.8)
        axes.set(title=f"factor saved: {title}", yticks=range(len(causes)), xlim=(0, 4.6))
        axes.set_yticklabels([_wrapped(found[what]["pro"][c]["what"]) for c in causes], fontsize=8)
        axes.invert_yaxis()
        axes.legend(loc="lower right")
    return drawn


def _wrapped(text: str) -> str:
    import textwrap

    return "\n".join(textwrap.wrap(text, 26))


def _fits(config: AnyConfig, machines: Sequence[hardware.Machine]) -> Any:
    names = list(dict.fromkeys([*(m.name for m in machines if m.device.key != "cpu"), *MAP_MACHINES]))
    rows = [hardware.machine(name) for name in names]
    rows.sort(key=lambda m: m.usable_bytes)
    contexts = [c for c in MAP_CONTEXTS if c <= config.max_position_embeddings] or [config.max_position_embeddings]
    fits = report.what_fits(config, rows, contexts)
    drawn, ((axes,),) = panels(1, 0.38 * len(rows) + 1.2)
    shades = [[float("nan") if n < 0 else min(4.0, len(str(n)) - (n == 0)) for n in row] for row in fits]
    axes.pcolormesh(shades, cmap="Blues", vmin=0, vmax=6, edgecolors="white")
    for i, row in enumerate(fits):
        for j, n in enumerate(row):
            axes.text(j + 0.5, i + 0.5, "" if n < 0 else f"{n:,}", ha="center", va="center", fontsize=9)
    axes.set(xlabel="context, K tokens", xticks=[j + 0.5 for j in range(len(contexts))])
    axes.set(yticks=[i + 0.5 for i in range(len(rows))])
    axes.invert_yaxis()
    axes.set_xticklabels([f"{c // 1024}" for c in contexts])
    axes.set_yticklabels([f"{m.name} ({m.count * m.device.memory:,.0f} GB)" for m in rows])
    return drawn
