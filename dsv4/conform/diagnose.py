"""Is a port right, and if not, which mistake gives its numbers?

Every case is asked of the port and compared with the plain model's answer. Where they part, the plain model answers
again with each known mistake in it: the mistake whose answer is the port's has been found. If there is none, the port
departs in a way that is not known, and the first place is said. A mistake that fits more cases goes before one that
contradicts some.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from dsv4.conform.adapter import Best
from dsv4.conform.cases import EACH, MAX, ROUNDED, SHARE, TYPICAL, Case
from dsv4.conform.mistakes import HARMLESS, MISTAKES, ROUNDING, WRONG_DRAFTER
from dsv4.conform.parts import Answer
from dsv4.conform.vectors import TOLERANCE, Kit
from dsv4.errors import UserError

FP32_INPUTS = {"frequencies", "sink", "weights", "post", "mix"}  # what stays FP32 in a port of any dtype
SEARCHES = 6  # in a component: of cases which no mistake explains that has been found already
PAIRED = 12  # so many mistakes are tried in pairs
State = Literal["pass", "departs", "absent", "error"]


@dataclass
class Finding:
    """What came of one case. distance: in units of what is allowed; where: the first place that is too far off."""

    case: Case
    state: State
    distance: float = 0.0
    where: str = ""
    reason: str = ""
    mistakes: tuple[str, ...] = ()  # which together give the port's numbers
    got: dict[str, Tensor | Best] = field(default_factory=dict, repr=False)


@dataclass(frozen=True)
class Verdict:
    """On one component: its findings, the mistakes that explain it, and a line for people."""

    component: str
    findings: list[Finding]

    @property
    def state(self) -> State:
        states = {f.state for f in self.findings}  # of what is implemented
        return next(s for s in ("error", "departs", "pass", "absent") if s in states)

    @property
    def mistakes(self) -> list[str]:
        return list(dict.fromkeys(name for f in self.findings for name in f.mistakes))

    @property
    def line(self) -> str:
        count = {s: sum(f.state == s for f in self.findings) for s in ("pass", "departs", "absent", "error")}
        if self.state == "pass":
            more = f", {count['absent']} not implemented" if count["absent"] else ""
            worst = max((f.distance for f in self.findings if f.state == "pass"), default=0.0)
            return f"pass: {count['pass']} cases, at most {worst:.0%} of what is allowed{more}"
        first = next(f for f in self.findings if f.state == self.state)
        if self.state == "absent":
            return f"not implemented: {first.reason}"
        if self.state == "error":
            return f"raised in {first.case.name}: {first.reason}"
        named = "; ".join(f"{name} ({MISTAKES[name].right})" for name in self.mistakes)
        what = named or "unknown departure"
        unknown = sum(f.state == "departs" and not f.mistakes for f in self.findings)
        what += f"; {unknown} of them are not explained" if named and unknown else ""
        where = f"first in {first.case.name}" + (f", {first.where}" if first.where else "")
        return f"{count['departs']} of {len(self.findings)} cases depart: {what}; {where}"

    def to_json(self) -> dict[str, Any]:
        def tell(f: Finding) -> dict[str, Any]:
            far = f.distance if f.distance < float("inf") else None
            return {
                "name": f.case.name, "state": f.state, "share_of_allowed": far, "where": f.where, "reason": f.reason,
                "mistakes": list(f.mistakes),
            }  # fmt: skip

        named = {name: MISTAKES[name].right for name in self.mistakes}
        cases = [tell(f) for f in self.findings]
        return {"component": self.component, "state": self.state, "mistakes": named, "line": self.line, "cases": cases}


def judge(adapter: Any, kit: Kit, note: Callable[[str], None] = lambda line: None) -> list[Verdict]:
    """Verdicts on all components in order. The adapter has loaded the kit's model."""
    findings = []
    for number, case in enumerate(kit.cases):
        if not findings or case.component != findings[-1].case.component:
            note(case.component)
        findings.append(ask(adapter, kit, case, number))
    components = list(dict.fromkeys(case.component for case in kit.cases))
    known: list[str] = []  # mistakes found so far: most likely they are at work in what comes later, too
    for component in components:
        wrong = [f for f in findings if f.case.component == component and f.state == "departs"]
        searched = 0
        for finding in wrong:
            finding.mistakes = _already(finding, known, kit, adapter)
            if not finding.mistakes and searched < SEARCHES:
                finding.mistakes = explain(finding, findings, known, kit, adapter)
                searched += 1
                known += [m for m in finding.mistakes if m not in known]
    return [Verdict(c, [f for f in findings if f.case.component == c]) for c in components]


# --- asking ----------------------------------------------------------------------------------------------------------


def ask(adapter: Any, kit: Kit, case: Case, number: int = 0) -> Finding:
    """One case, asked and compared."""
    low = adapter.dtype != torch.float32
    if case.measure == SHARE and not low:
        return Finding(case, "absent", reason="only where activations are BF16")
    answers = hasattr(adapter, "answer")
    if not answers and not hasattr(adapter, case.call):
        return Finding(case, "absent", reason=f"the adapter has no function {case.call}")
    try:
        got = adapter.answer(number, case) if answers else _answer(adapter, case)
    except UserError:
        raise
    except NotImplementedError as missing:  # Missing is one
        return Finding(case, "absent", reason=str(missing))
    except Exception as error:  # a port may fail in any way, and the other cases are still to be judged
        return Finding(case, "error", reason=f"{type(error).__name__}: {error}")
    measure = measure_of(case, adapter)
    ways = [departure(got, kit.answer(case, *also, packed=adapter.packed), measure) for also in _harmless(measure)]
    far, where = min(ways)
    return Finding(case, "pass" if far <= 1 else "departs", far, where if far > 1 else "", got=got)


def _harmless(measure: str) -> list[tuple[str, ...]]:
    return [(), *((name,) for name in HARMLESS)] if measure == SHARE else [()]


def measure_of(case: Case, adapter: Any) -> str:
    """The case's own; more loosely where BF16 or a packed memory rounds on the way."""
    if case.measure in (SHARE, EACH) or case.dtype is not None:
        return case.measure
    if adapter.dtype != torch.float32:
        return TYPICAL
    return ROUNDED if adapter.packed and case.call != "part" else case.measure


def _answer(adapter: Any, case: Case) -> dict[str, Tensor | Best]:
    def cast(name: str, value: Any) -> Any:
        if not isinstance(value, Tensor) or value.dtype != torch.float32:
            return value
        return value if name in FP32_INPUTS else value.to(case.dtype or adapter.dtype)

    g = {name: cast(name, value) for name, value in case.given.items()}
    if case.call == "part":
        return adapter.part(case.what, case.layer, g)
    if case.call == "layer":
        return {"streams": adapter.layer(case.layer, g["streams"], g["ids"], g["calls"])}
    if case.call == "logits":
        if len(g["before"]):
            adapter.logits(g["before"], [len(g["before"])])
        return {"logits": adapter.logits(g["ids"], g["calls"])}
    if case.call == "batch":
        return {f"logits {i}": x for i, x in enumerate(adapter.batch(list(g["ids"].split(g["lengths"]))))}
    return {"logits": adapter.mtp(g["ids"])} if case.call == "mtp" else adapter.memory(g["ids"])


# --- comparing -------------------------------------------------------------------------------------------------------


def departure(got: dict[str, Tensor | Best], right: Answer, measure: str) -> tuple[float, str]:
    """The largest distance of any output, 1 being what is allowed, and the first place beyond it."""
    worst, first = 0.0, ""
    if not any(name in got for name in right):
        return float("inf"), f"nothing of {', '.join(right)} was given"
    for name, want in right.items():
        if name not in got:
            continue
        given = got[name]
        if isinstance(given, Best):
            given, want = _told(given, want)
        far, where = _distance(given.detach().cpu().double(), want, measure)
        worst = max(worst, far)
        if far > 1 and not first:
            first = f"{name}{where}"
    return worst, first


def _told(best: Best, logits: Tensor) -> tuple[Tensor, Tensor]:
    want = logits.log_softmax(dim=1)[best.rows].gather(1, best.tokens.clamp_min(0))
    return torch.where(best.tokens < 0, want, best.logprobs.double()), want


def _distance(got: Tensor, want: Tensor, measure: str) -> tuple[float, str]:
    if got.shape != want.shape:
        return float("inf"), f" has shape {list(got.shape)}, not {list(want.shape)}"
    if not want.numel():
        return 0.0, ""
    allowed = TOLERANCE[measure][0]
    same = (got == want) | (got.isnan() & want.isnan())
    off = torch.where(same, 0.0, (got - want).abs().nan_to_num(torch.inf, torch.inf))
    size = want.abs().nan_to_num(0.0)
    if measure in (ROUNDED, TYPICAL) and want.ndim > 1:
        rows = off.flatten(1).norm(dim=1) / size.flatten(1).norm(dim=1).clamp_min(1e-30)
        return rows.median().item() / allowed, ""
    if measure == SHARE:
        each = (off > 1e-5 * size).double()
        return each.mean().item() / allowed, f" at row {_row(each > 0)}"
    scale = size if measure == EACH else torch.full_like(size, size.max().item() or 1.0)
    far = torch.where(off == 0, 0.0, off / scale / allowed).nan_to_num(torch.inf, torch.inf)
    return far.max().item(), f" at row {_row(far > 1)}" if far.max() > 1 else ""


def _row(wrong: Tensor) -> int:
    """The first row in which something is wrong."""
    rows = wrong.flatten(1).any(dim=1) if wrong.ndim > 1 else wrong
    return int(rows.double().argmax())


# --- explaining ------------------------------------------------------------------------------------------------------


def _already(finding: Finding, known: list[str], kit: Kit, adapter: Any) -> tuple[str, ...]:
    """Of the mistakes that have been found elsewhere the one that explains this, or all of them together."""
    for names in (*((m,) for m in known), *([tuple(known)] if len(known) > 1 else [])):
        if _fits(finding, names, kit, adapter):
            return names
    return ()


def explain(finding: Finding, findings: Iterable[Finding], known: list[str], kit: Kit, adapter: Any) -> tuple[str, ...]:
    """The mistake that gives the port's numbers, or two of them; of several such the one that fits other cases best."""
    looked_for = [m for m in finding.case.mistakes if m != WRONG_DRAFTER]
    fits = [(m,) for m in looked_for if _fits(finding, (m,), kit, adapter)]
    if not fits:
        # two at once: what has been found with any other, or in a small part any two
        first = looked_for if len(looked_for) <= PAIRED else known
        pairs = dict.fromkeys(tuple(sorted((a, b))) for a in first for b in looked_for if a != b)
        fits = [pair for pair in pairs if _fits(finding, pair, kit, adapter)]
    if not fits and WRONG_DRAFTER in finding.case.mistakes and _fits(finding, (WRONG_DRAFTER,), kit, adapter):
        return (WRONG_DRAFTER,)
    if len(fits) > 1:
        near = [f for f in findings if f.got and f is not finding]
        fits.sort(key=lambda names: sum(_contradicts(f, names, kit, adapter) for f in _few(near, names[0])))
    return fits[0] if fits else ()


def _few(findings: list[Finding], mistake: str) -> list[Finding]:
    """At most three cases of each component in which the mistake would show."""
    seen: dict[str, int] = {}
    out = []
    for f in findings:
        if mistake in f.case.mistakes and seen.setdefault(f.case.component, 0) < 3:
            seen[f.case.component] += 1
            out.append(f)
    return out


def _fits(finding: Finding, names: tuple[str, ...], kit: Kit, adapter: Any) -> bool:
    """Whether the port's numbers are those of these mistakes, and not only nearer to them than to the right ones."""
    if WRONG_DRAFTER in names:
        return finding.case.call == "mtp" and _unrelated(finding, kit)
    case, measure = finding.case, measure_of(finding.case, adapter)
    told = [kit.answer(case, *names, *also, packed=adapter.packed) for also in _harmless(measure)]
    far = min(departure(finding.got, answer, measure)[0] for answer in told)
    if measure in (SHARE, ROUNDED, TYPICAL):
        return far < finding.distance / 3 and far <= 1
    if far > 1 and any(name in ROUNDING for name in names):  # a few numbers are so near a border that they go over it
        answers = kit.answer(case, *names), kit.answer(case)
        far, off = (departure(finding.got, x, TYPICAL)[0] * TOLERANCE[TYPICAL][0] for x in answers)
        return far < TOLERANCE[MAX][0] and far < off / 3
    return far <= 1


def _contradicts(finding: Finding, names: tuple[str, ...], kit: Kit, adapter: Any) -> bool:
    measure = measure_of(finding.case, adapter)
    return departure(finding.got, kit.answer(finding.case, *names, packed=adapter.packed), measure)[0] > 1


def _unrelated(finding: Finding, kit: Kit) -> bool:
    """Whether predictions have nothing to do with the right ones: the cosine of the two is small, without the means."""
    got, want = finding.got.get("logits"), kit.answer(finding.case)["logits"]
    if not isinstance(got, Tensor) or got.shape != want.shape or not got.isfinite().all():
        return False
    a, b = (x.double() - x.double().mean(dim=1, keepdim=True) for x in (got, want))
    return bool(((a * b).sum() / (a.norm() * b.norm()).clamp_min(1e-30)).abs() < 0.2)
