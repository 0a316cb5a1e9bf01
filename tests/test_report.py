"""Failures caught here: a page of `dsv4 report` that fetches something, runs something, lacks a plot of a figure that
the log has or draws one that it has not, is not drawn in a real browser, breaks on a log that was cut off or is of an
older run, or grows with the length of the run; a wrong folder without a one-sentence answer.
"""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from browser import drawn, holds_everything_itself
from typer.testing import CliRunner

from dsv4.cli import application
from dsv4.errors import UserError
from dsv4.train.page import FIGURES, all_curves, page_of

LAYERS = ("1", "3")


def record(step: int, **more: Any) -> dict[str, Any]:
    """A record with every figure that a run may have; those of an evaluation at every tenth."""
    made: dict[str, Any] = {
        "step": step, "loss": 6 / step**0.2, "mtp_loss": 6.5 / step**0.2, "bpb": 3 / step**0.2, "lr": 1e-3,
        "grad_norm": 1 + 1 / step, "index_grad_norm": 0.1, "tokens": 100 * step, "tokens_per_second": 900.0 + step % 7,
        "mfu": 0.31, "optimizer_share": 0.08, "memory_bytes": 3 << 30, "load_max": 1.5, "load_cv": 0.4,
        "index_kl": dict.fromkeys(LAYERS, 0.2 / step), "index_recall": dict.fromkeys(LAYERS, 0.7),
        "index_mass": dict.fromkeys(LAYERS, 0.9),
    }  # fmt: skip
    if step % 10 == 0:
        made |= {
            "heldout_bpb": 2.5 / step**0.2, "sink_mass": {"0": 0.02, "1": 0.03}, "mhc_row_gain": 1.0001,
            "mhc_column_gain": 1.02, "mtp_acceptance": 0.456,
        }  # fmt: skip
    return made | more


def run_folder(folder: Path, records: list[dict[str, Any]]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "log.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    records = [record(step) for step in range(1, 101)]
    records.insert(50, {"step": 50, "event": "resumed", "changed": {"optim.lr": [1e-3, 5e-4]}})
    records[-1]["diverging"] = True
    folder = run_folder(tmp_path / "my <run>", records)
    (folder / "config.yaml").write_text("schedule: {steps: 200}\noptim: {lr: 0.001}\n")
    return folder


def test_the_plots_are_drawn_in_a_browser(run: Path) -> None:
    result = CliRunner().invoke(application(), ["report", str(run)])
    assert result.exit_code == 0, result.output
    page = run / "report.html"
    holds_everything_itself(page)
    found = drawn(page)
    assert found["fetched"] == []
    figures = {f["id"]: f for f in found["figures"]}
    assert list(figures) == [f.name for f in FIGURES]
    words = {
        "loss": ["nats per token", "next token; 2.438", "held out; 0.9953"], "course": ["gradient norm", "rate; 0.001"],
        "speed": ["MFU; 31", "optimiser's share; 8", "most held; 3"], "experts": ["load; 1.5", "load; 0.4"],
        "inside": ["largest row; 1", "largest column; 1.02", "layer 0; 2", "layer 1; 3"],
        "drafts": ["accepted; 45.6"], "indexer": ["layer 1; 0.7", "layer 3; 0.9", "KL, nats"],
    }  # fmt: skip
    for name, figure in figures.items():
        assert figure["width"] > 500 and figure["height"] > 150 and figure["shapes"] > 5, figure
        assert set(words[name]) <= set(figure["words"]), (name, figure["words"])
    text = page.read_text()
    assert "my &lt;run&gt;" in text and "my <run>" not in text
    assert "Step 100 of 200; 10,000 tokens." in text
    assert "resumed" in text and "optim.lr" in text and "diverging" in text


def test_what_a_log_does_not_have_is_left_out(tmp_path: Path) -> None:
    """A model without experts, MTP, streams or indexers that learn, and a record of an older run."""
    plain = ("step", "loss", "lr", "grad_norm", "tokens", "tokens_per_second")
    records = [{k: v for k, v in record(step).items() if k in plain} for step in range(1, 4)]
    page = page_of(run_folder(tmp_path / "run", records))
    assert [f.name for f in FIGURES if f'<figure id="{f.name}"' in page] == ["loss", "course", "speed"]
    assert "training bits per byte" not in page and "MFU" not in page and "Settings" not in page


def test_a_log_that_was_cut_off_and_numbers_that_are_none(tmp_path: Path) -> None:
    records = [record(step) for step in range(1, 30)] + [record(30, grad_norm=math.nan, load_max=None)]
    folder = run_folder(tmp_path / "run", records)
    with (folder / "log.jsonl").open("a") as file:
        file.write('{"step": 31, "lo')
    assert "Step 30; 3,000 tokens." in page_of(folder)
    steps, values = all_curves(records)["grad_norm"][""]
    assert steps == list(range(1, 30)) and all(map(math.isfinite, values))


def test_a_long_run_has_no_longer_page(tmp_path: Path) -> None:
    few = ("step", "loss", "grad_norm", "sink_mass")

    def length(name: str, steps: int) -> int:
        records = [{k: v for k, v in record(step).items() if k in few} for step in range(1, steps + 1)]
        return len(page_of(run_folder(tmp_path / name, records)))

    assert length("long", 20000) < 1.5 * length("short", 1000)


def test_curves_by_layer() -> None:
    found = all_curves([record(10), record(20)])["index_kl"]
    assert {layer: steps for layer, (steps, _) in found.items()} == {"1": [10, 20], "3": [10, 20]}
    assert found["1"][1] == [0.02, 0.01] and found["3"] == found["1"]


def test_wrong_use(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no run"):
        page_of(tmp_path)
    with pytest.raises(UserError, match="no update yet"):
        page_of(run_folder(tmp_path / "run", [{"step": 0, "event": "resumed"}]))
