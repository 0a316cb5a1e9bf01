"""`dsv4 bench gpu-check`: is the model right on this GPU, and how fast? One command, under ten minutes.

Needs torch with CUDA and nothing else. In order of interest: every op and two whole models against the CPU reference
in fp32 and bf16; what the device can do at best; prefill, decode and training of the presets beside that, and beside
transformers where it is installed. reports/gpu.json is whole after every row; what no longer fits the budget is listed
there as skipped. Exit code 0; 1 when something of ours is wrong or raised; 2 for wrong use. `--dry` runs the same
script on a CPU with small sizes, to see that the script itself works.

`dsv4 bench speed` and `peers` are some of its stages on their own. Its options are read by argparse, because it has to
run where typer is not installed: `python -m dsv4 bench gpu-check` (dsv4/__main__.py) comes here directly then.
"""

import argparse
import gc
import hashlib
import json
import platform
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import redirect_stdout
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsv4.bench import peers, speed
from dsv4.bench.report import Report, line, plain
from dsv4.config import ModelConfig
from dsv4.errors import UserError
from dsv4.measure import parity, subjects, whole
from dsv4.measure.cases import cases
from dsv4.measure.ceilings import ceiling_rows
from dsv4.measure.clock import Budget, Skip
from dsv4.measure.rows import Row, broken_row
from dsv4.measure.sizes import DRY, FULL, Sizes
from dsv4.model import Transformer
from dsv4.train.loss import training_loss

DTYPES = (torch.float32, torch.bfloat16)
STAGES = ("parity", "ceilings", "speed", "peers")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the check; returns the exit code."""
    try:
        o = _options(arguments)
        return run(o.stages, o.device, dry=o.dry, minutes=o.minutes, out=o.out, as_json=o.json)
    except UserError as error:
        print(f"dsv4: {error}", file=sys.stderr)
        return error.exit_code


def run(
    stages: Sequence[str],
    device: torch.device,
    *,
    dry: bool,
    minutes: float,
    out: Path,
    as_json: bool = False,
    presets: Sequence[str] = (),
) -> int:
    """Do these stages and write the report to `out`; returns the exit code.

    dry: small sizes, for a CPU. presets: which models are timed, in place of those of the sizes. Rows are printed as
    they come; with as_json they go to stderr, and the whole report to stdout, as one JSON object. UserError, before any
    work, for a budget of nothing or an unknown preset; FileError where the report cannot be written.
    """
    if not minutes > 0:
        raise UserError(f"--minutes {minutes} must be positive")
    for preset in presets:
        ModelConfig.preset(preset)
    sizes = DRY if dry else FULL
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")  # TF32 off: fp32 means fp32 here
    with redirect_stdout(sys.stderr if as_json else sys.stdout):
        report = Report(out, _header(device, dry, minutes))
        check = Check(device, replace(sizes, presets=tuple(presets) or sizes.presets), Budget(minutes), report)
        try:
            check.run(stages)
        except KeyboardInterrupt:
            print(f"stopped; what was found so far is in {out}", file=sys.stderr)
            return 1
        finally:
            torch.set_float32_matmul_precision(precision)
        code = check.conclude()
    if as_json:
        print(json.dumps(plain(report.data)))
    return code


def everything(model: Transformer, ids: Tensor, targets: Tensor, lengths: list[int]) -> Tensor:
    """The training loss with all its parts."""
    return training_loss(model, ids, targets, lengths, mtp_weight=0.3, balance_weight=0.01).total


class Check:
    """One run: its device, sizes, budget and report."""

    def __init__(self, device: torch.device, sizes: Sizes, budget: Budget, report: Report):
        self.device, self.sizes, self.budget, self.report = device, sizes, budget, report

    def run(self, stages: Sequence[str]) -> None:
        """The stages asked for, in order; nothing that goes wrong in one keeps the others from running."""
        for stage in STAGES:
            if stage in stages:
                print(f"--- {stage}", flush=True)
                getattr(self, f"_{stage}")()
            else:
                self.report.add("skipped", {"what": stage, "why": "not among the stages asked for"})

    def _parity(self) -> None:
        for dtype in DTYPES:
            for case in cases():
                self._compare(case.name, dtype, 2, partial(parity.op_rows, case, self.device, dtype))
        for dtype in DTYPES:
            for name in subjects.MODELS:
                rows = partial(whole.model_rows, name, self.device, dtype, self.sizes, everything)
                self._compare(f"{name} model", dtype, 45, rows)

    def _ceilings(self) -> None:
        rows = partial(ceiling_rows, self.device, self.sizes, self.budget)
        self._attempt("ceilings", 10, lambda: self._add_all("ceilings", rows()))

    def _speed(self) -> None:
        for preset in self.sizes.presets:
            self._time(f"dsv4 {preset}", partial(speed.jobs, preset), ours=True)

    def _peers(self) -> None:
        self._attempt("transformers", 20, self._note_peer, ours=False)
        if not self.report.data["transformers"]:
            return
        for preset in self.sizes.presets:
            self._time(f"transformers {preset}", partial(peers.jobs, preset), ours=False)
        peers.compare(self.report["speed"])

    def _note_peer(self) -> None:
        self.report.data["transformers"] = peers.installed()

    def conclude(self) -> int:
        """Finish the report, say what came out, return the exit code."""
        data = self.report.data
        broken = self.report.broken()
        data["finished"], data["passed"] = True, not broken
        self.report.write()
        print("--- speeds")
        for row in data["speed"]:
            print(line("speed", row))
        print(f"--- {len(data['parity'])} comparisons, {len(data['skipped'])} pieces of work skipped", end=", ")
        print(f"{data['elapsed_seconds']:.0f} s, written to {self.report.path}")
        for name in broken:
            print(f"FAILED: {name}")
        return 1 if broken else 0

    def _compare(self, name: str, dtype: torch.dtype, seconds: float, rows: Callable[[], Iterable[Row]]) -> None:
        """Add parity rows; a comparison that raises has not been passed."""

        def work() -> None:
            try:
                self._add_all("parity", rows())
            except torch.OutOfMemoryError:
                raise
            except Exception as error:
                self.report.add("parity", broken_row(name, dtype, _one_line(error)))

        self._attempt(f"{name} in {str(dtype).removeprefix('torch.')}", seconds, work)

    def _time(self, name: str, jobs: Callable[..., Iterable[speed.Job]], *, ours: bool) -> None:
        def work() -> None:
            for what, seconds, job in jobs(self.device, self.sizes, self.budget, self.report["ceilings"]):
                self._attempt(what, seconds, lambda job=job: self.report.add("speed", job()), ours=ours)

        self._attempt(f"timings of {name}", 5, work, ours=ours)
        gc.collect()  # the next peak memory should not count what is no longer used
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _attempt(self, what: str, seconds: float, work: Callable[[], None], *, ours: bool = True) -> None:
        """Do a piece of work if it fits; whatever stops it goes into the report, and the check goes on."""
        try:
            self.budget.require(seconds * self.sizes.pace, what)
            work()
        except (Skip, torch.OutOfMemoryError) as reason:
            self.report.add("skipped", {"what": what, "why": _one_line(reason)})
        except Exception as error:
            self.report.add("failed" if ours else "skipped", {"what": what, "why": _one_line(error)})

    def _add_all(self, section: str, rows: Iterable[Row]) -> None:
        for row in rows:
            self.report.add(section, row)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="dsv4 bench gpu-check",
        description=(__doc__ or "").split("\n\n")[1],
        epilog="Example: dsv4 bench gpu-check --minutes 5 --only parity,ceilings",
    )
    parser.add_argument("--dry", action="store_true", help="run the script on the CPU with small sizes")
    parser.add_argument("--out", type=Path, help="the report (default reports/gpu.json, reports/gpu-dry.json if dry)")
    parser.add_argument("--minutes", type=float, default=9.0, help="budget; what does not fit is skipped (default 9)")
    parser.add_argument("--only", default=",".join(STAGES), help=f"stages, of {','.join(STAGES)}")
    parser.add_argument("--json", action="store_true", help="print the report as one JSON object, the rows on stderr")
    options = parser.parse_args(arguments)
    options.stages = options.only.split(",")
    for stage in options.stages:
        if stage not in STAGES:
            raise UserError(f"--only names the stage {stage!r}: choose from {', '.join(STAGES)}")
    if not options.dry and not torch.cuda.is_available():
        raise UserError(
            f"torch {torch.__version__} sees no CUDA device here: run this on a machine with a GPU, or add --dry "
            "to try the script on the CPU"
        )
    options.device = torch.device("cpu" if options.dry else "cuda")
    options.out = options.out or Path("reports", "gpu-dry.json" if options.dry else "gpu.json")
    return options


def _header(device: torch.device, dry: bool, minutes: float) -> dict[str, Any]:
    """What a report begins with, which is also shown."""
    header = {
        "code": _code(), "dry": dry, "minutes": minutes, "device": describe(device), "torch": torch.__version__,
        "python": platform.python_version(), "transformers": None, "passed": None,
    }  # fmt: skip
    for key, value in header.items():
        print(f"{key:12s} {value}")
    return header


def _code() -> str:
    """A digest of the package's sources, so that a report tells which code it speaks of, also where there is no git."""
    package = Path(__file__).resolve().parents[1]
    files = sorted(package.rglob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]


def describe(device: torch.device) -> dict[str, Any]:
    """What a report says of the machine."""
    if device.type == "cpu":
        capability = torch.backends.cpu.get_cpu_capability()
        return {"type": "cpu", "name": platform.machine(), "capability": capability, "threads": torch.get_num_threads()}
    found = torch.cuda.get_device_properties(device)
    return {
        "type": "cuda", "name": found.name, "capability": f"{found.major}.{found.minor}",
        "memory_bytes": found.total_memory, "cuda": torch.version.cuda,
    }  # fmt: skip


def _one_line(error: BaseException) -> str:
    """Kind and first line of an error; the rest of a device's message is advice for debuggers."""
    text = str(error).strip().partition("\n")[0][:300]
    return text if isinstance(error, Skip) else f"{type(error).__name__}: {text}"
