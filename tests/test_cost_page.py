"""Failures caught here: a page of `dsv4 cost --html` that fetches something, runs something, or has plots that are not
drawn in a real browser; a summary that fills more than a screen, tables that lose a figure; a wrong question on the
command line, or a page that cannot be written, without a one-sentence answer before anything is counted.
"""

import json
import re
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from browser import chromium, drawn, holds_everything_itself
from typer.testing import CliRunner

from dsv4.cli import application
from dsv4.config import ModelConfig
from dsv4.cost import report
from dsv4.cost.flops import KINDS, SCHEMES
from dsv4.cost.tables import bytes_, flops, tokens
from dsv4.errors import FileError, UserError

BLUE, ORANGE = (47, 95, 208), (208, 117, 47)  # Pro and Flash


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "cost.html"
    result = CliRunner().invoke(application(), ["cost", "--html", str(path), "--json"])
    assert result.exit_code == 0, result.output
    return path


def test_the_page_holds_everything_itself(page: Path) -> None:
    holds_everything_itself(page)


def test_the_plots_are_drawn_in_a_browser(page: Path) -> None:
    found = drawn(page)
    assert found["fetched"] == []
    figures = {f["id"]: f for f in found["figures"]}
    assert list(figures) == ["against-context", "components", "causes", "fits-0", "fits-1"]
    words = {
        "against-context": ["v3.2", "pro", "flash", "1000"], "components": ["319.5", "1,196.7", "core: hca", "50.4"],
        "causes": ["2.19x", "1.82x", "3.96x"], "fits-0": ["31", "h200x8 (1,128 GB)"], "fits-1": ["232"],
    }  # fmt: skip
    for name, figure in figures.items():
        assert figure["width"] > 500 and figure["height"] > 150 and figure["shapes"] > 9, figure
        assert set(words[name]) <= set(figure["words"]), name

    picture = page.with_name("page.png")
    size = f"--window-size=1100,{found['height'] + 100}"
    chromium(f"--screenshot={picture}", size, f"file://{page}", folder=page.parent)
    pixels = (255 * matplotlib.image.imread(picture)[..., :3]).round().astype(int)
    for name, colours in {"against-context": (BLUE, ORANGE), "components": (BLUE,), "causes": (BLUE, ORANGE)}.items():
        f = figures[name]
        part = pixels[int(f["y"]) : int(f["y"] + f["height"]), int(f["x"]) : int(f["x"] + f["width"])]
        for colour in colours:
            pixels_of_it = (np.abs(part - np.array(colour)).max(axis=-1) < 12).sum()
            assert pixels_of_it > 300, f"{name}: {pixels_of_it} pixels of {colour}"


def cost(*arguments: str) -> str:
    result = CliRunner().invoke(application(), ["cost", *arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


def counted(*arguments: str) -> dict:
    return json.loads(cost(*arguments, "--json"))["model"]


def test_the_summary_fits_one_screen() -> None:
    """24 lines of 100 columns with the figures that people ask for; the rest is one word away."""
    said = cost()
    lines = said.splitlines()
    assert len(lines) < 24 and max(map(len, lines)) <= 100
    figures = ("1,573.0 B", "48.9 B", "319.5 G", "26.7%", "10.1%", "5.3 GB", "10.48%", "2.19x", "FP8 equivalents")
    for figure in (*figures, "--details", "--json", "--html"):
        assert figure in said, figure
    assert "(+0.48)" not in said and "Ways to count" not in said
    assert len(cost("--context", ",".join(f"{n}k" for n in range(1, 41))).splitlines()) < 24


def test_the_summary_of_a_model_answers_a_planner() -> None:
    """Batch, what fits and the smallest machines, model first; also where a batch or the weights do not fit."""
    said = cost("pro", "--batch", "8", "--hardware", "h200x8")
    lines = said.splitlines()
    assert lines[0].startswith("pro: 1,572,997,179,491 parameters") and len(lines) < 24
    assert "step of 8" in said and "Smallest machines for 8 x 1M: mi325x4 (13 fit, 185 tokens/s)" in said
    row = next(line for line in lines if line.startswith("1M"))
    assert row.split() == ["1M", "319.5", "G", "5.3", "GB", "h200x8", "31", "3.38", "ms", "296", "2,367"]
    many = cost("pro", "--batch", "64", "--hardware", "h200x8,b200x4", "--context", "1m", "--rate", "20")
    assert "31 (too few)" in many and "weights do not" in many and "at 20 tokens/s each: " in many
    assert "none of the known accelerators" in cost("pro", "--rate", "100000")


def test_a_path_is_shown_as_it_is_spelt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Square brackets are markup to the library that draws the tables."""
    monkeypatch.chdir(tmp_path)
    Path("my[red]model.json").write_text(json.dumps(ModelConfig.preset("small").to_json()))
    assert cost("my[red]model.json").startswith("my[red]model.json: ")


def test_tables_of_the_comparison() -> None:
    said = cost("--details")
    for figure in ("1,572,997,179,491", "26.7%", "10.1%", "319.5 G", "5.3 GB", "10.48%", "257K", "2.19 / 2.91 / 1.60"):
        assert figure in said, figure


def test_letters_in_the_table_are_those_that_are_taken() -> None:
    """The table of ways to count has letters for the schemes that --scheme takes, and the message names the same."""
    table = cost("--details").split("Ways to count FLOPs")[1].split("Ways to count the cache")[0]
    rows = re.findall(r"│ (\S) +│ ", table)
    assert [row for row in rows if row != "-"] == list(SCHEMES) and rows.count("-") == 3
    for letter in "kLmZ":
        with pytest.raises(UserError, match=f"unknown: use one of {', '.join(SCHEMES)}, or weights"):
            CliRunner().invoke(application(["cost"]), ["cost", "--scheme", letter], catch_exceptions=False)


def test_details_say_all_and_json_does_not_change() -> None:
    assert "Parameters" in cost("flash", "--details") and "Parameters" not in cost("flash")
    assert cost("flash", "--json") == cost("flash", "--json", "--details")


def test_json_of_a_model() -> None:
    model = counted("flash", "--context", "4k,1m", "--hardware", "h200x8,mi355x8", "--batch", "4")
    assert [c["context"] for c in model["contexts"]] == [4096, 1 << 20]
    at = model["contexts"][1]
    assert at["cache_bytes"] == sum(at["cache_by_part"].values()) == 3_700_378_624
    assert at["decode_flops_weighted"] == 120_714_690_560
    assert [m["machine"] for m in at["machines"]] == ["h200x8", "mi355x8"] and at["machines"][0]["sequences"] == 232
    exact, paged = (counted("flash", "--context", "1000", "--page", n)["contexts"][0] for n in ("1", "256"))
    assert paged["cache_bytes"] > exact["cache_bytes"]


def test_own_weights_and_formats() -> None:
    raw = counted("pro", "--context", "1m", "--scheme", "a")
    own = counted("pro", "--context", "1m", "--scheme", "core=1,idx4=1")
    assert raw["contexts"][0]["decode_flops_weighted"] == own["contexts"][0]["decode_flops_weighted"]
    wide = counted("pro", "--context", "1m", "--dtype", "bfloat16")
    assert wide["row_bytes"] == {"attention row": 1024, "index key": 256}
    assert wide["active_bytes_per_token"] > 2 * raw["active_bytes_per_token"]


def test_a_config_file_and_a_folder(tmp_path: Path) -> None:
    small = ModelConfig.preset("small")
    (tmp_path / "config.json").write_text(json.dumps(small.to_json()))
    page = tmp_path / "small.html"
    for source in (tmp_path, tmp_path / "config.json"):
        out = counted(str(source), "--context", "4k", "--html", str(page))
        assert out["parameters"] == counted("small")["parameters"]
    assert "fits-0" in page.read_text() and "fits-1" not in page.read_text()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["prro"], "did you mean 'pro'"),
        (["p" * 300], "is neither a model"),
        (["pro", "--context", "0." + "9" * 5000 + "m"], "is not a number of tokens"),
        (["pro", "--context", "2m"], "beyond max_position_embeddings=1,048,576"),
        (["--context", "1025k"], "beyond max_position_embeddings=1,048,576"),
        (["pro", "--context", "4q"], "context '4q' is not a number of tokens"),
        (["pro", "--context", "0"], "is not a number of tokens"),
        (["pro", "--hardware", "h2000x8"], "did you mean 'h200'"),
        (["pro", "--hardware", ""], "names no machine"),
        (["pro", "--dtype", "int3"], "dtype 'int3' is unknown"),
        (["pro", "--scheme", "Q"], "scheme 'Q' is unknown"),
        (["pro", "--scheme", "core=much"], "is not kind=number"),
        (["pro", "--batch", "0"], "batch=0 must be from 1 to 1,000,000"),
        (["pro", "--batch", "-3"], "batch=-3 must be from 1"),
        (["pro", "--batch", str(10**400)], "must be from 1 to 1,000,000"),
        (["pro", "--rate", "nan"], "a rate of nan is not one"),
        (["--rate", "nan"], "a rate of nan is not one"),
        (["pro", "--rate", "inf"], "a rate of inf is not one"),
        (["pro", "--rate", "-1"], "a rate of -1.0 is not one"),
        (["pro", "--rate", "1e300"], "from 0 to 1,000,000"),
        (["pro", "--page", "0"], "a page of 0 tokens is not one"),
        (["pro", "--page", str(10**30)], "from 1 to 1,048,576"),
        (["pro", "--hardware", "h200x99999999999"], "too many accelerators: give from 1 to 100,000"),
        (["pro", "--hardware", "h200x" + "9" * 9999], "too many accelerators"),
        (["pro", "--hardware", "h200x0"], "without accelerators"),
        (["pro", "--hardware", "h200x-1"], "accelerator 'h200x-1' is unknown"),
        (["pro", "--hardware", "h200x\u0663"], "is unknown"),
        (["pro", "--hardware", "cpu,h2000"], "did you mean 'h200'"),
        (["pro", "--context", "1e400"], "is not a number of tokens"),
        (["pro", "--context", "9" * 5000], "is beyond all models"),
        (["pro", "--context", "9" * 300 + "m"], "is beyond all models"),
        (["pro", "--context", "\u0664k"], "is not a number of tokens"),
        (["pro", "--context", "nan"], "is not a number of tokens"),
        (["pro", "--scheme", "core=nan"], "core=nan must be a number from 0 to 1,000"),
        (["pro", "--scheme", "core=1e308"], "must be a number from 0 to 1,000"),
        (["--scheme", ",".join(f"{k}=0" for k in KINDS if k != "idx4")], "a token of v3.2 costs nothing"),
        (["--batch", "4"], "needs a model"),
        (["--page", "256"], "--page 256 needs a model"),
        (["--hardware", "b200"], "--hardware b200 needs a model or --html"),
        (["gpt2.json"], "model_type 'gpt2' is not V4-like"),
        (["empty"], "holds neither config.json nor checkpoints"),
    ],
)
def test_wrong_questions_get_one_sentence(arguments: list[str], sentence: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("gpt2.json").write_text('{"model_type": "gpt2", "n_layer": 12}')
    Path("empty").mkdir()
    result = CliRunner().invoke(application(), ["cost", *arguments])
    assert isinstance(result.exception, UserError) and sentence in str(result.exception), result.output
    assert "\n" not in str(result.exception) and result.output == ""


NO_COUNTING = "something was counted before the place of the page was looked at"


@pytest.mark.parametrize("where", ["folder", "file/page.html", "file/deep/page.html", "x" * 300 + "/page.html"])
@pytest.mark.parametrize("model", [[], ["small"]])
def test_a_page_that_cannot_be_written_is_told_before_the_counting(where, model, tmp_path, monkeypatch) -> None:
    """A folder, a file in the place of its folder, a name that no disk takes: one sentence, exit code 1."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("mine")
    for function in ("of_model", "comparison"):
        monkeypatch.setattr(report, function, lambda *_, **__: pytest.fail(NO_COUNTING))
    result = CliRunner().invoke(application(["cost"]), ["cost", *model, "--html", str(tmp_path / where)])
    assert isinstance(result.exception, FileError) and "\n" not in str(result.exception), result.output
    assert "cannot" in str(result.exception) and result.exception.exit_code == 1
    assert (tmp_path / "file").read_text() == "mine" and not list((tmp_path / "folder").iterdir())


def test_a_read_only_place_is_told_before_the_counting(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("os.access", lambda path, mode: False)  # the tests may run as root, who may write anywhere
    monkeypatch.setattr(report, "comparison", lambda *_, **__: pytest.fail(NO_COUNTING))
    result = CliRunner().invoke(application(["cost"]), ["cost", "--html", str(tmp_path / "page.html")])
    assert isinstance(result.exception, FileError) and "is read-only" in str(result.exception)


def test_a_full_disk_loses_the_page_and_not_the_answer(tmp_path, monkeypatch) -> None:
    """The tables are out by then; an older page stays; nothing half written is left."""
    place = tmp_path / "page.html"
    place.write_text("older")

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    result = CliRunner().invoke(application(["cost"]), ["cost", "small", "--html", str(place)])
    assert isinstance(result.exception, FileError) and "No space left on device" in str(result.exception)
    assert result.stdout.startswith("small: ")
    assert place.read_text() == "older" and [p.name for p in tmp_path.iterdir()] == ["page.html"]


def test_the_asked_for_model_comes_first_on_its_page(tmp_path: Path) -> None:
    page = tmp_path / "deep" / "small.html"
    cost("small", "--html", str(page))
    headings = re.findall(r"<h2>(.*?)</h2>", page.read_text())
    assert headings[:2] == ["small", "What fits"]


def test_units() -> None:
    assert [tokens(n) for n in (4096, 1 << 20, 1000, 3 << 19, None)] == ["4K", "1M", "1,000", "1.5M", "never"]
    assert [bytes_(n) for n in (12, 4096, 5_299_115_008, 999_900_000)] == ["12 B", "4.1 kB", "5.3 GB", "1,000 MB"]
    assert flops(319491407872) == "319.5 G"
