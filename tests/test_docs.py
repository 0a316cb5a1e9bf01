"""Failures caught here: a README whose tree is not the disk's, whose commands do not exist or whose links
lead nowhere, and a tracked file that names a place on somebody's machine.

The tree is the fenced block after a heading with "tree" or "layout" in it. Each line of it is names, two
spaces or more, and a phrase; names that end in "/" open a folder for the deeper lines below. In a folder's
phrase, words like `step.py` and `web/` are its children too. NNNN stands for any number. A folder that names
any child names them all.
"""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
SKIP = {"__init__.py", "__main__.py", "__pycache__"}
CACHES = {".git", ".venv", ".pytest_cache", ".ruff_cache", ".hypothesis", "runs", "build", "__pycache__"}


def tracked_files() -> list[Path]:
    """What git tracks or would add; without git (an unpacked archive), everything but the usual caches."""
    command = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
        files = [ROOT / name for name in listed]
    except (OSError, subprocess.CalledProcessError):
        files = [
            path
            for path in ROOT.rglob("*")
            if not CACHES & set(path.relative_to(ROOT).parts) and ".egg-info" not in str(path)
        ]
    return [path for path in files if path.is_file()]


def readme() -> str:
    return (ROOT / "README.md").read_text(encoding="utf-8")


def tree_block(text: str) -> str:
    """The first fenced block after the heading of the tree."""
    heading = re.search(r"^#+ .*\b(tree|layout)\b.*$", text, re.MULTILINE | re.IGNORECASE)
    assert heading, "the README has no heading with 'tree' or 'layout' in it"
    block = FENCE.search(text, heading.end())
    assert block, "no fenced block follows the heading of the tree"
    return "\n".join(block.group().splitlines()[1:-1])


def listed_paths(block: str) -> list[str]:
    """All paths a tree names, folders with a trailing slash."""
    paths: list[str] = []
    folders: list[tuple[int, str]] = []  # open folders: indent, path
    for line in block.splitlines():
        if not line.strip():
            continue
        indent = len(line) - len(line.lstrip())
        names, _, phrase = re.sub(r"\s{2,}", "  ", line.strip()).partition("  ")
        if indent >= 16:  # a phrase that goes on in the next line
            continue
        while folders and folders[-1][0] >= indent:
            folders.pop()
        parent = folders[-1][1] if folders else ""
        for name in names.split():
            paths.append(parent + name)
        if names.endswith("/"):
            folder = parent + names
            folders.append((indent, folder))
            children = re.findall(r"(?<!\S)(?:\w+\.py|\w+/)(?=[\s,;)]|$)", phrase)
            paths += [folder + child for child in children]
    return paths


def test_the_tree_is_on_the_disk() -> None:
    for path in listed_paths(tree_block(readme())):
        found = list(ROOT.glob(path.rstrip("/").replace("NNNN", "*")))
        assert found, f"the README's tree lists {path}, which is not on the disk"
        kinds = {p.is_dir() for p in found}
        assert kinds == {path.endswith("/")}, f"{path}: in the tree a folder ends in a slash, a file does not"


def test_the_disk_is_in_the_tree() -> None:
    """All of dsv4/, and below it all children of every folder that lists any."""
    listed = listed_paths(tree_block(readme()))
    on_disk = {file.relative_to(ROOT) for file in tracked_files()}
    with_children = {path.rstrip("/").rpartition("/")[0] + "/" for path in listed}
    missing = []
    for folder in {f for f in with_children if f.startswith("dsv4/")} | {"dsv4/"}:
        depth = folder.count("/")
        for path in (p for p in on_disk if p.as_posix().startswith(folder) and p.parts[depth] not in SKIP):
            name = "/".join(path.parts[: depth + 1]) + ("/" if len(path.parts) > depth + 1 else "")
            if name not in listed and (name.endswith((".py", "/")) or depth == 1):
                missing.append(name)
    assert not missing, f"the README's tree does not list {sorted(set(missing))}"


def test_the_readme_names_the_two_commands_and_they_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for command in ("make demo", "make test"):
        assert command in readme(), f"the README does not say `{command}`"
    for target in re.findall(r"`make ([a-z][a-z-]*)", readme()):
        known = re.search(rf"^{target}:", makefile, re.MULTILINE)
        assert known, f"the README says `make {target}`, but the Makefile has no such target"
    assert "make test" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def test_contributing_lists_the_tests() -> None:
    """Its table of failures and their tests has a row for every test file, and no other."""
    named = set(re.findall(r"`(test_\w+\.py)`", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")))
    assert named == {path.name for path in (ROOT / "tests").glob("test_*.py")}


def markdown_files() -> list[Path]:
    return [p for p in tracked_files() if p.suffix == ".md"]


def test_relative_links_lead_somewhere() -> None:
    broken = []
    for file in markdown_files():
        text = FENCE.sub("", file.read_text(encoding="utf-8"))
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            outside = re.match(r"[a-z]+:|#", target)
            if not outside and not (file.parent / target.partition("#")[0]).exists():
                broken.append(f"{file.relative_to(ROOT)}: {target}")
    assert not broken, broken


# Written in pieces, so that this file does not contain what it looks for.
PLACES = [r"(?<![\w.])/" + name + r"(?![\w-])" for name in ("work", "tmp", "root", "home/" + r"\w+")]
PLACES += [re.escape("../" + "shared")]


def test_no_tracked_file_names_a_place_on_a_machine() -> None:
    place = re.compile("|".join(PLACES))
    found = []
    for file in tracked_files():
        content = file.read_bytes()
        if b"\0" in content[:4096]:  # compressed texts and pictures
            continue
        for number, line in enumerate(content.decode("utf-8", errors="replace").splitlines(), 1):
            if match := place.search(line):
                found.append(f"{file.relative_to(ROOT)}:{number}: {match.group()}")
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("tree", "paths"),
    [
        ("README.md   what it is\ndsv4/\n  config.py  the schema", ["README.md", "dsv4/", "dsv4/config.py"]),
        (
            "dsv4/\n  ops/    arithmetic\n    cpu/   C++ for some\n  rope.py layers.py",
            ["dsv4/", "dsv4/ops/", "dsv4/ops/cpu/", "dsv4/rope.py", "dsv4/layers.py"],
        ),
        (
            "dsv4/\n  text/   tokenizer.py (bytes, BPE) · chat.py (prompt)\n  serve/   api.py · web/ (page)",
            ["dsv4/", "dsv4/text/", "dsv4/text/tokenizer.py", "dsv4/text/chat.py"]
            + ["dsv4/serve/", "dsv4/serve/api.py", "dsv4/serve/web/"],
        ),
        ("experiments/NNNN-name/   question and verdict", ["experiments/NNNN-name/"]),
    ],
)
def test_the_reader_of_trees(tree: str, paths: list[str]) -> None:
    assert listed_paths(tree) == paths
