"""Failures caught here: `--from-hub` that takes another revision than it says, fetches code or pickles, downloads all
weights to look at their headers, writes outside its folder, or ends in a traceback without network, package or model.

The hub is one of our own, on this machine: a small server with the paths that huggingface_hub asks for.
"""

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from dsv4.checkpoint import load, save
from dsv4.checkpoint.hub import PATTERNS, download
from dsv4.cli.common import find_model
from dsv4.cli.inspect import inspect
from dsv4.errors import UserError
from dsv4.files import write_text
from dsv4.measure.subjects import small_model
from dsv4.text import ByteTokenizer

NAME, COMMIT, OLDER = "owner/model", "a" * 40, "b" * 40
ROOT = Path(__file__).resolve().parents[1]


class Hub(ThreadingHTTPServer):
    """One model at two commits; `asked` has each request with the bytes that were sent for it."""

    daemon_threads = True

    def __init__(self, commits: dict[str, Path], *, ranges: bool = True):
        super().__init__(("127.0.0.1", 0), Answer)
        self.commits, self.ranges, self.asked = commits, ranges, list[tuple[str, str, int]]()
        self.extra: list[dict] = []
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def files_sent(self) -> set[str]:
        return {
            path.rpartition("/resolve/")[2].partition("/")[2]
            for verb, path, n in self.asked
            if "/resolve/" in path and n
        }


class Answer(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET(body=False)

    def do_GET(self, body: bool = True) -> None:
        path = unquote(urlsplit(self.path).path)
        revisions = {"main": COMMIT, "older": OLDER, **{c: c for c in self.server.commits}}
        if path.startswith(f"/api/models/{NAME}"):
            commit = revisions.get(path.rpartition("/")[2] if "/revision/" in path or "/tree/" in path else "main")
            if commit is None:
                return self.answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"}, body)
            folder = self.server.commits[commit]
            if "/tree/" in path:
                tree = [{"type": "file", "path": n, "size": f.stat().st_size, "oid": digest(f)} for n, f in of(folder)]
                return self.answer(200, json.dumps(tree).encode(), {"Content-Type": "application/json"}, body)
            siblings = [{"rfilename": n, "size": f.stat().st_size} for n, f in of(folder)] + self.server.extra
            info = {"id": NAME, "modelId": NAME, "sha": commit, "siblings": siblings, "private": False, "tags": []}
            return self.answer(200, json.dumps(info).encode(), {"Content-Type": "application/json"}, body)
        if path.startswith(f"/{NAME}/resolve/"):
            revision, _, file = path.removeprefix(f"/{NAME}/resolve/").partition("/")
            commit = revisions.get(revision)
            if commit is None or not (self.server.commits[commit] / file).is_file():
                return self.answer(404, b"", {"X-Error-Code": "EntryNotFound"}, body)
            found = self.server.commits[commit] / file
            headers = {"ETag": f'"{digest(found)}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
            return self.send_file(found, headers, body)
        return self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"}, body)

    def send_file(self, file: Path, headers: dict[str, str], body: bool) -> None:
        content, wanted = file.read_bytes(), self.headers.get("Range")
        if wanted and self.server.ranges:
            first, last = wanted.removeprefix("bytes=").split("-")
            part = content[int(first) : int(last) + 1 if last else None]
            headers["Content-Range"] = f"bytes {first}-{int(first) + len(part) - 1}/{len(content)}"
            return self.answer(206, part, headers, body)
        return self.answer(200, content, headers, body)

    def answer(self, code: int, content: bytes, headers: dict[str, str], body: bool) -> None:
        self.server.asked.append((self.command, unquote(self.path), len(content) if body else 0))
        self.send_response(code)
        for key, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(key, value)
        self.end_headers()
        if body:
            try:
                self.wfile.write(content)
            except OSError:  # who asked has what it wanted
                self.close_connection = True


def of(folder: Path) -> Iterator[tuple[str, Path]]:
    return ((f.relative_to(folder).as_posix(), f) for f in sorted(folder.rglob("*")) if f.is_file())


def digest(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def commits(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two commits of a model with shards, an index, a tokenizer, and what nobody should fetch."""
    made = {}
    for seed, commit in enumerate((COMMIT, OLDER)):
        folder = tmp_path_factory.mktemp("commit")
        save(small_model((0,), vocab_size=257 + 5, seed=seed), folder, max_shard_bytes=200_000)
        ByteTokenizer().save(folder)
        for name in ("modeling.py", "pytorch_model.bin", "inference/run.py", "model.pkl"):
            (folder / name).parent.mkdir(exist_ok=True)
            write_text(folder / name, "raise SystemExit('this ran')")
        made[commit] = folder
    return made


@pytest.fixture
def hub(commits: dict[str, Path]) -> Iterator[Hub]:
    server = Hub(commits)
    yield server
    server.shutdown()
    server.server_close()


def dsv4(
    *words: str, hub: Hub | None, home: Path, offline: bool = False, before: str = ""
) -> subprocess.CompletedProcess:
    """A verb in a Python of its own, which knows no hub but ours."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    env |= {"HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "PYTHONPATH": str(ROOT)}
    env |= {"HF_ENDPOINT": hub.address if hub else "http://127.0.0.1:9", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    env |= {"HF_HUB_OFFLINE": "1"} if offline else {}
    code = f"import sys; sys.argv[0] = 'dsv4'\n{before}\nfrom dsv4.cli import main; main()"
    return subprocess.run([sys.executable, "-c", code, *words], env=env, capture_output=True, text=True, timeout=120)


def test_only_weights_settings_and_tokenizer_are_fetched_and_the_commit_is_said(
    hub: Hub, commits: dict[str, Path], tmp_path: Path
) -> None:
    words = ("generate", "--from-hub", NAME, "ab", "--max-tokens", "3", "--temperature", "0", "--json")
    done = dsv4(*words, hub=hub, home=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"{NAME} is at commit {COMMIT}" in done.stderr
    first = json.loads(done.stdout)
    assert first["completions"][0]["prompt"] == "ab" and first["model"] == NAME
    sent = hub.files_sent()
    assert not [name for name in sent if name.endswith((".py", ".bin", ".pkl"))]
    assert {"config.json", "tokenizer.json", "model.safetensors.index.json"} < sent
    assert sum(name.endswith(".safetensors") for name in sent) > 1
    # Without the hub the cache serves that commit, and nothing else in its place.
    look = "from dsv4.checkpoint.hub import download; print(download(sys.argv[-1])); raise SystemExit\n"
    again = dsv4(f"{NAME}@{COMMIT}", hub=None, home=tmp_path, offline=True, before=look)
    cached = Path(again.stdout.strip())
    assert {name for name, _ in of(cached)} == sent and load(cached).config == load(commits[COMMIT]).config
    for spec in (f"{NAME}@{OLDER}", NAME):
        with_hint = "no copy of it in the cache: connect, name the commit of a copy"
        assert with_hint in dsv4(spec, hub=None, home=tmp_path, offline=True, before=look).stderr


def test_a_revision_is_the_one_that_was_asked_for(hub: Hub, commits: dict[str, Path], tmp_path: Path) -> None:
    for spec, commit, says in ((f"{NAME}@older", OLDER, True), (f"{NAME}@{OLDER}", OLDER, False), (NAME, COMMIT, True)):
        done = dsv4("inspect", "--from-hub", spec, "--json", hub=hub, home=tmp_path)
        assert done.returncode == 0, done.stderr + done.stdout
        assert json.loads(done.stdout)["checkpoint"] == f"{NAME}@{commit}"
        assert ("is at commit" in done.stderr) == says
    assert commits[COMMIT] != commits[OLDER]


@pytest.mark.parametrize("ranges", [True, False])
def test_inspect_fetches_headers_alone(commits: dict[str, Path], tmp_path: Path, ranges: bool) -> None:
    """Also where the server does not know ranges and would send all: then no more is read than is needed."""
    big = tmp_path / "big"
    save(small_model((0,), vocab_size=40_000), big)
    weights = (big / "model.safetensors").stat().st_size
    hub = Hub({COMMIT: big}, ranges=ranges)
    try:
        done = dsv4("inspect", "--from-hub", NAME, "--json", hub=hub, home=tmp_path / "home")
        local = dsv4("inspect", str(big), "--json", hub=hub, home=tmp_path / "home")
    finally:
        hub.shutdown()
        hub.server_close()
    assert done.returncode == 0, done.stderr
    theirs, ours = json.loads(done.stdout), json.loads(local.stdout)
    assert {k: v for k, v in theirs.items() if k not in ("path", "checkpoint")} == {
        k: v for k, v in ours.items() if k not in ("path", "checkpoint")
    }
    assert weights > 15_000_000 and theirs["files"] == {"model.safetensors": weights}
    if ranges:
        assert sum(n for _, path, n in hub.asked if path.endswith(".safetensors")) < 2_000_000
    assert not list((tmp_path / "home").rglob("*.safetensors")), "nothing of the weights stays on the disk"


def test_names_that_lead_out_of_the_folder(commits: dict[str, Path], hub: Hub, tmp_path: Path) -> None:
    """Said by the hub's own list or by the index: nothing is written elsewhere."""
    hub.extra = [{"rfilename": "../../escaped.safetensors", "size": 100}, {"rfilename": "/x.safetensors", "size": 5}]
    done = dsv4("inspect", "--from-hub", NAME, hub=hub, home=tmp_path / "home")
    assert done.returncode == 0, done.stderr
    evil = tmp_path / "evil"
    save(small_model((0,)), evil)
    (evil / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../escaped.safetensors"}}))
    hub.commits = {COMMIT: evil}
    done = dsv4("inspect", "--from-hub", NAME, hub=hub, home=tmp_path / "other")
    assert done.returncode != 0 and "is no .safetensors file in there" in done.stderr + done.stdout
    assert not list(tmp_path.rglob("escaped*"))


@pytest.mark.parametrize(("words", "says"), [
    (("inspect", "--from-hub", "owner/other"), "the hub has no model owner/other"),
    (("inspect", "--from-hub", f"{NAME}@nowhere"), "the hub has no revision 'nowhere'"),
    (("inspect", "--from-hub", "own er/mo..del"), "is no model's name"),
    (("inspect", "--from-hub", NAME, "--statistics"), "download it first"),
])  # fmt: skip
def test_what_cannot_be_had_is_one_sentence(hub: Hub, tmp_path: Path, words: tuple[str, ...], says: str) -> None:
    refused(dsv4(*words, hub=hub, home=tmp_path), says)


@pytest.mark.parametrize("spec", ["model", f"{NAME}@", "a/b/c", "/b", "a/", "", "@main"])
def test_what_is_no_name(spec: str) -> None:
    with pytest.raises(UserError, match="is no model's name: give OWNER/MODEL"):
        download(spec)


@pytest.mark.parametrize(("folder", "from_hub"), [("runs/x", NAME), (None, "")])
def test_a_folder_or_a_name_and_not_both(folder: str | None, from_hub: str) -> None:
    for look in (find_model, lambda folder, hub: inspect(folder and Path(folder), hub)):
        with pytest.raises(UserError, match="and not both"):
            look(folder, from_hub)


def refused(done: subprocess.CompletedProcess, says: str) -> None:
    assert done.returncode == 2 and says in done.stderr, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1 and "Traceback" not in done.stderr


def test_without_a_network_or_without_the_package(tmp_path: Path) -> None:
    refused(dsv4("inspect", "--from-hub", NAME, hub=None, home=tmp_path), "the hub cannot be asked for owner/model")
    refused(dsv4("inspect", "--from-hub", NAME, hub=None, home=tmp_path, offline=True), "the hub cannot be asked for")
    before = "sys.modules['huggingface_hub'] = None"
    done = dsv4("inspect", "--from-hub", NAME, hub=None, home=tmp_path, before=before)
    refused(done, "needs the package huggingface_hub: pip install 'dsv4[hub]'")


def test_the_patterns_name_nothing_that_runs() -> None:
    assert not [p for p in PATTERNS if p.endswith((".py", ".bin", ".pt", ".pkl", "*"))]
