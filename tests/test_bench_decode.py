"""Failures caught here: a report on a decode step that counts other operations than those that run, or whose figures do
not hold together; a step that starts an operation for each sequence."""

import json

import pytest
import torch
from typer.testing import CliRunner

from dsv4.bench import decode
from dsv4.cli import application
from dsv4.errors import UserError


def test_operations_are_counted_as_they_are_started() -> None:
    x = torch.ones(3)
    with decode.Operations() as seen:
        y = x + 1  # add
        (y * y).sum()  # mul, sum
        y.view(3, 1)  # a view is one too
    assert seen.by_name == {"aten.add.Tensor": 1, "aten.mul.Tensor": 1, "aten.sum.default": 1, "aten.view.default": 1}
    assert decode.count(lambda: [x + 1 for _ in range(5)]) == 5


def test_the_report_holds_together_and_a_step_does_not_grow_with_its_sequences() -> None:
    """At batch 8 as at 64: at most 1.3 times the operations of one sequence."""
    notes: list[str] = []
    rows = decode.measure(decode.TINY(), ["packed"], torch.device("cpu"), notes.append, batches=(1, 8))
    assert [row["batch"] for row in rows] == [1, 8] and len(notes) == 3
    one, eight = rows
    for row in rows:
        assert row["operations_least"] <= row["operations"] <= row["operations_most"]
        assert row["times_batch_1"] == row["operations"] / one["operations"]
        assert row["fastest"] <= row["seconds"] <= row["slowest"] and 0 < row["plan_share"] < 1
        assert row["tokens_per_second"] == row["batch"] / row["seconds"]
    assert 1 <= eight["times_batch_1"] <= 1.3
    assert (eight["shortest"], eight["longest"]) == (300, 349)
    assert len(decode.lines(rows)) == 3 and "packed" in decode.lines(rows)[2]


def test_an_unknown_format_is_refused_before_any_work() -> None:
    with pytest.raises(UserError, match="'pakced' is unknown"):
        decode.measure(decode.TINY(), ["pakced"], torch.device("cpu"), lambda _: pytest.fail("work was begun"))


def test_the_verb_prints_one_object(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "measure", lambda model, formats, device, note: [{"formats": formats}])
    done = CliRunner().invoke(application(["bench"]), ["bench", "decode", "--format", "packed", "--json"])
    assert done.exit_code == 0 and json.loads(done.stdout) == {"rows": [{"formats": ["packed"]}]}
