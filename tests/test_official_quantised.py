"""Failures caught here: a released checkpoint, FP8 and FP4 as it lies on file, that loads as another model, or whose
function is not the released code's: other numbers in a matrix, an input that is rounded by another rule, where it
should not be, or not at all.

golden/official has a second model for this (Q), in the published dtypes; its README says how numbers at a rounding
border are compared. Mode `all` rounds what goes into every FP8 and FP4 matrix; those inputs are not on file, so none
can be snapped. One in the three prompts hangs on the order in which FP32 is summed: in p131, layer 1, token 16, channel
63 is a unit in the last place from halfway between two codes. That prompt is run in a few orders: in one all must hold.
"""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from differences import differ
from official import CASES, CLOSE, GAP, SNAPPED, Seen, cases, check_choices, checkpoint, memory_of, snapped_run
from torch import Tensor

from dsv4 import load, ops
from dsv4.checkpoint.names import file_names
from dsv4.errors import UserError
from dsv4.model import Segment, Transformer
from dsv4.model.packed import choose_numbers, packed_of
from dsv4.ops import TABLE, reference
from dsv4.ops.weights import PackedMatrix, round_inputs

# Orders in which products add up their channels: as torch does it, then drawn from a seed. See `in_order`.
ORDERS = (None, *range(6))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("quantised"), "_fp8fp4")


@pytest.fixture(scope="module")
def model(folder: Path) -> Transformer:
    return load(folder, weights="released")


@pytest.fixture(scope="module")
def published(folder: Path) -> Transformer:
    return load(folder, weights="released", numbers="published")


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return cases("_fp8fp4")


# --- the numbers of the matrices -------------------------------------------------------------------------------------


def digests_on_file(folder: Path) -> dict[str, str]:
    """Name of a tensor on file -> sha256 of its numbers in BF16, as the makers of the file saw them."""
    data = (folder / "model.safetensors").read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    mark = "bf16_sha256:"
    return {k.removeprefix(mark): v for k, v in header["__metadata__"].items() if k.startswith(mark)}


def digest(numbers: Tensor) -> str:
    return hashlib.sha256(numbers.bfloat16().contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def test_131_matrices_are_those_on_file_packed_and_unpacked(folder, model):
    """The codes in the packed model, and the numbers of a model that was loaded in BF16 and in FP32."""
    want = digests_on_file(folder)
    assert len(want) == 131
    plain = {dtype: dict(load(folder, dtype).named_parameters()) for dtype in ("bfloat16", "float32")}
    seen = set()
    for name, matrix in packed_of(model).items():
        shape = plain["float32"][name].shape
        numbers = matrix.unpack(torch.float32).view(shape)
        for file_name, place in file_names(name, tuple(shape), "published"):
            seen.add(file_name)
            assert digest(numbers[place]) == want[file_name], file_name
            for dtype, parameters in plain.items():
                assert digest(parameters[name].detach()[place]) == want[file_name], (file_name, dtype)
    assert seen == set(want)


def test_what_the_released_files_keep_in_codes_is_packed(model):
    kinds = {
        name.split(".", 2)[2] if name.startswith("layers") else name: m.code for name, m in packed_of(model).items()
    }
    assert {kind for kind, code in kinds.items() if code == "fp4" and "mtp" not in kind} == {
        "ffn.experts.w13", "ffn.experts.w2",
    }  # fmt: skip
    assert kinds["attn.wo_a.weight"] == kinds["attn.indexer.wq_b.weight"] == kinds["mtp.0.e_proj.weight"] == "fp8"
    assert len(packed_of(model)) == 3 * 10 + 1 + 10 + 2  # blocks, one indexer, the MTP block, its two projections
    assert type(model.head.weight) is torch.nn.Parameter


# --- mode plain ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", ["released", "plain"])
@pytest.mark.parametrize("name", CASES)
def test_plain(folder, model, golden, name, weights):
    """One prompt, then a token at a time: logits, streams, experts, chosen entries; then the MTP block."""
    model = model if weights == "released" else load(folder)
    case, ids, prompt = f"plain/{name}", golden[f"ids/{name}"], CASES[name]
    memory = memory_of(model, "float32", len(ids))
    seen = Seen(model, ids, [prompt, *[1] * 12], memory)
    assert differ(golden[f"{case}/logits"], seen.logits[prompt - 1 :]) < CLOSE
    check_choices(model, seen, golden, case, prompt)
    if f"{case}/after/0" in golden:
        for i in range(3):
            assert differ(golden[f"{case}/after/{i}"], seen.streams[i][golden[f"positions/{name}"].long()]) < CLOSE, i
    with torch.no_grad():
        hidden, _, routing = model.predict_next(model.trunk(ids, [Segment(len(ids))]), ids)
        logits = model.logits(hidden[golden[f"mtp_positions/{name}"].long()])
    assert differ(golden[f"{case}/mtp_logits"], logits) < CLOSE
    same_experts(golden, case, routing.chosen)


def same_experts(golden: dict[str, Tensor], case: str, chosen: Tensor) -> None:
    clear = golden[f"{case}/mtp_routed_gap"] > GAP
    same = chosen.sort(dim=1).values == golden[f"{case}/mtp_routed"].long().sort(dim=1).values
    assert same[clear].all()


# --- modes kv and all ------------------------------------------------------------------------------------------------


@contextmanager
def in_order(seed: int | None) -> Iterator[None]:
    """Every product of a matrix adds up its channels in an order drawn from the seed: another of the ways to evaluate
    the same function in FP32, of which the official run is one, too."""
    if seed is None:
        yield
        return
    linear, generator = F.linear, torch.Generator().manual_seed(seed)

    def mixed(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        order = torch.randperm(x.shape[-1], generator=generator)
        return linear(x[..., order], weight[:, order], bias)

    with pytest.MonkeyPatch.context() as patch, ops.using("reference"):
        patch.setattr(F, "linear", mixed)
        yield


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("chunked", [False, True])
def test_kv(model, golden, name, chunked):
    """Of the window rows only the last 16 are on file and snapped, so one position may feel an earlier row's rounding
    (measured: one in p131, by 2.6e-5)."""
    seen, _, refused, share = run(model, golden, "kv", name, chunked)
    assert refused == 0 and share < SNAPPED, (refused, share)
    off = (seen.logits[CASES[name] - 1 :] - golden[f"kv/{name}/logits"]).abs().amax(dim=1)
    assert (off < CLOSE).sum() >= 12 and off.max() < 2 * CLOSE
    check_choices(model, seen, golden, f"kv/{name}", CASES[name])


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("chunked", [False, True])
def test_all(published, golden, name, chunked):
    """Every position to 2e-5 (measured 1.7e-6), no row refused, at most one number in 20,000 snapped."""
    seen, refused, share = agreeing(published, golden, name, chunked)
    assert refused == 0 and share < SNAPPED, (refused, share)
    assert differ(golden[f"all/{name}/logits"], seen.logits[CASES[name] - 1 :]) < CLOSE
    check_choices(published, seen, golden, f"all/{name}", CASES[name])
    if f"all/{name}/after/0" in golden:
        for i in range(3):
            at = golden[f"positions/{name}"].long()
            assert differ(golden[f"all/{name}/after/{i}"], seen.streams[i][at]) < CLOSE, i


def agreeing(model: Transformer, golden: dict[str, Tensor], name: str, chunked: bool) -> tuple[Seen, int, float]:
    """A run in the mode `all`, in the first order in which no row is refused: what it showed, refused, snapped."""
    for order in ORDERS if name == "p131" else ORDERS[:1]:
        with in_order(order):
            seen, _, refused, share = run(model, golden, "all", name, chunked)
        if not refused:
            break
    return seen, refused, share


def run(model: Transformer, golden: dict[str, Tensor], mode: str, name: str, chunked: bool):
    prompt = CASES[name]
    return snapped_run(model, golden, name, [prompt, *[1] * 12] if chunked else [prompt + 12], mode)


@pytest.mark.parametrize("mode", ["kv", "all"])
@pytest.mark.parametrize("name", CASES)
def test_mtp_with_rounded_rows(model, published, golden, mode, name):
    """The MTP block's own rows and inputs are not on file: what one of them moves is 16 positions. Most of the 8 that
    are on file must be exact all the same, and the least exact one near."""
    ids = golden[f"ids/{name}"]
    if mode == "all":
        model = published
        seen, refused, _ = agreeing(model, golden, name, False)
    else:
        seen, _, refused, _ = run(model, golden, mode, name, False)
    assert refused == 0
    with torch.no_grad():
        hidden, _, routing = model.draft(seen.trunk, torch.cat([ids[1:], ids[:1]]))  # nothing is asked of the last row
        logits = model.logits(hidden[golden[f"mtp_positions/{name}"].long()])
    off = (logits - golden[f"{mode}/{name}/mtp_logits"]).abs().amax(dim=1)
    assert (off < 5 * CLOSE).sum() >= 4 and off.max() < 5e-3, off
    same_experts(golden, f"{mode}/{name}", routing.chosen[:-1])


def test_published_numbers_need_no_memory_to_be_given(published, golden):
    """A plain call rounds the rows that attention reads all the same, and so does the MTP block's loss."""
    ids, case = golden["ids/p3"], "all/p3"
    with torch.no_grad():
        assert differ(golden[f"{case}/logits"], published(ids)[2:]) < CLOSE
        trunk = published.trunk(ids, [Segment(len(ids))])
        hidden, rows, routing = published.predict_next(trunk, ids)
        assert rows.tolist() == list(range(len(ids) - 1)) and len(routing.chosen) == len(rows)
        logits = published.logits(hidden[golden["mtp_positions/p3"].long()])
    assert differ(golden[f"{case}/mtp_logits"], logits) < CLOSE
    assert published.new_pool().format == "packed"


# --- the rounding of inputs ------------------------------------------------------------------------------------------


def e4m3(x: np.ndarray) -> np.ndarray:
    """Nearest e4m3 number of x in [-448, 448], ties to the even code, by arithmetic in float64."""
    a = np.abs(x)
    exponent = np.maximum(np.floor(np.log2(np.where(a > 0, a, 1.0))), -6)
    step = 2.0 ** (exponent - 3)
    return np.sign(x) * np.rint(a / step) * step  # rint is to the even multiple, which is the even code


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [128, 192, 384])
def test_inputs_are_rounded_as_the_rule_says(dtype, width):
    """For every 128 channels of a token: floor 1e-4, scale 2^ceil(log2(largest / 448)), e4m3; blocks of every size, the
    floor's neighbourhood and powers of two among them, in exact arithmetic."""
    seed = torch.Generator().manual_seed(3)
    x = torch.randn(64, width, generator=seed) * torch.logspace(-9, 6, 64)[:, None]
    x[10], x[11, ::2], x[12] = 0.0, 448.0, 1e-4
    x = x.to(dtype)
    got = round_inputs(x)
    for begin in range(0, width, 128):
        block = x[:, begin : begin + 128].double().numpy()
        largest = np.maximum(np.abs(block).max(axis=1, keepdims=True), np.float64(np.float32(1e-4)))
        scale = 2.0 ** np.ceil(np.log2(largest / 448))
        assert np.array_equal(got[:, begin : begin + 128].double().numpy(), e4m3(block / scale) * scale)
    assert got.dtype == dtype


def unrounded(model: Transformer, plant: pytest.MonkeyPatch) -> None:
    plant.setattr(PackedMatrix, "as_input", lambda self, x: x)


def one_unrounded(model: Transformer, plant: pytest.MonkeyPatch) -> None:
    plant.setattr(model.layers[0].attn.wo_b.weight, "rounds_inputs", False)


def one_too_many(model: Transformer, plant: pytest.MonkeyPatch) -> None:
    """wo_a's input is rounded too."""
    plant.setattr(reference, "rotate", lambda x, turn: rounded_back(x, turn))


_rotate = reference.rotate


def rounded_back(x: Tensor, turn: Tensor) -> Tensor:
    """Rotated, and where that is back (of queries before wo_a), rounded as if it were an input to round."""
    out = _rotate(x, turn)
    return round_inputs(out.flatten(1)).view(out.shape) if turn.is_conj() else out


def weighted_late(model: Transformer, plant: pytest.MonkeyPatch) -> None:
    """Experts are weighted behind their last matrix, which is the same but for the rounding before it."""

    def experts(x, chosen, weights, w13, w2, limit):
        slots = range(chosen.shape[1])
        ones = torch.ones(len(x), 1)
        parts = [weights[:, k : k + 1] * _experts(x, chosen[:, k : k + 1], ones, w13, w2, limit) for k in slots]
        return torch.stack(parts).sum(dim=0)

    plant.setitem(TABLE["experts"], "reference", experts)


_experts = reference.experts


@pytest.mark.parametrize("plant", [unrounded, one_unrounded, one_too_many, weighted_late])
def test_planted_faults_are_noticed(published, golden, monkeypatch, plant):
    """Measured: 103 rows refused or more, logits off by 2 or more."""
    plant(published, monkeypatch)
    seen, _, refused, _ = snapped_run(published, golden, "p131", [143], "all")
    off = differ(golden["all/p131/logits"], seen.logits[130:])
    assert refused > 50 and off > 0.1


def test_published_numbers_of_a_model_without_codes(folder):
    with pytest.raises(UserError, match="load a released checkpoint with weights='released'"):
        load(folder, numbers="published")
    with pytest.raises(UserError, match="numbers='exact' is unknown"):
        load(folder, weights="released", numbers="exact")
    with pytest.raises(UserError, match="weights='fp8' is unknown"):
        load(folder, weights="fp8")  # type: ignore[arg-type]


def test_the_choice_can_be_taken_back(folder, model, golden):
    again = load(folder, weights="released", numbers="published")
    choose_numbers(again, "plain")
    with torch.no_grad():
        assert torch.equal(again(golden["ids/p3"]), model(golden["ids/p3"]))
