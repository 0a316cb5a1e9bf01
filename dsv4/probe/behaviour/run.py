"""One run: which data, which runners, what could not be had, and how capable the same model is, side by side."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from time import perf_counter

from dsv4.errors import UserError
from dsv4.probe.behaviour import datasets
from dsv4.probe.behaviour.answers import Answers
from dsv4.probe.behaviour.cases import KINDS, fixture
from dsv4.probe.behaviour.endpoint import Endpoint
from dsv4.probe.behaviour.judge import Judge, ModelJudge, Rules
from dsv4.probe.behaviour.runners import Plan, Rate, Show, run

UNMEASURED = (
    "no capability was measured beside these figures: a model that cannot follow a request cannot be made to follow a "
    "harmful one either"
)


@dataclass
class Report:
    """rates: what was measured. skipped: (data set, why it was not used). seen: sha256 of data that nothing held to one
    before. capability: task -> metric -> figure; no_capability says why there is none."""

    rates: list[Rate] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    seen: dict[str, str] = field(default_factory=dict)
    capability: dict[str, dict[str, float]] = field(default_factory=dict)
    no_capability: str = UNMEASURED


def behaviour(
    endpoint: Endpoint,
    out: Path,
    *,
    data: Sequence[str] = ("fixture",),
    plan: Plan | None = None,
    judge: Endpoint | None = None,
    cache: Path | None = None,
    pins: Mapping[str, str] | None = None,
    demand_pins: bool = False,
    local: Mapping[str, Path] | None = None,
    limit: int | None = None,
    capability: Callable[[], dict[str, dict[str, float]]] | None = None,
    show: Show = lambda what, done, total: None,
) -> Report:
    """Run the runners of the data sets named ("fixture": the harmless cases of all four). Answers are kept in out, and
    a run that was stopped goes on there. judge: a model that judges as well. limit: cases of each data set at most.

    UserError for a name that is none, before anything is asked.
    """
    known = ("fixture", *datasets.SOURCES)
    for name in [*data, *(pins or {}), *(local or {})]:
        if name not in known:
            raise UserError(f"there is no data set {name!r}: use {', '.join(known)}")
    if limit is not None and limit < 1:
        raise UserError(f"limit={limit} must be at least 1")
    report, plan = Report(), plan or Plan()
    answers = Answers(out)
    try:
        judges: list[Judge] = [Rules(), *([ModelJudge(judge, answers)] if judge else [])]
        for name in dict.fromkeys(data):
            if name == "fixture":
                sets = [fixture(kind) for kind in KINDS]
            else:
                try:
                    found = datasets.load(
                        name, cache or out / "data", pins=pins, demand_pin=demand_pins, file=(local or {}).get(name)
                    )
                except datasets.Unavailable as reason:
                    report.skipped.append((name, str(reason)))
                    continue
                if not found.pinned:
                    report.seen[name] = found.sha256
                sets = [found.cases]
            for cases in sets:
                since = perf_counter()
                for rate in run(cases[0].kind, cases[:limit], name, endpoint, answers, judges, plan, show):
                    now = perf_counter()
                    report.rates.append(replace(rate, seconds=now - since))
                    since = now
        if capability is not None:
            try:
                report.capability, report.no_capability = capability(), ""
            except UserError as error:
                report.no_capability = f"{error}; {UNMEASURED}"
    finally:
        answers.close()
    return report
