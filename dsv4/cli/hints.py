"""Commands in what is printed: the words that start dsv4 from where one stands, quoted for the shell."""

import os
import shlex
import shutil
import sys
from pathlib import Path


def command(*words: str | Path) -> str:
    """The shell command `dsv4 WORDS`: by name if that is this dsv4, else by the way that leads to it."""
    return shlex.join([*_program(), *map(str, words)])


def _program() -> list[str]:
    beside = Path(sys.executable).with_name("dsv4")  # where this Python's installer puts it
    found = shutil.which("dsv4")
    if found and beside.exists() and os.path.samefile(found, beside):
        return ["dsv4"]
    return [_short(beside)] if beside.exists() else [_short(Path(sys.executable)), "-m", "dsv4"]


def _short(path: Path) -> str:
    """Relative where the program lies below the working directory."""
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)
