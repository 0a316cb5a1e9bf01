"""Labelled answers, made here from templates of our own about harmless topics: what the rule judge is measured on.

Half of the templates were there while the rules were written ("written_on"), the other half was written afterwards and
has never led to a change of a rule ("held_out"). What this shows: whether the rules know the wordings of refusal and
are not misled by hedges, quotations and disclaimers. What it does not: that answers of a real model look like these.
All templates are by the same hand, in English, and rows of one template stand or fall together, so that the number of
independent samples is that of the templates. `read_rows` takes anybody's labelled answers in their place.
"""

import csv
import io
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dsv4.errors import UserError
from dsv4.files import read_text
from dsv4.probe.behaviour import templates
from dsv4.probe.behaviour.refusal import judge
from dsv4.probe.behaviour.statistics import f1, wilson

HALVES = {"written_on": templates.WRITTEN_ON, "held_out": templates.HELD_OUT}
ROWS_PER_TEMPLATE = 12


@dataclass(frozen=True)
class Row:
    """An answer, whether it declines, the kind of its template ("refusal", "partial", "hedged" ...) and its number."""

    text: str
    refused: bool
    kind: str = ""
    template: str = ""


def rows(half: str, seed: int = 0) -> list[Row]:
    """The rows of one half; the same for the same seed."""
    rng, made = random.Random(f"{half} {seed}"), []
    for number, (kind, template) in enumerate(HALVES[half]):
        for topic in rng.sample(templates.TOPICS, ROWS_PER_TEMPLATE):
            facts = rng.sample(templates.FACTS, 4)
            text = template.format(topic=topic, a=facts[0], b=facts[1], c=facts[2], d=facts[3])
            made.append(Row(text, kind in templates.REFUSED, kind, f"{half} {number}"))
    return made


def measured(found: Sequence[Row]) -> dict[str, object]:
    """How the rule judge does on labelled rows: precision, recall, specificity and F1 of "refused" (unclear is not
    refused), how many templates have all rows right, with the interval of that share, and the kinds it gets wrong."""
    said = [judge(row.text) == "refused" for row in found]
    truth = [row.refused for row in found]
    wrong: dict[str, int] = {}
    failed: set[tuple[bool, str]] = set()
    for row, answer in zip(found, said, strict=True):
        if answer != row.refused:
            wrong[row.kind] = wrong.get(row.kind, 0) + 1
            failed.add((row.refused, row.template))
    templates_of = {(row.refused, row.template) for row in found}
    right = len(templates_of) - len(failed)
    return {
        "rows": len(found), **f1(truth, said), "templates": len(templates_of), "templates_right": right,
        "templates_right_interval": wilson(right, len(templates_of)), "wrong": wrong,
    }  # fmt: skip


def read_rows(path: Path, text: str = "assistant_response", label: str = "human_score") -> list[Row]:
    """Rows of somebody's CSV file: the answer, and 1 or 0 for whether it declines. Lines with a # first are notes."""
    whole = read_text(path, "the labelled answers", "give a CSV file in UTF-8")
    while whole.startswith("#"):
        whole = whole.partition("\n")[2]
    made = []
    for number, record in enumerate(csv.DictReader(io.StringIO(whole)), 1):
        if record.get(text) is None or (record.get(label) or "").strip() not in ("0", "1", "0.0", "1.0"):
            raise UserError(f"row {number} of {path} has no {text!r} or no 0 or 1 as {label!r}: name other columns")
        made.append(Row(record[text], float(record[label]) == 1, "theirs", str(number)))
    if not made:
        raise UserError(f"{path} holds no row: give a CSV file with the columns {text} and {label}")
    return made
