"""Fault injection: what a training run survives. `make faults` does all of it, tests/test_faults.py a short cut.

Every fault strikes a forked process that trains a very small model. What came of it is

    right      the run, resumed, is the uninterrupted one: weights, momenta, next batch and log, bit for bit
    sentence   it was refused or stopped in one sentence, and if the fault was the machine's, resuming then is right
    wrong      anything else: a traceback, other numbers, a hang, memory above the bound

Kinds: a crash before and half way in every file operation; a full disk at every write; mutated files of checkpoint,
state, data and settings; kill -9 at random moments; two runs racing for one folder. A crash is a death of the process
without any clean-up (the machine's own loss of unsynced blocks is not simulated); a full disk is the kernel's limit on
the size of a file, which fails real writes, those of the safetensors library included, with a real error.
"""

import argparse
import hashlib
import json
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # what torch's first optimiser imports, for seconds: once, before all forks
import yaml

from dsv4.checkpoint import RunFolder, load
from dsv4.config import ModelConfig
from dsv4.errors import UserError
from dsv4.settings import merge
from dsv4.train.log import read_log, reproducible
from dsv4.train.recipes import RECIPES, resolve
from dsv4.train.runconfig import RunConfig
from dsv4.train.trainer import Trainer

LIMIT_S = 60.0  # a training of this size takes about a second: longer is a hang
MEMORY_BYTES = 600 << 20  # above what a forked process begins with; the pages of libraries come in on top of that
SAVING = ", while a checkpoint was written"
CRASHED, REFUSED, BROKE = 137, 3, 5  # exit codes of the forked process
KINDS = ("checkpoint", "state", "data", "config", "published")  # of files that are mutated
WORDS = "the of and to in a is that for it as was with be by on not he his but at are this have from".split()


@dataclass(frozen=True)
class Outcome:
    kind: str  # right, sentence or wrong
    detail: str


class Bench:
    """A folder to break things in: the texts, the settings, and what the uninterrupted run comes to."""

    def __init__(self, root: Path, steps: int = 4):
        self.root = root
        self._number = 0
        texts = root / "texts"
        texts.mkdir(parents=True)
        rng = random.Random(0)
        for name, count in (("a", 24), ("b", 6)):
            lines = (json.dumps({"text": " ".join(rng.choices(WORDS, k=40))}) for _ in range(count))
            (texts / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
        model = ModelConfig.preset(
            "tiny", vocab_size=258, num_hidden_layers=2, compress_ratios=(0, 4, 0), hidden_size=32, head_dim=32,
            index_head_dim=16, num_attention_heads=2, n_routed_experts=4, moe_intermediate_size=16, num_hash_layers=1,
        )  # fmt: skip
        changes: dict[str, Any] = {
            "data": {"path": str(texts), "tokenizer": "bytes", "seq_len": 64, "tokens_per_step": 128},
            "schedule": {"steps": steps, "warmup": 1},
            "save": {"every": 2, "eval_every": 2, "eval_tokens": 128, "keep": 1},
        }
        self.config: RunConfig = merge(replace(RECIPES["tiny"](), model=model), changes)
        self.whole = root / "whole"
        code, said = forked(lambda: self.train(self.whole))
        assert code == 0, said
        self.expected = fingerprint(self.whole)

    def train(self, folder: Path, config: RunConfig | None = None, *, samples: Path | None = None) -> None:
        """samples: gets a line with the digest of what each update learned from, before anything of it is kept."""
        run = Trainer(config or self.config, folder, resume="auto")
        gradient = run._gradient

        def noted(step: int, mtp: float, *ahead: Any) -> Any:
            batch = run.batches.batch(step)
            digest = hashlib.sha256(batch.ids.numpy().tobytes() + batch.targets.numpy().tobytes()).hexdigest()
            with samples.open("a") as file:  # type: ignore[union-attr]
                file.write(f"{step} {digest}\n")
            return gradient(step, mtp, *ahead)

        if samples is not None:
            run._gradient = noted  # type: ignore[method-assign]
        run.run()

    def folder(self) -> Path:
        self._number += 1
        return self.root / f"run-{os.getpid()}-{self._number}"

    def copy(self) -> Path:
        target = self.folder()
        shutil.copytree(self.whole, target)
        return target

    def resumed(self, folder: Path, first: Outcome, train: Callable[[], None] | None = None) -> Outcome:
        """What a fault of the machine comes to: the outcome of going on after it."""
        if first.kind == "wrong":
            return first
        outcome = judged(train or (lambda: self.train(folder)), lambda: self.difference(folder))
        if outcome.kind != "right":
            return Outcome("wrong", f"after {first.detail!r} resuming gave: {outcome.detail}")
        shutil.rmtree(folder)
        return first

    def difference(self, folder: Path) -> str:
        """How a finished run differs from the uninterrupted one, "" if it does not."""
        found = fingerprint(folder)
        wrong = [name for name in self.expected if found.get(name) != self.expected[name]]
        left = [str(p.relative_to(folder)) for p in folder.rglob(".*") if p.name.endswith(".tmp")]
        return f"{wrong} differ, {left} left over" if wrong or left else ""


def fingerprint(folder: Path) -> dict[str, Any]:
    """What a finished run has come to, without its clock."""
    newest = RunFolder(folder).latest()
    assert newest is not None
    records = [reproducible(r) for r in read_log(RunFolder(folder).log)]
    digests = {
        n: hashlib.sha256((newest / n).read_bytes()).hexdigest() for n in ("model.safetensors", "optimizer.safetensors")
    }
    state = json.loads((newest / "state.json").read_text())
    del state["seconds"]
    return {
        **digests,
        "state": state,
        "log": records,
        "checkpoints": [p.name for p in RunFolder(folder).numbered().values()],
    }


# --- one process, one fault ------------------------------------------------------------------------------------------


def forked(body: Callable[[], None], prepare: Callable[[], None] = lambda: None) -> tuple[int, str]:
    """Run `body` in a forked process: (exit code, what it said). 137 for one that was killed, also for a hang."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        code = BROKE
        try:
            os.close(reader)
            os.write(writer, resident().to_bytes(8, "little"))  # not its parent's: pages of files are not inherited
            os.dup2(writer, 1), os.dup2(writer, 2)
            sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            prepare()
            body()
            code = 0
        except UserError as error:
            os.write(2, f"{error}\n".encode())
            code = REFUSED
        except BaseException:
            os.write(2, traceback.format_exc().encode())
        os._exit(code)
    os.close(writer)
    signal.signal(signal.SIGALRM, lambda number, frame: os.kill(child, signal.SIGKILL))
    signal.setitimer(signal.ITIMER_REAL, LIMIT_S)
    said = b""
    while block := os.read(reader, 1 << 16):
        said += block
    os.close(reader)
    _, status, usage = os.wait4(child, 0)
    hung = not signal.setitimer(signal.ITIMER_REAL, 0)[0]
    held, text = int.from_bytes(said[:8], "little"), said[8:].decode(errors="replace").strip()
    over = usage.ru_maxrss * 1024 - held
    if hung or over > MEMORY_BYTES:
        return BROKE, f"{'hung' if hung else f'took {over >> 20} MiB'}: {text}"
    return os.waitstatus_to_exitcode(status) if os.WIFEXITED(status) else CRASHED, text


def resident() -> int:
    """Bytes that this process holds now."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * resource.getpagesize()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def judged(body: Callable[[], None], difference: Callable[[], str] = lambda: "") -> Outcome:
    """The outcome of a process that nothing strikes, or that something harmless has struck."""
    code, said = forked(body)
    if code == REFUSED:
        sentence = said.splitlines()[-1] if said else ""
        one = 0 < len(sentence) < 2000 and "Traceback" not in said
        return Outcome("sentence" if one else "wrong", sentence or "refused without a word")
    if code:
        return Outcome("wrong", f"exit {code}: {said[-600:]}")
    differs = difference()
    return Outcome("wrong", differs) if differs else Outcome("right", "")


# --- crashes and full disks ------------------------------------------------------------------------------------------

_CHANGING = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate", "shutil.rmtree")


class Operations:
    """Counts a process's file operations below `folder` and strikes at one of them: an audit hook cannot be fooled."""

    def __init__(self, folder: Path, strike: Callable[[int, str], None]):
        self.folder, self.strike = str(folder), strike
        self.count = 0
        sys.addaudithook(self._heard)

    def _heard(self, event: str, args: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(args[0], str) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            self._happens("write", args[0])
        elif event in _CHANGING:
            self._happens(event, str(args[0]))

    def _happens(self, what: str, path: str) -> None:
        if path.startswith(self.folder):
            self.count += 1
            self.strike(self.count, f"{what} {path.removeprefix(self.folder)}")


def operations(bench: Bench) -> list[tuple[str, int]]:
    """(what, bytes that the file has in the end) of every file operation of a whole run."""
    folder = bench.folder()
    listing = bench.root / "operations.txt"

    def note(number: int, what: str) -> None:
        sizes = ""
        if what.startswith("os.rename"):
            source = folder / what.split(" /", 1)[1]
            files = [source] if source.is_file() else [p for p in source.rglob("*") if p.is_file()]
            sizes = json.dumps({str(p.relative_to(folder)): p.stat().st_size for p in files})
        os.write(handle, f"{what}\t{sizes}\n".encode())

    handle = os.open(listing, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    code, said = forked(lambda: bench.train(folder), lambda: _install(folder, note))
    os.close(handle)
    assert code == 0, said
    sizes: dict[str, int] = {}
    lines = [line.split("\t") for line in listing.read_text().splitlines()]
    for _, found in lines:
        sizes |= json.loads(found) if found else {}
    shutil.rmtree(folder)
    return [(what, sizes.get(what.split(" /", 1)[-1], 64)) for what, _ in lines]


def _install(folder: Path, strike: Callable[[int, str], None]) -> None:
    Operations(folder, strike)


def _crash_at(folder: Path, at: int, limit: int | None) -> Callable[[], None]:
    """Die at operation `at`; with a limit, once the file that it opens has grown by that many bytes."""

    def strike(number: int, what: str) -> None:
        if number != at:
            return
        if limit is None:
            os._exit(CRASHED)
        _limit_files(folder, what, limit)
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # a write beyond the limit kills

    return lambda: _install(folder, strike)


def _fill_at(folder: Path, at: int, limit: int) -> Callable[[], None]:
    """From operation `at` on no file gets larger than `limit` bytes: writes fail."""

    def strike(number: int, what: str) -> None:
        if number == at:
            _limit_files(folder, what, limit)

    return lambda: _install(folder, strike)


def _limit_files(folder: Path, what: str, more: int) -> None:
    path = folder / what.split(" /", 1)[1]
    has = path.stat().st_size if path.is_file() and path.name == "log.jsonl" else 0  # the one file that is added to
    resource.setrlimit(resource.RLIMIT_FSIZE, (has + more, resource.RLIM_INFINITY))


def crashes(bench: Bench, every: int = 1, offset: int = 0) -> Iterator[Outcome]:
    """A crash before every operation, and half way in every write."""
    for at, (what, size) in list(enumerate(operations(bench), start=1))[offset::every]:
        for limit in (None, size // 2) if what.startswith("write") else (None,):
            folder = bench.folder()
            code, said = forked(lambda: bench.train(folder), _crash_at(folder, at, limit))  # noqa: B023
            way = "before" if limit is None else f"after {limit} bytes of"
            first = Outcome("right", f"crash {way} {what}")
            if code not in (CRASHED, 0):
                first = Outcome("wrong", f"crash {way} {what}: exit {code}: {said[-600:]}")
            yield bench.resumed(folder, first)


def full_disks(bench: Bench, every: int = 1, offset: int = 0) -> Iterator[Outcome]:
    """A disk that is full at every write, at once and half way."""
    for at, (what, size) in list(enumerate(operations(bench), start=1))[offset::every]:
        for limit in (0, size // 2) if what.startswith("write") else ():
            folder = bench.folder()
            code, said = forked(lambda: bench.train(folder), _fill_at(folder, at, limit))  # noqa: B023
            sentence = said.splitlines()[-1] if said else ""
            detail = f"disk full after {limit} bytes of {what}: {sentence}"
            kind = {0: "right", REFUSED: "sentence"}.get(code, "wrong")
            if kind == "wrong" or (kind == "sentence" and (not sentence or "Traceback" in said)):
                detail, kind = f"{detail}: exit {code}: {said[-600:]}", "wrong"
            yield bench.resumed(folder, Outcome(kind, detail))


def kills(bench: Bench, count: int, seed: int = 0) -> Iterator[Outcome]:
    """kill -9 at random moments of a run. Right is: weights, router biases, momenta, progress and log are those of the
    undisturbed run, and every update, also one that was done twice, learned from the same samples."""
    rng = random.Random(seed)
    began = time.monotonic()
    folder, samples = bench.folder(), bench.root / "samples"
    forked(lambda: bench.train(folder, samples=samples))
    shutil.rmtree(folder)
    whole, expected = time.monotonic() - began, samples.read_text().splitlines()
    assert [line.split()[0] for line in expected] == [str(n) for n in range(bench.config.schedule.steps)]
    for _ in range(count):
        folder, moment = bench.folder(), rng.random() * whole
        samples.unlink(missing_ok=True)
        child = os.fork()
        if child == 0:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 1), os.dup2(null, 2)
            try:
                bench.train(folder, samples=samples)  # noqa: B023
            finally:
                os._exit(0)
        time.sleep(moment)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        saving = any((folder / "checkpoints").glob(".*.tmp")) if folder.exists() else False
        first = Outcome("right", f"killed after {moment:.2f} s{SAVING if saving else ''}")
        outcome = bench.resumed(folder, first, lambda: bench.train(folder, samples=samples))  # noqa: B023
        seen = samples.read_text().splitlines() if samples.exists() else []
        if outcome.kind != "wrong" and sorted(set(seen)) != sorted(expected):
            outcome = Outcome("wrong", f"{first.detail}: other samples were learned from: {seen}")
        yield outcome


def races(bench: Bench, count: int) -> Iterator[Outcome]:
    """Two runs start in one folder at once: one runs, the other is refused (or finds the work done)."""
    for _ in range(count):
        folder = bench.folder()
        report = bench.root / "race.json"
        rival = os.fork()
        if rival == 0:
            outcome = judged(lambda: bench.train(folder))  # noqa: B023
            report.write_text(json.dumps(vars(outcome)))
            os._exit(0)
        first = judged(lambda: bench.train(folder))  # noqa: B023
        os.waitpid(rival, 0)
        second = Outcome(**json.loads(report.read_text()))
        worst = max((first, second), key=lambda o: ("right", "sentence", "wrong").index(o.kind))
        yield bench.resumed(folder, worst)


# --- mutated files ---------------------------------------------------------------------------------------------------


def mutated(data: bytes, rng: random.Random) -> bytes | None:
    """A damaged version of a file's bytes; None: the file is gone."""
    at = rng.randrange(len(data)) if data else 0
    end = min(len(data), at + rng.choice((1, 4, 64)))
    text = data.decode("utf-8", errors="ignore")
    choices: list[Callable[[], bytes | None]] = [
        lambda: data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :] if data else b"x",
        lambda: data[:at] + bytes(rng.randrange(256) for _ in range(end - at)) + data[end:],
        lambda: data[:at],
        lambda: data[:at] + data[end:],
        lambda: data + data[at:end],
        lambda: data[:at] + bytes(end - at) + data[end:],
        lambda: b"",
        lambda: None,
        lambda: b"[" * 200_000,
        lambda: rng.choice((b"null", b"[]", b"3", b'"text"', b"{}", b"\xff\xfe", b"NaN")),
        lambda: _other_value(text, rng).encode(),
    ]
    return rng.choice(choices)()


def _other_value(text: str, rng: random.Random) -> str:
    """One value of a JSON or YAML text replaced by another, often of a wrong type."""
    places = list(re.finditer(r':\s*("[^"]*"|-?[\d.][\d.eE+-]*|true|false|null|\[\])', text))
    if not places:
        return text
    place = rng.choice(places)
    value = rng.choice(("null", "[]", "{}", "-1", "0", "2", "1e999", "4611686018427387904", '"x"', "true", "[[1]]"))
    return text[: place.start(1)] + value + text[place.end(1) :]


def mutations(bench: Bench, kind: str, count: int, seed: int = 0) -> Iterator[Outcome]:
    """Damaged files of one kind: checkpoint, state, data, config, or a published folder."""
    rng = random.Random(seed * 1000 + sum(kind.encode()))
    for _ in range(count):
        folder = bench.copy()
        newest = RunFolder(folder).latest()
        assert newest is not None
        weights = [newest / "model.safetensors", newest / "config.json"]
        files = {
            "checkpoint": [*weights, newest / "optimizer.safetensors", newest / "tokenizer.json"],
            "state": [newest / "state.json", newest / "digests.json", newest.parent / "latest", folder / "log.jsonl"],
            "data": sorted(p for p in (folder / "data").rglob("*") if p.is_file()),
            "config": [folder / "config.yaml", newest / "config.json"],
            "published": weights,
        }[kind]
        file = rng.choice(files)
        before = file.read_bytes()
        after = mutated(before, rng)
        file.unlink() if after is None else file.write_bytes(after)
        if kind == "config":
            outcome = _config_outcome(bench, folder, file)
        elif kind == "published":  # a folder without digests: whether a number is another cannot be told
            (newest / "digests.json").unlink()
            outcome = judged(lambda: _loads_or_not(newest))  # noqa: B023
        else:
            outcome = judged(lambda: _same_state(bench, folder))  # noqa: B023
            if outcome.kind != "wrong" and file in weights:
                again = judged(lambda: _same_logits(bench, newest))  # noqa: B023
                outcome = again if again.kind == "wrong" else outcome
        named = f"{file.relative_to(folder)} ({len(before)} -> {'gone' if after is None else len(after)} bytes)"
        yield Outcome(outcome.kind, f"{named}: {outcome.detail}")
        shutil.rmtree(folder)


def _same_state(bench: Bench, folder: Path) -> None:
    """Resume a finished run: what it would go on with must be what the whole one would."""
    ours, theirs = (Trainer(bench.config, f, resume="auto") for f in (folder, bench.whole))
    for name, part in (("model", ours.model), ("optimizer", ours.optimizer)):
        other = getattr(theirs, name).state_dict()
        for key, tensor in part.state_dict().items():
            assert torch.equal(tensor, other[key]), f"{name} {key} differs"
    assert vars(ours.progress) == vars(theirs.progress), "the progress differs"
    a, b = ours.batches.batch(4), theirs.batches.batch(4)
    assert torch.equal(a.ids, b.ids) and torch.equal(a.targets, b.targets), "the next batch differs"
    assert ours.evaluate() == theirs.evaluate(), "the evaluation differs"
    assert ours.tokenizer.fingerprint() == theirs.tokenizer.fingerprint(), "the tokenizer differs"


def _same_logits(bench: Bench, checkpoint: Path) -> None:
    ids = torch.arange(200) % 258
    expected = RunFolder(bench.whole).latest()
    assert expected is not None
    with torch.no_grad():
        assert torch.equal(load(checkpoint)(ids), load(expected)(ids)), "the logits differ"


def _loads_or_not(checkpoint: Path) -> None:
    model = load(checkpoint)
    _means_what_it_says(checkpoint / "config.json")
    with torch.no_grad():
        assert model(torch.arange(9)).shape == (9, model.config.vocab_size)


def _config_outcome(bench: Bench, folder: Path, file: Path) -> Outcome:
    """Settings are the user's: right is what the file now says, or the refusal of it."""
    if file.suffix == ".json":
        return judged(lambda: _means_what_it_says(file))

    def resume() -> None:
        run = resolve("small", file)
        Trainer(run, folder, resume="auto").close()
        said = yaml.safe_load(file.read_text())
        assert run.to_dict()["optim"]["lr"] == float(said["optim"]["lr"]), "another learning rate than the file's"

    return judged(resume)


def _means_what_it_says(file: Path) -> None:
    """A config.json that is accepted says what the ModelConfig holds."""
    config, said = ModelConfig.from_json(file).to_json(), json.loads(file.read_text())
    for key, value in said.items():
        held = config.get(key)
        if key in config and key != "architectures" and not isinstance(value, dict):  # that names a program's class
            same = list(held) == value if isinstance(held, tuple) else held == value
            assert same or value is None, f"{key} is {held!r}, not {value!r}"


# --- the whole of it -------------------------------------------------------------------------------------------------


def everything(
    bench: Bench, part: int, parts: int, kills_in_all: int = 200, only: str = ""
) -> Iterator[tuple[str, Outcome]]:
    """(kind, outcome) of every fault, or of this part of them; only: those of one kind."""
    kinds: dict[str, Iterator[Outcome]] = {
        "crash": crashes(bench, parts, part),
        "disk full": full_disks(bench, parts, part),
        **{f"mutated {k}": mutations(bench, k, 300 // parts, part) for k in KINDS},
        "kill -9": kills(bench, -(-kills_in_all // parts), part),
        "race": races(bench, 6 // parts),
    }
    for kind, outcomes in kinds.items():
        for outcome in outcomes if only in ("", kind) else ():
            yield kind + (SAVING if SAVING in outcome.detail else ""), outcome


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, default=2, help="how many work side by side")
    parser.add_argument("--kills", type=int, default=200, help="moments of a run at which it is killed")
    parser.add_argument("--only", default="", help='one kind alone, such as "kill -9"')
    parser.add_argument("--verbose", action="store_true", help="print every outcome")
    options = parser.parse_args()
    torch.set_num_threads(1)
    began = time.monotonic()
    table: dict[str, Counter[str]] = {}
    with tempfile.TemporaryDirectory() as name:
        root, children = Path(name), []
        for part in range(options.processes):
            child = os.fork()
            if child == 0:
                with (root / f"outcomes-{part}").open("w") as out:
                    bench = Bench(root / str(part))
                    for kind, outcome in everything(bench, part, options.processes, options.kills, options.only):
                        out.write(json.dumps([kind, outcome.kind]) + "\n")
                        if options.verbose or outcome.kind == "wrong":
                            print(f"{outcome.kind:9s} {kind}: {outcome.detail}", flush=True)
                os._exit(0)
            children.append(child)
        if any([os.waitpid(child, 0)[1] for child in children]):
            print("a worker died: its faults were not all tried")
            return 1
        for part in range(options.processes):
            for line in (root / f"outcomes-{part}").read_text().splitlines():
                kind, outcome = json.loads(line)
                table.setdefault(kind, Counter())[outcome] += 1
    print(f"{'':40s}{'right':>9s}{'sentence':>10s}{'wrong':>7s}")
    for kind, counts in table.items():
        print(f"{kind:40s}{counts['right']:9d}{counts['sentence']:10d}{counts['wrong']:7d}")
    print(f"{sum(map(Counter.total, table.values()))} faults in {time.monotonic() - began:.0f} s")
    return 1 if any(counts["wrong"] for counts in table.values()) else 0


if __name__ == "__main__":
    raise SystemExit(main())
