"""`dsv4 probe --claims`: what a widely read security guide to V4 (16 May 2026) says, beside what report and code do and
what was measured on this model.

Covers its statements on security and on the mechanisms that they rest on. A verdict without a measurement comes from
the report and the released code and says so; one that a probe can judge is open until that probe has run, and holds for
the model that was probed, with the interval of its record. It says nothing of another checkpoint.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dsv4.probe.record import Record

OPEN = "open: {probe} has not been measured on this model"


@dataclass(frozen=True)
class Claim:
    """said: the statement, in short. is_so: what report and released code do. probe, quantity, judge: the record that
    decides, and how; without them `verdict` is that of report and code."""

    said: str
    is_so: str
    verdict: str = ""
    probe: str = ""
    quantity: str = ""
    judge: Callable[[Record], str] | None = None


@dataclass(frozen=True)
class Row:
    said: str
    is_so: str
    measured: str
    verdict: str


def _carried(r: Record) -> str:
    """Full strength would be a ratio to a plain residual clearly above 1."""
    if r.low is None or r.high is None:
        return "not decided: the record has no interval"
    if r.low > 2:
        return "supported on this model: more than twice a plain residual with the same weights"
    if r.low > 1:
        return "weakly supported: further than a plain residual, by the ratio measured"
    if r.high < 1:
        return "contradicted: less far than a plain residual with the same weights"
    return "not supported: no difference from a plain residual is shown"


def _certified(r: Record) -> str:
    if r.detail.get("holds"):
        return "true of mixing alone: it amplifies nothing, on this model; what sublayers add is free"
    return "NOT TRUE of this model: its mixing amplifies"


def _evicted(r: Record) -> str:
    if r.low is not None and r.low > 0:
        return "there is an attack surface: text pushes the system prompt out of CSA's choice; pin it"
    return "no eviction found by these attacks, which is no proof that there is none"


def _loaded(r: Record) -> str:
    return (
        "a public lever on load, whatever the text: one token repeated reaches the worst case exactly"
        if (abs((r.value or 0) - r.detail.get("worst_case", 0)) < 1e-9)
        else "the tables of this model are not as published: a repeated token does not reach the worst case"
    )


def _recovered(r: Record) -> str:
    return (
        f"wrong: nothing is decoded; of {r.detail['put_in']} bits put into a group of this model a linear decoder "
        f"reads {max(0.0, r.value or 0):.1f} from its entry"
    )


CLAIMS: tuple[Claim, ...] = (
    Claim(
        "Small adversarial changes of the input travel through mHC with full strength, where a standard residual would "
        "damp them.",
        "A standard residual damps nothing: it adds. mHC's mixing matrices are doubly stochastic (nearly), so mixing "
        "cannot amplify; read and write coefficients are bounded by sigmoids.",
        probe="gain.ratio", quantity="R = rho(mHC) / rho(plain)", judge=_carried,
    ),
    Claim(
        "mHC constrains each layer's output to a manifold tied to its input, so that signals stay stable.",
        "The constraint is on the matrix that mixes the residual streams; a sublayer's output is free and is added "
        "with a weight between 0 and 2.",
        probe="gain.certificate", quantity="composite forward gain", judge=_certified,
    ),
    Claim(
        "CSA attends to anchor tokens and a local window, by a selection that cannot be reproduced from the paper.",
        "There are no anchors: an indexer scores entries of 4 tokens for every query and the best are read; report "
        "and released code define it fully (ops.index_scores_topk).",
        "wrong about the mechanism; that selection is a surface is right, for another reason",
    ),
    Claim(
        "Whoever attacks the attention works from incomplete information.",
        "Weights and inference code are public, so anybody can compute the scores that select: an attacker has them.",
        probe="selection.hijack", quantity="V of the tokens found by gradient (level 4)", judge=_evicted,
    ),
    Claim(
        "HCA stores distant keys and values by low-rank decomposition and quantisation and decodes them on demand.",
        "It pools 128 tokens into one entry, near and far alike, and reads entries as they are; nothing is decoded. "
        "What follows for security is that an entry can mix tokens of different trust.",
        probe="fidelity.hca", quantity="bits per entry, linear decoder", judge=_recovered,
    ),
    Claim(
        "Better routing wastes fewer activations.",
        "The first layers route by a public table of token ids, whatever the text says; no gain is claimed for it.",
        probe="routing.hash", quantity="LF of one token repeated", judge=_loaded,
    ),
    Claim(
        "The safety training is undocumented: no methods, no red-team findings, no adversarial examples in the report.",
        "So it is; the report has no section on safety. The EU training-content summary of 4 August 2026 answers "
        "the question of the data in part.",
        "right, as of November 2026",
    ),
    Claim(
        "No adversarial benchmark is reported (TensorTrust, AdvBench, JailbreakBench).",
        "None is; others have measured agent attacks on V4-Flash since (docs/robustness.md), and none of these three.",
        "right, as of November 2026; measure your own deployment",
    ),
)  # fmt: skip


def rows(records: Sequence[Record]) -> list[Row]:
    """Every claim with what was measured of it, and the verdict."""
    found = {(r.probe, r.name): r for r in records if r.status == "measured"}
    made = []
    for claim in CLAIMS:
        if claim.judge is None:
            made.append(Row(claim.said, claim.is_so, "-", f"{claim.verdict} (report and code, not measured)"))
            continue
        record = found.get((claim.probe, claim.quantity))
        if record is None:
            made.append(Row(claim.said, claim.is_so, "-", OPEN.format(probe=claim.probe)))
            continue
        span = "" if record.low is None else f" [{record.low:.4g}, {record.high:.4g}]"
        measured = f"{claim.quantity}: {record.value:.4g}{span}, n={record.n}, seed {record.seed}"
        made.append(Row(claim.said, claim.is_so, measured, claim.judge(record)))
    return made
