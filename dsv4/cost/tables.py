"""The tables of `dsv4 cost` in a terminal, drawn from its report. Needs rich; only the command line imports it."""

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dsv4.cost.flops import SCHEMES
from dsv4.cost.report import COMPARED, Scheme, scheme_name

SCREEN_WIDTH = 100  # of a summary that is not printed on a terminal


def show(out: dict[str, Any], *, details: bool = True) -> None:
    """A summary of one screen; with details everything that is in a report. What was measured is shown whole."""
    terminal = Console().is_terminal
    console = Console(width=None if terminal else 140, highlight=False)
    screen = Console(width=None if terminal else SCREEN_WIDTH, highlight=False)
    if "model" in out:
        _model_summary(screen, out["model"])
        if details:
            _model(console, out["model"])
    if "comparison" in out:
        _comparison_summary(screen, out["comparison"])
        if details:
            _comparison(console, out["comparison"])
    if not details and "measured" not in out:
        screen.print("All tables: --details. All numbers: --json. With plots: --html cost.html.")
    if "measured" in out:
        _measured(console, out["measured"])


def _summary_table(console: Console, head: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    table = Table(box=None, padding=(0, 2, 0, 0))
    for i, name in enumerate(head):
        table.add_column(name, justify="right" if i else "left")
    for row in rows:
        table.add_row(*(str(cell) for cell in row))
    console.print(table)


def _some(contexts: Sequence[dict[str, Any]], most: int) -> list[dict[str, Any]]:
    """At most so many, evenly spread, the last one always."""
    step = -(-len(contexts) // most)
    return list(contexts[::-1][::step][::-1])


def _model_summary(console: Console, r: dict[str, Any]) -> None:
    """What a planner asks: the model, a batch of it at each context on each machine, and the smallest machines."""
    p, batch, at = r["parameters"], r["batch"], r["contexts"]
    console.print(
        f"[bold]{escape(r['model'])}[/bold]: {p['total']:,} parameters, {p['active']:,} active per token; weights "
        f"{bytes_(r['weight_bytes'])} ({r['dtype']}); cache {_growth(r)}"
    )
    rows = [
        [
            tokens(c["context"]), flops(c["decode_flops_weighted"]), bytes_(c["cache_bytes"]), s["machine"],
            "weights do not" if s["sequences"] < 0 else f"{s['sequences']:,}"
            + ("" if s["sequences"] >= batch else " (too few)"),
            seconds(s["seconds"]), f"{s['tokens_per_second']:,.0f}", f"{s['tokens_per_second'] * batch:,.0f}",
        ]
        for c in _some(at, max(1, 8 // max(1, len(at[0]["machines"]))))
        for s in c["machines"]
    ]  # fmt: skip
    console.print()
    _summary_table(
        console, ["context", "FLOPs/token", "cache each", "machine", "fit", f"step of {batch}", "tokens/s each", "all"],
        rows,
    )  # fmt: skip
    console.print(
        f"\nCeilings at batch {batch}, without communication; {_counting(r['scheme'])}. Fit: sequences beside the "
        "weights."
    )
    found = [f"{m['machine']} ({m['sequences']:,} fit, {m['tokens_per_second']:,.0f} tokens/s)"
             for m in r["smallest_machines"]]  # fmt: skip
    rate = f" at {r['rate']:g} tokens/s each" if r["rate"] else ""
    more = f"; {len(found) - 5} more" if len(found) > 5 else ""
    none = "none of the known accelerators, up to 256 of them"
    console.print(
        f"Smallest machines for {batch} x {tokens(max(c['context'] for c in at))}{rate}: "
        f"{', '.join(found[:5]) or none}{more}."
    )


def _counting(scheme: Scheme) -> str:
    """A scheme in few words; the tables have all of them."""
    name = scheme_name(scheme)
    return f"scheme {': '.join(name.split(': ')[:2])}" if isinstance(scheme, str) else name


def _growth(r: dict[str, Any]) -> str:
    """A memory in two numbers, over all layer kinds."""
    fixed, each = (sum(two[i] for two in r["cache_fixed_and_per_token"].values()) for i in (0, 1))
    return f"{bytes_(fixed)} + {each:,.0f} B per token"


def _comparison_summary(console: Console, r: dict[str, Any]) -> None:
    """V4 beside V3.2 and Llama on one screen of 24 lines and 100 columns."""
    p, last = r["parameters"], r["contexts"][-1]

    def share(row: dict[str, Any], name: str, what: str) -> str:
        return f"{100 * row[name][what] / row['v3.2'][what]:.1f}%"

    console.print(f"[bold]What {tokens(last['context'])} tokens cost[/bold], counted from the configurations alone.")
    console.print(f"FLOPs of one decoded token; {_counting(r['scheme'])}.\n")
    rows = [
        [n, f"{p[n]['total'] / 1e9:,.1f} B", f"{p[n]['active'] / 1e9:,.1f} B", flops(last[n]["flops"]),
         share(last, n, "flops"), bytes_(last[n]["cache_bytes"]), share(last, n, "cache_bytes")]
        for n in COMPARED
    ]  # fmt: skip
    head = ["model", "parameters", "active", "FLOPs/token", "of v3.2", "cache/sequence", "of v3.2"]
    _summary_table(console, head, rows)
    rows = [
        [tokens(c["context"]), *(share(c, n, what) for what in ("flops", "cache_bytes") for n in ("pro", "flash"))]
        for c in _some(r["contexts"], 4)
    ]
    console.print()
    _summary_table(console, ["of v3.2 at", "pro FLOPs", "flash FLOPs", "pro cache", "flash cache"], rows)
    said = ", ".join(f"{c['name']} {c['said']:g}% ({c['counted']:.2f}%)" for c in r["claims"][:4])
    console.print(f"\nThe report at 1M, and counted here: {said}.")
    for what, name in (("flops_causes", "FLOPs"), ("cache_causes", "cache")):
        causes = sorted(r[what]["pro"].values(), key=lambda c: -c["shapley"])[:2]
        console.print(f"Saves most of pro's {name}: " + "; ".join(f"{c['what']} {c['shapley']:.2f}x" for c in causes))
    console.print("For one model and a machine: dsv4 cost pro --batch 8 --hardware h200x8")


def tokens(count: int | None, never: str = "never") -> str:
    """A context in the unit people use."""
    if count is None:
        return never
    for size, unit in ((1 << 20, "M"), (1 << 10, "K")):
        if count >= size and count % (size // 8) == 0:
            return f"{count / size:g}{unit}"
    return f"{count:,}"


def bytes_(count: float) -> str:
    """Decimal units, three digits."""
    for size, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= size:
            return f"{count / size:.3g} {unit}" if count < 999.5 * size else f"{count / size:,.0f} {unit}"
    return f"{count:,.0f} B"


def flops(count: float) -> str:
    for size, unit in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")):
        if count >= size:
            return f"{count / size:.4g} {unit}"
    return f"{count:,.0f}"


def seconds(s: float) -> str:
    return f"{s:.3g} s" if s >= 1 else f"{1e3 * s:.3g} ms" if s >= 1e-3 else f"{1e6 * s:.3g} us"


def _table(console: Console, title: str, head: Sequence[str], rows: Sequence[Sequence[Any]], note: str = "") -> None:
    table = Table(title=title, title_justify="left", title_style="bold", caption=note or None, caption_justify="left")
    for i, name in enumerate(head):
        table.add_column(name, justify="right" if i else "left")
    for row in rows:
        table.add_row(*(str(cell) for cell in row))
    console.print(table)


def _model(console: Console, r: dict[str, Any]) -> None:
    p = r["parameters"]
    console.print(
        f"[bold]{escape(r['model'])}[/bold]: {p['total']:,} parameters (routing biases apart: {p['routing_biases']:,}; "
        f"MTP block: {p['mtp']:,}), {p['active']:,} active per token\n"
        f"weights {bytes_(r['weight_bytes'])}, read per token {bytes_(r['active_bytes_per_token'])} ({r['dtype']})"
    )
    active = r["active_by_component"]
    _table(
        console, "Parameters", ["component", "total", "active per token"],
        [(n, f"{c:,}", f"{active.get(n, 0):,}") for n, c in r["parameters_by_component"].items()],
    )  # fmt: skip
    at = r["contexts"]
    contexts = [tokens(c["context"]) for c in at]
    names = list(dict.fromkeys(n for c in at for n in c["decode_by_component"]))
    rows = [[n, *(flops(c["decode_by_component"].get(n, 0)) for c in at)] for n in names]
    rows.append(["all", *(flops(c["decode_flops_weighted"]) for c in at)])
    rows.append(["all, raw", *(flops(c["decode_flops"]) for c in at)])
    rows.append(["a prompt of that length, raw", *(flops(c["prefill_flops"]) for c in at)])
    rows.append(["a training token, raw", *(flops(c["train_flops_per_token"]) for c in at)])
    _table(console, "FLOPs of one decoded token", ["context", *contexts], rows, scheme_name(r["scheme"]))
    names = list(dict.fromkeys(n for c in at for n in c["cache_by_part"]))
    rows = [[n, *(bytes_(c["cache_by_part"].get(n, 0)) for c in at)] for n in names]
    rows.append(["all", *(bytes_(c["cache_bytes"]) for c in at)])
    rows.append(["read for one token", *(bytes_(c["cache_read_bytes"]) for c in at)])
    two = "; ".join(
        f"{kind}: {bytes_(fixed)} + {each:,.2f} B per token"
        for kind, (fixed, each) in r["cache_fixed_and_per_token"].items()
    )
    _table(console, "Cache of one sequence", ["context", *contexts], rows, two)
    rows = [
        [
            s["machine"], tokens(c["context"]), s["sequences"] if s["sequences"] >= 0 else "weights do not fit",
            seconds(s["seconds"]), f"{s['tokens_per_second']:,.0f}", f"{s['tokens_per_second'] * s['batch']:,.0f}",
            s["bound"], seconds(s["prefill_seconds"]),
        ]
        for c in at
        for s in c["machines"]
    ]  # fmt: skip
    batch = r["batch"]
    _table(
        console, f"Ceilings at batch {batch}",
        ["machine", "context", "sequences that fit", "a step", "tokens/s each", "tokens/s all", "bound", "prompt"],
        rows, "communication, launches and activations are not in it; 90% of the memory is usable",
    )  # fmt: skip
    rows = [[m["machine"], m["sequences"], f"{m['tokens_per_second']:,.0f}"] for m in r["smallest_machines"]]
    what = f"Smallest machines for {batch} x {contexts[-1]}"
    _table(console, what, ["machine", "sequences that fit", "tokens/s each, at best"], rows)
    at_least = tokens(r["cache_outweighs_weights_from"], "no context below 64M")
    console.print(f"A step of {batch} reads more cache than weights from {at_least} on.")


def _comparison(console: Console, r: dict[str, Any]) -> None:
    def share(row: dict[str, Any], name: str, what: str) -> str:
        return f"{100 * row[name][what] / row['v3.2'][what]:.1f}%"

    p = r["parameters"]
    _table(
        console, "Parameters", ["model", "total", "with routing biases", "active", "active bytes per token"],
        [
            (n, f"{p[n]['total']:,}", f"{p[n]['total'] + p[n]['routing_biases']:,}", f"{p[n]['active']:,}",
             bytes_(r["active_bytes"][n]))
            for n in COMPARED
        ],
    )  # fmt: skip
    rows = [
        [tokens(c["context"]), *(flops(c[n]["flops"]) for n in COMPARED), share(c, "pro", "flops"),
         share(c, "flash", "flops")]
        for c in r["contexts"]
    ]  # fmt: skip
    head = ["context", *COMPARED, "pro/v3.2", "flash/v3.2"]
    _table(console, "FLOPs of one decoded token", head, rows, scheme_name(r["scheme"]))
    rows = [
        [tokens(c["context"]), *(bytes_(c[n]["cache_bytes"]) for n in COMPARED), share(c, "pro", "cache_bytes"),
         share(c, "flash", "cache_bytes")]
        for c in r["contexts"]
    ]  # fmt: skip
    note = "V3.2 and Llama are counted beyond their longest contexts too"
    _table(console, "Cache of one sequence", head, rows, note)
    _table(
        console, "The report's claims at 1,048,576 tokens", ["claim", "said", "counted", "off", "rule"],
        [(c["name"], f"{c['said']:g}%", f"{c['counted']:.2f}%", f"{c['error']:+.2f}", c["rule"]) for c in r["claims"]],
    )  # fmt: skip
    rows = [
        [k if k in SCHEMES else "-", v["what"],
         *(f"{v[n + ' %']:.1f}% ({v[n + ' error']:+.1f})" for n in ("pro", "flash"))]
        for k, v in r["other_ways_to_count_flops"].items()
    ]  # fmt: skip
    note = (
        f"Of {r['readings']['tried']} ways to weigh, {r['readings']['fit']} give both 3.7x and 9.8x: "
        "all with FP4 scores at 1/2 and the core at 2"
    )
    _table(console, "Ways to count FLOPs, said 27% and 10%", ["--scheme", "way", "pro", "flash"], rows, note)
    _table(
        console, "Ways to count the cache, said 9.5x and 13.7x", ["way", "v3.2", "pro", "flash", "pro x", "flash x"],
        [(v["what"], *(bytes_(v[n]) for n in COMPARED[:3]), f"{v['pro x']:.2f}", f"{v['flash x']:.2f}")
         for v in r["other_ways_to_count_the_cache"]],
    )  # fmt: skip
    for what, title in (("flops_causes", "Causes of the FLOP saving"), ("cache_causes", "Causes of the cache saving")):
        rows = [
            [s["what"], *(f"{r[what][m][c]['shapley']:.2f} / {r[what][m][c]['alone']:.2f} / {r[what][m][c]['last']:.2f}"
                          for m in ("pro", "flash"))]
            for c, s in r[what]["pro"].items()
        ]  # fmt: skip
        _table(console, title, ["factor: Shapley / alone / last", "pro", "flash"], rows)
    _table(
        console, "Public statements about V4-Pro", ["statement", "counted", "holds"],
        [(v["statement"], v["counted"], "yes" if v["holds"] else "no") for v in r["public_statements"]],
    )  # fmt: skip
    _table(
        console, "V4-Pro with other layers, in % of V3.2", ["variant", "FLOPs", "cache"],
        [(n, f"{f:.1f}%", f"{c:.1f}%") for n, (f, c) in r["hybrids"].items()],
    )  # fmt: skip
    crossed = ", ".join(f"{n} {tokens(c, 'never below 8M')}" for n, c in r["csa_cheaper_than_hca_from"].items())
    console.print(f"A CSA layer becomes cheaper than an HCA layer (FLOPs) from: {crossed}.")
    for n, by_batch in r["cache_outweighs_weights_from"].items():
        said = ", ".join(f"{b} {tokens(c, 'never below 64M')}" for b, c in by_batch.items())
        console.print(f"{n}: cache reads outweigh weight reads from: {said}.")


def _measured(console: Console, r: dict[str, Any]) -> None:
    worst = max((abs(p["off"]) for p in r["flops"]), default=0.0)
    rows = [
        [p["model"], tokens(p["context"]), p["component"], p["kind"], f"{p['counted']:,}", f"{p['executed']:,}",
         f"{100 * p['off']:+.3f}%"]
        for p in r["flops"]
    ]  # fmt: skip
    _table(
        console, "FLOPs of one decoded token, counted and executed",
        ["model", "context", "component", "kind", "counted", "executed", "off"], rows,
        f"largest difference {100 * worst:.3f}%",
    )  # fmt: skip
    rows = [
        [s["model"], s["format"], tokens(s["context"]), f"{s['counted']:,}", f"{s['allocated']:,}",
         s["allocated"] - s["counted"]]
        for s in r["caches"]
    ]  # fmt: skip
    _table(
        console, "Cache bytes, counted and allocated",
        ["model", "format", "context", "counted", "allocated", "difference"], rows,
    )  # fmt: skip
    rows = [
        [x["model"], x["what"], f"{x['counted']:.2f}%", f"{x['extrapolated']:.2f}%",
         f"{x['extrapolated'] - x['counted']:+.2f}", "-" if x["direct"] is None else f"{x['direct']:.2f}%"]
        for x in r["ratios"]
    ]  # fmt: skip
    fitted = ", ".join(tokens(c) for c in r["fitted"])
    note = f"real-width layers, a line fitted at {fitted}; largest context run {tokens(r['largest'])}"
    _table(
        console, "In % of V3.2 at 1M tokens: counted, and from measurements",
        ["model", "what", "counted", "extrapolated", "off", "measured at 1M"], rows, note,
    )  # fmt: skip
