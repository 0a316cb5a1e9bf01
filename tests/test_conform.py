"""Failures caught here: a right port that is called wrong; a known mistake that is not noticed, not named, or taken
for another; and an unknown one that is given a name.

Each known mistake is made in this package's torch model (conform_faults.py); what the diagnosis compares with is the
plain model, which shares no code with it.
"""

from pathlib import Path

import pytest
import torch
from conform_faults import FAULTS
from pytest import MonkeyPatch

from dsv4 import ops
from dsv4.checkpoint import save
from dsv4.conform.adapters.ours import Ours
from dsv4.conform.diagnose import Verdict, judge
from dsv4.conform.mistakes import MISTAKES
from dsv4.conform.vectors import Kit, kit_model


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("kit")
    save(kit_model(), path)
    return path


@pytest.fixture(scope="session")
def kit() -> Kit:
    return Kit()


FEW = ("hca, prompt of 0", "hca, prompt of 1 ", "hca, prompt of 127 ")


def asking(kit: Kit, *components: str) -> Kit:
    """The kit with these components, and few of their many alike cases; answers are shared with the whole one."""
    some = Kit()
    some._kept = kit._kept

    def wanted(case) -> bool:
        many = case.name.startswith("hca, prompt of") and not case.name.startswith(FEW)
        long = case.component == "model" and not case.name.startswith(("a prompt of 3,", "a prompt of 128"))
        return case.component in components and not many and not long

    some.cases = [c for c in kit.cases if wanted(c)]
    return some


def named(verdicts: list[Verdict]) -> set[str]:
    found: set[str] = set()
    for v in verdicts:
        for f in v.findings:
            assert f.state != "error", f"{f.case.id}: {f.reason}"
            if f.state == "departs":
                found |= set(f.mistakes) or {f"unknown in {f.case.id}"}
    return found


@pytest.mark.parametrize("name", FAULTS)
def test_a_known_mistake_is_named(kit, folder, monkeypatch: MonkeyPatch, name: str) -> None:
    fault, components = FAULTS[name]
    low = components == ("roundings of BF16",)
    port = Ours(dtype=torch.bfloat16 if low else torch.float32, backend="reference")
    port.load(folder)
    wraps = fault(port, monkeypatch) or {}
    with ops.wrapped(wraps, lambda op, right: wraps[op](right)):
        assert named(judge(port, asking(kit, *components))) == {name}


def test_every_known_mistake_is_made() -> None:
    assert set(FAULTS) == set(MISTAKES)
