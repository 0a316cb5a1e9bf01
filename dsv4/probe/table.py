"""Every probe by its name: the question, the suite it belongs to, what it needs of a model, and what runs it."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from dsv4.config import AnyConfig
from dsv4.errors import UserError, nearest
from dsv4.probe import (
    attacks,
    compression,
    embedding,
    fidelity,
    gain,
    hashing,
    hijack,
    indexed,
    mixing,
    needle,
    numerics,
    recovery,
    routing,
    selection,
)
from dsv4.probe.record import Record
from dsv4.probe.subject import Settings, Subject, Suite


@dataclass(frozen=True)
class Probe:
    """needs: why it cannot run on a model of this configuration, or None. suite: the smallest one that it is in."""

    name: str
    question: str
    suite: Suite
    needs: Callable[[AnyConfig], str | None]
    run: Callable[[Subject, Settings], Iterator[Record]]


_ALL: list[Probe] = [
    Probe(
        mixing.NAME, "Can mixing the residual streams amplify a perturbation, at any depth?", "quick", mixing.needs,
        mixing.run,
    ),
    Probe(
        "gain.jacobian", "How much larger is a small change of the input before the head?", "quick", gain.needs_trunk,
        gain.run_jacobian,
    ),
    Probe(
        "gain.ratio", "Does mHC carry perturbations further than a plain residual with the same weights?", "quick",
        gain.needs_mhc, gain.run_ratio,
    ),
    Probe(
        "gain.dynamic", "What do input-dependent coefficients add to what the certificate bounds?", "quick",
        gain.needs_mhc, gain.run_dynamic,
    ),
    Probe(
        embedding.NAME, "How large a change of the embeddings changes the next token?", "quick", gain.needs_trunk,
        embedding.run,
    ),
    Probe(
        attacks.NAME, "Can tokens be found that make the model say what an attacker wants?", "quick", attacks.needs,
        attacks.run,
    ),
    Probe(
        compression.NAME, "Do attacks on tokens work the same without compression, and with narrow memories?", "quick",
        compression.needs, compression.run,
    ),
    Probe(
        selection.NAME, "How little does it take to change what CSA reads?", "quick", indexed.needs_choice,
        selection.run,
    ),
    Probe(
        hijack.NAME, "Can a text push the system prompt out of what CSA reads?", "quick", indexed.needs_choice,
        hijack.run,
    ),
    Probe(
        fidelity.ECLIPSE, "How much of an HCA entry can one token take?", "quick", fidelity.needs_hca,
        fidelity.run_eclipse,
    ),
    Probe(
        fidelity.BLEED, "Which entries mix texts of two authors?", "quick", fidelity.needs_entries, fidelity.run_bleed,
    ),
    Probe(
        needle.NAME, "What can it read back from far before, by depth, length and phase?", "quick", needle.needs,
        needle.run,
    ),
    Probe(
        recovery.NAME, "How many bits of 128 tokens can be read back from one HCA entry?", "quick", recovery.needs,
        recovery.run,
    ),
    Probe(
        hashing.NAME, "What do the public hash tables let anyone do to the experts' load?", "quick", hashing.needs,
        hashing.run,
    ),
    Probe(
        "routing.learned", "How close are the learned router's choices?", "quick", routing.needs_gate,
        routing.run_learned,
    ),
    Probe("routing.silence", "What does a single expert carry?", "quick", routing.needs_gate, routing.run_silence),
    Probe(
        "streams.ablate", "What does each residual stream carry?", "quick", routing.needs_streams, routing.run_streams,
    ),
    Probe(
        numerics.INVARIANCE, "Does a text's computation show what else is computed?", "quick", numerics.needs_nothing,
        numerics.run_invariance,
    ),
    Probe(
        numerics.DRIFT, "What do narrow memories change, by length?", "quick", numerics.needs_nothing,
        numerics.run_drift,
    ),
    Probe(numerics.LOOPS, "Does long greedy text loop?", "quick", numerics.needs_nothing, numerics.run_loops),
]  # fmt: skip

PROBES: dict[str, Probe] = {probe.name: probe for probe in _ALL}


def chosen(suite: Suite, only: Sequence[str] = ()) -> list[Probe]:
    """The probes of a suite in the table's order, or those named, whatever their suite; a name's first part ("gain")
    stands for all below it. UserError for an unknown name."""
    if not only:
        return [p for p in PROBES.values() if suite == "full" or p.suite == "quick"]
    for name in only:
        if not _of(name):
            known = [*PROBES, *{p.partition(".")[0] for p in PROBES}]
            raise UserError(f"there is no probe {name!r}{nearest(name, known)}; dsv4 probe --list names them")
    wanted = {p for name in only for p in _of(name)}
    return [p for p in PROBES.values() if p.name in wanted]


def _of(name: str) -> list[str]:
    return [p for p in PROBES if p == name or p.startswith(f"{name}.")]
