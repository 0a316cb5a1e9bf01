"""Peers that run in a Python of their own, as they need other versions of everything: found, started, listened to.

What runs there is peerside.py; each peer is one small file beside this one. All are optional: what is not installed
gives one sentence that says what to install.
"""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsv4.errors import UserError
from dsv4.measure.clock import Skip

HERE = Path(__file__).parent
ASK_SECONDS = 120  # to say whether it is installed


@dataclass(frozen=True)
class Outside:
    """A peer that is there: the Python it runs in, its own file, and the environment variables that it wants."""

    name: str
    python: str
    script: Path
    version: str
    environment: dict[str, str]

    def run(self, job: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """What it finds, line by line (peerside.py says what). Skip with its last words if it fails.

        Whoever stops listening stops the process.
        """
        with tempfile.TemporaryFile() as said:
            process = _start(self.python, self.script, "run", self.environment, said)
            assert process.stdin and process.stdout
            try:
                try:
                    process.stdin.write(json.dumps(job))
                    process.stdin.close()
                except BrokenPipeError:  # it has ended already: its last words say why
                    pass
                for line in process.stdout:
                    yield json.loads(line)
                if process.wait():
                    raise Skip(f"{self.version} failed: {_last_words(said, process.returncode)}")
            finally:
                if process.poll() is None:
                    process.send_signal(signal.SIGKILL)
                    process.wait()
                process.stdout.close()


def variable(name: str) -> str:
    """The environment variable that names a peer's Python."""
    return f"DSV4_{name.upper()}_PYTHON"


def find(name: str, python: str, threads: int, script: Path | None = None) -> Outside:
    """The peer in `python` (default: what `variable(name)` says, else this Python); UserError where it is not there."""
    python = python or os.environ.get(variable(name), "") or sys.executable
    remedy = f"name the Python that has it by --peer-python or {variable(name)}"
    script = script or HERE / f"{name}_peer.py"
    with tempfile.TemporaryFile() as said:
        try:
            process = _start(python, script, "ask", {}, said)
        except OSError as error:
            raise UserError(f"{python} cannot be run as a Python ({error.strerror}): {remedy}") from None
        try:
            answer, _ = process.communicate(str(threads), timeout=ASK_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            raise UserError(f"{python} does not say in {ASK_SECONDS} s whether it has {name}: {remedy}") from None
        if process.returncode or not answer:
            last = _last_words(said, process.returncode)
            raise UserError(f"{python} cannot say whether it has {name} ({last}): {remedy}")
    found = json.loads(answer)
    if found["missing"]:
        raise UserError(f"{python} cannot run {name}: {found['missing']}; or {remedy}")
    wanted = {key: value for key, value in found["environment"].items() if value}
    return Outside(name, python, script, found["version"], wanted)


def _start(python: str, script: Path, what: str, environment: dict[str, str], said: Any) -> subprocess.Popen[str]:
    """-P: the folder of the program is no place to import from; PYTHONPATH is ours, and the peer's packages are not."""
    inherited = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return subprocess.Popen(
        [python, "-P", str(HERE / "peerside.py"), str(script), what], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=said, text=True, encoding="utf-8", env={**inherited, **environment},
    )  # fmt: skip


def _last_words(said: Any, code: int) -> str:
    """The last exception that a process wrote to stderr, or else the last line."""
    said.seek(0)
    lines = [line for line in said.read().decode("utf-8", errors="replace").splitlines() if line.strip()]
    errors = [found[0] for line in lines if (found := re.search(r"\b\w+(Error|Exception|Interrupt)\b.*", line))]
    return (errors or lines or [f"it ended with code {code} and said nothing"])[-1].strip()[:300]
