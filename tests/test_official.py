"""Failures caught here: a port that agrees with itself and with transformers but not with the released inference code,
above all in what a packed memory keeps: a scale, a floor, a rotation, a rounding or a choice that is not the official.

The numbers in golden/official were made by that code (README there). Without quantisation everything must agree to
2e-5. With it, two evaluations that differ by 1e-6 put a number near a rounding border on different sides, and one such
step changes all later layers; so the whole model is compared with its stored numbers snapped to the official ones where
either side was right to 2e-5 of the block's largest number, and it is counted how often that was needed.
"""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from differences import differ
from official import CASES, CLOSE, GAP, SNAPPED, Seen, cases, check_choices, checkpoint, memory_of, snap_to, snapped_run
from torch import Tensor

from dsv4 import ops
from dsv4.checkpoint import load
from dsv4.model import Segment, Transformer
from dsv4.model.segments import plan
from dsv4.ops import formats
from dsv4.ops.formats import hadamard

CSA = (1, 3, 5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("official"))


@pytest.fixture(scope="module")
def model(folder: Path) -> Transformer:
    return load(folder)


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return cases()


# --- without quantisation --------------------------------------------------------------------------------------------


def check_plain(model: Transformer, golden: dict[str, Tensor], name: str, chunks: list[int]) -> None:
    case, ids, prompt = f"plain/{name}", golden[f"ids/{name}"], CASES[name]
    memory = memory_of(model, "float32", len(ids))
    seen = Seen(model, ids, chunks, memory)
    assert differ(golden[f"{case}/logits"], seen.logits[prompt - 1 :]) < CLOSE
    check_choices(model, seen, golden, case, prompt)
    at = golden[f"positions/{name}"].long()
    for i in range(4):
        assert differ(golden[f"{case}/after/{i}"], seen.streams[i][at]) < CLOSE, i
    for i, layer in enumerate(memory.layers):
        want = golden[f"{case}/window/{i}"]
        assert differ(want, memory.last(layer.window, len(want))) < CLOSE, i
        if f"{case}/entries/{i}" in golden:
            want = golden[f"{case}/entries/{i}"]
            assert (
                layer.attention is not None
                and differ(want, memory.entries(layer.attention.entries, len(want))[:]) < CLOSE
            ), i
        if layer.index is not None:
            want = golden[f"{case}/keys/{i}"]  # the official code keeps them rotated
            assert differ(want, hadamard(memory.entries(layer.index.entries, len(want))[:])) < CLOSE, i


@pytest.mark.parametrize("name", CASES)
def test_plain_prefill_then_tokens(model, golden, name) -> None:
    """As the official run went: one prompt, then a token at a time; logits, streams, rows, keys, experts, entries."""
    check_plain(model, golden, name, [CASES[name], *[1] * 12])


@pytest.mark.parametrize("name", CASES)
def test_plain_at_once(model, golden, name) -> None:
    check_plain(model, golden, name, [CASES[name] + 12])


@pytest.mark.parametrize("name", ["p3", "p131"])
def test_plain_token_by_token(model, golden, name) -> None:
    check_plain(model, golden, name, [1] * (CASES[name] + 12))


@pytest.mark.parametrize("name", CASES)
def test_plain_without_a_memory(model, golden, name) -> None:
    seen = Seen(model, golden[f"ids/{name}"], [CASES[name] + 12], None)
    assert differ(golden[f"plain/{name}/logits"], seen.logits[CASES[name] - 1 :]) < CLOSE


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("with_memory", [False, True])
def test_plain_mtp(model, golden, name, with_memory) -> None:
    """The MTP block over all rows but the last, in one call as the official one, and drafting with a memory."""
    ids, case = golden[f"ids/{name}"], f"plain/{name}"
    with torch.no_grad():
        if with_memory:
            memory = memory_of(model, "float32", len(ids))
            hidden, _, routing = model.draft(model.trunk(ids[:-1], [Segment(len(ids) - 1, memory)]), ids[1:])
        else:
            hidden, _, routing = model.predict_next(model.trunk(ids, [Segment(len(ids))]), ids)
        logits = model.logits(hidden[golden[f"mtp_positions/{name}"].long()])
    assert differ(golden[f"{case}/mtp_logits"], logits) < CLOSE
    clear = golden[f"{case}/mtp_routed_gap"] > GAP
    same = routing.chosen.sort(dim=1).values == golden[f"{case}/mtp_routed"].long().sort(dim=1).values
    assert same[clear].all()


# --- with quantised memories -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["p3", "p131"])
@pytest.mark.parametrize("chunked", [False, True])
def test_packed_whole_model(model, golden, name, chunked) -> None:
    """No row is refused, hardly a number needs snapping, and then logits, streams, experts and entries are official."""
    prompt = CASES[name]
    chunks = [prompt, *[1] * 12] if chunked else [prompt + 12]
    seen, _, refused, share = snapped_run(model, golden, name, chunks)
    assert refused == 0 and share < SNAPPED, (refused, share)
    assert differ(golden[f"kv/{name}/logits"], seen.logits[prompt - 1 :]) < CLOSE
    check_choices(model, seen, golden, f"kv/{name}", prompt)


@pytest.mark.parametrize("layer", [0, 2, 3])
def test_packed_one_block_at_a_time(model, golden, layer) -> None:
    """A window, an HCA and a CSA block on the official streams: nothing that an earlier block did can hide a fault."""
    ids, case = golden["ids/p131"], "kv/p131"
    memory = memory_of(model, "packed", len(ids))
    tallies = [s.tally for s in snap_to(memory, golden, case)]
    with torch.no_grad():
        first = model.embed(ids)[:, None].expand(-1, model.config.hc_mult, -1).contiguous()
        x = golden[f"{case}/after/{layer - 1}"] if layer else first
        run = plan(model.config, [Segment(len(ids), memory)], torch.device("cpu"))
        got, routing = model.layers[layer](x, ids, run, [memory.layers[layer]])
    want = golden[f"{case}/after/{layer}"]
    assert differ(want, got if len(want) == len(ids) else got[golden["positions/p131"].long()]) < CLOSE
    assert sum(t.rows for t in tallies) >= len(ids) and sum(t.refused for t in tallies) == 0
    assert sum(t.snapped for t in tallies) <= SNAPPED * sum(t.numbers for t in tallies)
    clear = golden[f"{case}/routed_gap"][layer] > GAP
    same = routing.chosen.sort(dim=1).values == golden[f"{case}/routed"][layer].long().sort(dim=1).values
    assert same[clear].all()


@pytest.mark.parametrize("name", ["p3", "p131"])
def test_packed_mtp_rounds_its_window_rows(model, golden, name) -> None:
    """The official MTP block keeps rounded rows. Its rows are not on file, so they cannot be snapped, and one number on
    the other side of a border moves the logits of 16 positions by some 1e-3. On the official streams most positions
    must be exact all the same; without the rounding none is within 1e-2 (checked here as well)."""
    ids, case = golden[f"ids/{name}"], f"kv/{name}"
    seen, memory, refused, _ = snapped_run(model, golden, name, [len(ids)])
    at = golden[f"mtp_positions/{name}"].long()
    following = torch.cat([ids[1:], ids[:1]])  # nothing is asked of the last row
    assert refused == 0
    with torch.no_grad():
        hidden, _, routing = model.draft(seen.trunk, following)
        alone = replace(seen.trunk, run=plan(model.config, [Segment(len(ids))], torch.device("cpu")))
        unrounded, _, _ = model.predict_next(alone, ids)
        off, without = (
            (model.logits(h[at]) - golden[f"{case}/mtp_logits"]).abs().amax(dim=1) for h in (hidden, unrounded)
        )
    assert (off < CLOSE).sum() >= 5 and off.max() < 1e-2 < without[1:].min()
    clear = golden[f"{case}/mtp_routed_gap"] > GAP
    same = routing.chosen[:-1].sort(dim=1).values == golden[f"{case}/mtp_routed"].long().sort(dim=1).values
    assert same[clear].all()


@pytest.mark.parametrize("mode", ["plain", "kv"])
def test_bf16_is_as_far_from_fp32_as_the_official_bf16(folder, golden, mode) -> None:
    """Two bf16 runs are each off by their own rounding, so only how far they are can be compared: at each of 39
    positions the mean over its logits, in units of the official run's distance from fp32 there, and of these the
    middle one. Now and then a rounding turns an expert or an entry over, and positions are ten times as far, on one
    processor and not on another: of the 13 positions of one prompt the middle one goes from 0.7 to 1.6. Measured on
    all of them, with AVX2, AVX-512 and its BF16: 0.82 to 1.00 from fp32, 0.61 to 1.10 from the official run; the
    torch ops 0.98 and 1.02."""
    model = load(folder, "bfloat16")

    def apart(a: Tensor, b: Tensor) -> Tensor:
        return (a - b).abs().mean(dim=1)

    def middle() -> tuple[float, float]:
        """How far from fp32, and from the official run."""
        from_exact, from_official = [], []
        for name, prompt in CASES.items():
            ids = golden[f"ids/{name}"]
            memory = model.new_cache(format="packed" if mode == "kv" else "bfloat16")[0]
            with torch.no_grad():
                got = model(ids, segments=[(len(ids), memory)])[prompt - 1 :]
            official, exact = golden[f"bf16_{mode}/{name}/logits"], golden[f"{mode}/{name}/logits"]
            from_exact.append(apart(got, exact) / apart(official, exact))
            from_official.append(apart(got, official) / apart(official, exact))
        return torch.cat(from_exact).median().item(), torch.cat(from_official).median().item()

    with ops.using("blocked"):
        exact, official = middle()
        assert exact < 1.25 and official < 1.25
    exact, official = middle()
    assert exact < 1.25 and official < 1.25


# --- would a fault be noticed? ---------------------------------------------------------------------------------------


def truncating(x: Tensor) -> Tensor:
    """e4m3 towards zero."""
    nearest = x.to(torch.float8_e4m3fn)
    codes = nearest.view(torch.uint8)
    return codes - (nearest.float().abs() > x.abs()).to(torch.uint8)


FAULTS = {  # how to plant it, and what must notice it: rows refused, numbers snapped
    "a block's largest number is floored at 1e-5": (lambda p, model: p.setitem(formats._FLOOR, "fp8", 1e-5), "refused"),
    "e4m3 truncates": (lambda p, model: p.setattr(formats, "to_e4m3", truncating), "snapped"),
    "index rows are not rotated": (lambda p, model: p.setattr(formats, "hadamard", lambda x: x), "refused"),
    "one entry too many is chosen": (
        lambda p, model: [p.setattr(model.layers[i].attn.indexer, "topk", 9) for i in CSA], "refused",
    ),
    "the shared expert does not clamp": (
        lambda p, model: [p.setattr(layer.ffn.shared_experts, "limit", 1e9) for layer in model.layers], "refused",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_noticed(model, golden, monkeypatch, fault) -> None:
    """Measured: 178, 0, 542, 542 and 566 of 1,928 rows refused; of truncated numbers 30% snapped."""
    plant, noticed = FAULTS[fault]
    plant(monkeypatch, model)
    with ops.using("blocked"):  # the faults are planted in Python
        _, _, refused, share = snapped_run(model, golden, "p131", [143])
    assert refused > 100 if noticed == "refused" else share > 100 * SNAPPED
