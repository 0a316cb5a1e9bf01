"""Failures caught here: a room that imports from one it must not know, `train` and `engine` growing together,
and a model that needs more than torch. The table is the house's; imports are read from the syntax tree, those
inside functions and under `if TYPE_CHECKING` included, so a lazy import hides nothing.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "dsv4"

# room -> rooms it may import; any room may import itself, errors and files
ALLOWED: dict[str, set[str]] = {
    "config": set(),
    "errors": set(),
    "files": set(),
    "settings": set(),
    "remote": set(),
    "text": set(),
    "data": set(),
    "ops": set(),
    "cost": {"config"},
    "cache": {"config", "ops"},
    "model": {"config", "ops", "cache"},
    "controls": {"config", "ops", "cache", "model"},
    "checkpoint": {"config", "ops", "model", "controls"},
    # data: the embedded corpus
    "train": {"config", "settings", "ops", "model", "controls", "checkpoint", "text", "cost", "data"},
    "engine": {"config", "model", "cache", "checkpoint", "text", "cost"},
    "serve": {"engine", "text"},
    "measure": {"config", "ops", "cache", "model", "controls", "cost"},
    "conform": {"remote", "measure", "config", "ops", "model", "cache", "checkpoint", "text"},
    # ops, cache: scores, entries and maps are probed as ops make them; checkpoint: small models are trained and kept
    "probe": {
        "remote",
        "measure",
        "engine",
        "train",
        "model",
        "controls",
        "ops",
        "cache",
        "checkpoint",
        "text",
        "data",
        "config",
        "cost",
    },  # fmt: skip
    "lab": {"measure", "engine", "train", "model", "text", "config", "cost"},
    "bench": {"measure", "engine", "train", "model", "ops", "cache", "checkpoint", "config", "cost", "text", "data"},
}
# The front doors: the command line, `python -m dsv4`, and the lazy public names of `dsv4/__init__.py`.
ALLOWED["cli"] = ALLOWED["__main__"] = ALLOWED["__init__"] = {*ALLOWED, "cli", "__init__"}

FILES = sorted(PACKAGE.rglob("*.py"))


def room_of(file: Path) -> str:
    """The folder or top-level file of the package that a file belongs to."""
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_modules(file: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted module) of every import; `from a import b` gives a.b, as b may be a module."""
    package = ["dsv4", *file.relative_to(PACKAGE).parts[:-1]]
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                yield node.lineno, f"{base}.{alias.name}"


def edges() -> Iterator[tuple[str, str, str]]:
    """(importing room, imported room, where) for every import between two rooms of ours."""
    for file in FILES:
        for line, module in imported_modules(file):
            if module == "dsv4" or module.startswith("dsv4."):
                target = module.split(".")[1] if "." in module else "__init__"
                if not (PACKAGE / target).is_dir() and not (PACKAGE / f"{target}.py").is_file():
                    target = "__init__"  # a public name of the package itself
                if target != room_of(file):
                    yield room_of(file), target, f"{file.relative_to(ROOT)}:{line}"


def test_every_room_is_in_the_table() -> None:
    unknown = {room_of(file) for file in FILES} - set(ALLOWED)
    assert not unknown, f"decide in ALLOWED what these may import: {unknown}"


def test_imports_follow_the_table() -> None:
    wrong = [
        f"{where}: {room} imports {target}"
        for room, target, where in edges()
        if target not in ALLOWED[room] | {"errors", "files"}
    ]
    assert not wrong, "\n".join(wrong)


def reach(graph: dict[str, set[str]], start: str) -> set[str]:
    """All that a chain of imports leads to from `start`; `start` itself only by a circle."""
    seen, todo = set(), [start]
    while todo:
        for target in graph.get(todo.pop(), set()) - seen:
            seen.add(target)
            todo.append(target)
    return seen


def test_train_and_engine_never_meet() -> None:
    """Not through any chain of rooms either."""
    graph: dict[str, set[str]] = {}
    for room, target, _ in edges():
        graph.setdefault(room, set()).add(target)
    assert "engine" not in reach(graph, "train")
    assert "train" not in reach(graph, "engine")


def file_of(module: str) -> Path | None:
    """The file of ours that an import reads: a module, a package's `__init__.py`, or the one that has the name."""
    parts = module.split(".")
    while parts and parts[0] == "dsv4":
        path = PACKAGE.joinpath(*parts[1:])
        for file in (path.with_suffix(".py"), path / "__init__.py"):
            if file in FILES:
                return file
        parts = parts[:-1]
    return None


def test_no_file_imports_itself_by_any_way_round() -> None:
    """Two files that need each other can be read, moved and tested only together."""
    graph = {
        str(file.relative_to(PACKAGE)): {
            str(found.relative_to(PACKAGE)) for _, module in imported_modules(file) if (found := file_of(module))
        }
        for file in FILES
    }
    circles = [file for file in graph if file in reach(graph, file)]
    assert not circles, f"imports go round in a circle through {', '.join(circles)}"


@pytest.mark.parametrize("room", ["config", "errors", "ops", "cache", "model", "controls", "measure", "conform"])
def test_the_model_is_torch_and_the_standard_library(room: str) -> None:
    """Read from the source, as torch may bring other packages along and so hide them. numpy: runs are planned in it."""
    allowed = set(sys.stdlib_module_names) | {"torch", "dsv4"}
    allowed |= {"numpy"} if room in ("ops", "cache", "model") else set()
    wrong = [
        f"{file.relative_to(ROOT)}:{line}: {module}"
        for file in FILES
        if room_of(file) == room
        for line, module in imported_modules(file)
        if module.split(".")[0] not in allowed | ({"triton"} if "triton" in file.parts else set())
        and not (module.split(".")[0] in ("transformers", "safetensors") and "adapters" in file.parts)  # who is judged
    ]
    assert not wrong, "\n".join(wrong)


ONLY_TORCH = """
import importlib.util, sys
import torch                                     # with whatever torch itself wants

theirs = {name.partition(".")[0] for name in sys.modules} | {"torch", "torchgen", "functorch", "sympy",
"mpmath"}

class Closed:
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        if top not in theirs | {"dsv4"} and top not in sys.stdlib_module_names:
            raise ImportError(f"{name} is not installed on a machine with torch alone")

sys.meta_path.insert(0, Closed())
for name in ("tokenizers", "safetensors", "yaml", "typer", "rich", "matplotlib", "transformers"):
    try:
        importlib.import_module(name)
    except ImportError:
        continue
    raise SystemExit(f"the blockade leaks: {name}")
for name in sys.argv[1:]:
    importlib.import_module(name)
"""


def test_import_needs_torch_alone() -> None:
    """`import dsv4` and the model on a machine where nothing else is installed, in a fresh interpreter."""
    rooms = [room for room in ("config", "ops", "cache", "model", "controls") if room in {room_of(f) for f in FILES}]
    names = ["dsv4", *(f"dsv4.{room}" for room in rooms)]
    command = [sys.executable, "-c", ONLY_TORCH, *names]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr or result.stdout


def test_the_checker_sees_what_it_should(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Absolute, relative, lazy and conditional imports, by a planted file."""
    package = tmp_path / "dsv4"
    (package / "train").mkdir(parents=True)
    (package / "engine").mkdir()
    planted = package / "train" / "planted.py"
    planted.write_text(
        "import dsv4.engine\n"
        "from dsv4 import engine\n"
        "from ..engine import step\n"
        "from .. import engine\n"
        "def f():\n    from dsv4.engine.scheduler import Scheduler\n"
        "from . import loss\n"
        "import torch\n"
    )
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    monkeypatch.setitem(globals(), "PACKAGE", package)
    monkeypatch.setitem(globals(), "FILES", [planted])
    assert [where.rpartition(":")[2] for _, _, where in edges()] == ["1", "2", "3", "4", "6"]
    with pytest.raises(AssertionError, match="train imports engine"):
        test_imports_follow_the_table()
    with pytest.raises(AssertionError):
        test_train_and_engine_never_meet()
    loss = package / "train" / "loss.py"
    loss.write_text("def f():\n    from dsv4.train.planted import f\n")
    monkeypatch.setitem(globals(), "FILES", [planted, loss])
    with pytest.raises(AssertionError, match=r"circle through train/planted.py, train/loss.py"):
        test_no_file_imports_itself_by_any_way_round()
