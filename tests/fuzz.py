"""make fuzz: damaged and hostile checkpoints, a hundred thousand of them, given to `load` and to `inspect`.

Each case takes a tiny checkpoint (one file, shards, the released formats, transformers' layout), spoils it in one way
that its number decides, and looks at it with both. What must hold for every case:

- an answer or one UserError of one line; no other exception, no crash, no case that takes half a minute;
- what is surely wrong (`refuse`) is refused: by load, and by inspect with a finding;
- nothing is executed, unpickled, connected to, or opened outside the folder (an audit hook and a canary);
- the process never takes more than ALLOWANCE beyond what it had.

A case is repeated with: python tests/fuzz.py --only NUMBER. `python tests/fuzz.py --help` has the rest.
"""

import argparse
import faulthandler
import io
import json
import logging
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402

from dsv4.bench.inspect import Subject, contents, num_bytes  # noqa: E402
from dsv4.checkpoint import load, save  # noqa: E402
from dsv4.checkpoint.inspect import inspect  # noqa: E402
from dsv4.checkpoint.statistics import measure  # noqa: E402
from dsv4.errors import UserError  # noqa: E402
from dsv4.measure.subjects import small_config, small_model  # noqa: E402

ALLOWANCE = 1 << 30  # bytes of address space beyond what the process has when it starts
SECONDS = 30  # of the processor for one case: one that takes longer hangs; so does one that waits ten times as long
_TIMERS = ((signal.ITIMER_PROF, SECONDS), (signal.ITIMER_REAL, 10 * SECONDS))  # a busy machine is no fault
CONFIG, INDEX = "config.json", "model.safetensors.index.json"
TINY: dict[str, Any] = dict(
    vocab_size=24, hidden_size=16, num_attention_heads=2, head_dim=16, q_lora_rank=8, o_lora_rank=8, index_n_heads=2,
    moe_intermediate_size=8, n_routed_experts=2, num_experts_per_tok=1, mtp=1,
)  # fmt: skip

Content = bytes | None | Callable[[Path], object]  # of a file; None: it is gone; or what makes it


@dataclass
class Case:
    """A checkpoint's files by name, a way to draw, and what is to be changed."""

    rng: random.Random
    files: dict[str, bytes]
    outside: Path
    changed: dict[str, Content] = field(default_factory=dict)
    numbers: bool = False  # it is the numbers that are wrong, which headers do not tell: inspect reads them as well

    def shard(self) -> str:
        return self.rng.choice(sorted(name for name in self.files if name.endswith(".safetensors")))

    def header(self, name: str) -> tuple[dict[str, Any], bytes]:
        raw = self.files[name]
        length = int.from_bytes(raw[:8], "little")
        return json.loads(raw[8 : 8 + length]), raw[8 + length :]

    def put(self, name: str, header: dict[str, Any] | str | bytes, data: bytes) -> None:
        text = json.dumps(header) if isinstance(header, dict) else header
        raw = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
        self.changed[name] = len(raw).to_bytes(8, "little") + raw + data

    def entry(self) -> tuple[str, dict[str, Any], str, bytes]:
        """(file, its header, a tensor that has bytes, its data)."""
        file = self.shard()
        header, data = self.header(file)
        names = [n for n, e in header.items() if n != "__metadata__" and e["data_offsets"][1] > e["data_offsets"][0]]
        return file, header, self.rng.choice(sorted(names)), data


Spoil = Callable[[Case], bool]  # True: this is surely wrong
SPOILERS: dict[str, Spoil] = {}


def spoiler(function: Spoil) -> Spoil:
    SPOILERS[function.__name__.replace("_", " ")] = function
    return function


# --- bytes -----------------------------------------------------------------------------------------------------------


@spoiler
def truncated(case: Case) -> bool:
    name = case.shard()
    case.changed[name] = case.files[name][: case.rng.randrange(len(case.files[name]))]
    return True


@spoiler
def prolonged(case: Case) -> bool:
    name = case.shard()
    case.changed[name] = case.files[name] + case.rng.randbytes(case.rng.choice((1, 8, 100)))
    return True


@spoiler
def bits_flipped(case: Case) -> bool:
    name = case.rng.choice(sorted(case.files))
    raw = bytearray(case.files[name])
    end = 8 + int.from_bytes(raw[:8], "little") if case.rng.random() < 0.8 and name.endswith("s") else len(raw)
    for _ in range(case.rng.choice((1, 1, 2, 8))):
        raw[case.rng.randrange(min(end, len(raw)))] ^= 1 << case.rng.randrange(8)
    case.changed[name] = bytes(raw)
    return False


@spoiler
def bytes_replaced(case: Case) -> bool:
    """In the header's text, by what JSON is made of."""
    name = case.shard()
    raw = bytearray(case.files[name])
    end = 8 + int.from_bytes(raw[:8], "little")
    for _ in range(case.rng.choice((1, 2, 3))):
        raw[case.rng.randrange(8, end)] = case.rng.choice(b'{}[]",:0123456789-eE.\\ \0\xff\n')
    case.changed[name] = bytes(raw)
    return False


@spoiler
def length_changed(case: Case) -> bool:
    name = case.shard()
    length = int.from_bytes(case.files[name][:8], "little")
    near = length + case.rng.choice((-1, 1, 8, -8))
    length = case.rng.choice(
        (0, 1, near, 2**63, 2**64 - 1, 1 << 27, 10**8, len(case.files[name]), case.rng.getrandbits(64))
    )
    case.changed[name] = (length % 2**64).to_bytes(8, "little") + case.files[name][8:]
    return True


class _Execute:
    """What a pickle can do: here it makes the canary."""

    def __init__(self, canary: str):
        self.canary = canary

    def __reduce__(self):
        return (os.mkdir, (self.canary,))


@spoiler
def pickle_under_another_name(case: Case) -> bool:
    evil = _Execute(str(case.outside / "canary"))
    raw = pickle.dumps(evil, protocol=case.rng.randrange(6))
    if case.rng.random() < 0.4:
        out = io.BytesIO()
        with zipfile.ZipFile(out, "w") as archive:
            archive.writestr("archive/data.pkl", raw)
        raw = out.getvalue()
    elif case.rng.random() < 0.3:  # behind something like a header
        raw = len(raw).to_bytes(8, "little") + raw
    name = case.rng.choice(sorted(case.files))
    case.changed[name] = raw
    return True


@spoiler
def something_else(case: Case) -> bool:
    name = case.shard()
    case.changed[name] = case.rng.choice((
        b"", b"\0" * 64, b"GGUF" + bytes(60), b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
        b"<!DOCTYPE html><html></html>", b"{}", case.files[CONFIG], case.rng.randbytes(100), bytes(8) + b"{}",
    ))  # fmt: skip
    return True


@spoiler
def files_exchanged(case: Case) -> bool:
    """The bytes of a shard under another's name: what is in them is then there twice."""
    shards = sorted(name for name in case.files if name.endswith(".safetensors"))
    if len(shards) < 2:
        return truncated(case)
    one, other = case.rng.sample(shards, 2)
    case.changed[one] = case.files[other]
    return True


# --- headers ---------------------------------------------------------------------------------------------------------


@spoiler
def offsets(case: Case) -> bool:
    """Overlapping, with a gap, exchanged, negative, beyond the file, no numbers."""
    file, header, name, data = case.entry()
    begin, end = header[name]["data_offsets"]
    by = case.rng.choice((1, 4, -1, 16, 2**40))
    header[name]["data_offsets"] = case.rng.choice((
        [begin + by, end + by], [begin, end + by], [begin - by, end], [end, begin], [-begin - 1, end], [begin, 2**64],
        [begin], [begin, end, end], [float(begin), end], [str(begin), end], None, [begin, True], 10**30, [[], {}], {},
    ))  # fmt: skip
    case.put(file, header, data)
    return True


@spoiler
def shape(case: Case) -> bool:
    file, header, name, data = case.entry()
    was = header[name]["shape"]
    axis = case.rng.randrange(len(was))
    right = was[axis]
    bad = [2**31, 2**62, 2**63, 2**64, 10**40, -1, 0, 1.0 * right, str(right), None, True, [1], right + 1]
    header[name]["shape"] = case.rng.choice((
        [*was[:axis], case.rng.choice(bad), *was[axis + 1 :]],
        [*was, 0], [*was, 2], [2**32, 2**32, *was], [2**63, 0], [0, 2**64 - 1], [1] * 1000,
        None, {}, "16", 3, [-1, -was[0]],
    ))  # fmt: skip
    case.put(file, header, data)
    return True


@spoiler
def axes_regrouped(case: Case) -> bool:
    """As many numbers in another shape: whole as a file, and not the model's."""
    file, header, name, data = case.entry()
    was = header[name]["shape"]
    header[name]["shape"] = case.rng.choice(([1, *was], [*was, 1], [1] * 5 + was))
    case.put(file, header, data)
    return True


@spoiler
def dtype(case: Case) -> bool:
    file, header, name, data = case.entry()
    was = header[name]["dtype"]
    known = (
        "F32",
        "I32",
        "F16",
        "BF16",
        "I8",
        "U8",
        "F8_E4M3",
        "F8_E5M2",
        "F8_E8M0",
        "F64",
        "I64",
        "BOOL",
        "F4",
        "C64",
    )
    new = case.rng.choice((*known, "Q4", "", "f32", None, 3, ["F32"], {"F32": 1}))
    header[name]["dtype"] = new
    case.put(file, header, data)
    same = {
        frozenset(("BF16", "F16")),
        frozenset(("F8_E8M0", "U8")),
        frozenset(("I8", "U8")),
    }  # of which one may be meant
    return not isinstance(new, str) or (new != was and frozenset((new, was)) not in same)


@spoiler
def named_twice(case: Case) -> bool:
    """The same name twice in the text of a header, where readers differ in which they believe."""
    file, header, name, data = case.entry()
    text = json.dumps(header)
    twin = json.dumps({name: case.rng.choice((header[name], {**header[name], "shape": [1]}, {}))})
    case.put(file, twin[:-1] + ", " + text[1:] if case.rng.random() < 0.5 else text[:-1] + ", " + twin[1:], data)
    return True


@spoiler
def keys(case: Case) -> bool:
    file, header, name, data = case.entry()
    entry = header[name]
    if case.rng.random() < 0.5:
        entry.pop(case.rng.choice(sorted(entry)))
    elif case.rng.random() < 0.5:
        entry[case.rng.choice(("offset", "Dtype", "", "__reduce__"))] = 1
    else:
        header[name] = case.rng.choice((None, [], "F32", 3, [entry]))
    case.put(file, header, data)
    return True


@spoiler
def renamed(case: Case) -> bool:
    file, header, name, data = case.entry()
    new = case.rng.choice((
        "", "../" + name, "/etc/passwd", name + " ", name + "\n", "\0", name.upper(), "x" * 100_000, "\ud800",
        "\u202e" + name, "__class__", f"model.{name}", "layers.999999999999999999999.attn_norm.weight", "ñ", "{}",
        "layers.-1.attn_norm.weight", "mtp.7.x", name + ".scale",
    ))  # fmt: skip
    header = {new if key == name else key: value for key, value in header.items()}
    case.put(file, header, data)
    return True


@spoiler
def dropped(case: Case) -> bool:
    """The last tensor of a file and its bytes: the file is whole, the model is not."""
    file = case.shard()
    header, data = case.header(file)
    name = max((n for n in header if n != "__metadata__"), key=lambda n: header[n]["data_offsets"])
    begin, _ = header.pop(name)["data_offsets"]
    case.put(file, header, data[:begin])
    return True


@spoiler
def metadata(case: Case) -> bool:
    file = case.shard()
    header, data = case.header(file)
    header["__metadata__"] = case.rng.choice(({"a": 1}, [], "pt", {"a": {"b": "c"}}, {"a": None}, 3))
    case.put(file, header, data)
    return True


@spoiler
def no_json(case: Case) -> bool:
    file = case.shard()
    header, data = case.header(file)
    text = json.dumps(header)
    broken: tuple[str | bytes, ...] = (
        text[:-1], text + "x", text + text, "[" * 5000, '{"a":' * 5000, "[]", "null", '"', "{",
        text.replace(":", "=", 1), text.encode("utf-16"), b"\xff" + text.encode()[1:], text.replace('"', "'"),
        "\ufeff" + text, " " + text,
        text.replace("[", "[NaN,", 1), text.replace("[", "[Infinity,", 1), text.replace("[", "[" + "9" * 5000 + ",", 1),
    )  # fmt: skip
    case.put(file, case.rng.choice(broken), data)
    return True


@spoiler
def header_bomb(case: Case) -> bool:
    """Small on the disk, large in memory: rarely drawn, as each takes a second."""
    file = case.shard()
    size = 31 << 20 if case.rng.random() < 0.02 else 50_000
    unit = case.rng.choice(("[],", "{},", '"ab",', "1e9,", "12345,"))
    case.put(file, '{"a":[' + unit * (size // len(unit)) + "0]}", b"")
    return True


# --- contents --------------------------------------------------------------------------------------------------------


@spoiler
def nan_scales(case: Case) -> bool:
    """NaN among the E8M0 scales, or all ones elsewhere: whole by its headers, so load and statistics have to look."""
    file, header, name, data = case.entry()
    scales = [n for n in header if n.endswith(".scale")]
    name = case.rng.choice(sorted(scales)) if scales else name
    case.numbers = True
    begin, end = header[name]["data_offsets"]
    at = case.rng.randrange(begin, end)
    case.put(file, header, data[:at] + b"\xff" + data[at + 1 :])
    return bool(scales)


@spoiler
def hash_table(case: Case) -> bool:
    for file in sorted(name for name in case.files if name.endswith(".safetensors")):
        header, data = case.header(file)
        for name in [n for n in header if n.endswith("tid2eid")]:
            begin, _ = header[name]["data_offsets"]
            worst = case.rng.choice((2, -1, 2**62, -(2**63), 2**63 - 1))
            at = begin + 8 * case.rng.randrange(TINY["vocab_size"])
            case.put(file, header, data[:at] + worst.to_bytes(8, "little", signed=True) + data[at + 8 :])
            case.numbers = True
            return True
    return truncated(case)


# --- index, configuration, files -------------------------------------------------------------------------------------


@spoiler
def index_paths(case: Case) -> bool:
    """Ways out of the folder, and to what is no weight file; a whole model waits outside."""
    shard = case.shard()
    trick = case.rng.choice((
        f"../{case.outside.name}/{shard}", str(case.outside / shard), f"./../{case.outside.name}/{shard}",
        f"x/../../{shard}", f"..\\{shard}", f"C:\\{shard}", "/dev/zero", "/proc/self/mem", CONFIG, "",
        ".", "..", "~/" + shard, f"{shard}\0",
        f"\0{shard}", f"{shard}\n", "x" * 5000 + ".safetensors", "a/" * 3000 + shard, shard.upper(),
        f"file://{shard}", "$HOME/" + shard, "nul.safetensors", f"{shard}/", "*.safetensors", "model.bin",
        "\ud800.safetensors",
    ))  # fmt: skip
    if INDEX in case.files:
        index = json.loads(case.files[INDEX])
        places = index["weight_map"]
        places.update({name: trick for name, place in places.items() if place == shard})
    else:
        names = [n for n in case.header(shard)[0] if n != "__metadata__"]
        index = {"weight_map": dict.fromkeys(names, trick)}
    case.changed[INDEX] = json.dumps(index).encode()
    case.changed["model.bin"] = pickle.dumps(_Execute(str(case.outside / "canary")))
    return Path(trick).suffix != ".safetensors" or ".." in trick or trick.startswith("/") or not trick.isprintable()


@spoiler
def index_damaged(case: Case) -> bool:
    text = case.files.get(INDEX, b'{"weight_map": {"a": "model.safetensors"}}').decode()
    case.changed[INDEX] = case.rng.choice((
        text[: case.rng.randrange(1, len(text) - 2)], "[]", "{}", "", "null", "[" * 5000,
        '{"weight_map":' * 5000, "\x80",
        '{"weight_map": []}', '{"weight_map": {"a": 3}}', '{"weight_map": {"a": ["model.safetensors"]}}',
        text[:-1] + ', "weight_map": {}}', '{"weight_map": {}}', text.replace('"weight_map"', '"weight_maps"'),
    )).encode("latin-1")  # fmt: skip
    return True


@spoiler
def configuration(case: Case) -> bool:
    data = json.loads(case.files[CONFIG])
    key = case.rng.choice(sorted(data))
    data[key] = case.rng.choice((
        None, True, -1, 0, 1, 2**31, 2**63, 10**400, 1e308, "", "x", "x" * 10_000, [], [0] * 10_000, {}, [None],
        "16", 0.5,
        {"a": {"b": []}}, [[[]]], 3, 7,
    ))  # fmt: skip
    text = json.dumps(data)
    if case.rng.random() < 0.2:
        text = case.rng.choice(
            (text[:-2], "[" * 9999, text[:-1] + ', "hidden_size": 16}', "", "nul", text + "}", "\ufeff")
        )
    case.changed[CONFIG] = text.encode()
    return False


@spoiler
def no_plain_file(case: Case) -> bool:
    """A device, a pipe, a folder, a loop, a sparse file of 20 GB or nothing, under the name of a file."""
    name = case.rng.choice(sorted(case.files))

    def sparse(path: Path) -> None:
        with path.open("wb") as file:
            length = case.rng.choice((10**9, 1 << 34, (20 << 30) - 8, 5))
            file.write(length.to_bytes(8, "little") + b"{")
            file.truncate(20 << 30)

    case.changed[name] = case.rng.choice((
        lambda path: path.symlink_to("/dev/zero"), os.mkfifo, lambda path: path.mkdir(),
        lambda path: path.symlink_to(path.name), sparse, lambda path: path.symlink_to("nowhere"), None,
        lambda path: path.symlink_to("/dev/null"),
        lambda path: path.symlink_to("/proc/self/environ"),
    ))  # fmt: skip
    return name != INDEX


# --- how a case is run -----------------------------------------------------------------------------------------------


class Hangs(BaseException):
    """A case took too long."""


class Watch:
    """What the process does meanwhile: pickles, programs, connections, files that are none of the case's."""

    FORBIDDEN = ("pickle.find_class", "os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "socket.connect",
                 "os.spawn", "os.fork", "marshal.loads", "ctypes.dlopen", "os.mkdir")  # fmt: skip

    def __init__(self) -> None:
        self.folder: str | None = None
        self.seen: list[str] = []
        sys.addaudithook(self._see)

    def _see(self, event: str, args: tuple[Any, ...]) -> None:
        if self.folder is None:
            return
        if event in self.FORBIDDEN:
            self.seen.append(f"{event} {args!r:.200}")
        elif event == "open" and isinstance(args[0], str | bytes | os.PathLike):
            path = os.fspath(args[0])
            path = path.decode(errors="replace") if isinstance(path, bytes) else path
            if not os.path.normpath(path).startswith(self.folder) and not path.endswith((".py", ".pyc")):
                self.seen.append(f"open {path:.200}")


class Fuzz:
    """Bases, the folder where cases lie, and what came of them."""

    def __init__(self, scratch: Path, seed: int):
        self.seed, self.watch = seed, Watch()
        self.folder, self.outside = scratch / "case", scratch / "outside"
        self.bases = list(_bases(scratch / "bases").values())
        self.outside.mkdir()
        for base in self.bases:
            for name, raw in base.items():
                (self.outside / name).write_bytes(raw)
        for base in sorted((scratch / "bases").iterdir()):  # what they import is imported once, and unwatched
            measure(inspect(base))
            with suppress(UserError):
                load(base)
        self.outcomes: dict[str, Counter] = {name: Counter() for name in SPOILERS}
        self.failures: list[str] = []

    def run(self, number: int) -> None:
        """One case, from the seed and its number alone."""
        rng = random.Random(f"{self.seed}/{number}")
        how = rng.choice(sorted(SPOILERS))
        case = Case(rng, rng.choice(self.bases), self.outside)
        refuse = SPOILERS[how](case)
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()
        for name, content in {**case.files, **case.changed}.items():
            if isinstance(content, bytes):
                (self.folder / name).write_bytes(content)
            elif content is not None:
                content(self.folder / name)
        for what, act in (("load", self._load), ("inspect", lambda: self._inspect(case.numbers or number % 16 == 0))):
            self.watch.folder = str(self.folder)
            for timer, seconds in _TIMERS:
                signal.setitimer(timer, seconds)
            try:
                accepted, sentences = act()
            except UserError as error:
                accepted, sentences = False, [str(error)]
            except (Exception, Hangs) as error:
                self._fail(number, how, f"{what} ended in {type(error).__name__}: {str(error)[:300]!r}")
                continue
            finally:
                for timer, _ in _TIMERS:
                    signal.setitimer(timer, 0)
                self.watch.folder = None
            self.outcomes[how][f"{what} {'accepts' if accepted else 'refuses'}"] += 1
            for sentence in sentences:
                if not sentence or len(sentence) > 1500 or not sentence.isprintable():
                    self._fail(number, how, f"{what} says {sentence[:300]!r} ({len(sentence)} characters)")
            if accepted and refuse:
                self._fail(number, how, f"{what} accepts it")
        if self.watch.seen:
            self._fail(number, how, f"did {self.watch.seen[:3]}")
            self.watch.seen.clear()
        if (self.outside / "canary").exists():
            self._fail(number, how, "a pickle was executed")
            (self.outside / "canary").rmdir()

    def _load(self) -> tuple[bool, list[str]]:
        load(self.folder)
        return True, []

    def _inspect(self, numbers: bool) -> tuple[bool, list[str]]:
        report = inspect(self.folder)
        if numbers:
            measure(report)
        json.dumps(report.to_json(), allow_nan=False)
        sentences = [f.says for f in report.findings]
        return report.whole, [*sentences, report.what, report.reads]

    def _fail(self, number: int, how: str, what: str) -> None:
        self.failures.append(f"case {number} ({how}): {what}")


def _bases(folder: Path) -> dict[str, dict[str, bytes]]:
    """Tiny checkpoints: their files by name."""
    model = small_model((4,), **TINY)
    save(model, folder / "one file")
    save(model, folder / "shards", max_shard_bytes=20_000)
    save(model, folder / "transformers", layout="transformers")
    released_checkpoint(folder / "released")
    return {base.name: {f.name: f.read_bytes() for f in sorted(base.iterdir())} for base in sorted(folder.iterdir())}


def released_checkpoint(folder: Path) -> None:
    """A tiny model in the released formats, FP8 and packed FP4 with E8M0 scales among them; three shards."""
    mtp = TINY["mtp"]
    config = small_config((4,), mtp=mtp, **{k: v for k, v in TINY.items() if k != "mtp"})
    data, stored = contents(Subject("tiny"), config)
    generator = torch.Generator().manual_seed(0)
    folder.mkdir(parents=True)
    (folder / CONFIG).write_text(json.dumps(data), encoding="utf-8")
    places, third = {}, -(-len(stored) // 3)
    for number in range(3):
        header, body = {}, b""
        for name, kind, size in sorted(
            stored[number * third : (number + 1) * third], key=lambda s: -num_bytes(s[1], (1,))
        ):
            draw = torch.randn(size, generator=generator)
            tensor = {
                "F8_E4M3": lambda draw=draw: draw.to(torch.float8_e4m3fn), "BF16": lambda draw=draw: draw.bfloat16(),
                "F8_E8M0": lambda size=size: torch.randint(118, 123, size, generator=generator, dtype=torch.uint8),
                "I8": lambda size=size: torch.randint(-128, 128, size, generator=generator, dtype=torch.int8),
                "I64": lambda size=size: torch.randint(0, config.n_routed_experts, size, generator=generator),
                "F32": lambda draw=draw: draw,
            }[kind]()  # fmt: skip
            raw = tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
            header[name] = {"dtype": kind, "shape": list(size), "data_offsets": [len(body), len(body) + len(raw)]}
            body += raw
            places[name] = f"model-{number + 1:05d}-of-00003.safetensors"
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        (folder / f"model-{number + 1:05d}-of-00003.safetensors").write_bytes(
            len(text).to_bytes(8, "little") + text + body
        )
    (folder / INDEX).write_text(json.dumps({"weight_map": places}), encoding="utf-8")


def fuzz(first: int, count: int, seed: int, note: Callable[[int, float], None] = lambda done, seconds: None) -> Fuzz:
    """Run so many cases within the allowance of memory; a crash takes the process with it."""
    faulthandler.enable()
    logging.disable(logging.INFO)
    torch.set_num_threads(1)
    previous = [(s, signal.signal(s, _hang)) for s in (signal.SIGALRM, signal.SIGPROF)]
    limit = resource.getrlimit(resource.RLIMIT_AS)
    started = time.monotonic()
    fast = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="fuzz-", dir=fast) as scratch:
        runs = Fuzz(Path(scratch), seed)
        virtual = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (virtual + ALLOWANCE, limit[1]))
        try:
            for number in range(first, first + count):
                Path(scratch, "number").write_text(str(number))
                runs.run(number)
                if (number - first) % 1000 == 999:
                    note(number - first + 1, time.monotonic() - started)
        finally:
            resource.setrlimit(resource.RLIMIT_AS, limit)
            for which, handler in previous:
                signal.signal(which, handler)
            logging.disable(logging.NOTSET)
    return runs


def _hang(*_: object) -> None:
    raise Hangs(f"more than {SECONDS} seconds of the processor, or {10 * SECONDS} in all")


def main() -> None:
    parser = argparse.ArgumentParser(description="Damaged and hostile checkpoints for load and inspect.")
    parser.add_argument("--cases", type=int, default=100_000)
    parser.add_argument("--first", type=int, default=0, help="the number of the first case")
    parser.add_argument("--only", type=int, help="this case alone")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    first, count = (given.first, given.cases) if given.only is None else (given.only, 1)
    if not given.inside:  # a process of its own, whose crash is seen
        ended = subprocess.run([sys.executable, __file__, "--inside", *sys.argv[1:]]).returncode
        if ended < 0:
            print(f"CRASH: the process died of signal {-ended}")
        sys.exit(1 if ended else 0)
    runs = fuzz(
        first, count, given.seed, lambda done, s: print(f"{done:,} cases, {s:.0f} s", file=sys.stderr, flush=True)
    )
    print(f"{'how it was spoilt':28s}" + "".join(f"{what:>18s}" for what in OUTCOMES))
    for how, outcomes in runs.outcomes.items():
        print(f"{how:28s}" + "".join(f"{outcomes[what]:18,}" for what in OUTCOMES))
    total = sum((outcomes for outcomes in runs.outcomes.values()), Counter())
    print(f"{'all':28s}" + "".join(f"{total[what]:18,}" for what in OUTCOMES))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{count:,} cases, seed {given.seed}: {len(runs.failures)} wrong; at most {peak:,.0f} MiB resident")
    print("\n".join(runs.failures[:50]))
    sys.exit(1 if runs.failures else 0)


OUTCOMES = ("load refuses", "load accepts", "inspect refuses", "inspect accepts")

if __name__ == "__main__":
    main()
