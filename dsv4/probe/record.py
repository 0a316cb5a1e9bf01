"""What a probe answers: one quantity with its uncertainty and everything that is needed to ask for it again.

Data only. A quantity that was not measured is a record too: `status` says so and `reason` why; it never counts as a
pass, and no figure stands in it.
"""

import json
import math
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

from dsv4.errors import UserError, nearest

# measured: value is a figure, or None where the answer is in detail. skipped: the probe does not apply to this model,
# or what it needs cannot be had. failed: it broke down.
Status = Literal["measured", "skipped", "failed"]
STATUSES = ("measured", "skipped", "failed")


@dataclass(frozen=True)
class Record:
    """One quantity of one probe.

    probe: its name in the table, such as gain.certificate. name: the quantity. low, high: the 95% confidence interval
    of value, None where there is no sampling in it. residual: how far an iteration was from its end (relative), None
    where nothing iterates. n: independent samples behind value. detail: plain JSON, what else is needed to judge it;
    detail["plot"] is drawn in the report (report.py). finding: one plain sentence, what it means for a deployment.
    """

    probe: str
    name: str
    value: float | None
    low: float | None
    high: float | None
    residual: float | None
    unit: str
    seed: int
    dtype: str
    config_hash: str
    seconds: float
    n: int
    detail: dict[str, Any] = field(default_factory=dict)
    finding: str = ""
    status: Status = "measured"
    reason: str = ""

    def __post_init__(self) -> None:
        assert self.status in STATUSES, self.status
        assert (self.status == "measured") == (not self.reason), "a reason belongs to what was not measured"
        assert self.status == "measured" or self.value is None, "what was not measured has no value"
        for name in ("value", "low", "high", "residual"):
            number = getattr(self, name)
            assert number is None or math.isfinite(number), f"{self.probe} {self.name}: {name}={number} is no number"
        assert self.low is None or self.high is None or self.low <= self.high
        json.dumps(self.detail, allow_nan=False)  # plain JSON, or a mistake of ours

    def to_json(self) -> dict[str, Any]:
        """A plain dict; `from_json` reads it back unchanged."""
        return asdict(self)

    @staticmethod
    def from_json(data: dict[str, Any]) -> "Record":
        """A record of a plain dict; UserError for a key that is unknown or missing, and for a wrong status."""
        known = [f.name for f in fields(Record)]
        for key in data:
            if key not in known:
                raise UserError(f"a record has the unknown key {key!r}{nearest(key, known)}: is it another version's?")
        missing = [name for name in known[:-4] if name not in data]
        if missing:
            raise UserError(f"a record lacks {', '.join(missing)}: is the file damaged?")
        try:
            return Record(**data)
        except (AssertionError, TypeError, ValueError) as error:
            raise UserError(
                f"a record of {data['probe']!r} contradicts itself ({error}): run that probe again"
            ) from None
