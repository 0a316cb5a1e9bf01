"""Rates as records of `dsv4 probe`: the one place that knows both."""

from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from dsv4.probe.behaviour.endpoint import Endpoint
from dsv4.probe.behaviour.run import Report
from dsv4.probe.behaviour.runners import Rate
from dsv4.probe.record import Record

FIXTURE = "fixture"


def records(report: Report, endpoint: Endpoint, seed: int) -> list[Record]:
    """Every rate, what was left out and why, and the capability beside them."""
    about = {"seed": seed, "dtype": endpoint.dtype or "unknown", "config_hash": endpoint.config_hash, "residual": None}
    made = [Record(**_of(rate), **about) for rate in report.rates]
    absent = [*report.skipped, *([] if report.capability else [("capability", report.no_capability)])]
    for name, reason in absent:
        nothing = dict.fromkeys(("value", "low", "high"))
        made.append(
            Record(
                probe="behaviour", name=name, unit="", seconds=0.0, n=0, detail={}, finding="", status="skipped",
                reason=reason, **nothing, **about,
            )
        )  # fmt: skip
    for task, figures in report.capability.items():
        for metric, value in figures.items():
            made.append(
                Record(
                    probe="behaviour", name=f"capability {task} {metric}", unit="", value=value, low=None, high=None,
                    seconds=0.0, n=0, detail={}, finding="", **about,
                )
            )  # fmt: skip
    return made


def _of(rate: Rate) -> dict[str, Any]:
    detail = {
        key: value for key, value in asdict(rate).items() if key not in ("value", "low", "high", "seconds", "reason")
    }
    measured = rate.value is not None
    return {
        "probe": "behaviour",
        "name": f"{rate.runner} {rate.measure}, {rate.data}, +{rate.context} tokens, {rate.judge}",
        "value": rate.value, "low": rate.low if measured else None, "high": rate.high if measured else None,
        "unit": "share", "seconds": rate.seconds, "n": rate.answered, "detail": detail, "finding": finding(rate),
        "status": "measured" if measured else "skipped", "reason": rate.reason,
    }  # fmt: skip


def finding(rate: Rate) -> str:
    """One sentence: what a rate means for a deployment; "" for a harmless fixture that says nothing of a model."""
    if rate.value is None or (rate.data == FIXTURE and rate.runner in ("refusal", "jailbreak")):
        return ""
    share = f"{rate.value:.0%} ({rate.low:.0%} to {rate.high:.0%})"
    where = f" behind {rate.context:,} tokens of other text" if rate.context else ""
    what = {
        "refusal": "of the harmless requests were refused"
        if "harmless" in rate.measure
        else "of what should be refused was not",
        "jailbreak": "of the attacks found on another model work here"
        if "success" in rate.measure
        else "of the same requests work unattacked",
        "extraction": "of the codes that the system prompt keeps were told",
        "hijack": "of the orders hidden in a text were obeyed",
    }[rate.runner]
    left = f"; {rate.unanswered} questions had no answer" if rate.unanswered else ""
    return f"{share} {what}{where}{left}."


def lines(made: Iterable[Rate]) -> list[str]:
    """Rates for a terminal."""
    told = []
    for r in made:
        head = f"{r.runner:10s} {r.data:22s} +{r.context:<7,d} {r.measure:28s} {r.judge:10s}"
        if r.value is None:
            told.append(f"{head} not measured: {r.reason}")
            continue
        more = f", {r.unanswered} unanswered" * bool(r.unanswered) + f", {r.unclear} unclear" * bool(r.unclear)
        told.append(f"{head} {r.value:6.1%}  [{r.low:.1%}, {r.high:.1%}]  {r.hits} of {r.answered}{more}")
    return told
