"""Failures caught here: a crash, a full disk, a damaged file or a second process after which a run is not what it would
have been without, or that ends in anything but one sentence. A short cut of `make faults`, which does all of it.
"""

import mmap
from collections import Counter
from collections.abc import Callable, Iterator

import faults
import pytest

from dsv4.checkpoint import RunFolder


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> faults.Bench:
    return faults.Bench(tmp_path_factory.mktemp("faults") / "bench")


def tried(outcomes: Iterator[faults.Outcome]) -> Counter[str]:
    """The outcomes counted; none may be wrong."""
    counts: Counter[str] = Counter()
    for outcome in outcomes:
        assert outcome.kind != "wrong", outcome.detail
        counts[outcome.kind] += 1
    return counts


def test_crashes(bench: faults.Bench) -> None:
    assert tried(faults.crashes(bench, every=9))["right"] >= 5


def test_full_disks(bench: faults.Bench) -> None:
    assert tried(faults.full_disks(bench, every=9, offset=1))["sentence"] >= 2


@pytest.mark.parametrize("kind", faults.KINDS)
def test_damaged_files(bench: faults.Bench, kind: str) -> None:
    assert tried(faults.mutations(bench, kind, 16)).total() == 16


def test_kills(bench: faults.Bench) -> None:
    assert tried(faults.kills(bench, 3))["right"] == 3


def test_a_race(bench: faults.Bench) -> None:
    assert tried(faults.races(bench, 1)).total() == 1


# --- the harness itself: would it notice? ----------------------------------------------------------------------------


def test_another_weight_is_noticed(bench: faults.Bench) -> None:
    folder = bench.copy()
    newest = RunFolder(folder).latest()
    assert newest is not None
    file = newest / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x7f")
    (newest / "digests.json").unlink()  # so that nothing else tells
    outcome = faults.judged(lambda: faults._same_state(bench, folder))
    assert outcome.kind == "wrong" and "differs" in outcome.detail
    assert "model.safetensors" in bench.difference(folder)


def test_a_traceback_a_hang_and_a_glutton_are_noticed(bench: faults.Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def greedy() -> None:
        pages = mmap.mmap(-1, 1 << 30)  # fresh ones: the heap may have as much to spare from the tests before
        for at in range(0, len(pages), mmap.PAGESIZE):
            pages[at] = 1

    def found(body: Callable[[], None]) -> str:
        outcome = faults.judged(body)
        assert outcome.kind == "wrong", outcome
        return outcome.detail

    assert "ZeroDivisionError" in found(lambda: print(1 / 0))
    assert "MiB" in found(greedy)
    with monkeypatch.context() as patched:
        patched.setattr(faults, "LIMIT_S", 1.0)
        assert "hung" in found(lambda: faults.time.sleep(60))
    code, _ = faults.forked(lambda: bench.train(bench.folder()), faults._crash_at(bench.root / "nowhere", 1, None))
    assert code in (0, faults.BROKE), "operations elsewhere are not struck"


def test_every_kind_of_operation_is_struck(bench: faults.Bench) -> None:
    """The list of operations has the writes of Python and of the safetensors library, renames and folders."""
    seen = [what for what, _ in faults.operations(bench)]
    for part in (
        "write .*safetensors",
        "write .*state.json",
        "write .*log.jsonl",
        "os.rename",
        "os.mkdir",
        "write .*bin",
    ):
        assert any(faults.re.match(part, what) for what in seen), part
    assert len(seen) > 40
