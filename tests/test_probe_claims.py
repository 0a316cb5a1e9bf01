"""Failures caught here: a verdict that is not what the measurement says, or that is given without one; a quantity that
a claim is judged by and no probe measures.
"""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dsv4 import UserError
from dsv4.cli import application
from dsv4.measure.subjects import small_model
from dsv4.probe import runner
from dsv4.probe.claims import CLAIMS, rows
from dsv4.probe.record import Record
from dsv4.probe.subject import Recorder, Settings, Subject
from dsv4.probe.table import PROBES, chosen


@pytest.fixture
def ratio() -> Record:
    return Recorder("gain.ratio", Subject(small_model((0, 4))), Settings())(
        "R = rho(mHC) / rho(plain)", 1.5, "x", interval=(1.2, 1.8), n=6
    )


def verdict(record: Record) -> str:
    return next(r.verdict for r, c in zip(rows([record]), CLAIMS, strict=True) if c.probe == record.probe)


@pytest.mark.parametrize(
    ("low", "value", "high", "said"),
    [
        (2.1, 3.0, 4.0, "supported on this model"),
        (1.2, 1.5, 2.5, "weakly supported"),
        (0.9, 1.0, 1.1, "not supported"),
        (0.5, 0.7, 0.9, "contradicted"),
    ],
)
def test_the_interval_decides_and_not_the_value(
    ratio: Record, low: float, value: float, high: float, said: str
) -> None:
    assert verdict(replace(ratio, low=low, value=value, high=high)).startswith(said)


def test_without_a_measurement_it_is_open(ratio: Record) -> None:
    absent = replace(ratio, name="failed", value=None, low=None, high=None, status="failed", reason="broke down")
    for records in ([], [absent]):
        for row, claim in zip(rows(records), CLAIMS, strict=True):
            assert row.measured == "-"
            assert row.verdict.startswith("open: ") if claim.judge else row.verdict.endswith("not measured)")


def test_every_judged_quantity_is_measured_by_its_probe() -> None:
    """By the source of the probes: the names are there, letter by letter (f-strings aside, for gain.ratio)."""
    source = "".join(p.read_text() for p in Path(runner.__file__).parent.glob("*.py") if p.name != "claims.py")
    for claim in CLAIMS:
        if claim.judge:
            assert claim.probe in PROBES
            assert f'"{claim.quantity}"'.replace("plain", "{residual}") in source, claim.quantity


def test_the_command(tmp_path: Path) -> None:
    subject = Subject(small_model((0, 4)), name="small")
    runner.run(subject, chosen("quick", ["routing.hash"]), Settings(), tmp_path, lambda *_: None)
    command = ["probe", "--claims", "--out", str(tmp_path), "--json"]
    result = CliRunner().invoke(application(["probe"]), command)
    assert result.exit_code == 0, result.output
    found = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(found) == len(CLAIMS)
    judged = [f for f in found if f["measured"] != "-"]
    assert len(judged) == 1 and judged[0]["verdict"].startswith("a public lever")
    result = CliRunner().invoke(application(["probe"]), ["probe", "--claims", "--out", str(tmp_path / "none")])
    assert isinstance(result.exception, UserError) and "run.json" in str(result.exception)
