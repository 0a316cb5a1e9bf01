"""The tables of `dsv4 cost` in a terminal, drawn from its report."""

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from dsv4.cost.report import COMPARED, scheme_name


def show(out: dict[str, Any]) -> None:
    """Everything that is in a report."""
    console = Console(width=None if Console().is_terminal else 140, highlight=False)
    if "model" in out:
        _model(console, out["model"])
    if "comparison" in out:
        _comparison(console, out["comparison"])
    if "measured" in out:
        _measured(console, out["measured"])


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
        f"[bold]{r['model']}[/bold]: {p['total']:,} parameters (routing biases apart: {p['routing_biases']:,}; "
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
    batch = at[0]["machines"][0]["batch"] if at[0]["machines"] else 1
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
        [k, v["what"], *(f"{v[n + ' %']:.1f}% ({v[n + ' error']:+.1f})" for n in ("pro", "flash"))]
        for k, v in r["other_ways_to_count_flops"].items()
    ]
    note = (
        f"Of {r['readings']['tried']} ways to weigh, {r['readings']['fit']} give both 3.7x and 9.8x: "
        "all with FP4 scores at 1/2 and the core at 2"
    )
    _table(console, "Ways to count FLOPs, said 27% and 10%", ["", "way", "pro", "flash"], rows, note)
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
