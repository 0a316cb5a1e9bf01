"""The rows of `dsv4 bench frontier` for a person: a table, and a plot of all who ran over the length of the context."""

from collections.abc import Sequence
from typing import Any

from dsv4.cost.page import panels, svg
from dsv4.measure.rows import Row

COLOURS = {"dsv4": "#2f5fd0", "transformers": "#777777", "vllm": "#d0752f", "llama": "#3f9c6b", "nano": "#8a4fbf"}


def machine_line(limits: Row) -> str:
    return (
        f"this machine: matrix products {limits['fp32_tflops']:.3g} TFLOP/s in fp32, {limits['bf16_tflops']:.3g} in "
        f"bf16; memory {limits['read_gb_s']:.3g} GB/s read, {limits['copy_gb_s']:.3g} copied; "
        f"{limits['threads']} threads"
    )


def lines(rows: Sequence[Row], ceiling: bool = False) -> list[str]:
    """The rows for a person, under a head; a peer's come with how many times faster ours are.

    ceiling: with the machine's rates above, and what it would do at best in each row.
    """
    rows, skipped = [r for r in rows if "skipped" not in r], [r for r in rows if "skipped" in r]
    best = f" {'at best':>9s}" if ceiling else ""
    out = [machine_line(rows[0])] if ceiling and rows else []
    out.append(
        f"{'who':13s} {'ctx':>9s} {'prefill tok/s':>13s}{best} {'share':>6s} {'decode ms':>9s}{best} {'share':>6s} "
        f"{'cache MiB':>9s} {'peak GiB':>8s}"
    )
    ours = {r["ctx"]: r for r in rows if r["who"] == "dsv4"}
    for r in rows:
        cache = "" if r["cache_bytes"] is None else f"{r['cache_bytes'] / 2**20:.2f}"
        fast, soon = (f" {r['prefill_best_tok_s']:9,.0f}", f" {r['decode_best_ms']:9.2f}") if ceiling else ("", "")
        text = (
            f"{r['who']:13s} {r['ctx']:9,d} {r['prefill_tok_s']:13,.0f}{fast} {r['prefill_share']:6.0%} "
            f"{r['decode_ms']:9.2f}{soon} {r['decode_share']:6.0%} {cache:>9s} {r['peak_rss'] / 2**30:8.2f}"
        )
        if r["batch_tok_s"] is not None:
            text += f"   batch {r['batch']}: {r['batch_tok_s']:,.0f} tokens/s, {r['batch_times']:.1f} x batch 1"
        if r["who"] != "dsv4":
            mine = ours[r["ctx"]]
            text += f"   ours: prefill {mine['prefill_tok_s'] / r['prefill_tok_s']:.1f} x"
            text += f", decode {r['decode_ms'] / mine['decode_ms']:.1f} x as fast"
        out.append(text)
    return out + [f"{r['who']}: skipped: {r['skipped']}" for r in skipped]


def plot(rows: Sequence[Row]) -> str:
    """An SVG: prefill in tokens/s and a decoded token in ms over the context; dashed, what the machine does at best."""
    return svg("frontier", lambda: _panels([r for r in rows if "skipped" not in r]))


def _panels(rows: Sequence[Row]) -> Any:
    figure, ((left, right),) = panels(2)
    for axes, what, best, title in (
        (left, "prefill_tok_s", "prefill_best_tok_s", "prefill, tokens/s"),
        (right, "decode_ms", "decode_best_ms", "a decoded token, ms"),
    ):
        for who in dict.fromkeys(r["who"] for r in rows):
            mine = [r for r in rows if r["who"] == who]
            x = [r["ctx"] / 1024 for r in mine]
            axes.plot(x, [r[what] for r in mine], color=COLOURS[who], marker="o", label=who)
            if who == "dsv4":
                axes.plot(x, [r[best] for r in mine], color=COLOURS[who], linestyle="--", label="at best here")
        axes.set(title=title, xlabel="context, K tokens", xscale="log", ylim=(0, None))
        ticks = sorted({r["ctx"] / 1024 for r in rows})
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend()
    return figure
