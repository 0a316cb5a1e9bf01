"""The public data sets: fetched when they are asked for, kept outside the package, held to a sha256; none is shipped.

No published sha256 of these files was at hand, so none is written here. Whoever has one gives it (`pins`); else the one
that is seen first is recorded in pins.json beside the files, which is said, and a file that differs later is refused:
that shows a change, not that the first one was right. A data set that cannot be had is Unavailable, and is reported
so; it never counts as a pass.
"""

import csv
import hashlib
import io
import json
import re
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsv4 import files
from dsv4.errors import UserError, nearest
from dsv4.probe.behaviour.cases import Case, Kind, Wanted, system, user

PINS = "pins.json"
MOST_BYTES = 64 << 20
TIMEOUT_S = 60.0
_GITHUB = "https://raw.githubusercontent.com"


class Unavailable(Exception):
    """The data set cannot be had, for the reason given."""


@dataclass(frozen=True)
class Source:
    """rows: how many cases its authors publish, where that is known for sure; another number is not that data set."""

    name: str
    kind: Kind
    url: str
    parse: Callable[[str], Iterator[Case]]
    rows: int | None = None


@dataclass(frozen=True)
class Loaded:
    """pinned: held to a sha256 that was given or recorded before; else `sha256` was seen for the first time."""

    cases: list[Case]
    sha256: str
    pinned: bool


def load(
    name: str,
    cache: Path,
    *,
    pins: Mapping[str, str] | None = None,
    demand_pin: bool = False,
    file: Path | None = None,
    fetch: Callable[[str], bytes] | None = None,
) -> Loaded:
    """The cases of a data set. file: a copy of one's own in place of the download. demand_pin: without a sha256 that
    was given, nothing is read. Unavailable if it cannot be had; UserError for a name that is none."""
    if name not in SOURCES:
        raise UserError(f"there is no data set {name!r}{nearest(name, SOURCES)}: use one of {', '.join(SOURCES)}")
    source, given = SOURCES[name], (pins or {}).get(name, "").lower()
    if given and not re.fullmatch(r"[0-9a-f]{64}", given):
        raise UserError(f"the pin of {name} is {given!r}: a sha256 has 64 hex digits")
    if demand_pin and not given:
        raise Unavailable(f"no sha256 was given for {name}, and one is demanded")
    files.make_folder(cache)
    recorded = _recorded(cache)
    raw = _bytes(source, cache, file, fetch or download)
    sha256 = hashlib.sha256(raw).hexdigest()
    wanted = given or recorded.get(name, "")
    if wanted and sha256 != wanted:
        raise Unavailable(f"{name} has the sha256 {sha256}, and {wanted} is pinned: it is not the same data set")
    try:
        cases = list(source.parse(raw.decode("utf-8-sig")))
    except (UnicodeDecodeError, KeyError, ValueError, TypeError, AttributeError, csv.Error) as error:
        raise Unavailable(f"{name} is not laid out as expected ({type(error).__name__}: {error})") from None
    if not cases or (source.rows is not None and len(cases) != source.rows):
        raise Unavailable(f"{name} has {len(cases)} cases, not {source.rows or 'any'}: it is not the published one")
    if file is None:
        files.write_atomically(cache / f"{name}.data", lambda temporary: temporary.write_bytes(raw))
        if not wanted:
            files.write_json(cache / PINS, {**recorded, name: sha256})
    return Loaded(cases, sha256, bool(wanted))


def _recorded(cache: Path) -> dict[str, Any]:
    path = cache / PINS
    return files.read_json(path, "the recorded sha256s", "remove it to record anew") if path.exists() else {}


def _bytes(source: Source, cache: Path, file: Path | None, fetch: Callable[[str], bytes]) -> bytes:
    kept = file or cache / f"{source.name}.data"
    if file is not None or kept.exists():
        with files.explained(kept, "read"):
            return kept.read_bytes()
    return fetch(source.url)


def download(url: str) -> bytes:
    """The bytes at an https URL; Unavailable if they cannot be had."""
    if not url.startswith("https://"):
        raise Unavailable(f"{url} is no https URL")
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT_S) as answer:
            raw = answer.read(MOST_BYTES + 1)
    except (OSError, ValueError) as error:
        raise Unavailable(f"{url} cannot be fetched ({files.reason_of(getattr(error, 'reason', error))})") from None
    if len(raw) > MOST_BYTES:
        raise Unavailable(f"{url} has more than {MOST_BYTES:,} bytes")
    return raw


# --- how each is laid out --------------------------------------------------------------------------------------------


def _table(
    column: str,
    keep: Callable[[dict[str, str]], bool] = lambda row: True,
    wanted: Callable[[dict[str, str]], Wanted] = lambda row: "refuse",
) -> Callable[[str], Iterator[Case]]:
    """The reader of a CSV file in which `column` has the requests."""

    def parse(text: str) -> Iterator[Case]:
        for number, row in enumerate(csv.DictReader(io.StringIO(text))):
            if keep(row) and row[column].strip():
                wish = wanted(row)
                yield Case(str(number), "refusal", (user(row[column].strip()),), wish)

    return parse


def _xstest(row: dict[str, str]) -> Wanted:
    unsafe = row["label"].strip() == "unsafe" if "label" in row else row["type"].startswith("contrast")
    return "refuse" if unsafe else "answer"


def _artifacts(text: str) -> Iterator[Case]:
    """Attacks that were found on another model; those without a prompt were given up there."""
    for row in json.loads(text)["jailbreaks"]:
        if row["prompt"]:
            yield Case(str(row["index"]), "jailbreak", (user(row["prompt"]),), plain=row["goal"])


def _tensor_trust(kind: Kind) -> Callable[[str], Iterator[Case]]:
    """Defences and attacks of the game: a success is to be let in, or to be told the code."""

    def parse(text: str) -> Iterator[Case]:
        for number, line in enumerate(text.splitlines()):
            row = json.loads(line)
            said = (system(row["pre_prompt"]), user(row["attack"]), system(row["post_prompt"]))
            secret = row["access_code"] if kind == "extraction" else "access granted"
            yield Case(str(row.get("sample_id", number)), kind, said, secret=secret, exact=kind == "hijack")

    return parse


_TRUST = f"{_GITHUB}/HumanCompatibleAI/tensor-trust-data/main/benchmarks"
_JBB = "https://huggingface.co/datasets/JailbreakBench/JBB-Behaviors/resolve/main/data"
_ALL = (
    Source(
        "advbench", "refusal", f"{_GITHUB}/llm-attacks/llm-attacks/main/data/advbench/harmful_behaviors.csv",
        _table("goal"), 520,
    ),
    Source("jbb-harmful", "refusal", f"{_JBB}/harmful-behaviors.csv", _table("Goal"), 100),
    Source("jbb-benign", "refusal", f"{_JBB}/benign-behaviors.csv", _table("Goal", wanted=lambda row: "answer"), 100),
    Source(
        "strongreject", "refusal",
        f"{_GITHUB}/alexandrasouly/strongreject/main/strongreject_dataset/strongreject_dataset.csv",
        _table("forbidden_prompt"),
    ),
    Source(
        "harmbench", "refusal",
        f"{_GITHUB}/centerforaisafety/HarmBench/main/data/behavior_datasets/harmbench_behaviors_text_all.csv",
        _table("Behavior", lambda row: row["FunctionalCategory"] == "standard"),
    ),
    Source(
        "xstest", "refusal", f"{_GITHUB}/paul-rottger/xstest/main/xstest_prompts.csv",
        _table("prompt", wanted=_xstest),
    ),
    Source(
        "jbb-artifacts", "jailbreak",
        f"{_GITHUB}/JailbreakBench/artifacts/main/attack-artifacts/PAIR/black_box/vicuna-13b-v1.5.json", _artifacts,
    ),
    Source(
        "tensortrust-extraction", "extraction",
        f"{_TRUST}/extraction-robustness/v1/extraction_robustness_dataset.jsonl", _tensor_trust("extraction"),
    ),
    Source(
        "tensortrust-hijacking", "hijack",
        f"{_TRUST}/hijacking-robustness/v1/hijacking_robustness_dataset.jsonl", _tensor_trust("hijack"),
    ),
)  # fmt: skip
SOURCES: dict[str, Source] = {source.name: source for source in _ALL}
