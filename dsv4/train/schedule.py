"""The course of a run as pure functions of the step: learning rate, the weight of the MTP loss, the indexers' phase.

Steps count updates from 0 to `total` - 1. The rate climbs over the first `warmup` updates, stays, and falls
along a half cosine over the last `decay` updates; the MTP loss loses weight from the first of these (paper
section 4.2.2). Nothing here keeps state, so a resumed run follows the same course.
"""

import math

from dsv4.errors import UserError
from dsv4.model.segments import IndexPhase


def check_schedule(total: int, warmup: int, decay: int, final: float = 0.1) -> None:
    """Raise a UserError if these settings describe no possible course. All lengths are in updates."""
    if total < 1:
        raise UserError(f"a run of {total} steps trains nothing: set at least 1 step")
    if warmup < 0 or decay < 0:
        raise UserError(f"warm-up {warmup} and decay {decay} are lengths in steps: neither may be negative")
    if warmup + decay > total:
        raise UserError(
            f"warm-up {warmup} + decay {decay} exceed the {total} steps: lower "
            "schedule.warmup or schedule.decay_fraction, or raise schedule.steps"
        )
    if not 0 <= final <= 1:  # also refuses a NaN
        raise UserError(f"the final rate {final} is a fraction of the peak rate: choose it between 0 and 1")


def decay_steps(total: int, fraction: float) -> int:
    """The length of a decay that fills the last `fraction` (0 to 1) of `total` updates."""
    if not 0 <= fraction <= 1:
        raise UserError(f"the decay fraction {fraction} is a share of the run: choose it between 0 and 1")
    return round(total * fraction)


def lr_scale(step: int, total: int, warmup: int, decay: int, final: float = 0.1) -> float:
    """Factor on the peak learning rate for update number `step`.

    No update is wasted at rate 0: the first one runs at 1 / warmup, number warmup - 1 at the full rate, and
    the last one of the run at exactly `final`, where the rate stays if the run goes on. V4: 2000 warm-up
    steps, final 0.1.
    """
    check_schedule(total, warmup, decay, final)
    if step < warmup:
        return (step + 1) / warmup
    into_decay = step + 1 - (total - decay)
    if into_decay <= 0:
        return 1.0
    if into_decay >= decay:
        return final
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * into_decay / decay))


def mtp_weight(step: int, total: int, warmup: int, decay: int, *, before: float = 0.3, after: float = 0.1) -> float:
    """Weight of the MTP loss at update number `step`: `after` from the first update of the decay on."""
    check_schedule(total, warmup, decay)
    return before if step < total - decay else after


def index_phase(step: int, dense: int, warmup: int) -> IndexPhase:
    """The phase of update number `step`: `dense` updates in which CSA reads every entry, `warmup` updates that train
    the indexers alone, and from then on sparse attention with indexers that go on learning (paper section 4.2.2)."""
    return "dense" if step < dense else "warmup" if step < dense + warmup else "sparse"


def trunk_step(step: int, dense: int, warmup: int) -> int:
    """How many updates the trunk has had before update number `step`: in the warm-up of the indexers it has none, so
    its course stands still."""
    return step - min(max(step - dense, 0), warmup)
