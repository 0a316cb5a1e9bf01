"""Failures caught here: a peer that computes something else is timed as if it did not, one that is not there or breaks
down ends in a traceback or leaves a process behind, what is put into vLLM prepares other steps than its kernels need, a
GGUF file lacks a number. The peers themselves are not installed here; who has them compares by `dsv4 bench frontier`.
"""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dsv4 import save
from dsv4.bench import agree, frontier, llama_peer, outside, vllm_peer
from dsv4.errors import UserError
from dsv4.measure.clock import Skip
from dsv4.measure.subjects import randomise, small_model
from dsv4.model import Transformer

ROOT = Path(__file__).resolve().parents[1]

# A peer that is our own model, read from the folder as any peer reads it; LIE is put between it and its answers.
FAKE = f"""
import os, sys, time
sys.path.insert(0, {str(ROOT)!r})

def missing(): return "{{missing}}"
def version(): return "fake 1"
def environment(threads): return {{{{"FAKE_THREADS": str(threads), "NOTHING": ""}}}}

class Peer:
    def __init__(self, job):
        import torch
        from dsv4 import load
        torch.set_num_threads(1)
        assert os.environ["FAKE_THREADS"] and "NOTHING" not in os.environ
        self.torch, self.model = torch, load(job["folder"]).eval()
        print("this is noise")
    def read(self, ids):
        with self.torch.inference_mode():
            return self.model(self.torch.tensor(ids))[-1]
    def best(self, ids, count):
        logits = self.read(ids)
        {{lie}}
        found = logits.log_softmax(-1).topk(count)
        return found.indices.tolist(), found.values.tolist()
    def measure(self, ids, steps):
        began = time.perf_counter()
        self.read(ids)
        return time.perf_counter() - began, [0.5, 0.5, *[0.25] * (steps - 2)]
"""


def fake(folder: Path, *, missing: str = "", lie: str = "") -> Path:
    path = folder / "fake_peer.py"
    path.write_text(FAKE.format(missing=missing, lie=lie or "pass"), encoding="utf-8")
    return path


RATES = {
    "matmul_tflops": 1.0, "fp32_tflops": 1.0, "bf16_tflops": 1.0, "read_gb_s": 1.0, "copy_gb_s": 1.0, "threads": 1,
}  # fmt: skip


@pytest.fixture
def tiny_plan(monkeypatch: pytest.MonkeyPatch) -> frontier.Plan:
    monkeypatch.setitem(frontier.PEERS, "fake", "")
    monkeypatch.setattr(frontier, "machine", lambda dtype: RATES)  # measuring it takes seconds, and is not the matter
    return frontier.plan("tiny", "float32", "", [30, 60], 2, [], "")


def measured(plan: frontier.Plan, script: Path, said: list[str]) -> list[dict]:
    peer = outside.find("fake", sys.executable, 1, script)
    against: dict[str, outside.Outside | None] = {"fake": peer}
    return list(frontier.measure(replace(plan, against=against), said.append))


def test_a_peer_in_its_own_python_is_judged_and_timed(tiny_plan: frontier.Plan, tmp_path: Path) -> None:
    said: list[str] = []
    rows = measured(tiny_plan, fake(tmp_path), said)
    assert [(r["who"], r["ctx"]) for r in rows] == [(who, n) for who in ("dsv4", "fake") for n in (30, 60)]
    for r in rows[2:]:
        assert r["decode_ms"] == 250, "the first steps are not counted"
        assert r["apart"] < 1e-5 and r["apart_ours"] < 1e-5 and r["cache_bytes"] is None and r["peak_rss"] > 2**24
    assert [line for line in said if "repeat 2 of 2" in line and line.startswith("fake 1")]


@pytest.mark.parametrize(
    "lie",
    ["logits = 1.05 * logits", "logits = self.read([*ids[1:], 0])", "logits = logits * float('nan')"],
    ids=["another scale", "another prompt", "no number"],
)
def test_a_peer_that_computes_something_else_is_not_timed(lie: str, tiny_plan: frontier.Plan, tmp_path: Path) -> None:
    *rows, last = measured(tiny_plan, fake(tmp_path, lie=lie), [])
    assert [r["who"] for r in rows] == ["dsv4", "dsv4"]
    assert last["who"] == "fake" and "computes another function" in last["skipped"]


def test_a_peer_that_breaks_down_says_its_last_words(tiny_plan: frontier.Plan, tmp_path: Path) -> None:
    last = measured(tiny_plan, fake(tmp_path, lie="raise ValueError('no such layer')"), [])[-1]
    assert last["skipped"] == "fake 1 failed: ValueError: no such layer"


def test_who_stops_listening_stops_the_process(tmp_path: Path) -> None:
    peer = outside.find("fake", sys.executable, 1, fake(tmp_path, lie="time.sleep(60 if len(ids) > 1 else 0)"))
    save(small_model(), tmp_path)
    job = {"folder": str(tmp_path), "checks": [1, 2], "check_ids": [3, 4], "best": 5}
    running = peer.run(job)
    assert next(running)["length"] == 1
    process = running.gi_frame.f_locals["process"]
    assert process.poll() is None
    running.close()
    assert process.poll() is not None


@pytest.mark.skipif(sys.platform != "linux", reason="the count of the program alone is Linux's")
def test_a_peer_is_not_charged_for_our_memory() -> None:
    held = torch.ones(1 << 26)  # 256 MiB here
    code = f"import runpy; print(runpy.run_path({str(ROOT / 'dsv4/bench/peerside.py')!r})['peak_rss']())"
    told = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True, check=True).stdout
    assert 2**20 < int(told) < 2**27 < held.nbytes


def test_a_peer_that_is_not_there_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"cannot run fake: pip install fake; or name .* DSV4_FAKE_PYTHON"):
        outside.find("fake", sys.executable, 1, fake(tmp_path, missing="pip install fake"))
    with pytest.raises(UserError, match="no-such-python cannot be run as a Python"):
        outside.find("fake", "no-such-python", 1)
    monkeypatch.setenv("DSV4_FAKE_PYTHON", str(tmp_path / "gone"))
    with pytest.raises(UserError, match="gone cannot be run as a Python"):
        outside.find("fake", "", 1)
    wrong = tmp_path / "wrong_peer.py"
    wrong.write_text("import nothing_of_that_name", encoding="utf-8")
    with pytest.raises(UserError, match=r"ModuleNotFoundError.*name the Python"):
        outside.find("fake", sys.executable, 1, wrong)
    for name in ("vllm", "llama", "nano"):
        with pytest.raises(UserError, match=f"cannot run {name}: it has no .*pip install"):
            outside.find(name, sys.executable, 1)


@pytest.mark.parametrize("bf16", [True, False])
def test_vllm_is_not_started_where_it_has_no_kernels(monkeypatch: pytest.MonkeyPatch, bf16: bool) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0.32.0")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("torch.cpu._is_avx512_bf16_supported", lambda: bf16)
    assert ("AVX-512 with BF16" in vllm_peer.missing()) != bf16


def test_the_judge_allows_roundings_and_nothing_else() -> None:
    """In fp32 a window that is one token short is another function; in bf16 what the rounding does passes."""
    model = small_model((0, 4, 128))
    judge = agree.Judge(model)

    def found(other: Transformer, format: str) -> dict[int, agree.Best]:
        return {n: agree.best(agree.logprobs(other, format, judge.ids[:n]), judge.number) for n in agree.LENGTHS}

    assert judge.check("ours", found(model, "float32"), "float32") == (judge.ours("float32"),) * 2
    short = Transformer(model.config.with_(sliding_window=127)).eval()
    short.load_state_dict(model.state_dict())
    with pytest.raises(Skip, match="short computes another function"):
        judge.check("short", found(short, "float32"), "float32")
    with pytest.raises(AssertionError, match="a prompt has no answer"):
        judge.check("half", {1: found(model, "float32")[1]}, "float32")
    coarse = Transformer(model.config, torch.bfloat16).eval()
    coarse.load_state_dict(model.state_dict())
    judge = agree.Judge(coarse)
    theirs, ours = judge.check("coarse", found(coarse, "packed"), "packed")
    assert theirs == ours > judge.ours("bfloat16") > 0


@pytest.mark.slow
def test_how_far_away_mistakes_are() -> None:
    """What agree.py says of the model that is timed: mistakes of ports stand far above the bounds in fp32, and of those
    in bf16 only the great ones do.
    """
    planned = frontier.plan("bench", "float32", "", [1], 1, [], "")
    model = randomise(Transformer(planned.config), std=None).eval()
    judge = agree.Judge(model)

    def away(change: dict[str, Any], wrong: Callable[[str, torch.Tensor], torch.Tensor]) -> float:
        other = Transformer(planned.config.with_(**change)).eval()
        other.load_state_dict({name: wrong(name, value) for name, value in model.state_dict().items()})
        found = {n: agree.best(agree.logprobs(other, "float32", judge.ids[:n]), judge.number) for n in agree.LENGTHS}
        return judge.apart(found)

    close = agree.CLOSE
    assert away({"sliding_window": 127}, lambda name, value: value) > 20 * close[torch.float32]
    assert (
        away({}, lambda name, value: value - 1e9 if name.endswith("attn_sink") else value) > 20 * close[torch.float32]
    )
    assert away({}, lambda name, value: 0 * value if name.endswith("gate.bias") else value) > close[torch.bfloat16]
    rounded = Transformer(planned.config, torch.bfloat16).eval()
    rounded.load_state_dict(model.state_dict())
    assert agree.Judge(rounded).ours("bfloat16") < close[torch.bfloat16] / 2


# --- vLLM: three requests of 5, 1 and 3 new tokens after 7, 11 and 0 --------------------------------------------------

STARTS = torch.tensor([0, 5, 6, 9], dtype=torch.int32)
LENGTHS = torch.tensor([12, 12, 3], dtype=torch.int32)
OWNER = [0, 0, 0, 0, 0, 1, 2, 2, 2]
POSITION = [7, 8, 9, 10, 11, 11, 0, 1, 2]


def test_what_is_put_into_vllm_says_whose_each_token_is() -> None:
    out = torch.full((12,), 77, dtype=torch.int32)
    got = vllm_peer.request_of_token(STARTS, out, 9, 11)
    assert got.tolist() == [*OWNER, 0, 0] and got.dtype == torch.int32
    assert out[11] == 77, "beyond what was asked for"


@pytest.mark.parametrize("ratio", [4, 128])
def test_what_is_put_into_vllm_says_where_entries_are_kept(ratio: int) -> None:
    """Blocks of two entries, at places that no other request has; a token without a slot of its own closes none."""
    table = torch.tensor([[5, 9], [2, 7], [4, 0]], dtype=torch.int32)
    slots = torch.arange(9)
    slots[5] = -1
    want = []
    for token, (owner, position) in enumerate(zip(OWNER, POSITION, strict=True)):
        entry = position // ratio
        closes = (position + 1) % ratio == 0 and token != 5
        want.append(int(table[owner, entry // 2]) * 2 + entry % 2 if closes else -1)
    got = vllm_peer.slots_of_entries(9, slots, STARTS, LENGTHS, table, 2, ratio, out=torch.zeros(16, dtype=torch.int64))
    assert got.tolist() == want and got.dtype == torch.int64
    assert vllm_peer.slots_of_entries(9, slots, STARTS, LENGTHS, table, 2, ratio).tolist() == want
    assert (sum(slot >= 0 for slot in want) == 2) == (ratio == 4)


def test_what_is_put_into_vllm_says_which_entries_a_token_sees() -> None:
    """The prefills among them, requests 0 and 2, in a slice that begins at the second token."""
    starts, lengths = torch.tensor([0, 5, 8], dtype=torch.int32), torch.tensor([12, 3], dtype=torch.int32)
    before = torch.tensor([0, 3, 3], dtype=torch.int32)  # 12 // 4 entries, then 3 // 4
    owner, first, end = (torch.full((n,), -5, dtype=torch.int32) for n in (3, 7, 7))
    vllm_peer.visible_entries(
        starts, lengths, before, before, owner, first, end, 1, 8, 0, 1, 1, num_reqs=2, COMPRESS_RATIO=4
    )
    assert owner.tolist() == [0, 0, 0]
    assert first.tolist() == [0, 0, 0, 0, 3, 3, 3]
    assert end.tolist() == [2, 2, 2, 3, 3, 3, 3]  # positions 8 to 11 see 2, 2, 2, 3 of theirs; 0 to 2 none


# --- llama.cpp -------------------------------------------------------------------------------------------------------


def test_every_tensor_has_one_place_in_the_file(tmp_path: Path) -> None:
    """And is read from ours as it is, in both dtypes, without torch."""
    for dtype in (torch.float32, torch.bfloat16):
        model = Transformer(small_model((0, 4, 128)).config, dtype)
        save(model, tmp_path)
        names = set()
        for name, kind, data in llama_peer.tensors(tmp_path / "model.safetensors"):
            if kind == "BF16":
                read = torch.from_numpy(data.copy()).view(torch.bfloat16)
            else:
                read = torch.from_numpy(data.copy())
            place = model.state_dict().get(name)
            assert place is None or torch.equal(read, place), name
            if not llama_peer._EXPERT.fullmatch(name):
                names.add(llama_peer.target_name(name, model.config.num_hash_layers))
        plain = sum(not llama_peer._EXPERT.fullmatch(n) for n, *_ in llama_peer.tensors(tmp_path / "model.safetensors"))
        assert len(names) == plain, "two tensors in one place, or one that is left out"


def test_a_gguf_file_reads_back(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf", reason="the writer of the file is the package gguf, which is optional")
    model = small_model((0, 4, 128))
    save(model, tmp_path)
    llama_peer.write(tmp_path, tmp_path / "model.gguf")
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    found = {tensor.name: tensor for tensor in reader.tensors}
    experts = torch.from_numpy(found["blk.1.ffn_gate_exps.weight"].data.copy())
    assert torch.equal(experts, model.state_dict()["layers.1.ffn.experts.w13"][:, 0])
    assert torch.equal(torch.from_numpy(found["token_embd.weight"].data.copy()), model.state_dict()["embed.weight"])
    said = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert set(llama_peer.keys(said)) <= set(reader.fields)
    ratios = reader.fields["deepseek4.attention.compress_ratios"].contents()
    assert list(ratios) == list(model.config.compress_ratios)
    assert found["blk.0.ffn_gate_tid2eid.weight"].data.dtype == "int32"
